"""A likely cause of a failure, from its state, exit code and last log lines: a table of what goes wrong on clusters."""

import dataclasses
import re
from dataclasses import dataclass

from ..errors import STOPPED
from . import resumable
from .facts import Report
from .logs import LogEnd


@dataclass(frozen=True)
class Cause:
    """What most likely ended a run.

    Attributes:
        what: the cause in words.
        evidence: the line, state or code that says so.
        fix: what to do.
        variant: of a comparison, the variant that it ended.
    """

    what: str
    evidence: str
    fix: str
    variant: str = ""

    @property
    def sentence(self) -> str:
        """The cause as a sentence; a variant's name stays as it is."""
        if self.variant:
            return f"{self.variant}: {self.what}"
        is_word = re.match(
            r"[a-z]+ ", self.what
        )  # what an error begins with may be a name, as in `lr = 0 is too small`
        return self.what[:1].upper() + self.what[1:] if is_word else self.what


@dataclass(frozen=True)
class _Pattern:
    words: re.Pattern[str]
    what: str
    fix: str


def _line(words: str, what: str, fix: str) -> _Pattern:
    return _Pattern(re.compile(words, re.IGNORECASE), what, fix)


# The first that matches any of the last lines counts, so what is a cause goes before what only follows from it.
# Of the ranks that are left, when another one has died.
_LOST_PEER, _NO_NCCL = "a rank lost its connection to another one", "GPUs could not talk to each other (NCCL)"
_LINES = (
    _line(
        r"CUDA out of memory|CUDA_ERROR_OUT_OF_MEMORY|ResourceExhaustedError|OOM when allocating|torch\.OutOfMemoryError"
        r"|cudaErrorMemoryAllocation",
        "the memory of a GPU was not enough",
        'a smaller global_batch, precision = "mixed_bfloat16", or more GPUs; also check in the report that nobody else '
        "held memory on it",
    ),
    _line(
        r"oom[-_ ]?kill|Out of memory: Killed process|Detected \d+ oom|slurmstepd: error: .*memory limit",
        "the memory of the node that the job may use was not enough",
        "a larger mem_gb in [resources], or data that is read in parts instead of as a whole",
    ),
    _line(
        r"[Nn]o space left on device|ENOSPC",
        "a disk is full",
        "hpcml runs prune, delete what is not needed, or point HPCML_RUNS and TMPDIR to another file system",
    ),
    _line(
        r"Disk quota exceeded|EDQUOT",
        "your quota on a file system is used up",
        "hpcml runs prune, delete what is not needed there, or point HPCML_RUNS to another file system",
    ),
    _line(
        r"DUE TO TIME LIMIT|past the time limit",
        "the time limit ended it",
        "a larger time in [resources]; checkpoints let a longer training go on where it stopped",
    ),
    _line(
        r"ModuleNotFoundError|ImportError: (?!lib)",
        "a Python package is missing in the environment of the job",
        "install it into the Python that the job uses ([env], hpcml doctor shows which one)",
    ),
    _line(
        r"error while loading shared libraries|ImportError: lib\S+: cannot open|Could not load dynamic library"
        r"|version `GLIBC\S*' not found|undefined symbol",
        "a shared library is missing, or is of another version than the package was built for",
        "load the module that has it ([env] modules), or install the package's wheel that brings its own",
    ),
    _line(
        r"CUDA driver version is insufficient|CUDA_ERROR_NO_DEVICE|no CUDA-capable device|No CUDA GPUs are available"
        r"|sees \d+ GPUs?, this task was given|CUDA_ERROR_SYSTEM_DRIVER_MISMATCH|Failed to initialize NVML",
        "the framework cannot use the GPUs of the node",
        "check on the node that nvidia-smi lists them and that the framework is built for that driver; gpus_per_node in "
        "[resources] asks for them",
    ),
    _line(
        r"CUDA_ERROR_(ILLEGAL_ADDRESS|ECC_UNCORRECTABLE|LAUNCH_FAILED|HARDWARE)|uncorrectable ECC|\bXid\b|illegal memory access",
        "a GPU failed, or a kernel wrote where it must not",
        "run it again, on another node (--exclude in [slurm] extra); tell the cluster's support if it is always this node",
    ),
    _line(
        r"NCCL (error|WARN)|ncclSystemError|ncclUnhandledCudaError|ncclInternalError|ncclRemoteError|Watchdog caught collective",
        _NO_NCCL,
        "see which rank failed first; NCCL_DEBUG=INFO in [env.vars] shows why, NCCL_SOCKET_IFNAME picks the network",
    ),
    _line(
        r"UnavailableError|Socket closed|Connection reset by peer|failed to connect to all addresses|DEADLINE_EXCEEDED"
        r"|CoordinationService|heartbeat timeout|Connection refused",
        _LOST_PEER,
        "another rank most likely failed first: hpcml logs shows all of them",
    ),
    _line(
        r"Address already in use|EADDRINUSE",
        "a port was taken by another process on the node",
        "run it again: ports are chosen anew",
    ),
    _line(
        r"No such file or directory|FileNotFoundError|NotFoundError",
        "a file is not there",
        "paths are relative to the project; a file that git ignores is not part of the run's copy of it, so give its full path",
    ),
    _line(
        r"PermissionError|Permission denied",
        "a file or folder may not be read or written",
        "check its owner and rights on the node, and point the path to a folder of yours",
    ),
    _line(
        r"(?:loss|nan).*\b(?:is|became|has) (?:nan|inf)\b|InvalidArgumentError.*(?:nan|inf)\b|Input contains NaN",
        "numbers became NaN or infinite",
        "a smaller lr, gradient clipping, or another precision; look where the loss curve leaves",
    ),
    _line(
        r"Incompatible shapes|shapes? .*(?:mismatch|not aligned|cannot be multiplied)|size mismatch for|must match the size of",
        "shapes do not fit each other",
        "compare the shapes in the message with the model's input and the batch; a last batch may be smaller (drop_remainder)",
    ),
    _line(
        r"KeyError|TypeError|ValueError|AttributeError|NameError|IndexError|SyntaxError|ZeroDivisionError|AssertionError"
        r"|RuntimeError",
        "an error in the work itself",
        "the line is the error's own; the traceback in the log shows where",
    ),
)

