"""The workflow that tests every push: its commands are ours, its rights small, a GPU that does not compute is said."""

import os
import re
import shlex
import subprocess

import pytest
import yaml
from fakes.support import ROOT

from nanogpt_mac import cli
from nanogpt_mac.compare.config import validate as validate_comparison
from nanogpt_mac.coverage.config import validate as validate_coverage

WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
JOBS = WORKFLOW["jobs"]
STEPS = {step.get("name", step.get("uses")): step for step in JOBS["test"]["steps"]}
GPU = "Ask whether this Mac's GPU computes"


def scripts():
    return [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]


def overrides(script):
    """What the only call of a root script in the workflow is given."""
    (line,) = [line for text in scripts() for line in text.splitlines() if f"/python {script}" in line]
    words = shlex.split(line.split(">>")[0])
    return words[words.index(script) + 1 :]


def test_it_runs_for_every_push_and_pull_request_on_linux_and_on_a_mac():
    assert WORKFLOW[True] == {"push": None, "pull_request": None}  # YAML's word for `on`; no branch is left out
    assert JOBS["test"]["strategy"] == {"fail-fast": False, "matrix": {"os": ["ubuntu-latest", "macos-15"]}}
    assert JOBS["test"]["runs-on"] == "${{ matrix.os }}"
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 45 for job in JOBS.values())
    actions = [step["uses"] for job in JOBS.values() for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions)


def test_the_test_command_is_the_readmes_and_writes_junit_xml():
    assert "make test" in (ROOT / "README.md").read_text()
    assert STEPS["Lint, types and tests"]["run"] == 'make test PYTEST="--junitxml=results/junit.xml"'
    assert "if" not in STEPS["Lint, types and tests"]
    asked = subprocess.run(
        ["make", "-n", "test", "PYTEST=--junitxml=results/junit.xml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"-m pytest .*--junitxml=results/junit\.xml$", asked.stdout, re.MULTILINE)


def test_every_command_is_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    used = [target for text in scripts() for target in re.findall(r"\bmake ([\w-]+)", text)]
    assert used
    assert set(used) <= set(targets)
    files = [name for text in scripts() for name in re.findall(r"python ([\w./]+\.py)", text)]
    assert {"tools/mac_gpu.py", "tools/mac_api.py", "compare.py", "mps_coverage.py"} <= set(files)
    assert all((ROOT / name).is_file() for name in files)
    validate_coverage(cli.compose(overrides("mps_coverage.py"), "coverage"))
    validate_comparison(cli.compose(overrides("compare.py"), "compare"))
    assert "experiment=smoke" in overrides("compare.py")


def test_what_it_leaves_is_uploaded_even_when_tests_fail():
    upload = STEPS["actions/upload-artifact@v6"]
    assert "cancelled" in upload["if"]
    assert upload["with"]["name"] == "results-${{ matrix.os }}"
    assert upload["with"]["path"].split()[0] == "results"
    assert "run_dir=results/comparison" in overrides("compare.py")
    assert "output=results/mps-verify.json" in overrides("mps_coverage.py")


def test_no_expression_is_pasted_into_a_script():
    assert not [script for script in scripts() if "${{" in script]


@pytest.mark.parametrize("script", scripts(), ids=range(len(scripts())))
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


@pytest.mark.parametrize("usable", [True, False])
def test_a_gpu_that_does_not_compute_is_said_and_left_out(tmp_path, usable):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho 'torch MPS: out of memory'\nexit {int(not usable)}\n")
    python.chmod(0o755)
    (tmp_path / "results").mkdir()
    files = {name: tmp_path / name for name in ("GITHUB_OUTPUT", "GITHUB_ENV", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.touch()
    argv = ["bash", "-e", "-o", "pipefail", "-c", STEPS[GPU]["run"]]  # as the runner has it under `shell: bash`
    env = os.environ | {name: str(file) for name, file in files.items()}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    output, variables, summary = (file.read_text() for file in files.values())
    assert output == f"usable={str(usable).lower()}\n"
    assert (tmp_path / "results" / "gpu.txt").read_text() == "torch MPS: out of memory\n"
    assert variables == ("" if usable else "NANOGPT_MAC_NO_GPU=1\n")
    assert ("does not compute" in summary) is ("::warning::" in done.stdout) is not usable
    assert ("- torch MPS: out of memory" in summary) is not usable
    assert "steps.gpu.outputs.usable == 'true'" in STEPS["Hold the predictions made off a Mac against this one"]["if"]
    assert STEPS[GPU]["id"] == "gpu"


def test_no_two_files_differ_in_case_alone():
    """macOS's file system takes them for one."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\n") if listed.returncode == 0 else []
    if not names:
        pytest.skip("not a git repository")
    assert len({name.lower() for name in names}) == len(names)
