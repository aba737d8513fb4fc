"""How runs are shown in a terminal; shared by the commands."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import queue, rundir
from .. import site as sites
from ..errors import BAD_INPUT, DONE, JOB_FAILED, SERVICE_SILENT, HpcmlError, ServiceSilent
from ..job import clock
from ..report import resumable
from ..report.text_of import number
from ..rundir import RunDir
from ..tracking import journal

if TYPE_CHECKING:
    import subprocess

    from rich.text import Text

    from ..preflight import Finding

    Follower = subprocess.Popen[bytes] | None

COLOURS = {"COMPLETED": "green", "RUNNING": "cyan", "PENDING": "yellow", "UNKNOWN": "magenta"}


def echo_json(value: Mapping[str, Any] | list[Any]) -> None:
    """Print JSON for another program."""
    click.echo(json.dumps(value, indent=1, default=str))


def findings(found: "list[Finding]", as_json: bool) -> int:
    """Print what a look at things found; returns the exit code: 2 where something is bad, 3 where a service is silent."""
    silent = any(line.verdict == "silent" for line in found)
    if as_json:
        echo_json([vars(line) for line in found])
    else:
        for line in found:
            mark = {"good": click.style("✓", fg="green"), "note": "·"}.get(line.verdict, click.style("✗", fg="red"))
            click.echo(f"{mark} {line.topic:<12} {line.text}" + (f"\n    fix: {line.fix}" if line.fix else ""))
    if any(line.verdict == "bad" for line in found):
        return BAD_INPUT
    return SERVICE_SILENT if silent else DONE


def state_word(name: str) -> str:
    """Return a state in its colour; click drops the colour where the output is no terminal."""
    return click.style(name, fg=COLOURS.get(name, "red"))


def root_of(site_name: str | None) -> Path:
    """Return the runs folder that applies here."""
    from ..slurm import commands

    where, _ = sites.choose(site_name, None if site_name else commands.cluster_name())
    from ..job import project_of

    return rundir.runs_root(where, project_of(Path.cwd() / "job.toml"))


def wait(run: RunDir) -> queue.State:
    """Wait for a run with a live line on a terminal, else a line for each change."""
    if sys.stderr.isatty():
        from rich.console import Console

        console = Console(stderr=True)
        with console.status("asking Slurm …") as live:
            return queue.wait(run, lambda state: live.update(_Ticking(state)))
    return queue.wait(run, lambda state: click.echo(f"hpcml: {_progress_line(state)}", err=True))


def finish(run: RunDir, state: queue.State, *, log_tail: bool, follower: "Follower" = None) -> int:
    """Deliver an ended run, print its summary, and return the exit code.

    Args:
        log_tail: whether to end a failed run's summary with the last lines of its log, unless they were seen already.
        follower: what delivers it in the background so far.
    """
    click.echo(summary(run, state))
    delivered = deliver(run, follower=follower)
    tell_places(run, delivered)
    if state.name == "COMPLETED":
        return DONE
    for path in [p for p in queue.log_paths(run)[::-1] if log_tail and p.stat().st_size][:1]:
        tail = path.read_text(errors="replace").splitlines()[-15:]
        click.echo(f"last lines of {path}:\n" + "\n".join(f"  | {line}" for line in tail), err=True)
    return JOB_FAILED


def deliver(run: RunDir, *, announce: bool = True, follower: "Follower" = None) -> str:
    """Send a run to MLflow and return where it is; what can't be sent stays for ``hpcml sync`` and is said.

    Lines of the journal that are no record are named on stderr; everything else is delivered.

    Args:
        announce: whether to say that it takes a moment.
        follower: what delivers it in the background so far: it does the rest, which spares this process MLflow.
    """
    from .. import report
    from ..tracking import follow, mlflow

    follow.hurry(follower)  # it imports MLflow while the report is made
    ended = ""
    try:
        with contextlib.suppress(ServiceSilent):
            state = queue.state_of(run)  # what Slurm knows of its end goes into the marker first
            if state.is_final:
                ended = state.name
                report.ensure(run, state=state.name, reason=state.reason)
        uri = _store_of(run)
        if announce:  # the first delivery also makes the database, which takes some seconds
            click.echo("hpcml: making the report, delivering to MLflow …", err=True)
        done = follow.finish(follower) and mlflow.is_delivered(run, uri, state=ended)
        with _counting() as tell:
            told = mlflow.noted(run) if done else mlflow.deliver(run, uri, state=ended, tell=tell)
    except HpcmlError as error:
        click.echo(f"hpcml: not delivered to MLflow; nothing is lost: hpcml sync {run.id}\n  {error}", err=True)
        return ""
    tell_unreadable(run)
    return f"{told.experiment} at {told.uri}"


def _store_of(run: RunDir) -> str:
    from ..tracking.mlflow import store_uri

    plan = rundir.read_json(run.plan)
    return store_uri(sites.load(plan["site"]), Path(plan["project"]))


def is_delivered(run: RunDir, state: queue.State) -> bool:
    """Whether MLflow has all of a run, at the address that it would be delivered to now."""
    from ..tracking import mlflow

    with contextlib.suppress(HpcmlError, KeyError):
        return mlflow.is_delivered(run, _store_of(run), state=state.name if state.is_final else "")
    return False


@contextlib.contextmanager
def _counting() -> "Iterator[Callable[[int, float], None] | None]":
    """On a terminal, show how many points were sent: a million take minutes."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status("delivering to MLflow …") as live:
        yield lambda points, share: live.update(f"delivering to MLflow: {points:,} points, {share:.0%}")


