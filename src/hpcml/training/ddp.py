"""What makes several torch processes one training: equal weights, a shared batch, a stop that all agree on.

Under ``fully_shard`` each rank has a part of the weights: ``fsdp`` says what is compared then. Each check names the ranks
and what to do. How ranks tell one another numbers is a strategy's own: ``Ranks``. torch is
imported inside the functions.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import rundir
from ..errors import HpcmlError
from . import fsdp
from .common import Expected, length

if TYPE_CHECKING:
    import torch

# All ranks look for the stop file about this often: a collective at every step would hold up a GPU's queue.
STOP_PERIOD_S = 1.0
_DDP = "torch.nn.parallel.DistributedDataParallel"


def weights_hash(model: "torch.nn.Module") -> bytes:
    """Return 8 bytes that stand for the parameters, in order, with types and shapes.

    Buffers are left out: the running means of BatchNorm are each rank's own between two broadcasts. A collective where
    ``fully_shard`` has shared the parameters out.
    """
    digest = hashlib.sha256()
    fsdp.reshard(model)
    for parameter in model.parameters():
        digest.update(f"{parameter.dtype}{tuple(parameter.shape)}".encode())
        if not fsdp.is_part(parameter):
            digest.update(fsdp.content(parameter))
    if parts := list(filter(fsdp.is_part, model.parameters())):
        digest.update(fsdp.parts_hash(parts, gather))
    return digest.digest()[:8]


Gather = Callable[[Sequence[int]], list[list[int]]]


@dataclass(frozen=True)
class Ranks:
    """The ranks of a strategy.

    Attributes:
        strategy: its name.
        gather: a collective that returns each rank's numbers (int64), by rank; only this process's where it is alone.
        check: raises where the ranks can't be one training, before its first step.
        fix: what to do where their weights differ.
    """

    strategy: str
    gather: Gather
    check: Callable[[Expected, "torch.nn.Module"], None]
    fix: str


def gather(values: Sequence[int], group: Any = None) -> list[list[int]]:
    """Return the numbers of every rank of a process group, by rank; only this process's without a group."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.int64, device=collective_device(group))
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    return [one.tolist() for one in found]


def same_weights(model: "torch.nn.Module", group: Any = None, told_by: Gather | None = None) -> list[bool]:
    """Return for each rank of a group whether its weights are rank 0's, bit for bit. A collective: call it on all ranks.

    All-reduce gives every rank the same bits, and so does the optimizer's step after it.

    Args:
        told_by: another strategy's ``gather``; the process group then doesn't count.
    """
    mine = [int.from_bytes(weights_hash(model), "little", signed=True)]
    hashes = told_by(mine) if told_by else gather(mine, group)
    return [one == hashes[0] for one in hashes]


def check_weights(model: "torch.nn.Module", group: Any = None, *, step: int | None = None) -> None:
    """Raise, on all ranks, where the ranks' weights differ: their gradients are then not averaged.

    Args:
        group: the process group; None for the default one, which may be absent in a single process.
        step: the training step, for the message.

    Raises:
        HpcmlError: which ranks have other weights than rank 0.
    """
    raise_unless_same(same_weights(model, group), step)


def raise_unless_same(same: Sequence[bool], step: int | None, strategy: str = "ddp", fix: str = "") -> None:
    others = [rank for rank, equal in enumerate(same) if not equal]
    if not others:
        return
    one = len(others) == 1
    when = f" after step {step}" if step is not None else ""
    raise HpcmlError(
        f"the weights of rank{'' if one else 's'} {', '.join(map(str, others))} differ from rank 0's{when}: "
        "the gradients are not averaged, each trains by itself",
        origin=f'strategy "{strategy}"',
        fix=fix or DDP.fix,
    )


def check_ranks(expected: Expected, model: "torch.nn.Module") -> None:
    """Raise where the training can't be one of all ranks together, before its first step.

    Raises:
        HpcmlError: no process group of all tasks, a model that isn't wrapped, or one that is not on the task's GPU.
    """
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    world = dist.get_world_size() if dist.is_initialized() else 1
    alone = f"each of the {expected.world} tasks trains the whole job by itself"
    if world != expected.world:
        raise HpcmlError(
            f"{alone}: no process group"
            if world == 1
            else f"the process group has {world} ranks, the job {expected.world}",
            origin='strategy "ddp"',
            fix='torch.distributed.init_process_group("nccl" or "gloo") after hpcml.begin(), without rank and world_size',
        )
    fsdp.reshard(model)
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    if world > 1 and not wrapped and not any(map(fsdp.is_part, model.parameters())):
        fix = f"model = {_DDP}(model), or torch.distributed.fsdp.fully_shard(model), and hand that to run.epochs()"
        raise HpcmlError(f"{alone}: the model is not wrapped", origin='strategy "ddp"', fix=fix)
    fsdp.check_meshes(model, world)
    # With CPUOffloadPolicy the parts lie in the host's memory, and the mesh says where they are computed with.
    parameters = list(model.parameters())
    places = {p.device_mesh.device_type if fsdp.is_part(p) else p.device.type for p in parameters}
    if not expected.virtual and expected.gpus_per_task and places != {"cuda"}:
        fix = "model.to(run.device) before it is wrapped"
        raise HpcmlError(f"the model is on {', '.join(sorted(places))}, this task was given a GPU", fix=fix)


