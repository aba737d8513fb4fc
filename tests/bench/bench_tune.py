"""How good ``hpcml tune`` is: its winner against the best point of a grid, and tuned threads against 64/64/64.

    scripts/bench tune [--quick]

The work is notebooks/simple2GPUsOrig.py on all cores, with its global batch. The grid has 64 points: 4 pairs of threads
(intra-op × inter-op, the least and the most of either), 4 values of prefetch, 4 of ``steps_per_execution``. Each is measured
by one trial as long as the tuner's final ones. The tuner then gets 15 % of the time that the grid took, for everything, and
searches the same four settings. Its trials, and so the grid's, train for a quarter of the seconds that they do by default:
then everything takes less than 20 minutes. Most of a trial is TensorFlow's start in any case.

Its winner and the grid's best point are measured again, because the best of 64 measurements has had luck too: in pairs that
take turns on all cores (see turns.py). Threads alone: the winner's threads, everything else as in the notebook, against 64
threads of each kind as the course sets them (OMP, intra-op, inter-op).
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bench import by_hand, pairs, turns
from hpcml import facts
from hpcml.launch.prepare import prepare
from hpcml.plan import Plan
from hpcml.tune import search, space
from hpcml.tune.search import Trial
from hpcml.tune.space import Axis, Point, Value
from hpcml.tune.trial import Pace, Trials
from hpcml.tune.tuner import Tuner, Wanted

NOTEBOOK = by_hand.NOTEBOOKS / "simple2GPUsOrig.py"
HPCML = str(Path(sys.executable).with_name("hpcml"))
SETTINGS = ("intra_op_threads", "inter_op_threads", "prefetch", "steps_per_execution")
EACH = {"intra_op_threads": 2, "inter_op_threads": 2, "prefetch": 4, "steps_per_execution": 4}  # 64 points
SHARE = 0.15  # of the grid's time
SECONDS = 1.0  # of training in a short trial
PAIRS, MOST_PAIRS, THREADS_PAIRS = 8, 12, 6
PAIR_S = 6.0  # on each side of a pair
LIMIT_S = 5 * 60  # for more than the least of pairs
WINNER = pairs.Bound(0.98, at_least=True, pairs=PAIRS, width=0.04)
THREADS = pairs.Bound(1.3, at_least=True, pairs=THREADS_PAIRS)
COURSE = dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "64")
TRIAL_S = 300.0  # and no trial longer
QUICK_S, QUICK_PAIR_S, QUICK_BUDGET_S = 0.5, 1.5, 60.0

RACING = "racing.py"  # the same training, until it is told to end

JOB = """\
name = "{name}"
script = "{script}"
strategy = "original"
[resources]
gpus_per_node = {gpus}
cpus_per_task = {cores}
"""


NOTHING: Mapping[str, str] = {}


class Lines:
    """Shows the tuner's trials as lines on stderr."""

    def begins(self, number: int, changes: Mapping[str, Value], final: bool) -> None:
        pass

    def goes_on(self, pace: Pace) -> None:
        pass

    def ended(self, trial: Trial, start: Trial | None, changes: Mapping[str, Value]) -> None:
        told = f"{trial.speed:,.0f} samples/s" if trial.speed else trial.reason
        print(f"bench: tune: trial {trial.number}: {dict(changes)}: {told}", file=sys.stderr)


def spread(values: tuple[Value, ...], count: int) -> tuple[Value, ...]:
    """Return so many of an axis's values, both ends among them."""
    if len(values) <= count:
        return values
    return tuple(values[round(index * (len(values) - 1) / (count - 1))] for index in range(count))


def grid(axes: list[Axis]) -> list[Point]:
    """Return the points of the grid."""
    names = [axis.name for axis in axes]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))]


