"""Commands about versions of data: data version add, push, pull, checkout, list, diff, remote."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import site as sites
from ..errors import DONE, HpcmlError
from ..filesystem import size_words
from ..job import project_of
from ..slurm import commands
from .data_remote import remote_command
from .root import json_option, site_option

if TYPE_CHECKING:
    from ..data.versions.pointers import Pointer
    from ..data.versions.repository import Repository

_SHOWN = 10  # names of files, of each kind of change


@click.group("version")
def version_command() -> None:
    """Versions of data sets: DVC keeps the content, a git tag names it, a job asks for it.

    \b
    hpcml data version add train --tag v1.0       what lies in train is v1.0 from now on
    hpcml data version remote s3://bucket/path    or a folder; where versions are kept
    hpcml data version push                       and git push --follow-tags, as for any commit
    hpcml data version pull v1.0                  in another clone: beside the others, for jobs
    """


@version_command.command("add")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--tag", required=True, help="The version's name, a new git tag, such as v1.0.")
@click.option("-m", "--message", default="", help="Message of the commit and the tag.")
@json_option
def add_command(folder: Path, tag: str, message: str, as_json: bool) -> int:
    """Make what lies in a folder a version: into DVC's cache, its pointer committed and tagged in git.

    Only the pointer, .gitignore and DVC's own files are committed. The same version added twice changes nothing.
    """
    from ..data.versions import adding
    from ..data.versions.progress import shown

    with shown() as (progress, say):
        done = adding.add(folder, tag, message, progress, say)
    one = done.pointer
    if as_json:
        return _json({**_told(one), "tag": tag, "commit": done.commit, "new": done.new})
    held = f"{one.path} {tag} ({one.short}): {one.files:,} files, {size_words(one.bytes)}"
    if not done.new:
        click.echo(f"{held}: it is that already, nothing has changed")
        return DONE
    click.echo(f"{held}, commit {done.commit[:12]}\n  next: hpcml data version push {tag}")
    return DONE


@version_command.command("push")
@click.argument("tag", required=False)
@json_option
def push_command(tag: str | None, as_json: bool) -> int:
    """Push the data of a version, or of all, to the remote; git pushes tags and commits, as ever."""
    from ..data.versions import repository
    from ..data.versions.progress import shown

    found = repository.need(Path.cwd())
    with shown() as (progress, say):
        count = repository.push(found, [tag] if tag else found.git.tags(), progress, say)
        url = repository.need_remote(found).url
    if as_json:
        return _json({"tag": tag, "pushed": count, "remote": url})
    click.echo(f"pushed {count:,} files to {url}" if count else f"{url} has all of it already")
    if found.git.ask("remote").out.strip():
        click.echo(f"  next: git push origin HEAD {tag or '--tags'}")
    return DONE


@version_command.command("pull")
@click.argument("tag")
@click.argument("sources", metavar="[DATA]...", nargs=-1)
@click.option("--verify", is_flag=True, help="Read every file again, and mend what is damaged.")
@site_option
@json_option
def pull_command(tag: str, sources: Sequence[str], verify: bool, site: str | None, as_json: bool) -> int:
    """Lay a version out below the data folder, beside others, for jobs with [data] version to read.

    The work tree stays as it is. DATA is a folder's name or path; without it all data sets of the tag are pulled.
    """
    from ..data.versions import material, repository
    from ..data.versions.progress import shown

    found = repository.need(Path.cwd())
    wanted = _wanted(found, tag, sources)
    root = _data_root(site)
    told = []
    with shown() as (progress, say):
        for one in wanted:
            new = material.lay_out(found, tag, one, root, progress, say, verify=verify)
            told.append({**_told(one), "tag": tag, "folder": str(material.folder_of(root, tag, one)), "new": new})
    if as_json:
        return _json(told)
    for one, entry in zip(wanted, told, strict=True):
        already = "" if entry["new"] else " already, and whole" if verify else " already"
        click.echo(
            f"{one.path} {tag} ({one.short}): {one.files:,} files, {size_words(one.bytes)}, at {entry['folder']}{already}"
        )
    return DONE


@version_command.command("checkout")
@click.argument("tag")
@click.argument("sources", metavar="[DATA]...", nargs=-1)
@click.option("--force", is_flag=True, help="Discard changes in the folder that no version holds.")
@json_option
def checkout_command(tag: str, sources: Sequence[str], force: bool, as_json: bool) -> int:
    """Give a data folder of the work tree the content of a version; code and all else stay as they are."""
    from ..data.versions import repository, working
    from ..data.versions.progress import shown

    found = repository.need(Path.cwd())
    wanted = _wanted(found, tag, sources)
    with shown() as (progress, say):
        done = working.checkout(found, tag, wanted, force=force, progress=progress, say=say)
    if as_json:
        return _json([{**_told(one.pointer), "tag": tag, "new": one.new} for one in done])
    for one in done:
        what = "has now" if one.new else "had already"
        click.echo(f"{one.pointer.path} {what} the {one.pointer.files:,} files of {tag} ({one.pointer.short})")
    return DONE


@version_command.command("list")
@site_option
@json_option
def list_command(site: str | None, as_json: bool) -> int:
    """List versions: tag, data set, files, size, whether it is in the work tree or pulled for jobs."""
    from ..data.versions import material, pointers, repository

    found = repository.need(Path.cwd())
    root = _data_root(site)
    rows = []
    for tag in found.git.tags():
        for one in pointers.at(found.git, tag):
            now = pointers.in_work_tree(found.git, one.path)
            in_tree = now is not None and now.digest == one.digest and (found.git.top / one.path).is_dir()
            here = [name for name, is_so in (
                ("work tree", in_tree),
                ("pulled", material.held(root, tag, one) is not None),
                ("cache", found.is_cached(one)),
            ) if is_so]  # fmt: skip
            rows.append({**_told(one), "tag": tag, "here": here})
    if as_json:
        return _json(rows)
    if not rows:
        click.echo("no versions yet\n  next: hpcml data version add FOLDER --tag v1.0")
        return DONE
    _table(
        ("tag", "data", "files", "size", "hash", "here"),
        [
            (
                r["tag"],
                r["path"],
                f"{r['files']:,}",
                size_words(r["bytes"]),
                r["hash"][:12],
                ", ".join(r["here"]) or "–",
            )
            for r in rows
        ],
        right=(2, 3),
    )
    return DONE


@version_command.command("diff")
@click.argument("before")
@click.argument("after")
@click.argument("source", metavar="[DATA]", required=False)
@click.option("--names", is_flag=True, help="List the files.")
@site_option
@json_option
def diff_command(before: str, after: str, source: str | None, names: bool, site: str | None, as_json: bool) -> int:
    """Compare two versions: files and bytes added, removed, changed, and images by class."""
    from ..data.versions import changes, repository

    found = repository.need(Path.cwd())
    both = [_wanted(found, tag, [source] if source else []) for tag in (before, after)]
    shared = [one.path for one in both[0] if any(one.path == other.path for other in both[1])]
    if len(shared) != 1:
        allowed = ", ".join(shared) or "none that both tags have"
        raise HpcmlError(
            "say which data set to compare", allowed=allowed, fix=f"hpcml data version diff {before} {after} DATA"
        )
    chosen = [next(one for one in some if one.path == shared[0]) for some in both]
    root = _data_root(site)
    told = changes.between(
        *(changes.files_of(found, tag, one, root) for tag, one in zip((before, after), chosen, strict=True))
    )
    if as_json:
        return _json({**_plain(told), "path": shared[0], "tags": [before, after]})
    rows = [
        (before, told.before),
        ("added", told.added),
        ("removed", told.removed),
        ("changed", told.changed),
        (after, told.after),
    ]
    marks = {"added": "+", "removed": "-"}
    lines = [
        (n, *(f"{marks.get(n, '') if p.files else ''}{text}" for text in (f"{p.files:,}", size_words(p.bytes))))
        for n, p in rows
    ]
    _table((shared[0], "files", "size"), lines, right=(1, 2))
    if told.moved:
        click.echo(f"of those added {told.moved:,} have the content of files that {before} has too")
    if told.classes:
        click.echo()
        grown = [(label, f"{old:,}", f"{new:,}", f"{new - old:+,}") for label, (old, new) in told.classes.items()]
        _table(("class", before, after, "change"), grown, right=(1, 2, 3))
    for kind, listed in told.names.items() if names else ():
        for name in listed:
            click.echo(f"{kind:<8} {name}")
    return DONE


version_command.add_command(remote_command)


def _wanted(found: "Repository", tag: str, sources: Sequence[str]) -> "list[Pointer]":
    from ..data.versions import pointers

    if sources:
        return [pointers.of(found.git, tag, source) for source in sources]
    wanted = pointers.at(found.git, tag)
    if not wanted:
        raise HpcmlError(f"tag {tag!r} has no data sets", fix="hpcml data version list shows which have")
    return wanted


def _data_root(site: str | None) -> Path:
    where, _ = sites.choose(site, None if site else commands.cluster_name())
    return sites.data_root(where, project_of(Path.cwd() / "session.py"))


def _told(one: "Pointer") -> dict[str, Any]:
    return {"path": one.path, "hash": one.digest, "files": one.files, "bytes": one.bytes}


def _plain(value: Any) -> Any:
    import dataclasses

    return dataclasses.asdict(value)


def _json(value: Any) -> int:
    from . import show

    show.echo_json(value)
    return DONE


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    widths = [max(len(row[at]) for row in (heads, *rows)) for at in range(len(heads))]
    for row in (heads, *rows):
        cells = (
            text.rjust(width) if at in right else text.ljust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        click.echo("  ".join(cells).rstrip())
