"""The fallback detector: planted faults found, nothing found where there is none, and every doubt in the document."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from fakes.support import options
from pydantic import TypeAdapter

from nanogpt_mac import cli
from nanogpt_mac.backends import kinds
from nanogpt_mac.backends.base import PHASES
from nanogpt_mac.backends.torch_backend import MEANT
from nanogpt_mac.config import Config, backend_options
from nanogpt_mac.errors import InputError
from nanogpt_mac.fallbacks import detect as runtime
from nanogpt_mac.fallbacks import report
from nanogpt_mac.fallbacks.findings import findings_of
from nanogpt_mac.fallbacks.observed import Observed, Task
from nanogpt_mac.fallbacks.signs import place, relative
from nanogpt_mac.gpt.spec import GPTSpec
from nanogpt_mac.records.fallbacks import Fallbacks, FindingKind
from nanogpt_mac.records.run import Denominators
from nanogpt_mac.train import session as train_run
from nanogpt_mac.train.recorder import Recorder, Work
from nanogpt_mac.train.sinks import Folder, Wandb

HERE = Path(__file__).resolve().parents[1]
ROOT = HERE.parent
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the simulated MPS device runs on Linux only")


# -- planted faults ---------------------------------------------------------------------------------------------------


def planted(how, which):
    """Runs runtime_cases.py; (clean results, planted cases, other rows)."""
    with tempfile.TemporaryDirectory() as folder:
        more = {"PYTORCH_ENABLE_MPS_FALLBACK": "1", "TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **more, "PYTHONPATH": str(ROOT)}
        argv = [sys.executable, "-W", "ignore", str(HERE / "fakes" / "runtime_cases.py"), how, which]
        child = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=900)
    if "InputError" in child.stderr:
        pytest.skip(child.stderr.strip().splitlines()[-1])
    assert child.returncode == 0, child.stderr[-4000:]
    found = [json.loads(line) for line in child.stdout.splitlines()]
    return found


def check_planted(found):
    """Every planted fault is found in each of its phases, as often as the device counted; nothing else is."""
    clean = [row for row in found if row["case"] == "clean"]
    assert len(clean) == 2  # before and after
    assert all(row["findings"] == row["why"] == [] for row in clean)
    cases = [row for row in found if "want" in row]
    wrong = [c for c in cases if c["got"] != c["want"] or not c["want"] or c["extra"] or c["why"]]
    assert not wrong, json.dumps(wrong, indent=1)
    return cases


@ON_LINUX
def test_a_planted_fault_of_each_kind():
    found = planted("eager", "quick")
    assert len(check_planted(found)) == 16
    (number,) = [row for row in found if row["case"] == "number"]
    assert number["findings"] == number["why"] == []
    (compiled,) = [row for row in found if row["case"] == "compiled child"]
    assert compiled["findings"] == compiled["why"] == []
    assert {"graph_breaks", "recompilations"} <= set(compiled["compile_report"])


@pytest.mark.slow
@ON_LINUX
@pytest.mark.parametrize(("how", "least"), [("eager", 70), ("compiled", 45)])
def test_more_than_fifty_planted_faults(how, least):
    """Run with -s for the figures."""
    cases = check_planted(planted(how, "all"))
    phases = {phase for case in cases for phase in case["want"]}
    print(f"{how}: {len(cases)} faults planted, {sum(len(c['want']) for c in cases)} findings due: all found, no other")
    assert len(cases) >= least
    assert phases == set(PHASES)


@pytest.mark.slow
@ON_LINUX
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("bias", [False, True])
def test_the_clean_model_has_no_findings(monkeypatch, compiled, dtype, dropout, bias):
    monkeypatch.setenv("NANOGPT_MAC_SIMULATE_MPS", "1")
    config = Config(dtype=dtype, compile=compiled, batch_size=4, gradient_accumulation_steps=2)
    config.model.n_layer, config.model.n_head, config.model.n_embd, config.model.block_size = 2, 2, 32, 16
    config.model.dropout, config.model.bias = dropout, bias
    document = runtime.check(config)
    assert document.findings == document.why_incomplete == ()
    assert document.phases == PHASES
    assert (document.compile_report is not None) == compiled


@pytest.mark.slow
@ON_LINUX
@pytest.mark.parametrize("mode", ["report", "error"])
def test_a_fault_of_torchs_own(command, monkeypatch, mode):
    """float16 without fused AdamW: torch's GradScaler reads an overflow flag in every iteration."""
    monkeypatch.setenv("NANOGPT_MAC_SIMULATE_MPS", "1")
    how = ("backend=mps", "dtype=float16", "backend.fused_adamw=false", f"fallbacks={mode}", "data=stand_in")
    done = command("train.py", "experiment=smoke", *how, "max_iters=3", "wandb.mode=disabled", "run_dir=run")
    assert done.returncode == (3 if mode == "error" else 0), done.stderr
    assert "fallbacks: 1 found in optimizer" in done.stdout
    assert ("iter 0" in done.stdout) == (mode == "report")


