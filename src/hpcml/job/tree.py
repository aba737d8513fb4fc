"""The keys of a job file, its bases and the command line, merged, each with where it came from."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import HpcmlError
from .schema import WORK_KEYS

_WORK = {".ipynb": "a notebook", ".py": "a script", ".sh": "a script", ".sbatch": "a batch script"}


def merge_chain(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the keys of a job file and its bases as nested tables, and each dotted key's origin.

    Raises:
        HpcmlError: a file is missing, is no TOML, or the bases form a cycle.
    """
    real = path.absolute().resolve()
    if real in seen:
        chain = " → ".join(p.name for p in (*seen[seen.index(real) :], real))
        raise HpcmlError(f"the bases form a cycle: {chain}", origin=f"{path}: base", fix="remove one `base` line")
    tree = _read(path, named_by=seen[-1] if seen else None)
    origins = {key: f"{path}: {key}" for key in dotted(tree)}
    base = tree.pop("base", None)
    if base is None:
        return tree, origins
    if not isinstance(base, str) or "\x00" in base:
        raise HpcmlError(
            f"base = {base!r} is not a path", origin=f"{path}: base", allowed='a string, such as "mnist.toml"'
        )
    below, below_origins = merge_chain(path.parent / base, (*seen, real))
    named_here = [key for key in WORK_KEYS if key in tree]
    for key in WORK_KEYS:  # a variant says what it runs; its base's notebook, script or command then gives way
        if named_here and key not in named_here:
            below.pop(key, None)
            below_origins.pop(key, None)
    below.pop("name", None)  # each file names its own job, by default after itself
    below_origins.pop("name", None)
    return merge(below, tree), {**below_origins, **origins}


def _read(path: Path, named_by: Path | None) -> dict[str, Any]:
    origin = f"{named_by}: base" if named_by else ""
    if path.suffix in _WORK and path.is_file():
        raise HpcmlError(f"{path} is {_WORK[path.suffix]}, not a job file", origin=origin, fix=_job_for(path))
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        fix = _near(path) or "check the path, or make one: hpcml init SCRIPT"
        raise HpcmlError(f"no job file at {path}", origin=origin, fix=fix) from None
    except IsADirectoryError:
        fix = _near(path) or "name a job file, such as jobs/NAME.toml"
        raise HpcmlError(f"{path} is a folder, not a job file", origin=origin, fix=fix) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        what = f"{path} cannot be read: line {line} is not UTF-8 text"
        raise HpcmlError(what, origin=origin, fix="save it as UTF-8; a job file is text in TOML") from None
    except OSError as error:
        what = f"{path} cannot be read: {(error.strerror or str(error)).lower()}"
        raise HpcmlError(what, origin=origin, fix="check the path and its permissions") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number or a nesting beyond what Python reads
        raise HpcmlError(
            f"not valid TOML: {error}", origin=str(path), fix="strings need quotes, tables [brackets]"
        ) from None


def _job_for(path: Path) -> str:
    """How to come from a notebook, script or batch script to a job file."""
    if path.suffix == ".sbatch":
        return f"sbatch {path}, or its job file: {path.with_suffix('.toml')}"
    return f"hpcml init {path} makes a job file for it"


def _near(path: Path) -> str:
    """Name the job file that was probably meant, of those beside the path, here and in ``jobs/``."""
    folders = dict.fromkeys((path.parent, Path(), Path("jobs")))
    try:
        found = {file.stem: str(file) for folder in folders for file in sorted(folder.glob("*.toml"))}
    except OSError:
        return ""
    import difflib  # only an error needs it

    match = difflib.get_close_matches(path.stem, found, n=1, cutoff=0.6)
    return f"did you mean {found[match[0]]!r}?" if match else ""


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one tree of keys over another: tables key by key, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both_tables else value
    return merged


def dotted(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return every key of a tree, those in tables as ``table.key``."""
    keys = []
    for key, value in tree.items():
        keys.append(prefix + key)
        if isinstance(value, dict):
            keys += dotted(value, f"{prefix}{key}.")
    return keys


def assign(tree: dict[str, Any], origins: dict[str, str], key: str, value: Any, origin: str) -> None:
    """Set a dotted key, in tables that are made where they are missing.

    Raises:
        HpcmlError: it is no key, or leads through what is no table.
    """
    *tables, last = key.split(".")
    if not all((*tables, last)):
        raise HpcmlError(f"{key!r} is not a key", origin=origin, allowed="table.key=value, such as resources.nodes=2")
    for number, table in enumerate(tables, 1):
        tree = tree.setdefault(table, {})
        origins.setdefault(".".join(tables[:number]), origin)
        if not isinstance(tree, dict):
            raise HpcmlError(
                f"{table!r} is not a table", origin=origin, allowed="table.key=value, such as resources.nodes=2"
            )
    tree[last] = value
    origins[key] = origin


def _literal(text: str) -> Any:
    if "\n" in text:
        return text
    try:  # inside braces a `# comment` or a second value makes it no literal
        found = tomllib.loads(f"_ = {{_ = {text}}}")["_"]
    except (ValueError, RecursionError):
        return text
    return found["_"] if list(found) == ["_"] else text


def setting(key: str, text: str) -> Any:
    """Return a ``--set`` value: a TOML literal where it is one; text that only looks like a number or a time stays text."""
    value = _literal(text)
    counted = key.startswith(("params.", "resources.", "tuning.", "profile.")) or key == "slurm.max_requeues"
    counted = counted and key != "resources.time"
    kinds = (str, int, float, list, dict) if counted else (str, list, dict)
    return value if isinstance(value, kinds) else text


def typed_like(default: Any, text: str) -> Any:
    """Return a value typed on the command line with the type of its default; None is no default."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool) and text in ("True", "False"):
        return text == "True"
    value = _literal(text)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(value, str | int | float | bool) else text
