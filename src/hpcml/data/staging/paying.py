"""Whether a copy on the node's own disk pays: what reading costs where a data set lies, measured in a moment."""

import contextlib
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

from ... import rundir
from ..listing import READERS, Listing

# Where nobody says for how many epochs a job trains.
EPOCHS = 3
_MOMENT_S = 0.3
_SAMPLES = 24
_PIECE = 4096
_SEQUENTIAL = 16 * 2**20
# A node's disk: opening a file takes 11 µs; what an NVMe disk writes is more than this, an older disk's 200 MB/s less.
LOCAL_OPEN_S, LOCAL_BYTES_PER_S = 2e-5, 5e8
_COPY_EACH_S = 5e-4  # what a file costs to copy, hash and compare beside its bytes
# A copy is worth its trouble from here on.
_LEAST_SAVED_S, _LEAST_SHARE = 2.0, 0.2


@dataclass(frozen=True)
class Speed:
    """What one reader of a data set gets.

    Attributes:
        each_s: seconds to open a file and read its first bytes; of a packed set to read a sample somewhere in a shard.
        bytes_per_s: from front to back in the largest file.
    """

    each_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Estimate:
    """Seconds that a training waits for its data without a copy, with one, and the copying itself."""

    epochs: int
    known_epochs: bool
    epoch_s: float
    local_epoch_s: float
    copy_s: float

    @property
    def saved_s(self) -> float:
        """Seconds that a copy saves the training; negative where it costs more than it gains."""
        return self.epochs * (self.epoch_s - self.local_epoch_s) - self.copy_s

    @property
    def pays(self) -> bool:
        """Whether it saves two seconds and a fifth of the reading."""
        return self.saved_s > max(_LEAST_SAVED_S, _LEAST_SHARE * self.epochs * self.epoch_s)

    def __str__(self) -> str:
        epochs = f"{self.epochs} epoch{'s' * (self.epochs != 1)}"
        epochs = epochs if self.known_epochs else f"if there are {epochs}"
        return (
            f"an epoch's reading takes about {seconds(self.epoch_s)} there and {seconds(self.local_epoch_s)} here, "
            f"copying {seconds(self.copy_s)} ({epochs})"
        )


def seconds(value: float) -> str:
    """Return a time for a person, in s or ms."""
    if value >= 0.1:
        return f"{value:,.0f} s" if value >= 10 else f"{value:.1f} s"
    return f"{value * 1000:.0f} ms" if value >= 0.001 else "under 1 ms"


def samples_of(folder: Path) -> int | None:
    """Return how many samples a packed set holds; None for what is no packed set."""
    shards = rundir.read_json(folder / "dataset.json").get("shards")
    if not isinstance(shards, list):
        return None
    return sum(int(one.get("samples", 0)) for one in shards if isinstance(one, dict))


def estimate(source: Listing, speed: Speed, *, epochs: int | None, memory: int) -> Estimate:
    """Return what reading costs.

    Shards that fit into a quarter of the memory are read over the network once, by large requests, and stay there;
    single files do so as well, but each of their openings goes to the server again.

    Args:
        source: the data set.
        speed: what ``measured`` found.
        epochs: of the training, where they are known.
        memory: bytes that the job can still take on this node.
    """
    samples = samples_of(source.root)
    counts = EPOCHS if epochs is None else max(epochs, 1)
    reading = source.bytes / speed.bytes_per_s
    openings = len(source.files) * speed.each_s / READERS
    copy = openings + reading + source.bytes / LOCAL_BYTES_PER_S + len(source.files) * _COPY_EACH_S
    local = source.bytes / LOCAL_BYTES_PER_S / 2 + len(source.files) * LOCAL_OPEN_S / READERS
    if samples is None:
        epoch = openings + (reading if source.bytes > memory / 4 else reading / counts)
    elif source.bytes <= memory / 4:
        epoch, local = reading / counts, 0.0
    else:
        epoch = max(samples * speed.each_s / READERS, reading)
        local = max(samples * LOCAL_OPEN_S / READERS, local)
    return Estimate(counts, epochs is not None, epoch, local, copy)


def measured(source: Listing, moment_s: float = _MOMENT_S) -> Speed:
    """Open some files of a set, or read somewhere in its shards, and read a few MB in one go.

    Args:
        source: the data set.
        moment_s: the time for each of the two.

    Raises:
        OSError: a file can't be read.
    """
    dice = random.Random(source.digest)
    packed = samples_of(source.root) is not None
    largest = max(source.files, key=lambda file: file.bytes)
    paths = [source.root / file.name for file in dice.sample(source.files, min(_SAMPLES, len(source.files)))]
    start, count = time.perf_counter(), 0
    if packed:
        with (source.root / largest.name).open("rb", buffering=0) as file:
            for _ in range(_SAMPLES):
                os.pread(file.fileno(), _PIECE, dice.randrange(max(largest.bytes - _PIECE, 1)))
                count += 1
                if time.perf_counter() - start > moment_s:
                    break
    else:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                file.read(_PIECE)
            count += 1
            if time.perf_counter() - start > moment_s:
                break
    each = (time.perf_counter() - start) / count
    return Speed(each, _sequential(source.root / largest.name, moment_s, each))


def _sequential(path: Path, moment_s: float, open_s: float) -> float:
    size = 0
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # this node's own memory proves nothing
        while chunk := file.read(2**20):
            size += len(chunk)
            if size >= _SEQUENTIAL or time.perf_counter() - start > moment_s:
                break
    # In small files the time is that of opening, which is counted already.
    taken = max(time.perf_counter() - start - open_s, 1e-6)
    return size / taken if size >= 2**20 else LOCAL_BYTES_PER_S