RENAMED = """
import json
from nanogpt_mac.config import Config, backend_options
from nanogpt_mac.fallbacks import detect
config = Config(dtype="float16", batch_size=2)
config.backend.fused_adamw = False
config.model.n_layer, config.model.n_head, config.model.n_embd, config.model.block_size = 1, 1, 16, 8
print(json.dumps(detect.check(config).document()))
"""


@pytest.mark.slow
@ON_LINUX
def test_renaming_what_is_private_to_the_back_end_changes_nothing(tmp_path):
    """A copy of the package in which no private name of torch_backend.py is what it was: the same fault is found."""
    shutil.copytree(ROOT / "nanogpt_mac", tmp_path / "nanogpt_mac", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "nanogpt_mac" / "backends" / "torch_backend.py"
    code = source.read_text()
    private = set(re.findall(r"def (_[a-z]\w*)\(", code))
    assert {"_handle", "_tokens", "_cached"} <= private
    for number, name in enumerate(sorted(private)):
        code = re.sub(rf"\b{name}\b", f"_other_{number}", code)
    source.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NANOGPT_MAC_SIMULATE_MPS": "1", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", RENAMED]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    document = Fallbacks.parse(json.loads(done.stdout), "fallbacks.json")
    assert document.why_incomplete == ()
    found = [(f.op, f.kind, f.phase) for f in document.findings]
    assert found == [("_local_scalar_dense", FindingKind.SYNC, "optimizer")]
    made = [(m.phase, m.op, m.reason, m.calls) for m in document.passes.profiler.meant]
    assert sorted(made) == sorted((m.phase, m.op, m.reason, m.most) for m in MEANT)


# -- what two passes saw, judged --------------------------------------------------------------------------------------

RECORD = {"op": "gelu.out", "phase": "forward", "ms": 1.0, "dtypes": ["float32"], "shapes": [[4, 8]], "bytes": 256}
RECORD |= {"where": "nanogpt_mac/gpt/torch_gpt.py:70", "evidence": [], "sign": "fallback"}
TOLD = {"op": "gelu.out", "phase": "forward", "where": "nanogpt_mac/gpt/torch_gpt.py:71"}
REFUSED = {"phase": "clip", "op": "mul.Tensor", "type": "RuntimeError", "text": "MPS: not for this", "cpu": True}
REFUSED |= {"dtypes": ["float32"], "shapes": [[4]], "where": None, "evidence": []}


def judged(seen):
    """What the parent makes of the child's JSON."""
    return findings_of(TypeAdapter(Observed).validate_python(seen))


@pytest.fixture
def seen():
    """A child's answer."""
    return {
        "reached": list(PHASES),
        "control": "mode",
        "warnings": {"fallbacks": [], "admitted": [], "control": True},
        "profiler": {
            "records": [],
            "meant": [],
            "operators": dict.fromkeys(PHASES, 9),
            "overloads": True,
            "control": True,
        },
        "refused": [],
        "dispatch": {"gelu.out": "missing"},
    }


