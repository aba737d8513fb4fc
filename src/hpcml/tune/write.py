"""The winner into the job file: comments, order and everything else stay; all of it or nothing."""

import contextlib
import os
import shutil
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HpcmlError
from .space import Value

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

# Settings that a job file has outside of [tuning]: the table, empty for the top.
_PLACES = {"precision": "", "global_batch": "params"}
_TABLE = "tuning"


def needs_writable(path: Path) -> None:
    """Refuse a job file that could not be written at the end, before anything starts.

    Raises:
        HpcmlError: it, or its folder, is not writable, or tomlkit is missing.
    """
    target = path.resolve()
    if not (os.access(target, os.W_OK) and os.access(target.parent, os.W_OK)):
        fix = "make it and its folder writable, or --no-write to only measure"
        raise HpcmlError(f"{path} can't be written", fix=fix)
    try:
        import tomlkit  # noqa: F401
    except ImportError as error:
        raise HpcmlError(
            f"to keep a job file's comments tomlkit is needed: {error}", fix="pip install tomlkit"
        ) from None


def write(path: Path, changes: Mapping[str, Value], note: str) -> None:
    """Set values in a job file, atomically; its mode stays.

    Args:
        path: a link is followed.
        changes: setting → value.
        note: the comment beside ``[tuning]``; takes the place of an earlier one.

    Raises:
        HpcmlError: the file can't be read or written, or is not what it was; it is as before.
    """
    target = path.resolve()
    try:
        before = target.read_bytes().decode("utf-8")
        text = rewritten(before, changes, note)
        _replace(target, text)
    except (OSError, ValueError) as error:
        lines = "\n".join(f"  {name} = {literal(value)}" for name, value in changes.items())
        raise HpcmlError(f"{path} can't be written: {error}", fix=f"set these yourself:\n{lines}") from None


def rewritten(text: str, changes: Mapping[str, Value], note: str) -> str:
    """Return a job file's text with values set.

    Raises:
        ValueError: it is no TOML, or could not be changed without changing something else.
    """
    import tomlkit

    document = tomlkit.parse(text)
    wanted = tomllib.loads(text)
    for name, value in changes.items():
        table = _PLACES.get(name, _TABLE)
        _set(document, table, name, value)
        (wanted.setdefault(table, {}) if table else wanted)[name] = value
    if _TABLE in document:
        with contextlib.suppress(AttributeError):  # tuning = {…}, or tuning.prefetch = 2
            document[_TABLE].comment(note)
    done = tomlkit.dumps(document)
    if tomllib.loads(done) != wanted:
        raise ValueError("it is written in a way that can't be changed safely")
    return done


def _set(document: "TOMLDocument", table: str, name: str, value: Value) -> None:
    import tomlkit

    if not table:
        document[name] = value
        return
    if table not in document:
        if document and not document.as_string().endswith("\n\n"):
            document.add(tomlkit.nl())
        document[table] = tomlkit.table()
    holder: Any = document[table]
    old = holder.get(name)
    holder[name] = value
    if old is not None and hasattr(old, "trivia"):  # the comment beside a value stays
        holder[name].trivia.comment_ws, holder[name].trivia.comment = old.trivia.comment_ws, old.trivia.comment


def _replace(target: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def literal(value: Value) -> str:
    """Return a value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)
