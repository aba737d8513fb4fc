"""The tune command."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import rundir
from ..errors import DONE, INTERRUPTED, HpcmlError
from ..job import clock, seconds
from ..launch.prepare import needs_framework, prepare
from . import jobs, show
from .root import json_option, site_option

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from ..tune.search import Trial
    from ..tune.space import Value
    from ..tune.trial import Pace
    from ..tune.tuner import Tuner, Tuning


class _Budget(click.ParamType[float]):
    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            found = seconds(str(value))
        except ValueError:
            found = 0
        if not found:
            fix = "such as --budget 20"
            raise HpcmlError(
                f"{value!r} is no time", origin="--budget", allowed='"10" (minutes) or "00:10:00"', fix=fix
            )
        return float(found)


@click.command("tune")
@jobs.job_argument
@jobs.params_option
@jobs.set_option
@click.option("--batch", is_flag=True, help="Also the batch per replica; what is learned depends on it.")
@click.option("--budget", type=_Budget(), help="Minutes, or HH:MM:SS, for everything.  [default: 10]")
@click.option("--only", "only", multiple=True, metavar="NAME", help="This setting alone; again for several.")
@click.option("--no-write", is_flag=True, help="Measure and show; leave the job file as it is.")
@site_option
@json_option
def tune_command(
    job: Path,
    params: tuple[Any, ...],
    settings: tuple[Any, ...],
    batch: bool,
    budget: float | None,
    only: tuple[str, ...],
    no_write: bool,
    site: str | None,
    as_json: bool,
) -> int:
    """Find the settings that train a job fastest here, by short trials, and write them into its file.

    Threads, input pipeline, compilation; on this machine or inside an allocation. The job itself is run, again and again,
    for some seconds of training each. Ctrl-C keeps what was measured and leaves the job as it is.
    """
    from ..tune import tuner, write

    ready = prepare(job, site, dict(params), dict(settings), here=True)
    names = tuple(name for text in only for name in text.split(",") if name)
    wanted = tuner.Wanted(names, batch, budget or tuner.BUDGET_S)
    tuner.check(ready.plan, wanted)
    jobs.needs_allocation(ready)
    needs_framework(ready.plan)
    if not no_write:
        write.needs_writable(job)
    watcher = _Screen(wanted.budget_s)
    tuning = tuner.Tuner(ready.plan, rundir.runs_root(ready.site, Path(ready.plan.project)), wanted, watcher)
    jobs.announce(ready, f"tuning {os.path.relpath(tuning.result.folder)}", to_stderr=True)
    interrupted = _measure(tuning, watcher)
    written = ""
    if not interrupted and not no_write and tuning.result.changes:
        write.write(job, tuning.result.changes, tuner.note_of(tuning.result, time.localtime()))
        written = str(job)
    if as_json:
        show.echo_json({**tuning.result.to_json(), "written": written or None, "folder": str(tuning.result.folder)})
    else:
        _report(tuning.result, job, written)
    return INTERRUPTED if interrupted else DONE


def _measure(tuning: "Tuner", watcher: "_Screen") -> bool:
    """Run the tuning; returns whether a person ended it: by Ctrl-C, or the terminal or the allocation has gone."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with watcher.live():
            tuning.run()
    except KeyboardInterrupt:
        return True
    finally:
        for number, old in before.items():
            signal.signal(number, old)
    return False


class _Screen:
    """Shows the trials on stderr: a line for each, and on a terminal a live one below them."""

    def __init__(self, budget_s: float) -> None:
        self._ends = time.monotonic() + budget_s
        self._console: Console | None = None
        self._status: Status | None = None
        self._text = ""

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        if not self._console.is_terminal:
            yield
            return
        with self._console.status("starting …") as self._status:
            yield

    def begins(self, number: int, changes: "Mapping[str, Value]", final: bool) -> None:
        self._text = f"trial {number}{', final' if final else ''}: {_words(changes)}"
        self._update("starting")

    def goes_on(self, pace: "Pace") -> None:
        speed = f"{pace.speed:,.0f} samples/s" if pace.speed else "first epoch"
        self._update(speed)

    def ended(self, trial: "Trial", start: "Trial | None", changes: "Mapping[str, Value]") -> None:
        first = start.speed if start and start.speed else trial.speed
        if trial.speed is None:
            told = f"failed: {trial.reason}"
        else:
            ratio = trial.speed / first if first else 1.0
            told = f"{trial.speed:>10,.0f} samples/s  {ratio:4.2f} ×" + ("  ended early" if trial.cut else "")
        assert self._console is not None
        self._console.print(f"{trial.number:3} {'=' if trial.final else ' '} {_words(changes):<52} {told}")

    def _update(self, doing: str) -> None:
        if self._status is not None:
            left = max(0.0, self._ends - time.monotonic())
            self._status.update(f"{self._text} · {doing} · {clock(left)} left")


def _words(changes: "Mapping[str, Value]") -> str:
    from ..tune.space import shown

    return ", ".join(f"{name} {shown(name, value)}" for name, value in changes.items()) or "the job as it is"


def _report(result: "Tuning", job: Path, written: str) -> None:
    """Print what mattered, the picture's place, and what was written."""
    from rich.console import Console

    from ..tune import picture

    if result.found is None:
        click.echo("hpcml: nothing was measured; the job is as it was", err=True)
        return
    if result.lines:
        click.echo()
        Console().print(_table(result))
        try:
            path = result.folder / "tune.png"
            picture.plot(result, path)
            click.echo(f"  plot      {path}")
        except HpcmlError as error:
            click.echo(f"hpcml: no plot: {error}", err=True)
    for note in result.notes:
        click.echo(f"  note      {note}")
    click.echo(f"  trials    {len(result.found.trials)} in {show.duration(result.took_s)}: {result.folder}")
    click.echo(f"  {_verdict(result, job, written)}")


def _verdict(result: "Tuning", job: Path, written: str) -> str:
    from ..tune import write

    found, changes = result.found, result.changes
    assert found is not None
    if result.interrupted:
        best = f"; best so far {found.gain:.2f} ×: {_words(changes)}" if changes else ""
        return f"interrupted   {job} is as it was{best}"
    if not changes:
        return f"result    the job as it is is the fastest found; {job} is as it was"
    how = f"{found.gain:.2f} × as fast" + ("" if found.confirmed else ", by short trials alone")
    if written:
        return f"written   {written}: {_words(changes)}; {how}"
    values = ", ".join(f"{name} = {write.literal(value)}" for name, value in changes.items())
    return f"found     {values}; {how}; {job} is as it was"


def _table(result: "Tuning") -> Any:
    from rich import box
    from rich.table import Table

    from ..tune.space import shown

    assert result.found is not None and result.start is not None
    start, winner = result.found.start.point, result.found.winner.point
    table = Table(title="What mattered", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    for heading in ("was", "now"):
        table.add_column(heading, justify="right")
    table.add_column("speed by value, the present one 1.00")
    for line in result.lines:
        base = line.trials[0][1].speed or 1.0
        tried = [
            f"{shown(line.name, value)}: {trial.speed / base:.2f}"
            if trial.speed
            else f"{shown(line.name, value)}: failed"
            for value, trial in line.trials
        ]
        now = shown(line.name, winner[line.name])
        table.add_row(line.name, shown(line.name, start[line.name]), now, "  ".join(tried))
    return table
