"""DVC's locks, ``.dvc/tmp/lock`` and ``rwlock``: who holds them, whether it lives, what a dead process left.

The lock itself is an flock, which ends with its process, or with ``core.hardlink_lock`` a file that stays
(dvc.org, "core.hardlink_lock"); ``rwlock`` is a list of process ids that a killed DVC doesn't leave.
"""

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LOOK_S = 0.3


def freed(tmp: Path, said: str, say: Callable[[str], object]) -> bool:
    """Wait for or clear the lock that a call of DVC met; False where its failure was about something else.

    Args:
        tmp: ``.dvc/tmp`` of the repository.
        said: DVC's stderr.
        say: told once whom it waits for, and what was cleared.
    """
    if "Unable to acquire lock" in said:
        for name in ("lock", "rwlock.lock"):
            _whole(tmp / name, say)
        return True
    if "is busy, it is being blocked by" in said:
        _by_path(tmp, {int(pid) for pid in re.findall(r"\(PID (\d+)\)", said)}, say)
        return True
    if "RWLock-file" in said and re.search("corrupt|format|structure|JSON", said):
        with contextlib.suppress(FileNotFoundError):
            (tmp / "rwlock").unlink()
            say("cleared a list of locks that a killed DVC left half written")
            return True
    return False


def _whole(lock: Path, say: Callable[[str], object]) -> None:
    told = False
    while True:
        holder = _holder(lock)
        if holder is None:
            return
        pid, elsewhere, surely = holder
        if not surely and not elsewhere and not _is_dvc(pid):
            lock.unlink(missing_ok=True)
            say(f"cleared DVC's lock: process {pid or 'unknown'}, which held it, is gone")
            return
        if not told:
            where = f" on {elsewhere}" if elsewhere else ""
            say(f"waiting for another DVC, process {pid}{where}, to end ({_words(pid)}); Ctrl-C stops waiting")
            told = True
        time.sleep(_LOOK_S)


def _holder(lock: Path) -> tuple[int, str, bool] | None:
    """Return who holds the lock: process id, the host where that is another, whether it surely lives; None for nobody."""
    try:
        with lock.open("r+") as file:
            claim = file.read(4096).strip()
            if "|" in claim:  # flufl.lock: path|host|pid|random
                _, host, pid, *_ = [*claim.split("|"), "", "", ""]
                return int(pid) if pid.isdecimal() else 0, "" if host == os.uname().nodename else host, False
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return int(claim) if claim.isdecimal() else 0, "", True
            # A file that was left by an flock is a lock where core.hardlink_lock has been set since.
            lock.unlink(missing_ok=True)
            return None
    except FileNotFoundError:
        return None


def _by_path(tmp: Path, pids: set[int], say: Callable[[str], object]) -> None:
    dead = {pid for pid in pids if not _is_dvc(pid)}
    if dead:
        _forget(tmp / "rwlock", dead)
        say(f"cleared DVC's locks of process {', '.join(map(str, sorted(dead)))}, which is gone")
    for pid in sorted(pids - dead):
        say(f"waiting for another DVC, process {pid}, to end ({_words(pid)}); Ctrl-C stops waiting")
        while _is_dvc(pid):
            time.sleep(_LOOK_S)


def _forget(rwlock: Path, dead: set[int]) -> None:
    """Take the entries of dead processes off the list, under the lock that DVC itself takes for that."""
    with contextlib.suppress(OSError, ValueError), open(f"{rwlock}.lock", "a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        listed: dict[str, dict[str, Any]] = json.loads(rwlock.read_text())

        def lives(entry: Any) -> bool:
            return int(entry["pid"]) not in dead

        reads = {path: [one for one in entries if lives(one)] for path, entries in listed.get("read", {}).items()}
        writes = {path: entry for path, entry in listed.get("write", {}).items() if lives(entry)}
        kept = {"read": {path: entries for path, entries in reads.items() if entries}, "write": writes}
        rwlock.write_text(json.dumps(kept))


def _is_dvc(pid: int) -> bool:
    """Whether a process lives and is a DVC: the number of a dead one may have been given to another since."""
    return "dvc" in _words(pid)


def _words(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    return " ".join(word.rpartition("/")[2] if at < 2 else word for at, word in enumerate(words) if word)[:80]
