"""One tuning from beginning to end: what can be refused is refused first, then trials, then what came of them."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .. import rundir
from ..errors import HpcmlError, JobFailed
from ..interpreter import need_python
from ..job import WORK_SETTINGS
from ..plan import Plan
from . import device, search, space
from .search import Found, Line, Trial
from .space import Point, Start, Value
from .trial import Outcome, Pace, Trials

# Of training after the first epoch, for one trial: so long that an epoch's hiccup is one of several.
SECONDS = 4.0
BUDGET_S = 600.0
# A trial may take so many times what the job as it is took, and half a minute: a bad point must not eat the budget.
PATIENCE, PATIENCE_S = 3.0, 30.0
_A_SEARCH = 10  # trials that a person told of a too small budget should have time for
_BEGINS = re.compile(r"\bhpcml\b")


@dataclass(frozen=True)
class Wanted:
    """What a person asked for.

    Attributes:
        only: these settings alone; empty for all.
        batch: also the batch per replica.
        budget_s: seconds for everything.
        seconds: of training in a short trial.
    """

    only: tuple[str, ...] = ()
    batch: bool = False
    budget_s: float = BUDGET_S
    seconds: float = SECONDS


@dataclass
class Tuning:
    """What a tuning has come to; complete where it was not interrupted.

    Attributes:
        folder: of its trials, its plot and ``tune.json``.
        start: the job as it is; None before its trial ended.
        changes: setting → the winner's value; empty where nothing gained.
        notes: what a person should know of it.
    """

    folder: Path
    start: Start | None = None
    found: Found | None = None
    axes: list[space.Axis] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    took_s: float = 0.0

    @property
    def changes(self) -> dict[str, Value]:
        """What the winner sets otherwise than the job as it is."""
        return space.changes_of(self.start, self.found.winner.point) if self.start and self.found else {}

    @property
    def lines(self) -> list[Line]:
        """The trials along each setting, what mattered most first; of several rounds the first."""
        seen: dict[str, Line] = {}
        for line in self.found.lines if self.found else []:
            if len(line.trials) > 1:
                seen.setdefault(line.name, line)
        return sorted(seen.values(), key=lambda line: line.effect, reverse=True)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON data."""
        found = self.found
        return {
            "start": dataclasses.asdict(self.start) if self.start else None,
            "trials": [dataclasses.asdict(trial) for trial in found.trials] if found else [],
            "effects": {line.name: line.effect for line in self.lines},
            "changes": self.changes,
            "gain": found.gain if found else None,
            "confirmed": found.confirmed if found else False,
            "out_of_time": found.out_of_time if found else False,
            "interrupted": self.interrupted,
            "took_s": self.took_s,
            "notes": self.notes,
        }


class Watcher(Protocol):
    """Hears what goes on; the command line shows it."""

    def begins(self, number: int, changes: Mapping[str, Value], final: bool) -> None:
        """A trial begins; ``changes`` from the job as it is."""

    def goes_on(self, pace: Pace) -> None:
        """An epoch of it has ended."""

    def ended(self, trial: Trial, start: Trial | None, changes: Mapping[str, Value]) -> None:
        """It has ended; ``start`` is the first trial, the job as it is."""


def check(plan: Plan, wanted: Wanted) -> None:
    """Refuse what can't be tuned, before anything starts.

    Raises:
        HpcmlError: unknown settings, no batch to tune, no Python, or work that never begins a run of hpcml's.
    """
    need_python(plan)
    space.check_names(wanted.only, wanted.batch, plan)
    project = Path(plan.project)
    words = plan.target if plan.work == "command" else plan.target[:1]
    files = [path for word in words if (path := project / word).is_file()]
    if not any(_BEGINS.search(path.read_text(encoding="utf-8", errors="replace")) for path in files):
        what = f"{' '.join(plan.target)} never calls hpcml.begin(), so nobody would tell how fast it trains"
        fix = "run = hpcml.begin(strategy=…) and callbacks=run.callbacks(), or run.epochs() and run.steps()"
        raise HpcmlError(what, origin=plan.origins.get(plan.work, plan.work), fix=fix)


