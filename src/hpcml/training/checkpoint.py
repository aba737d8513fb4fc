"""Checkpoints of a training: written aside, read back, renamed; the newest that is whole is gone on from.

A checkpoint is a folder ``step-00000120`` in the run's ``checkpoints/``: the framework's own files, and
``checkpoint.json`` with the place in the training, what the model looks like, and each file's size and SHA-256. It has
its name only when it is whole, so a process that is killed while it saves leaves the ones before as they were.

Whoever trains holds ``lease.json``: after a node failure the first execution may still be alive, and must neither save
nor clear away what the second one goes on from.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import rundir
from ..errors import HpcmlError
from ..rundir import RunDir

KEPT = 2
_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = ".saving-"
_MANIFEST = "checkpoint.json"
_BLOCK = 2**20


@dataclass(frozen=True, order=True)
class Place:
    """How far a training has come.

    Attributes:
        step: optimizer steps done, over the whole training.
        epoch: epochs done.
        batch: steps done of the next epoch; 0 between two epochs.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0

    def __str__(self) -> str:
        steps = "1 step" if self.batch == 1 else f"{self.batch} steps"
        within = f"{steps} into epoch {self.epoch + 1}" if self.batch else f"the end of epoch {self.epoch}"
        return f"step {self.step}, {within}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole: every file has the size and the content that its manifest says."""

    path: Path
    place: Place


@contextlib.contextmanager
def heeding() -> Iterator[None]:
    """While a training looks for the stop file by itself, a TERM is its worker's to answer.

    Slurm sends TERM to every process of a step; the one that trains would die of it before it could save.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class LeaseLost(HpcmlError):
    """Another execution of the same run trains now."""


class Store:
    """The checkpoints of one run, as one execution of it sees them; one rank alone claims, begins and seals."""

    def __init__(self, run: RunDir, restart: int, model: str, tell: Callable[[str], None]) -> None:
        """Args:
        restart: which execution of the run this is; a later one has the right to the checkpoints.
        model: what stands for the model's parameters, names and shapes; a checkpoint of another is passed over.
        tell: called with a sentence for the person.
        """
        self._folder, self._lease = run.checkpoints, run.lease
        self._restart, self._model, self._tell = restart, model, tell
        self._mine = f"{os.uname().nodename}.{os.getpid()}"

    def claim(self) -> None:
        """Take the lease and clear away what earlier executions left half.

        Raises:
            LeaseLost: a later execution has it.
            HpcmlError: the folder can't be written.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_lease()
            rundir.write_json(self._lease, {"restart": self._restart, "holder": self._mine})
        except OSError as error:
            fix = "free space or raise the quota of the runs folder"
            raise HpcmlError(f"{self._folder} can't be written: {error.strerror}", fix=fix) from None
        for left in self._folder.glob(f"{_ASIDE}*"):
            shutil.rmtree(left, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is whole and of this model; others are passed over with a word."""
        for path in sorted(self._all(), reverse=True):
            try:
                return Checkpoint(path, self._verified(path))
            except (OSError, ValueError, KeyError, TypeError) as error:
                self._tell(f"checkpoint {path.name} is passed over: {error}")
        return None

    def save(self, place: Place, write: Callable[[Path], None]) -> bool:
        """Keep a checkpoint that one rank writes alone; returns False where it could not be.

        Args:
            write: writes the framework's files into the folder that it is given.

        Raises:
            LeaseLost: another execution of the run trains now.
        """
        aside = self.begin(place)
        if aside is None:
            return False
        try:
            write(aside)
        except (OSError, RuntimeError) as error:  # torch's and TensorFlow's writers raise RuntimeError on a full disk
            self.discard(place, why(error))
            return False
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        return self.seal(place)

    def begin(self, place: Place) -> Path | None:
        """Make the folder that all ranks write their files to; None, said, where it can't be made."""
        aside = self.aside(place)
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(mode=0o700)
        except OSError as error:
            self.discard(place, why(error))
            return None
        return aside

    def aside(self, place: Place) -> Path:
        """Where a checkpoint is before it is whole; the same for all ranks."""
        return self._folder / f"{_ASIDE}{place.step:08d}.{self._restart}"

    def of(self, place: Place) -> Path:
        """Where a checkpoint is when it is whole."""
        return self._folder / f"step-{place.step:08d}"

    def discard(self, place: Place, reason: str) -> None:
        """Give a checkpoint up, and say so; the ones before are left alone."""
        shutil.rmtree(self.aside(place), ignore_errors=True)
        self._tell(f"no checkpoint at {place}: {reason}; the one before is kept")

    def seal(self, place: Place) -> bool:
        """Give a checkpoint that all ranks have written its name; returns False where it could not be.

        Raises:
            LeaseLost: another execution of the run trains now; this one has no more use.
        """
        aside, target = self.aside(place), self.of(place)
        try:
            files = {str(path.relative_to(aside)): _sealed(path) for path in sorted(_files(aside))}
            manifest = {"place": asdict(place), "model": self._model, "restart": self._restart, "files": files}
            rundir.write_json(aside / _MANIFEST, manifest)
            _sealed(aside / _MANIFEST)
            self._check_lease()
            if target.exists():  # of an execution before, which was passed over: it is not whole
                self._remove(target)
            os.rename(aside, target)
            _sync_folder(self._folder)
        except OSError as error:
            self.discard(place, why(error))
            return False
        except LeaseLost:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        for old in sorted(self._all())[:-KEPT]:
            self._remove(old)
        return True

    def _remove(self, old: Path) -> None:
        # Renamed first: a folder that is half removed must not look like a checkpoint.
        with contextlib.suppress(OSError):
            shutil.rmtree(old.rename(old.with_name(f"{_ASIDE}old.{old.name}")), ignore_errors=True)

    def _check_lease(self) -> None:
        held = rundir.read_json(self._lease)
        later = held.get("restart", -1) > self._restart
        if later or (held.get("restart") == self._restart and held.get("holder") != self._mine):
            raise LeaseLost(
                f"this run goes on elsewhere: restart {held['restart']} holds its checkpoints ({held.get('holder')})",
                origin=str(self._lease),
                fix="nothing: this execution ends, the other one trains",
            )

    def _all(self) -> Iterator[Path]:
        return (path for path in self._folder.glob("step-*") if _NAME.fullmatch(path.name))

    def _verified(self, path: Path) -> Place:
        """Return a checkpoint's place.

        Raises:
            ValueError, OSError, KeyError, TypeError: it is not whole, or of another model.
        """
        manifest: Mapping[str, Any] = json.loads((path / _MANIFEST).read_bytes())
        if manifest["model"] != self._model:
            raise ValueError("it is of another model")
        for name, (size, digest) in manifest["files"].items():
            file = path / name
            if file.stat().st_size != size:
                raise ValueError(f"{name} has {file.stat().st_size} bytes, not {size}")
            if _digest(file) != digest:
                raise ValueError(f"{name} has changed since it was saved")
        return Place(**manifest["place"])


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _sealed(path: Path) -> tuple[int, str]:
    """Bring a file to the disk, for the user alone, and return its size in bytes and SHA-256 as they are read back."""
    with path.open("rb+") as file:
        os.fchmod(file.fileno(), 0o600)
        os.fsync(file.fileno())
    return path.stat().st_size, _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def why(error: Exception) -> str:
    """Return what a person needs of an error in writing."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    return text or type(error).__name__
