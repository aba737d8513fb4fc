"""The ``dvc`` command: found, called, its progress read and its failures told in plain words. It is never imported."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from ...errors import HpcmlError, ServiceSilent
from . import locks

# What is being done, how much of it is done, and of how much; the total is 0 where it isn't known.
Progress = Callable[[str, int, int], object]
Say = Callable[[str], object]

INSTALL = "scripts/setup --versions, or pip install 'hpcml[versions]' into the environment that hpcml is in"
# Each failed try of DVC's S3 client is tried five times by s3fs; the client's own five tries of each make minutes of it.
_QUIET = {
    "DVC_NO_ANALYTICS": "1",
    "CI": "1",
    "NO_COLOR": "1",
    "DVC_IGNORE_ISATTY": "1",
    "COLUMNS": "120",
    "LC_ALL": "C.UTF-8",
}
_DEFAULTS = {"AWS_MAX_ATTEMPTS": "2", "AWS_RETRY_MODE": "standard"}
_FOREIGN = ("DVC_ROOT", "DVC_STAGE", "DVC_SHOW_TRACEBACK")  # of another call of DVC
# tqdm as DVC sets it: "… 1.20k/60.0k [00:05<04:00, 240file/s]"; bars of a single file count bytes.
_BAR = re.compile(r"([\d.]+)([kMG]?)(?:/([\d.]+)([kMG]?))? \[[^\]]*(?:file|files|entry)/s")
_TRIES = 20  # to get DVC's lock: each has waited for its holder's end, or cleared what a dead one left
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def command() -> str:
    """Return the path of ``dvc``: beside this Python, else on PATH.

    Raises:
        HpcmlError: it is not installed.
    """
    beside = Path(sys.executable).with_name("dvc")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("dvc")
    if not found:
        raise HpcmlError("dvc is not installed, and versions of data are kept by it", fix=INSTALL)
    return found


def run(
    root: Path,
    *words: str,
    doing: str,
    progress: Progress | None = None,
    say: Say | None = None,
    state: Path | None = None,
) -> str:
    """Run DVC in a folder and return what it printed.

    A lock that a dead process left is cleared; one of a living process is waited for, with a word.

    Args:
        doing: for the error, as in ``dvc can't DOING``.
        state: a folder for DVC's own databases instead of the common one of this machine.

    Raises:
        HpcmlError: DVC fails; ServiceSilent where the remote gives no answer.
    """
    own = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    own = {**_DEFAULTS, **own, **_QUIET, **({"DVC_SITE_CACHE_DIR": str(state)} if state else {})}
    for _ in range(_TRIES):
        code, printed, said = _call([command(), *words], root, own, doing, progress)
        if code == 0:
            return printed
        if not locks.freed(root / ".dvc" / "tmp", said, say or (lambda text: None)):
            break
    raise _told(doing, code, said)


def _call(
    words: Sequence[str], root: Path, environment: dict[str, str], doing: str, progress: Progress | None
) -> tuple[int, str, str]:
    """Run it; return exit code, stdout, and of stderr all but the progress bars."""
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(
            words, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True,
            preexec_fn=_ending_with_us(),
        )  # fmt: skip
    except OSError as error:
        raise HpcmlError(f"{words[0]} can't be started: {error.strerror}", fix=INSTALL) from None
    assert child.stdout and child.stderr
    said: list[str] = []
    try:
        with child.stdout as printed, child.stderr as spoken:
            for line in _lines(spoken):
                bar = _BAR.search(line)
                if bar and progress and bar[3] != "1":  # of one: a bar around the others
                    progress(doing, _number(bar[1], bar[2]), _number(bar[3], bar[4]))
                elif not bar and line.strip():
                    said.append(line.rstrip())
            # A few lines at most: the pipe holds them while stderr is read to its end.
            output = printed.read().decode(errors="replace")
        return child.wait(), output, "\n".join(said)
    except BaseException:  # such as Ctrl-C: DVC, in a session of its own, ends as if it were typed to it
        child.send_signal(signal.SIGINT)
        child.wait()
        raise


def _ending_with_us() -> Callable[[], object] | None:
    """What has DVC end when this process dies without a word (prctl(2)): else it would write on with nobody to tell."""
    if sys.platform != "linux":
        return None
    import ctypes  # now: after the fork there is no time for it

    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Yield what a stream says, cut where a line ends or a bar is drawn anew."""
    rest = b""
    while chunk := os.read(stream.fileno(), 65536):
        *whole, rest = re.split(rb"[\r\n]", rest + chunk)
        yield from (_ESCAPE.sub("", line.decode(errors="replace")) for line in whole)
    yield _ESCAPE.sub("", rest.decode(errors="replace"))


