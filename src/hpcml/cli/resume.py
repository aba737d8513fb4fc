"""The command that lets an ended run go on from its checkpoint."""

import click

from .. import queue, rundir
from ..errors import DONE
from ..launch import local, resume
from ..tracking import follow
from . import show
from .jobs import ended, quiet_stdout, wait_for
from .root import json_option, site_option


@click.command("resume")
@click.argument("run", required=False)
@click.option("--wait", is_flag=True, help="Wait for the end and show progress; Ctrl-C leaves the job.")
@site_option
@json_option
def resume_command(run: str | None, wait: bool, site: str | None, as_json: bool) -> int:
    """Let an ended run go on from its checkpoint: RUN is a run id, a Slurm id, or left out for the newest.

    A chain goes on from the steps that did not complete. The code is the run's own, as it was submitted. A run of the
    queue is queued again, another one runs here.
    """
    found = rundir.find(show.root_of(site), run)
    whole = (queue.chain_of(found) or (found,))[0]
    if queue.is_chain(whole):
        from . import chain

        return chain.resume(whole, as_json, wait=wait)
    plan = resume.ready(found)
    step = rundir.kept_at(found)[1]
    job_id = resume.begin(found, plan)
    what = f"run {found.id}, job {job_id}" if job_id else f"run {found.id}"
    if as_json and job_id and not wait:
        show.echo_json({"run": found.id, "slurm_job_id": job_id, "path": str(found.path), "step": step})
        return DONE
    click.echo(f"hpcml: {what} goes on from step {step}", err=as_json)
    if job_id:
        return wait_for(found, as_json) if wait else DONE
    with follow.from_outside(found) as follower:
        with quiet_stdout(as_json):
            local.run(plan, found)
        return ended(found, as_json, log_tail=False, follower=follower)
