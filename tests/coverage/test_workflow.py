"""The workflow that checks the nightly every day: its commands are ours, its rights small, its exit codes honest."""

import os
import re
import shlex
import subprocess

import pytest
import yaml
from fakes.support import ROOT

from nanogpt_mac import cli
from nanogpt_mac.coverage.config import validate
from nanogpt_mac.errors import InputError

PATH = ROOT / ".github" / "workflows" / "mps-coverage.yml"
WORKFLOW = yaml.safe_load(PATH.read_text())
JOBS = WORKFLOW["jobs"]


def scripts():
    return [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]


def commands():
    """The overrides of every call of mps_coverage.py."""
    lines = [line for script in scripts() for line in script.splitlines() if "mps_coverage.py" in line]
    found = []
    for line in lines:
        words = shlex.split(line.replace("$release", "2.15.0").split(">")[0].split("||")[0])
        found.append(words[words.index("mps_coverage.py") + 1 :])
    return found


def test_every_command_line_is_one_that_we_accept():
    found = commands()
    assert len(found) == 4
    for overrides in found:
        validate(cli.compose(overrides, "coverage"))
    static, runtime, verify, history = (cli.compose(overrides, "coverage") for overrides in found)
    assert (static.torch, static.against, static.binary) == ("nightly", "2.15.0", True)
    assert (runtime.torch, runtime.run) == ("nightly", True)
    assert (history.history, history.html) == ("2.5..nightly", "history.html")
    assert (verify.verify, verify.output) == (True, "mps-verify.json")
    with pytest.raises(InputError, match="there is no such key"):
        cli.compose([*found[0], "fromat=markdown"], "coverage")


def test_it_runs_every_day_with_small_rights():
    on = WORKFLOW[True]  # YAML's word for `on`
    assert re.fullmatch(r"\d+ \d+ \* \* \*", on["schedule"][0]["cron"])
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert {name: job.get("permissions") for name, job in JOBS.items()} == {
        "static": None,
        "runtime": None,
        "history": None,
        "report": {"issues": "write"},
    }
    assert WORKFLOW["concurrency"]["group"]
    assert all(job["timeout-minutes"] <= 60 for job in JOBS.values())
    assert (JOBS["static"]["runs-on"], JOBS["runtime"]["runs-on"]) == ("ubuntu-latest", "macos-15")
    actions = [step["uses"] for job in JOBS.values() for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions)


def test_no_expression_is_pasted_into_a_script():
    assert not [script for script in scripts() if "${{" in script]


@pytest.mark.parametrize("script", scripts(), ids=range(len(scripts())))
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


@pytest.fixture
def step(tmp_path):
    """Runs a step of the workflow with a `python` and a `gh` of our own; the finished process and the summary."""

    def run(job, name, python="", gh="", **environment):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for tool, body in (("python", python), ("gh", gh)):
            (folder / tool).write_text(f"#!/bin/bash\n{body}\n")
            (folder / tool).chmod(0o755)
        summary, output = tmp_path / "summary", tmp_path / "output"
        summary.touch()
        output.touch()
        env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", **environment}
        env |= {"GITHUB_STEP_SUMMARY": str(summary), "GITHUB_OUTPUT": str(output)}
        script = next(s["run"] for s in JOBS[job]["steps"] if s.get("name") == name)
        argv = ["bash", "-e", "-o", "pipefail", "-c", script]  # as the runner has it under `shell: bash`
        done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True)
        return done, summary.read_text(), output.read_text()

    return run


COMPARE = "Compare the nightly with the last release"
RUN = "Run this model under the nightly and under the last release"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_exit_code_is_the_checks_own(step, tmp_path, code):
    index = 'echo "torch (2.15.0)"; echo "Available versions: 2.15.0"'
    python = f'case "$*" in *"pip index"*) {index};; *) echo "$*"; exit {code};; esac'
    done, summary, _ = step("static", COMPARE, python)
    assert done.returncode == code
    assert "torch=nightly against=2.15.0 binary=true" in summary
    assert (tmp_path / "static.md").read_text() == summary


def test_the_history_is_a_page_and_a_comment(step, tmp_path):
    name = "Read every release and the nightly"
    done, summary, _ = step("history", name, 'echo "$*"; touch history.html; exit 2')
    assert done.returncode == 2
    assert "history=2.5..nightly" in summary
    kept = next(s["with"] for s in JOBS["history"]["steps"] if s.get("with", {}).get("name") == "history")
    assert kept["path"].split() == ["history.md", "history.html"]
    done, summary, _ = step("history", name, "exit 2")
    assert "could not be read" in (tmp_path / "history.md").read_text()


def test_a_check_that_says_nothing_is_no_success(step):
    done, summary, _ = step("runtime", RUN, "exit 2")
    assert done.returncode == 2
    assert "could not be run" in summary


def test_a_runner_without_a_gpu_says_so(step, tmp_path):
    name = "Ask whether this runner has a GPU that computes"
    done, summary, output = step("runtime", name, "exit 1")
    assert (done.returncode, output) == (0, "usable=false\n")
    assert "no usable MPS device" in summary
    assert "no usable MPS device" in (tmp_path / "runtime.md").read_text()
    assert b"::warning::" in done.stdout
    done, summary, output = step("runtime", name, "exit 0")
    assert output.endswith("usable=true\n")
    conditions = [s.get("if") for s in JOBS["runtime"]["steps"] if "mps_coverage.py" in s.get("run", "")]
    assert all("steps.gpu.outputs.usable == 'true'" in condition for condition in conditions)


@pytest.mark.parametrize(("known", "what"), [("17", "issue edit 17"), ("", "issue create")])
def test_one_issue_is_kept_up_to_date(step, tmp_path, known, what):
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "static.md").write_text("### MPS coverage\n" + "x" * 40000)
    gh = f'[ "$2" = list ] && echo "{known}" || {{ echo "$*" > called; }}'
    given = {
        "TITLE": "MPS coverage",
        "STATIC": "failure",
        "RUNTIME": "success",
        "HISTORY": "success",
        "RUN": "https://example.org/1",
    }
    done, _, _ = step("report", "Write the issue", gh=gh, **given)
    assert done.returncode == 0, done.stderr
    assert what in (tmp_path / "called").read_text()
    body = (tmp_path / "body.md").read_text()
    assert "static check failure, runtime check success, history success" in body
    assert "### MPS coverage" in body
    assert "The runtime check left no report." in body
    assert "The history check left no report." in body
    assert len(body) < 65536  # GitHub's limit
