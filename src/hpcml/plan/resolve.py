"""How a job's values are decided at a site."""

import dataclasses
import os
from pathlib import Path

from ..errors import HpcmlError, Problem
from ..facts import Facts
from ..job import Job, Resources, Tuning, seconds, typed_like
from ..site import Site
from .check import problems_of
from .schema import Plan

NO_FACTS = Facts()


def resolve(job: Job, site: Site, facts: Facts = NO_FACTS) -> Plan:
    """Decide every value of a job at a site.

    Raises:
        HpcmlError: all problems at once: over-asks, missing files, unknown parameters, strategies that don't fit.
    """
    job = _typed_by_work(job, facts)
    origins = dict(job.origins)
    notes: list[str] = []
    asked = job.resources
    if asked.cpus_per_task is None:
        share = site.cores_per_gpu * asked.gpus_per_node // asked.tasks_per_node
        asked = dataclasses.replace(asked, cpus_per_task=max(1, share))
        origins["resources.cpus_per_task"] = f"site {site.name}: cores_per_gpu" if asked.gpus_per_node else "default"
    if asked.mem_gb is None and site.mem_gb_per_gpu and asked.gpus_per_node:
        asked = dataclasses.replace(asked, mem_gb=site.mem_gb_per_gpu * asked.gpus_per_node)
        origins["resources.mem_gb"] = f"site {site.name}: mem_gb_per_gpu"
    origins.setdefault("resources.time", "default")
    if site.scheduler == "local":
        asked = _capped(asked, facts, notes, origins)
    tuning, too_many = _threads(job, asked, notes if site.scheduler == "local" else None, origins)
    problems = [*problems_of(job, site, facts, asked), *too_many]
    if problems:
        raise HpcmlError(problems)
    declared = facts.declared.defaults if facts.declared else {}
    for key in declared:
        origins.setdefault(f"params.{key}", f"{job.target[0]}: parameters cell")
    assert asked.cpus_per_task is not None
    return Plan(
        name=job.name,
        site=site.name,
        scheduler=site.scheduler,
        work=job.work,
        target=job.target,
        project=str(job.project),
        job_file=_relative(job.path, job.project),
        strategy=job.strategy,
        keras=job.keras,
        precision=job.precision,
        experiment=job.experiment or job.name,
        nodes=asked.nodes,
        gpus_per_node=asked.gpus_per_node,
        tasks_per_node=asked.tasks_per_node,
        cpus_per_task=asked.cpus_per_task,
        mem_gb=asked.mem_gb,
        time_s=seconds(asked.time),
        gres=site.gpu_request.replace("{count}", str(asked.gpus_per_node)) if asked.gpus_per_node else None,
        slurm=job.slurm,
        env=dataclasses.replace(job.env, modules=job.env.modules or site.modules, name=None, python=_python(job, site)),
        params=job.params,
        defaults={k: v for k, v in declared.items() if k not in job.params},
        inject=facts.declared is not None,
        notes=tuple(notes),
        origins=origins,
        profile=job.profile,
        stall_s=job.stall_s,
        tuning=tuning,
        data=job.data,
    )


def _typed_by_work(job: Job, facts: Facts) -> Job:
    """Give ``-p`` values the types of the work's own defaults."""
    declared = facts.declared.defaults if facts.declared else {}
    typed = {k: typed_like(declared[k], text) for k, text in job.typed.items() if declared.get(k) is not None}
    return dataclasses.replace(job, params={**job.params, **typed})


def _capped(asked: Resources, facts: Facts, notes: list[str], origins: dict[str, str]) -> Resources:
    """Cap cores and memory to this machine: on ``local`` they are upper bounds."""
    tasks = asked.nodes * asked.tasks_per_node
    changes: dict[str, int] = {}
    if facts.cores is not None and asked.cpus_per_task is not None:
        share = max(1, facts.cores // tasks)
        if share < asked.cpus_per_task:
            changes["cpus_per_task"] = share
            notes.append(f"cores: {share} a task instead of {asked.cpus_per_task}, this machine has {facts.cores}")
    if facts.mem_gb is not None and asked.mem_gb is not None and facts.mem_gb < asked.mem_gb:
        changes["mem_gb"] = facts.mem_gb
        notes.append(f"memory: {facts.mem_gb} GiB instead of {asked.mem_gb}, all that this machine has")
    if facts.gpus and facts.gpus < asked.gpus_per_node and asked.tasks_per_node == 1:
        changes["gpus_per_node"] = facts.gpus
        notes.append(f"GPUs: {facts.gpus} instead of {asked.gpus_per_node}, all that this machine has")
    if asked.nodes > 1:
        notes.append(f"nodes: all {tasks} tasks of {asked.nodes} nodes run on this one machine")
    for key in changes:
        origins[f"resources.{key}"] = "capped to this machine"
    return dataclasses.replace(asked, **changes)  # type: ignore[arg-type]


def _threads(
    job: Job, asked: Resources, notes: list[str] | None, origins: dict[str, str]
) -> tuple[Tuning, list[Problem]]:
    """Hold ``[tuning]`` to the cores of a task: where ``notes`` are kept it is capped and said, else it is a problem.

    Threads of the input run beside those that compute, and leave them the rest. Two operations at once are always allowed:
    the default, of which one may wait for other ranks.
    """
    cores = asked.cpus_per_task or 1
    room = cores - min(job.tuning.data_threads or 0, cores - 1)
    limits = {
        "data_threads": cores - 1,
        "intra_op_threads": room,
        "omp_threads": room,
        "inter_op_threads": max(2, cores),
    }
    changes: dict[str, int] = {}
    problems = []
    for key, most in limits.items():
        value = getattr(job.tuning, key)
        if value is None or value <= most:
            continue
        origin = origins.get(f"tuning.{key}", f"tuning.{key}")
        if notes is None:
            what = f"tuning.{key} = {value}: more runnable threads than a task has cores"
            beside = f", beside {cores - room} data_threads" if room < cores and most == room else ""
            allowed = f"at most {most} (resources.cpus_per_task = {cores}{beside})"
            problems.append(Problem(what, origin, allowed, "hpcml tune"))
        else:
            changes[key] = most
            notes.append(f"{key.replace('_', ' ')}: {most} instead of {value}, a task has {cores} cores")
            origins[f"tuning.{key}"] = "capped to this machine"
    return dataclasses.replace(job.tuning, **changes), problems  # type: ignore[arg-type]


def _python(job: Job, site: Site) -> str | None:
    """The job's own Python as the node will expand it; None leaves it to the environment."""
    if job.env.name:
        return f"{site.envs}/{job.env.name}/bin/python"
    return job.env.python


def _relative(path: Path | None, project: Path) -> str | None:
    if path is None:
        return None
    relative = os.path.relpath(path.absolute(), project)
    return str(path.absolute()) if relative.startswith("..") else relative
