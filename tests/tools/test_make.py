"""What `make` does where python3 is too old, and where uv is there; with a Makefile that macOS's make 3.81 reads."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from fakes.support import ROOT

OLD = f"""exec {sys.executable} -c 'import sys; sys.version_info = (3, 9, 6); exec(sys.argv[1])' "$2" """
# Answers as a Python of today, and notes every other call; `-m venv` makes a python that notes, too.
NEW = """case "$1" in
-c) exec REAL -c "$2" ;;
*) echo "python $*" >>LOG ;;
esac"""
UV = """echo "uv $*" >>LOG; mkdir -p .venv"""


@pytest.fixture
def make(tmp_path):
    """make(python=..., uv=...) runs `make setup` with those two fakes alone on PATH; (process, their calls)."""

    def run(python, uv=None):
        project, folder, log = tmp_path / "project", tmp_path / "bin", tmp_path / "log"
        project.mkdir()
        folder.mkdir()
        for name in ("Makefile", "pyproject.toml", "requirements.lock"):
            shutil.copy(ROOT / name, project)
        for tool in ("sh", "make", "touch", "mkdir"):  # not the machine's own python3 and uv
            (folder / tool).symlink_to(shutil.which(tool))
        for name, body in (("python3", python), ("uv", uv)):
            if body:
                (folder / name).write_text(
                    f"#!/bin/sh\n{body}\n".replace("LOG", str(log)).replace("REAL", sys.executable)
                )
                (folder / name).chmod(0o755)
        argv = ["make", "setup", "SHELL=/bin/sh"]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
        env |= {"PATH": str(folder)}
        done = subprocess.run(argv, cwd=project, env=env, capture_output=True, text=True, check=False)
        return done, log.read_text().splitlines() if log.exists() else []

    return run


def test_uv_brings_a_python_where_python3_is_too_old(make):
    done, calls = make(OLD, UV)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "python3 is not Python 3.11 or later: uv brings 3.12\n"
    assert calls[0] == "uv venv --quiet --allow-existing --python 3.12 .venv"
    assert calls[1] == "uv pip install --python .venv/bin/python -c requirements.lock -e .[test,sweep]"


@pytest.mark.parametrize("python", [OLD, None], ids=["old", "absent"])
def test_without_uv_one_line_says_what_to_do(make, python):
    done, calls = make(python)
    assert done.returncode == 2
    first, *rest = done.stderr.splitlines()
    assert first.startswith(
        "python3 is not Python 3.11 or later. curl -LsSf https://astral.sh/uv/install.sh | sh installs"
    )
    assert "PYTHON=/path/to/python3.11" in first
    assert all(re.match(r"make.* (Error|\*\*\*)", line) for line in rest)
    assert calls == []


def test_uv_takes_a_python3_that_fits(make):
    done, calls = make(NEW, UV)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert calls[0] == f"uv venv --quiet --allow-existing --python {os.path.realpath(sys.executable)} .venv" or (
        calls[0] == f"uv venv --quiet --allow-existing --python {sys.executable} .venv"
    )


def test_the_makefile_has_nothing_newer_than_make_3_81():
    text = (ROOT / "Makefile").read_text()
    newer = [
        r"^\.ONESHELL",
        r"!=",
        r"\$\(file ",
        r"&:",
        r"^private ",
        r"^undefine ",
        r"::=",
        r"\$\(guile ",
        r"\$\(let ",
    ]
    assert not [pattern for pattern in newer if re.search(pattern, text, re.MULTILINE)]


def test_types_are_checked_for_both_systems():
    done = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "mypy --platform linux" in done.stdout
    assert "mypy --platform darwin" in done.stdout
