"""A process that has imported what the commands import, and forks one child for each command: seconds less each.

It has computed nothing, so no thread pool of torch or MLX exists yet that a fork would lose. Only what is read while
a framework is imported differs from a fresh process, so a command with an environment of its own gets a fresh one.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPORTS = ["mlx.nn", "wandb", "nanogpt_mac.cli", "nanogpt_mac.train.session", "nanogpt_mac.train.sample"]
IMPORTS += ["nanogpt_mac.backends.torch_backend", "nanogpt_mac.backends.mlx_backend"]
POLL_S = 0.02


class Warm:
    """The client's side: `run` is subprocess.run for a script of this checkout, with text captured."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, __file__, *[path for path in sys.path if path]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, argv, cwd, timeout):
        with tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder) / name for name in ("out", "err"))
            task = {"argv": argv, "cwd": str(cwd), "out": str(out), "err": str(err), "timeout": timeout}
            self.server.stdin.write(json.dumps(task) + "\n")
            self.server.stdin.flush()
            code = json.loads(self.server.stdout.readline())
            if code is None:
                raise subprocess.TimeoutExpired(argv, timeout, out.read_text(), err.read_text())
            return subprocess.CompletedProcess(argv, code, out.read_text(), err.read_text())

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


def serve():
    for name in IMPORTS:
        __import__(name)
    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return become(task)
        deadline = time.monotonic() + task["timeout"]
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if ended[0] == 0:
            os.killpg(pid, 9)
            os.waitpid(pid, 0)
        print(json.dumps(os.waitstatus_to_exitcode(ended[1]) if ended[0] else None), flush=True)
    return None


def become(task):
    """Be the command, in the forked child."""
    os.setsid()
    os.chdir(task["cwd"])
    for number, name in enumerate([os.devnull, task["out"], task["err"]]):
        handle = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    sys.argv = task["argv"]
    sys.path[0] = str(Path(task["argv"][0]).parent)
    runpy.run_path(task["argv"][0], run_name="__main__")


if __name__ == "__main__":
    sys.path[1:] = sys.argv[1:]
    serve()
