"""What becomes of a packed data set whose packing is killed: SIGKILL at random moments, and the same command again.

Each kill hits the process alone, so that those that it has forked are orphans, or all of them at once. After some kills a
run is left to end. What is at the destination is then to be, to the last byte, what an undisturbed run makes, with nothing
left beside it; and after each kill it is either not there or whole.

    scripts/bench packkills [--quick] [--seed=N]

The same seed gives the same moments; what the machine makes of them differs.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import hpcml
from bench import pairs

KILLS = 200
FILES = 2000
SHARD_BYTES = 200_000
MOST_IN_A_ROW = 5
SRC = str(Path(hpcml.__file__).parents[1])
# It says when it begins: before that Python starts, and there is nothing to kill.
CHILD = f"""
import os, sys
from hpcml.data.shards import layout, pack
layout.numpy()
os.write(1, b"!")
pack(sys.argv[1], sys.argv[2], shard_bytes={SHARD_BYTES}, workers=2)
"""


@dataclass(frozen=True)
class Outcome:
    """What became of it.

    Attributes:
        kills: that hit a process at work; ``too_late``: that found it at its end.
        sets: packed data sets that came about.
        resumed: kills after which some shards were there, and were not made again.
        different: sets that differ from the undisturbed one, or left something beside them.
        half: kills after which something not whole was at the destination.
    """

    kills: int
    too_late: int
    sets: int
    resumed: int
    different: int
    half: int

    @property
    def holds(self) -> bool:
        """Whether every set came out the same, and none was ever half there."""
        return not (self.different or self.half)


def make_files(folder: Path, seed: int) -> None:
    """Make small files of several sizes in ten folders."""
    generator = random.Random(seed)
    for number in range(FILES):
        path = folder / str(number % 10) / f"{number:05d}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(generator.randbytes(generator.randrange(2000)))


def digest(folder: Path) -> str:
    """Return what stands for all names and bytes of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def start(source: Path, dest: Path) -> subprocess.Popen[bytes]:
    """Start packing and return when it begins."""
    words = [sys.executable, "-c", CHILD, str(source), str(dest)]
    child = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": SRC}, stdout=subprocess.PIPE, process_group=0)
    assert child.stdout is not None
    if child.stdout.read(1) != b"!":
        raise RuntimeError(f"packing did not begin, exit status {child.wait()}")
    return child


def end(child: subprocess.Popen[bytes]) -> None:
    """Wait for a run that is to succeed.

    Raises:
        RuntimeError: it failed.
    """
    assert child.stdout is not None
    child.stdout.close()
    if child.wait(timeout=120):
        raise RuntimeError(f"packing failed, exit status {child.returncode}")


def kill(child: subprocess.Popen[bytes], after_s: float, *, orphans: bool) -> bool:
    """Kill a run so many seconds after it began; return whether it was still at work."""
    assert child.stdout is not None
    try:
        child.wait(timeout=after_s)
    except subprocess.TimeoutExpired:
        os.kill(child.pid if orphans else -child.pid, signal.SIGKILL)
    child.stdout.close()
    return child.wait() == -signal.SIGKILL


def is_done(dest: Path) -> bool:
    """Whether it is there, and nothing is left to clean up."""
    return dest.exists() and not (dest.parent / f".{dest.name}.packing/plan").exists()


def kill_many(folder: Path, kills: int, seed: int) -> Outcome:
    """Kill until so many kills have hit, and count."""
    source, generator = folder / "source", random.Random(seed)
    make_files(source, seed)
    child = start(source, folder / "undisturbed")
    began = time.monotonic()
    end(child)
    longest_s = time.monotonic() - began
    wanted = digest(folder / "undisturbed")
    hit = late = sets = resumed = different = half = 0
    while hit < kills:
        dest = folder / f"packed{sets}"
        for _ in range(min(generator.randint(1, MOST_IN_A_ROW), kills - hit)):
            was_hit = kill(start(source, dest), generator.uniform(0, longest_s), orphans=generator.random() < 0.5)
            hit, late = hit + was_hit, late + (not was_hit)
            half += dest.exists() and digest(dest) != wanted
            resumed += any((folder / f".{dest.name}.packing/parts").glob("*"))
            if is_done(dest):
                break
        if not is_done(dest):
            end(start(source, dest))
        sets += 1
        left = [path for path in folder.glob(".*") if path.is_dir() and any(path.iterdir())]
        different += digest(dest) != wanted or bool(left)
        for path in (*dest.iterdir(), dest):
            path.rmdir() if path.is_dir() else path.unlink()
    return Outcome(hit, late, sets, resumed, different, half)


def show(outcome: Outcome, seed: int, took_s: float) -> None:
    """Print the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    table = Table(title="packkills: packing that is killed, and goes on", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("SIGKILLs", "with shards done", "data sets", "different", "half at DEST", "verdict"):
        table.add_column(heading, justify="right")
    numbers = (outcome.kills, outcome.resumed, outcome.sets, outcome.different, outcome.half)
    table.add_row(*(f"{number:,}" for number in numbers), "holds" if outcome.holds else "does not hold")
    console.print(table)
    console.print(f"Seed {seed}, {took_s:.0f} s, {FILES:,} files; {outcome.too_late} kills came after the end.")


def main() -> int:
    """Kill, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 kills")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="by default another each time")
    given = parser.parse_args()
    pairs.announce("packkills")
    with tempfile.TemporaryDirectory() as name:
        began = time.monotonic()
        outcome = kill_many(Path(name), 20 if given.quick else KILLS, given.seed)
        show(outcome, given.seed, time.monotonic() - began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
