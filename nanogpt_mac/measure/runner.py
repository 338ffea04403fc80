"""Measure jobs side by side: a pilot run of each, then rounds in fresh processes, in a drawn order, while time lasts.

    FOLDER/plan.json                    what is measured; after the pilot runs also how often and in which order
    FOLDER/rounds/ROUND-JOB/            one run; ROUND is `pilot`, 0, 1, ...
        outcome.json                    how it ended; a run without one has not ended
        log.txt, and what the job writes
    FOLDER/cache/JOB/                   what its compilers keep; removed at the end

What has been done is what lies in the folder. A measurement that was stopped goes on from there, and runs whose records
are damaged are made again.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from nanogpt_mac import child, supervise
from nanogpt_mac.files import write_json
from nanogpt_mac.measure.progress import Bar, minutes
from nanogpt_mac.measure.rounds import MANY, Cost, Schedule, drawn_order, fewest, schedule
from nanogpt_mac.records.base import DamagedError
from nanogpt_mac.records.plan import Cut, Measurement
from nanogpt_mac.records.run import Heat, Outcome, RunState

PILOT: Literal["pilot"] = "pilot"
PILOT_ITERS, PILOT_S = 40, 4.0  # whichever comes first
PILOT_PATIENCE = 3  # times stall_seconds is the most that a pilot run may take
REPORT_S = 15.0  # of the budget, for statistics and report
GIVEN_UP = 2  # failed runs of one job, after which the rest of its runs are skipped
COOL = (None, "nominal")  # thermal states; None: this machine does not say
HEAT_POLL_S = 5.0
HEAT_SHARE = 0.25  # of the budget may be spent on waiting for a hot machine
OVERRUN, KEPT_ROUNDS = 1.1, 5  # beyond the budget by a tenth, rounds are dropped, but for so many
FAR, SLACK_S = 2.0, 5.0  # a run is cut when it takes so many times what was planned, and so much longer
# A run of a round is ended as hung after several times what the pilot run took: late rather than wrongly.
STALL_S, STALL_ITERATIONS = 30.0, 50  # without a sign of life: so long, and so many iterations
FIRST_S, FIRST_PILOTS = 60.0, 5  # until the first iteration: so long, and so many pilot runs
WORK_TIMES = 5  # what the pilot run promised for all iterations

Round = int | Literal["pilot"]
Key = tuple[Round, str]  # of a run: its round and its job's name


@dataclass(frozen=True)
class Task:
    """What one run of a job is to do."""

    folder: Path  # where it writes its records: metrics.jsonl as it goes, summary.json at its end
    cache: Path  # where its compilers may keep what they make, for later runs of the same job
    round: Round
    iters: int
    warmup: int  # iterations after the first that are not counted


@dataclass(frozen=True)
class Shown:
    """What the records of a run that is done say, in seconds. None where no iteration could be counted."""

    first: float  # iteration
    median: float | None
    least: float | None


class Job(Protocol):
    """Something that is measured: a program that iterates and records the time of each iteration."""

    @property
    def label(self) -> str: ...

    @property
    def warmup(self) -> int:
        """Iterations after the first that are not counted, where they are quick."""

    def command(self, task: Task) -> Sequence[str]: ...

    def environment(self, task: Task) -> Mapping[str, str]: ...

    def signs(self) -> Mapping[str, re.Pattern[str]]:
        """States (`RunState`) that a line of the log means in this program's own words."""

    def shown(self, folder: Path) -> Shown:
        """`DamagedError` or FileNotFoundError where the records of a run that is done cannot be used."""

    def cost(self, folder: Path, seconds: float) -> Cost:
        """Of a run to come, from the pilot run in `folder`, whose process took `seconds`."""