def _number(digits: str | None, unit: str | None) -> int:
    return round(float(digits) * _UNITS[unit or ""]) if digits else 0


# What DVC, s3fs or botocore say → whether it is a silent service, what that means, and what to do.
_REMOTE = "hpcml data version remote shows where it is"
_KEY = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or hpcml data version remote --login keeps a key"
_MEANINGS: tuple[tuple[str, bool, str, str], ...] = (
    (r"no remote|No remote", False, "no remote is set", "hpcml data version remote URL, a folder or s3://BUCKET/PATH"),
    (r"requires? .*dvc[-\[]s3|No module named 's3fs'|s3 is supported, but", False, "DVC lacks its part for S3", INSTALL),
    (r"timed? ?out|Timeout|gave no answer", True, "the remote gives no answer", f"try again later; {_REMOTE}"),
    (
        r"Could not connect|Cannot connect|Connection refused|ClientConnectorError|Name or service not known",
        True, "the remote refuses the connection", f"start or wait for it; {_REMOTE}",
    ),
    (
        r"payload is not completed|IncompleteRead|[Cc]onnection reset|Server disconnected|Connection was closed",
        True, "the remote breaks off", f"try again later: what is there already is kept; {_REMOTE}",
    ),
    (r"NoSuchBucket|bucket does not exist", False, "the remote's bucket is gone", f"make it again, or use another; {_REMOTE}"),
    (r"locate credentials|Partial credentials|NoCredentials", False, "no key for the remote", _KEY),
    (
        r"SignatureDoesNotMatch|InvalidAccessKeyId|AccessDenied|Access Denied|Forbidden|ExpiredToken|InvalidToken",
        False, "the remote refuses the key", _KEY,
    ),
    (r"No space left|Errno 28", False, "the disk is full", "free space, then again: what is there already is kept"),
    (r"quota exceeded|Errno 122", False, "the quota is used up", "free space, then again: what is there already is kept"),
    (
        r"already tracked by SCM", False, "git tracks files of the folder itself",
        "git rm -r --cached FOLDER && git commit, then again; the files stay on disk",
    ),
    (
        r"Checkout failed|failed to (?:pull|fetch|push)|[Mm]issing (?:cache|files)|does not exist in (?:cache|remote)|not in cache",
        False, "the remote lacks some of the data", "hpcml data version push TAG, where the data was added",
    ),
    (
        r"Unable to acquire lock|is being blocked by", False, "others hold its lock again and again",
        "try again later; where no DVC runs, remove .dvc/tmp/lock and .dvc/tmp/rwlock",
    ),
    (r"Permission denied|Errno 13", False, "permission denied", "make it readable and writable for you"),
)  # fmt: skip


def _told(doing: str, code: int, said: str) -> HpcmlError:
    """Return the error for a DVC that failed: what is known by its meaning, else in DVC's own words."""
    start = said.rfind("ERROR: ")
    words = said[start:].removeprefix("ERROR: ").removeprefix("unexpected error - ") if start >= 0 else said
    words = words.partition("\nHaving any troubles")[0]
    first = next((line.strip() for line in words.splitlines() if line.strip()), "")
    if code < 0:
        first = f"it was killed by {signal.Signals(-code).name}"
    for pattern, silent, meaning, fix in _MEANINGS:
        if re.search(pattern, said):  # the last error may only count those before it
            kind = ServiceSilent if silent else HpcmlError
            return kind(f"dvc can't {doing}: {meaning}", origin=_short(first), fix=fix)
    return HpcmlError(f"dvc can't {doing}: {_short(first) or f'exit code {code}'}", fix="mend what it says, then again")


def _short(line: str) -> str:
    return line if len(line) <= 300 else line[:299] + "…"