_STATES = {
    "TIMEOUT": (
        "the time limit ended it",
        "a larger time in [resources]; checkpoints let a longer training go on where it stopped",
    ),
    "OUT_OF_MEMORY": (
        "the memory of the node that the job may use was not enough",
        "a larger mem_gb in [resources], or data that is read in parts instead of as a whole",
    ),
    "CANCELLED": ("it was cancelled", "start it again when it is wanted"),
    "NODE_FAIL": ("a node of the allocation failed", "submit it again; Slurm does so by itself where requeueing is on"),
    "BOOT_FAIL": ("a node did not start", "submit it again"),
    "PREEMPTED": ("a job of higher priority took its place", "submit it again, or with another qos or partition"),
    "DEADLINE": ("it could not end before its deadline", "a later deadline, or a shorter time in [resources]"),
}
_SIGNALS = {
    134: ("a program aborted itself (SIGABRT)", "the lines before its end say why; often a failed check in a library"),
    135: ("a memory access failed (SIGBUS)", "often a full /dev/shm or disk: fewer data workers, or more mem_gb"),
    136: ("an arithmetic error (SIGFPE)", "a division of whole numbers by zero, in a library"),
    137: (
        "it was killed by SIGKILL, which is most often the memory running out",
        "a larger mem_gb in [resources], or data that is read in parts instead of as a whole",
    ),
    139: (
        "a program accessed memory that it does not own (SIGSEGV)",
        "often packages that do not fit each other; make the environment anew, and PYTHONFAULTHANDLER=1 in [env.vars]",
    ),
    143: ("it was asked to stop (SIGTERM)", "if nobody did: its time limit, a lost rank, or a preemption"),
}
_STOPPED = ("it was asked to stop, and saved where it was", "start it again when it is wanted")
_LAUNCHER_KILLED = (
    "the process that started it was killed, and its ranks ended with it",
    "hpcml submit queues it where there is a queue; else keep the terminal open (tmux), and watch the memory (hpcml top)",
)
# An error of hpcml's own with what it allows and advises on the lines below, in a traceback or as a worker says it.
_OWN_ERROR = re.compile(
    r"(?:\[rank\d+\]: )?(?:hpcml\.errors\.)?(?:HpcmlError|JobFailed|ServiceSilent|hpcml): (?P<what>.+)"
)
_OWN_LINE = re.compile(r"(?:\[rank\d+\]: )?  (?P<kind>allowed|fix): (?P<text>.+)")
_NO_COMMAND = ("the command was not found", "check its name, and the modules and PATH in [env]")


