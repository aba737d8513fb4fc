"""This node's own disk: where it is, how much it holds, and whether it is one."""

import contextlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import HpcmlError
from ...filesystem import NETWORK, file_system

# The first is the person's; the others are set by clusters. TMPDIR is last of them: some sites point it at Lustre.
VARIABLES = ("HPCML_SCRATCH", "SLURM_TMPDIR", "LOCALSCRATCH", "LOCAL_SCRATCH", "TMPDIR")
IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Scratch:
    """A folder on this node.

    Attributes:
        path: the folder; it exists and can be written.
        origin: the variable that named it.
        kind: of its file system, such as ext4.
        free: bytes that are free.
    """

    path: Path
    origin: str
    kind: str
    free: int

    @property
    def in_memory(self) -> bool:
        """Whether what lies there takes the job's memory."""
        return self.kind in IN_MEMORY

    def __str__(self) -> str:
        return f"{self.path} ({self.kind}, {self.origin})"


def is_shared(kind: str) -> bool:
    """Whether a file system of that kind is reached over a network, as far as its kind tells.

    What FUSE brings is taken for remote: sshfs, S3 and cluster file systems are, and a mounted image is read through
    a process of its own.
    """
    return kind in NETWORK or kind.startswith("fuse")


def candidates(environment: Mapping[str, str] = os.environ) -> list[tuple[str, Path]]:
    """Return the folders that may be on this node's disk, with the variables that name them, the best first."""
    named = [(name, Path(environment[name])) for name in VARIABLES if environment.get(name)]
    return [*((f"${name}", path) for name, path in named), ("the default", Path("/tmp"))]


def find(environment: Mapping[str, str] = os.environ) -> tuple[Scratch | None, str]:
    """Return this node's scratch folder, a disk before memory, and why there is none.

    Raises:
        HpcmlError: ``$HPCML_SCRATCH`` names no folder that can be written, or one that nodes share.
    """
    found, refused = [], []
    for origin, path in candidates(environment):
        kind = file_system(path.resolve())
        usable = path.is_absolute() and path.is_dir() and _is_writable(path)
        if origin == "$HPCML_SCRATCH" and (not usable or is_shared(kind)):
            what = f"{path} is on {kind}, which nodes share" if usable else f"{path} is no folder that can be written"
            raise HpcmlError(what, origin=origin, fix="unset it, or name a folder on the node's own disk")
        if not usable or is_shared(kind):
            refused.append(f"{origin} is {path}" + (f" on {kind}" if usable else ", which can't be written"))
            continue
        usage = os.statvfs(path)
        found.append(Scratch(path, origin, kind, usage.f_bavail * usage.f_frsize))
    if not found:
        return None, "this node has no disk of its own: " + ", ".join(refused)
    own = [one for one in found if one.origin == "$HPCML_SCRATCH"]
    disks = [one for one in found if not one.in_memory]
    return (own or disks or found)[0], ""


def memory_left(environment: Mapping[str, str] = os.environ) -> int:
    """Return the bytes of memory that the job can still take: what is free here, at most what Slurm gave it a node."""
    free = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(KeyError, ValueError):
        given = int(environment["SLURM_MEM_PER_NODE"]) * 2**20  # MiB; 0 is all of it
        return min(free, given) if given else free
    return free


def _is_writable(path: Path) -> bool:
    # By trying: access(2) says yes to root also on a file system that is mounted read-only or full.
    try:
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False
