"""The sweep over torch's operator database: its expected failures, crashes in the middle, and what is unexpected."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.support import CACHE

from nanogpt_mac.coverage import expected, opinfo
from nanogpt_mac.errors import InputError
from nanogpt_mac.report import show

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the simulated MPS device runs on Linux only")

LISTS = """
if torch.backends.mps.is_available():
    def mps_ops_modifier(ops, sparse=False):
        SUPPORTED_COMPLEX_OPS = {"abs", "add"}
        MACOS_BEFORE_14_4_XFAILLIST = {"fft.hfft2": [torch.complex64]}
        UNIMPLEMENTED_XFAILLIST: dict[str, list | None] = {
            # a comment
            "linalg.eig": None,
            "median": [torch.bool, torch.long],
        }
        UNIMPLEMENTED_XFAILLIST_SPARSE: dict[str, list | None] = {"abs": None}
        EMPTY_OPS_SKIPLIST = {"empty": None}
        other = {"abs": None}
    def mps_ops_grad_modifier(ops):
        XFAILLIST_GRAD = {"unique": None, "abs": [torch.half]}
else:
    def mps_ops_modifier(ops):
        return ops
"""


def test_the_lists_of_common_mps():
    lists = expected.parse(LISTS)
    assert lists.complex == {"abs", "add"}
    assert lists.of("linalg.eig", "float32", gradient=False) == "UNIMPLEMENTED_XFAILLIST"
    assert lists.of("median", "bool", gradient=False) == lists.of("median", "int64", gradient=False) != ""
    assert lists.of("median", "float32", gradient=False) == ""
    assert lists.of("empty", "float32", gradient=False) == "EMPTY_OPS_SKIPLIST"
    assert lists.of("abs", "float16", gradient=False) == ""  # the sparse list is another test's
    assert lists.of("abs", "float16", gradient=True) == "XFAILLIST_GRAD"
    assert lists.of("linalg.eig", "float32", gradient=True) == "UNIMPLEMENTED_XFAILLIST"
    assert lists.of("add", "complex64", gradient=False) == ""
    assert lists.of("mul", "complex64", gradient=False) == "not in SUPPORTED_COMPLEX_OPS"


def test_a_list_for_old_systems_needs_one():
    lists = expected.parse(LISTS.replace('{"abs", "add"}', '{"fft.hfft2"}'))
    titles = [lists.of("fft.hfft2", "complex64", False, macos) for macos in (None, (14, 4), (15, 0), (14, 3, 1))]
    assert titles == ["", "", "", "MACOS_BEFORE_14_4_XFAILLIST"]


def test_a_file_without_lists_cannot_tell(tmp_path):
    with pytest.raises(InputError, match="no list of expected failures that is known here"):
        expected.parse("def mps_ops_modifier(ops):\n    return ops\n")
    with pytest.raises(InputError, match=r"has no torch/testing/_internal/common_mps\.py"):
        expected.read(tmp_path)


def test_the_lists_of_the_installed_torch():
    """Against the sizes that were counted in the released wheels by other means."""
    import torch

    lists = expected.read(Path(torch.__file__).parents[1])
    size = len(lists.lists["forward"]["UNIMPLEMENTED_XFAILLIST"])
    counted = {"2.9": 114, "2.12": 120, "2.13": 111, "2.14": 83, "2.15": 75}
    assert size == counted.get(".".join(torch.__version__.split(".")[:2]), size) > 20
    assert lists.lists["gradient"]
    assert lists.complex


@pytest.mark.parametrize(
    ("status", "reason", "listed", "judged"),
    [
        ("works", "", "", "as expected"),
        ("works", "", "UNIMPLEMENTED_XFAILLIST", "works although listed"),
        ("missing", "aten::eig", "UNIMPLEMENTED_XFAILLIST", "as expected"),
        ("missing", "aten::eig", "XFAIL of its own", "as expected"),
        ("missing", "aten::eig", "", "newly fails"),
        ("wrong value", "2 and not 1", "not in SUPPORTED_COMPLEX_OPS", "as expected"),
        ("crashed", "killed by SIGSEGV", "", "newly fails"),
        ("wrong value", "2 and not 1", "SKIPLIST", "not judged"),
        ("works", "", "UNIMPLEMENTED_XFAILLIST, SKIP of its own", "not judged"),
        ("missing", "aten::eig", "UNIMPLEMENTED_XFAILLIST, SKIP of its own", "as expected"),
        ("skipped", "no samples", "", "not judged"),
        ("falls back", "The operator 'aten::embedding_renorm_' is not currently supported", "", "as expected"),
        ("falls back", "The operator 'aten::gelu.out' is not currently supported", "", "newly falls back"),
        ("falls back", "svd: falling back to CPU", "", "as expected"),  # a kernel that says so itself
    ],
)
def test_what_is_unexpected(status, reason, listed, judged):
    assert opinfo.judge(status, reason, listed) == judged


# -- processes that die -----------------------------------------------------------------------------------------------

CHILD = """
import json, os, signal, sys, time
task = json.load(sys.stdin)
print(json.dumps({"cases": 7, "device": "simulated-mps", "torch": "9.1.0"}), flush=True)
print("a kernel printed this", flush=True)
for n in range(task["start"], min(task["stop"], 7)):
    own = {"forward": "", "gradient": ""}
    print(json.dumps({"number": n, "op": f"op{n}", "key": f"op{n}", "dtype": "float32", "own": own}), flush=True)
    if n == 1: os.kill(os.getpid(), signal.SIGSEGV)
    if n == 3: os._exit(9)
    if n == 5: time.sleep(60)
    print(json.dumps({"number": n, "status": "works", "leg": "forward", "reason": ""}), flush=True)
