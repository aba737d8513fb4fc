"""Threads from cpus-per-task and affinity, set before any framework is imported. Standard library only.

One task runs at most as many threads at once as it has cores. A user's own variable wins over the job's ``[tuning]``,
and that over what is chosen here. TensorFlow reads its two variables when it starts; ``inter`` is kept at 2 because
operations that wait for other ranks must not block the one thread that would feed them, and the work itself runs in
``intra``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..job import Tuning

_MATH = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
INTRA, INTER, GPU_MODE = "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "TF_GPU_THREAD_MODE"
# One operation may wait for other ranks; the second feeds them.
LEAST_INTER = 2
# Variable → the setting of [tuning] that it comes from.
SETTINGS = {**dict.fromkeys(_MATH, "omp_threads"), INTRA: "intra_op_threads", INTER: "inter_op_threads"}
_DEFAULT = Tuning()


@dataclass(frozen=True)
class Threads:
    """A task's threads.

    Attributes:
        cores: cores that the task may keep busy.
        origin: where that number comes from.
        variables: environment variables with their values.
        origins: where each variable's value comes from.
    """

    cores: int
    origin: str
    variables: Mapping[str, str]
    origins: Mapping[str, str]


def choose(
    environment: Mapping[str, str], affinity: int, local_world: int, *, on_gpu: bool, tuning: Tuning = _DEFAULT
) -> Threads:
    """Choose a task's threads.

    Args:
        affinity: cores in this process's affinity mask; where the mask is smaller than cpus-per-task it belongs to
            all tasks of the node, and each takes its part.
        local_world: tasks on this node.
        on_gpu: whether the task computes on GPUs; each then gets two launch threads of its own
            (tensorflow.org/guide/gpu_performance_analysis, gpu_private).
        tuning: the job's own settings; never more threads than cores, whatever they say.
    """
    asked = environment.get("HPCML_CPUS_PER_TASK") or environment.get("SLURM_CPUS_PER_TASK") or ""
    if asked.isdecimal() and 0 < int(asked) <= affinity:
        cores, origin = int(asked), "cpus-per-task"
    else:
        cores = max(1, affinity // local_world)
        origin = f"affinity: {affinity} cores for {local_world} task{'s' if local_world > 1 else ''}"
    data = min(tuning.data_threads or 0, cores - 1)
    variables = {name: str(cores - data) for name in (*_MATH, INTRA)}
    variables[INTER] = str(LEAST_INTER)
    if on_gpu:
        variables |= {GPU_MODE: "gpu_private", "TF_GPU_THREAD_COUNT": "2"}
    origins = dict.fromkeys(variables, origin)
    origins[INTER] = "default"
    if data:
        origins |= dict.fromkeys((*_MATH, INTRA), f"{origin}; less {data} for data")
    for name, value in _tuned(tuning, cores, data, on_gpu).items():
        variables[name], origins[name] = value, "tuning"
    for name in variables:
        if environment.get(name):
            variables[name], origins[name] = environment[name], "environment"
    return Threads(cores, origin, variables, origins)


def _tuned(tuning: Tuning, cores: int, data: int, on_gpu: bool) -> dict[str, str]:
    """The variables that the job's settings give, capped to the cores that the threads of the input leave."""
    given = tuning.given
    most = {INTER: max(LEAST_INTER, cores)}
    chosen = {
        name: str(min(int(given[key]), most.get(name, cores - data))) for name, key in SETTINGS.items() if key in given
    }
    if on_gpu and tuning.gpu_thread_mode:
        chosen[GPU_MODE] = tuning.gpu_thread_mode
    return chosen
