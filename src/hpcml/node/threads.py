"""Threads from cpus-per-task and affinity, set before any framework is imported. Standard library only.

One task runs at most as many threads at once as it has cores. A user's own value wins. TensorFlow reads its two
variables when it starts; ``inter`` is kept at 2 because operations that wait for other ranks must not block the one
thread that would feed them, and the work itself runs in ``intra``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_MATH = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


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


def choose(environment: Mapping[str, str], affinity: int, local_world: int, *, on_gpu: bool) -> Threads:
    """Choose a task's threads.

    Args:
        affinity: cores in this process's affinity mask; where the mask is smaller than cpus-per-task it belongs to
            all tasks of the node, and each takes its part.
        local_world: tasks on this node.
        on_gpu: whether the task computes on GPUs; each then gets two launch threads of its own
            (tensorflow.org/guide/gpu_performance_analysis, gpu_private).
    """
    asked = environment.get("HPCML_CPUS_PER_TASK") or environment.get("SLURM_CPUS_PER_TASK") or ""
    if asked.isdecimal() and 0 < int(asked) <= affinity:
        cores, origin = int(asked), "cpus-per-task"
    else:
        cores = max(1, affinity // local_world)
        origin = f"affinity: {affinity} cores for {local_world} task{'s' if local_world > 1 else ''}"
    variables = {name: str(cores) for name in _MATH}
    variables["TF_NUM_INTEROP_THREADS"] = "2"
    if on_gpu:
        variables |= {"TF_GPU_THREAD_MODE": "gpu_private", "TF_GPU_THREAD_COUNT": "2"}
    origins = dict.fromkeys(variables, origin)
    origins["TF_NUM_INTEROP_THREADS"] = "default"
    for name in variables:
        if environment.get(name):
            variables[name], origins[name] = environment[name], "environment"
    return Threads(cores, origin, variables, origins)
