"""Two sides measured in interleaved pairs: the ratio with its interval, the verdict, the table.

The sides of a pair are measured one right after the other and divided by each other, so that what changes slowly (the
clock rate, a neighbour on the machine) falls out of the ratio; every second pair runs in the other order, so that what
the first leaves behind does too.
"""

import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = 20  # of the bootstrap: the same pairs always give the same interval
RESAMPLES = 10_000
CONFIDENCE = 0.95
# Settings of hpcml and of an enclosing allocation, which would steer one side only.
FOREIGN = ("HPCML_", "SLURM_", "SBATCH_", "SRUN_", "PMIX_", "OMPI_", "MLFLOW_", "PYTHON")


@dataclass(frozen=True)
class Pair:
    """One measurement of each side, in the figure's unit."""

    ours: float
    other: float
    ours_first: bool

    @property
    def ratio(self) -> float:
        """Ours divided by the other."""
        return self.ours / self.other


@dataclass(frozen=True)
class Bound:
    """What a ratio must keep.

    Attributes:
        limit: the ratio.
        at_least: whether more is better (speeds); else at most (times).
        pairs: with fewer there is no verdict.
        width: the widest interval that tells anything. With it the interval has to reach the bound; without it the
            median has to keep it.
    """

    limit: float
    at_least: bool
    pairs: int
    width: float | None = None

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True)
class Figure:
    """One ratio and what it is of.

    Attributes:
        name: a few words for the table; ``what``: a sentence on what was run.
        sides: names of ours and of the other.
        unit: of the measurements.
    """

    name: str
    what: str
    sides: tuple[str, str]
    unit: str
    pairs: Sequence[Pair]
    bound: Bound
    seed: int = SEED

    @property
    def ratio(self) -> float:
        """The median of the pairs' ratios."""
        return statistics.median(pair.ratio for pair in self.pairs)

    @property
    def interval(self) -> tuple[float, float]:
        """The ratio's 95 % interval."""
        return interval([pair.ratio for pair in self.pairs], self.seed)


def in_turn(ours: Callable[[], float], other: Callable[[], float]) -> Callable[[bool], tuple[float, float]]:
    """Return what measures two sides one right after the other, for :func:`measure`."""

    def both(ours_first: bool) -> tuple[float, float]:
        if ours_first:
            return ours(), other()
        second = other()
        return ours(), second

    return both


def measure(
    both: Callable[[bool], tuple[float, float]],
    *,
    least: int,
    most: int | None = None,
    width: float | None = None,
    limit_s: float = float("inf"),
) -> Iterator[Pair]:
    """Yield pairs: ours first, then the other first, and so on.

    Args:
        both: measures ours and the other; told whether ours comes first.
        least: pairs that are measured in any case.
        most: after ``least``, go on to at most so many while the ratio's interval is wider than ``width``; always by
            two, so that both orders have equally many.
        limit_s: start no more than the least after so many seconds.
    """
    began, pairs = time.monotonic(), list[Pair]()
    while len(pairs) < least or (most or least) > len(pairs):
        late = time.monotonic() - began > limit_s
        if len(pairs) >= least and len(pairs) % 2 == 0 and (late or _narrow(pairs, width)):
            return
        ours_first = len(pairs) % 2 == 0
        pairs.append(Pair(*both(ours_first), ours_first))
        yield pairs[-1]


def interval(
    ratios: Sequence[float], seed: int = SEED, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the bootstrap interval of a median: the percentiles of the medians of samples drawn with replacement.

    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.)
    """
    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(resamples))
    cut = round((1 - confidence) / 2 * resamples)
    return medians[cut], medians[-1 - cut]


def verdict(figure: Figure) -> str:
    """Return ``holds``, ``does not hold``, or why there is no telling."""
    bound, (low, high) = figure.bound, figure.interval
    if len(figure.pairs) < bound.pairs:
        return f"not judged: {len(figure.pairs)} of {bound.pairs} pairs"
    if bound.width is None:
        kept = figure.ratio >= bound.limit if bound.at_least else figure.ratio <= bound.limit
        return "holds" if kept else "does not hold"
    if not (high >= bound.limit if bound.at_least else low <= bound.limit):
        return "does not hold"
    if high - low > bound.width:
        return f"not judged: interval {high - low:.3f} wide, {bound.width:g} allowed"
    return "holds"


def show(title: str, figures: Sequence[Figure], notes: Sequence[str] = ()) -> None:
    """Print the figures of one benchmark as a table, and below it what was run."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("figure", "pairs", "ours, median", "other, median", "ratio", "95 % interval", "bound", "verdict"):
        table.add_column(heading, no_wrap=heading not in ("figure", "verdict"))
    for figure in figures:
        low, high = figure.interval
        ours, other = (_medians(figure)[side] for side in (0, 1))
        sides = (f"{figure.sides[0]} {ours}", f"{figure.sides[1]} {other}")
        told = (f"{figure.ratio:.3f}", f"{low:.3f} … {high:.3f}", str(figure.bound), verdict(figure))
        table.add_row(f"{figure.name} ({figure.unit})", str(len(figure.pairs)), *sides, *told)
    console.print(table)
    for figure in figures:
        console.print(f"{figure.name}: {figure.what} {_by_order(figure)}")
    console.print(f"Ratios are medians over the pairs; intervals by bootstrap, {RESAMPLES:,} resamples, seed {SEED}.")
    for note in notes:
        console.print(note)


def announce(name: str) -> None:
    """Say on stderr what starts and how busy the machine is, and let SIGTERM clean up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    print(f"bench: {name}: {cores} cores, load {load:.1f} before it starts", file=sys.stderr)
    if load > cores / 4:
        print("bench: other programs are running; ratios will scatter", file=sys.stderr)


def progress(name: str, pair: Pair, count: int) -> None:
    """Say on stderr that a pair is done."""
    print(f"bench: {name}: pair {count}: {pair.ratio:.3f}", file=sys.stderr)


def environment() -> dict[str, str]:
    """Return this process's environment without what would steer hpcml, Slurm or Python, this Python first on PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    here = str(Path(sys.executable).parent)
    return {**kept, "PATH": os.pathsep.join([here, os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])}


def _narrow(pairs: Sequence[Pair], width: float | None) -> bool:
    low, high = interval([pair.ratio for pair in pairs])
    return width is not None and high - low <= width


def _medians(figure: Figure) -> tuple[str, str]:
    ours = statistics.median(pair.ours for pair in figure.pairs)
    other = statistics.median(pair.other for pair in figure.pairs)
    digits = 0 if min(ours, other) >= 100 else 3
    return f"{ours:,.{digits}f}", f"{other:,.{digits}f}"


def _by_order(figure: Figure) -> str:
    first = [pair.ratio for pair in figure.pairs if pair.ours_first]
    second = [pair.ratio for pair in figure.pairs if not pair.ours_first]
    if not first or not second:
        return ""
    return f"Ratio {statistics.median(first):.3f} with ours first, {statistics.median(second):.3f} with it second."
