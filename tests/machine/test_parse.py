"""The parsers against excerpts of what macOS commands really print.

Every sample names the public source it was taken from; lines were left out, none was changed unless it is said.
"""

from __future__ import annotations

import json

import pytest

from nanogpt_mac.machine import parse

# archspec/archspec-json, tests/targets/darwin-monterey-m1: a file of `sysctl -a` lines (macOS 12 names no levels).
SYSCTL_M1_PRO = """\
hw.memsize: 17179869184
hw.perflevel0.physicalcpu: 6
hw.perflevel1.physicalcpu: 2
hw.physicalcpu: 8
hw.nperflevels: 2
machdep.cpu.brand_string: Apple M1 Pro
"""
# archspec/archspec-json, tests/targets/darwin-monterey-m2.
SYSCTL_M2 = """\
hw.memsize: 17179869184
hw.perflevel0.physicalcpu: 4
hw.perflevel1.physicalcpu: 4
hw.physicalcpu: 8
machdep.cpu.brand_string: Apple M2
"""
# archspec/archspec-json, tests/targets/darwin-sequoia-m3.
SYSCTL_M3_MAX = """\
hw.memsize: 38654705664
hw.perflevel0.physicalcpu: 10
hw.perflevel0.name: Performance
hw.perflevel1.physicalcpu: 4
hw.perflevel1.name: Efficiency
hw.physicalcpu: 14
machdep.cpu.brand_string: Apple M3 Max
"""
# archspec/archspec-json, tests/targets/darwin-sequoia-m4.
SYSCTL_M4_MAX = """\
hw.memsize: 68719476736
hw.perflevel0.physicalcpu: 12
hw.perflevel0.name: Performance
hw.perflevel1.physicalcpu: 4
hw.perflevel1.name: Efficiency
hw.physicalcpu: 16
machdep.cpu.brand_string: Apple M4 Max
"""
# No paste of an M5 was found. The names of the levels are those of lablup/all-smi#167 and its src/device/cpu_macos.rs
# ("M5 Pro/Max: perflevel0.name=Super, perflevel1.name=Performance"), the counts those of pytorch/cpuinfo#424.
SYSCTL_M5_PRO = """\
hw.perflevel0.physicalcpu: 5
hw.perflevel0.name: Super
hw.perflevel1.physicalcpu: 10
hw.perflevel1.name: Performance
machdep.cpu.brand_string: Apple M5 Pro
"""
# archspec/archspec-json, tests/targets/darwin-bigsur-m1.
SYSCTL_M1_BIG_SUR = "machdep.cpu.core_count: 8\nmachdep.cpu.brand_string: Apple processor\n"


@pytest.mark.parametrize(
    ("text", "brand", "kinds"),
    [
        (SYSCTL_M1_PRO, "Apple M1 Pro", {"performance": 6, "efficiency": 2}),
        (SYSCTL_M2, "Apple M2", {"performance": 4, "efficiency": 4}),
        (SYSCTL_M3_MAX, "Apple M3 Max", {"performance": 10, "efficiency": 4}),
        (SYSCTL_M4_MAX, "Apple M4 Max", {"performance": 12, "efficiency": 4}),
        (SYSCTL_M5_PRO, "Apple M5 Pro", {"super": 5, "performance": 10}),
        (SYSCTL_M1_BIG_SUR, "Apple processor", None),
    ],
)
def test_sysctl(text, brand, kinds):
    values = parse.sysctl(text)
    assert values["machdep.cpu.brand_string"] == brand
    assert parse.core_kinds(values) == kinds


def test_core_kinds_keep_the_order_of_the_levels():
    assert list(parse.core_kinds(parse.sysctl(SYSCTL_M5_PRO))) == ["super", "performance"]


