"""A run's logs as lines, while they grow: by polling, for on Lustre and NFS nobody is told of another node's writes."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..rundir import RunDir, shown
from . import steps
from .order import children

POLL_S = 0.5
_BLOCK = 1 << 20
# A log is taken for the one that was read while this many bytes before the place are the same.
_SAME = 256


def log_paths(run: RunDir) -> list[Path]:
    """Return a run's logs: Slurm's own first, then each rank's by rank; of a comparison or chain those of its parts."""
    paths = sorted(run.logs.glob("slurm-*.out")) + rank_logs(run)
    for child in children(run):
        paths += [*(sorted(child.logs.glob("slurm-*.out")) if steps.is_chain(run) else ()), *rank_logs(child)]
    return paths


def rank_logs(run: RunDir) -> list[Path]:
    """Return the logs of a run's own ranks, by rank."""
    found = [path for path in run.logs.glob("out.*.txt") if path.name.split(".")[1].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.split(".")[1]))


def lines_of(path: Path) -> Iterator[str]:
    """Yield a log's lines as a terminal would show them: of a line that was redrawn, the last state."""
    try:
        with path.open("rb") as file:
            for line in file:
                yield shown(line)
    except OSError:  # not there yet, or gone
        return


def follow(run: RunDir, ended: Callable[[], bool], poll_s: float = POLL_S) -> Iterator[tuple[Path, str]]:
    """Yield each new line of every rank's log with its path, until the run has ended.

    Ranks whose logs appear later are picked up; a log that was replaced or cut is read from its start again.
    """
    follower = Follower(run)
    while True:
        over = ended()  # asked before the last look, so that nothing written before the end is missed
        yield from follower.new(whole=over)
        if over:
            return
        time.sleep(poll_s)


@dataclass
class _Place:
    """How far one log was read: the offset, the bytes before it, and the line that has not ended yet."""

    offset: int = 0
    before: bytes = b""
    rest: bytes = b""

    def is_in(self, file: BinaryIO) -> bool:
        """Whether this is still the file that was read; a file's number doesn't tell, it is given again."""
        file.seek(self.offset - len(self.before))
        return file.read(len(self.before)) == self.before


class Follower:
    """Reads what is new in the logs of a run's ranks at each call."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._places: dict[Path, _Place] = {}

    def new(self, *, whole: bool = False) -> Iterator[tuple[Path, str]]:
        """Yield the lines that ended since the last call, with their logs' paths.

        Args:
            whole: take a last line without a newline too: the run has ended.
        """
        for path in log_paths(self.run):
            if path.name.startswith("out."):
                for line in self._lines(path, whole):
                    yield path, shown(line)

    def _lines(self, path: Path, whole: bool) -> Iterator[bytes]:
        try:
            file = path.open("rb")  # anew each time: NFS shows others' writes to whoever opens (nfs(5), close-to-open)
        except OSError:
            return
        with file:
            place = self._places.setdefault(path, _Place())
            if not place.is_in(file):
                if place.rest:
                    yield place.rest
                place = self._places[path] = _Place()
                file.seek(0)
            while block := file.read(_BLOCK):
                *lines, rest = (place.rest + block).split(b"\n")
                place.offset, place.rest = place.offset + len(block), _last_state(rest)
                place.before = (place.before + block)[-_SAME:]
                yield from lines
        if whole and place.rest:
            rest, place.rest = place.rest, b""
            yield rest


def _last_state(line: bytes) -> bytes:
    """What is worth keeping of an unfinished line that a progress bar redraws many times a second."""
    body = line.rstrip(b"\r")
    return line[body.rfind(b"\r") + 1 :]