"""


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Sweeps run this program instead of the real child."""

    def use(program):
        script, python = tmp_path / "child.py", tmp_path / "python"
        script.write_text(program)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "{script}"\n')
        python.chmod(0o755)
        monkeypatch.setattr(opinfo.sys, "executable", str(python))
        monkeypatch.setattr(opinfo, "find_spec", lambda name: name)

    return use


@ON_LINUX
def test_a_crash_does_not_end_the_sweep(child, monkeypatch, capsys):
    child(CHILD)
    monkeypatch.setattr(opinfo, "_LIMIT_S", 2)
    monkeypatch.setattr(opinfo, "_BATCH", 3)  # the sixth case opens a batch: where one ends changes nothing
    swept = opinfo.sweep([], 5)
    assert [c.op for c in swept.cases] == [f"op{n}" for n in range(7)]
    assert {c.op: c.reason for c in swept.cases if c.status == "crashed"} == {
        "op1": "killed by SIGSEGV",
        "op3": "exit code 9",
        "op5": "no answer within 2 s",
    }
    page = opinfo.page(swept)
    assert (page.exit_code, page.data["counts"]) == (1, {"works": 4, "crashed": 3})
    assert page.data["cases"][0]["judged"] == "newly fails"
    assert "7 of 7 cases" in capsys.readouterr().err


@ON_LINUX
def test_a_child_that_cannot_start_is_one_line(child):
    child("import sys; sys.exit('no compiler here')")
    with pytest.raises(InputError, match=r"^scope=opinfo: no compiler here$"):
        opinfo.sweep([], 5)


def test_without_expecttest(monkeypatch):
    monkeypatch.setattr(opinfo, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="python -m pip install expecttest"):
        opinfo.sweep([], 5)


def case(op, status="works", judged="as expected", listed="", dtype="float32", reason=""):
    return opinfo.Case(op, dtype, status, "forward", reason, listed, judged)