# mostlygeek/llama-swap, internal/perf/monitor_test.go.
IOREG_M1_PRO = """\
+-o AGXAcceleratorG13X  <class AGXAcceleratorG13X, id 0x1000009a1, registered, matched, active, retain 108>
    {
      "model" = "Apple M1 Pro"
      "gpu-core-count" = 16
      "PerformanceStatistics" = {"In use system memory (driver)"=0,"Alloc system memory"=14511046656,\
"Tiler Utilization %"=34,"recoveryCount"=0,"Renderer Utilization %"=34,"Device Utilization %"=34,\
"In use system memory"=7688503296}
      "IOClass" = "AGXAcceleratorG13X"
    }
"""
# exelban/stats#1094: `ioreg -r -d 1 -w 0 -c "IOAccelerator"` on a 16-inch MacBook Pro of 2021, macOS 12.6.
IOREG_T6000 = """\
+-o AGXAcceleratorG13X  <class AGXAcceleratorG13X, id 0x10000087c, registered, matched, active, retain 24>
    {
      "vendor-id" = <6b100000>
      "AGCInfo" = {"fLastSubmissionPID"=390,"fSubmissionsSinceLastCheck"=0,"fBusyCount"=0}
      "IONameMatched" = "gpu,t6000"
      "PerformanceStatistics" = {"TiledSceneBytes"=1572864,"Alloc system memory"=1214005248,"Tiler Utilization %"=2,\
"recoveryCount"=0,"Renderer Utilization %"=2,"SplitSceneCount"=0,"Allocated PB Size"=17956864,\
"Device Utilization %"=2,"In use system memory"=340983808}
"""
# exelban/stats#3047: the line that `ioreg ... | grep "core-count"` printed on an M5 Max.
IOREG_M5_MAX = (
    '  |     "p-core-count" = <06000000>\n  |     "m-core-count" = <0c000000>\n  |   |   |   "gpu-core-count" = 40\n'
)


@pytest.mark.parametrize(
    ("text", "gpu"),
    [
        (IOREG_M1_PRO, parse.Gpu("Apple M1 Pro", 16, 0.34)),
        (IOREG_T6000, parse.Gpu(None, None, 0.02)),
        (IOREG_M5_MAX, parse.Gpu(None, 40, None)),
        (
            IOREG_M1_PRO.replace('"Device Utilization %"=34', '"Device Utilization %"=137'),
            parse.Gpu("Apple M1 Pro", 16),
        ),
        ("", None),
        ("no accelerator", None),
    ],
)
def test_ioreg(text, gpu):
    assert parse.ioreg_gpu(text) == gpu


# pytorch/serve, frontend/server/src/test/resources/metrics/sample_apple_smi.json: an M1 with seven cores, macOS 11.
SYSTEM_PROFILER_M1 = """{"SPDisplaysDataType": [{
  "_name": "kHW_AppleM1Item",
  "spdisplays_metalfamily": "spdisplays_mtlgpufamilyapple7",
  "spdisplays_ndrvs": [{"_name": "Color LCD", "_spdisplays_pixels": "2880 x 1800"}],
  "spdisplays_vendor": "sppci_vendor_Apple",
  "sppci_bus": "spdisplays_builtin",
  "sppci_cores": "7",
  "sppci_device_type": "spdisplays_gpu",
  "sppci_model": "Apple M1"
}]}"""
# vivy-company/vvterm, VVTermTests/.../DarwinStatsCollectorParserTests.swift.
SYSTEM_PROFILER_M1_PRO = """{
  "SPDisplaysDataType" : [
    {
      "_name" : "Apple M1 Pro",
      "spdisplays_vendor" : "sppci_vendor_Apple",
      "sppci_cores" : "16",
      "sppci_device_type" : "spdisplays_gpu",
      "sppci_model" : "Apple M1 Pro",
      "spdisplays_ndrvs" : [
        { "_name" : "Color LCD", "_spdisplays_pixels" : "3024 x 1964" }
      ]
    }
  ]
}"""
# The shape of AlexsJones/llmfit, llmfit-core/src/hardware.rs: an Intel Mac, whose two chips are not Apple's.
SYSTEM_PROFILER_INTEL = json.dumps(
    {"SPDisplaysDataType": [{"sppci_model": "Intel HD Graphics 630"}, {"sppci_model": "Radeon Pro 560"}]}
)


@pytest.mark.parametrize(
    ("text", "gpu"),
    [
        (SYSTEM_PROFILER_M1, parse.Gpu("Apple M1", 7)),
        (SYSTEM_PROFILER_M1_PRO, parse.Gpu("Apple M1 Pro", 16)),
        (SYSTEM_PROFILER_M1.replace('"sppci_cores": "7",', ""), parse.Gpu("Apple M1", None)),
        (SYSTEM_PROFILER_M1.replace('"7"', '"spdisplays_unknown"'), parse.Gpu("Apple M1", None)),
        (SYSTEM_PROFILER_INTEL, None),
        ('{"SPDisplaysDataType": []}', None),
        ('{"SPDisplaysDataType": null}', None),
        ('{"SPDisplaysDataType": ["Apple M1"]}', None),
        ("[1, 2]", None),
        (SYSTEM_PROFILER_M1[:120], None),
    ],
)
def test_system_profiler(text, gpu):
    assert parse.system_profiler_gpu(text) == gpu


