"""Pure parsers of what Slurm's commands and variables say; no command is run here."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import HpcmlError

# squeue(1), JOB STATE CODES. A job in one of these has ended for good.
ENDED = frozenset(
    [
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "OUT_OF_MEMORY",
        "NODE_FAIL",
        "PREEMPTED",
        "BOOT_FAIL",
        "DEADLINE",
        "REVOKED",
    ]
)


# squeue(1), JOB STATE CODES. A job in one of these has not begun, or has been put back into the queue.
WAITING = frozenset(["PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"])


@dataclass(frozen=True)
class JobState:
    """What Slurm says of one job.

    Attributes:
        state: Slurm's long state name, such as ``RUNNING`` or ``OUT_OF_MEMORY``.
        reason: why it waits or ended, Slurm's word; empty where there is none.
        exit_code: of the batch script; None while unknown.
        source: the command that said so.
        start: when it began, or while it waits Slurm's estimate, in seconds since the epoch; None while unknown.
        restarts: how often it was put back into the queue; None where the command doesn't tell.
    """

    state: str
    reason: str = ""
    exit_code: int | None = None
    source: str = ""
    start: float | None = None
    restarts: int | None = None

    @property
    def ended(self) -> bool:
        """Whether the job has ended for good."""
        return self.state in ENDED

    @property
    def waiting(self) -> bool:
        """Whether the job is in the queue and not running."""
        return self.state in WAITING


@dataclass(frozen=True)
class Partition:
    """One partition as sinfo tells it: limits a node, memory in GiB, time as Slurm prints it."""

    name: str
    is_default: bool
    nodes: int
    cores_per_node: int
    mem_gb_per_node: int
    max_time: str | None
    gpus_per_node: int
    gpu_type: str | None


def hosts(expression: str) -> list[str]:
    """Expand a host list such as ``gpu[01-03,7],login1`` (scontrol(1), show hostnames).

    Raises:
        ValueError: brackets don't match.
    """
    return [host for part in _split(expression) for host in _expand(part)]


def _split(expression: str) -> Iterator[str]:
    depth, start = 0, 0
    for index, char in enumerate(expression):
        depth += (char == "[") - (char == "]")
        if depth < 0:
            raise ValueError(f"brackets don't match in host list {expression!r}")
        if char == "," and depth == 0:
            yield expression[start:index]
            start = index + 1
    if depth:
        raise ValueError(f"brackets don't match in host list {expression!r}")
    if expression[start:]:
        yield expression[start:]


def _expand(part: str) -> Iterator[str]:
    match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if not match:
        yield part
        return
    prefix, ranges, rest = match.groups()
    for item in ranges.split(","):
        low, _, high = item.partition("-")
        for number in range(int(low), int(high or low) + 1):
            for tail in _expand(rest):
                yield f"{prefix}{number:0{len(low)}d}{tail}"


def tasks_per_node(expression: str) -> list[int]:
    """Expand ``SLURM_STEP_TASKS_PER_NODE``, such as ``2(x3),1`` → ``[2, 2, 2, 1]``."""
    counts: list[int] = []
    for item in expression.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if not match:
            raise ValueError(f"{expression!r} is not a list of tasks per node")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def pairs(line: str) -> dict[str, str]:
    """Read one line of ``scontrol --oneliner show …``: ``Key=value`` words, values may hold spaces."""
    found = re.finditer(r"(?:^|\s)([A-Za-z][\w:/]*)=(.*?)(?=\s+[A-Za-z][\w:/]*=|\s*$)", line.strip())
    # The first of a name counts: a job's own text (WorkDir, Comment) comes late and may look like a pair.
    return {match[1]: match[2] for match in reversed(list(found))}


# %i last: a stub or an old squeue that prints less is still read. Reasons hold commas and spaces, never a bar.
SQUEUE_FORMAT = "%T|%r|%S|%i"


def squeue_line(line: str) -> JobState:
    """Read a line of ``squeue --format=SQUEUE_FORMAT``; what is missing at its end is unknown."""
    state, reason, start, _ = (*line.strip().split("|"), "", "", "")[:4]
    return JobState(state, "" if reason == "None" else reason, None, "squeue", moment(start))


def squeue_jobs(text: str) -> dict[str, JobState]:
    """Read all lines of ``squeue --array --format=SQUEUE_FORMAT``, by job id; of an array by ``<array's id>_<index>``."""
    lines = [line for line in text.splitlines() if line.count("|") == SQUEUE_FORMAT.count("|")]
    return {line.rpartition("|")[2].strip(): squeue_line(line) for line in lines}


