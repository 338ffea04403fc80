"""SIGINT and SIGTERM end a command in time, with their exit code, whatever is at work, and leave nothing half made."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from fakes.support import ROOT

from nanogpt_mac import files, signals
from nanogpt_mac.corpus import prepared
from nanogpt_mac.train import checkpoint

LATE_S = 2.0  # this machine may be busy
RUN = "import sys; from nanogpt_mac import script; from nanogpt_mac.signals import *; script.run('config', {task})"


def defaults():
    """What a shell gives a command in the foreground; a test may run in a background that ignores SIGINT."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)


def start(argv, **given):
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT} | given
    return subprocess.Popen(argv, preexec_fn=defaults, start_new_session=True, **given)


def started(code, **given):
    """A process that runs `code`, which prints a line when it is where the signal shall find it."""
    process = start([sys.executable, "-c", code], **given)
    assert process.stdout.readline()
    return process


def ended(process, signum):
    """Exit code, seconds until the end, standard error."""
    begun = time.monotonic()
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    return process.returncode, time.monotonic() - begun, said


def running(task, before=""):
    body = f"def task(config):\n    {before}\n    print('there', flush=True)\n    {task}\n    return 0"
    return f"{body}\n{RUN.format(task='task')}"


NATIVE = {  # no bytecode is run meanwhile, and no call is interrupted
    "a system's call": "[None for _ in iter(lambda: ctypes.CDLL(None).pause(), None)]",
    "numpy": "numpy.random.default_rng(0).standard_normal(10**9)",
    "torch": "torch.mm(x, torch.mm(x, torch.mm(x, torch.mm(x, x))))",
    "an exception that a library swallows": "[swallow() for _ in iter(int, 1)]",
}
SET_UP = {
    "a system's call": "import ctypes",
    "numpy": "import numpy",
    "torch": "import torch; x = torch.ones(8000, 8000)",
    "an exception that a library swallows": "swallow = Swallow",
}
SWALLOW = """
import time
class Swallow:
    def __init__(self):
        try:
            time.sleep(0.2)
        except BaseException:
            pass
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c[0] == "a" else [pytest.mark.slow]) for c in NATIVE])
def test_native_code_without_end_is_ended(case, signum):
    process = started(SWALLOW + running(NATIVE[case], SET_UP[case]))
    code, seconds, said = ended(process, signum)
    assert (code, said.splitlines()[-1]) == (128 + signum, f"-c: {signals.words(signum)}")
    assert seconds < 2 + LATE_S
    assert "Traceback" not in said


def test_children_and_what_is_half_made_go_with_it(tmp_path):
    made = tmp_path / "half"
    body = f"""
import ctypes, pathlib, subprocess
from nanogpt_mac import files
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
with files.unfinished(pathlib.Path({str(made)!r})):
    pathlib.Path({str(made)!r}).mkdir()
    pathlib.Path({str(made / "x")!r}).touch()
    print(child.pid, flush=True)
    while True:
        ctypes.CDLL(None).pause()
"""
    code = f"import sys\ndef task(config):\n    exec({body!r}, {{'sys': sys}})\n{RUN.format(task='task')}"
    process = start([sys.executable, "-c", code])
    child = psutil.Process(int(process.stdout.readline()))
    assert made.exists()
    code, seconds, _ = ended(process, signal.SIGTERM)
    assert (code, made.exists()) == (143, False)
    assert seconds < 2 + LATE_S
    child.wait(5)


def test_work_that_is_asked_ends_well_and_a_second_signal_ends_at_once():
    loop = "with asked() as came:\n        print('there', flush=True)\n        while {}:\n            pass"
    before = "def task(config):\n    "
    process = started(f"{before}{loop.format('not came')}\n    return 7\n{RUN.format(task='task')}")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out.strip()) == (7, "SIGTERM: finishing this iteration, then a checkpoint")
    process = started(f"{before}{loop.format(True)}\n{RUN.format(task='task')}")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() + process.stdout.readline()
    code, seconds, _ = ended(process, signal.SIGINT)
    assert code == 130
    assert seconds < 2 + LATE_S


def test_a_signal_while_hydra_is_imported_is_one_line():
    code = """
import builtins, sys, time
from nanogpt_mac import script
real = builtins.__import__
def slow(name, *rest):
    if name == "nanogpt_mac.cli":
        print("there", flush=True)
        time.sleep(30)
    return real(name, *rest)
