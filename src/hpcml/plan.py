"""Job + site + facts → Plan: every value decided, each with its origin, all problems reported at once. Pure."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import HpcmlError, Problem, nearest
from .facts import Facts
from .job import Environment, Job, Resources, Scalar, SlurmOptions, Tuning, clock, seconds, typed_like
from .site import Limits, Site

ONE_PROCESS = ("original", "mirrored")
A_PROCESS_FOR_EACH_GPU = {"ddp": "DistributedDataParallel", "horovod": "Horovod"}
# What Keras 3 can't be trained with, and why.
NOT_KERAS_3 = {
    "multiworker": "MultiWorkerMirroredStrategy with model.fit fails on Keras 3 (keras-team/keras#20585)",
    "horovod": "Horovod's DistributedOptimizer averages no gradients with Keras 3, and says nothing",
}
NO_FACTS = Facts()
NEVER_CHECKED = (
    'strategy "{strategy}" was never checked: no training reported its replicas in sync; '
    "call hpcml.begin(), then pass callbacks=run.callbacks() to fit, or train in run.epochs() and run.steps()"
)
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
# On this machine every task is a process, of about 1 GB with TensorFlow.
MOST_TASKS_HERE = 64
# Params that make two trainings comparable when they are equal.
FAIR_PARAMS = ("global_batch", "seed", "epochs", "data", "weights", "image_size")


@dataclass(frozen=True)
class Plan:
    """A job as it will run. ``render``, ``submit``, ``check`` and ``run`` share it.

    Attributes:
        target: notebook or script relative to the project; a command's words; a function's name.
        job_file: relative to the project where it lies inside; None for a job made in Python.
        gres: value of Slurm's ``--gres`` for each node; None without GPUs.
        mem_gb: GiB a node; None leaves it to the site.
        time_s: time limit in seconds.
        params: set by the job or ``-p``; ``defaults``: the work's own for the rest.
        inject: whether params go into a cell of the work's copy (else ``--key value``).
        notes: what a person should be told once, such as a capped value.
        profile: first and last training step to profile, counted from 1; None for no profile.
        tuning: settings for speed; what is None there is left to its default.
        origins: for each dotted key, where its value came from.
    """

    name: str
    site: str
    scheduler: str
    work: str
    target: tuple[str, ...]
    project: str
    job_file: str | None
    strategy: str | None
    keras: str
    precision: str
    experiment: str
    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    mem_gb: int | None
    time_s: int
    gres: str | None
    slurm: SlurmOptions
    env: Environment
    params: Mapping[str, Scalar]
    defaults: Mapping[str, Scalar | None]
    inject: bool
    notes: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)
    profile: tuple[int, int] | None = None
    tuning: Tuning = field(default_factory=Tuning)

    @property
    def tasks(self) -> int:
        """World size: tasks on all nodes."""
        return self.nodes * self.tasks_per_node

    @property
    def cores(self) -> int:
        """Cores of the whole run."""
        return self.tasks * self.cpus_per_task

    @property
    def frameworks(self) -> tuple[str, ...]:
        """Modules that the strategy needs; none where no strategy tells."""
        if self.strategy is None:
            return ()
        if self.strategy in A_PROCESS_FOR_EACH_GPU:
            return ("torch",) if self.strategy == "ddp" else ("horovod",)  # with torch or TensorFlow
        return ("tensorflow", "tf_keras") if self.keras == "legacy" else ("tensorflow",)

    @property
    def effective_params(self) -> dict[str, Scalar | None]:
        """The work's defaults with the params laid over them."""
        return {**self.defaults, **self.params}

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
        return dataclasses.asdict(self)


def from_json(data: Mapping[str, Any]) -> Plan:
    """Return the plan that ``to_json`` described."""
    values = dict(data)
    values["slurm"] = SlurmOptions(**{**data["slurm"], "extra": tuple(data["slurm"]["extra"])})
    values["env"] = Environment(**{**data["env"], "modules": tuple(data["env"]["modules"])})
    for key in ("target", "notes"):
        values[key] = tuple(data[key])
    values["profile"] = (
        tuple(data["profile"]) if data.get("profile") else None
    )  # plans of before profiles have no such key
    values["tuning"] = Tuning(**(data.get("tuning") or {}))
    return Plan(**{f.name: values[f.name] for f in dataclasses.fields(Plan)})


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
    problems = [*_shape(job, asked, facts), *_work(job, facts), *too_many]
    problems += _limits(job, site, facts, asked) if site.scheduler == "slurm" else _too_many_here(job, asked)
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
        tuning=tuning,
    )


def unfair(plans: Mapping[str, Plan]) -> list[Problem]:
    """Return what keeps plans from being compared: each value that must be the same and isn't, with who has which."""
    values: dict[str, dict[str, Any]] = {
        **{key: {name: plan.effective_params.get(key) for name, plan in plans.items()} for key in FAIR_PARAMS},
        "keras": {name: plan.keras for name, plan in plans.items()},
        "precision": {name: plan.precision for name, plan in plans.items()},
        "env": {name: dataclasses.asdict(plan.env) for name, plan in plans.items()},
        "slurm": {name: dataclasses.asdict(plan.slurm) for name, plan in plans.items()},
        "cores per run": {name: plan.cores for name, plan in plans.items()},
    }
    return [
        Problem(
            f"{key} differs: " + ", ".join(f"{name} has {value}" for name, value in by_name.items()),
            "compare",
            "the same for all",
            "set it once, in the base job that the variants share",
        )
        for key, by_name in values.items()
        if len(set(map(repr, by_name.values()))) > 1
    ]


def _typed_by_work(job: Job, facts: Facts) -> Job:
    """Give ``-p`` values the types of the work's own defaults."""
    declared = facts.declared.defaults if facts.declared else {}
    typed = {k: typed_like(declared[k], text) for k, text in job.typed.items() if declared.get(k) is not None}
    return dataclasses.replace(job, params={**job.params, **typed})


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
                "set keras only in the base job that the variants share",
            )
        )
    if asked.gpus_per_node and asked.gpus_per_node % asked.tasks_per_node:
        problems.append(
            Problem(
                f"{asked.gpus_per_node} GPUs can't be shared evenly by {asked.tasks_per_node} tasks on a node",
                job.origins.get("resources.gpus_per_node", "resources.gpus_per_node"),
                "a multiple of tasks_per_node",
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
