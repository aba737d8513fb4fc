"""The compare command."""

import os
from pathlib import Path
from typing import Any

import click

from .. import queue, rundir
from ..errors import DONE, INTERRUPTED, JOB_FAILED, HpcmlError
from ..launch.prepare import prepare
from . import jobs, show
from .root import json_option, site_option


@click.command("compare")
@click.argument("job_files", metavar="JOB...", nargs=-1, required=True, type=click.Path(path_type=Path))
@jobs.params_option
@jobs.set_option
@site_option
@json_option
def compare_command(
    job_files: tuple[Path, ...], params: tuple[Any, ...], settings: tuple[Any, ...], site: str | None, as_json: bool
) -> int:
    """Run jobs that differ only in strategy, one after the other, and compare them fairly.

    On this machine or inside an allocation they run here; on a cluster as one queued job of the largest request.
    """
    from .. import compare
    from ..tracking import follow

    prepared = [prepare(path, site, dict(params), dict(settings)) for path in job_files]
    first = prepared[0]
    plans = [ready.plan for ready in prepared]
    parent = compare.parent_of(plans)
    here = first.site.scheduler != "slurm" or bool(os.environ.get("SLURM_JOB_ID"))
    compare.need_environments(plans, here=here)
    if here:
        run = compare.start_here(parent, plans, first.site)
        jobs.announce(first, f"comparison {run.id}", to_stderr=as_json)
    else:
        run, job_id = compare.submit(parent, plans, first.site)
        jobs.announce(first, f"comparison {run.id}, job {job_id}", to_stderr=as_json)
    with follow.from_outside(run) as follower:
        if here:
            with jobs.quiet_stdout(as_json):
                compare.run_here(run, plans, lambda text: click.secho(text, bold=True))
        else:
            try:
                show.wait(run)
            except KeyboardInterrupt:
                text = f"no longer waiting; the job goes on. To cancel it: hpcml cancel {run.id}"
                click.echo(f"\nhpcml: {text}", err=True)
                return INTERRUPTED
        return _report(run, as_json, follower)


def _report(run: rundir.RunDir, as_json: bool, follower: "show.Follower") -> int:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from .. import compare
    from ..report import comparison, plot

    children = compare.children(run)
    states = [queue.state_of(child).name for child in children]
    measured = comparison.compare(children)
    rundir.write_json(run.comparison, comparison.to_json(measured))
    with jobs.quiet_stdout(as_json):
        click.echo()
        console = Console()
        console.print(comparison.table(measured))
        for note in measured.notes:
            console.print(Padding(Text(note), (0, 0, 0, 2)))
        try:
            plot.plot(measured, run.plot)
            click.echo(f"\n  plot      {run.plot}")
        except HpcmlError as error:
            click.echo(f"\nhpcml: no plot: {error}", err=True)
        click.echo(f"  files     {run.path}")
        delivered = show.deliver(run, follower=follower)
        for child in children:
            show.deliver(child, announce=False)
        if delivered:
            click.echo(f"  mlflow    {delivered}")
    if as_json:
        show.echo_json(comparison.to_json(measured))
    if "CANCELLED" in states and not rundir.slurm_job_id(run):
        return INTERRUPTED
    return DONE if all(name == "COMPLETED" for name in states) else JOB_FAILED
