"""How far a long command of DVC is: a bar on a terminal, elsewhere a line now and then; always on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .dvc import Progress, Say

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

# Without a terminal: a log shows that it goes on, and stays short.
EVERY_S = 10


def say(text: str) -> None:
    """Tell a person something beside the result."""
    print(f"hpcml: {text}", file=sys.stderr, flush=True)


@contextmanager
def shown() -> Iterator[tuple[Progress, Say]]:
    """Yield what shows progress, and what tells a line beside it."""
    if not sys.stderr.isatty():
        yield _Lines(), say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("hpcml: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        yield _Bar(bars), lambda text: console.print(f"hpcml: {text}", markup=False, highlight=False)


class _Lines:
    """A line now and then, none for what ends soon."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if done and time.monotonic() - self.last >= EVERY_S:
            self.last = time.monotonic()
            say(f"{what}: {done:,}{f' of {total:,}' if total else ''} files")


class _Bar:
    """One bar, of what is being done now."""

    def __init__(self, bars: "Bars") -> None:
        self.bars, self.task = bars, bars.add_task("starting dvc", total=None)

    def __call__(self, what: str, done: int, total: int) -> None:
        self.bars.update(self.task, description=what, completed=done, total=total or None)
