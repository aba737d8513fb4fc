"""A data set's copy on a node's own disk: made once a node, verified, used where that pays, removed at the job's end.

Copies lie in ``<scratch>/hpcml-<uid>/<job>/``. A process that uses one holds a lock there, so that ``clean`` of one run
takes nothing from another run of the same job, and a lock ends with its process.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ... import rundir
from ...errors import HpcmlError
from ...filesystem import file_system, size_words
from ..listing import Listing, listing
from ..locks import NotWaited, exclusive
from . import copying, jobfolder, paying, scratch
from .jobfolder import clean as clean
from .scratch import Scratch

Say = Callable[[str], object]
Progress = Callable[[int, int], object]  # bytes done, bytes in all
STAGES = ("auto", "always", "never")
# A copier touches its lock with every piece; one that hasn't for so long hangs, and nobody should hang with it.
PATIENCE_S = 300.0
# What takes so long that the beginning is told, too.
_LONG_BYTES, _LONG_FILES = 2 * 10**9, 10_000
_SPARE = 0.05  # of the disk, which other jobs of the node use as well
_TOUCH_EACH_S = 5.0
_VERIFIED, _JOURNAL = ".verified", ".journal"  # beside a copy


@dataclass(frozen=True)
class Placed:
    """Where this node reads a data set.

    Attributes:
        path: the folder or file to read.
        staged: whether it is a copy on this node.
        reason: why it is, or why not: one sentence.
    """

    path: Path
    staged: bool
    reason: str


def place(folder: Path, stage: str, *, say: Say, epochs: int | None = None) -> Path:
    """Return the folder to read on this node: a copy on its own disk where that pays, else the folder itself.

    Whoever comes first copies, the others wait for it. What goes wrong is said, and the folder itself is read then.

    Args:
        folder: a data set: a folder of files, a packed one, or a single file.
        stage: ``auto``: where an estimate says that it pays; ``always``: where it fits; ``never``.
        say: called with one sentence: what was chosen, and why.
        epochs: for how many the job trains, where that is known.

    Raises:
        HpcmlError: no such stage, no such folder, or ``$HPCML_SCRATCH`` can't be used.
    """
    placed = placed_for(folder, stage, say=say, epochs=epochs)
    say(f"data {folder.name}: {placed.reason}")
    return placed.path


def placed_for(
    folder: Path, stage: str, *, say: Say, epochs: int | None = None, progress: Progress = lambda done, total: None
) -> Placed:
    """As ``place``, with the reason; ``progress`` is called with bytes done and bytes in all."""
    if stage not in STAGES:
        raise HpcmlError(f"stage = {stage!r}", origin="data.stage", allowed=", ".join(STAGES))
    folder = folder.absolute()
    try:
        folder.stat()
    except OSError as error:
        what = f"nothing at {folder}" if isinstance(error, FileNotFoundError) else f"{folder}: {error.strerror}"
        raise HpcmlError(what, origin="data.source") from None
    if stage == "never":
        return Placed(folder, False, "read where it lies (stage is never)")
    kind = file_system(folder.resolve())
    if stage == "auto" and not scratch.is_shared(kind) and kind != "unknown":
        return Placed(folder, False, f"read where it lies: {kind} is this node's own")
    call = _Call(folder, kind, stage, epochs, say, progress)
    disk, why_not = scratch.find()
    if disk is None:
        return call.in_place(why_not)
    try:
        return _once(call, disk, jobfolder.enter(disk.path))
    except OSError as error:
        return call.in_place(f"no copy on {disk}: {error.strerror or error}")


@dataclass(frozen=True)
class _Call:
    """What was asked for, and where the set lies."""

    folder: Path
    kind: str
    stage: str
    epochs: int | None
    say: Say
    progress: Progress

    def in_place(self, why: str) -> Placed:
        return Placed(self.folder, False, f"read from {self.kind}: {why}")


def _once(call: _Call, disk: Scratch, job: Path) -> Placed:
    """Decide, and copy, where no other process of this node has done so; while one does, wait for it."""
    key = hashlib.sha256(os.fsencode(call.folder.resolve())).hexdigest()[:12]
    lock, note = job / f"{key}.lock", job / f"{key}.json"
    told = f"data {call.folder.name}: waiting for this node's copy"
    try:
        with exclusive(lock, on_wait=lambda: call.say(told), give_up=lambda: _hangs(lock)):
            decided = _decided(note)
            if decided is None:
                decided = _decide(call, disk, job / key, lock)
                fields = {"path": str(decided.path), "staged": decided.staged, "reason": decided.reason}
                rundir.write_json(note, {**fields, "session": _session(), "source": str(call.folder)})
            return decided
    except NotWaited:
        return call.in_place(f"who copies it here has done nothing for {PATIENCE_S:.0f} s")


def _decided(note: Path) -> Placed | None:
    """Return what another process of this node has decided in the same start of this job."""
    known = rundir.read_json(note)
    if not known or not _session() or known.get("session") != _session():
        return None
    path = Path(known["path"])
    if known["staged"] and not path.exists():
        return None
    return Placed(path, known["staged"], str(known["reason"]))


def _session(environment: Mapping[str, str] = os.environ) -> str:
    """Return what all processes of one start of a job share; empty by hand, where a folder is looked at again each time."""
    job, run = environment.get("SLURM_JOB_ID", ""), environment.get("HPCML_RUN", "")
    return f"{job} {environment.get('SLURM_RESTART_COUNT', '0')} {run}" if job or run else ""


def _decide(call: _Call, disk: Scratch, here: Path, lock: Path) -> Placed:
    try:
        source = listing(call.folder)
        copy = here / source.digest / call.folder.name
        what = f"{len(source.files):,} file{'s' * (len(source.files) != 1)}, {size_words(source.bytes)}"
        if (copy.parent / _VERIFIED).exists():
            return Placed(copy, True, f"read from the copy at {copy}: {what}, verified before")
        refused = _no_room(source, disk, call.stage, copy)
        if refused:
            return call.in_place(refused)
        why = "as asked"
        if call.stage == "auto":
            speed = paying.measured(source)
            estimate = paying.estimate(source, speed, epochs=call.epochs, memory=scratch.memory_left())
            why = str(estimate)
            if not estimate.pays:
                return call.in_place(f"a copy doesn't pay: {what}; {why}")
    except OSError as error:
        return call.in_place(f"{error.filename} can't be read: {error.strerror}")
    if source.bytes > _LONG_BYTES or len(source.files) > _LONG_FILES:
        call.say(f"data {call.folder.name}: copying {what} to {disk} …")
    return _copied(call, source, copy, f"{what}; {why}", lock)


def _no_room(source: Listing, disk: Scratch, stage: str, copy: Path) -> str:
    """Return why a disk can't take a copy; empty where it can."""
    if not source.files:
        return "it holds no files"
    there = sum(file.bytes for file in listing(copy.parent).files) if copy.parent.exists() else 0
    total = os.statvfs(disk.path).f_blocks * os.statvfs(disk.path).f_frsize
    room = disk.free + there - int(total * _SPARE)
    if source.bytes > room:
        return f"its {size_words(source.bytes)} don't fit on {disk}, which has room for {size_words(max(room, 0))}"
    if disk.in_memory:
        # tmpfs takes the job's memory, and a job that takes too much of it is killed.
        share = 0.25 if stage == "auto" else 0.75
        left = scratch.memory_left() * share
        if source.bytes > left:
            return f"{disk} is memory, of which {size_words(left)} may go, and it takes {size_words(source.bytes)}"
    return ""


