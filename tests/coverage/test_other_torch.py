"""The detector under a torch that is not installed: environments that are whole or not there, and the difference."""

import subprocess
import sys

import pytest
from fakes.support import CACHE

from nanogpt_mac.coverage import other_torch
from nanogpt_mac.coverage.config import CoverageConfig, validate
from nanogpt_mac.errors import InputError
from nanogpt_mac.fallbacks import detect
from nanogpt_mac.gpt.spec import ModelConfig
from nanogpt_mac.operators.wheel import NIGHTLY_INDEX
from nanogpt_mac.records.fallbacks import Fallbacks, Finding, FindingKind
from nanogpt_mac.report import show

UV = """#!/bin/bash
# uv, as far as it is called here: `uv venv ... PATH` and `uv pip install ...`
echo "$@" >> "{log}"
if [ "$1" = venv ]; then
  mkdir -p "${{@: -1}}/bin"
  cat > "${{@: -1}}/bin/python" <<END
#!/bin/bash
{python}
END
  chmod +x "${{@: -1}}/bin/python"
elif [[ "$*" == *"{fails}"* ]]; then
  printf '  \\u00d7 No solution found when resolving dependencies:\\n' >&2
  printf '  \\u2570\\u2500 Because there is no torch==9, it cannot be.\\n' >&2
  exit 1
fi
"""


WORKS = "echo '[\"2.15.0\"]'"  # the torch that it says it has


@pytest.fixture
def uv(tmp_path, monkeypatch):
    """A uv on PATH whose environments hold `python`; returns how it was called."""

    def use(python=WORKS, fails="no such words"):
        folder, log = tmp_path / "bin", tmp_path / "log"
        folder.mkdir(exist_ok=True)
        (folder / "uv").write_text(UV.format(log=log, python=python, fails=fails))
        (folder / "uv").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return lambda: log.read_text().splitlines() if log.exists() else []

    return use


def left():
    """What is in the cache folder, but for locks."""
    folder = other_torch.folder()
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock") if folder.exists() else []


def test_an_environment_is_made_once(uv, capsys):
    calls = uv()
    python = other_torch.make("2.15.0", NIGHTLY_INDEX)
    assert left() == [python.split("/")[-3]]
    assert left()[0].startswith("torch__2.15.0-")
    assert "making an environment" in capsys.readouterr().err
    created, torch, rest = calls()
    assert created.startswith("venv ")
    assert torch.endswith("torch==2.15.0 --no-deps")
    assert "sympy" in rest
    assert "numpy==" in rest
    assert other_torch.make("2.15.0", NIGHTLY_INDEX) == python
    assert len(calls()) == 3


@pytest.mark.parametrize("fails", ["torch==2.15.0", "sympy"])
def test_what_cannot_be_installed_leaves_nothing(uv, fails):
    uv(fails=fails)
    with pytest.raises(InputError) as raised:
        other_torch.make("2.15.0", NIGHTLY_INDEX)
    assert str(raised.value) == (
        "torch=2.15.0: No solution found when resolving dependencies: Because there is no torch==9, it cannot be; "
        "nothing was kept"
    )
    assert left() == []


def test_a_torch_that_cannot_be_imported_leaves_nothing(uv):
    calls = uv("echo 'ImportError: undefined symbol: gone' >&2; exit 1")
    with pytest.raises(InputError, match=r"cannot be imported here: ImportError: undefined symbol: gone; nothing was"):
        other_torch.make("2.15.0", NIGHTLY_INDEX)
    assert (left(), len(calls())) == ([], 3)


def test_a_build_for_cuda_gets_its_libraries(uv, tmp_path):
    """Only when it cannot be imported without them."""
    here = tmp_path / "second"
    first = "echo 'ImportError: libcudnn.so.9: cannot open shared object file: No such file' >&2; exit 1"
    calls = uv(f"[ -e {here} ] && {WORKS} && exit 0; touch {here}; {first}")
    other_torch.make("2.15.0", NIGHTLY_INDEX)
    assert len(left()) == 1
    assert calls()[-1].endswith("torch==2.15.0")
    assert len(calls()) == 4


