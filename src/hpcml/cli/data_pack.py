"""``hpcml data pack``, ``unpack``, ``verify``, ``ls``, ``cat``: many small files as few large ones, and back."""

import contextlib
import fnmatch
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import DONE, JOB_FAILED, HpcmlError, Problem
from ..filesystem import size_words
from .root import json_option

if TYPE_CHECKING:
    from ..data.shards import Packed, Progress, Shards

    Report = Callable[[Progress], None]

# NumPy would start a thread for each core, for algebra that nobody does here.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
_LINE_S = 10  # between two lines where nothing can be drawn
_DRAW_S = 0.1
_SHOWN = 20
_workers = click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one for each core]")


@click.command("pack")
@click.argument("src")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--shard-mb", type=click.FloatRange(min=0, min_open=True), metavar="MIB",
    help="The size that a shard should have.  [default: a 16th of all, between 4 and 256]",
)  # fmt: skip
@click.option(
    "--skip-damaged", is_flag=True, help="Leave out what can't be read, and images that are empty or cut off."
)
@_workers
@json_option
def pack_command(
    src: str, dest: Path, shard_mb: float | None, skip_damaged: bool, workers: int | None, as_json: bool
) -> int:
    """Pack the folder SRC into few large shards: the folder DEST.

    The shards are plain tar files with an index and checksums beside them. Nothing is at DEST before all is whole; after
    an interruption the same command goes on where it was. The same files give the same bytes.
    """
    from ..data.shards import Damaged, pack

    shard_bytes = max(1, round(shard_mb * 2**20)) if shard_mb else None
    began = time.monotonic()
    try:
        with _told_progress("packing") as report, _resumable():
            made = pack(
                _folder(src), dest, shard_bytes=shard_bytes, workers=workers, skip_damaged=skip_damaged,
                progress=report, say=lambda text: click.echo(f"hpcml: {text}", err=True),
            )  # fmt: skip
    except Damaged as error:
        if as_json:
            _json({"damaged": [_why(problem) for problem in error.damaged]})
        raise
    seconds = time.monotonic() - began
    if as_json:
        _json(asdict(made) | {"seconds": seconds, "skipped": [_why(problem) for problem in made.skipped]})
    else:
        _tell_packed(src, made, seconds)
    return DONE


def _tell_packed(src: str, made: "Packed", seconds: float) -> None:
    for note in made.notes:
        click.echo(f"hpcml: note: {note}", err=True)
    for problem in made.skipped[:_SHOWN]:
        click.echo(f"hpcml: left out: {problem.origin}: {problem.what}", err=True)
    if len(made.skipped) > _SHOWN:
        click.echo(f"hpcml: left out: and {len(made.skipped) - _SHOWN} more; --json lists them all", err=True)
    resumed = f", {made.resumed} of them by an earlier run" if made.resumed else ""
    classes = f" · {_count(len(made.classes), 'class')}" if made.classes else ""
    dest = click.format_filename(made.path)
    click.echo(
        f"packed {src} into {dest}: {_count(made.samples, 'file')}, {size_words(made.bytes)}, in {_took(seconds)}"
    )
    click.echo(
        f"  {_count(made.shards, 'shard')} of {size_words(made.packed_bytes / made.shards)}{resumed}, index, checksums"
        f"{classes} · fingerprint {made.fingerprint}"
    )
    click.echo(f'  look: hpcml data ls {dest} · read: hpcml.data.open("{made.path.absolute()}")')


@click.command("unpack")
@click.argument("src")
@click.argument("dest", type=click.Path(path_type=Path))
@_workers
@json_option
def unpack_command(src: str, dest: Path, workers: int | None, as_json: bool) -> int:
    """Write the files of the packed data set SRC into the folder DEST, byte for byte; each is checked."""
    from ..data.shards import unpack

    began = time.monotonic()
    with _told_progress("unpacking") as report:
        made = unpack(_folder(src), dest, workers=workers, progress=report)
    seconds = time.monotonic() - began
    if as_json:
        _json(asdict(made) | {"seconds": seconds})
    else:
        count = f"{_count(made.samples, 'file')}, {size_words(made.bytes)}"
        click.echo(f"unpacked {src} into {click.format_filename(dest)}: {count}, all as they were, in {_took(seconds)}")
    return DONE


@click.command("verify")
@click.argument("src")
@_workers
@json_option
def verify_command(src: str, workers: int | None, as_json: bool) -> int:
    """Check every byte of the packed data set SRC; what is damaged is told with shard, sample and byte."""
    from ..data.shards import verify

    path = _folder(src)
    with _told_progress("checking") as report:
        damage = verify(path, workers=workers, progress=report)
    if as_json:
        _json([asdict(one) for one in damage])
    elif not damage:
        click.echo(f"{src}: whole, every byte is as it was packed")
    if damage:
        what = [Problem(str(one), origin=src) for one in damage[:_SHOWN]]
        more = [Problem(f"and {len(damage) - _SHOWN} more; --json lists them all")] if len(damage) > _SHOWN else []
        raise _NotWhole([*what, *more, Problem("it is not as it was packed", fix="copy it, or pack it, again")])
    return DONE


