"""A mutation run: small faults planted in the core one at a time, each of which some test must notice.

    python tests/mutants/run.py [part of a module's path ...] [--sample N] [--jobs N] [--records FILE]

cosmic-ray finds the places and makes the change; mutants.toml says which modules, and which tests should notice. Those
tests run in a fork of one warm process, on a copy of the tree, because a process of its own for each of two thousand
mutants would mostly import torch. equivalent.toml lists the mutants that change no result, each with its reason. The
exit code is 1 when others are left.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import queue
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = ROOT / "nanogpt_mac"
PRELOAD = ("pytest", "numpy", "scipy.stats", "torch", "mlx.core", "mlx.nn", "mlx.utils", "hydra", "safetensors.numpy")
SLACK_S, SLACK = 20.0, 5.0  # a mutant has this long, and this many times as long as the tests take: else it hangs

# One replacement for an operator of arithmetic, not all eleven, most of which no test could miss.
OPERATORS = [
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Pow_Mul", "Mod_Mul")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("FloorDiv_Div", "LShift_RShift", "RShift_LShift")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("BitAnd_BitOr", "BitOr_BitAnd", "BitXor_BitAnd")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")),
    *("ReplaceUnaryOperator_USub_UAdd", "ReplaceUnaryOperator_Delete_Not", "AddNot"),
    *("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ExceptionReplacer", "ZeroIterationForLoop"),
    *("NumberReplacer", "RemoveDecorator"),
]


@dataclass
class Mutant:
    """One planted fault: lines `old` of `module` (a path below the package) have become `new`."""

    module: str
    operator: str
    line: int
    old: str
    new: str
    text: str  # of the whole module
    digest: str  # of that
    state: str = "untested"  # killed, left, equivalent
    by: str = ""  # the test that noticed it, or how else it ended
    seconds: float = 0.0

    @property
    def place(self) -> tuple[str, str, str]:
        return self.module, self.old, self.new


# -- planting ---------------------------------------------------------------------------------------------------------


def operators() -> Iterator[tuple[str, Any]]:
    import parso
    from cosmic_ray.operators.operator import Operator
    from cosmic_ray.plugins import get_operator

    class DeleteStatement(Operator):
        """`pass` for a call, a raise, a yield or a change of something that outlives the line; cosmic-ray has none."""

        def mutation_positions(self, node: Any) -> Iterator[Any]:
            statement = node.parent is not None and node.parent.type == "simple_stmt"
            if not statement or parso.python.tree.search_ancestor(node, "funcdef") is None:
                return
            kinds = ("atom_expr", "power", "raise_stmt", "yield_expr")
            if node.type == "expr_stmt":  # not an assignment to names: a later line would miss them
                target, sign = node.children[:2]
                lasting = getattr(sign, "value", "") not in ("=", "") or target.type in ("atom_expr", "power")
            if node.type in kinds or (node.type == "expr_stmt" and lasting):
                yield node.start_pos, node.end_pos

        def mutate(self, node: Any, index: int) -> Any:
            return parso.python.tree.Keyword("pass", node.start_pos, node.get_first_leaf().prefix)

        @classmethod
        def examples(cls) -> tuple[()]:
            return ()

    for name in OPERATORS:
        yield name, get_operator(f"core/{name}")()
    yield "DeleteStatement", DeleteStatement()


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where type annotations stand: `from __future__ import annotations` keeps them from ever being evaluated."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(hint, ast.expr):
                found.append(((hint.lineno, hint.col_offset), (hint.end_lineno or 0, hint.end_col_offset or 0)))
    return found


def plan(modules: list[str], jobs: int) -> list[Mutant]:
    """Every mutant of every module."""
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(modules))) as pool:
        return list(itertools.chain.from_iterable(pool.map(mutants, modules, chunksize=1)))


def mutants(module: str) -> list[Mutant]:
    return list(find(module))


def find(module: str) -> Iterator[Mutant]:
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    source = (PACKAGE / module).read_text()
    hints = annotations(source) if "from __future__ import annotations" in source else []
    parts = [part.get_code() for part in get_ast(source).children]  # each parsed by itself: a whole file takes long
    for number, part in enumerate(parts):
        above = "".join(parts[:number]).count("\n")
        for name, operator in operators():
            places = [place for node in ast_nodes(get_ast(part)) for place in operator.mutation_positions(node)]
            for occurrence, ((first, left), (last, right)) in enumerate(places):
                start, end = (first + above, left), (last + above, right)
                if any(begin <= start and end <= finish for begin, finish in hints):
                    continue
                changed = mutate_code(part, operator, occurrence)
                text = "".join([*parts[:number], changed, *parts[number + 1 :]])
                try:
                    compile(text, module, "exec")
                except SyntaxError:  # {**a} with another operator
                    continue
                line, old, new = difference(part, changed)
                yield Mutant(module, name, above + line, old, new, text, hashlib.sha256(text.encode()).hexdigest()[:16])


def difference(before: str, after: str) -> tuple[int, str, str]:
    """The first line that differs, counted from 1, and what all lines that differ were and have become."""
    old, new = before.splitlines(), after.splitlines()
    head = next(i for i, (a, b) in enumerate(zip([*old, None], [*new, None], strict=False)) if a != b)
    rest = zip([*old[head:][::-1], None], [*new[head:][::-1], None], strict=False)
    tail = next(i for i, (a, b) in enumerate(rest) if a != b or a is None)
    lines = (" ".join(line.strip() for line in some[head : len(some) - tail]) for some in (old, new))
    return head + 1, *lines


# -- testing ----------------------------------------------------------------------------------------------------------


def run_tests(tree: Path, tests: list[str], output: Path) -> None:
    """In the forked process: the tests of `tree`, up to the first that fails."""
    os.setsid()  # what a test starts ends with it
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    os.chdir(tree)
    sys.path[:0] = [str(tree)]
    sys.dont_write_bytecode = True  # a mutant's could pass for the next one's
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    import pytest

    plugins = ["-p", "no:cacheprovider", "-p", "xdist.plugin"]  # xdist for its marks
    options = ["-x", "-q", "-rfE", "-m", "not slow and not online", f"--basetemp={tree / 'tmp'}"]
    os._exit(int(pytest.main([*plugins, *options, *tests])))


class Tester:
    """One copy of the tree, in which one mutant after the other is tested."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.output = folder / "tree", folder / "output"
        for name in ("nanogpt_mac", "tests", "conf"):
            shutil.copytree(ROOT / name, self.tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.md"), *ROOT.glob("Makefile")]:
            shutil.copy(file, self.tree / file.name)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(PRELOAD))

    def test(self, tests: list[str], limit_s: float) -> tuple[str, float]:
        """ "" where the tests pass, else the one that did not or what happened; and seconds."""
        begin = time.monotonic()
        process = self.context.Process(target=run_tests, args=(self.tree, tests, self.output))
        process.start()
        process.join(limit_s)
        seconds, code = time.monotonic() - begin, process.exitcode
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
        if code is None:
            return f"no end within {limit_s:.0f} s", seconds
        if code == 0:
            return "", seconds
        lines = self.output.read_text(errors="replace").splitlines()
        named = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED ", "ERROR "))]
        return named[-1] if named else f"exit code {code}: {lines[-1] if lines else ''}", seconds

    def plant(self, mutant: Mutant, tests: list[str], limit_s: float) -> None:
        path = self.tree / "nanogpt_mac" / mutant.module
        original = path.read_text()
        path.write_text(mutant.text)
        try:
            mutant.by, mutant.seconds = self.test(tests, limit_s)
        finally:
            path.write_text(original)
        mutant.state = "killed" if mutant.by else "left"


