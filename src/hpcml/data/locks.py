"""A lock between processes, by flock on a file: it ends with its holder, however that ends."""

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Lustre mounted without `flock`, and some NFS servers.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_LOOK_S = 0.2  # a poll: who waits in flock itself can't be told that waiting has no point


class NotWaited(Exception):
    """``give_up`` said that waiting has no point."""


@contextlib.contextmanager
def exclusive(
    path: Path, *, on_wait: Callable[[], object], give_up: Callable[[], bool] | None = None
) -> Iterator[bool]:
    """Hold the lock that a file stands for; the file is made where it is not there, and stays.

    Args:
        path: the file; its folder exists.
        on_wait: called once, where another process holds the lock.
        give_up: asked five times a second while another one holds it.

    Yields:
        True; False where the file system has no locks, and the lock is one of this node alone.

    Raises:
        NotWaited: ``give_up`` returned True.
        OSError: the file can't be written.
    """
    everywhere = True
    try:
        fd = _locked(path, on_wait, give_up)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        everywhere = False
        fd = _locked(_on_this_node(path), on_wait, give_up)
    try:
        yield everywhere
    finally:
        os.close(fd)


def _locked(path: Path, on_wait: Callable[[], object], give_up: Callable[[], bool] | None) -> int:
    told = False
    while True:
        # The next user of a shared temporary folder may have put a link there.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            while not _try(fd):
                if not told:
                    told = True
                    on_wait()
                time.sleep(_LOOK_S)
                if give_up and give_up():
                    raise NotWaited
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                os.utime(fd)  # since when it is held
                return fd
        except FileNotFoundError:
            pass  # its folder was cleaned up while this process waited
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _try(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _on_this_node(path: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"hpcml-{os.getuid()}-{digest}.lock"
