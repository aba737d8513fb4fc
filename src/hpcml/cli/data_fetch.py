"""Commands that bring data: data fetch, data stage, data bench."""

import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import DONE, HpcmlError
from ..filesystem import size_words
from . import show
from .root import json_option, site_option

if TYPE_CHECKING:
    from ..data.measure import Bench

_LINE_EACH_S = 10.0
IMAGES = "images"  # counted; all else is bytes


def _say(sentence: str) -> None:
    click.echo(f"hpcml: {sentence}", err=True)


@click.command("fetch")
@click.argument("source")
@click.option("--to", metavar="NAME", help="What to call it in the data folder; by default as it is called there.")
@click.option("--sha256", metavar="DIGEST", help="What the file must have; published sets bring their own.")
@click.option("--images", is_flag=True, help="Of MNIST make a folder of images, train/0…9 and test/0…9.")
@site_option
@json_option
def fetch_command(
    source: str, to: str | None, sha256: str | None, images: bool, site: str | None, as_json: bool
) -> int:
    """Bring a data set into the site's data folder.

    Once, on the login node: called again it changes nothing, and in a job it downloads nothing. SOURCE is a URL, a path
    to a file, or one of these:

    \b
    mnist      70,000 digits: mnist.npz, or a folder of images
    flowers    3,670 photographs of five kinds, for notebooks/flowers*
    resnet50   its weights, for the same notebooks
    digits     5,000 of MNIST's digits as a folder of images; needs no network

    Archives (.tgz, .tar.*, .zip) are unpacked, idx files become .npy or .npz. An interrupted download goes on where it
    stopped, by the same command. $HPCML_DATA, else the site's file, says where the data folder is.
    """
    from ..data.fetch import fetch

    with _progress() as progress:
        fetched = fetch(source, _root(site), to=to, sha256=sha256, images=images, say=_say, progress=progress)
    if as_json:
        show.echo_json(dataclasses.asdict(fetched))
        return DONE
    count = (
        f": {fetched.files:,} file{'s' * (fetched.files != 1)}, {size_words(fetched.bytes)}" if fetched.files else ""
    )
    click.echo(f"{fetched.path} {'is there' if fetched.is_new else 'was already there'}{count}")
    if fetched.note:
        click.echo(f"  {fetched.note}")
    return DONE


@click.command("stage")
@click.argument("name", required=False)
@click.option("--auto", is_flag=True, help="Copy it only where an estimate says that it pays.")
@click.option("--epochs", type=click.IntRange(min=1), help="For the estimate.")
@click.option("--clean", is_flag=True, help="Remove what was staged here by hand, or by this job.")
@json_option
def stage_command(name: str | None, auto: bool, epochs: int | None, clean: bool, as_json: bool) -> int:
    """Copy a data set to this node's own disk.

    Once, verified; prints the path to read.

    \b
    DATA=$(hpcml data stage flowers)

    NAME is a name in the data folder or a path. Where no copy can be made, it says why and prints the set's own path. A
    job with [data] stage = "auto" does this by itself on each of its nodes, and removes it at its end; what is staged
    by hand stays until hpcml data stage --clean.
    """
    from ..data import images, staging

    if clean:
        click.echo(f"{size_words(staging.clean(say=_say))} removed", err=True)
    if name is None:
        if not clean:
            raise HpcmlError("NAME is missing", fix="hpcml data stage NAME; hpcml data stage --help tells more")
        return DONE
    file = Path(name).expanduser()
    folder = file.absolute() if "/" in name and file.is_file() else images.find(name)
    with _progress() as progress:
        placed = staging.placed_for(
            folder, "auto" if auto else "always", say=_say, epochs=epochs,
            progress=lambda done, total: progress("staging", done, total),
        )  # fmt: skip
    _say(placed.reason)
    if as_json:
        show.echo_json(dataclasses.asdict(placed))
    else:
        click.echo(str(placed.path))
    return DONE


