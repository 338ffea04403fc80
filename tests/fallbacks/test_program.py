"""Programs that are not ours, run unmodified: faults at known lines, counts against independent ones, how they end."""

import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter

import pytest
from fakes.support import ROOT

from nanogpt_mac import simulator
from nanogpt_mac.coverage import program
from nanogpt_mac.records.fallbacks import FindingKind

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the simulated MPS device needs Linux")

HELPER = """
import torch.nn as nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        y = self.a(x)
        return nn.functional.gelu(y)  # PLANTED hidden gelu
"""

# Ten kinds of fault, each in a line that says what it is: kind, operator, calls in each of the four iterations.
LOOP = """
import sys
import torch
from helper import Net

device = "mps"
torch.manual_seed(0)
net = Net().to(device)
optimizer = torch.optim.AdamW(net.parameters())
losses, rows = [], torch.zeros(1, dtype=int, device=device)
for step in range(int(sys.argv[1])):
    x = torch.randn(4, 8).to(device)  # to device: copy_
    y = net(x)
    s = torch.mode(y)[0]  # missing, CPU kernel: mode
    u = torch.embedding_renorm_(x * 1, rows, 1, 2)  # explicit fallback: embedding_renorm_
    t = torch.sinh(x)  # announced: sinh
    try:
        x.double()  # limit: double
    except TypeError:
        pass
    try:
        torch.cosh(x)  # limit: cosh
    except RuntimeError:
        pass
    try:
        torch.erfinv(x)  # nowhere: erfinv.out
    except NotImplementedError:
        pass
    loss = (y + 1).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())  # to host: _local_scalar_dense
    kept = x[x > 0]  # to host: index.Tensor
    torch.mps.synchronize()  # to host: synchronize
print("done", len(losses), __name__, sys.argv, __file__)
sys.exit(3)
"""

# Runs the child as coverage/program.py does, with faults planted in the simulated device beforehand.
PLANTED = """
import json, sys
from contextlib import ExitStack
from pathlib import Path
from nanogpt_mac import simulator
from nanogpt_mac.fallbacks import program
simulator.install()
faults = [("gelu", "hidden"), ("sinh", "announced"), ("cosh", "shape_limit"), ("erfinv", "nowhere")]
with ExitStack() as stack:
    for op, fault in faults:
        stack.enter_context(simulator.planted(op, fault))
    code = program.run(json.loads(Path(sys.argv[1]).read_text()))
sys.exit(code)
"""


@pytest.fixture
def stranger(tmp_path):
    """A folder of a program: writes it, runs it with faults planted, and returns the document and the process."""

    def run(loop, *arguments, helper=HELPER, **task):
        folder = tmp_path / "stranger"
        folder.mkdir(exist_ok=True)
        (folder / "loop.py").write_text(textwrap.dedent(loop))
        (folder / "helper.py").write_text(textwrap.dedent(helper))
        given = {"argv": ["loop.py", *arguments], "steps": None, "map_cuda": False, "path": ""} | task
        given["answer"] = str(tmp_path / "answer.json")
        (tmp_path / "task.json").write_text(json.dumps(given))
        environment = simulator.environment(fallback=True) | {"PYTHONPATH": str(ROOT), "KINETO_LOG_LEVEL": "99"}
        argv = [sys.executable, "-c", PLANTED, str(tmp_path / "task.json")]
        done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert (tmp_path / "answer.json").exists(), f"{done.returncode}: {done.stderr}"
        seen = json.loads((tmp_path / "answer.json").read_text())
        return program.document(seen, given["argv"], folder, done.returncode), done

    return run


def line_of(text, mark):
    return next(i for i, line in enumerate(textwrap.dedent(text).splitlines(), 1) if mark in line)