def test_passes_that_agree(seen):
    seen["warnings"]["fallbacks"] = [TOLD, TOLD]
    seen["profiler"]["records"] = [RECORD, RECORD]
    findings, why = judged(seen)
    (finding,) = findings
    assert why == []
    assert (finding.op, finding.kind, finding.calls_per_iteration) == ("gelu.out", FindingKind.MISSING_CPU, 2)
    assert (finding.ms, finding.bytes, finding.shapes) == (2.0, 512, (((4, 8),),))
    assert finding.where == "nanogpt_mac/gpt/torch_gpt.py:71"  # a warning knows its line
    assert "mps_coverage.py scope=ops op=gelu" in finding.advice


@pytest.mark.parametrize("overloads", [True, False])
def test_names_are_joined_where_a_profiler_has_no_overloads(seen, overloads):
    seen["warnings"]["fallbacks"] = [TOLD]
    seen["profiler"]["records"] = [RECORD | {"op": "gelu"}]
    seen["profiler"]["overloads"] = overloads
    findings, why = judged(seen)
    assert len(findings) == (2 if overloads else 1)
    assert len(why) == (2 if overloads else 0)


def _one_pass(s):
    s["warnings"]["fallbacks"] = [TOLD, TOLD]
    s["profiler"]["records"] = [RECORD]


DOUBTS = {
    "the passes differ": (_one_pass, "forward: gelu.out: 2 warnings, but the profiler saw 1 fallbacks", 1),
    "only warned of": (lambda s: s["warnings"]["fallbacks"].append(TOLD), "1 warnings, but the profiler saw 0", 1),
    "only profiled": (lambda s: s["profiler"]["records"].append(RECORD), "0 warnings, but the profiler saw 1", 1),
    "deaf": (lambda s: s["warnings"].update(control=False), "warnings: did not see mode, which is known to run", 0),
    "blind": (lambda s: s["profiler"].update(control=False), "profiler: did not see mode", 0),
    "not reached": (lambda s: s["reached"].remove("clip"), "not reached: clip", 0),
    "empty phase": (lambda s: s["profiler"]["operators"].update(clip=0), "profiler: saw no operator in clip", 0),
    "admitted": (
        lambda s: s["warnings"]["admitted"].append({"text": "falling back to CPU", "phase": "clip", "where": None}),
        "clip: a kernel says that it uses the CPU, but the profiler saw no copy",
        0,
    ),
    "out of memory": (
        lambda s: s["refused"].append(REFUSED | {"text": "MPS backend out of memory"}),
        "clip: RuntimeError: MPS backend out of memory",
        0,
    ),
    "the CPU refuses too": (lambda s: s["refused"].append(REFUSED | {"cpu": False}), "RuntimeError: MPS: not for", 0),
    "no operator": (lambda s: s["refused"].append(REFUSED | {"op": None}), "clip: RuntimeError", 0),
    "another error": (lambda s: s["refused"].append(REFUSED | {"type": "KeyError"}), "clip: KeyError", 0),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_a_doubt_is_in_the_document(seen, doubt):
    change, text, findings = DOUBTS[doubt]
    before = copy.deepcopy(seen)
    change(seen)
    assert seen != before
    found, why = judged(seen)
    assert len(found) == findings
    assert len(why) == 1
    assert text in why[0]


REFUSALS = {
    "MPS: not for this": FindingKind.LIMIT,
    "Could not run 'aten::mul.Tensor' with arguments from the 'CPU' backend": FindingKind.MISSING,
    "The operator 'aten::mul.Tensor' is not currently implemented for the MPS device": FindingKind.MISSING_CPU,
}


@pytest.mark.parametrize("text", REFUSALS)
def test_errors_that_are_findings(seen, text):
    seen["refused"] = [REFUSED | {"text": text}]
    findings, why = judged(seen)
    assert why == []
    assert [(f.op, f.kind, f.phase) for f in findings] == [("mul.Tensor", REFUSALS[text], "clip")]


def test_places():
    def frame(file, line, function):
        return str(file), line, function

    torch = "/somewhere/site-packages/torch/nn/functional.py"
    frames = [frame(torch, 5, "gelu"), frame(ROOT / "nanogpt_mac/gpt/torch_gpt.py", 70, "forward")]
    assert place(frames) == "nanogpt_mac/gpt/torch_gpt.py:70"
    assert place(frames[:1]) == "torch/nn/functional.py:5"
    assert place([frame("/tmp/other.py", 1, "f")]) is None
    assert place([frame(ROOT / "nanogpt_mac/coverage/detector/watch.py", 1, "f")]) is None
    assert relative("nanogpt_mac/gpt/torch_gpt.py") == "nanogpt_mac/gpt/torch_gpt.py"  # as a profiler shortens it


# -- the child --------------------------------------------------------------------------------------------------------

TASK = Task(backend_options(Config(), "mps"), GPTSpec(1, 2, 32, 16, 65), 4)
CHILDREN = {
    "echo first >&2; echo 'InputError: no device' >&2; exit 7": "process failed: InputError: no device",
    "exit 1": "process failed: exit code 1",
    "echo nonsense": "its answer cannot be read: 'nonsense",
    "echo '{}'": "the detector's answer is damaged: ",
    "kill -9 $$": "killed by SIGKILL",
    "sleep 60": "no answer within 1 s",
}


@pytest.mark.parametrize("script", CHILDREN)
def test_a_child_that_fails_is_an_incomplete_document(tmp_path, script):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script.replace('sleep', 'exec sleep')}\n")
    python.chmod(0o755)
    document = runtime.check_task(TASK, str(python), timeout_s=1)
    assert not document.complete
    assert CHILDREN[script] in document.why_incomplete[0]
    assert document.findings == ()
    assert Fallbacks.parse(document.document(), "fallbacks.json") == document
    assert report.headline(document).startswith("fallbacks: incomplete: ")
    missing = runtime.check_task(TASK, str(tmp_path / "none"))
    assert "cannot be run" in missing.why_incomplete[0]


