"""The last lines of a run's logs, as a terminal would show them."""

import re
from dataclasses import dataclass
from pathlib import Path

from .. import rundir
from ..rundir import RunDir

LINES = 40
_LONGEST = 400
# Colours and cursor movements (ECMA-48, control sequences) and what else a terminal does not print.
_CONTROL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])|[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class LogEnd:
    """The last lines of one log; ``rank`` is None for Slurm's own output."""

    path: str
    rank: int | None
    lines: tuple[str, ...]


def ends(run: RunDir, failed_rank: int | None) -> tuple[LogEnd, ...]:
    """Return the ends of the log of the rank that failed, by default 0, and of Slurm's own output where there is one."""
    paths: list[tuple[Path, int | None]] = [(path, None) for path in sorted(run.logs.glob("slurm-*.out"))[-1:]]
    rank = failed_rank or 0
    paths.insert(0, (run.log(rank), rank))
    return tuple(LogEnd(str(path), rank, lines) for path, rank in paths if (lines := last_lines(path)))


def last_lines(path: Path, most: int = LINES) -> tuple[str, ...]:
    """Return the last lines of a log: none where it can't be read; of a progress bar its last state."""
    lines = [_shown(line) for line in rundir.last_lines(path, most)]
    while lines and not lines[-1]:
        lines.pop()
    return tuple(lines)


def _shown(line: str) -> str:
    line = _CONTROL.sub("", line).rstrip()
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"
