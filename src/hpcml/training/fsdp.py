"""torch's ``fully_shard`` (FSDP), where each rank has a part of the weights only: what can be compared, how it is kept.

Nothing is there twice that could differ, so these checks are others than DistributedDataParallel's: each weight must be cut
into parts that lie on all ranks of the job, all ranks must have parts of the same model, and where a mesh replicates the
model its copies must be equal. Whatever is not cut is compared as ever, in ``ddp``.

In a checkpoint each rank writes its own parts, by torch.distributed.checkpoint (DCP), which can deal them out again to
another number of ranks: docs.pytorch.org/docs/stable/distributed.checkpoint.html. torch is imported inside the functions.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HpcmlError
from .checkpoint import why

if TYPE_CHECKING:
    import torch


def is_part(parameter: "torch.Tensor") -> bool:
    """Whether this rank has a part of a parameter only: ``fully_shard`` makes each one a DTensor."""
    tensors = sys.modules.get("torch.distributed.tensor")  # before it is imported there are none, and it takes its time
    return tensors is not None and isinstance(parameter, tensors.DTensor)


def is_shared(model: "torch.nn.Module") -> bool:
    """Whether ``fully_shard`` has shared out any of a model's parameters."""
    reshard(model)
    return any(map(is_part, model.parameters()))


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


# ------------------------------------------------------------------ checkpoints

_PART = "torch.distributed.checkpoint"  # stands in a state where a part was taken out


def save(folder: Path, state: Mapping[str, Any]) -> Any:
    """Write this rank's parts of what is shared out in a state; a collective.

    Returns:
        The state without them: small, alike on all ranks, and left to the caller.

    Raises:
        OSError: some rank could not write; raised on all.
    """
    import torch.distributed.checkpoint as dcp

    parts: dict[str, torch.Tensor] = {}
    rest = _without_parts(state, parts)
    _together(lambda: dcp.save(parts, storage_writer=dcp.FileSystemWriter(folder)))
    return rest


def load(folder: Path, rest: Mapping[str, Any], like: Callable[..., "torch.Tensor"]) -> Any:
    """Return the state that ``save`` was given, with this rank's parts, also where there were other ranks; a collective.

    Args:
        rest: what ``save`` returned.
        like: returns a tensor to load into, shared out as it is to be, for the keys that lead to it in the state.

    Raises:
        HpcmlError: the parts are not those of what is trained here.
    """
    import torch.distributed.checkpoint as dcp

    try:
        parts: dict[str, torch.Tensor] = {}
        state = _with_parts(rest, parts, like)
        _together(lambda: dcp.load(parts, storage_reader=dcp.FileSystemReader(folder)))
    except (OSError, LookupError) as error:
        fix = "train what was saved, or remove this checkpoint: the one before is used then"
        raise HpcmlError(f"checkpoint {folder.name} can't be loaded: {error}", origin=str(folder), fix=fix) from None
    return state


def like_moments(optimizer: "torch.optim.Optimizer", keys: Sequence[Any], kind: "torch.dtype") -> "torch.Tensor":
    """Return an empty moment, such as AdamW's ``exp_avg``: cut as its weight is.

    Args:
        keys: that lead to it in the optimizer's ``state_dict()``: "state", the weight's number, its name.
    """
    import torch

    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return torch.zeros_like(weights[keys[1]].detach(), dtype=kind)


def check_moments(optimizer: "torch.optim.Optimizer") -> None:
    """Refuse what an optimizer holds that is shared out in another way than its weights, as Adafactor's factors are.

    Raises:
        HpcmlError: what.
    """
    for weight, held in optimizer.state.items():
        for name, one in held.items():
            if is_part(one) and (one.shape, one.placements) != (weight.shape, getattr(weight, "placements", None)):
                what = f"{name} of {type(optimizer).__name__} is not cut as its weights are, and can't be kept"
                raise HpcmlError(what, origin="run.epochs(keep=…)", fix="another optimizer, such as AdamW, or no keep=")


def _without_parts(state: Any, parts: dict[str, Any], *keys: Any) -> Any:
    """Return a state where each tensor that is shared out is replaced by its name, and put them into ``parts``."""
    if is_part(state):
        name = ".".join(map(str, keys))
        parts[name] = state
        return {_PART: (name, state.dtype)}
    if isinstance(state, Mapping):
        return {key: _without_parts(value, parts, *keys, key) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(_without_parts(value, parts, *keys, number) for number, value in enumerate(state))
    return state


def _with_parts(rest: Any, parts: dict[str, Any], like: Callable[..., Any], *keys: Any) -> Any:
    if isinstance(rest, Mapping):
        if _PART in rest:
            name, kind = rest[_PART]
            parts[name] = like(keys, kind)
            return parts[name]
        return {key: _with_parts(value, parts, like, *keys, key) for key, value in rest.items()}
    if type(rest) in (list, tuple):
        return type(rest)(_with_parts(value, parts, like, *keys, number) for number, value in enumerate(rest))
    return rest


def _together(collective: Callable[[], Any]) -> None:
    """Call one of DCP's functions, and turn what it raises on all ranks into what a person needs of it."""
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

    try:
        collective()
    except CheckpointException as error:
        rank, (reason, _) = min(error.failures.items())
        text = why(reason) if isinstance(reason, Exception) else repr(reason)
        raise OSError(f"rank {rank}: {text}") from None