def test_the_childs_environment(tmp_path):
    """The variable is set, Inductor's folder is the child's own and gone afterwards, the parent's stay as they are."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nenv > {tmp_path}/env\necho "$@" > {tmp_path}/argv\ncat > {tmp_path}/task\nexit 1\n')
    python.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "TORCHINDUCTOR_CACHE_DIR": "/mine"}
    runtime.check_task(TASK, str(python), env)
    child = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert child["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    assert child["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert child["TORCHINDUCTOR_CACHE_DIR"] != "/mine"
    assert not Path(child["TORCHINDUCTOR_CACHE_DIR"]).exists()
    task = json.loads((tmp_path / "task").read_text())
    assert Path(task.pop("scratch")).name == Path(child["TORCHINDUCTOR_CACHE_DIR"]).name  # which the child removes
    assert task == asdict(TASK)
    assert env["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


def test_the_child_needs_torch_and_numpy_alone():
    """So that it runs under an interpreter that has nothing else."""
    program = (
        "import sys; import nanogpt_mac.fallbacks.watch;"
        "others = 'wandb hydra omegaconf pydantic filelock platformdirs rich scipy psutil requests remotezip yaml mlx';"
        "print([name for name in others.split() if name in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert child.stdout == "[]\n", child.stderr


# -- train.py ---------------------------------------------------------------------------------------------------------


def test_the_task_is_the_runs_own():
    config = cli.compose(["experiment=quick", "backend=mps", "compile=true", "dtype=bfloat16", "grad_clip=0"])
    task = runtime.task_of(config, resident=False)
    named = {"name": "mps", "compile": True, "dtype": "bfloat16", "grad_clip": 0, "resident_tokens": 0}
    assert replace(task.options, **named) == task.options
    assert (task.spec.vocab_size, task.batch_size) == (65, config.batch_size)
    other = runtime.task_of(cli.compose(["data=shakespeare"]))
    assert other.spec.vocab_size == 50304
    assert other.options.resident_tokens > 0


@pytest.mark.slow
def test_fallbacks_are_mps_alone(command, tmp_path):
    (tmp_path / "verse.txt").write_text("To be, or not to be, that is the question.\n" * 100)
    named = ["experiment=smoke", "backend=cpu", "data=text", "data.path=verse.txt", "max_iters=2"]
    named += ["wandb.mode=disabled", "gemm_seconds=0", "sample_tokens=0", "checkpoint=false"]
    done = command("train.py", *named, "fallbacks=error")
    assert done.returncode == 0, done.stderr
    assert "fallbacks= applies to MPS only; ignored on cpu" in done.stdout
    with pytest.raises(InputError, match="fallbacks=yes: use report, error or off"):
        train_run.run(cli.compose(["fallbacks=yes"]))


@pytest.fixture
def found(seen):
    """A document with a finding."""
    seen |= {"torch": "2.13.0", "python": "3.12.1", "device": "mps", "seconds": 2.0, "compile_report": None}
    seen["warnings"]["fallbacks"] = [TOLD]
    seen["profiler"]["records"] = [RECORD]
    return runtime.document(TASK, TypeAdapter(Observed).validate_python(seen))


def test_error_ends_the_run_before_training(monkeypatch, tmp_path, capsys, found):
    create = kinds.create

    def on_cpu(spec, _options, tokens):
        backend = create(spec, options("cpu"), tokens)
        backend.capabilities = kinds.recorded("mps", "mps")
        return backend

    doubtful = found.model_copy(update={"findings": (), "complete": False, "why_incomplete": ("not reached: clip",)})
    monkeypatch.setattr(kinds, "resolve", lambda name, launcher: name)
    monkeypatch.setattr(kinds, "create", on_cpu)
    overrides = ["experiment=smoke", "backend=mps", "fallbacks=error", "data=stand_in", f"data_dir={tmp_path / 'data'}"]
    for document, said in ((found, "gelu.out"), (doubtful, "incomplete: not reached: clip")):
        monkeypatch.setattr(runtime, "check", lambda config, spec, resident, document=document: document)
        folder = tmp_path / said
        assert train_run.run(cli.compose([*overrides, f"run_dir={folder}"])) == 3
        assert [p.name for p in folder.iterdir()] == ["fallbacks.json"]
        written = json.loads((folder / "fallbacks.json").read_text())
        assert tuple(written["why_incomplete"]) == document.why_incomplete
        printed = capsys.readouterr().out
        assert said in printed
        assert "stopped: operators leave the GPU (fallbacks=error); see " in printed


def test_the_console(found):
    lines = report.text(found).splitlines()
    assert lines[0] == "fallbacks: 1 found in forward (2.0 s)"
    assert any("gelu.out" in line and "missing, CPU kernel" in line for line in lines)
    assert lines[-1].startswith("gelu.out: set PYTORCH_ENABLE_MPS_FALLBACK=1")
    clean = found.model_copy(update={"findings": ()})
    assert report.text(clean) == f"fallbacks: none in {', '.join(PHASES)} (2.0 s)"


def test_wandb_gets_a_table(tmp_path, found, monkeypatch):
    """wandb's own reader finds the counts and the table in its offline file."""
    import wandb

    monkeypatch.setattr(os, "environ", os.environ.copy())  # wandb leaves in it what other tests' runs would obey

    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
    logged = wandb.init(project="p", mode="offline", dir=tmp_path, settings=settings)
    recorder = Recorder(Work(1.0, 1, Denominators()), [Folder(tmp_path), Wandb(logged)])
    recorder.fallbacks(found, 5)
    recorder.close()
    assert Fallbacks.load(tmp_path / "fallbacks.json") == found
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    argv = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert '"fallbacks/findings"' in printed
    assert "table-file" in printed
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/fallbacks*.table.json")
    read = json.loads(table.read_text())
    assert read["columns"] == list(report.COLUMNS)
    assert read["data"] == report.rows(found)
