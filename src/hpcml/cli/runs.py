"""Commands about runs: status, logs, cancel, sync, runs."""

import contextlib
import shutil
import time
from pathlib import Path

import click

from .. import queue, rundir
from ..errors import DONE, SERVICE_SILENT, HpcmlError, ServiceSilent
from . import show
from .root import json_option, site_option

run_argument = click.argument("run", required=False)


@click.command("status")
@run_argument
@site_option
@json_option
def status_command(run: str | None, site: str | None, as_json: bool) -> int:
    """Show a run's state: RUN is a run id, a Slurm id, or left out for the newest."""
    found = rundir.find(show.root_of(site), run)
    state = queue.state_of(found)
    if as_json:
        show.echo_json(vars(state) | {"path": str(found.path)})
    else:
        click.echo(show.summary(found, state))
        if state.is_final:
            where = "delivered" if found.delivered.exists() else f"not delivered: hpcml sync {found.id}"
            click.echo(f"  mlflow    {where}")
    return DONE


@click.command("logs")
@run_argument
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come, until the run ends.")
@click.option("--rank", type=click.IntRange(min=0), help="Only this rank.")
@site_option
def logs_command(run: str | None, follow: bool, rank: int | None, site: str | None) -> int:
    """Print the ranks' logs."""
    found = rundir.find(show.root_of(site), run)
    if rank is not None:
        _has_rank(found, rank)
    if follow:
        for path, line in queue.follow(found, lambda: _has_ended(found)):
            if rank is None or path.name == f"out.{rank}.txt":
                click.echo(f"{_prefix(found, path)}{line}")
        return DONE
    paths = [p for p in queue.log_paths(found) if rank is None or p.name == f"out.{rank}.txt"]
    shown = [p for p in paths if p.name.startswith("out.")] or paths
    if not shown:
        click.echo(f"hpcml: {found.id} has no logs yet ({queue.state_of(found).name})", err=True)
    for path in shown:
        prefix = _prefix(found, path) if len(shown) > 1 else ""
        with path.open(errors="replace") as file:
            for line in file:
                click.echo(prefix + line, nl=line.endswith("\n") is False)
    return DONE


def _has_rank(run: rundir.RunDir, rank: int) -> None:
    plan = rundir.read_json(run.plan)
    tasks = int(plan.get("nodes", 1)) * int(plan.get("tasks_per_node", 1))
    if rank >= tasks:
        raise HpcmlError(f"run {run.id} has no rank {rank}", origin="--rank", allowed=f"0 to {tasks - 1}")


def _has_ended(run: rundir.RunDir) -> bool:
    """Whether a run has ended; a controller that does not answer for a while is no end."""
    with contextlib.suppress(ServiceSilent):
        return queue.state_of(run).is_final
    return False


def _prefix(run: rundir.RunDir, path: Path) -> str:
    rank = path.name.split(".")[1] if path.name.startswith("out.") else "slurm"
    variant = f"{path.parent.parent.name} " if path.parent.parent != run.path else ""
    return f"[{variant}{rank}] "


@click.command("cancel")
@run_argument
@site_option
def cancel_command(run: str | None, site: str | None) -> int:
    """Cancel a run's Slurm job."""
    found = rundir.find(show.root_of(site), run)
    before = queue.cancel(found)
    if before.is_final:
        click.echo(f"{found.id} has ended already: {show.state_word(before.name)}")
    else:
        click.echo(f"cancelled job {before.slurm_job_id} of {found.id}")
    return DONE


@click.command("sync")
@click.argument("runs", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every run in the runs folder.")
@site_option
def sync_command(runs: tuple[str, ...], everything: bool, site: str | None) -> int:
    """Deliver runs to MLflow; what is there already is not sent again."""
    root = show.root_of(site)
    if everything:
        wanted = list(rundir.every(root))[::-1]
    else:
        wanted = [rundir.find(root, reference) for reference in runs or (None,)]
    from ..tracking.mlflow import is_delivered

    new = [run for run in wanted if not is_delivered(run)]
    if everything and len(new) < len(wanted):
        there = len(wanted) - len(new)
        click.echo(f"{there} run{' is' if there == 1 else 's are'} in MLflow already")
    delivered = [
        (run, show.deliver(run, announce=number == 0)) for number, run in enumerate(new if everything else wanted)
    ]
    for run, where in delivered:
        if where:
            click.echo(f"{run.id} is in MLflow: {where}")
    return DONE if all(where for _, where in delivered) else SERVICE_SILENT


@click.group("runs")
def runs_command() -> None:
    """List and prune run directories."""


@runs_command.command("list")
@click.option("-n", "--number", default=20, show_default=True, type=click.IntRange(min=1), help="The newest so many.")
@site_option
@json_option
def list_runs(number: int, site: str | None, as_json: bool) -> int:
    """List the newest runs."""
    root = show.root_of(site)
    newest = [run for _, run in zip(range(number), rundir.every(root), strict=False)]
    states = [queue.state_of(run) for run in newest]
    if as_json:
        show.echo_json([vars(state) for state in states])
        return DONE
    if not states:
        click.echo(f"no runs in {root} yet: hpcml run JOB, hpcml submit JOB")
        return DONE
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("run", "state", "job", "replicas", "time", "reason"):
        numbers = heading in ("job", "replicas", "time")
        table.add_column(heading, justify="right" if numbers else "left", no_wrap=heading in ("run", "state", "time"))
    for state in states:
        took = show.duration((state.ended or time.time()) - state.started) if state.started else ""
        job, replicas = str(state.slurm_job_id or ""), str(state.replicas_in_sync or "")
        colour = show.COLOURS.get(state.name, "red")
        why = state.reason or ("" if state.is_final else state.progress)
        why = escape(why)
        name = f"  └ {state.run_id.split('/')[1]}" if "/" in state.run_id else state.run_id
        table.add_row(name, f"[{colour}]{state.name}[/]", job, replicas, took, why)
    Console().print(table)
    return DONE


@runs_command.command("prune")
@click.option("--keep", default=20, show_default=True, type=click.IntRange(min=0), help="Keep the newest so many.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@site_option
def prune_runs(keep: int, yes: bool, site: str | None) -> int:
    """Delete the oldest ended runs that MLflow has; a run that is not delivered or not ended is kept."""
    from ..tracking.mlflow import is_delivered

    root = show.root_of(site)
    tops = [run for run in rundir.every(root) if "/" not in run.id]
    old = [
        run
        for run in tops[keep:]
        if queue.state_of(run).is_final and all(map(is_delivered, [run, *rundir.children(run)]))
    ]
    kept = len(tops[keep:]) - len(old)
    for run in old:
        click.echo(run.id)
    if kept:
        click.echo(f"{kept} older runs are kept: not ended, or not delivered (hpcml sync --all)", err=True)
    if not old:
        click.echo(f"nothing to prune in {root}")
        return DONE
    if not yes:
        click.confirm(f"delete these {len(old)} runs from {root}?", abort=True)
    for run in old:
        try:
            shutil.rmtree(run.path)
        except OSError as error:
            raise HpcmlError(f"{run.path} can't be deleted: {error.strerror}") from None
    click.echo(f"deleted {len(old)} runs")
    return DONE