def run(made: list[Mutant], tests: dict[str, list[str]], jobs: int, done: Any) -> None:
    """Test all of `made` on `jobs` copies of the tree side by side; `done(mutant)` after each."""
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mutants-") as work:
        testers = [Tester(Path(work) / str(number)) for number in range(jobs)]
        limits: dict[str, float] = {}

        def side_by_side(items: list[Any], each: Any) -> None:
            for item in items:
                waiting.put(item)

            def work_off(tester: Tester) -> None:
                while True:
                    try:
                        item = waiting.get_nowait()
                    except queue.Empty:
                        return
                    each(tester, item)

            threads = [threading.Thread(target=work_off, args=(tester,), daemon=True) for tester in testers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        def without(tester: Tester, module: str) -> None:
            by, seconds = tester.test(tests[module], 600)
            limits[module] = SLACK_S + SLACK * seconds
            print(f"{module}: its tests take {seconds:.1f} s", flush=True)
            if by:
                print(f"{module}: its tests fail without any mutant: {by}\n{tester.output.read_text()}", flush=True)
                del limits[module]

        side_by_side(list(dict.fromkeys(mutant.module for mutant in made)), without)

        def one(tester: Tester, mutant: Mutant) -> None:
            tester.plant(mutant, tests[mutant.module], limits[mutant.module])
            done(mutant)

        side_by_side([mutant for mutant in made if mutant.module in limits], one)


# -- what came out ----------------------------------------------------------------------------------------------------


def table(made: list[Mutant]) -> str:
    """A row a module: made, killed, equivalent, left, and the share killed of those that change a result."""
    rows = [("module", "made", "killed", "equivalent", "left", "untested", "killed of those that matter")]
    modules = list(dict.fromkeys(mutant.module for mutant in made))
    for name, part in [(m, [x for x in made if x.module == m]) for m in modules] + [("all", made)]:
        count = Counter(mutant.state for mutant in part)
        matter = count["killed"] + count["left"]
        share = f"{100 * count['killed'] / matter:.1f} %" if matter else ""
        numbers = (len(part), *(count[state] for state in ("killed", "equivalent", "left", "untested")))
        rows.append((name, *map(str, numbers), share))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant faults in the core and see which ones the tests notice.")
    parser.add_argument("modules", nargs="*", help="part of a path, such as gpt/ or clock; all by default")
    parser.add_argument("--sample", type=int, default=0, help="so many mutants, drawn at random; 0: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="copies of the tree, side by side")
    parser.add_argument(
        "--records", type=Path, help="a file that keeps what came out: what it has as killed is not tested again"
    )
    asked = parser.parse_args()
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

    tests = tomllib.loads((HERE / "mutants.toml").read_text())["tests"]
    entries = tomllib.loads((HERE / "equivalent.toml").read_text()).get("equivalent", [])
    harmless = {(e["module"], e["old"], new): e["why"] for e in entries for new in e["new"]}
    modules = [m for m in tests if not asked.modules or any(part in m for part in asked.modules)]
    if not modules:
        parser.error(f"no module of mutants.toml has {' or '.join(asked.modules)} in its path")
    made = plan(modules, asked.jobs)
    stale = [place for place in harmless if place[0] in modules and place not in {mutant.place for mutant in made}]
    if asked.sample and asked.sample < len(made):
        made = random.Random(0).sample(made, asked.sample)
    random.Random(1).shuffle(made)  # so that no module's slow tests all come last
    if asked.records and asked.records.exists():
        before = [json.loads(line) for line in asked.records.read_text().splitlines()]
        known = {record["digest"]: record for record in before if record["state"] == "killed"}
        for mutant in made:
            if mutant.digest in known:
                mutant.state, mutant.by = "killed", known[mutant.digest]["by"]
    began, lock, finished = time.monotonic(), threading.Lock(), Counter[str]()

    def done(mutant: Mutant) -> None:
        if mutant.state == "left" and mutant.place in harmless:
            mutant.state = "equivalent"
        with lock:
            finished[mutant.state] += 1
            if asked.records:
                with asked.records.open("a") as file:
                    file.write(json.dumps({k: v for k, v in asdict(mutant).items() if k != "text"}) + "\n")
            count = finished.total()
            if count % 100 == 0 or count == len(waiting):
                print(f"{count} of {len(waiting)}, {time.monotonic() - began:.0f} s: {dict(finished)}", flush=True)

    waiting = [mutant for mutant in made if mutant.state == "untested"]
    run(waiting, tests, min(asked.jobs, len(waiting)), done)
    made.sort(key=lambda mutant: (modules.index(mutant.module), mutant.line))
    print(table(made))
    left = [mutant for mutant in made if mutant.state == "left"]
    for mutant in left:
        print(f"left: {mutant.module}:{mutant.line}: {mutant.old}  ->  {mutant.new}")
    for place in stale:
        print(f"equivalent.toml lists what is no longer made: {': '.join(place)}")
    for mutant in made:
        if mutant.state == "killed" and mutant.place in harmless:
            print(f"equivalent.toml lists what {mutant.by} notices: {': '.join(mutant.place)}")
    return 1 if left or stale or any(mutant.state == "untested" for mutant in made) else 0


if __name__ == "__main__":
    sys.exit(main())
