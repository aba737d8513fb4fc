"""What a job file says, as frozen data."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .duration import seconds

Scalar = str | int | float | bool
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PARAMETER_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
STRATEGIES = ("original", "mirrored", "multiworker", "ddp", "horovod")
KERAS_FLAVOURS = ("legacy", "3")
PRECISIONS = ("float32", "mixed_float16", "mixed_bfloat16")
WORK_KEYS = ("notebook", "script", "command")
MOST = 10**9  # of anything that is counted
GPU_THREAD_MODES = ("global", "gpu_private", "gpu_shared")  # TensorFlow's TF_GPU_THREAD_MODE
STALL_TIMEOUT = "00:20:00"  # longer than NCCL's own 10 minutes, shorter than Gloo's 30
STAGES = ("auto", "always", "never")
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
    """Where in the queue: passed to sbatch as they are.

    Attributes:
        extra: further options, one a string.
        max_requeues: how often a run is put back into the queue to go on from its checkpoint: before its time limit, and
            after a rank was killed. What Slurm requeues by itself (preemption, a lost node) goes on too.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    extra: tuple[str, ...] = ()
    max_requeues: int = 0


@dataclass(frozen=True)
class Environment:
    """Which Python runs the work: an environment ``name`` below the site's folder or a ``python``; modules; variables."""

    name: str | None = None
    python: str | None = None
    modules: tuple[str, ...] = ()
    vars: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """The data set that a job trains on.

    Attributes:
        source: its name below the site's data folder, or with a ``/`` in it a path relative to the project.
        version: a tag that DVC's ``source`` has in the project's Git; None for what lies there.
        stage: whether each node copies it to its own disk first: ``auto`` where that pays, ``always``, ``never``.
    """

    source: str | None = None
    version: str | None = None
    stage: str = "auto"

    def __str__(self) -> str:
        return " ".join(filter(None, (self.source, self.version)))


@dataclass(frozen=True)
class Tuning:
    """Settings that change a training's speed and not what it computes, as ``hpcml tune`` writes them; None: the default.

    Attributes:
        intra_op_threads: threads within one operation of TensorFlow.
        inter_op_threads: operations of TensorFlow or torch at once.
        omp_threads: threads of OpenMP and the BLAS libraries; within one operation of torch.
        data_threads: threads or worker processes that only the input pipeline has; 0 for none of its own.
        prefetch: batches that are made ready ahead; -1 leaves their number to ``tf.data``.
        steps_per_execution: training steps in one call of Keras's graph.
        jit_compile: whether XLA compiles the training step.
        gpu_thread_mode: whose threads launch a GPU's kernels; unused where there is none.
    """

    intra_op_threads: int | None = None
    inter_op_threads: int | None = None
    omp_threads: int | None = None
    data_threads: int | None = None
    prefetch: int | None = None
    steps_per_execution: int | None = None
    jit_compile: bool | None = None
    gpu_thread_mode: str | None = None

    @property
    def given(self) -> dict[str, Scalar]:
        """The settings that are not left to their defaults."""
        return {name: value for name, value in vars(self).items() if value is not None}


# Of these the work itself must ask, by ``run.tuned``; the others are set before it starts.
WORK_SETTINGS = ("data_threads", "prefetch", "steps_per_execution", "jit_compile")


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
        stall_timeout: how long a training of several ranks may be without a step, in one of Slurm's forms, or ``off``; four
            times as long before its first step and between its epochs.
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
    tuning: Tuning = Tuning()
    data: Data = Data()
    profile: tuple[int, int] | None = None
    stall_timeout: str = STALL_TIMEOUT
    typed: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    @property
    def stall_s(self) -> int:
        """``stall_timeout`` in seconds, 0 for ``off``."""
        return 0 if self.stall_timeout == "off" else seconds(self.stall_timeout)
