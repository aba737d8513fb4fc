"""Packing and unpacking against tar: whole processes, checksums and index on our side, fsync on both.

    scripts/bench pack [--quick]

60,000 files of 784 bytes and 3,000 of about 60 KB, all in the file cache. ``hpcml data pack`` writes shards, index and
checksums; ``tar -c`` and Python's ``tarfile`` write one archive without either, and then wait until it is on the disk,
as hpcml does. Unpacking is compared with ``tar -x`` of tar's own archive and ``sync -f``. Between the sides what they
wrote is removed, and the disk has come to rest, outside the clock.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import pairs, sets

PYTHON = sys.executable
HPCML = str(Path(sys.executable).with_name("hpcml"))
PAIRS = 8
TARFILE = """
import os, sys, tarfile
with tarfile.open(sys.argv[2], "w") as archive:
    archive.add(sys.argv[1], ".")
with open(sys.argv[2], "rb+") as file:
    os.fsync(file.fileno())
"""


@dataclass(frozen=True)
class Set:
    """A data set of so many files, and the places for what is made of it."""

    name: str
    source: Path
    count: int

    def place(self, name: str) -> Path:
        """Return a path beside the files."""
        return self.source.parent / f"{self.name} {name}"

    def speed(self, words: Sequence[str | Path], made: Path) -> float:
        """Run a command and return its files/s; what it made is removed.

        Raises:
            RuntimeError: it failed.
        """
        subprocess.run(["sync", "-f", self.source], check=True)
        began = time.perf_counter()
        done = subprocess.run(words, capture_output=True, text=True, env=pairs.environment())
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"{words}: exit status {done.returncode}\n{done.stderr[-2000:]}")
        shutil.rmtree(made) if made.is_dir() else made.unlink()
        return self.count / seconds

    def pack(self) -> float:
        """``hpcml data pack``."""
        made = self.place("packed")
        return self.speed([HPCML, "data", "pack", self.source, made], made)

    def tar(self) -> float:
        """``tar -c`` and fsync."""
        made = self.place("tar")
        return self.speed(["sh", "-c", _shell("tar -cf {1} -C {0} . && sync {1}", self.source, made)], made)

    def tarfile(self) -> float:
        """Python's tarfile and fsync."""
        made = self.place("tar")
        return self.speed([PYTHON, "-c", TARFILE, self.source, made], made)

    def unpack(self) -> float:
        """``hpcml data unpack``."""
        made = self.place("back")
        return self.speed([HPCML, "data", "unpack", self.place("once"), made], made)

    def untar(self) -> float:
        """``tar -x`` and a sync of what it wrote."""
        made = self.place("back")
        words = _shell("mkdir {1} && tar -xf {0} -C {1} && sync -f {1}", self.place("once.tar"), made)
        return self.speed(["sh", "-c", words], made)

    def prepare(self) -> None:
        """Fill the file cache, and make what is unpacked."""
        subprocess.run([HPCML, "data", "pack", self.source, self.place("once")], check=True, capture_output=True)
        subprocess.run(["tar", "-cf", self.place("once.tar"), "-C", self.source, "."], check=True)


def _shell(words: str, *paths: Path) -> str:
    return words.format(*(shlex.quote(str(path)) for path in paths))


def figures(data: Set, count: int) -> list[pairs.Figure]:
    """Measure one set."""
    data.prepare()
    what = f"{data.count:,} files"
    packed = f"`hpcml data pack` of {what} against `tar -c` and fsync; aim 1."
    unpacked = f"`hpcml data unpack` of {what} against `tar -x` and `sync -f`."
    return [
        _figure(data, "pack", packed, (data.pack, data.tar), 0.35, count),
        _figure(data, "pack", "The same against Python's tarfile.", (data.pack, data.tarfile), 3.0, count, "tarfile"),
        _figure(data, "unpack", unpacked, (data.unpack, data.untar), 0.5, count),
    ]


def _figure(
    data: Set,
    name: str,
    what: str,
    sides: tuple[Callable[[], float], Callable[[], float]],
    limit: float,
    count: int,
    other: str = "tar",
) -> pairs.Figure:
    measured = []
    for pair in pairs.measure(pairs.in_turn(*sides), least=count):
        measured.append(pair)
        pairs.progress(f"{name} {data.name} against {other}", pair, len(measured))
    bound = pairs.Bound(limit, at_least=True, pairs=PAIRS)
    named = f"{name} {data.name}{f', {other}' * (other != 'tar')}"
    return pairs.Figure(named, what, ("hpcml", other), "files/s", measured, bound)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs of a tenth of the files; nothing is judged")
    quick = parser.parse_args().quick
    part, count = (10, 2) if quick else (1, PAIRS)
    pairs.announce("pack")
    with tempfile.TemporaryDirectory(prefix="hpcml-bench-") as name:
        folder = Path(name)
        tiny = Set("digits", sets.digits(folder / "digits", sets.DIGITS // part), sets.DIGITS // part)
        large = Set("photos", sets.photos(folder / "photos", sets.PHOTOS // part), sets.PHOTOS // part)
        found = [*figures(tiny, count), *figures(large, count)]
        sizes = [sum(path.stat().st_size for path in data.place("once").iterdir()) / 2**20 for data in (tiny, large)]
    notes = ["Of photos tarfile is nearly as fast as the disk, and `tar` itself is not three times as fast."]
    notes += [f"On disk: {sizes[0]:.0f} MiB of digits, {sizes[1]:.0f} MiB of photos, index included."]
    pairs.show("pack: many files as few, and back", found, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
