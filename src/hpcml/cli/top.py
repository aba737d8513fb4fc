"""``hpcml top``: a run, live in a terminal."""

import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from .. import queue, rundir
from ..errors import DONE
from ..queue.watch import Look, Watcher
from . import draw, show, view
from .root import json_option, site_option

if TYPE_CHECKING:
    from rich.console import Console

REFRESH_S = 1.0
# Slurm's controller serves everybody: it is asked this often while the files are looked at each second.
ASK_S = 5.0
_LEAVE = frozenset("qQ\x03\x04\x1b")


@click.command("top")
@click.argument("run", required=False)
@click.option(
    "--once", is_flag=True, help="Print what there is now and end; so it does where the output is no terminal."
)
@site_option
@json_option
def top_command(run: str | None, once: bool, site: str | None, as_json: bool) -> int:
    """Watch a run live: queue, progress, loss, GPUs, cores and memory, log and warnings. q leaves; the run goes on."""
    found = rundir.find(show.root_of(site), run)
    watcher = Watcher(found)
    if as_json:
        show.echo_json(view.as_json(_now(watcher)))
        return DONE
    from rich.console import Console

    console = Console(highlight=False)
    if once or not console.is_terminal:
        _print(console, _now(watcher))
        return DONE
    with contextlib.suppress(KeyboardInterrupt):
        last = _live(console, watcher)
        _print(console, last)
    return DONE


def _now(watcher: Watcher) -> Look:
    states, silence = queue.states_of(watcher.runs())
    if silence is not None:
        click.echo(f"hpcml: shown as last known: {silence}", err=True)
    return watcher.look({state.run_id: state for state in states})


def _page(console: "Console", height: int | None) -> view.Page:
    glyphs = draw.UNICODE if console.encoding.lower().startswith("utf") else draw.ASCII
    return view.Page(console.width, height, glyphs)


def _print(console: "Console", look: Look) -> None:
    for line in view.lines(look, _page(console, None)):
        console.print(line, crop=False, soft_wrap=True)


def _live(console: "Console", watcher: Watcher) -> Look:
    """Show a run until it has ended or the person leaves; returns the last look at it."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    states = _States(watcher)
    with states, _keys() as left, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            look = watcher.look(states.known)
            page = _page(console, console.height - 1)
            body = view.lines(look, page)
            note = states.note or "q leaves, the run goes on"
            padding = [Text("")] * (console.height - 1 - len(body))
            live.update(
                Group(*body, *padding, Text(note[: console.width - 1], style="dim", no_wrap=True)), refresh=True
            )
            if look.state.is_final or left(REFRESH_S):
                return look


class _States:
    """Asks for the states of a run and those below it in the background, so that a slow controller holds up no key."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="hpcml-states", daemon=True)
        self.known: dict[str, queue.State] = {}
        self.note = ""
        self._ask()

    def __enter__(self) -> "_States":
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._end.set()  # a thread that waits for Slurm is not waited for

    def _go_on(self) -> None:
        asked_at = time.monotonic()
        while not self._end.wait(REFRESH_S / 2):
            marked = bool(rundir.read_json(self._watcher.run.status).get("final"))
            if marked or time.monotonic() - asked_at >= ASK_S:
                self._ask()
                asked_at = time.monotonic()

    def _ask(self) -> None:
        try:
            states, silence = queue.states_of(self._watcher.runs())
        except OSError as error:  # the file system is away for a moment
            if not self.known:
                raise
            self.note = f"the run directory can't be read: {error.strerror}"
            return
        fresh = {state.run_id: state for state in states}
        if silence is not None:  # what Slurm said last is better than what the files alone tell, but for an end
            fresh = {id: state if state.is_final else self.known.get(id, state) for id, state in fresh.items()}
        self.known = fresh
        self.note = str(silence.problems[0].what) if silence is not None else ""


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Give a function that waits so many seconds and returns whether the person asked to leave meanwhile."""
    import termios
    import tty

    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):  # no terminal to type at: Ctrl-C is left
        yield _pause
        return

    def left(seconds: float) -> bool:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return bool(ready) and _asks_to_leave(os.read(descriptor, 64))

    try:
        tty.setcbreak(descriptor, termios.TCSADRAIN)
        yield left
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _pause(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _asks_to_leave(typed: bytes) -> bool:
    """Whether q, Escape, Ctrl-C or Ctrl-D was typed, or the terminal has gone; an arrow key begins with Escape too."""
    text = typed.decode(errors="replace")
    return not text or text in _LEAVE or "q" in text.lower()