def likely_causes(report: Report) -> list[Cause]:
    """Return what most likely ended a run; of a comparison what ended each of its variants that failed."""
    if report.comparison is None:
        return [cause] if (cause := likely_cause(report)) else []
    if report.failed:
        return [_of_variant(one) for one in report.failed]
    return [cause] if (cause := likely_cause(report)) else []


def _of_variant(report: Report) -> Cause:
    cause = likely_cause(report)
    if cause is None:
        code = report.outcome.exit_code
        evidence = f"state {report.outcome.state}" + (f", exit code {code}" if code is not None else "")
        cause = Cause("it did not complete", evidence, f"read what it said: hpcml logs {report.id}")
    return dataclasses.replace(cause, variant=report.name)


def likely_cause(report: Report) -> Cause | None:
    """Return what most likely ended a run, None for one that completed, still runs, or gives no sign.

    What Slurm says of the end goes first, then the log's last lines, then the exit code.
    """
    if report.outcome.completed or report.outcome.state in ("RUNNING", "PENDING"):
        return None
    if report.failed:
        return _of_variant(report.failed[0])
    words, code = _of_words(report), _of_code(report)
    if words and words.what in (_LOST_PEER, _NO_NCCL) and report.outcome.exit_code in _SIGNALS:
        words = None  # what the others say of the rank that a signal ended
    cause = _of_end(report) or words or code
    if cause is None or report.resume_step is None:
        return cause
    return dataclasses.replace(cause, fix=f"{resumable.in_words(report.id, report.resume_step)}; or {cause.fix}")


def _of_end(report: Report) -> Cause | None:
    """What the state alone tells: somebody or something from outside ended it."""
    outcome = report.outcome
    if outcome.state not in _STATES:
        return None
    what, fix = _STATES[outcome.state]
    if outcome.exit_code == STOPPED and outcome.state == "CANCELLED":
        what, fix = _STOPPED
    elif "launcher was killed" in outcome.reason:
        what, fix = _LAUNCHER_KILLED
    return Cause(what, f"state {outcome.state}" + (f": {outcome.reason}" if outcome.reason else ""), fix)


def _of_words(report: Report) -> Cause | None:
    """What the work said last: an error that says itself what to do, else the first known pattern."""
    outcome = report.outcome
    for end in report.logs:
        if cause := _of_own_error(end, outcome.reason):
            return cause
    said = [outcome.reason, *(m.text for m in report.messages if m.level == "error")]
    lines = [line for text in said for line in text.splitlines()]
    lines += [line for end in report.logs for line in reversed(end.lines)]
    return _of_lines(lines)


def _of_own_error(end: LogEnd, reason: str) -> Cause | None:
    """The error of hpcml's own that a run ended by, with the lines below it; the run's reason tells that it is that one."""
    where = "Slurm's output" if end.rank is None else f"the log of rank {end.rank}"
    for place, line in enumerate(end.lines):
        found = _OWN_ERROR.match(line)
        if not found or found["what"][:80] not in reason:
            continue
        told = {}
        for below in end.lines[place + 1 :]:
            if not (more := _OWN_LINE.match(below)):
                break
            told[more["kind"]] = more["text"]
        if told:
            allowed = f"allowed: {told['allowed']}" if "allowed" in told else ""
            return Cause(
                found["what"], f"hpcml itself says so, in {where}", "; ".join(filter(None, [told.get("fix"), allowed]))
            )
    return None


def _of_code(report: Report) -> Cause | None:
    outcome, code = report.outcome, report.outcome.exit_code
    if code in _SIGNALS or code == 127:
        what, fix = _NO_COMMAND if code == 127 else _SIGNALS[code]
        whose = f" of rank {outcome.failed_rank}" if outcome.failed_rank is not None and report.ranks > 1 else ""
        return Cause(what, f"exit code {code}{whose}", fix)
    if outcome.state == "UNKNOWN":
        return Cause(
            "its process ended without a word: killed, or its node was lost",
            outcome.reason,
            "run it again; if it ends so again, watch its memory (hpcml top) and ask for more",
        )
    return None


def _of_lines(lines: list[str]) -> Cause | None:
    for pattern in _LINES:
        for line in lines:
            if pattern.words.search(line):
                return Cause(pattern.what, line.strip(), pattern.fix)
    return None
