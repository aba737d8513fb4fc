"""What ``hpcml tune`` searches over: the settings, the values worth a trial, and which of them go together. Pure."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import HpcmlError, nearest
from ..job import Scalar, Tuning
from ..node import threads
from ..plan import Plan

Value = Scalar | None
Point = Mapping[str, Value]  # every setting that is searched, with its value

# In the order in which they are tried: what moves a training's speed most comes first, so that a search that is cut off
# has had it (tensorflow.org/guide/gpu_performance_analysis and /guide/data_performance name them in about this order).
ORDER = (
    *("global_batch", "intra_op_threads", "omp_threads", "precision", "jit_compile", "steps_per_execution"),
    *("data_threads", "prefetch", "inter_op_threads", "gpu_thread_mode"),
)
PREFETCH = (1, 2, 4, -1)  # batches; each holds memory, and one more than the steps' jitter needs gains nothing
# Callbacks run between executions only, so a stop waits for one: at most so many steps and seconds.
MOST_STEPS, MOST_STEPS_S = 64, 1.0
MOST_INTER = 8  # a step's graph has few branches that could run side by side
MOST_DATA_THREADS = 16
BATCH_FACTORS = (1, 2, 4, 8)  # of the batch that each replica has now
_VARIABLES = {
    "intra_op_threads": threads.INTRA,
    "omp_threads": "OMP_NUM_THREADS",
    "inter_op_threads": threads.INTER,
    "gpu_thread_mode": threads.GPU_MODE,
}


@dataclass(frozen=True)
class Axis:
    """One setting with the values to try; ``ordered`` where neighbours are alike."""

    name: str
    values: tuple[Value, ...]
    ordered: bool = True


@dataclass(frozen=True)
class Start:
    """The job as it is: what its first trial told of it.

    Attributes:
        cores: of a task.
        world: tasks of the job.
        gpus: of a task.
        replicas: in sync; 1 where nobody told.
        steps: of an epoch.
        step_s: seconds a step.
        values: each setting's value now; only those that the work heeds.
        fixed: settings that a variable of the user's holds, with the variable.
        tf_data: whether its input is tf.data, which can choose the prefetch itself; torch's DataLoader can't.
    """

    cores: int
    world: int
    gpus: int
    replicas: int
    steps: int
    step_s: float
    values: Mapping[str, Value]
    fixed: Mapping[str, str] = field(default_factory=dict)
    tf_data: bool = True


def start_of(plan: Plan, facts: Mapping[str, Value], replicas: int, steps: int, step_s: float) -> Start:
    """Return what a first trial told.

    Args:
        facts: the ``params`` records of rank 0: threads, devices, and the settings that the work asked for.
    """
    values, fixed = _threads(plan, facts)
    for key, value in facts.items():
        if key.startswith("tuned."):
            values[key.removeprefix("tuned.")] = None if value == "default" else value
    if "tensorflow" in plan.frameworks:
        values["precision"] = plan.precision
    batch = plan.effective_params.get("global_batch")
    if isinstance(batch, int):
        values["global_batch"] = batch
    cores, world = facts.get("cores_per_task"), facts.get("world_size")
    return Start(
        cores=cores if isinstance(cores, int) else plan.cpus_per_task,
        world=world if isinstance(world, int) else plan.tasks,
        gpus=len([gpu for gpu in str(facts.get("gpus") or "").split(",") if gpu]),
        replicas=replicas,
        steps=steps,
        step_s=step_s,
        values=values,
        fixed=fixed,
        tf_data="tensorflow" in plan.frameworks or values.get("prefetch") == -1,
    )


def _threads(plan: Plan, facts: Mapping[str, Value]) -> tuple[dict[str, Value], dict[str, str]]:
    """The settings that the bootstrap made variables of, and those that a variable of the user's holds."""
    values: dict[str, Value] = {}
    fixed: dict[str, str] = {}
    for name, variable in _VARIABLES.items():
        if plan.frameworks == ("torch",) and name in ("intra_op_threads", "gpu_thread_mode"):
            continue  # torch takes OMP_NUM_THREADS within an operation
        text, _, origin = str(facts.get(f"threads.{variable}", "")).partition(" (")
        if origin.rstrip(")") == "environment":
            fixed[name] = variable
        elif text:
            values[name] = int(text) if text.isdecimal() else text
    return values, fixed


def check_names(only: Sequence[str], batch: bool, plan: Plan) -> None:
    """Refuse settings that nobody knows, and a batch that can't be set, before anything starts.

    Raises:
        HpcmlError: which.
    """
    for name in only:
        if name not in ORDER:
            allowed = ", ".join(name for name in ORDER if name != "global_batch")
            raise HpcmlError(f"no setting {name!r}", origin="--only", allowed=allowed, fix=nearest(name, ORDER))
    if "global_batch" in only and not batch:
        fix = "--batch; learning rate and accuracy go with the batch"
        raise HpcmlError("the batch is tuned only when it is asked for", origin="--only global_batch", fix=fix)
    size = plan.effective_params.get("global_batch")
    if batch and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        what = "the job has no parameter global_batch" if size is None else f"global_batch = {size!r} is no number"
        fix = "let the work have a parameter global_batch: samples a step over all replicas"
        raise HpcmlError(what, origin="--batch", fix=fix)