def test_a_newer_nightly_takes_the_olders_place(uv, monkeypatch):
    calls = uv()

    class Newest:
        version = "2.16.0.dev20260101"

    monkeypatch.setattr(other_torch.wheel, "find", lambda *_: Newest)
    other_torch.make("2.15.0", NIGHTLY_INDEX)
    other_torch.make("nightly", "https://example.org/nightly")
    Newest.version = "2.16.0.dev20260102"
    other_torch.make("nightly", "https://example.org/nightly")
    nightly, release = left()
    assert nightly.startswith("nightly-torch__2.16.0.dev20260102-")
    assert release.startswith("torch__2.15.0-")
    asked = [line for line in calls() if "example.org" in line]
    assert len(asked) == 2
    assert all("--no-deps --index-url https://example.org/nightly" in line for line in asked)


def test_without_uv_venv_and_pip_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    calls = []
    monkeypatch.setattr(other_torch, "_run", lambda asked, argv: calls.append(argv))
    monkeypatch.setattr(other_torch, "version", lambda python: python.parent.mkdir(parents=True))
    other_torch.make("2.15.0", NIGHTLY_INDEX)
    assert calls[0][:3] == [sys.executable, "-m", "venv"]
    assert calls[1][1:4] == ["-m", "pip", "install"]
    assert calls[1][-2:] == ["torch==2.15.0", "--no-deps"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [("newest", "use nightly, a release"), ("./torch.whl", "no such file; use nightly")],
)
def test_a_torch_that_cannot_be_meant(asked, words):
    with pytest.raises(InputError, match=f"^torch={asked}: {words}"):
        other_torch.make(asked, NIGHTLY_INDEX)


# -- the difference ---------------------------------------------------------------------------------------------------


def finding(op, kind=FindingKind.MISSING_CPU, phase="forward"):
    where = "nanogpt_mac/gpt/torch_gpt.py:1"
    return Finding(op=op, kind=kind, phase=phase, calls_per_iteration=2, where=where, advice="wait")


def seen_under(torch, *findings, why=()):
    """What the detector answers."""
    work = {"backend": "mps", "compile": False, "dtype": "float32", "batch_size": 1, "gradient_accumulation_steps": 1}
    return Fallbacks(torch=torch, device="mps", complete=not why, why_incomplete=why, findings=findings, **work)


def test_findings_gained_and_gone():
    old = seen_under("9.1.0", finding("mode"), finding("svd"))
    new = seen_under("9.2.0", finding("svd"), finding("mode", phase="sampling"), finding("gelu.out"))
    page = other_torch.page("nightly", old, new)
    assert page.exit_code == 1
    assert page.verdict == "2 findings are new since 9.1.0: mode (sampling), gelu.out (forward)"
    assert {name: [f["op"] for f in page.data[name]] for name in ("gained", "gone")} == {
        "gained": ["mode", "gelu.out"],
        "gone": ["mode"],
    }
    assert [one.title for one in page.sections] == ["New: leaves the GPU", "Gone", "In both"]
    assert "| gelu.out | missing, CPU kernel | forward | 2 |" in show.markdown(page.report)
    back = other_torch.page("nightly", new, old)
    assert [f["op"] for f in back.data["gained"]] == ["mode"]
    assert other_torch.page("nightly", old, old).exit_code == 0


def test_what_is_incomplete_cannot_tell():
    whole, broken = seen_under("9.1.0"), seen_under(None, why=["the child ended with exit code 1: no device"])
    for page in (other_torch.page("nightly", whole, broken), other_torch.page("nightly", broken, seen_under("9.2.0"))):
        assert page.exit_code == 2
        assert "no device" in page.verdict
    page = other_torch.page("nightly", broken, seen_under("9.2.0", finding("gelu.out")))
    assert page.exit_code == 2  # new since what is not known
    partly = seen_under("9.2.0", finding("gelu.out"), why=["not reached: sampling"])
    assert other_torch.page("nightly", whole, partly).exit_code == 1  # what is known to be lost weighs more