class Runner:
    """Carries out a plan. `folder` holds plan.json already; `say` shows a line; `spent_s` counts as used already."""

    def __init__(
        self,
        folder: Path,
        plan: Measurement,
        jobs: Mapping[str, Job],
        say: Callable[[str], None],
        thermal_state: Callable[[], str | None] = lambda: None,
        spent_s: float = 0.0,
    ) -> None:
        self.folder, self.plan, self.jobs, self.say, self.thermal_state = folder, plan, jobs, say, thermal_state
        self.outcomes: dict[Key, Outcome] = {}  # of the runs that have ended
        self.results: dict[Key, Shown] = {}  # of those that are done
        self.bar = Bar()
        self._look_around()
        self.begun = time.monotonic() - spent_s - sum(outcome.seconds for outcome in self.outcomes.values())

    def measure(self, barred: Mapping[str, str]) -> None:
        """Every run that has not been made. `barred`: name -> why a job is not measured.

        What a job cannot do is an outcome; this only raises when it is stopped.
        """
        self._pilots(barred)
        if self.plan.order is None:
            self._decide()
        with self.bar:
            self._rounds()
        shutil.rmtree(self.folder / "cache", ignore_errors=True)

    def _look_around(self) -> None:
        """Know what earlier sessions did, and clear away what cannot be read."""
        for path in sorted(self.folder.glob("rounds/*/outcome.json")):
            try:
                outcome = Outcome.load(path)
                key = outcome.round, outcome.variant
                if path.parent != self._run_folder(key) or outcome.variant not in self.jobs:
                    raise DamagedError(f"outcome.json is of another run: round {outcome.round} of {outcome.variant}")
                if outcome.state == RunState.DONE:
                    self.results[key] = self.jobs[outcome.variant].shown(path.parent)
                self.outcomes[key] = outcome
            except (DamagedError, FileNotFoundError) as error:
                self.say(f"{path.parent.relative_to(self.folder)}: {_words(error)}; it is run again")
                supervise.clear(path.parent)

    # -- pilot runs ---------------------------------------------------------------------------------------------------

    def _pilots(self, barred: Mapping[str, str]) -> None:
        for name, job in self.jobs.items():
            if (PILOT, name) in self.outcomes:
                continue
            if name in barred:
                self._skip((PILOT, name), barred[name])
                continue
            outcome = self._pilot(name)
            if outcome.state == RunState.DONE:
                shown = self.results[PILOT, name]
                self.say(f"pilot, {job.label}: {_ms(shown.median)} an iteration, first {shown.first:.1f} s")
            else:
                self.say(f"pilot, {job.label}: {outcome.state.upper()}: {outcome.reason}; not timed")

    def _pilot(self, name: str) -> Outcome:
        """Twice where nothing could be counted: the machine slept, or its clock was set."""
        iters = max(supervise.FEWEST_PILOT, min(PILOT_ITERS, self.plan.asked.iters or PILOT_ITERS))
        patience = self.plan.stall_seconds
        limits = supervise.Limits(patience, patience, PILOT_PATIENCE * patience, PILOT_S)
        for _ in range(2):
            outcome = self._run((PILOT, name), iters, 1, limits)
            if outcome.state != RunState.DONE or self.results[PILOT, name].median:
                return outcome
        why = {"state": RunState.FAILED, "reason": "none of its iterations could be counted"}
        return self._record(outcome.model_copy(update=why))

    def _decide(self) -> None:
        """Rounds, iterations and order, from what the pilot runs have shown; written to plan.json."""
        costs = {name: self._cost(name) for name in self.jobs if self.outcomes[PILOT, name].state == RunState.DONE}
        if not costs:
            self._replan(rounds=0, iters={}, warmup={}, share={}, order=())
            return
        asked, warmup = self.plan.asked, max(job.warmup for job in self.jobs.values())
        left = self._left_s()
        made = schedule(costs, left, asked.rounds, asked.iters, warmup, self.plan.cooldown_seconds)
        wanted = asked.rounds or 0
        self._replan(
            cut=Cut(rounds=wanted, reason="more do not fit budget_minutes") if made.count < wanted else None,
            rounds=made.count,
            iters=made.iters,
            warmup=made.warmup,
            share={name: len(numbers) / made.count for name, numbers in made.rounds.items()},
            order=drawn_order(made.rounds, self.plan.seed),
            expected_seconds=made.seconds,
        )
        self._announce(made, left)

    def _announce(self, made: Schedule, left: float) -> None:
        counts = ", ".join(f"{name} {n}" for name, n in made.iters.items())
        asked, budget = self.plan.asked, f"budget_minutes={self.plan.budget_minutes:g}"
        if made.count < (asked.rounds or 0) or min(made.iters.values()) < (asked.iters or 0):
            wanted = " ".join(f"{key}={value}" for key, value in asked if value)
            rest = minutes(max(left, 0.0))
            self.say(f"{wanted}: does not fit {budget}, of which {rest} are left; raise budget_minutes= for all of it")
        self.say(f"{made.count} rounds in a drawn order, of iterations: {counts}; {minutes(made.seconds)} more")
        if made.seconds > max(left, 0) * OVERRUN:
            self.say(f"(longer than {budget}: fewer rounds would show nothing)")

    def _cost(self, name: str) -> Cost:
        return self.jobs[name].cost(self._run_folder((PILOT, name)), self.outcomes[PILOT, name].seconds)

    # -- the rounds ---------------------------------------------------------------------------------------------------

    def _rounds(self) -> None:
        failures = Counter(o.variant for key in self._order() if (o := self.outcomes.get(key)) and _failed(o))
        heat_left = self.plan.budget_minutes * 60 * HEAT_SHARE
        position = -1
        while (position := position + 1) < len(self._order()) or self._extend(failures):
            number, name = self._order()[position]
            if (number, name) in self.outcomes:
                continue
            if self._over(number, position):
                return
            if failures[name] >= GIVEN_UP:
                self._skip((number, name), f"{failures[name]} runs of it had failed")
                continue
            rest_s = sum(self._expected_s(later) for _, later in self._order()[position + 1 :])
            self.bar.run(self._title(position), position, len(self._order()), self._expected_s(name), rest_s)
            heat = self._cool_down(heat_left)
            heat_left -= heat.waited_s
            iters, warmup = self._size(name)
            limits, least = self._limits(name), fewest(self._cost(name), warmup)
            if least < iters:
                limits = dataclasses.replace(limits, enough=self._enough_s(position), fewest=least)
            outcome = self._run((number, name), iters, warmup, limits, heat)
            failures[name] += _failed(outcome)
            self._tell(position, outcome)

    def _order(self) -> tuple[tuple[int, str], ...]:
        return self.plan.order or ()

    def _size(self, name: str) -> tuple[int, int]:
        """Iterations and warm-up of a run."""
        assert self.plan.iters is not None  # decided with the order, as the next
        assert self.plan.warmup is not None
        return self.plan.iters[name], self.plan.warmup[name]

    def _over(self, number: int, position: int) -> bool:
        """Whether time is up before another round is done; what is left of the order is then cut off, on record."""
        order = self._order()
        starts = position == 0 or order[position - 1][0] != number
        over = self._elapsed() + self._round_seconds() > OVERRUN * self.plan.budget_minutes * 60
        if not (starts and over and number >= KEPT_ROUNDS):
            return False
        planned = self.plan.cut.rounds if self.plan.cut else self.plan.rounds or 0
        self.say(f"time is up: {number} of {planned} rounds were run")
        cut = Cut(rounds=planned, reason="budget_minutes was used up")
        self._replan(cut=cut, rounds=number, order=order[:position])
        return True

    def _extend(self, failures: Mapping[str, int]) -> bool:
        """Add a round where there is time for one more, the pilot runs having promised less; time alone decides."""
        rounds, order = self.plan.rounds or 0, self._order()
        if self.plan.asked.rounds or self.plan.cut or not 2 <= rounds < MANY or self._left_s() < self._round_seconds():
            return False
        runs = Counter(name for _, name in order)
        shares = self.plan.share or {}
        due = [name for name, share in shares.items() if runs[name] + 1 <= share * (rounds + 1) + 1e-9]
        again = [name for name in due if failures[name] < GIVEN_UP]
        if not again:
            return False
        self.say("there is time for another round")
        added = drawn_order({name: [0] for name in again}, self.plan.seed + rounds)
        self._replan(rounds=rounds + 1, order=(*order, *((rounds, name) for _, name in added)))
        return True

    def _round_seconds(self) -> float:
        """How long a round takes, going by those that are done; the first, which may do more, is left out."""
        ended = [o for key in self._order() if key[0] and (o := self.outcomes.get(key))]
        seconds = sum(outcome.seconds + self.plan.cooldown_seconds for outcome in ended)
        return seconds / len({outcome.round for outcome in ended}) if ended else 0.0

    def _expected_s(self, name: str) -> float:
        """How long a run takes, going by those of its rounds that are done, or by its pilot run."""
        took = [o.seconds for (number, one), o in self.outcomes.items() if one == name and number != PILOT]
        return self.plan.cooldown_seconds + (sum(took) / len(took) if took else self._planned_s(name))

    def _planned_s(self, name: str) -> float:
        cost = self._cost(name)
        return cost.start_s + self._size(name)[0] * cost.iteration_s

    def _enough_s(self, position: int) -> float:
        """Seconds of iterations after which a run is cut, being far over what was planned for it, or over its share of
        the time that is left for those that are made in any case.
        """
        number, name = self._order()[position]
        cost = self._cost(name)
        far = FAR * self._planned_s(name) + SLACK_S
        due = [one for later, one in self._order()[position:] if later < max(number + 1, KEPT_ROUNDS)]
        left = max(0.0, OVERRUN * self.plan.budget_minutes * 60 - self._elapsed())
        share = self._expected_s(name) * left / sum(map(self._expected_s, due))
        return max(0.0, min(far, share) - cost.start_s + (cost.evaluation_s if number == 0 else 0.0))

    def _limits(self, name: str) -> supervise.Limits:
        cost, shown = self._cost(name), self.results[PILOT, name]
        assert shown.median is not None  # or it would not have been planned
        stall = STALL_S + STALL_ITERATIONS * shown.median
        pilot_s = self.outcomes[PILOT, name].seconds
        first = max(min(self.plan.stall_seconds, FIRST_S + FIRST_PILOTS * pilot_s), stall)
        work = self._size(name)[0] * shown.median + cost.evaluation_s
        return supervise.Limits(first, first, first + stall + WORK_TIMES * work)

    def _cool_down(self, most_s: float) -> Heat:
        """Pause, and on a hot machine wait until it is not, within bounds; what was found, for the record."""
        time.sleep(self.plan.cooldown_seconds)
        begun, before = time.monotonic(), self.thermal_state()
        state, bound = before, min(most_s, self.plan.heat_wait_seconds)
        while state not in COOL and time.monotonic() - begun < bound:
            time.sleep(HEAT_POLL_S)
            state = self.thermal_state()
        waited = time.monotonic() - begun if before not in COOL else 0.0
        return Heat(before=before, waited_s=waited, at_start=state, load=os.getloadavg()[0])

    def _tell(self, position: int, outcome: Outcome) -> None:
        title, rest = self._title(position), self._order()[position + 1 :]
        left = f"; {minutes(sum(self._expected_s(name) for _, name in rest))} left" if rest else ""
        if outcome.state == RunState.DONE:
            median = self.results[outcome.round, outcome.variant].median
            cut = ", cut: far over its time" if outcome.cut else ""
            shown = "nothing counted" if median is None else _ms(median)
            self.say(f"{title}: {shown} ({outcome.seconds:.0f} s{cut}){left}")
        else:
            self.say(f"{title}: {outcome.state.upper()}: {outcome.reason}{left}")

    def _title(self, position: int) -> str:
        number, name = self._order()[position]
        return f"[{position + 1}/{len(self._order())}] round {number}, {self.jobs[name].label}"

    # -- one run ------------------------------------------------------------------------------------------------------

    def _run(self, key: Key, iters: int, warmup: int, limits: supervise.Limits, heat: Heat | None = None) -> Outcome:
        number, name = key
        task = Task(self._emptied(key), self.folder / "cache" / name, number, iters, warmup)
        job, started = self.jobs[name], _now()
        ending = supervise.supervise(job.command(task), task.folder, job.environment(task), limits, job.signs())
        if ending.state != RunState.DONE:
            child.require_room(task.folder)
        else:
            try:
                self.results[key] = job.shown(task.folder)
            except (DamagedError, FileNotFoundError) as error:
                ending = dataclasses.replace(ending, state=RunState.FAILED, reason=_words(error))
        if heat is not None:
            heat = heat.model_copy(update={"after": self.thermal_state()})
        # A pilot run is always asked to end, and one that was asked may just have been done.
        cut = ending.cut and number != PILOT and supervise.iterations(task.folder) < iters
        ending = dataclasses.replace(ending, cut=cut)
        return self._record(
            Outcome(variant=name, round=number, started=started, heat=heat, **dataclasses.asdict(ending))
        )

    def _skip(self, key: Key, reason: str) -> None:
        self._emptied(key)
        number, name = key
        self._record(Outcome(variant=name, round=number, state=RunState.SKIPPED, reason=reason, started=_now()))

    def _emptied(self, key: Key) -> Path:
        folder = self._run_folder(key)
        supervise.clear(folder)
        folder.mkdir(parents=True)
        return folder

    def _record(self, outcome: Outcome) -> Outcome:
        key = outcome.round, outcome.variant
        write_json(self._run_folder(key) / "outcome.json", outcome.document())
        self.outcomes[key] = outcome
        return outcome

    # -- small things -------------------------------------------------------------------------------------------------

    def _run_folder(self, key: Key) -> Path:
        return self.folder / "rounds" / f"{key[0]}-{key[1]}"

    def _replan(self, **changes: Any) -> None:
        self.plan = self.plan.model_copy(update=changes)
        write_json(self.folder / "plan.json", self.plan.document())

    def _left_s(self) -> float:
        return self.plan.budget_minutes * 60 - self._elapsed() - REPORT_S

    def _elapsed(self) -> float:
        return time.monotonic() - self.begun


def _failed(outcome: Outcome) -> bool:
    return outcome.state != RunState.DONE


def _words(error: Exception) -> str:
    return "its records are damaged: " + (
        f"no {Path(error.filename).name}" if isinstance(error, FileNotFoundError) else str(error)
    )


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def _ms(seconds: float | None) -> str:
    return f"{1e3 * (seconds or 0.0):.4g} ms"