class _NotWhole(HpcmlError):
    """The command worked, and what it looked at is damaged (exit 1)."""

    exit_code = JOB_FAILED


@click.command("ls")
@click.argument("src")
@click.argument("pattern", required=False)
@json_option
def ls_command(src: str, pattern: str | None, as_json: bool) -> int:
    """List the packed data set SRC: size in bytes and name; with PATTERN those that match it, such as 'train/3/*'."""
    from ..data.shards import Shards
    from ..data.shards.layout import shown

    shards = Shards(_folder(src))
    rows = [
        row for row in shards.index.order.tolist() if not pattern or fnmatch.fnmatchcase(shards.names[row], pattern)
    ]
    if as_json:
        _json([_row(shards, row) for row in rows])
        return DONE
    sizes = [f"{int(shards.sizes[row]):,}" for row in rows]
    width = max(map(len, sizes), default=0)
    click.echo(
        "".join(f"{size:>{width}}  {shown(shards.names[row])}\n" for row, size in zip(rows, sizes, strict=True)),
        nl=False,
    )
    total = size_words(sum(int(shards.sizes[row]) for row in rows))
    click.echo(f"{_count(len(rows), 'file')}, {total}, in {_count(shards.count, 'shard')}", err=True)
    return DONE


def _row(shards: "Shards", row: int) -> dict[str, Any]:
    from ..data.shards.layout import shard_name

    return {
        "name": shards.names[row],
        "bytes": int(shards.sizes[row]),
        "sha256": shards.digests[row].tobytes().hex(),
        "shard": shard_name(int(shards.index.shards[row])),
        "offset": int(shards.index.offsets[row]),
    }


@click.command("cat")
@click.argument("src")
@click.argument("name")
def cat_command(src: str, name: str) -> int:
    """Write the content of one file of the packed data set SRC to the standard output."""
    from ..data.shards import Shards

    shards = Shards(_folder(src))
    for piece in shards.pieces(shards.row(name)):
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()
    return DONE


def _folder(text: str) -> Path:
    """Return the folder of a path; a bare name that isn't here is one in the data folder."""
    path = Path(text).expanduser()
    if path.exists() or "/" in text or text in ("", ".", ".."):
        return path
    from ..data import images

    root = images.root()
    if (root / text).is_dir():
        return root / text
    fix = f"hpcml data fetch, or a path; the data folder is {root} ($HPCML_DATA, else as the site's file says)"
    raise HpcmlError(f"no folder {text!r} here, and none in the data folder", origin="SRC", fix=fix)


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo("hpcml: the shards that are done are kept: the same command goes on from there", err=True)
        raise


@contextlib.contextmanager
def _told_progress(doing: str) -> "Iterator[Report]":
    """Show progress on stderr: a bar on a terminal, else a line every ten seconds."""
    if not sys.stderr.isatty():
        yield _Lines(doing)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[told]}"), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    # Drawn when something is told, not by a thread: the processes are forked.
    with Bars(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bars:
        task = bars.add_task(doing, total=None, told="reading the listing …")
        bars.refresh()
        last = began = time.monotonic()

        def report(now: "Progress") -> None:
            nonlocal last
            moment = time.monotonic()
            if moment - last < _DRAW_S and now.files < now.of_files:
                return
            last = moment
            told = _speed(now, moment - began)
            # Small files cost by their number, large ones by their bytes.
            share = 0.5 * now.files / max(1, now.of_files) + 0.5 * now.bytes / max(1, now.of_bytes)
            bars.update(task, total=1.0, completed=share, told=told, refresh=True)

        yield report


class _Lines:
    """Says how far it is in a line of its own now and then."""

    def __init__(self, doing: str) -> None:
        self.doing = doing
        self.began = self.last = time.monotonic()

    def __call__(self, now: "Progress") -> None:
        moment = time.monotonic()
        if moment - self.last >= _LINE_S:
            self.last = moment
            click.echo(f"hpcml: {self.doing}: {_speed(now, moment - self.began)}", err=True)


def _speed(now: "Progress", seconds: float) -> str:
    rate = now.files / max(seconds, 1e-3)
    done = f"{now.files:,}/{now.of_files:,} files, {size_words(now.bytes)} of {size_words(now.of_bytes)}"
    return f"{done}, {rate:,.0f} files/s"


def _took(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _why(problem: Problem) -> dict[str, str]:
    return {"name": problem.origin, "why": problem.what}


def _json(value: Any) -> None:
    from . import show

    show.echo_json(value)