@pytest.mark.parametrize(
    ("text", "source"),
    [
        # stackoverflow.com/a/42361337
        (
            "Now drawing from 'AC Power'\n"
            " -InternalBattery-0 (id=3735651)\t97%; charged; 0:00 remaining present: true\n",
            "ac",
        ),
        (
            "Now drawing from 'Battery Power'\n"
            " -InternalBattery-0 (id=3735651)\t97%; discharging; (no estimate) present: true\n",
            "battery",
        ),
        ("Now drawing from 'AC Power'\n", "ac"),  # the same without a battery: a desktop Mac
        ("No batteries\n", None),
        ("", None),
    ],
)
def test_pmset_batt(text, source):
    assert parse.power_source(text) == source


# AppHouseKitchen/AlDente-Battery_Care_and_Monitoring#603 (the stars are the poster's emphasis).
PMSET = """\
System-wide power settings:
 SleepDisabled\t\t1
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 sleep                1 (sleep prevented by bluetoothd, com.bombich.ccchelper, powerd, sharingd)
 hibernatemode        3
 displaysleep         10 (display sleep prevented by com.apphousekitchen.aldente-pro)
 tcpkeepalive         1
 **lowpowermode         0**
 womp                 1
"""
# alfredapp/low-power-mode-workflow#6: an M1 Max, where the key is `powermode`; 2 is high power (issue 4 there).
PMSET_M1_MAX = """\
 Sleep On Power Button 1
 powermode            0
 standby              1
"""


@pytest.mark.parametrize(
    ("text", "low"),
    [
        (PMSET, False),
        (PMSET.replace("lowpowermode         0", "lowpowermode         1"), True),
        (PMSET_M1_MAX, False),
        (PMSET_M1_MAX.replace("powermode            0", "powermode            1"), True),
        (PMSET_M1_MAX.replace("powermode            0", "powermode            2"), False),
        (" standby              1\n", None),
        (" lowpowermode         yes\n", None),
        ("", None),
    ],
)
def test_pmset(text, low):
    assert parse.low_power_mode(text) is low


@pytest.mark.parametrize(
    ("text", "state"),
    [
        # "com.apple.system.thermalpressurelevel 0": the output that public scripts parse; its levels are the five
        # that angristan/MacThrottle lists.
        ("com.apple.system.thermalpressurelevel 0\n", "nominal"),
        ("com.apple.system.thermalpressurelevel 1\n", "moderate"),
        ("com.apple.system.thermalpressurelevel 2\n", "heavy"),
        ("com.apple.system.thermalpressurelevel 3\n", "trapping"),
        ("com.apple.system.thermalpressurelevel 4\n", "sleeping"),
        ("com.apple.system.thermalpressurelevel 5\n", None),
        ("com.apple.system.thermalpressurelevel: Failed with code 1\n", None),
        # exelban/stats#749: what `pmset -g therm` prints on an M1 Pro, throttled or not.
        ("Note: No thermal warning level has been recorded\n", None),
        ("", None),
    ],
)
def test_notifyutil(text, state):
    assert parse.thermal_state(text) == state


@pytest.mark.parametrize("parser", [parse.sysctl, parse.ioreg_gpu, parse.system_profiler_gpu, parse.power_source])
@pytest.mark.parametrize("text", ["", "\x00\ufffd\ufffd", "{", "null", "=" * 10_000, "a b c\n" * 100])
def test_garbage_is_unknown_and_never_an_exception(parser, text):
    assert parser(text) is None


def test_cpu_model_of_linux():
    # proc_pid_cpuinfo(5) of an x86 machine; an Arm kernel prints no such line.
    assert parse.cpu_model("processor\t: 0\nmodel name\t: AMD EPYC 9B14\nflags\t\t: fpu\n") == "AMD EPYC 9B14"
    assert parse.cpu_model("processor\t: 0\nCPU implementer\t: 0x61\n") is None