# The same in less usual places, and mistakes of the program's own, which are no findings.
PLACES = """
import io
import os
import torch
from helper import Meter, batches

class Mover:
    def __call__(self, t):
        return t.to("cpu")  # to host: copy_

class Net(torch.nn.Module):
    def forward(self, x):
        return torch.pdist(x)

def refused(call):
    try:
        call()
    except (TypeError, RuntimeError):
        return
    raise SystemExit("not refused")

os.chdir("..")
w = torch.ones(3, 4, device="mps", requires_grad=True)
net = torch.jit.script(Net())
seen = []
w.register_hook(lambda grad: seen.append(grad.tolist()))  # to host: copy_
torch.library.define("stranger::up", "(Tensor x) -> Tensor")
torch.library.impl("stranger::up", "MPS", lambda x: x + torch.ones(3, 4).to("mps"))
for x in batches(2):
    torch.pdist(x * w).sum().backward()  # fallback: _pdist_forward _pdist_backward
    net(x)  # fallback: _pdist_forward
    Meter().update(x)
    Mover()(x)
    rows = [row.cpu() for row in x.unbind()[:1]]  # to host: copy_
    if x.sum() > 0:  # to host: _local_scalar_dense
        exec("y = x.sum().item()")  # to host: _local_scalar_dense
    torch.save(x, io.BytesIO())  # to host: copy_
    assert next(float(v) for v in x[0])  # to host: _local_scalar_dense
    refused(lambda: torch.zeros(2, dtype=torch.float64, device="mps"))  # limit: zeros
    with torch.device("mps:0"):
        refused(lambda: torch.ones(2, dtype=torch.float64))  # limit: ones
    refused(lambda: x @ torch.ones(4, 3))
    refused(lambda: x.numpy())
    refused(lambda: x.pin_memory())
    torch.ops.stranger.up(x)  # to device: stranger::up
torch.nn.functional.linear(x, w[:, :2])
"""
METER = """
import torch

class Meter:
    def update(self, value):
        def inner():
            return value.mean().item()  # to host: _local_scalar_dense
        return inner()

def batches(n):
    for _ in range(n):
        yield torch.ones(3, 4).to("mps")  # to device: copy_
"""

WHAT = {
    "fallback": FindingKind.MISSING_CPU,
    "to device": FindingKind.SYNC,
    "to host": FindingKind.SYNC,
    "missing, CPU kernel": FindingKind.MISSING_CPU,
    "explicit fallback": FindingKind.EXPLICIT,
    "announced": FindingKind.HIDDEN,
    "limit": FindingKind.LIMIT,
    "nowhere": FindingKind.MISSING,
}


def test_ten_kinds_of_fault_are_found_at_their_lines(stranger):
    made, done = stranger(LOOP, "4")
    assert done.returncode == 3, done.stderr
    assert made.left_with == 3
    assert made.ended == "ended by sys.exit(3)"
    due = {("helper.py:11", FindingKind.HIDDEN, "gelu"): 4}
    for number, line in enumerate(LOOP.splitlines(), 1):
        what, _, op = line.partition("  # ")[2].partition(": ")
        if op:
            due[f"loop.py:{number}", WHAT[what], op] = 4
    assert len(due) == 11
    found = {(f.where, f.kind, f.op): f.calls for f in made.findings}
    model = {("loop.py:8", FindingKind.SYNC, "copy_"): 2}  # the weights, once
    assert found == due | model
    assert made.doubts == ()
    each = {f.where for f in made.findings if f.each_iteration}
    waits = ("to(device)", "losses.append", "kept =", "synchronize")
    assert each == {f"loop.py:{line_of(LOOP, mark)}" for mark in waits} - {"loop.py:8"} | {
        f"loop.py:{line_of(LOOP, '# to device')}"
    }
    assert made.iterations is not None
    assert (made.iterations.count, made.steps) == (4, 4)
    assert re.search(r"done 4 __main__ \['loop.py', '4'\] /.*/stranger/loop.py$", done.stdout, re.M)
    assert all(f.advice for f in made.findings)
    lines = LOOP.splitlines()
    for f in made.findings:
        file, _, number = (f.where or "").partition(":")
        if file == "loop.py":
            assert f.source == lines[int(number) - 1].strip()


def test_faults_in_unusual_places_and_none_in_mistakes(stranger):
    made, done = stranger(PLACES, helper=METER)
    assert done.returncode == 1, done.stderr
    due = {
        (f"{file}:{number}", WHAT[what], op): 2
        for file, text in (("loop.py", PLACES), ("helper.py", METER))
        for number, line in enumerate(text.splitlines(), 1)
        if "  # " in line
        for what, _, ops in [line.partition("  # ")[2].partition(": ")]
        for op in ops.split()
    }
    assert {(f.where, f.kind, f.op): f.calls for f in made.findings} == due
    assert len(due) == 15
    assert f"loop.py:{line_of(PLACES, 'pdist(x * w)')}: UserWarning: The operator" in done.stderr
    trace = done.stderr.partition("Traceback")[2]
    assert f'loop.py", line {line_of(PLACES, "functional.linear")}, in <module>' in trace
    assert "nanogpt_mac" not in trace


