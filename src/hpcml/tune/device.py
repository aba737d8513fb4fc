"""What the devices here compute fast in: a GPU's compute capability, a processor's flags."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path


def capability(gpus: Sequence[str]) -> tuple[int, int] | None:
    """Return the lowest compute capability of some GPUs, None where NVML doesn't tell.

    Args:
        gpus: as ``CUDA_VISIBLE_DEVICES`` names them: indices, or UUIDs.
    """
    try:
        import pynvml
    except ImportError:
        return None
    found: list[tuple[int, int]] = []
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            for gpu in gpus:
                by = pynvml.nvmlDeviceGetHandleByIndex if gpu.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID
                found.append(tuple(pynvml.nvmlDeviceGetCudaComputeCapability(by(int(gpu) if gpu.isdecimal() else gpu))))
        finally:
            pynvml.nvmlShutdown()
    return min(found, default=None)


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return a processor's flags; empty where the system doesn't tell."""
    try:
        match = re.search(r"^flags\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return ""
    return match[1] if match else ""
