"""A job file: what to run and what it needs, as frozen data read from TOML.

``load`` follows ``base`` chains, merges tables key by key (arrays are replaced), applies overrides, and reports every
problem of the result at once, each with the file or flag it came from. Unknown keys are errors.
"""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import HpcmlError
from . import check as checks
from .duration import clock, seconds
from .schema import (
    KERAS_FLAVOURS,
    NAME_PATTERN,
    PARAMETER_PATTERN,
    PRECISIONS,
    STRATEGIES,
    WORK_KEYS,
    WORK_SETTINGS,
    Data,
    Environment,
    Job,
    Resources,
    Scalar,
    SlurmOptions,
    Tuning,
)
from .tree import assign, merge_chain, setting, typed_like

__all__ = [
    "Data",
    "Environment",
    "Job",
    "KERAS_FLAVOURS",
    "NAME_PATTERN",
    "PARAMETER_PATTERN",
    "PRECISIONS",
    "Resources",
    "STRATEGIES",
    "Scalar",
    "SlurmOptions",
    "Tuning",
    "WORK_KEYS",
    "WORK_SETTINGS",
    "clock",
    "from_tree",
    "load",
    "project_of",
    "seconds",
    "typed_like",
]


def load(
    path: str | Path,
    params: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
    *,
    function: str | None = None,
) -> Job:
    """Read a job file, its bases, and the overrides given on the command line.

    Args:
        path: the job file.
        params: ``-p`` values as typed; each takes the type of the value that it replaces, in the job file or the work's
            parameters cell, else it is read as a TOML literal where it is one and as a string where not.
        settings: ``--set table.key`` values as typed, TOML literals where they are ones, else strings.
        function: name of a Python function to run instead of the file's work; the file then need not name any.

    Raises:
        HpcmlError: every problem of the file and the overrides at once.
    """
    path = Path(path)
    tree, origins = merge_chain(path)
    for key, text in (settings or {}).items():
        if key == "base":
            raise HpcmlError(f"base = {text!r} can't be set here", origin="--set base", fix="set it in the job file")
        assign(tree, origins, key, setting(key, text), f"--set {key}")
    declared = tree.setdefault("params", {})
    table = declared if isinstance(declared, dict) else {}
    typed = {key: text for key, text in (params or {}).items() if key not in table}
    for key, text in (params or {}).items():
        table[key] = typed_like(table.get(key), text)
        origins[f"params.{key}"] = f"-p {key}"
    return from_tree(tree, origins, project_of(path), path, function=function, typed=typed)


def from_tree(
    tree: Mapping[str, Any],
    origins: Mapping[str, str],
    project: Path,
    path: Path | None = None,
    *,
    function: str | None = None,
    typed: Mapping[str, str] | None = None,
) -> Job:
    """Check a merged tree of keys and make a ``Job`` of it; every problem is reported at once."""
    check = checks.Checker(origins)
    top = {f.name for f in fields(Job)} - {"work", "target", "project", "path", "typed", "origins"} | {
        "base",
        *WORK_KEYS,
    }
    check.unknown(tree, top, "")
    named = [key for key in WORK_KEYS if key in tree]
    if len(named) != 1 and function is None:
        where = origins.get(named[0], "") if named else (str(path) if path else "")
        what = f"{' and '.join(named)} are both set" if named else "nothing to run"
        check.add(what, where, allowed=f"exactly one of {', '.join(WORK_KEYS)}")
    work = named[0] if named else "command"
    target = check.strings(tree, work) if work == "command" else (check.text(tree, work) or "",)
    if work == "command" and named and not any(target[:1]) and not check.problems:
        check.add(
            "command is empty", origins.get("command", ""), allowed='a list of words, such as ["python", "train.py"]'
        )
    if function is not None:
        work, target = "function", (function,)
    job = Job(
        name=check.name(tree, path),
        work=work,
        target=target,
        project=project,
        path=path,
        strategy=check.choice(tree, "strategy", STRATEGIES),
        keras=check.choice(tree, "keras", KERAS_FLAVOURS) or "legacy",
        precision=check.choice(tree, "precision", PRECISIONS) or "float32",
        experiment=check.text(tree, "experiment"),
        resources=checks.resources(check, check.table(tree, "resources")),
        params=check.params(check.table(tree, "params")),
        slurm=checks.slurm(check, check.table(tree, "slurm")),
        env=checks.environment(check, check.table(tree, "env")),
        tuning=checks.tuning(check, check.table(tree, "tuning")),
        data=checks.data(check, check.table(tree, "data")),
        profile=checks.profile(check, tree),
        stall_timeout=checks.stall_timeout(check, tree),
        typed=dict(typed or {}),
        origins=dict(origins),
    )
    check.finish()
    return job


def project_of(path: Path) -> Path:
    """Return the project that a job file belongs to.

    ``$HPCML_PROJECT``, else the nearest folder above the file with ``.git`` or ``pyproject.toml``, else the folder
    above ``jobs/``, else the file's own.
    """
    if os.environ.get("HPCML_PROJECT"):
        project = Path(os.environ["HPCML_PROJECT"]).absolute()
        if not project.is_dir():
            raise HpcmlError(f"no folder at {project}", origin="HPCML_PROJECT", fix="unset it, or name the project's")
        return project
    folder = path.absolute().parent
    for parent in (folder, *folder.parents):
        if (parent / ".git").exists() or (parent / "pyproject.toml").exists():
            return parent
    return folder.parent if folder.name == "jobs" else folder
