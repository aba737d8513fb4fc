"""Commands about runs: status, logs, cancel, sync, runs."""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import queue, report, rundir
from ..errors import DONE, JOB_FAILED, SERVICE_SILENT, HpcmlError, ServiceSilent
from . import show
from .prune import prune_command
from .root import json_option, site_option

if TYPE_CHECKING:
    from rich.text import Text

# Slurm's controller serves everybody: who follows a log asks it this often whether the job still runs.
ASK_S = 5.0
# A reason beside its run has this many columns at least, or stands below it.
LEAST_REASON = 40
_HEADINGS = ("run", "state", "job", "replicas", "time")
RANK_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "bright_red", "bright_cyan", "bright_magenta")

run_argument = click.argument("run", required=False)


@click.command("status")
@run_argument
@site_option
@json_option
def status_command(run: str | None, site: str | None, as_json: bool) -> int:
    """Show a run's state: RUN is a run id, a Slurm id, or left out for the newest."""
    found = rundir.find(show.root_of(site), run)
    state = queue.state_of(found)
    if as_json and queue.is_chain(found):
        from . import chain

        show.echo_json(chain.as_data(found, state))
    elif as_json:
        show.echo_json(vars(state) | {"path": str(found.path)})
    else:
        if state.is_final:  # of a killed run nobody has made one yet
            report.ensure(found, state=state.name, reason=state.reason)
        click.echo(_summary(found, state))
        from ..tracking.mlflow import is_delivered

        some = "not all delivered" if found.delivered.exists() else "not delivered"
        where = "delivered" if is_delivered(found, state=state.name) else f"{some}: hpcml sync {found.id}"
        show.tell_places(found, where if state.is_final else "")
    return DONE


def _summary(run: rundir.RunDir, state: queue.State) -> str:
    if not queue.is_chain(run):
        return show.summary(run, state)
    from . import chain

    return chain.summary(run, state)


@click.command("logs")
@run_argument
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come, until the run ends.")
@click.option("--rank", type=click.IntRange(min=0), help="Only this rank.")
@site_option
@json_option
def logs_command(run: str | None, follow: bool, rank: int | None, site: str | None, as_json: bool) -> int:
    """Print the ranks' logs; with --json an object for each line."""
    found = rundir.find(show.root_of(site), run)
    if rank is not None:
        _has_rank(found, rank)
    paths = [p for p in queue.log_paths(found) if rank is None or p.name == f"out.{rank}.txt"]
    shown = [p for p in paths if p.name.startswith("out.")] or paths
    if follow:
        lines = queue.follow(found, _ended(found))
    else:
        lines = ((path, line) for path in shown for line in queue.lines_of(path))
        if not shown:
            click.echo(f"hpcml: {found.id} has no logs yet", err=True)
    for path, line in lines:
        if rank is not None and path.name != f"out.{rank}.txt":
            continue
        if as_json:
            click.echo(json.dumps({**_place(found, path), "line": line}, ensure_ascii=False))
        else:
            click.echo((_prefix(found, path) if follow or len(shown) > 1 else "") + line)
    return DONE


def _has_rank(run: rundir.RunDir, rank: int) -> None:
    plan = rundir.read_json(run.plan)
    tasks = int(plan.get("nodes", 1)) * int(plan.get("tasks_per_node", 1))
    if rank >= tasks:
        raise HpcmlError(f"run {run.id} has no rank {rank}", origin="--rank", allowed=f"0 to {tasks - 1}")


def _ended(run: rundir.RunDir) -> Callable[[], bool]:
    """What tells whether a run has ended: its marker is looked at each time, Slurm is asked now and then.

    A controller that does not answer for a while is no end.
    """
    ask_at = 0.0

    def ended() -> bool:
        nonlocal ask_at
        marked = bool(rundir.read_json(run.status).get("final"))
        if not marked and rundir.slurm_job_id(run) is not None and time.monotonic() < ask_at:
            return False
        ask_at = time.monotonic() + ASK_S
        with contextlib.suppress(ServiceSilent):
            return queue.state_of(run).is_final
        return False

    return ended


def _place(run: rundir.RunDir, path: Path) -> dict[str, str | int | None]:
    """Whose log a file is: rank (None: Slurm's own), and of a comparison or array the run below."""
    below = path.parent.parent.name if path.parent.parent != run.path else None
    rank = int(path.name.split(".")[1]) if path.name.startswith("out.") else None
    return {"rank": rank} if below is None else {"run": below, "rank": rank}


def _prefix(run: rundir.RunDir, path: Path) -> str:
    place = _place(run, path)
    rank = place["rank"]
    words = [str(place["run"])] if "run" in place else []
    colour = RANK_COLOURS[rank % len(RANK_COLOURS)] if isinstance(rank, int) else None
    return click.style(f"[{' '.join([*words, 'slurm' if rank is None else str(rank)])}] ", fg=colour)


@click.command("cancel")
@run_argument
@site_option
@json_option
def cancel_command(run: str | None, site: str | None, as_json: bool) -> int:
    """Cancel a run: its Slurm job, or its processes where it runs on this machine."""
    found = rundir.find(show.root_of(site), run)
    before = queue.cancel(found)
    if as_json:
        own = {"run_id": found.id, "slurm_job_id": before.slurm_job_id}
        show.echo_json({**own, "state_before": before.name, "cancelled": not before.is_final})
    elif before.is_final:
        click.echo(f"{found.id} has ended already: {show.state_word(before.name)}")
    else:
        job = f"job {before.slurm_job_id} of " if before.slurm_job_id else ""
        click.echo(f"cancelled {job}{found.id}")
    return DONE


