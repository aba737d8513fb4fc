"""How far a long piece of work is: told by each process now and then, added up in one place."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from .workers import Message, Say

_EACH_S = 0.1
_EACH_FILES = 256  # between two looks at the clock


@dataclass(frozen=True)
class Progress:
    """How much is done; ``bytes`` are those of the files' contents."""

    files: int
    of_files: int
    bytes: int
    of_bytes: int


Report = Callable[[Progress], object]


class Meter:
    """Adds up what processes tell, for a person's eyes."""

    def __init__(self, report: Report | None, of_files: int, of_bytes: int) -> None:
        self._report, self._of = report, (of_files, of_bytes)
        self._files = self._bytes = 0

    def add(self, files: int, size: int) -> None:
        """So much more is done."""
        self._files += files
        self._bytes += size
        if self._report:
            self._report(Progress(self._files, self._of[0], self._bytes, self._of[1]))

    def hear(self, message: Message) -> None:
        """Add what a ``Ticker`` said."""
        if "files" in message:
            self.add(message["files"], message["bytes"])


class Ticker:
    """A process's side: says how much it has done since it last said so, ten times a second at most."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._files = self._bytes = self._seen = 0
        self._last = time.monotonic()

    def add(self, files: int, size: int) -> None:
        """So much more is done."""
        self._files += files
        self._bytes += size
        self._seen += files
        if self._seen >= _EACH_FILES or size >= 2**20:
            self._seen = 0
            now = time.monotonic()
            if now - self._last >= _EACH_S:
                self._last = now
                self.flush()

    def flush(self) -> None:
        """Say what has not been said yet."""
        if self._files or self._bytes:
            self._say({"files": self._files, "bytes": self._bytes})
            self._files = self._bytes = 0
