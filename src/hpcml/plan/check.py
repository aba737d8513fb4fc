"""What keeps a job from running as it is: its shape, its work, and what the site has. Each problem says what is allowed."""

import dataclasses
import os

from ..errors import Problem, nearest
from ..facts import Facts
from ..job import Job, Resources, Scalar, clock, seconds
from ..site import Limits, Site
from .schema import A_PROCESS_FOR_EACH_GPU, NOT_KERAS_3, ONE_PROCESS

_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
# On this machine every task is a process, of about 1 GB with TensorFlow.
MOST_TASKS_HERE = 64


def problems_of(job: Job, site: Site, facts: Facts, asked: Resources) -> list[Problem]:
    """Return all that is wrong with a job at a site.

    Args:
        asked: its resources with the site's defaults, capped where they are upper bounds.
    """
    there = _limits(job, site, facts, asked) if site.scheduler == "slurm" else _too_many_here(job, asked)
    return [*_shape(job, asked, facts), *_work(job, facts), *there]


def _shape(job: Job, asked: Resources, facts: Facts) -> list[Problem]:
    tasks = asked.nodes * asked.tasks_per_node
    problems = []
    if job.strategy in ONE_PROCESS and tasks != 1:
        problems.append(
            Problem(
                f"strategy {job.strategy!r} is one process on one node, but {tasks} tasks are asked for; each would train the whole job",
                job.origins.get("strategy", "strategy"),
                "nodes = 1 and tasks_per_node = 1",
                'for several tasks: strategy = "multiworker"',
            )
        )
    if job.strategy in A_PROCESS_FOR_EACH_GPU and asked.gpus_per_node and asked.tasks_per_node != asked.gpus_per_node:
        problems.append(
            Problem(
                f"{A_PROCESS_FOR_EACH_GPU[job.strategy]} takes one process for each GPU, but {asked.gpus_per_node} GPUs and "
                f"{asked.tasks_per_node} tasks a node are asked for",
                job.origins.get("resources.tasks_per_node", "resources.tasks_per_node"),
                "tasks_per_node = gpus_per_node",
                f"--set resources.tasks_per_node={asked.gpus_per_node}",
            )
        )
    if job.strategy == "ddp" and job.precision != "float32":
        problems.append(
            Problem(
                f"precision = {job.precision!r} is a policy of Keras, and torch heeds none",
                job.origins.get("precision", "precision"),
                "float32 where a job is torch's",
                "torch.autocast(run.device.type, torch.bfloat16) around the model's call",
            )
        )
    if job.strategy in NOT_KERAS_3 and job.keras == "3":
        problems.append(
            Problem(
                NOT_KERAS_3[job.strategy],
                job.origins.get("keras", "keras"),
                'keras = "legacy" (tf-keras)',
                "leave keras out, in the base job too; variants that are compared have one Keras",
            )
        )
    if asked.gpus_per_node and asked.gpus_per_node % asked.tasks_per_node:
        problems.append(
            Problem(
                f"{asked.gpus_per_node} GPU{'s' * (asked.gpus_per_node > 1)} can't be shared evenly by "
                f"{asked.tasks_per_node} tasks on a node",
                job.origins.get("resources.gpus_per_node", "resources.gpus_per_node"),
                "a multiple of tasks_per_node",
                f"tasks_per_node = {asked.gpus_per_node} has one GPU for each",
            )
        )
    if facts.gpus and asked.tasks_per_node > 1 and facts.gpus < asked.gpus_per_node:
        problems.append(
            Problem(
                f"{asked.tasks_per_node} tasks need {asked.gpus_per_node} GPUs, this machine has {facts.gpus}",
                job.origins.get("resources.gpus_per_node", "resources.gpus_per_node"),
                fix="--set resources.tasks_per_node=1, or a rehearsal on CPUs: HPCML_DEVICES=cpu",
            )
        )
    return problems


def _too_many_here(job: Job, asked: Resources) -> list[Problem]:
    tasks = asked.nodes * asked.tasks_per_node
    if tasks <= MOST_TASKS_HERE:
        return []
    key = "resources.nodes" if asked.nodes > asked.tasks_per_node else "resources.tasks_per_node"
    what = f"{tasks} tasks would be {tasks} processes on this machine"
    return [Problem(what, job.origins.get(key, key), f"at most {MOST_TASKS_HERE} without a queue", "hpcml submit JOB")]


