"""What a file system gives, measured in some seconds beside a data set, and what that means for the set."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import HpcmlError
from ...filesystem import file_system
from ..listing import Listing, listing
from ..staging import paying, scratch
from .speeds import Speeds, own_rate, speeds_of

SECONDS = 10.0
_LEAST_PIECE, _MOST_PIECE = 784, 256 * 1024
_GAIN_S, _GAIN = 1.0, 2.0  # what packing should save an epoch before it is advised: a second and half the time


@dataclass(frozen=True)
class Bench:
    """A file system's speeds and what they mean for a data set.

    Attributes:
        path: what was asked about.
        kind: the file system.
        where: the folder that was written to for a moment; None where none could be.
        speeds: what was measured.
        files, bytes, samples: of the set; samples None where it is not packed.
        own: the set's own files opened and read per second by 16 readers; None where it is packed or has none.
        own_warm: which share of these came from this node's memory; None where that can't be told.
        epoch_s: seconds to read all of it once in mixed order by 16 readers, as it lies there; None: nothing to read.
        packed_s: seconds to read it once out of shards here; None as above.
        advice: what to do, in sentences; empty where nothing is to be gained.
    """

    path: Path
    kind: str
    where: Path | None
    speeds: Speeds
    files: int
    bytes: int
    samples: int | None
    own: float | None
    own_warm: float | None
    epoch_s: float | None
    packed_s: float | None
    advice: tuple[str, ...]


def bench(path: Path, seconds: float = SECONDS, progress: Callable[[str], object] = lambda what: None) -> Bench:
    """Measure the file system that a path is on. What is written for it is removed again.

    Args:
        path: a data set, or any folder.
        seconds: about how long it may take.
        progress: called with what is measured now.

    Raises:
        HpcmlError: nothing at the path, or it can't be read.
    """
    path = path.absolute()
    try:
        progress("looking at the files")
        source = listing(path)
        where = _writable(path)
        kind = file_system(path.resolve())
        samples = paying.samples_of(path)
        single = bool(source.files) and samples is None
        own, warm = own_rate(source, seconds * 0.15, progress) if single else (None, None)
        mean = source.bytes // max(samples or len(source.files), 1)
        piece = min(max(mean, _LEAST_PIECE), _MOST_PIECE)
        speeds = speeds_of(where, piece, seconds * 0.85, progress)
    except OSError as error:
        what = f"{error.filename or path}: {error.strerror}"
        raise HpcmlError(
            what, origin="data bench", fix="give the path of a data set, or of a folder that you can read"
        ) from None
    epoch = _epoch_s(source, samples, own, warm, speeds)
    packed = _packed_s(source, samples, speeds)
    advice = tuple(_advice(source, path, kind, samples, epoch, packed, speeds))
    return Bench(path, kind, where, speeds, len(source.files), source.bytes, samples, own, warm, epoch, packed, advice)


def _epoch_s(
    source: Listing, samples: int | None, own: float | None, warm: float | None, speeds: Speeds
) -> float | None:
    if samples is not None:
        return _packed_s(source, samples, speeds)
    if own is None:
        return None
    if (warm or 0) > 0.5 and speeds.opened_many:  # what memory gave is no measure of the file system
        own = min(own, speeds.opened_many)
    return max(len(source.files) / own, source.bytes / speeds.read if speeds.read else 0.0)


def _packed_s(source: Listing, samples: int | None, speeds: Speeds) -> float | None:
    if not source.files or not speeds.random_many or not speeds.read:
        return None
    return max((samples or len(source.files)) / speeds.random_many, source.bytes / speeds.read)


def _advice(
    source: Listing,
    path: Path,
    kind: str,
    samples: int | None,
    epoch: float | None,
    packed: float | None,
    speeds: Speeds,
) -> Iterator[str]:
    if epoch is None:
        return
    if samples is None and packed is not None and epoch - packed > _GAIN_S and epoch > _GAIN * packed:
        yield f"pack it: hpcml data pack {path} DEST"
    if scratch.is_shared(kind) and speeds.read and speeds.opened and speeds.random:
        each = 1 / (speeds.opened if samples is None else speeds.random)
        speed = paying.Speed(each, speeds.read)
        estimate = paying.estimate(source, speed, epochs=None, memory=scratch.memory_left())
        disk, _ = scratch.find()
        if disk and estimate.pays:
            yield f'have each node copy it first: stage = "auto" in the job\'s [data]; {estimate}'


def _writable(path: Path) -> Path | None:
    """Return a folder on the same file system to write to, beside the set rather than in it."""
    folder = path if path.is_dir() else path.parent
    inside = [folder.parent, folder] if path.is_dir() else [folder]
    for one in inside:
        if one.stat().st_dev != path.stat().st_dev:
            continue
        with suppress(OSError), tempfile.TemporaryFile(dir=one):
            return one
    return None
