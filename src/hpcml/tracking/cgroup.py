"""The control group that Slurm has made for a job's step: where it is and what it counts. Linux, versions 1 and 2.

A cgroup counts what all processes of the step have used, also of those that have ended, in a few reads
(kernel.org/doc/Documentation/admin-guide/cgroup-v2.rst; cgroup-v1/{memory,cpuacct,blkio-controller}.rst).
"""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

# Version 1 tells "no limit" by the largest page-aligned number; no node has an exbibyte.
UNLIMITED = 2**60
_V2 = ("cpu.stat", "memory.current", "io.stat")


@dataclass(frozen=True)
class Group:
    """The folders of a job's cgroup.

    Attributes:
        version: of the interface, 1 or 2.
        cpu, memory, io: folders of the controllers that have this cgroup; None where a controller doesn't.
        members: a folder whose ``cgroup.procs``, and those below it, list the processes.
        mark: what the lines of ``/proc/PID/cgroup`` of its processes contain.
    """

    version: int
    cpu: Path | None
    memory: Path | None
    io: Path | None
    members: Path
    mark: str


def find(root: Path = Path("/"), pid: int | str = "self") -> Group | None:
    """Return the cgroup of the Slurm step, else of the Slurm job, that a process is in; None without one.

    Slurm names them ``…/job_ID/step_ID/…`` in both versions (slurm.schedmd.com/cgroups.html, cgroup_v2.html).
    """
    version, mark = 0, ""
    folders: dict[str, Path] = {}
    mounts = _mounts(root)
    for line in contents(root / f"proc/{pid}/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        found = re.match(r"(?P<head>.*/job_\d+(?:/step_[^/]+)?)(?:/|$)", path)
        mount = mounts.get(controllers.removeprefix("name="))
        if found is None or mount is None:
            continue
        folder = mount[1] / os.path.relpath(found["head"], mount[0])
        if not folder.is_dir():
            continue
        version = max(version, 1 if controllers else 2)
        mark = (re.search(r"/job_\d+(?:/step_[^/]+)?$", found["head"]) or [""])[0]
        folders |= dict.fromkeys(controllers.split(",") if controllers else ["unified"], folder)
    if not folders:
        return None
    # A hybrid mount has the controllers in version 1 and an empty version 2 beside them.
    if any(name in folders for name in ("cpuacct", "memory", "blkio")):
        cpu, memory, io = (folders.get(name) for name in ("cpuacct", "memory", "blkio"))
        return Group(1, cpu, memory, io, next(iter(folders.values())), mark)
    first = folders.get("unified") or next(iter(folders.values()))
    has = {name: first if version == 2 and (first / name).exists() else None for name in _V2}
    return Group(max(version, 1), has["cpu.stat"], has["memory.current"], has["io.stat"], first, mark)


def core_s(group: Group) -> float | None:
    """Return the CPU time that was used, in seconds."""
    if group.version == 1:
        nanoseconds = number(f"{group.cpu}/cpuacct.usage")
        return None if nanoseconds is None else nanoseconds / 1e9
    microseconds = numbers(f"{group.cpu}/cpu.stat").get("usage_usec")
    return None if microseconds is None else microseconds / 1e6


def block_io(group: Group) -> tuple[int, int]:
    """Return the bytes read and written over all block devices; Lustre and NFS are none."""
    if group.version == 2:
        counts = re.findall(r"([rw])bytes=(\d+)", contents(f"{group.io}/io.stat"))
    else:
        text = contents(f"{group.io}/blkio.throttle.io_service_bytes_recursive")
        text = text or contents(f"{group.io}/blkio.throttle.io_service_bytes")
        counts = [(kind[0].lower(), count) for kind, count in re.findall(r"\S+ (Read|Write) (\d+)", text)]
    read, written = (sum(int(count) for kind, count in counts if kind == way) for way in "rw")
    return read, written


@dataclass(frozen=True)
class Memory:
    """Memory of a cgroup, in bytes: all, what of it is page cache, and the kernel's own peak (0 before Linux 5.19)."""

    current: int
    cache: int
    peak: int


def memory(group: Group) -> Memory | None:
    """Return a cgroup's memory; None where its controller doesn't tell."""
    first = group.version == 1
    current = number(f"{group.memory}/{'memory.usage_in_bytes' if first else 'memory.current'}")
    if current is None:
        return None
    stat = numbers(f"{group.memory}/memory.stat")
    prefix = "total_" if first else ""
    # The lists of file pages; shared memory, which nobody can drop, is not on them.
    cache = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
    peak = number(f"{group.memory}/{'memory.max_usage_in_bytes' if first else 'memory.peak'}")
    return Memory(current, cache, peak or 0)


def memory_limit(group: Group) -> int | None:
    """Return the lowest limit of memory of the cgroup and those above it, in bytes."""
    limits, folder = [], group.memory
    while folder and folder != folder.parent and folder.name != "cgroup":
        limits += [number(folder / "memory.max"), number(folder / "memory.limit_in_bytes")]
        folder = folder.parent
    return min((limit for limit in limits if limit is not None and limit < UNLIMITED), default=None)


def processes(folders: list[str]) -> set[int]:
    """Return the processes in these folders of a cgroup."""
    return {int(word) for folder in folders for word in contents(f"{folder}/cgroup.procs").split()}


def _mounts(root: Path) -> dict[str, tuple[str, Path]]:
    """Return root within the hierarchy and mount point of each controller; version 2 has the empty name."""
    mounts = {}
    for line in contents(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        words, kind = left.split(), right.split()
        if kind[:1] == ["cgroup2"]:
            mounts[""] = (words[3], root / words[4].lstrip("/"))
        elif kind[:1] == ["cgroup"]:
            options = [option.removeprefix("name=") for option in kind[-1].split(",")]
            where = (words[3], root / words[4].lstrip("/"))
            mounts |= dict.fromkeys(options, where)
            joint = [option for option in options if option not in ("rw", "ro")]
            mounts[",".join(joint)] = where
    return mounts


def contents(path: Path | str) -> str:
    """Return a file's text, empty where it is not there or not for us; pathlib and buffers cost more than the read."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = []
            while part := os.read(handle, 65536):
                parts.append(part)
            return b"".join(parts).decode(errors="replace")
        finally:
            os.close(handle)
    return ""


def number(path: Path | str) -> int | None:
    """Return the number that a file holds; None where it is not there or says "max"."""
    word = contents(path).strip()
    return int(word) if word.isdecimal() else None


def numbers(path: str) -> dict[str, int]:
    """Return the numbers of a file of lines "name number"."""
    words = contents(path).split()
    return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=False) if value.isdecimal()}
