"""Commands about a job: init, check, render, run, submit."""

import importlib
import os
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import job as jobs
from .. import pipeline, rundir
from ..errors import DONE, INTERRUPTED, HpcmlError
from ..launch.prepare import Prepared, needs_framework, prepare
from .root import json_option, site_option, steps_options

if TYPE_CHECKING:
    from ..pipeline.ready import Ready
    from . import show


class _Pair(click.ParamType[Any]):
    name = "KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        key, mark, text = value.partition("=")
        if not mark or not key:
            option = param.opts[0] if param else ""
            example = "--set resources.nodes=2" if option == "--set" else "-p epochs=10"
            raise HpcmlError(
                f"{value!r} is not KEY=VALUE", origin=option, allowed="KEY=VALUE", fix=f"such as {example}"
            )
        return key, text


job_argument = click.argument("job", type=click.Path(path_type=Path))
params_option = click.option(
    "-p", "--param", "params", multiple=True, type=_Pair(), help="Set a parameter of the work."
)
set_option = click.option(
    "--set", "settings", multiple=True, type=_Pair(), help="Set a key of the job: table.key=value."
)


def _is_chain(job: Path, only: Sequence[str] = (), start: str | None = None, of: str | None = None) -> bool:
    found = pipeline.is_chain(job)
    if (only or start or of) and not found:
        option = "--step" if only else "--from" if start else "--of"
        raise HpcmlError(
            f"{job} has no steps", origin=option, fix="a chain is a file with [[steps]]: jobs/retrain.toml"
        )
    return found


@click.command("init")
@click.argument("script", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The job file; default jobs/<script>.toml.")
def init_command(script: Path, output: Path | None) -> int:
    """Write a job file for a script or notebook."""
    project = jobs.project_of(script)
    if os.path.isdir(script):
        raise HpcmlError(f"{script} is a folder, not a script or notebook", fix="name a file in it")
    if not os.path.isfile(script):
        raise HpcmlError(f"no script or notebook at {script}", fix="check the path")
    name = re.sub(r"[^A-Za-z0-9._-]", "-", script.stem)[:64].lstrip("._-") or "job"
    target = output or project / "jobs" / f"{name}.toml"
    if target.exists():
        raise HpcmlError(f"{target} is there already", fix="edit it, or choose another with -o")
    kind = "notebook" if script.suffix == ".ipynb" else "script"
    found = re.search(r"begin\([^)]*strategy\s*=\s*\\?[\"'](\w+)", script.read_text(encoding="utf-8", errors="replace"))
    strategy = found[1] if found and found[1] in jobs.STRATEGIES else None
    relative = os.path.relpath(script.absolute(), project)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_template(name, kind, relative, strategy), encoding="utf-8")
    click.echo(f"wrote {os.path.relpath(target)}\n  next: hpcml check {os.path.relpath(target)}")
    return DONE


def _template(name: str, kind: str, path: str, strategy: str | None) -> str:
    chosen = (
        f'strategy = "{strategy}"'
        if strategy
        else '# strategy = "mirrored"        # original | mirrored | multiworker | ddp | horovod'
    )
    quoted = path.replace("\\", "\\\\").replace('"', '\\"')
    return f"""\
name     = "{name}"
{kind:<8} = "{quoted}"     # relative to the project
{chosen}

[resources]
nodes          = 1
gpus_per_node  = {2 if strategy else 0}
tasks_per_node = {2 if strategy in ("ddp", "horovod") else 1}
# cpus_per_task = 32              # default: the site's cores per GPU
# mem_gb        = 32              # GiB a node
time           = "00:30:00"

[params]                          # go to the script's or notebook's parameters
"""


@click.command("render")
@job_argument
@params_option
@set_option
@steps_options
@site_option
def render_command(
    job: Path,
    params: tuple[Any, ...],
    settings: tuple[Any, ...],
    only: tuple[str, ...],
    start: str | None,
    of: str | None,
    site: str | None,
) -> int:
    """Print the batch script of a job, or those of a chain's steps."""
    if _is_chain(job, only, start, of):
        from . import chain

        return chain.render(chain.prepared(job, site, params, settings, only, start, of, ask_queue=False)[0])
    from ..launch import sbatch

    ready = prepare(job, site, dict(params), dict(settings), ask_queue=False)
    click.echo(sbatch.render(ready.plan, ready.site, ready.overrides), nl=False)
    return DONE


@click.command("check")
@job_argument
@params_option
@set_option
@site_option
@json_option
def check_command(
    job: Path, params: tuple[Any, ...], settings: tuple[Any, ...], site: str | None, as_json: bool
) -> int:
    """Preflight: limits, start estimate, file systems, environment; nothing is created or submitted."""
    if _is_chain(job):
        from . import chain

        return chain.check(chain.prepared(job, site, params, settings, (), None, None)[0], as_json)
    from ..preflight import check
    from . import show

    return show.findings(check(prepare(job, site, dict(params), dict(settings))), as_json)