def tell_unreadable(run: RunDir) -> int:
    """Name on stderr the lines of a delivered run's journal that are no record; returns how many there are."""
    from ..tracking.mlflow import noted

    known = noted(run)
    for file, line, text in known.unreadable:
        path = run.events / file
        click.echo(f"hpcml: {path} line {line} is no record, all others are delivered: {text!r}", err=True)
    if known.skipped > len(known.unreadable):
        click.echo(f"hpcml: and {known.skipped - len(known.unreadable):,} lines more", err=True)
    return known.skipped


def summary(run: RunDir, state: queue.State) -> str:
    """Return what a person wants to know of a run, in a few lines."""
    took = f" in {duration(state.ended - state.started)}" if state.started and state.ended else ""
    lines = [f"{state_word(state.name)} {run.id}{took}"]
    if state.reason:
        lines.append(f"  reason    {state.reason}")
    if state.progress and not state.is_final:
        lines.append(f"  progress  {state.progress}")
    if state.slurm_job_id:
        lines.append(f"  slurm     job {state.slurm_job_id}, {state.told_by}")
    if state.replicas_in_sync:
        lines.append(f"  replicas  {state.replicas_in_sync} in sync")
    metrics = _last_metrics(run)
    if metrics:
        lines.append("  metrics   " + ", ".join(f"{name} {number(value)}" for name, value in metrics.items()))
    if state.is_final and (step := resumable.step_to_resume(run, state.name, state.exit_code)) is not None:
        lines.append(f"  resume    {resumable.in_words(run.id, step)}")
    lines.append(f"  files     {run.path}")
    if run.notebook(0).exists():
        lines.append(f"  notebook  {run.notebook(0)}")
    return "\n".join(lines)


def tell_places(run: RunDir, delivered: str) -> None:
    """Print where a run's report is, and where it is in MLflow."""
    if run.report.exists():
        click.echo(f"  report    {run.report}")
    if delivered:
        click.echo(f"  mlflow    {delivered}")


def duration(seconds: float) -> str:
    """Return a length of time: seconds to a tenth below a minute, else ``HH:MM:SS``."""
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def _last_metrics(run: RunDir) -> dict[str, float]:
    wanted = ("accuracy", "val_accuracy", "loss", "val_loss", "samples_per_s")
    newest: dict[str, float] = {}
    for record in journal.read(run.events, kinds={"metric"}):
        if record["rank"] == 0:
            newest |= record["values"]
    return {name: newest[name] for name in wanted if name in newest}


@dataclass(frozen=True)
class _Ticking:
    """A state's line, made anew each time that rich draws it, so that its clock goes on between two states."""

    state: queue.State

    def __rich__(self) -> "Text":
        from rich.text import Text

        return Text(_progress_line(self.state))


def _progress_line(state: queue.State) -> str:
    since = f" {clock(max(0.0, time.time() - state.since))}" if state.since and not state.is_final else ""
    parts = [f"{state.name}{since}", state.reason if not state.is_final else "", state.progress]
    job = f"job {state.slurm_job_id}: " if state.slurm_job_id else ""
    return job + " · ".join(part for part in parts if part)
