"""From a job file and a site's name to a plan: the one way in for every command."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import facts, job, plan
from .. import site as sites
from ..node import devices, topology
from ..slurm import commands


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
) -> Prepared:
    """Load a job, choose the site, look up facts and resolve.

    Args:
        ask_queue: whether limits also come from sinfo, where the site has a queue.

    Raises:
        HpcmlError: everything that is wrong with the job at this site.
    """
    wanted = job.load(job_file, params, settings)
    where, why = sites.choose(site_name, None if site_name else commands.cluster_name())
    decided = plan.resolve(wanted, where, facts.gather(wanted, where, ask_queue=ask_queue))
    devices.mode_of(os.environ)  # what a worker would refuse is refused here, before anything is made
    topology.wanted_port(decided.tasks, os.environ)
    return Prepared(decided, where, why, {"params": dict(params or {}), "settings": dict(settings or {})})
