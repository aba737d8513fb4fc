"""What a plan is, and what its strategies need."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..job import Data, Environment, Scalar, SlurmOptions, Tuning

ONE_PROCESS = ("original", "mirrored")
A_PROCESS_FOR_EACH_GPU = {"ddp": "DistributedDataParallel", "horovod": "Horovod"}
# What Keras 3 can't be trained with, and why.
NOT_KERAS_3 = {
    "multiworker": "MultiWorkerMirroredStrategy with model.fit fails on Keras 3 (keras-team/keras#20585)",
    "horovod": "Horovod's DistributedOptimizer averages no gradients with Keras 3, and says nothing",
}
NEVER_CHECKED = (
    'strategy "{strategy}" was never checked: no training reported its replicas in sync; '
    "call hpcml.begin(), then pass callbacks=run.callbacks() to fit, or train in run.epochs() and run.steps(), "
    "or call run.check_in_sync() in a loop of your own under Horovod"
)


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
        data: the data set; empty where the work finds its own.
        data_digest: DVC's hash of its version's listing, 32 hexadecimal digits; empty without a version, and until it is
            looked up.
        stall_s: seconds without a training step after which a run of several ranks is ended; 0 for never.
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
    data: Data = field(default_factory=Data)
    data_digest: str = ""
    stall_s: int = 0

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
    values["data"] = Data(**(data.get("data") or {}))
    values.setdefault("stall_s", 0)
    values.setdefault("data_digest", "")
    return Plan(**{f.name: values[f.name] for f in dataclasses.fields(Plan)})


def warning_s(time_s: int) -> int:
    """Return how many seconds before its time limit the ranks of a job that may be requeued are warned, to save and stop.

    Slurm may do it up to 60 s earlier (sbatch(1), --signal).
    """
    return min(120, time_s // 2)