@click.command("sync")
@click.argument("runs", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every run in the runs folder.")
@site_option
@json_option
def sync_command(runs: tuple[str, ...], everything: bool, site: str | None, as_json: bool) -> int:
    """Deliver runs to MLflow; what is there already is not sent again. Lines that are no records are named (exit 1)."""
    if everything and runs:
        raise HpcmlError(f"--all means every run, and {' '.join(runs)} is named too", fix="leave out one of them")
    from ..tracking import store

    if typed := os.environ.get("MLFLOW_TRACKING_URI"):
        store.check_typed(typed)
    root = show.root_of(site)
    if everything:
        wanted = list(rundir.every(root))[::-1]
    else:
        wanted = [rundir.find(root, reference) for reference in runs or (None,)]
    from ..tracking.mlflow import noted

    for run in wanted:
        if queue.is_chain(run) and not rundir.read_json(run.status).get("final"):
            from . import chain

            for words in chain.settle(run):
                click.echo(words, err=as_json)
    new = [
        run for run, state in zip(wanted, queue.states_of(wanted)[0], strict=True) if not show.is_delivered(run, state)
    ]
    if everything and len(new) < len(wanted):
        there = len(wanted) - len(new)
        click.echo(f"{there} run{' is' if there == 1 else 's are'} in MLflow already", err=as_json)
    delivered = [
        (run, show.deliver(run, announce=number == 0)) for number, run in enumerate(new if everything else wanted)
    ]
    if as_json:
        show.echo_json([{"run_id": run.id, "delivered": bool(where), "mlflow": where} for run, where in delivered])
    else:
        for run, where in delivered:
            if where:
                click.echo(f"{run.id} is in MLflow: {where}")
    if not all(where for _, where in delivered):
        return SERVICE_SILENT
    return JOB_FAILED if any(noted(run).skipped for run, _ in delivered) else DONE


@click.group("runs")
def runs_command() -> None:
    """List and prune run directories."""


runs_command.add_command(prune_command)


def _newest(root: Path, number: int) -> list[rundir.RunDir]:
    """The newest runs, those below a run after it, in its order."""
    tops = (run for run in rundir.every(root) if "/" not in run.id)
    return list(itertools.islice((one for top in tops for one in (top, *queue.children(top))), number))


@runs_command.command("list")
@click.option("-n", "--number", default=20, show_default=True, type=click.IntRange(min=1), help="The newest so many.")
@site_option
@json_option
def list_runs(number: int, site: str | None, as_json: bool) -> int:
    """List the newest runs."""
    root = show.root_of(site)
    states, silence = queue.states_of(_newest(root, number))
    if silence is not None:
        click.echo(f"hpcml: shown as last known: {silence}", err=True)
    if as_json:
        show.echo_json([vars(state) for state in states])
        return DONE
    if not states:
        click.echo(f"no runs in {root} yet: hpcml run JOB, hpcml submit JOB")
        return DONE
    from rich.console import Console

    console = Console(highlight=False)
    for line in _listed(states, console.width):
        console.print(line, no_wrap=True, overflow="ellipsis", crop=False)
    return DONE


def _listed(states: "list[queue.State]", width: int) -> "list[Text]":
    """The runs as lines of a table: no column that is empty for all, a reason below its run where beside it is no room."""
    from rich.text import Text

    rows = [_row(state) for state in states]
    shown = [n for n in range(len(_HEADINGS)) if n < 2 or any(row[n] for row in rows)]
    widths = {n: max(len(_HEADINGS[n]), *(len(row[n]) for row in rows)) for n in shown}
    others = sum(size + 2 for n, size in widths.items() if n > 0)
    name_width = widths[0] = max(len(_HEADINGS[0]), min(widths[0], width - others))
    reasons = [_reason(state) for state in states]
    room = width - name_width - others - 2
    beside = room >= min(LEAST_REASON, max(map(len, reasons)))

    def line(cells: list[str], colour: str) -> Text:
        made = Text()
        for n in shown:
            cell = cells[n].rjust(widths[n]) if n > 1 else cells[n].ljust(widths[n])
            made.append(("  " if n else "") + cell, colour if n == 1 else "")
        return made

    lines = [line(list(_HEADINGS), "")]
    if any(reasons) and beside:
        lines[0].append("  reason")
    lines[0].stylize("bold")
    for state, row, reason in zip(states, rows, reasons, strict=True):
        if len(row[0]) > name_width:  # a long name takes a line of its own
            lines.append(Text(row[0]))
            row = ["", *row[1:]]
        lines.append(line(row, show.COLOURS.get(state.name, "red")))
        if reason and beside:
            lines[-1].append("  " + _cut(reason, room))
        elif reason:
            lines.append(Text("      " + _cut(reason, width - 6), "dim"))
        lines[-1].rstrip()
    return lines


def _row(state: queue.State) -> list[str]:
    took = show.duration((state.ended or time.time()) - state.started) if state.started else ""
    name = f"  └ {state.run_id.split('/')[1]}" if "/" in state.run_id else state.run_id
    return [name, state.name, str(state.slurm_job_id or ""), str(state.replicas_in_sync or ""), took]


def _reason(state: queue.State) -> str:
    return " ".join((state.reason or ("" if state.is_final else state.progress)).split())


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"
