"""From a folder of files to a packed data set: listing, plan, shards in parallel, index, one rename.

The order of samples and the cut into shards follow from names and sizes alone, so the same files give the same bytes
whatever the number of processes. All is made in ``.NAME.packing`` beside the destination and stays there when a run is
killed; the next one goes on with what is whole, if the listing is the same to the nanosecond.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import HpcmlError, Problem
from .. import lustre
from . import index, layout
from .layout import MIB
from .plan import SEED, Damaged, Plan, planned
from .progress import Meter, Report
from .walk import clashes, walk
from .workers import Say, default_count, run
from .writing import Part, Source, load_part, write_shard

_SHOWN = 3  # examples in a note
_PLAN, _DATA, _PARTS = "plan", "data", "parts"


@dataclass(frozen=True)
class Packed:
    """What ``pack`` made.

    Attributes:
        path: of the folder.
        samples: how many; ``bytes``: of their contents.
        shards: how many; ``packed_bytes``: of their files.
        classes: names of the folders of files that lie in CLASS/FILE, sorted.
        fingerprint: 12 hexadecimal digits for names and contents.
        resumed: shards that an earlier, interrupted run had made.
        skipped: what was left out, and why.
        notes: what a person should know.
    """

    path: Path
    samples: int
    bytes: int
    shards: int
    packed_bytes: int
    classes: tuple[str, ...]
    fingerprint: str
    resumed: int
    skipped: tuple[Problem, ...]
    notes: tuple[str, ...]


def pack(
    source: Path | str,
    dest: Path | str,
    *,
    shard_bytes: int | None = None,
    workers: int | None = None,
    skip_damaged: bool = False,
    progress: Report | None = None,
    say: Callable[[str], object] = lambda text: print(f"hpcml: {text}", file=sys.stderr),
) -> Packed:
    """Pack a folder of files into few large shards with an index; see the package for the format.

    Empty folders are left out, and symbolic links that stay in the folder become what they lead to; both are told.

    Args:
        source: the folder.
        dest: the folder to make; its parents are made too.
        shard_bytes: the size that a shard should have; by default a 16th of all, between 4 and 256 MiB.
        workers: processes; by default one for each core, and 16 at least on a network file system.
        skip_damaged: leave out what can't be read, images that are empty or cut off, links that lead nowhere or out.
        progress: called with how far it is.
        say: called with a sentence that a person should read.

    Raises:
        Damaged: there is some of that, and ``skip_damaged`` isn't set; nothing is at ``dest``.
        HpcmlError: ``source`` is no folder or holds no file, ``dest`` is taken or can't be written, the disk or the quota
            is full, a file changed meanwhile, another process packs there. The next run goes on where this one was.
    """
    source, dest = Path(source), Path(dest)
    layout.check_apart(source, dest)
    count = workers or default_count(source, dest.absolute().parent)
    try:
        with layout.beside(dest, "packing") as folder:
            work = _Work(folder)
            if not work.is_begun:
                layout.check_free(dest)
            plan = planned(walk(source, count), shard_bytes)
            if work.is_finished(plan, dest):  # killed between the rename and the cleaning up
                work.remove()
                described, _ = index.load(dest)
                return _packed(dest, described, resumed=len(plan.bytes), notes=_notes(plan))
            layout.check_free(dest)
            resumed = work.make(plan, count, progress, say)
            described = work.gather(plan, skip_damaged)
            (folder / _DATA).rename(dest)
            layout.sync_folder(dest.absolute().parent)
            work.remove()
            return _packed(dest, described, resumed=resumed, notes=_notes(plan))
    except OSError as error:
        kept = f".{dest.name}.packing"
        fix = f"make room and run it again: what is done is kept in {kept}; or remove that and choose another place"
        raise layout.told(error, dest, fix) from None


class _Work:
    """The folder in which a packed data set comes about: the plan's digest, ``data/``, and a part for each whole shard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def is_begun(self) -> bool:
        """Whether an earlier run was here."""
        return (self.folder / _PLAN).exists()

    def is_finished(self, plan: Plan, dest: Path) -> bool:
        """Whether an earlier run of the same plan came as far as the rename."""
        return self._is_of(plan) and not (self.folder / _DATA).exists() and (dest / layout.DATASET).exists()

    def _is_of(self, plan: Plan) -> bool:
        return self.is_begun and (self.folder / _PLAN).read_text(encoding="utf-8") == plan.digest

    def remove(self) -> None:
        """Clean up, the plan last: as long as it is there the next run knows what this one had come to."""
        shutil.rmtree(self.folder / _PARTS, ignore_errors=True)
        (self.folder / _PLAN).unlink()
        self.folder.rmdir()

    def make(self, plan: Plan, count: int, progress: Report | None, say: Callable[[str], object]) -> int:
        """Write the shards that are not there yet; return how many are."""
        self._begin(plan)
        numbers = range(len(plan.bytes))
        done = [number for number in numbers if self._is_whole(plan, number)]
        left = [number for number in numbers if number not in set(done)]
        need, data = int(sum(plan.bytes[number] for number in left)), self.folder / _DATA
        _check_room(data, need)
        lustre.stripe(data, int(plan.bytes.max()), say=say)
        meter = Meter(progress, len(plan.names), int(plan.sizes.sum()))
        for rows in map(plan.rows, done):
            meter.add(rows.stop - rows.start, int(plan.sizes[rows].sum()))
        top = os.open(plan.listing.root, os.O_RDONLY | os.O_DIRECTORY)

        def one(number: int, tell: Say) -> None:
            rows = plan.rows(number)
            source = Source(top, plan.names[rows], plan.sizes[rows], plan.modes[rows])
            write_shard(source, data / layout.shard_name(number), tell).save(self._part(number))

        try:
            run(one, left, count, meter.hear)
        finally:
            os.close(top)
        return len(done)

    def _begin(self, plan: Plan) -> None:
        """Keep what an earlier run made of the same plan, and nothing else."""
        if not self._is_of(plan):
            for name in (_DATA, _PARTS):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            layout.write(self.folder / _PLAN, plan.digest.encode())
        for name in (_DATA, _PARTS):
            (self.folder / name).mkdir(exist_ok=True)

    def _part(self, number: int) -> Path:
        return self.folder / _PARTS / str(number)

    def _is_whole(self, plan: Plan, number: int) -> bool:
        rows = plan.rows(number)
        if load_part(self._part(number), rows.stop - rows.start) is None:
            return False
        file = self.folder / _DATA / layout.shard_name(number)
        # One that lacks a file is smaller, and made again: what was wrong may be mended by now.
        return file.exists() and file.stat().st_size == plan.bytes[number]

    def gather(self, plan: Plan, skip_damaged: bool) -> dict[str, Any]:
        """Write index and description, which is returned; ``data/`` is then complete.

        Raises:
            Damaged: something is left out, and may not be.
        """
        np = layout.numpy()
        parts = [self._read(plan, number) for number in range(len(plan.bytes))]
        problems = [*plan.listing.problems, *(problem for part in parts for problem in part.problems)]
        problems.sort(key=lambda problem: problem.origin)
        if problems and not skip_damaged:
            raise Damaged(problems, self.folder.name)
        kept = np.concatenate([part.kept for part in parts])
        if not kept.any():
            raise Damaged(problems)
        numbers = np.repeat(np.arange(len(parts), dtype=np.int32), np.diff(plan.starts))
        names = plan.names if kept.all() else [name for name, keep in zip(plan.names, kept, strict=True) if keep]
        digests = np.concatenate([part.digests for part in parts])
        made, sizes = index.placed(names, plan.sizes[kept], plan.modes[kept], digests, numbers[kept], len(parts))
        left_out = [{"name": problem.origin, "why": problem.what} for problem in problems]
        packed = {"shard_bytes": plan.target, "seed": SEED, "left_out": left_out}
        data, content = self.folder / _DATA, made.to_bytes()
        order = np.argsort(plan.order[kept])
        described = index.describe(made, content, sizes, packed, order)
        layout.write(data / layout.INDEX, content)
        layout.write(data / layout.DATASET, described)
        layout.sync_folder(data)
        return index.parsed(described, data)

    def _read(self, plan: Plan, number: int) -> Part:
        rows = plan.rows(number)
        part = load_part(self._part(number), rows.stop - rows.start)
        if part is None:
            raise HpcmlError(f"{self.folder} was changed by somebody else", fix="run it again")
        return part


