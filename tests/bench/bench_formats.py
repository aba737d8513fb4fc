"""Five ways to keep a set of many files, side by side: how long packing takes, how large it gets, how fast it is read.

    scripts/bench formats [--quick]

tar as hpcml and as WebDataset write and read it, ArrayRecord, TFRecord and squashfs, each by its own library or tool, where
that is installed. Nothing is compressed; fsync is included. Random reads are of all samples in one shuffled order, 128 at a
time by one thread, the file cache warm; sequential reads go from front to back, one by one. Medians of three; nothing is
judged. The figures as once measured, and what followed from them, are in README.md.
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import pairs, sets
from hpcml.data.shards import Shards, pack

TIMES = 3
BATCH = 128
Reader = Callable[[Sequence[int]], int]  # the bytes of some samples, by their place among the sorted names


@dataclass(frozen=True)
class Format:
    """A format and how its own library does things.

    Attributes:
        wants: modules and commands that have to be there.
        write: makes ``dest`` of the files.
        random: opens it for reading by number; None where the format has no such thing.
        sequential: reads all from front to back and returns the bytes.
    """

    name: str
    wants: tuple[str, ...]
    write: Callable[[Path, Path], None]
    random: Callable[[Path, Sequence[str]], contextlib.AbstractContextManager[Reader]] | None
    sequential: Callable[[Path], int]

    @property
    def missing(self) -> list[str]:
        """What isn't installed."""
        return [name for name in self.wants if not (importlib.util.find_spec(name) or shutil.which(name, path=_path()))]


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def names_of(folder: Path) -> list[str]:
    """Return the names of all files below a folder, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def synced(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


# tar as hpcml packs and reads it.


def write_tar(source: Path, dest: Path) -> None:
    pack(source, dest)


@contextlib.contextmanager
def random_tar(dest: Path, names: Sequence[str]) -> Iterator[Reader]:
    shards = Shards(dest)
    rows = list(map(shards.row, names))
    yield lambda places: sum(map(len, shards.read([rows[place] for place in places])))


def sequential_tar(dest: Path) -> int:
    shards = Shards(dest)
    return sum(len(shards.read([row])[0]) for row in range(len(shards)))


# tar as WebDataset writes and reads it: no access by number.


def write_webdataset(source: Path, dest: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(dest)) as writer:
        for name in names_of(source):
            key, _, suffix = name.rpartition(".")
            writer.write({"__key__": key, suffix: (source / name).read_bytes()})
    synced(dest)


def sequential_webdataset(dest: Path) -> int:
    import webdataset

    data: Any = webdataset.WebDataset(str(dest), shardshuffle=False, empty_check=False)
    return sum(len(value) for sample in data for key, value in sample.items() if not key.startswith("__"))


# ArrayRecord: no names, so a number is all that a sample has.


def write_arrayrecord(source: Path, dest: Path) -> None:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(dest), "group_size:1,uncompressed")
    for name in names_of(source):
        writer.write((source / name).read_bytes())
    writer.close()
    synced(dest)


@contextlib.contextmanager
def random_arrayrecord(dest: Path, names: Sequence[str]) -> Iterator[Reader]:
    from array_record.python import array_record_data_source

    with array_record_data_source.ArrayRecordDataSource(str(dest)) as data:
        yield lambda places: sum(map(len, data.__getitems__(list(places))))


def sequential_arrayrecord(dest: Path) -> int:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(dest))
    return sum(map(len, reader.read_all()))


# TFRecord: no access by number.


def write_tfrecord(source: Path, dest: Path) -> None:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(dest)) as writer:
        for name in names_of(source):
            writer.write((source / name).read_bytes())
    synced(dest)


def sequential_tfrecord(dest: Path) -> int:
    import tensorflow as tf

    return sum(map(len, tf.data.TFRecordDataset(str(dest)).as_numpy_iterator()))


# squashfs, mounted by the kernel: an image file that is read as a folder.


def write_squashfs(source: Path, dest: Path) -> None:
    words = ["mksquashfs", source, dest, "-noI", "-noD", "-noF", "-noX", "-no-progress", "-quiet"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": _path()})
    synced(dest)


@contextlib.contextmanager
def mounted(dest: Path) -> Iterator[Path]:
    at = dest.with_name("mounted")
    at.mkdir()
    subprocess.run(["mount", "-t", "squashfs", "-o", "loop,ro", dest, at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)
        at.rmdir()


@contextlib.contextmanager
def random_squashfs(dest: Path, names: Sequence[str]) -> Iterator[Reader]:
    with mounted(dest) as at:
        yield lambda places: sum(len((at / names[place]).read_bytes()) for place in places)


def sequential_squashfs(dest: Path) -> int:
    with mounted(dest) as at:
        return sum(len((at / name).read_bytes()) for name in names_of(at))


FORMATS = (
    Format("tar by hpcml", (), write_tar, random_tar, sequential_tar),
    Format("tar by WebDataset", ("webdataset",), write_webdataset, None, sequential_webdataset),
    Format("ArrayRecord", ("array_record",), write_arrayrecord, random_arrayrecord, sequential_arrayrecord),
    Format("TFRecord", ("tensorflow",), write_tfrecord, None, sequential_tfrecord),
    Format("squashfs", ("mksquashfs",), write_squashfs, random_squashfs, sequential_squashfs),
)


@dataclass(frozen=True)
class Line:
    """One format on one set: seconds, MiB, samples/s."""

    data: str
    format: str
    pack_s: float
    mib: float
    random: float | None
    sequential: float


def measure(format: Format, source: Path, folder: Path) -> Line:
    """Measure a format on a set; what it makes is removed."""
    names = names_of(source)
    total = sum((source / name).stat().st_size for name in names)
    dest = folder / "packed"
    seconds = []
    for _ in range(TIMES):
        _remove(dest)
        seconds.append(timed(lambda: format.write(source, dest)))
    size = sum(path.stat().st_size for path in (dest.iterdir() if dest.is_dir() else [dest]))
    order = random.Random(sets.SEED).sample(range(len(names)), len(names))
    by_number = None
    if format.random:
        with format.random(dest, names) as read:
            batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
            by_number = len(names) / median(functools.partial(_all, read, batches), total)
    in_order = len(names) / median(lambda: format.sequential(dest), total)
    _remove(dest)
    return Line(source.name, format.name, statistics.median(seconds), size / 2**20, by_number, in_order)


def _all(read: Reader, batches: Sequence[Sequence[int]]) -> int:
    return sum(map(read, batches))


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median(work: Callable[[], int], total: int) -> float:
    """Return the seconds that some reading takes, and check that it read everything."""
    taken = []
    for _ in range(TIMES):
        began = time.perf_counter()
        got = work()
        taken.append(time.perf_counter() - began)
        if got != total:
            raise RuntimeError(f"{got} bytes were read instead of {total}")
    return statistics.median(taken)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def show(lines: Sequence[Line], missing: Sequence[str]) -> None:
    """Print the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    table = Table(title="formats: a set in each of them", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("set", "format", "pack, s", "MiB", "random, samples/s", "sequential, samples/s"):
        table.add_column(heading, justify="left" if heading in ("set", "format") else "right")
    for line in lines:
        by_number = f"{line.random:,.0f}" if line.random else "none"
        numbers = (f"{line.pack_s:.2f}", f"{line.mib:,.0f}", by_number, f"{line.sequential:,.0f}")
        table.add_row(line.data, line.format, *numbers)
    console.print(table)
    for text in missing:
        console.print(text)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the files")
    part = 10 if parser.parse_args().quick else 1
    pairs.announce("formats")
    missing = [f"{one.name}: not installed: {', '.join(one.missing)}" for one in FORMATS if one.missing]
    lines = []
    with tempfile.TemporaryDirectory(prefix="hpcml-bench-") as name:
        folder = Path(name)
        made = sets.digits(folder / "digits", sets.DIGITS // part), sets.photos(folder / "photos", sets.PHOTOS // part)
        for source in made:
            lines += [measure(one, source, folder) for one in FORMATS if not one.missing]
    show(lines, missing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