def scontrol_job(text: str) -> JobState:
    """Read ``scontrol --oneliner show job``."""
    job = pairs(text.splitlines()[0])
    reason, restarts = job.get("Reason", "None"), job.get("Restarts", "")
    return JobState(
        job.get("JobState", "UNKNOWN"),
        "" if reason == "None" else reason,
        _exit(job.get("ExitCode", "")),
        "scontrol",
        moment(job.get("StartTime", "")),
        int(restarts) if restarts.isdecimal() else None,
    )


def sacct_line(line: str) -> JobState:
    """Read a line of ``sacct --parsable2 --noheader --format=State,ExitCode``; ``CANCELLED by 0`` is CANCELLED."""
    state, _, code = line.strip().partition("|")
    return JobState((state.split() or ["UNKNOWN"])[0].rstrip("+"), "", _exit(code), "sacct")


def sacct_jobs(text: str) -> dict[str, JobState]:
    """Read all lines of ``sacct --parsable2 --noheader --format=JobID,State,ExitCode``, by job id."""
    words = [line.strip().partition("|") for line in text.splitlines() if line.count("|") == 2]
    return {job_id: sacct_line(rest) for job_id, _, rest in words}


def moment(text: str) -> float | None:
    """Return Slurm's ``2026-11-22T23:49:51``, local time, in seconds since the epoch; None for ``N/A`` and the like."""
    try:
        return time.mktime(time.strptime(text.strip(), "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None


def _exit(code: str) -> int | None:
    match = re.fullmatch(r"(\d+):(\d+)", code)
    return None if not match else int(match[1]) or (128 + int(match[2]) if int(match[2]) else 0)


SINFO_FORMAT = "%R|%a|%D|%c|%m|%l|%G|%P"


def partitions(text: str) -> list[Partition]:
    """Read ``sinfo --noheader --format=SINFO_FORMAT``; the lines of one partition are summed, its largest node kept.

    Raises:
        HpcmlError: a line is not of that form.
    """
    found: dict[str, Partition] = {}
    for line in filter(str.strip, text.splitlines()):
        words = line.strip().split("|")
        if len(words) != SINFO_FORMAT.count("|") + 1 or not words[2].isdecimal():
            raise HpcmlError(
                f"sinfo printed a line that is not one of its own: {line.strip()!r}",
                allowed=f"lines of the form {SINFO_FORMAT}",
                fix=f"see what sinfo --noheader --exact --format='{SINFO_FORMAT}' prints; an alias or wrapper may add to it",
            )
        name, _, nodes, cores, mem_mb, limit, gres, marked = words
        # "gpu:a100:2(S:0-1)", "gpu:1g.10gb:7" (MIG), "gpu:2,shard:8"
        gpus = re.findall(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)(?=[,(]|$)", gres)
        old = found.get(name)
        found[name] = Partition(
            name=name,
            is_default=marked.endswith("*"),
            nodes=int(nodes) + (old.nodes if old else 0),
            cores_per_node=max(_number(cores), old.cores_per_node if old else 0),
            mem_gb_per_node=max(_number(mem_mb) // 1024, old.mem_gb_per_node if old else 0),
            max_time=None if limit in ("infinite", "n/a") else limit,
            gpus_per_node=max(sum(int(count) for _, count in gpus), old.gpus_per_node if old else 0),
            gpu_type=next((kind for kind, _ in gpus if kind), old.gpu_type if old else None),
        )
    return list(found.values())


def _number(text: str) -> int:
    """Return the number in sinfo's ``64+`` (the least of several nodes)."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0


def test_only_estimate(text: str) -> str | None:
    """Return the start time out of sbatch --test-only's words, None where it gave none."""
    match = re.search(r"to start at (\S+)", text)
    return match[1] if match else None