def _check_room(folder: Path, need: int) -> None:
    """Say at once what would otherwise be found out after an hour; a quota shows only when it is reached."""
    there = sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder))
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize + there
    if free < need:
        what = f"{folder.parent.parent}: {need / MIB:,.0f} MiB are needed and {free / MIB:,.0f} MiB free"
        raise HpcmlError(what, origin="DEST", fix="make room, or choose another place")


def _notes(plan: Plan) -> tuple[str, ...]:
    notes = []
    if empty := plan.listing.empty:
        some = ", ".join(map(layout.shown, empty[:_SHOWN]))
        notes.append(
            f"{len(empty)} empty folder{'s' * (len(empty) > 1)} left out: {some}{', …' * (len(empty) > _SHOWN)}"
        )
    if same := clashes(plan.listing.names):
        some = ", ".join(f"{one} and {other}" for one, other in same[:_SHOWN])
        notes.append(
            f"names that differ in case only, and are one file on some systems: {some}{', …' * (len(same) > _SHOWN)}"
        )
    return tuple(notes)


def _packed(dest: Path, described: dict[str, Any], *, resumed: int, notes: tuple[str, ...]) -> Packed:
    left_out = described["packed"]["left_out"]
    return Packed(
        path=dest,
        samples=described["samples"],
        bytes=described["bytes"],
        shards=len(described["shards"]),
        packed_bytes=sum(shard["bytes"] for shard in described["shards"]),
        classes=tuple(described["classes"]),
        fingerprint=described["fingerprint"],
        resumed=resumed,
        skipped=tuple(Problem(one["why"], one["name"]) for one in left_out),
        notes=notes,
    )
