"""The folder of one job's copies on a node: private, held by a lock while it is used, removed when nobody uses it."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from ..listing import listing
from . import scratch

# What this process reads from: an open lock for each folder, till it ends or cleans up.
_held: dict[Path, int] = {}
_USERS = "users"


def path_of(disk: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of this job's copies; the one for what is staged by hand where there is no job."""
    job, run = environment.get("SLURM_JOB_ID"), environment.get("HPCML_RUN", "")
    owner = f"job-{job}" if job else f"run-{run.replace('/', '+')}" if run else "by-hand"
    return disk / f"hpcml-{os.getuid()}" / owner


def enter(disk: Path) -> Path:
    """Make this job's folder and hold it, until the process ends or ``clean``.

    Raises:
        OSError: it can't be made, or somebody else has made it: a temporary folder is everybody's.
    """
    job = path_of(disk)
    while not _is_held(job):
        for path in (job.parent, job):
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
            info = path.lstat()
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
                raise PermissionError(errno.EPERM, f"{path} is not this user's alone", str(path))
        with contextlib.suppress(FileNotFoundError):  # another process has cleaned up just now
            fd = os.open(job / _USERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(fd, fcntl.LOCK_SH)
            _release(job)
            _held[job] = fd
    return job


def clean(*, say: Callable[[str], object] = lambda sentence: None) -> int:
    """Remove what this job has staged on this node, unless another process of it still reads there.

    Returns:
        How many bytes are free again.
    """
    freed = 0
    for job in dict.fromkeys(path_of(path) for _, path in scratch.candidates()):
        _release(job)
        try:
            fd = os.open(job / _USERS, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):
                freed += listing(job).bytes
            shutil.rmtree(job, ignore_errors=True)
            with contextlib.suppress(OSError):
                job.parent.rmdir()
        except BlockingIOError:
            say(f"{job} stays: another process reads there")
        finally:
            os.close(fd)
    return freed


def _is_held(job: Path) -> bool:
    try:
        return job in _held and os.path.samestat(os.fstat(_held[job]), os.stat(job / _USERS))
    except FileNotFoundError:
        return False


def _release(job: Path) -> None:
    fd = _held.pop(job, None)
    if fd is not None:
        fcntl.flock(fd, fcntl.LOCK_UN)  # also for children that were forked since
        os.close(fd)