@click.command("run")
@job_argument
@params_option
@set_option
@steps_options
@site_option
@json_option
def run_command(
    job: Path,
    params: tuple[Any, ...],
    settings: tuple[Any, ...],
    only: tuple[str, ...],
    start: str | None,
    of: str | None,
    site: str | None,
    as_json: bool,
) -> int:
    """Run a job here and now, in the foreground: on this machine, or inside an allocation; a chain step by step."""
    if _is_chain(job, only, start, of):
        from . import chain

        found, root = chain.prepared(job, site, params, settings, only, start, of, here=True)
        needs_allocation(found)
        return chain.run(found, root, as_json)
    from ..launch import local
    from ..tracking import follow

    ready = prepare(job, site, dict(params), dict(settings), here=True)
    needs_allocation(ready)
    needs_framework(ready.plan)
    run = local.make(ready.plan, rundir.runs_root(ready.site, Path(ready.plan.project)))
    announce(ready, f"run {run.id}", to_stderr=as_json)
    with follow.from_outside(run) as follower:
        with quiet_stdout(as_json):
            local.run(ready.plan, run)
        return ended(run, as_json, log_tail=False, follower=follower)


@click.command("submit")
@job_argument
@params_option
@set_option
@steps_options
@site_option
@json_option
@click.option("--wait", is_flag=True, help="Wait for the end and show progress; Ctrl-C leaves the job.")
@click.option("--dry-run", is_flag=True, help="Print the very script that would be submitted, and stop.")
def submit_command(
    job: Path,
    params: tuple[Any, ...],
    settings: tuple[Any, ...],
    only: tuple[str, ...],
    start: str | None,
    of: str | None,
    site: str | None,
    as_json: bool,
    wait: bool,
    dry_run: bool,
) -> int:
    """Queue a job; prints run and job id. A chain becomes a job for each step, each waiting for those that it needs."""
    if _is_chain(job, only, start, of):
        from . import chain

        found, root = chain.prepared(job, site, params, settings, only, start, of)
        return chain.render(found) if dry_run else chain.submit(found, root, as_json, wait=wait)
    # Slurm's answer takes as long as importing these: both at once.
    threading.Thread(target=importlib.import_module, args=("hpcml.launch.slurm",), daemon=True).start()
    ready = prepare(job, site, dict(params), dict(settings))
    from ..launch import sbatch, slurm

    script = sbatch.render(ready.plan, ready.site, ready.overrides)
    if dry_run:
        click.echo(script, nl=False)
        return DONE
    needs_framework(ready.plan)
    run, job_id = slurm.submit(ready.plan, ready.site, script)
    if as_json and not wait:
        from . import show

        show.echo_json({"run": run.id, "slurm_job_id": job_id, "path": str(run.path)})
    else:
        announce(ready, f"run {run.id}, job {job_id}", to_stderr=as_json)
    return wait_for(run, as_json) if wait else DONE


def wait_for(run: rundir.RunDir, as_json: bool) -> int:
    """Wait for a queued run, delivering meanwhile; an interrupted wait leaves the job."""
    from ..tracking import follow
    from . import show

    with follow.from_outside(run) as follower:
        try:
            show.wait(run)
        except KeyboardInterrupt:
            click.echo(f"\nhpcml: no longer waiting; the job goes on. To cancel it: hpcml cancel {run.id}", err=True)
            return INTERRUPTED
        return ended(run, as_json, follower=follower)


def ended(run: rundir.RunDir, as_json: bool, *, log_tail: bool = True, follower: "show.Follower" = None) -> int:
    """Say how a run ended and return the exit code: 130 where the person ended it."""
    from .. import queue
    from . import show

    state = queue.state_of(run)
    with quiet_stdout(as_json):
        code = show.finish(run, state, log_tail=log_tail, follower=follower)
    if as_json:
        show.echo_json(vars(state) | {"path": str(run.path)})
    return INTERRUPTED if state.name == "CANCELLED" and not state.slurm_job_id else code


def announce(ready: Prepared, what: str, *, to_stderr: bool) -> None:
    """Say what starts, where and why there, and what was capped."""
    click.echo(f"hpcml: {what} · site {ready.site.name} ({ready.why})", err=to_stderr)
    for note in ready.plan.notes:
        click.echo(f"  note: {note}", err=to_stderr)


def needs_allocation(ready: "Prepared | Ready") -> None:
    """Refuse to run at a cluster's site outside an allocation."""
    if ready.site.scheduler == "slurm" and not os.environ.get("SLURM_JOB_ID"):
        raise HpcmlError(
            f"site {ready.site.name!r} has a queue, and this is no allocation of it",
            fix="hpcml submit JOB, ./interactive_1node_2gpus.sh first, or --site local for this machine",
        )


class quiet_stdout:
    """Send what is printed to stderr while JSON is wanted on stdout, child processes included."""

    def __init__(self, active: bool) -> None:
        self.active = active

    def __enter__(self) -> None:
        if self.active:
            sys.stdout.flush()
            self.kept = os.dup(1)
            os.dup2(2, 1)

    def __exit__(self, *unused: object) -> None:
        if self.active:
            sys.stdout.flush()
            os.dup2(self.kept, 1)
            os.close(self.kept)
