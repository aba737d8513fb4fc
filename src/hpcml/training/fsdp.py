"""What can be compared across the ranks where each has a part of the weights only: torch's ``fully_shard`` (FSDP).

Nothing is there twice that could differ, so these checks are others than DistributedDataParallel's: each weight must be cut
into parts that lie on all ranks of the job, all ranks must have parts of the same model, and where a mesh replicates the
model its copies must be equal. Whatever is not cut is compared as ever, in ``ddp``. torch is imported inside the functions.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import HpcmlError

if TYPE_CHECKING:
    import torch


def is_part(parameter: "torch.Tensor") -> bool:
    """Whether this rank has a part of a parameter only: ``fully_shard`` makes each one a DTensor."""
    tensors = sys.modules.get("torch.distributed.tensor")  # before it is imported there are none, and it takes its time
    return tensors is not None and isinstance(parameter, tensors.DTensor)


def reshard(model: "torch.nn.Module") -> None:
    """Drop the weights that ``fully_shard`` keeps whole after a forward without backward, as in an evaluation.

    What is compared is then the same at any time, and no NumPy view keeps torch from freeing them.
    """
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())  # from torch 2.6 on
    for module in model.modules():
        if isinstance(module, kind):
            module.reshard()


def check_meshes(model: "torch.nn.Module", world: int) -> None:
    """Raise where the parts of a parameter lie on some ranks only: those would train a model of their own.

    Raises:
        HpcmlError: which parameter, and on which ranks its parts are.
    """
    for name, parameter in model.named_parameters():
        if not is_part(parameter):
            continue
        ranks = sorted(parameter.device_mesh.mesh.flatten().tolist())
        if ranks != list(range(world)):
            raise HpcmlError(
                f"the parts of {name} lie on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {world}: "
                "they train a model of their own",
                origin='strategy "ddp"',
                fix="fully_shard(model) without a mesh, or with init_device_mesh(run.device.type, (dist.get_world_size(),))",
            )


def parts_hash(parameters: Iterable["torch.Tensor"], gather: Callable[..., list[list[int]]]) -> bytes:
    """Return what stands for parameters of which each rank has a part: equal on all ranks that have parts of one model.

    Each rank hashes its own parts, and 8 bytes of that are gathered along the mesh, in a collective for each mesh: no
    weight leaves its rank. Along a dimension that replicates the model nothing is gathered, so copies that differ
    give different hashes.

    Args:
        gather: returns the numbers of each rank of a process group; see ``ddp.gather``.
    """
    mine: dict[Any, Any] = {}  # by mesh and placements, in the parameters' order
    for parameter in parameters:
        key = parameter.device_mesh, parameter.placements
        mine.setdefault(key, hashlib.sha256()).update(content(parameter.to_local()))
    digest = hashlib.sha256()
    for (mesh, placements), part in mine.items():
        digest.update(f"{mesh.mesh.tolist()}{placements}".encode())
        digest.update(_along(mesh, placements, part.digest(), gather))
    return digest.digest()


def content(tensor: "torch.Tensor") -> Any:
    """Return a tensor's bytes, for a hash."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _along(mesh: Any, placements: Sequence[Any], mine: bytes, gather: Callable[..., list[list[int]]]) -> bytes:
    for dimension, placement in enumerate(placements):
        if not placement.is_replicate():
            number = int.from_bytes(mine[:8], "little", signed=True)
            mine = hashlib.sha256(repr(gather([number], mesh.get_group(dimension))).encode()).digest()
    return mine
