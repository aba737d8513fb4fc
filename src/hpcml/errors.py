"""The one family of errors hpcml raises for a person to read.

Every error says what is wrong, where the value came from, what is allowed and what to do; several problems of one
input are reported together, so that nobody mends a file one error at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass

DONE, JOB_FAILED, BAD_INPUT, SERVICE_SILENT, INTERRUPTED = 0, 1, 2, 3, 130
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        what: the value and what is wrong with it.
        origin: where the value came from: a file and key, a flag, an environment variable.
        allowed: what would be accepted.
        fix: what to do about it.
    """

    what: str
    origin: str = ""
    allowed: str = ""
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"{self.origin}: {self.what}" if self.origin else self.what]
        if self.allowed:
            lines.append(f"  allowed: {self.allowed}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class HpcmlError(Exception):
    """An error with everything a person needs to mend it; ``exit_code`` follows the command contract."""

    exit_code = BAD_INPUT

    def __init__(self, what: str | Iterable[Problem], *, origin: str = "", allowed: str = "", fix: str = "") -> None:
        self.problems = (Problem(what, origin, allowed, fix),) if isinstance(what, str) else tuple(what)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def _render_traceback_(self) -> list[str]:
        """What IPython and notebooks show instead of a traceback, which would lead into hpcml's own files."""
        return [f"{type(self).__name__}: {self}"]


class JobFailed(HpcmlError):
    """The work itself ended badly (exit 1)."""

    exit_code = JOB_FAILED


class ServiceSilent(HpcmlError):
    """A cluster or service gave no answer (exit 3)."""

    exit_code = SERVICE_SILENT


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the closest known name, else an empty string."""
    import difflib  # only an error needs it

    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {match[0]!r}?" if match else ""


class Stopped(SystemExit):
    """A training has stopped as it was asked to, and can go on from a checkpoint; nothing has failed."""

    def __init__(self, text: str) -> None:
        super().__init__(STOPPED)
        self.text = text

    def __str__(self) -> str:
        return self.text

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]
