"""Questions to child processes: answers, every way of failing, and nothing left behind."""

import os
import sys
import time

import psutil
import pytest

from nanogpt_mac import child
from nanogpt_mac.child import ChildError, Question

ECHO = "import json, sys; print(json.dumps({'task': json.load(sys.stdin)}))"
HANGS = "import time; time.sleep(60)"
# It starts a helper that would keep a pipe open, says which, and ends.
LEAVES = """
import json, subprocess, sys
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(json.dumps({"pid": helper.pid}))
"""


def python(program):
    return [sys.executable, "-c", program]


def test_a_child_answers_a_task_whatever_else_is_printed():
    assert child.ask(python("print('a kernel speaks');" + ECHO + ";print('and once more')"), {"a": [1]}) == {
        "task": {"a": [1]}
    }


def test_a_module_finds_this_package_wherever_it_is_run(tmp_path, monkeypatch):
    (tmp_path / "asked.py").write_text("from nanogpt_mac import child\nchild.answer(lambda task: [task])\n")
    monkeypatch.chdir("/")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    assert child.ask("asked", 7, environment=environment) == [7]


def test_what_a_child_may_not_do_is_its_one_line(tmp_path):
    (tmp_path / "asked.py").write_text(
        "from nanogpt_mac import child\nfrom nanogpt_mac.errors import InputError\n"
        "def refuse(task):\n    raise InputError('key=1: use 2')\nchild.answer(refuse)\n"
    )
    with pytest.raises(ChildError, match=r"^key=1: use 2$"):
        child.ask("asked", environment=os.environ | {"PYTHONPATH": str(tmp_path)})


@pytest.mark.parametrize(
    ("program", "reason", "code"),
    [
        ("import sys; sys.stderr.write('one\\ntwo\\n\\n'); sys.exit(3)", "two", 3),
        ("import sys; sys.exit(4)", "exit code 4", 4),
        ("raise ValueError('first\\nsecond')", "ValueError: first", 1),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL: out of memory?", -9),
        ("import os; os.kill(os.getpid(), 6)", "killed by SIGABRT", -6),
        ("print('no answer')", "its answer cannot be read: 'no answer'", 0),
    ],
)
def test_every_failure_is_one_line(program, reason, code):
    with pytest.raises(ChildError) as failure:
        child.ask(python(program))
    assert (str(failure.value), failure.value.code) == (reason, code)


def test_an_interpreter_that_is_not_there_is_one_line():
    with pytest.raises(ChildError, match=r"^/no/python: cannot be run: No such file or directory$"):
        child.ask("json.tool", python="/no/python")


def test_a_child_that_hangs_is_ended():
    began = time.monotonic()
    with pytest.raises(ChildError, match=r"^no answer within 0\.3 s$") as failure:
        child.ask(python(HANGS), timeout_s=0.3)
    assert failure.value.code is None
    assert time.monotonic() - began < 10


def gone(pid):
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_helper_that_a_child_leaves_is_ended_and_not_waited_for():
    began = time.monotonic()
    answer = child.ask(python(LEAVES))
    assert time.monotonic() - began < 30
    assert gone(answer["pid"])


def test_lines_come_as_they_are_printed_and_a_failure_after_them():
    program = """
import sys, time
for i in range(2):
    print('{"i": %d}' % i, flush=True)
    print("and noise", flush=True)
    time.sleep(0.5)
sys.exit("over")
"""
    lines = child.ask_lines(Question(python(program)))
    assert next(lines) == {"i": 0}
    began = time.monotonic()
    assert next(lines) == {"i": 1}
    assert time.monotonic() - began > 0.2
    with pytest.raises(ChildError, match=r"^over$"):
        next(lines)


def test_silence_and_not_the_whole_time_ends_a_child_that_prints_lines():
    program = """
import time
for i in range(4):
    print('{"i": %d}' % i, flush=True)
    time.sleep(0.6)
time.sleep(60)
"""
    lines = child.ask_lines(Question(python(program), timeout_s=1.5))
    assert [next(lines)["i"] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ChildError, match=r"^no answer within 1\.5 s$"):
        next(lines)


def test_lines_that_nobody_waits_for_end_their_child():
    lines = child.ask_lines(Question(python("import os, time; print([os.getpid()], flush=True); time.sleep(60)")))
    (pid,) = next(lines)
    lines.close()
    assert gone(pid)


def test_queues_run_side_by_side_and_what_is_in_one_in_order(tmp_path):
    def sleeps(name, seconds):
        program = f"""
import json, time
began = time.time(); time.sleep({seconds}); print(json.dumps(["{name}", began, time.time()]))
"""
        return Question(python(program))

    answers = child.ask_side_by_side([[sleeps("a", 0.5), sleeps("b", 0.1)], [sleeps("c", 0.5)]])
    (a, b), (c,) = [[answer.value for answer in queue] for queue in answers]
    assert (a[0], b[0], c[0]) == ("a", "b", "c")
    assert b[1] >= a[2]
    assert c[1] < a[2]
    assert answers[0][0].seconds >= 0.5


def test_a_log_stays_where_a_child_fails_alone(tmp_path):
    well = Question(python(ECHO), 1, log=tmp_path / "well.log")
    ill = Question(python("print('out'); raise RuntimeError('no')"), 1, log=tmp_path / "ill.log")
    (first, second), _ = child.ask_side_by_side([[well, ill], []])
    assert (first.value, first.error) == ({"task": 1}, None)
    assert (second.value, str(second.error)) == (None, "RuntimeError: no")
    assert not well.log.exists()
    text = ill.log.read_text()
    assert "Traceback" in text
    assert "out" in text
