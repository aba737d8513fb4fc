"""Which GPUs this task uses, or how many virtual CPU devices stand in for them. Standard library only.

A task takes what Slurm made visible to it. Where all tasks of a node see all of the node's GPUs, each takes its own
share of the visible list; where each sees only its share already (``--gpus-per-task``, devices constrained by cgroup),
it takes all that it sees. A local rank alone never picks a GPU: under cgroup constraints position 0 is another
device in every task.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import HpcmlError
from .topology import Topology, visible_gpus

MODES = ("auto", "gpu", "cpu")


@dataclass(frozen=True)
class Devices:
    """A task's devices.

    Attributes:
        gpus: values for CUDA_VISIBLE_DEVICES; empty in a rehearsal or without GPUs.
        virtual: number of virtual CPU devices that stand in for GPUs; 0 on GPUs.
        reason: why these, for people.
    """

    gpus: tuple[str, ...] = ()
    virtual: int = 0
    reason: str = ""

    @property
    def count(self) -> int:
        """Devices that the task's strategy can use."""
        return len(self.gpus) or max(1, self.virtual)


def mode_of(environment: Mapping[str, str]) -> str:
    """Return the kind of device that ``HPCML_DEVICES`` asks for.

    Raises:
        HpcmlError: there is no such kind.
    """
    mode = environment.get("HPCML_DEVICES", "auto") or "auto"
    if mode not in MODES:
        raise HpcmlError(f"{mode!r} is not a kind of device", origin="HPCML_DEVICES", allowed=", ".join(MODES))
    return mode


def choose(topology: Topology, environment: Mapping[str, str], machine_gpus: int, gpus_per_node: int | None) -> Devices:
    """Choose a task's devices.

    Args:
        machine_gpus: NVIDIA GPUs that exist here (device files).
        gpus_per_node: what the job asked for; None without a job.

    Raises:
        HpcmlError: GPUs were asked for but none are given, or they can't be shared by the tasks.
    """
    mode = mode_of(environment)
    if gpus_per_node == 0 and mode != "gpu":
        return Devices(reason="the job asks for no GPU")
    in_slurm = bool(environment.get("SLURM_JOB_ID"))
    visible = visible_gpus(environment)
    if visible is None:
        given = tuple(str(index) for index in range(_count_on_node(environment) if in_slurm else machine_gpus))
    else:
        given = visible
    if mode == "cpu" or (mode == "auto" and not in_slurm and not (machine_gpus and given)):
        stand_for = gpus_per_node if gpus_per_node is not None else len(given) if in_slurm else 2
        why = "HPCML_DEVICES=cpu: a rehearsal" if mode == "cpu" else "this machine has no GPU"
        return Devices(virtual=max(1, stand_for // topology.local_world), reason=f"{why} on virtual CPU devices")
    if not given:
        if mode == "auto" and not gpus_per_node:
            return Devices(reason="no GPU was asked for")
        raise HpcmlError(
            f"{gpus_per_node or 'some'} GPUs a node are wanted, none is given to this task",
            origin=f"CUDA_VISIBLE_DEVICES={environment.get('CUDA_VISIBLE_DEVICES', '(unset)')}",
            fix="ask for them (--gres=gpu:2), or rehearse on CPUs: HPCML_DEVICES=cpu",
        )
    return Devices(gpus=_share(topology, environment, given, gpus_per_node), reason="GPUs visible to this task")


def _share(
    topology: Topology, environment: Mapping[str, str], given: tuple[str, ...], gpus_per_node: int | None
) -> tuple[str, ...]:
    tasks = topology.local_world
    on_node = gpus_per_node or _count_on_node(environment) or len(given)
    # Only srun gives each task its own; all other starters' tasks see one and the same list.
    own = topology.source == "srun step"
    if gpus_per_node and not own and tasks <= gpus_per_node:
        if len(given) < gpus_per_node:
            raise HpcmlError(
                f"{gpus_per_node} GPUs a node are wanted, here are {len(given)}",
                origin=f"GPUs {','.join(given)}",
                fix=f"--set resources.gpus_per_node={len(given)}, or rehearse on CPUs: HPCML_DEVICES=cpu",
            )
        given = given[:gpus_per_node]
    if tasks == 1 or (own and len(given) * tasks <= on_node):
        return given
    if len(given) % tasks:
        raise HpcmlError(
            f"{tasks} tasks on this node see the same {len(given)} GPUs and can't share them evenly",
            origin=f"CUDA_VISIBLE_DEVICES={','.join(given)}",
            fix="one task for each GPU (--ntasks-per-node), or --gpus-per-task",
        )
    each = len(given) // tasks
    return given[topology.local_rank * each : (topology.local_rank + 1) * each]


def _count_on_node(environment: Mapping[str, str]) -> int:
    """GPUs of the step or job on this node, by whichever variable this Slurm sets."""
    count = environment.get("SLURM_GPUS_ON_NODE", "")
    if count.isdecimal():
        return int(count)
    # These come second: with --gpus-per-task SLURM_STEP_GPUS holds this task's own only.
    for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if environment.get(name):
            return len([part for part in environment[name].split(",") if part])
    return 0
