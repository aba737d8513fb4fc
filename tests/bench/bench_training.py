"""What hpcml costs a training: the same script under ``hpcml run`` and bare, in samples a second.

    scripts/bench training [--quick | --noise]

The script is the notebook notebooks/simple2GPUsOrig.py up to its training: a small network with short epochs, so that
whatever hpcml does in an epoch shows. Bare it doesn't import hpcml, but has the same environment variables, so that both
sides compute on the same devices, with the same threads and the same Keras (by_hand.py makes both). Neither saves checkpoints:
what they cost is bounded by a rule of its own, 1 % of the time, and `strategies` includes it. Both carry the same clock:
it counts from the second epoch on, without validation, and includes what the callbacks before it do. They take turns on one
core (see turns.py): a job of one core, and hpcml's other processes on that core too.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

from bench import by_hand, pairs, turns
from hpcml import facts, rundir
from hpcml.node import bootstrap
from hpcml.tracking import journal

NOTEBOOK = by_hand.NOTEBOOKS / "simple2GPUsOrig.py"
HPCML = str(Path(sys.executable).with_name("hpcml"))
SECONDS = 11.0  # on each side of a pair; the epochs that the turns begin and end in are not counted: over 10 s are left
PAIRS, MOST_PAIRS = 12, 24
LIMIT_S = 25 * 60
PROFILE = (19, 28)  # in the second epoch, of steps 16 to 30: the first builds the graph
BOUND = pairs.Bound(0.99, at_least=True, pairs=PAIRS, width=0.04)

JOB = """\
name = "bench"
script = "under_hpcml.py"
strategy = "original"
[resources]
gpus_per_node = {gpus}
cpus_per_task = {cores}
"""


class Training:
    """Both sides, in a project folder of their own."""

    def __init__(self, folder: Path) -> None:
        notebook = NOTEBOOK.read_text(encoding="utf-8")
        gpus, cores = min(1, facts.count_gpus()), 1
        self.folder = folder
        files = {
            "under_hpcml.py": by_hand.script(notebook, bare=False, keep=False),
            "bare.py": by_hand.script(notebook, bare=True),
            "bench.toml": JOB.format(gpus=gpus, cores=cores),
        }
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        by_hand.write_data(folder)
        self.environment = pairs.environment() | {"HPCML_PROJECT": str(folder)}
        # What hpcml's worker will decide for its own script, with the cores that the launcher hands to it.
        decides = {"HPCML_CPUS_PER_TASK": str(cores)}
        prepared = bootstrap.prepare(self.environment | decides, "original", gpus_per_node=gpus)
        self.variables = {name: value for name, value in prepared.variables.items() if name != bootstrap.HANDOVER}

    def ours(self, name: str = "ours", *options: str) -> turns.Program:
        """Start the script under ``hpcml run``."""
        words = [HPCML, "run", "--site", "local", "bench.toml", *options]
        return turns.Program(name, words, self.environment, self.folder)

    def bare(self, name: str = "bare") -> turns.Program:
        """Start the bare script."""
        return turns.Program(name, [sys.executable, "bare.py"], self.environment | self.variables, self.folder)


def profiled(sides: Training) -> str:
    """Train a few epochs with a profile, alone on the machine, and return what its steps took beside all others."""
    program = sides.ours("profiled", "--set", f"profile.steps={list(PROFILE)}")
    try:
        program.await_spans(6)  # two an epoch
        program.end()
    finally:
        program.kill()
    run = max(rundir.every(sides.folder / "runs"), key=lambda run: run.id)
    records = list(journal.read(run.events, kinds={"metric", "profile"}))
    split = next(record["split"] for record in records if record["kind"] == "profile")
    epoch = next(r["values"] for r in records if r["kind"] == "metric" and r["values"].get("profiled_steps"))
    return (
        f"A profile of steps {PROFILE[0]} to {PROFILE[1]}: {split['step_ms']:.2f} ms a step; the other steps of that epoch "
        f"{epoch['step_time_ms']:.2f} ms. It is left out above and in samples_per_s."
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs of 2 s, nothing is judged")
    parser.add_argument("--noise", action="store_true", help="bare against bare: what the machine itself adds")
    chosen = parser.parse_args()
    quick = chosen.quick
    seconds, least, most = (2.0, 2, 2) if quick else (SECONDS, PAIRS, MOST_PAIRS)
    pairs.announce("training")
    with tempfile.TemporaryDirectory(prefix="hpcml-bench-") as folder:
        sides = Training(Path(folder))
        ours = partial(sides.bare, "again") if chosen.noise else sides.ours
        measured = []
        race = turns.racing(ours, sides.bare, seconds)
        for pair in pairs.measure(race, least=least, most=most, width=BOUND.width, limit_s=LIMIT_S):
            measured.append(pair)
            pairs.progress("training", pair, len(measured))
        beside = [] if chosen.noise else [profiled(sides)]
    variables = ", ".join(f"{name}={value}" for name, value in sides.variables.items())
    name = "bare" if chosen.noise else "hpcml"
    what = (
        f"{NOTEBOOK.relative_to(by_hand.PROJECT)} up to its training, {seconds:g} s of it after the second epoch began, "
        + (
            "bare against bare."
            if chosen.noise
            else "under `hpcml run` with begin() and callbacks against the same script bare."
        )
    )
    figure = pairs.Figure("CNN", what, (name, "bare"), "samples/s", measured, BOUND)
    notes = [f"On both sides: {variables}.", *beside]
    if len(measured) > least:
        notes.append(f"{least} pairs gave an interval over {BOUND.width:g} wide, so it went on to {len(measured)}.")
    pairs.show("training: what hpcml costs a training", [figure], notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