def axes(
    start: Start, *, only: Collection[str] = (), batch: bool = False, precisions: Sequence[str] = ()
) -> list[Axis]:
    """Return what is to be searched, in order; each axis holds the present value, and another.

    Args:
        only: these settings alone; by default all.
        batch: also the batch.
        precisions: Keras policies that the devices are made for, beside the job's own.
    """
    found = []
    for name in ORDER:
        wanted = name in only if only else True
        if name not in start.values or not (wanted or name == "global_batch") or (name == "global_batch" and not batch):
            continue
        now = start.values[name]
        values, ordered = _values(name, now, start, precisions)
        axis = widened(Axis(name, values, ordered), now)
        if len(axis.values) > 1:
            found.append(axis)
    return found


def widened(axis: Axis, now: Value) -> Axis:
    """Return an axis that holds the present value too."""
    if now in axis.values:
        return axis
    values = _with(now, axis.values) if axis.ordered else (now, *axis.values)
    return dataclasses.replace(axis, values=values)


def _values(name: str, now: Value, start: Start, precisions: Sequence[str]) -> tuple[tuple[Value, ...], bool]:
    """The values worth a trial, and whether their order means something."""
    if name in ("intra_op_threads", "omp_threads"):
        return powers(1, start.cores), True
    if name == "inter_op_threads":
        # Across ranks one operation may wait for another rank's, and a second thread must feed it.
        return powers(threads.LEAST_INTER if start.world > 1 else 1, max(2, min(start.cores, MOST_INTER))), True
    if name == "data_threads":
        return (0, *powers(1, min(start.cores - 1, MOST_DATA_THREADS))), True
    if name == "prefetch":
        return tuple(batches for batches in PREFETCH if batches > 0 or start.tf_data), True
    if name == "steps_per_execution":
        return powers(1, max(1, min(MOST_STEPS, start.steps, int(MOST_STEPS_S / max(start.step_s, 1e-6))))), True
    if name == "jit_compile":
        return ((True, False) if now is True else (now, True)), False
    if name == "gpu_thread_mode":
        return (("gpu_private", "global") if start.gpus else ()), False
    if name == "precision":
        return tuple(dict.fromkeys([now, *precisions])), False
    assert name == "global_batch" and isinstance(now, int)
    each = max(1, now // start.replicas)
    return tuple(each * factor * start.replicas for factor in BATCH_FACTORS), True


def powers(least: int, most: int) -> tuple[int, ...]:
    """Return the powers of two times ``least`` up to ``most``, and ``most`` itself."""
    if most < least:
        return ()
    found, value = [], least
    while value < most:
        found.append(value)
        value *= 2
    return (*found, most)


def _with(now: Value, values: Sequence[Value]) -> tuple[Value, ...]:
    """Put the present value among ordered ones; -1 (as many as it likes) is the largest."""
    if not isinstance(now, int | float):
        return (now, *values)
    return tuple(sorted([now, *values], key=lambda value: float("inf") if value == -1 else float(value or 0)))


def repaired(point: Point, start: Start) -> Point | None:
    """Return the point with no more runnable threads than cores, None where there is none.

    Threads that compute (of TensorFlow, or of OpenMP: never both at once) and threads that only read data run side by
    side: what the second take, the first give up. What a variable of the user's holds can't give up anything.
    """
    data = point.get("data_threads") or 0
    assert isinstance(data, int | float)
    room = start.cores - int(data)
    if room < 1 or (data and {"intra_op_threads", "omp_threads"} & set(start.fixed)):
        return None
    changed = dict(point)
    for name in ("intra_op_threads", "omp_threads"):
        value = point.get(name, start.values.get(name))
        if isinstance(value, int) and value > room:
            changed[name] = room
    return changed


def applied(plan: Plan, start: Start, point: Point) -> Plan:
    """Return the plan with what a point changes of the job as it is."""
    changes = changes_of(start, point)
    settings = {field.name for field in dataclasses.fields(Tuning)}
    tuning = dataclasses.replace(plan.tuning, **{k: v for k, v in changes.items() if k in settings})  # type: ignore[arg-type]
    precision = changes.get("precision", plan.precision)
    assert isinstance(precision, str)
    params = dict(plan.params)
    if "global_batch" in changes:
        batch = changes["global_batch"]
        assert isinstance(batch, int)
        params["global_batch"] = batch
    return dataclasses.replace(plan, tuning=tuning, precision=precision, params=params)


def changes_of(start: Start, point: Point) -> dict[str, Value]:
    """Return what a point sets otherwise than the job as it is."""
    return {name: value for name, value in point.items() if value != start.values.get(name)}


def shown(name: str, value: Value) -> str:
    """Return a value as a person reads it."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "on" if value else "off"
    if name == "prefetch" and value == -1:
        return "auto"
    return str(value)


def precisions_of(capability: tuple[int, int] | None, cpu_flags: str) -> tuple[str, ...]:
    """Return the mixed precision policies that a device computes faster in than in float32.

    Args:
        capability: a GPU's compute capability; tensor cores take float16 from 7.0 and bfloat16 from 8.0
            (tensorflow.org/guide/mixed_precision). None without a GPU.
        cpu_flags: a processor's flags; without ``amx_bf16`` or ``avx512_bf16`` it only emulates bfloat16.
    """
    if capability is not None:
        return ("mixed_float16", "mixed_bfloat16")[: 2 if capability >= (8, 0) else int(capability >= (7, 0))]
    return ("mixed_bfloat16",) if re.search(r"\b(amx_bf16|avx512_bf16)\b", cpu_flags) else ()