def test_the_unexpected_stands_first_and_decides():
    fine = [case("a"), case("b", "missing", listed="UNIMPLEMENTED_XFAILLIST")]
    works = [case("c", judged="works although listed", listed="L", dtype=dtype) for dtype in ("int8", "bool")]
    page = opinfo.page(opinfo.Sweep("mps", "9.1.0", [*fine, *works]))
    assert (page.exit_code, page.verdict) == (
        0,
        "nothing fails that torch expects to work, in 4 cases; 2 work that it expects to fail",
    )
    assert page.sections[0].tables[0].rows[0].cells == ["c", "int8, bool", "L"]
    bad = case("d", "wrong value", "newly fails", reason="1 | 2")
    page = opinfo.page(opinfo.Sweep("mps", "9.1.0", [*fine, *works, bad]))
    assert page.exit_code == 1
    assert page.sections[0].title == "Newly fails"
    assert page.data["cases"][0]["op"] == "d"
    assert "| d | float32 | wrong value | forward | 1 \\| 2 |" in show.markdown(page.report)
    skipped = [case("e", "skipped", "not judged")]
    assert opinfo.page(opinfo.Sweep("mps", "9.1.0", skipped)).exit_code == 2


# -- on the simulated device ------------------------------------------------------------------------------------------

CHECKS = """
import json, warnings
from nanogpt_mac import simulator
simulator.install()
import torch
torch.set_warn_always(True)
from nanogpt_mac.coverage import device_child as child
from nanogpt_mac.coverage.op_samples import database, full_name
ops = {full_name(op): op for op in database()}
gelu, made = ops["nn.functional.gelu"], {}
def look(title, op, dtype="float32"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made[title] = list(child.check(op, dtype, 10).values())
look("clean", gelu)
for fault, value in (("missing", None), ("fallback", None), ("wrong", 1.01)):
    with simulator.planted("gelu", fault, value):
        look(fault, gelu)
with simulator.planted("gelu_backward", "wrong", 1.01):
    look("gradient", gelu)
    look("no gradient", gelu, "bfloat16")
look("random", ops["bernoulli"])
look("float64", ops["cdouble"])
look("int", ops["add"], "int64")
look("unset", ops["empty"])
look("hand", ops["linalg.svd"])
look("indices", ops["tensor_split"])
made["own"] = child.own_expectation(ops["nn.functional.channel_shuffle"], "float32", "forward")
made["none"] = child.own_expectation(gelu, "float32", "forward")
made["cases"] = [[full_name(op), dtype] for op, dtype in child.cases(["gelu", "linalg_svd"])]
print(json.dumps(made))
"""


@pytest.mark.slow
@ON_LINUX
def test_outcomes_on_the_simulated_device(monkeypatch):
    """Every outcome, from faults that are planted and from operators that have them by nature."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTORCH_")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHECKS], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout)
    others = {name: made.pop(name) for name in ("own", "none", "cases")}
    status = {title: outcome[0] for title, outcome in made.items()}
    assert status["clean"] == status["random"] == status["int"] == status["indices"] == "works"
    assert made["missing"] == ["missing", "forward", "aten::gelu.out"]
    assert status["fallback"] == status["hand"] == "falls back"
    assert made["wrong"][:2] == ["wrong value", "forward"]
    assert made["gradient"][:2] == ["wrong value", "gradient"]
    assert status["no gradient"] == "works"  # torch tests gradients in float16 and float32 alone
    assert status["float64"] == "dtype limit"
    assert status["unset"] == "skipped"
    assert (others["own"], others["none"]) == ("XFAIL of its own", "")
    assert ["linalg.svd", "complex64"] in others["cases"]
    assert {op for op, _ in others["cases"]} == {"nn.functional.gelu", "linalg.svd"}


@pytest.mark.slow
@ON_LINUX
def test_the_whole_sweep(monkeypatch, capsys):
    """Nothing fails on the simulated device that torch expects to work on a Mac."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    page = opinfo.page(opinfo.sweep([], 10))
    assert page.exit_code == 0, page.verdict
    assert page.data["counts"]["works"] > 4000
    assert sum(page.data["judged"].values()) == len(page.data["cases"]) > 4500
    with capsys.disabled():
        print(page.data["torch"], page.data["counts"], page.data["judged"])


@ON_LINUX
def test_a_name_that_is_no_operator(child):
    child('import sys; sys.exit("op=gleu: torch\'s operator database has no such operator; did you mean gelu?")')
    with pytest.raises(InputError, match=r"^op=gleu: .* did you mean gelu\?$"):
        opinfo.sweep(["gleu"], 5)