class Bench:
    """The job, its trials, and what they took."""

    def __init__(self, folder: Path, seconds: float) -> None:
        notebook = NOTEBOOK.read_text(encoding="utf-8")
        text = notebook.partition("# %% [markdown]\n# ## Result\n")[0]
        files = {"train.py": text, RACING: by_hand.script(notebook, bare=False), "pyproject.toml": ""}
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
        self.folder, self.root, self.seconds = folder, folder / "runs", seconds
        self.plan = prepare(self._job("bench", "train.py"), "local").plan
        self.trials = Trials(self.plan, self.root)

    def speed(self, plan: Plan) -> float:
        """Return one long trial's samples/s."""
        outcome = self.trials.run(plan, self.seconds * search.LONGER, 0.0, TRIAL_S)
        if outcome.pace.speed is None:
            raise RuntimeError(f"a trial failed: {outcome.reason}; {outcome.run.path}")
        return outcome.pace.speed

    def start(self) -> space.Start:
        """Measure the job as it is and return what it told."""
        pace = self.trials.run(self.plan, self.seconds, 0.0, TRIAL_S).pace
        return space.start_of(self.plan, pace.facts, pace.replicas, pace.steps, pace.step_s)

    def tuned(self, budget_s: float) -> Tuner:
        """Let the tuner search in its budget."""
        wanted = Wanted(only=SETTINGS, budget_s=budget_s, seconds=self.seconds)
        tuner = Tuner(self.plan, self.root, wanted, Lines())
        tuner.run()
        return tuner

    def racer(self, name: str, settings: Mapping[str, Value], variables: Mapping[str, str]) -> turns.Program:
        """Start the training with settings, and with variables that win over them, until it is told to end."""
        job = self._job(name, RACING, settings, variables)
        return turns.Program(
            name, [HPCML, "run", "--site", "local", job.name], pairs.environment() | {"HPCML_PROJECT": str(self.folder)},
            self.folder, turns.CORES,
        )  # fmt: skip

    def _job(
        self, name: str, script: str, settings: Mapping[str, Value] = NOTHING, variables: Mapping[str, str] = NOTHING
    ) -> Path:
        path = self.folder / f"{name}.toml"
        text = JOB.format(name=name, script=script, gpus=min(1, facts.count_gpus()), cores=len(os.sched_getaffinity(0)))
        lines = ["[tuning]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items())]
        lines += ["[env.vars]", *(f"{key} = {json.dumps(value)}" for key, value in variables.items())]
        path.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
        return path


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a pair: a name, settings of ``[tuning]``, and variables that win over them."""

    name: str
    settings: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)


def compared(bench: Bench, ours: Side, other: Side, seconds: float, least: int, most: int) -> list[pairs.Pair]:
    """Measure two sides in pairs."""
    found = []
    race = turns.racing(
        lambda: bench.racer(ours.name, ours.settings, ours.variables),
        lambda: bench.racer(other.name, other.settings, other.variables),
        seconds,
        to_the_end=False,
    )
    for pair in pairs.measure(race, least=least, most=most, width=WINNER.width, limit_s=LIMIT_S):
        found.append(pair)
        pairs.progress(f"tune: {ours.name} against {other.name}", pair, len(found))
    return found


@dataclasses.dataclass(frozen=True)
class Gridded:
    """What the grid came to."""

    start: space.Start
    points: list[Point]
    speeds: list[float]
    took_s: float

    @property
    def best(self) -> Point:
        """Its fastest point."""
        return self.points[self.speeds.index(max(self.speeds))]


def gridded(bench: Bench, every: int) -> Gridded:
    """Measure the grid, or every so many of its points."""
    start = bench.start()
    axes = space.axes(start, only=SETTINGS)
    points = grid([dataclasses.replace(axis, values=spread(axis.values, EACH[axis.name])) for axis in axes])[::every]
    began, speeds = time.monotonic(), list[float]()
    for number, point in enumerate(points, 1):
        speeds.append(bench.speed(space.applied(bench.plan, start, point)))
        print(f"bench: tune: grid {number}/{len(points)}: {point}: {speeds[-1]:,.0f} samples/s", file=sys.stderr)
    return Gridded(start, points, speeds, time.monotonic() - began)


def measured(folder: Path, quick: bool) -> tuple[list[pairs.Figure], list[str]]:
    """Measure the grid, let the tuner search, compare; return the figures and what else there is to say."""
    bench = Bench(folder, QUICK_S if quick else SECONDS)
    tried = gridded(bench, 16 if quick else 1)
    tuner = bench.tuned(QUICK_BUDGET_S if quick else SHARE * tried.took_s)
    found = tuner.result.found
    assert found is not None
    point, seconds = found.winner.point, QUICK_PAIR_S if quick else PAIR_S
    of = {name: space.changes_of(tried.start, one) for name, one in (("winner", point), ("best", tried.best))}
    winner, best = Side("winner", of["winner"]), Side("best", of["best"])
    threads = {name: value for name, value in of["winner"].items() if name in SETTINGS[:2]}
    least, most = (1, 1) if quick else (PAIRS, MOST_PAIRS)
    fewer = 1 if quick else THREADS_PAIRS
    figures = [
        pairs.Figure(
            "winner", f"tune's winner {dict(point)} against the grid's best {dict(tried.best)}.",
            ("tune", "grid"), "samples/s", compared(bench, winner, best, seconds, least, most), WINNER,
        ),
        pairs.Figure(
            "threads", f"{threads or 'the threads that hpcml chooses'}, all else as in the notebook, against 64/64/64.",
            ("tuned", "course"), "samples/s",
            compared(bench, Side("threads", threads), Side("course", variables=COURSE), seconds, fewer, fewer), THREADS,
        ),
    ]  # fmt: skip
    share = tuner.result.took_s / tried.took_s
    judged = "not judged" if quick else "holds" if share <= SHARE else "does not hold"
    slowest, fastest = min(tried.speeds), max(tried.speeds)
    notes = [
        f"The grid: {len(tried.points)} points in {tried.took_s:.0f} s, {slowest:,.0f} to {fastest:,.0f} samples/s.",
        f"tune: {len(found.trials)} trials in {tuner.result.took_s:.0f} s, {share:.1%} of that; at most {SHARE:.0%}: {judged}.",
        *tuner.result.notes,
    ]
    return figures, notes


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 points of the grid, one pair each, nothing is judged")
    quick = parser.parse_args().quick
    pairs.announce("tune")
    began = time.monotonic()
    kept = pairs.environment()
    os.environ.clear()  # the trials inherit it
    os.environ.update(kept)
    with tempfile.TemporaryDirectory(prefix="hpcml-bench-") as folder:
        os.environ["HPCML_PROJECT"] = folder
        figures, notes = measured(Path(folder), quick)
    notes.append(f"{time.monotonic() - began:.0f} s in all.")
    pairs.show("tune: what a short search finds", figures, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
