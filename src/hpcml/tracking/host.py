"""CPU, memory and I/O of a job's processes on this node: from its Slurm cgroup where there is one, else by process.

A cgroup counts what all processes of the step have used, also of those that have ended, in three reads
(kernel.org/doc/Documentation/admin-guide/cgroup-v2.rst; cgroup-v1/{memory,cpuacct,blkio-controller}.rst). What its
controllers don't count is summed over the processes (proc(5)). Linux and the standard library only.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import cgroup
from .cgroup import contents

MIB = 2**20
# Samples between two looks for new processes, and for new folders of the cgroup: both come with a task or a loader, and
# listing /proc costs as much as eight GPUs. The first samples all look.
LOOK_BEATS = 5
# Processes whose I/O is read at each sample, at about 10 µs each; of more, each sample reads a rate over more seconds.
IO_READS = 20
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Usage:
    """What the processes have used at one moment; None where that is unknown.

    Attributes:
        core_s: CPU time since some fixed moment, in seconds.
        used, peak: memory without the page cache, in bytes, which the kernel takes back when it needs it.
        read, written: since some fixed moment, in bytes; of disks as the kernel counts them, so not of Lustre.
        processes: how many there are.
    """

    core_s: float | None = None
    used: int | None = None
    peak: int | None = None
    read: int | None = None
    written: int | None = None
    processes: int | None = None


@dataclass
class Processes:
    """The processes below one, by parent and by session: those of a daemon that left its parent still count.

    Each call lists ``/proc``, but reads only what is new there.
    """

    pid: int
    root: Path = Path("/")
    _foreign: set[int] = field(default_factory=set)
    _ours: set[int] = field(default_factory=set)
    _sessions: set[int] = field(default_factory=set)

    def find(self) -> set[int]:
        """Return the ids of those that are alive."""
        here = {int(name) for name in os.listdir(self.root / "proc") if name.isdecimal()}
        self._foreign &= here
        self._ours = (self._ours | {self.pid}) & here
        fresh = {pid: _stat(self.root, pid) for pid in here - self._foreign - self._ours}
        while True:  # a child may have a lower number than its parent
            # A session's leader below us is ours, and so is its session; our own session may hold others' processes.
            joined = {p for p, s in fresh.items() if s and (s.parent in self._ours or s.session in self._sessions)}
            if not joined:
                break
            self._ours |= joined
            self._sessions |= {s.session for p in joined if (s := fresh.pop(p)) and s.session == p}
        self._foreign |= {pid for pid, stat in fresh.items() if stat}
        return self._ours


def idle_core_s(root: Path = Path("/")) -> float | None:
    """Return how long the cores that this process may use were idle since boot, in core-seconds; None if unknown."""
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    lines = [line.split() for line in contents(root / "proc/stat").splitlines()]
    ticks = [int(words[4]) + int(words[5]) for words in lines if words and words[0] in mine]  # proc(5): idle, iowait
    return sum(ticks) / _TICK if ticks else None


@dataclass(frozen=True)
class _Stat:
    parent: int
    session: int
    core_s: float
    resident: int


def _stat(root: Path, pid: int) -> _Stat | None:
    """Read /proc/PID/stat; None where the process has gone. The name, in parentheses, may hold anything."""
    words = contents(f"{root}/proc/{pid}/stat").rpartition(")")[2].split()
    if len(words) < 22:
        return None
    # proc(5): utime, stime, and those of the children that were waited for, so that nothing is lost when one ends
    core_s = sum(map(int, words[11:15])) / _TICK
    return _Stat(int(words[1]), int(words[3]), core_s, int(words[21]) * _PAGE)


class Host:
    """Reads the usage of a job on this node.

    Args:
        pid: of the process whose tree is watched where Slurm has made no cgroup.
        root: of the file system.
        environment: for Slurm's limit of memory.

    Attributes:
        limit: of memory, in bytes; None without one.
        peak: the most memory that was in use, in bytes.
    """

    def __init__(self, pid: int, root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> None:
        self.root = root
        self.group = cgroup.find(root)
        self.tree = Processes(pid, root)
        own = cgroup.memory_limit(self.group) if self.group else None
        self.limit = min((limit for limit in (own, slurm_limit(environment)) if limit), default=None)
        self._initial = os.path.realpath(root / "proc/self/ns/pid").endswith("[4026531836]")  # PROC_PID_INIT_INO
        self._owners: dict[int, bool | None] = {}
        self._beat = 0
        self._folders: list[str] = []
        self.peak = 0
        self._kernel_peak = 0
        self._pids: set[int] = set()

    def read(self) -> Usage:
        """Return what the job has used up to now."""
        group = self.group
        if group:
            self._pids = self._members(group)
        elif self._looks():
            self._pids = set(self.tree.find())
        stats = {}
        if not (group and group.cpu and group.memory):
            stats = {pid: stat for pid in self._pids if (stat := _stat(self.root, pid))}
            self._pids = set(stats)
        usage = Usage(processes=len(self._pids))
        if group and group.cpu:
            usage.core_s = cgroup.core_s(group)
        if group and group.memory and (memory := cgroup.memory(group)):
            usage.used = self._without_cache(memory)
        if usage.core_s is None and stats:
            usage.core_s = sum(stat.core_s for stat in stats.values())
        if usage.used is None and stats:  # as Slurm's own accounting: a page that two processes share counts twice
            usage.used = sum(stat.resident for stat in stats.values())
        self.peak = max(self.peak, usage.used or 0)
        usage.peak = self.peak
        if group and group.io:
            usage.read, usage.written = cgroup.block_io(group)
        elif self._beat % (1 + len(self._pids) // IO_READS) == 0:
            usage.read, usage.written = _process_io(self.root, self._pids)
        self._beat += 1
        return usage

    def owns(self, pid: int) -> bool | None:
        """Whether a process that a driver names is the job's; None where that can't be known, as inside a container.

        A process id of another namespace means nothing here. In the first namespace, what can't be seen is somebody
        else's: one's own processes can always be seen.
        """
        if pid in self._pids:
            return True
        if pid not in self._owners:
            lines = contents(f"{self.root}/proc/{pid}/cgroup")
            if not lines:
                return False if self._initial else None
            if self.group:
                self._owners[pid] = any(f"{self.group.mark}/" in f"{line}/" for line in lines.splitlines())
            else:
                self._owners[pid] = pid in self.tree.find()  # it may be new
        return self._owners[pid]

    def _looks(self) -> bool:
        return self._beat < LOOK_BEATS or self._beat % LOOK_BEATS == 0

    def _members(self, group: cgroup.Group) -> set[int]:
        if self._looks():
            self._folders = [folder for folder, _, _ in os.walk(group.members)]
        return cgroup.processes(self._folders)

    def _without_cache(self, memory: cgroup.Memory) -> int:
        """Bytes in use that are no page cache; also learns of a peak between two samples.

        The kernel's own peak holds the page cache, which fills up to the limit wherever files are read. Where it has
        risen since the last sample, it less the cache of now is what was in use at most.
        """
        if memory.peak > self._kernel_peak:
            self._kernel_peak = memory.peak
            self.peak = max(self.peak, memory.peak - memory.cache)
        return max(0, memory.current - memory.cache)


def slurm_limit(environment: Mapping[str, str]) -> int | None:
    """Return the memory that Slurm gave the job on this node, in bytes; its variables are in MiB (srun(1))."""
    per_node = environment.get("SLURM_MEM_PER_NODE", "")
    if per_node.isdecimal() and int(per_node):
        return int(per_node) * MIB
    per_core, cores = environment.get("SLURM_MEM_PER_CPU", ""), environment.get("SLURM_CPUS_ON_NODE", "")
    if per_core.isdecimal() and cores.isdecimal() and int(per_core):
        return int(per_core) * int(cores) * MIB
    return None


def _process_io(root: Path, pids: Iterable[int]) -> tuple[int, int] | tuple[None, None]:
    """Bytes that the processes, and the children that they waited for, made disks read and write."""
    read = written = 0
    for pid in pids:
        counted = contents(f"{root}/proc/{pid}/io")
        found = re.search(r"^read_bytes: (\d+)\nwrite_bytes: (\d+)", counted, re.MULTILINE)
        if found:
            read, written = read + int(found[1]), written + int(found[2])
        elif pid == os.getpid():
            return None, None  # this kernel doesn't count it
    return read, written
