"""Submit a plan to Slurm: run directory, snapshot and script first, then sbatch; nothing stays behind on a refusal."""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import provision, rundir
from ..errors import HpcmlError
from ..node import bootstrap
from ..plan import Plan
from ..rundir import RunDir
from ..site import Site
from ..slurm import commands
from . import sbatch
from .prepare import with_data


def submit(plan: Plan, site: Site, script: str) -> tuple[RunDir, int]:
    """Queue a plan's script.

    Args:
        script: the text that ``sbatch.render`` gave; it is kept in the run directory and submitted from there.

    Returns:
        The run directory and Slurm's job id.

    Raises:
        HpcmlError: sbatch refused; the run directory is removed again.
    """
    find_sbatch()
    plan = with_data(plan)
    root = rundir.runs_root(site, Path(plan.project))
    run = rundir.create(root, plan.name)
    try:
        provision.fill(run, plan, packed=True)
        return run, queue(run, plan, script)
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise


def submit_comparison(parent: Plan, plans: Sequence[Plan], site: Site) -> tuple[RunDir, int]:
    """Queue a comparison as one job; each variant has its own run directory below the parent's."""
    find_sbatch()
    plans = [with_data(plan) for plan in plans]
    root = rundir.runs_root(site, Path(parent.project))
    run = rundir.create(root, parent.name)
    try:
        rundir.write_json(run.plan, parent.to_json())
        for plan in plans:
            child = run.child(plan.name).make()
            provision.fill(child, plan, packed=True)
        return run, queue(run, parent, sbatch.render_comparison(parent, plans, site))
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise


def environment_for(run: RunDir, plan: Plan, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment to submit in: nothing of an enclosing allocation, and the run's name."""
    source = os.environ if environment is None else environment
    own = {"HPCML_RUN": run.id, "HPCML_RUNS": str(run.root), "HPCML_PROJECT": plan.project, "HPCML_SUBMITTED": "1"}
    outer = commands.clean_environment(bootstrap.outer_environment(source))
    return {name: value for name, value in outer.items() if name != "CUDA_VISIBLE_DEVICES"} | own


def queue(run: RunDir, plan: Plan, script: str, options: Sequence[str] = ()) -> int:
    """Submit a script from a run's directory, which keeps it; returns Slurm's job id.

    Args:
        options: further ones of sbatch.

    Raises:
        HpcmlError: sbatch refused.
    """
    rundir.write_bytes(run.script, script.encode())
    folder = str(run.logs).replace("%", "%%")  # sbatch(1), FILENAME PATTERN
    output = f"--output={folder}/slurm-%j.out"
    job_id = commands.submit(run.script, environment_for(run, plan), Path(plan.project), [output, *options])
    rundir.write_json(
        run.submitted, {"slurm_job_id": job_id, "submitted": time.time(), "cluster": commands.cluster_name()}
    )
    return job_id


def find_sbatch() -> None:
    """Refuse to go on where there is no Slurm."""
    if not shutil.which("sbatch"):
        raise HpcmlError(
            "sbatch is not on PATH: no Slurm here",
            fix="log in to the cluster, practise with scripts/devcluster, or run it here: hpcml run JOB",
        )