def _work(job: Job, facts: Facts) -> list[Problem]:
    problems = []
    if job.work in ("notebook", "script") and (
        os.path.isabs(job.target[0]) or f"{os.path.normpath(job.target[0])}/".startswith("../")
    ):
        # The snapshot could not hold it, and its parameters would be written into the original.
        where = job.origins.get(job.work, job.work)
        fix = "move it there, or set HPCML_PROJECT to a folder that holds it"
        problems.append(
            Problem(f"{job.target[0]} is no path inside the project", where, f"relative to {job.project}", fix)
        )
    if job.work == "notebook" and not job.target[0].endswith(".ipynb"):
        problems.append(
            Problem(f"{job.target[0]} is no notebook", job.origins.get("notebook", ""), "a path ending in .ipynb")
        )
    if job.work == "script" and job.target[0].endswith(".ipynb"):
        where = job.origins.get("script", "script")
        problems.append(Problem(f"{job.target[0]} is a notebook", where, fix=f'notebook = "{job.target[0]}"'))
    if facts.target_exists is False:
        where, path = job.origins.get(job.work, job.work), job.project / job.target[0]
        if facts.target_is_folder:
            problems.append(Problem(f"{path} is a folder, not a {job.work}", where, fix="name a file in it"))
        else:
            problems.append(Problem(f"no {job.work} at {path}", where, fix="paths are relative to the project"))
    if facts.declared is None:
        return problems
    known = facts.declared.defaults
    for key, value in job.params.items():
        where = job.origins.get(f"params.{key}", f"params.{key}")
        if key not in known:
            fix = nearest(key, known) or "add it to the cell tagged 'parameters'"
            problems.append(
                Problem(
                    f"{job.target[0]} has no parameter {key!r}",
                    where,
                    ", ".join(known) or "none: it has no cell tagged 'parameters'",
                    fix,
                )
            )
        elif (default := known[key]) is not None and not _same_kind(default, value):
            problems.append(
                Problem(
                    f"params.{key} = {value!r} is not {_KINDS[type(default)]}",
                    where,
                    f"like its default {default!r}",
                )
            )
    return problems


def _same_kind(default: Scalar, value: Scalar) -> bool:
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return True
    return type(default) is type(value)


def _limits(job: Job, site: Site, facts: Facts, asked: Resources) -> list[Problem]:
    problems: list[Problem] = []
    limits, told_by = _limits_here(job, site, facts, problems)
    cores = (asked.cpus_per_task or 1) * asked.tasks_per_node
    by_key = (
        ("nodes", "nodes", asked.nodes, limits.nodes, ""),
        ("gpus_per_node", "GPUs a node", asked.gpus_per_node, limits.gpus_per_node, ""),
        (
            "cpus_per_task",
            "cores a node",
            cores,
            limits.cores_per_node,
            f" ({asked.tasks_per_node} tasks × {asked.cpus_per_task})",
        ),
        ("mem_gb", "GiB a node", asked.mem_gb or 0, limits.mem_gb_per_node, ""),
    )
    for key, unit, value, most, detail in by_key:
        if most is not None and value > most:
            where = job.origins.get(f"resources.{key}", f"resources.{key}")
            problems.append(
                Problem(f"{value} {unit}{detail} is more than there are", where, f"at most {most} ({told_by})")
            )
    if limits.max_time and seconds(asked.time) > seconds(limits.max_time):
        where = job.origins.get("resources.time", "resources.time")
        problems.append(
            Problem(
                f"time limit {asked.time} is too long", where, f"at most {clock(seconds(limits.max_time))} ({told_by})"
            )
        )
    return problems


def _limits_here(job: Job, site: Site, facts: Facts, problems: list[Problem]) -> tuple[Limits, str]:
    asked = job.slurm.partition
    told = {p.name: p for p in facts.partitions}
    if asked and told and asked not in told:
        where = job.origins.get("slurm.partition", "slurm.partition")
        problems.append(Problem(f"no partition {asked!r}", where, ", ".join(told), nearest(asked, told)))
        return site.limits, f"site {site.name}"
    partition = told.get(asked) if asked else next((p for p in facts.partitions if p.is_default), None)
    own = site.limits_of(asked)
    if partition is None:
        return own, f"site {site.name}"
    from_queue = {
        "nodes": partition.nodes,
        "cores_per_node": partition.cores_per_node,
        "gpus_per_node": partition.gpus_per_node,
        "mem_gb_per_node": partition.mem_gb_per_node,
        "max_time": partition.max_time,
    }
    written = {f.name: getattr(own, f.name) for f in dataclasses.fields(Limits) if getattr(own, f.name) is not None}
    return Limits(**{**from_queue, **written}), f"partition {partition.name}, as sinfo and site {site.name} tell"