BACKWARD = """
import torch
from torch.utils.checkpoint import checkpoint

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return torch.mode(grad)[0].expand_as(grad) * 2  # in a backward of its own

def part(x):
    return torch.pdist(x).sum()  # recomputed

w = torch.randn(4, 4, device="mps", requires_grad=True)
for step in range(3):
    loss = torch.pdist(w).sum()
    loss = loss + Twice.apply(w).sum() + checkpoint(part, w, use_reentrant=False)
    torch.autograd.grad(loss, [w])
    v = w.detach().requires_grad_()
    (v * v).sum().backward()
"""


@pytest.mark.slow
def test_the_backward_pass_belongs_to_the_forward_line(stranger):
    made, done = stranger(BACKWARD)
    assert done.returncode == 0, done.stderr
    found = {(f.where, f.op): f.calls for f in made.findings if f.kind is FindingKind.MISSING_CPU}
    first, recomputed = line_of(BACKWARD, "loss = torch.pdist"), line_of(BACKWARD, "# recomputed")
    assert found == {
        (f"loop.py:{first}", "_pdist_forward"): 3,
        (f"loop.py:{first}", "_pdist_backward"): 3,
        (f"loop.py:{recomputed}", "_pdist_forward"): 6,
        (f"loop.py:{recomputed}", "_pdist_backward"): 3,
        (f"loop.py:{line_of(BACKWARD, '# in a backward')}", "mode"): 3,
    }
    assert made.iterations is not None
    assert made.iterations.unit == "from one backward pass to the next"
    assert made.iterations.count == 6


ENDS = {
    "raise ValueError('its own fault')": (1, "failed: ValueError: its own fault"),
    "raise SystemExit('words')": (1, "ended by sys.exit('words')"),
    "import os; os._exit(5)": (5, "left by os._exit(5)"),
    "pass": (0, "ended by itself"),
}


@pytest.mark.parametrize("end", ENDS)
def test_how_a_program_ends_is_its_own(stranger, end):
    made, done = stranger(f"import torch\nx = torch.ones(2, device='mps')\nx.item() if False else x.cpu()\n{end}\n")
    assert (done.returncode, made.ended) == ENDS[end]
    assert [(f.where, f.calls) for f in made.findings if f.to_host] == [("loop.py:3", 1)]
    if "ValueError" in end:
        assert "ValueError: its own fault" in done.stderr
        assert "nanogpt_mac" not in done.stderr.partition("Traceback")[2]


@pytest.mark.slow
def test_steps_stop_it_and_its_own_tidying_up_still_runs(stranger):
    loop = LOOP.replace("losses = []", "losses = []\nimport atexit; atexit.register(print, 'tidied up')")
    made, done = stranger(loop, "50", steps=2)
    assert made.ended == "stopped after 2 optimizer steps"
    assert (done.returncode, made.steps) == (0, 2)
    assert "tidied up" in done.stdout


STUBBORN = """
import torch
w = torch.ones(2, device="mps", requires_grad=True)
optimizer = torch.optim.SGD([w])
while True:
    try:
        w.sum().backward()
        optimizer.step()
        print(w.sum().item())
    except:
        print("caught")
"""


@pytest.mark.slow
def test_steps_stop_a_program_that_catches_everything(stranger):
    made, done = stranger(STUBBORN, steps=2)
    assert (done.returncode, made.ended, done.stdout.count("caught")) == (0, "stopped after 3 optimizer steps", 1)
    assert [(f.where, f.calls) for f in made.findings] == [("loop.py:9", 1)]