DDP = Ranks(
    "ddp",
    gather,
    check_ranks,
    f"model = {_DDP}(model), call that and not model.module, give the optimizer its parameters, change no weights by "
    "hand on one rank; fully_shard(model) leaves no parameter out",
)


def check_batch(global_batch: int, world: int, a_rank: int | None = None) -> None:
    """Raise where the ranks' batches don't make up the global batch.

    Args:
        a_rank: samples of one rank's batch; None where the loader doesn't tell.
    """
    if global_batch % world:
        lower = global_batch // world * world
        raise HpcmlError(
            f"global_batch = {global_batch} can't be shared evenly by {world} ranks",
            origin="global_batch",
            allowed=f"a multiple of {world}, such as {lower or world} or {lower + world}",
        )
    if a_rank is not None and a_rank * world != global_batch:
        raise HpcmlError(
            f"{world} ranks × {a_rank} samples are {world * a_rank} a step, but global_batch = {global_batch}",
            origin="the DataLoader's batch_size",
            allowed=f"global_batch // world size: {global_batch // world}",
        )


def check_loader(loader: Any, global_batch: int, world: int) -> str:
    """Check a DataLoader against the job; returns a warning for a person, or nothing.

    Raises:
        HpcmlError: batches of another size, none at all, or a sampler for other ranks.
    """
    sampler = getattr(loader, "sampler", None)
    a_rank = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
    check_batch(global_batch, world, a_rank if isinstance(a_rank, int) else None)
    inner = getattr(sampler, "sampler", sampler)  # a BatchSampler holds the one that picks
    if length(loader) == 0:
        count = len(loader.dataset) if hasattr(getattr(loader, "dataset", None), "__len__") else "too few"
        raise HpcmlError(
            f"{count} samples make no whole batch on {world} rank{'s' * (world > 1)}",
            origin=f"global_batch = {global_batch}",
            fix="a smaller global_batch, fewer ranks, or more data",
        )
    parts = getattr(inner, "num_replicas", None)
    if parts is not None and parts != world:
        fix = "DistributedSampler(dataset), without num_replicas, after init_process_group()"
        raise HpcmlError(f"the sampler shares the data among {parts} ranks, the job has {world}", fix=fix)
    if parts is None and world > 1:
        return (
            "the DataLoader has no DistributedSampler: unless the data is shared out elsewhere, all ranks see all of it"
        )
    return ""


class Stop:
    """Whether a run is asked to stop, agreed by all ranks on the same step.

    Attributes:
        agreed: whether all have agreed to stop.
        granted: whether at this very step all do what rank 0 wished; see ``asked``.
    """

    def __init__(self, path: Path, restart: int = 0, period_s: float = STOP_PERIOD_S, gather: Gather = gather) -> None:
        """Args: path: the run's stop file, which counts for this restart only. period_s: how often to look, about."""
        self._path, self._restart, self._period_s, self._gather = path, restart, period_s, gather
        self._step, self._last, self._next = 0, 0, 1
        self._since = time.perf_counter()
        self.agreed = self.granted = False

    def asked(self, wish: bool = False) -> bool:
        """Call once a step on all ranks; True on all from the same call on. At most every ``period_s`` it is a collective.

        Args:
            wish: of rank 0, for something that all ranks must do at the same step, such as saving: ``granted`` says on
                all of them whether this is the step.
        """
        self._step, self.granted = self._step + 1, False
        if self.agreed or self._step < self._next:
            return self.agreed
        now = time.perf_counter()
        steps = self._step - self._last
        # At most twice as many as the last time: the first steps say little about the others.
        every = max(1, min(2 * steps, int(self._period_s * steps / max(now - self._since, 1e-9))))
        here = rundir.read_json(self._path).get("restart") == self._restart
        told = self._gather([int(here), every, int(wish)])
        self.agreed, every = any(stop for stop, _, _ in told), min(steps for _, steps, _ in told)
        self.granted = bool(told[0][2])
        self._last, self._next, self._since = self._step, self._step + every, now
        return self.agreed

    @property
    def signal(self) -> str:
        """What asked, as far as this rank can see."""
        return str(rundir.read_json(self._path).get("signal", "another rank's stop file"))


def collective_device(group: Any = None) -> "torch.device":
    """Where tensors must lie for a group's collectives: NCCL knows GPUs only."""
    import torch
    import torch.distributed as dist

    with_cpu = "gloo" in str(dist.get_backend(group)) or "mpi" in str(dist.get_backend(group))
    return torch.device("cpu") if with_cpu else torch.device("cuda", torch.cuda.current_device())
