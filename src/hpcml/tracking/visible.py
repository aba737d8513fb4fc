"""Which of NVML's devices the names of a job's GPUs mean.

Positions are taken in PCI order, NVML's own. CUDA's default, FASTEST_FIRST, is the same order on a node of like GPUs;
on a mixed one set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name GPUs by UUID as Slurm does for MIG.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Seen:
    """A device as NVML lists it: its handle, UUID, minor number (/dev/nvidiaN), and for a MIG instance its GPU's UUID."""

    handle: Any
    uuid: str
    minor: int
    parent: str = ""


def choose(names: Sequence[str], seen: Sequence[Seen], slurm_ids: Sequence[str] = ()) -> list[Seen | None]:
    """Return the device that each name of CUDA_VISIBLE_DEVICES means; None where NVML shows none.

    Args:
        names: positions, or UUIDs (``GPU-…``, ``MIG-…``), which may be shortened.
        seen: NVML's devices in its order, the instances of a GPU in its place.
        slurm_ids: SLURM_STEP_GPUS or SLURM_JOB_GPUS, minor numbers that no cgroup changes (srun(1)). They matter where
            NVML shows more than the job's: then positions that aren't among them count within the job's GPUs.
    """
    among = list(seen)
    if len(seen) > len(slurm_ids) and not set(names) <= set(slurm_ids):
        of_job = [one for number in slurm_ids for one in seen if str(one.minor) == number]
        among = of_job if len(of_job) >= len(slurm_ids) > 0 else among
    chosen: list[Seen | None] = []
    for name in names:
        if name.isdecimal():
            chosen.append(among[int(name)] if int(name) < len(among) else None)
        else:
            chosen.append(next((one for one in seen if name and one.uuid.lower().startswith(name.lower())), None))
    return chosen


def listed(nvml: Any) -> list[Seen]:
    """Return NVML's devices in its order, a GPU that is divided (MIG) as its instances, as CUDA counts them."""
    seen = list[Seen]()
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid, minor = str(nvml.nvmlDeviceGetUUID(handle)), index
            with contextlib.suppress(nvml.NVMLError):
                minor = nvml.nvmlDeviceGetMinorNumber(handle)
        except nvml.NVMLError:  # it keeps its place, or the others' positions would mean other GPUs
            seen.append(Seen(None, "", index))
            continue
        seen += _instances(nvml, handle, uuid, minor) or [Seen(handle, uuid, minor)]
    return seen


def _instances(nvml: Any, handle: Any, uuid: str, minor: int) -> list[Seen]:
    found = list[Seen]()
    with contextlib.suppress(nvml.NVMLError):
        if nvml.nvmlDeviceGetMigMode(handle)[0]:
            for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
                with contextlib.suppress(nvml.NVMLError):  # numbers have gaps
                    mig = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
                    found.append(Seen(mig, str(nvml.nvmlDeviceGetUUID(mig)), minor, parent=uuid))
    return found