UNSEEN = """
import subprocess, sys, threading
import torch
from torch.utils.data import DataLoader, TensorDataset

if __name__ == "__main__":
    x = torch.ones(4, device="mps")
    subprocess.run([sys.executable, "-c", ""])
    thread = threading.Thread(target=lambda: torch.ones(2, device="mps").sum())
    thread.start()
    thread.join()
    for (batch,) in DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2, num_workers=2):
        batch.to("mps")
    torch.library.define("stranger::twice", "(Tensor x) -> Tensor")
    torch.library.impl("stranger::twice", "MPS", lambda x: x * 2)
    torch.ops.stranger.twice(x)
"""


def test_what_cannot_be_seen_is_said(stranger):
    made, done = stranger(UNSEEN)
    assert done.returncode == 0, done.stderr
    assert made.unseen == (
        "DataLoader worker processes, started in loop.py:12 (2)",
        "inside operators that are not torch's: stranger::twice (1)",
        "subprocesses, started in loop.py:8 (1)",
        "threads of the program, started in loop.py:10 (1)",
    )
    copies = [(f.where, f.calls) for f in made.findings if f.kind is FindingKind.SYNC]
    assert copies == [("loop.py:13", 2)]


CUDA = """
import torch

assert torch.cuda.is_available()
device = torch.device("cuda")
scaler = torch.amp.GradScaler("cuda", enabled=False)
net = torch.nn.Linear(4, 4).cuda()
x = torch.ones(2, 4, device="cuda:0").pin_memory().to(device, non_blocking=True)
with torch.autocast("cuda", dtype=torch.bfloat16):
    y = net(x)
assert y.device.type == "mps" and y.dtype == torch.bfloat16 and y.is_cuda
torch.cuda.synchronize()
print("ran")
"""


def test_a_program_that_asks_for_cuda(stranger):
    made, done = stranger(CUDA, map_cuda=True)
    assert done.returncode == 0, done.stderr
    assert {"torch.cuda.is_available", "Tensor.cuda", 'device "cuda"', "torch.cuda.synchronize"} <= set(made.mapped)
    assert made.reached["linear"] == 1
    made, done = stranger(CUDA)
    assert made.left_with == 1
    assert made.mapped == ()


def test_against_a_dispatch_mode_and_the_devices_own_counters(tmp_path, stranger):
    folder = tmp_path / "stranger"
    loop = (
        LOOP.replace("torch.sinh", "torch.sin").replace("torch.cosh", "torch.tan").replace("torch.erfinv", "torch.erf")
    )
    made, _ = stranger(loop, "6", helper=HELPER.replace("gelu", "silu"))
    answer = tmp_path / "reference.json"
    environment = simulator.environment(fallback=True) | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, str(ROOT / "tests/fakes/program_reference.py"), str(answer), "0", "-", "loop.py", "6"]
    subprocess.run(argv, cwd=folder, env=environment, capture_output=True, check=False)
    reference = json.loads(answer.read_text())
    names = {FindingKind.MISSING_CPU: "fallback", FindingKind.EXPLICIT: "fallback", FindingKind.LIMIT: "refused"}
    mine = Counter()
    for f in made.findings:
        if f.op != "synchronize":
            mine[f.where, names.get(f.kind, "to host" if f.to_host else "to device")] += f.calls
    assert mine == Counter({(line, what): calls for line, what, calls in reference["lines"]})
    assert made.waits == reference["waits"]
    fallbacks = Counter({f"aten::{f.op}": f.calls for f in made.findings if names.get(f.kind) == "fallback"})
    assert fallbacks == reference["fallback"]


# -- the command ------------------------------------------------------------------------------------------------------


def command(*overrides, cwd=ROOT):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, str(ROOT / "mps_coverage.py"), *overrides]
    return subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_command(tmp_path):
    (tmp_path / "here.py").write_text("import torch\nprint('its own words')\ntorch.mode(torch.ones(3, device='mps'))\n")
    done = command("script=here.py", "format=json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert (document["scope"], document["device"]) == ("script", "simulated-mps")
    assert [f["where"] for f in document["findings"]] == ["here.py:3"]
    assert "its own words" in done.stderr
    done = command("script=here.py", cwd=tmp_path)
    assert "its own words" in done.stdout
    assert "missing, CPU kernel" in done.stdout
    (tmp_path / "slow.py").write_text("import time, torch\ntorch.ones(1, device='mps').item()\ntime.sleep(600)\n")
    done = command("script=slow.py", "limit_s=8", "format=markdown", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "stopped by the time limit" in done.stdout