builtins.__import__ = slow
script.run("config", None)
"""
    code, seconds, said = ended(started(code), signal.SIGINT)
    assert (code, said) == (130, "-c: interrupted\n")
    assert seconds < 2 + LATE_S


def test_a_signal_while_exit_handlers_run_ends_them():
    process = started(
        running("import atexit, time; atexit.register(lambda: print('over', flush=True) or time.sleep(30))")
    )
    assert process.stdout.readline() == "over\n"
    code, seconds, said = ended(process, signal.SIGTERM)
    assert (code, said) == (143, "")
    assert seconds < 2 + LATE_S


def test_a_forked_worker_ends_alone():
    task = """import os, time
    child = os.fork()
    if child == 0:
        time.sleep(60)
    os.kill(child, 15)
    print(os.waitpid(child, 0)[1], flush=True)
    time.sleep(3)"""
    with started(running(task)) as process:  # communicate() knows nothing of what readline() took along
        out, said = process.stdout.read(), process.stderr.read()
    assert (process.returncode, out.strip(), said) == (0, "15", "")


def test_everything_is_as_before_afterwards():
    before = [signal.getsignal(s) for s in signals.WORDS]
    with pytest.raises(signals.Stop), signals.watched("x"):
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(s) for s in signals.WORDS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_what_is_made_aside_is_gone_after_a_fault_and_kept_after_none(tmp_path):
    for fault in (None, OSError("full"), KeyboardInterrupt()):
        place = tmp_path / "x"
        try:
            with files.unfinished(place):
                place.mkdir()
                if fault:
                    raise fault
        except (OSError, KeyboardInterrupt):
            assert not place.exists()
        else:
            place.rmdir()


# -- 30 random moments ------------------------------------------------------------------------------------------------

TRAIN = ["train.py", "experiment=smoke", "backend=cpu", "data=text", "path=text.txt", "data.tokenizer=bpe",
         "data.vocab_size=2000", "max_iters=300", "eval_interval=50", "sample_tokens=300", "run_dir=run"]  # fmt: skip
SAMPLE = ["sample.py", "backend=cpu", "max_new_tokens=1000", "num_samples=2"]
COMPARE = ["compare.py", "experiment=smoke", "variants=[cpu,mlx]", "data=text", "path=text.txt", "rounds=1", "iters=30",
           "run_dir=run"]  # fmt: skip


def corpus_text():
    dice = random.Random(5)
    return " ".join("".join(dice.choice("etaoinshrdlu") for _ in range(dice.randint(1, 12))) for _ in range(150_000))


def leftovers(folder, temporary):
    """What is half made: files aside, temporary folders, checkpoints and corpora that do not open, processes."""
    found = [str(p) for p in [*folder.rglob(".*"), *temporary.glob(".*")] if p.name != ".hydra" and p.suffix != ".lock"]
    found = [p for p in found if not p.endswith(("/.lock", "wandb")) and "/wandb/" not in p]
    for link in folder.glob("run/ckpt/last"):
        checkpoint.load(link.resolve())
    for place in (folder / "data").glob("*/"):
        prepared.load(place)
    if (folder / "run").exists() and not (folder / "run" / "plan.json").exists():
        found += [name for name in ("env.json", "metrics.jsonl") if not (folder / "run" / name).exists()]
    time.sleep(0.2)
    for process in psutil.process_iter(["cwd", "cmdline"]):
        if process.info["cwd"] == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(" ".join(process.info["cmdline"] or ["?"])[:200])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "moments"), [("train", 14), ("sample", 6), ("compare", 10)])
def test_at_random_moments_both_signals_end_it_in_time(name, moments, tmp_path):
    """The table is printed: `pytest -s`. A process that Python has not yet started up dies of the signal itself."""
    text, dice, slowest, kinds = corpus_text(), random.Random(name), {}, {}
    whole = tmp_path / "whole"

    def begin(number, argv):
        folder = tmp_path / number
        folder.mkdir()
        (folder / "text.txt").write_text(text)
        temporary = tmp_path / f"{number}-temporary"
        temporary.mkdir()
        if argv is SAMPLE:
            argv = [*argv, f"run={whole / 'run'}", f"data_dir={whole / 'data'}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
        argv = [sys.executable, str(ROOT / argv[0]), *argv[1:]]
        with (tmp_path / f"{number}.log").open("wb") as log:
            return start(argv, cwd=folder, env=environment, stdout=log, stderr=log, text=None), folder, temporary

    argv = {"train": TRAIN, "sample": SAMPLE, "compare": COMPARE}[name]
    began = time.monotonic()
    process, _, _ = begin("whole", TRAIN if name == "sample" else argv)
    assert process.wait(600) == 0, (tmp_path / "whole.log").read_text()[-2000:]
    if name == "sample":
        began = time.monotonic()
        assert begin("again", argv)[0].wait(600) == 0
    lasts = time.monotonic() - began
    for number in range(moments):
        moment = lasts * dice.random()
        for signum in (signal.SIGINT, signal.SIGTERM):
            process, folder, temporary = begin(f"{number}-{signum.name}", argv)
            time.sleep(moment)
            over, began = process.poll() is not None, time.monotonic()
            process.send_signal(signum)
            code, seconds = process.wait(60), time.monotonic() - began
            said = (tmp_path / f"{number}-{signum.name}.log").read_text()
            print(f"{name} {signum.name} at {moment:6.2f} of {lasts:.1f} s: {seconds:5.2f} s, code {code}", flush=True)
            assert "Traceback" not in said, said
            assert leftovers(folder, temporary) == []
            iterating = "step " in said or "iteration" in said
            if not over:
                assert code in (128 + signum, -signum, 0), said  # 0: it was just done
                assert seconds < (10 if iterating else 2) + LATE_S, said
            kinds[code] = kinds.get(code, 0) + 1
            slowest[iterating] = max(slowest.get(iterating, 0), seconds)
    print(f"{name}: codes {kinds}, slowest {slowest}")