def _copied(call: _Call, source: Listing, copy: Path, what: str, lock: Path) -> Placed:
    started = time.monotonic()
    target = copy if call.folder.is_dir() else copy.parent

    def progress(done: int) -> None:
        _touch(lock)
        call.progress(done, source.bytes)

    try:
        _remove_others(copy.parent)
        target.mkdir(parents=True, exist_ok=True)
        digests = copying.copy(source, target, copy.parent / _JOURNAL, progress)
        damage = _damage(source, target, digests, call.folder, lock)
    except copying.Changed as error:
        damage = f"{error} changed while it was copied"
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        damage = f"{copy.parent} is full" if full else f"{error.filename or copy}: {error.strerror or error}"
    if damage:
        shutil.rmtree(copy.parent, ignore_errors=True)
        return call.in_place(f"no copy here: {damage}")
    (copy.parent / _JOURNAL).unlink()
    (copy.parent / _VERIFIED).touch()
    return Placed(copy, True, f"copied to {copy} in {paying.seconds(time.monotonic() - started)}, verified: {what}")


def _damage(source: Listing, target: Path, digests: dict[str, str], folder: Path, lock: Path) -> str:
    """Return what differs between a copy and its source, or a packed set and its own index; empty where nothing does."""
    told = ""
    if folder.is_dir() and paying.samples_of(folder) is not None:
        from ..shards import verify  # reads NumPy's files

        try:
            found = verify(target, progress=lambda how_far: _touch(lock))
        except HpcmlError as error:
            told = f"the set itself is no whole one: {error.problems[0].what}"
        else:
            if not found:
                return ""  # every byte has been compared with what was packed
            told = f"the set itself is damaged: {found[0]} (hpcml data verify {folder} tells all)"
    differs = copying.differing(target, source, digests, lambda: _touch(lock))
    return f"the copy of {differs} differs from it" if differs else told


def _remove_others(keep: Path) -> None:
    """Remove the copies of what the source was before; no other process is here now."""
    with contextlib.suppress(FileNotFoundError):
        for path in keep.parent.iterdir():
            if path != keep:
                shutil.rmtree(path, ignore_errors=True)


def _hangs(lock: Path) -> bool:
    try:
        return time.time() - lock.stat().st_mtime > PATIENCE_S
    except FileNotFoundError:
        return False


def _touch(lock: Path) -> None:
    """Let the others see that this process copies."""
    with contextlib.suppress(OSError):
        if time.time() - lock.stat().st_mtime > _TOUCH_EACH_S:
            os.utime(lock)
