"""From a job file and a site's name to a plan: the one way in for every command."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import facts, job, plan
from .. import site as sites
from ..errors import HpcmlError
from ..interpreter import python_of
from ..node import devices, topology
from ..plan import Plan
from ..slurm import commands

# Package → the extra that brings it.
_EXTRAS = {
    "tensorflow": "tensorflow",
    "tf_keras": "tensorflow",
    "papermill": "notebook",
    "ipykernel": "notebook",
    "mlflow": "mlflow",
    "mlxtend": "data",
}


@dataclass(frozen=True)
class Prepared:
    """A plan, the site it is for, and why that site."""

    plan: plan.Plan
    site: sites.Site
    why: str
    overrides: Mapping[str, Mapping[str, str]]


def prepare(
    job_file: Path,
    site_name: str | None = None,
    params: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
    *,
    ask_queue: bool = True,
    here: bool = False,
) -> Prepared:
    """Load a job, choose the site, look up facts and resolve.

    Args:
        ask_queue: whether limits also come from sinfo, where the site has a queue.
        here: it is to run here: without a word about the site that is this machine, even where a queue is at hand,
            except inside an allocation.

    Raises:
        HpcmlError: everything that is wrong with the job at this site.
    """
    wanted = job.load(job_file, params, settings)
    if here and not (site_name or os.environ.get("SLURM_JOB_ID") or os.environ.get("HPCML_SITE")):
        where, why = sites.load("local"), "this machine"
    else:
        where, why = sites.choose(site_name, None if site_name else commands.cluster_name())
    decided = plan.resolve(wanted, where, facts.gather(wanted, where, ask_queue=ask_queue))
    devices.mode_of(os.environ)  # what a worker would refuse is refused here, before anything is made
    topology.wanted_port(decided.tasks, os.environ)
    return Prepared(decided, where, why, {"params": dict(params or {}), "settings": dict(settings or {})})


def with_data(plan: Plan) -> Plan:
    """Return a plan whose ``[data] version`` is laid out for the nodes to read, pulled where it wasn't yet.

    Raises:
        HpcmlError: no such version, or it can't be had; nothing of a run has been made yet.
    """
    if not plan.data.version:
        return plan
    from ..data.versions import jobs
    from ..data.versions.progress import shown

    with shown() as (progress, say):
        return jobs.bring(plan, progress, say)


def needs_framework(plan: Plan) -> None:
    """Refuse a job whose strategy needs a framework that its Python lacks, before anything is made.

    Only this Python is looked at, and nothing is imported: another one would have to be started, and modules or a
    search path of the job's own may bring the framework. ``hpcml check`` asks any Python.
    """
    from importlib.util import find_spec

    own_path = plan.env.modules or "PYTHONPATH" in plan.env.vars
    if own_path or os.path.dirname(os.path.abspath(python_of(plan))) != os.path.dirname(sys.executable):
        return
    missing = [name for name in plan.frameworks if find_spec(name) is None]
    if missing:
        raise HpcmlError(
            f"strategy {plan.strategy!r} needs {' and '.join(missing)}, which {sys.executable} lacks",
            origin=plan.origins.get("strategy", ""),
            fix=remedy(missing),
        )


def remedy(missing: Sequence[str]) -> str:
    """How to get packages into an environment."""
    if "horovod" in missing:
        return (
            "scripts/setup --horovod, which builds it (5 to 8 minutes; needs g++), or another strategy: ddp (torch), "
            "multiworker (TensorFlow)"
        )
    if "torch" in missing:
        return "scripts/setup --torch, or pip install -r envs/torch/requirements.txt into the job's environment"
    extras = ",".join(dict.fromkeys(_EXTRAS[name] for name in missing if name in _EXTRAS))
    return f"scripts/setup, or pip install '{f'hpcml[{extras}]' if extras else 'hpcml'}' into the job's environment"
