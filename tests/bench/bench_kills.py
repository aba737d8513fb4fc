"""What a journal keeps of a process that is killed: SIGKILL at random moments, again and again on the same file.

The child appends points and acknowledges each accepted one through a pipe; some points are as long as a page, so that a
kill has something to tear. Afterwards every acknowledged point is to be in the journal, each once, and every line of it
readable.

    scripts/bench kills [--quick] [--seed N]

The same seed gives the same moments; what the machine makes of them differs.
"""

import argparse
import os
import random
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hpcml
from bench import pairs
from hpcml.tracking import journal

KILLS = 300
LIVES = 10  # a restarted process appends to the file that the killed one has left
LIVES_STEPS = 10_000_000  # a life's first step is its number times this
LONGEST_S = 0.03  # from the child's first word; before it there is nothing to lose
SRC = str(Path(hpcml.__file__).parents[1])
CHILD = """
import os, struct, sys
from pathlib import Path
from hpcml.tracking.journal import Journal

journal, step = Journal(Path(sys.argv[1])), int(sys.argv[2])
os.write(1, struct.pack("=q", -1))
while True:
    values = {"loss": step / 7, ("x" * 4096 if step % 5 == 0 else "lr"): 1 / 3}
    if journal.metric(step, values):
        os.write(1, struct.pack("=q", step))
    step += 1
"""


@dataclass(frozen=True)
class Outcome:
    """What became of the points.

    Attributes:
        acknowledged, kept: points accepted by the writers, and found in the journals.
        lost, duplicates: acknowledged points that are not there; points that are there more than once.
        unreadable: lines or files that are no records and were not torn.
    """

    kills: int
    acknowledged: int
    kept: int
    lost: int
    duplicates: int
    unreadable: int

    @property
    def holds(self) -> bool:
        """Whether nothing that was accepted is missing or doubled, and everything can be read."""
        return not (self.lost or self.duplicates or self.unreadable)


def kill_one(path: Path, first_step: int, moment_s: float) -> list[int]:
    """Let a process write from a step on, kill it so many seconds after it began; returns the acknowledged steps."""
    words = [sys.executable, "-c", CHILD, str(path), str(first_step)]
    child = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": SRC}, stdout=subprocess.PIPE)
    assert child.stdout is not None
    pipe, said, deadline = child.stdout.fileno(), b"", float("inf")
    try:
        while (left := deadline - time.monotonic()) > 0:
            if select.select([pipe], [], [], None if left == float("inf") else left)[0]:
                part = os.read(pipe, 1 << 16)  # always emptied: a child that waits for us would die at its rest
                if not part:
                    raise RuntimeError(f"the writer ended by itself, exit status {child.wait()}")
                said += part
                deadline = min(deadline, time.monotonic() + moment_s)
    finally:
        child.kill()
        said += child.stdout.read()
        child.stdout.close()
        child.wait()
    steps = [step for (step,) in struct.iter_unpack("=q", said[: len(said) // 8 * 8])]
    return steps[1:]  # the first is no step, but says that it begins


def kill_many(folder: Path, kills: int, seed: int) -> Outcome:
    """Kill writers at random moments, ten in turn on each journal, and count what is left."""
    moments, acknowledged = random.Random(seed), list[tuple[str, int]]()
    for number in range(kills):
        run, life = folder / f"run{number // LIVES}", number % LIVES
        steps = kill_one(run / "0.0.rank.jsonl", life * LIVES_STEPS, moments.uniform(0, LONGEST_S))
        acknowledged += [(run.name, step) for step in steps]
    return count(folder, acknowledged, kills)


def count(folder: Path, acknowledged: Sequence[tuple[str, int]], kills: int) -> Outcome:
    """Compare the journals below a folder with the points that were acknowledged, each by its journal and step."""
    kept: Counter[tuple[str, int]] = Counter()
    unreadable = 0
    for run in sorted(folder.iterdir()):
        for found in journal.scan(run):
            if isinstance(found, journal.Unreadable):
                unreadable += 1
            elif found["values"].get("loss") == found["step"] / 7 and len(found["values"]) == 2:
                kept[run.name, found["step"]] += 1
    lost = sum(point not in kept for point in acknowledged)
    doubled = sum(count - 1 for count in kept.values())
    return Outcome(kills, len(acknowledged), len(kept), lost, doubled, unreadable)


def show(outcome: Outcome, seed: int, took_s: float) -> None:
    """Print the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    table = Table(title="kills: a journal whose writer is killed", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("SIGKILLs", "points acknowledged", "lost", "duplicates", "unreadable", "verdict"):
        table.add_column(heading, justify="right")
    numbers = (outcome.kills, outcome.acknowledged, outcome.lost, outcome.duplicates, outcome.unreadable)
    table.add_row(*(f"{number:,}" for number in numbers), "holds" if outcome.holds else "does not hold")
    console.print(table)
    unsaid = outcome.kept - outcome.acknowledged + outcome.lost
    console.print(
        f"Seed {seed}, {took_s:.0f} s. {unsaid} points were written whose writer was killed before it could say so. "
        f"{LIVES} writers in turn on each journal."
    )


def main() -> int:
    """Kill, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30 kills")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="by default another each time")
    given = parser.parse_args()
    pairs.announce("kills")
    with tempfile.TemporaryDirectory() as name:
        began = time.monotonic()
        outcome = kill_many(Path(name), 30 if given.quick else KILLS, given.seed)
        show(outcome, given.seed, time.monotonic() - began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