def test_both_run_the_same_task_and_only_one_the_new_python(monkeypatch, uv):
    uv(WORKS.replace("2.15.0", "2.15.0+cu132"))
    seen = []

    def check(task, python, env):
        seen.append((task, python, env["PYTORCH_ENABLE_MPS_FALLBACK"], "VIRTUAL_ENV" in env))
        return seen_under("2.13.0" if python == sys.executable else "2.15.0+cu132")

    monkeypatch.setenv("VIRTUAL_ENV", "/somewhere")
    monkeypatch.setattr(detect, "check_task", check)
    page = other_torch.check(CoverageConfig(torch="2.15.0", run=True, model=ModelConfig(n_layer=1)))
    (task, here, *rest), (again, there, *more) = seen
    assert task == again
    assert task.spec.n_layer == 1
    assert (here, rest, more) == (sys.executable, ["1", False], ["1", False])
    assert there.startswith(str(other_torch.folder()))
    assert (page.data["against"], page.data["torch"]) == ("2.13.0", "2.15.0+cu132")
    monkeypatch.setattr(detect, "check_task", lambda *_: seen_under("2.13.0"))
    with pytest.raises(InputError, match=r"torch=2\.15\.0: torch 2\.13\.0 ran there instead of 2\.15\.0\+cu132"):
        other_torch.check(CoverageConfig(torch="2.15.0", run=True))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"run": True}, "torch=installed: run=true needs another torch"),
        ({"run": True, "torch": "2.15.0", "against": "2.13.0"}, "against=2.13.0: run=true compares with what is"),
        ({"run": True, "torch": "2.15.0", "scope": "surface"}, "scope=surface: run=true looks at this model"),
        ({"run": True, "torch": "2.15.0", "scope": "opinfo"}, "scope=opinfo run=true: use one at a time"),
        ({"run": True, "torch": "2.15.0", "binary": True}, "binary=true: run=true reads no binary"),
        ({"scope": "opinfo", "torch": "2.15.0"}, "torch=2.15.0: scope=opinfo runs the torch that is installed"),
        ({"verify": True, "torch": "nightly"}, "torch=nightly: verify=true runs the torch that is installed"),
        ({"verify": "maybe"}, "verify=maybe: use true, false or predict"),
        ({"compiled": True, "verify": True}, "compiled=true verify=true: use one at a time"),
        ({"samples": 0}, "samples=0: use a whole number from 1"),
        ({"html": "/nowhere/x.html"}, "html=/nowhere/x.html: use a file in a folder that exists"),
        ({"output": "x.json"}, "output=x.json: only verify writes a file of its own"),
        ({"samples": 3}, "samples=3: only read with scope=opinfo"),
        ({"batch_size": 8}, "batch_size=8: only read with compiled=true or run=true"),
        ({"python": "3.11", "run": True, "torch": "2.15.0"}, "python=3.11: only read with a table of operators"),
        ({"nightly_index": "http://x", "compiled": True}, "nightly_index=http://x: only read with a table"),
    ],
)
def test_combinations_that_mean_nothing(values, words):
    with pytest.raises(InputError, match=words):
        validate(CoverageConfig(**values))


def test_combinations_that_do():
    for values in (
        {"run": True, "torch": "nightly"},
        {"scope": "opinfo", "op": ["gelu"]},
        {"compiled": True},
        {"verify": True, "output": "x.json", "binary": True},
        {"verify": "predict"},
    ):
        validate(CoverageConfig(**values))


@pytest.mark.online
@pytest.mark.slow
def test_a_real_environment(command, monkeypatch):
    """A release from the package index, installed and run; the same torch twice finds nothing new."""
    from importlib.metadata import version

    from packaging.version import Version

    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    release = Version(version("torch")).public
    done = command("mps_coverage.py", f"torch={release}", "run=true", timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No new fallback since" in done.stdout
    made = next(other_torch.folder().glob(f"torch__{release}-*/bin/python"))
    asked = [str(made), "-c", "import torch; print(torch.__version__)"]
    assert subprocess.run(asked, capture_output=True, text=True).stdout.startswith(release)
