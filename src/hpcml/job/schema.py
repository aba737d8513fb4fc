"""What a job file says, as frozen data."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Scalar = str | int | float | bool
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PARAMETER_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
STRATEGIES = ("original", "mirrored", "multiworker", "ddp")
KERAS_FLAVOURS = ("legacy", "3")
PRECISIONS = ("float32", "mixed_float16", "mixed_bfloat16")
WORK_KEYS = ("notebook", "script", "command")
MOST = 10**9  # of anything that is counted
LONGEST_PROFILE = 200  # steps: a profile holds every operation of each of them


@dataclass(frozen=True)
class Resources:
    """What the allocation must hold.

    Attributes:
        nodes: number of nodes.
        gpus_per_node: GPUs on each node.
        tasks_per_node: tasks (ranks) on each node.
        cpus_per_task: cores for each task; None leaves it to the site's cores per GPU.
        mem_gb: memory of each node in GiB, as Slurm's ``G``; None leaves it to the site's memory per GPU.
        time: time limit in one of Slurm's forms, such as ``00:30:00``.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    mem_gb: int | None = None
    time: str = "00:30:00"


@dataclass(frozen=True)
class SlurmOptions:
    """Where in the queue: passed to sbatch as they are; ``extra`` holds further options, one a string."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Environment:
    """Which Python runs the work: an environment ``name`` below the site's folder or a ``python``; modules; variables."""

    name: str | None = None
    python: str | None = None
    modules: tuple[str, ...] = ()
    vars: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One job as written; nothing of it is resolved yet.

    Attributes:
        name: the job's name, also of its runs.
        work: ``notebook``, ``script``, ``command``, or ``function`` for a function of Python.
        target: path of the notebook or script relative to ``project``; a command's words; a function's name.
        project: the folder that paths are relative to and that is snapshotted.
        path: the job file, None for a job made in Python.
        profile: first and last step to profile, from 1 over the whole training, both included; None for no profile.
        typed: ``-p`` values as typed that replace nothing in the job file: the work's own default may give their type.
        origins: for each dotted key, where its value came from.
    """

    name: str
    work: str
    target: tuple[str, ...]
    project: Path
    path: Path | None = None
    strategy: str | None = None
    keras: str = "legacy"
    precision: str = "float32"
    experiment: str | None = None
    resources: Resources = Resources()
    params: Mapping[str, Scalar] = field(default_factory=dict)
    slurm: SlurmOptions = SlurmOptions()
    env: Environment = Environment()
    profile: tuple[int, int] | None = None
    typed: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
