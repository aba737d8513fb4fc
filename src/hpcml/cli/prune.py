"""``hpcml runs prune``: keeps the space that runs take in bounds."""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from .. import queue, rundir
from ..errors import DONE, HpcmlError
from ..filesystem import size_words
from ..rundir import RunDir
from . import show
from .root import json_option, site_option

KEEP = 20
TUNINGS = "tune"  # the folder of hpcml tune's trials, below the runs folder
_AGE_S = {"h": 3600, "d": 86_400, "w": 7 * 86_400}


class _Age(click.ParamType[float]):
    name = "AGE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([hdw])", str(value).strip())
        if not match:
            raise HpcmlError(f"{value!r} is no age", origin="--older-than", allowed="12h, 30d, 8w")
        return float(match[1]) * _AGE_S[match[2]]


@click.command("prune")
@click.option(
    "--keep", type=click.IntRange(min=0),
    help=f"Never delete the newest so many.  [default: {KEEP}; 0 with --max-gb or --older-than]",
)  # fmt: skip
@click.option(
    "--max-gb", type=click.FloatRange(min=0), metavar="GB",
    help="Delete the oldest until the runs folder takes no more GiB than this.",
)  # fmt: skip
@click.option("--older-than", type=_Age(), help="Delete only what ended longer ago, such as 12h, 30d, 8w.")
@click.option("--light", is_flag=True, help="Of runs that stay, delete profile/. Alone it deletes no run.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@site_option
@json_option
def prune_command(
    keep: int | None,
    max_gb: float | None,
    older_than: float | None,
    light: bool,
    yes: bool,
    dry_run: bool,
    site: str | None,
    as_json: bool,
) -> int:
    """Delete the oldest ended runs that MLflow has, and tunings; what is not delivered or not ended is kept.

    With --max-gb and --older-than together a run goes that is too old, and then the oldest until the rest fits.
    """
    root = show.root_of(site)
    tops = _by_age([*(run for run in rundir.every(root) if "/" not in run.id), *tunings(root)])
    bounded = max_gb is not None or older_than is not None
    newest = keep if keep is not None else 0 if bounded else len(tops) if light else KEEP
    free = _prunable(tops if light else tops[newest:])
    old = [run for run in tops[newest:] if run in free]
    doomed = _chosen(root, old, max_gb, older_than) if bounded else old
    folders = {run.path: _size(run.path) for run in doomed}
    if light:
        stay = [run for run in tops if run in free and run not in doomed]
        folders |= {path: _size(path) for run in stay for path in _profiles(run)}
    _tell(root, folders, blocked=len(tops[newest:]) - len(old), as_json=as_json)
    total = sum(folders.values())
    if max_gb is not None and (left := _size(root) - total) > max_gb * 2**30:
        click.echo(f"{size_words(left)} stay in {root}: nothing more of it may go", err=True)
    if not folders or dry_run:
        return DONE
    if not yes:
        _confirm(f"delete these {size_words(total)} from {root}?")
    for path in folders:
        _remove(path)
    tuned = sum(map(_is_tuning, doomed))
    counts = ((len(doomed) - tuned, "run"), (tuned, "tuning"))
    gone = " and ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in counts if count or what == "run")
    click.echo(f"deleted {gone}, {size_words(total)}", err=as_json)
    return DONE


def _confirm(question: str) -> None:
    try:
        click.confirm(question, abort=True, err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise HpcmlError(
            "nothing is deleted: nobody has said yes", fix="add --yes, or --dry-run to look only"
        ) from None


def tunings(root: Path) -> list[RunDir]:
    """Return the folders that ``hpcml tune`` left, the newest first: their trials are no runs of their own."""
    above = RunDir(root, TUNINGS)
    names = sorted((path.name for path in above.path.glob("*") if path.is_dir()), reverse=True)
    return [above.child(name) for name in names]


def _is_tuning(run: RunDir) -> bool:
    return run.id.startswith(f"{TUNINGS}/")


def _by_age(runs: list[RunDir]) -> list[RunDir]:
    """Runs and tunings together, the newest first: the names of both begin with the time."""
    return sorted(runs, key=lambda run: run.id.rpartition("/")[2], reverse=True)


def _prunable(runs: list[RunDir]) -> set[RunDir]:
    """Those that have ended and are in MLflow, with all that is below them; who can't be told about is not among them.

    A tuning's trials are in no MLflow: what they found is in its job file and in ``tune.json``.
    """
    from ..tracking.mlflow import is_delivered

    tuned = {run for run in runs if _is_tuning(run)}
    others = [run for run in runs if run not in tuned]
    below = {run: [run, *rundir.children(run)] for run in others}
    ones = [one for run in others for one in below[run]]
    told, silence = queue.states_of(ones)
    states = dict(zip(ones, told, strict=True))
    if silence is not None:
        click.echo(f"hpcml: runs that may go on are kept: {silence}", err=True)

    def has_arrived(run: RunDir) -> bool:
        return is_delivered(run, state=states[run].name if states[run].is_final else "")

    delivered = {run for run in others if states[run].is_final and all(map(has_arrived, below[run]))}
    return delivered | {run for run in tuned if _is_tuned(run)}


def _is_tuned(run: RunDir) -> bool:
    """Whether a tuning has ended: it left its result, or it was killed and has not begun a trial for a day."""
    if (run.path / "tune.json").exists():
        return True
    trials = rundir.children(run)
    newest = max((path.stat().st_mtime for path in (run.path, *(trial.path for trial in trials))), default=0.0)
    idle = time.time() - newest > _AGE_S["d"]
    return idle and not any(rundir.owner_is_alive(trial) for trial in trials)


def _chosen(root: Path, old: list[RunDir], max_gb: float | None, older_than: float | None) -> list[RunDir]:
    """Of runs that may go, the newest first, those that are too old and then the oldest until the rest is small enough."""
    too_old = older_than is not None and {run for run in old if _ended_at(run) < time.time() - older_than}
    chosen = too_old or set()
    if max_gb is not None:
        left = _size(root) - sum(_size(run.path) for run in chosen)
        for run in reversed(old):
            if left <= max_gb * 2**30:
                break
            if run not in chosen:
                chosen.add(run)
                left -= _size(run.path)
    return [run for run in old if run in chosen]


def _ended_at(run: RunDir) -> float:
    """When a run ended, in seconds since the epoch; without a time in its marker, when its folder last changed."""
    ended = rundir.read_json(run.status).get("ended")
    return float(ended) if isinstance(ended, int | float) else run.path.stat().st_mtime


def _profiles(run: RunDir) -> Iterator[Path]:
    for one in (run, *rundir.children(run)):
        if one.profile.is_dir():
            yield one.profile


def _size(folder: Path) -> int:
    """Bytes that a folder takes on disk, which is what a quota counts; links are not followed."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for parent, _, names in os.walk(folder):
        for path in (parent, *(f"{parent}/{name}" for name in names)):
            try:
                now = os.lstat(path)
            except OSError:
                continue  # gone meanwhile
            if (now.st_dev, now.st_ino) not in seen:
                seen.add((now.st_dev, now.st_ino))
                total += now.st_blocks * 512
    return total


def _tell(root: Path, folders: dict[Path, int], *, blocked: int, as_json: bool) -> None:
    if as_json:
        show.echo_json([{"path": str(path), "bytes": size} for path, size in folders.items()])
    for path, size in () if as_json else folders.items():
        click.echo(f"{path.relative_to(root)}  {size_words(size)}")
    if blocked:
        text = "older run is" if blocked == 1 else "older runs are"
        click.echo(f"{blocked} {text} kept: not ended, or not delivered (hpcml sync --all)", err=True)
    if not folders:
        click.echo(f"nothing to prune in {root}", err=as_json)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HpcmlError(f"{path} can't be deleted: {error.strerror}", fix="see who owns what is left in it") from None