@click.command("bench")
@click.argument("path", type=click.Path(path_type=Path), default=".")
@click.option("--seconds", type=click.FloatRange(min=0.5), default=10.0, show_default=True, help="About how long.")
@json_option
def bench_command(path: Path, seconds: float, as_json: bool) -> int:
    """Measure what the file system under PATH gives.

    And what that means for the data set there. PATH is a path, or a name in the data folder. Small files, one large
    file, and reads all over it, by one reader and by 16 at once. It writes a few hundred MB beside the set and removes
    them.
    """
    from ..data.measure import bench

    if not path.exists() and len(path.parts) == 1:
        from ..data import images

        path = images.find(str(path))  # a name in the data folder
    # As Ctrl-C does, a TERM lets what was written go too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        done = bench(path, seconds, lambda what: _say(f"{what} …") if sys.stderr.isatty() else None)
    finally:
        signal.signal(signal.SIGTERM, before)
    if as_json:
        show.echo_json(dataclasses.asdict(done))
    else:
        _print(done)
    return DONE


def _print(done: "Bench") -> None:
    from ..data.staging.paying import seconds

    speeds = done.speeds
    click.echo(f"{done.path} is on {done.kind}")
    if done.where is None:
        click.echo("  it can't be written to, so only the set's own files were read")
    else:
        click.echo(
            f"  small files    {_count(speeds.created)} made/s, {_count(speeds.opened)} opened and read/s, "
            f"{_count(speeds.opened_many)} by 16 readers (names still in memory)"
        )
    if speeds.read is not None:
        came = {
            True: "from the disk or server",
            False: "from this node's memory",
            None: "perhaps from this node's memory",
        }
        click.echo(f"  a large file   {_rate(speeds.written)} written, {_rate(speeds.read)} read ({came[speeds.cold]})")
        click.echo(
            f"  random reads   {_count(speeds.random)}/s of {size_words(speeds.piece)}, {_count(speeds.random_many)} by 16 readers"
        )
    elif done.where is not None:
        click.echo("  no room for a large file")
    if done.epoch_s is None:
        return
    what = f"{done.samples:,} samples in {done.files:,} files" if done.samples is not None else f"{done.files:,} files"
    click.echo(f"this set: {what}, {size_words(done.bytes)}; 16 readers, mixed order")
    if done.samples is None:
        warm = f" ({100 * done.own_warm:.0f} % of them were in this node's memory)" if done.own_warm else ""
        click.echo(f"  opened         {_count(done.own)}/s of its own files{warm}")
        click.echo(f"  as it is       {seconds(done.epoch_s)} an epoch")
    if done.packed_s is not None:
        click.echo(f"  {'packed  ' if done.samples is None else 'as it is'}       {seconds(done.packed_s)} an epoch")
    for sentence in done.advice or ("nothing to do: reading it so is quick enough",):
        click.echo(f"→ {sentence}")


def _count(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def _rate(value: float | None) -> str:
    return "?" if value is None else f"{value / 1e6:,.0f} MB/s"


def _root(site: str | None) -> Path:
    """Return the data folder of a site; without one that of the run or place where this is called."""
    if site is None:
        from ..data import images

        return images.root()
    from .. import site as sites
    from ..job import project_of

    return sites.data_root(sites.load(site), project_of(Path.cwd() / "job.toml"))


@contextmanager
def _progress() -> "Iterator[Callable[[str, int, int | None], object]]":
    """Give a function that shows how far something is: a bar on a terminal, else a line every ten seconds."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = {}

        def bar(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, amount="")
            bars.update(tasks[what], completed=done, total=total, amount=_amount(what, done, total))

        yield bar


def _amount(what: str, done: int, total: int | None) -> str:
    word = "{:,}".format if what == IMAGES else size_words
    return f"{word(done)} of {word(total)}" if total else word(done)


def _lines() -> "Callable[[str, int, int | None], object]":
    last = time.monotonic()

    def line(what: str, done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last > _LINE_EACH_S:
            last = time.monotonic()
            percent = f" ({100 * done // total} %)" if total else ""
            _say(f"{what}: {_amount(what, done, total)}{percent}")

    return line