class Tuner:
    """Runs one tuning; ``result`` holds what is known at any time."""

    def __init__(self, plan: Plan, root: Path, wanted: Wanted, watcher: Watcher) -> None:
        """Make the folder of the trials.

        Args:
            root: the runs folder.
        """
        self.plan, self.wanted, self.watcher = plan, wanted, watcher
        self._began = time.monotonic()
        self._trials = Trials(plan, root)
        self._limit_s = wanted.budget_s
        self.result = Tuning(self._trials.folder)

    def run(self) -> Tuning:
        """Measure the job as it is, search, and write ``tune.json``; after Ctrl-C that holds what was measured.

        Raises:
            HpcmlError: the job as it is fails, or tells no speed.
            KeyboardInterrupt: the person ended it; ``result`` and ``tune.json`` hold what was measured.
        """
        try:
            self._search(self._start())
        except KeyboardInterrupt:
            self.result.interrupted = True
            raise
        finally:
            self.result.took_s = time.monotonic() - self._began
            self._trials.close()
            rundir.write_json(self.result.folder / "tune.json", self.result.to_json())
        return self.result

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.wanted.budget_s - (time.monotonic() - self._began)

    def _start(self) -> Trial:
        """Measure the job as it is; what it tells decides what can be searched."""
        self.watcher.begins(1, {}, False)
        outcome = self._run(self.plan, self.wanted.seconds, 0.0)
        pace = outcome.pace
        if pace.speed is None:
            raise self._no_speed(outcome)
        start = space.start_of(self.plan, pace.facts, pace.replicas, pace.steps, pace.step_s)
        gpus = [gpu for gpu in str(pace.facts.get("gpus") or "").split(",") if gpu]
        precisions = space.precisions_of(device.capability(gpus), "" if gpus else device.cpu_flags())
        if not gpus and "precision" not in self.wanted.only:
            precisions = ()  # what a CPU gains by it says nothing of a GPU, and the accuracy may change
        if self.plan.gpus_per_node and not gpus:
            self.result.notes.append(
                f"measured on {start.cores} cores without a GPU, and the job asks for {self.plan.gpus_per_node}: "
                "tune it again in an allocation before it runs there"
            )
        axes = space.axes(start, only=self.wanted.only, batch=self.wanted.batch, precisions=precisions)
        self._note(start, axes)
        if not axes:
            raise HpcmlError("nothing to tune in this job", allowed="; ".join(self.result.notes))
        self.result.start, self.result.axes = start, axes
        trial = _trial(self._trials.count, {axis.name: start.values[axis.name] for axis in axes}, outcome, final=False)
        self.result.found = Found(trial, trial, trial, trials=[trial])
        self.watcher.ended(trial, None, {})
        self._limit_s = PATIENCE * trial.wall_s + PATIENCE_S
        return trial

    def _search(self, first: Trial) -> None:
        start = self.result.start
        assert start is not None
        more_s = (search.LONGER - 1) * self.wanted.seconds
        searching = search.Search(
            first, self.result.axes, self._measure, lambda p: space.repaired(p, start), self.left_s, more_s
        )
        self.result.found = searching.found
        searching.run()
        if searching.found.out_of_time:
            told = f"the budget of {self.wanted.budget_s:.0f} s ended the search"
            if len(searching.found.trials) == 1:
                enough = math.ceil((_A_SEARCH * first.wall_s + 2 * more_s) / 60)
                told += f" before a second trial: one takes {first.wall_s:.0f} s here, so --budget {enough} (minutes) or more"
            self.result.notes.append(told)
        for name in {"global_batch", "precision"} & set(self.result.changes):
            self.result.notes.append(
                f"{name} changes what is learned: look at the accuracy too, and at the learning rate"
            )

    def _measure(self, point: Point, final: bool, below: float) -> Trial:
        start, found = self.result.start, self.result.found
        assert start is not None and found is not None
        changes = space.changes_of(start, point)
        self.watcher.begins(self._trials.count + 1, changes, final)
        seconds = self.wanted.seconds * (search.LONGER if final else 1.0)
        outcome = self._run(space.applied(self.plan, start, point), seconds, below)
        trial = _trial(self._trials.count, point, outcome, final=final)
        self.watcher.ended(trial, found.start, changes)
        return trial

    def _run(self, plan: Plan, seconds: float, below: float) -> Outcome:
        return self._trials.run(plan, seconds, below, self._limit_s, self.watcher.goes_on)

    def _note(self, start: Start, axes: Sequence[space.Axis]) -> None:
        """Say why a setting that one might look for is not searched."""
        for name, variable in start.fixed.items():
            self.result.notes.append(f"{name} stays as it is: {variable} is set in the environment or [env], and wins")
        searched = {axis.name for axis in axes}
        wanted = self.wanted.only or space.ORDER
        unasked = [n for n in WORK_SETTINGS if n in wanted and n not in start.values]
        if unasked:
            call = ", ".join(f"{name}=…" for name in unasked)
            self.result.notes.append(f"not searched, since the work never asks for them: run.tuned({call})")
        for name in self.wanted.only:
            if name not in searched and name not in unasked and name not in start.fixed:
                self.result.notes.append(f"{name}: there is no other value to try here")

    def _no_speed(self, outcome: Outcome) -> HpcmlError:
        log = outcome.run.log(0)
        if outcome.late:
            fix = "a longer --budget, or less data for the trials: -p; an epoch is the shortest thing that is measured"
            return HpcmlError(f"the job as it is has {outcome.reason}", origin="--budget", fix=fix)
        if outcome.reason:
            what = f"the job as it is can't be measured: {outcome.reason}"
            return JobFailed(what, fix=f"hpcml run it until it trains; the log of the trial: {log}")
        if outcome.pace.first:
            fix = "two epochs or more: a parameter epochs, which the trials set themselves"
            return HpcmlError("the job trains one epoch, and the first builds the graph", fix=fix)
        fix = f"callbacks=run.callbacks(), or run.epochs() and run.steps(); the log of the trial: {log}"
        return HpcmlError("the job ended without telling the speed of an epoch", fix=fix)


def _trial(number: int, point: Point, outcome: Outcome, *, final: bool) -> Trial:
    pace = outcome.pace
    bad = bool(outcome.reason) and not outcome.cut
    return Trial(
        number=number,
        point=dict(point),
        speed=None if bad else pace.speed,
        epochs=len(pace.speeds),
        trained_s=pace.trained_s,
        wall_s=outcome.wall_s,
        reason=outcome.reason,
        cut=outcome.cut,
        final=final,
    )


def note_of(result: Tuning, at: time.struct_time) -> str:
    """Return the comment beside ``[tuning]``: when, by how much, where."""
    assert result.found is not None and result.start is not None
    start = next(t for t in reversed(result.found.trials) if t.point == result.found.start.point and t.speed)
    where = f"{result.start.gpus} GPUs" if result.start.gpus else "CPU"
    speed = result.found.winner.speed or 0.0
    return (
        f"hpcml tune, {time.strftime('%Y-%m-%d', at)}: {result.found.gain:.2f} × as fast, {start.speed:,.0f} → {speed:,.0f} "
        f"samples/s ({result.start.world} × {result.start.cores} cores, {where})"
    )
