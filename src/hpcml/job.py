"""A job file: what to run and what it needs, as frozen data read from TOML.

``load`` follows ``base`` chains, merges tables key by key (arrays are replaced), applies overrides, and reports every
problem of the result at once, each with the file or flag it came from. Unknown keys are errors.
"""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import HpcmlError, Problem, nearest

Scalar = str | int | float | bool
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PARAMETER_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
STRATEGIES = ("original", "mirrored", "multiworker", "ddp")
KERAS_FLAVOURS = ("legacy", "3")
PRECISIONS = ("float32", "mixed_float16", "mixed_bfloat16")
WORK_KEYS = ("notebook", "script", "command")
MOST = 10**9  # of anything that is counted
LONGEST_PROFILE = 200  # steps: a profile holds every operation of each of them

# Slurm's forms (sbatch(1), --time): minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
_TIME = re.compile(
    r"(?:(?P<d>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+))?(?::(?P<ds>\d+))?|(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?)"
)


@dataclass(frozen=True)
class Resources:
    """What the allocation must hold.

    Attributes:
        nodes: number of nodes.
        gpus_per_node: GPUs on each node.
        tasks_per_node: tasks (ranks) on each node.
        cpus_per_task: cores for each task; None leaves it to the site's cores per GPU.
        mem_gb: memory of each node in GiB, as Slurm's ``G``; None leaves it to the site's memory per GPU.
        time: time limit in one of Slurm's forms, such as ``00:30:00``.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    mem_gb: int | None = None
    time: str = "00:30:00"


@dataclass(frozen=True)
class SlurmOptions:
    """Where in the queue: passed to sbatch as they are; ``extra`` holds further options, one a string."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Environment:
    """Which Python runs the work: an environment ``name`` below the site's folder or a ``python``; modules; variables."""

    name: str | None = None
    python: str | None = None
    modules: tuple[str, ...] = ()
    vars: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One job as written; nothing of it is resolved yet.

    Attributes:
        name: the job's name, also of its runs.
        work: ``notebook``, ``script``, ``command``, or ``function`` for a function of Python.
        target: path of the notebook or script relative to ``project``; a command's words; a function's name.
        project: the folder that paths are relative to and that is snapshotted.
        path: the job file, None for a job made in Python.
        profile: first and last step to profile, from 1 over the whole training, both included; None for no profile.
        typed: ``-p`` values as typed that replace nothing in the job file: the work's own default may give their type.
        origins: for each dotted key, where its value came from.
    """

    name: str
    work: str
    target: tuple[str, ...]
    project: Path
    path: Path | None = None
    strategy: str | None = None
    keras: str = "legacy"
    precision: str = "float32"
    experiment: str | None = None
    resources: Resources = Resources()
    params: Mapping[str, Scalar] = field(default_factory=dict)
    slurm: SlurmOptions = SlurmOptions()
    env: Environment = Environment()
    profile: tuple[int, int] | None = None
    typed: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)


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
    tree, origins = _merge_chain(path, ())
    for key, text in (settings or {}).items():
        if key == "base":
            raise HpcmlError(f"base = {text!r} can't be set here", origin="--set base", fix="set it in the job file")
        _assign(tree, origins, key, _setting(key, text), f"--set {key}")
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
    check = _Checker(origins)
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
        resources=_resources(check, check.table(tree, "resources")),
        params=check.params(check.table(tree, "params")),
        slurm=_slurm(check, check.table(tree, "slurm")),
        env=_environment(check, check.table(tree, "env")),
        profile=_profile(check, tree),
        typed=dict(typed or {}),
        origins=dict(origins),
    )
    check.finish()
    return job


def seconds(time: str) -> int:
    """Return a Slurm time limit in seconds; raises ValueError where it isn't one."""
    match = _TIME.fullmatch(time.strip())
    if not match:
        raise ValueError(time)
    part = {key: int(value or 0) for key, value in match.groupdict().items()}
    if match["d"] is not None:
        return ((part["d"] * 24 + part["dh"]) * 60 + part["dm"]) * 60 + part["ds"]
    if match["c"] is not None:
        return (part["a"] * 60 + part["b"]) * 60 + part["c"]
    return part["a"] * 60 + part["b"]


def clock(total_s: float) -> str:
    """Return seconds as ``HH:MM:SS``, with ``D-`` in front from a day on."""
    minutes, second = divmod(round(total_s), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hour:02d}:{minute:02d}:{second:02d}"


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


def _merge_chain(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    real = path.absolute().resolve()
    if real in seen:
        chain = " → ".join(p.name for p in (*seen[seen.index(real) :], real))
        raise HpcmlError(f"the bases form a cycle: {chain}", origin=f"{path}: base", fix="remove one `base` line")
    tree = _read(path, named_by=seen[-1] if seen else None)
    origins = {key: f"{path}: {key}" for key in _dotted(tree)}
    base = tree.pop("base", None)
    if base is None:
        return tree, origins
    if not isinstance(base, str) or "\x00" in base:
        raise HpcmlError(
            f"base = {base!r} is not a path", origin=f"{path}: base", allowed='a string, such as "mnist.toml"'
        )
    below, below_origins = _merge_chain(path.parent / base, (*seen, real))
    named_here = [key for key in WORK_KEYS if key in tree]
    for key in WORK_KEYS:  # a variant says what it runs; its base's notebook, script or command then gives way
        if named_here and key not in named_here:
            below.pop(key, None)
            below_origins.pop(key, None)
    below.pop("name", None)  # each file names its own job, by default after itself
    below_origins.pop("name", None)
    return _merge(below, tree), {**below_origins, **origins}


def _read(path: Path, named_by: Path | None) -> dict[str, Any]:
    origin = f"{named_by}: base" if named_by else ""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise HpcmlError(
            f"no job file at {path}", origin=origin, fix="check the path, or make one: hpcml init SCRIPT"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise HpcmlError(
            f"{path} cannot be read: {error}", origin=origin, fix="a job file is UTF-8 text in TOML"
        ) from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number or a nesting beyond what Python reads
        raise HpcmlError(
            f"not valid TOML: {error}", origin=str(path), fix="strings need quotes, tables [brackets]"
        ) from None


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys.append(prefix + key)
        if isinstance(value, dict):
            keys += _dotted(value, f"{prefix}{key}.")
    return keys


def _assign(tree: dict[str, Any], origins: dict[str, str], key: str, value: Any, origin: str) -> None:
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


def _setting(key: str, text: str) -> Any:
    """A ``--set`` value: a TOML literal where it is one; text that only looks like a number or a time stays text."""
    value = _literal(text)
    counted = key.startswith("params.") or (key.startswith("resources.") and key != "resources.time")
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


class _Checker:
    """Collects problems while values are picked out of the tree."""

    def __init__(self, origins: Mapping[str, str]) -> None:
        self.origins = origins
        self.problems: list[Problem] = []

    def add(self, what: str, origin: str = "", allowed: str = "", fix: str = "") -> None:
        self.problems.append(Problem(what, origin, allowed, fix))

    def finish(self) -> None:
        if self.problems:
            raise HpcmlError(self.problems)

    def unknown(self, tree: Mapping[str, Any], known: set[str], prefix: str) -> None:
        for key in tree:
            if key not in known:
                where = self.origins.get(prefix + key, prefix + key)
                allowed = ", ".join(sorted(known - {"base"} if prefix else known))
                self.add(f"unknown key {prefix + key!r}", where, allowed, nearest(key, known))

    def table(self, tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        value = tree.get(key, {})
        if isinstance(value, dict):
            return value
        self.add(f"{key} = {value!r} is not a table", self.origins.get(key, key), f"a table: [{key}]")
        return {}

    def text(self, tree: Mapping[str, Any], key: str, prefix: str = "") -> str | None:
        value = tree.get(key)
        if value is None or (isinstance(value, str) and value and not re.search(r"[\x00\n\r]", value)):
            return value
        origin = self.origins.get(prefix + key, prefix + key)
        self.add(
            f"{prefix}{key} = {value!r} is not a line of text", origin, "a non-empty string in quotes, on one line"
        )
        return None

    def strings(self, tree: Mapping[str, Any], key: str, prefix: str = "") -> tuple[str, ...]:
        value = tree.get(key, [])
        if isinstance(value, list) and all(isinstance(item, str) and "\x00" not in item for item in value):
            return tuple(value)
        origin = self.origins.get(prefix + key, prefix + key)
        self.add(f"{prefix}{key} = {value!r} is not a list of strings", origin, 'a list of strings, such as ["a", "b"]')
        return ()

    def count(self, tree: Mapping[str, Any], key: str, prefix: str, low: int) -> int | None:
        value = tree.get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= MOST):
            return value
        unit = {"mem_gb": " (GiB a node)", "cpus_per_task": " (cores)"}.get(key, "")
        origin = self.origins.get(prefix + key, prefix + key)
        self.add(
            f"{prefix}{key} = {value!r} is not a whole number" + (" in range" if type(value) is int else ""),
            origin,
            f"a whole number from {low} to {MOST:,}{unit}, without quotes",
        )
        return None

    def choice(self, tree: Mapping[str, Any], key: str, allowed: Sequence[str]) -> str | None:
        value = tree.get(key)
        if value is None or value in allowed:
            return value
        fix = nearest(value, allowed) if isinstance(value, str) else ""
        self.add(f"{key} = {value!r} is not known", self.origins.get(key, key), ", ".join(allowed), fix)
        return None

    def name(self, tree: Mapping[str, Any], path: Path | None) -> str:
        value = tree.get("name", path.stem if path else "job")
        if isinstance(value, str) and NAME_PATTERN.fullmatch(value):
            return value
        origin = self.origins.get("name", f"the file's name, {path}" if path else "name")
        self.add(
            f"name = {value!r} is not a job name",
            origin,
            "letters, digits, '.', '_', '-'; a letter or digit first; at most 64",
        )
        return "job"

    def params(self, table: Mapping[str, Any]) -> dict[str, Scalar]:
        for key, value in table.items():
            origin = self.origins.get(f"params.{key}", f"params.{key}")
            if not PARAMETER_PATTERN.fullmatch(key):
                self.add(f"parameter {key!r} is not a name", origin, "letters, digits and '_', as a Python variable")
            if not isinstance(value, str | int | float | bool):
                self.add(f"params.{key} = {value!r} is not a single value", origin, "a string, number or boolean")
            elif isinstance(value, str) and "\x00" in value:
                self.add(f"params.{key} holds a NUL character", origin, "text that a process can be given")
        return dict(table)


def _resources(check: _Checker, table: Mapping[str, Any]) -> Resources:
    check.unknown(table, {f.name for f in fields(Resources)}, "resources.")
    default = Resources()
    time = table.get("time", default.time)
    try:
        if seconds(time if isinstance(time, str) else "") == 0:
            raise ValueError
    except ValueError:
        origin = check.origins.get("resources.time", "resources.time")
        check.add(
            f"resources.time = {time!r} is not a time limit",
            origin,
            '"30" (minutes), "00:30:00" or "1-00:00:00", in quotes',
        )
        time = default.time
    return Resources(
        nodes=check.count(table, "nodes", "resources.", 1) or default.nodes,
        gpus_per_node=check.count(table, "gpus_per_node", "resources.", 0) or 0,
        tasks_per_node=check.count(table, "tasks_per_node", "resources.", 1) or default.tasks_per_node,
        cpus_per_task=check.count(table, "cpus_per_task", "resources.", 1),
        mem_gb=check.count(table, "mem_gb", "resources.", 1),
        time=time,
    )


def _slurm(check: _Checker, table: Mapping[str, Any]) -> SlurmOptions:
    check.unknown(table, {f.name for f in fields(SlurmOptions)}, "slurm.")
    texts = {f.name: check.text(table, f.name, "slurm.") for f in fields(SlurmOptions) if f.name != "extra"}
    extra = check.strings(table, "extra", "slurm.")
    for option in extra:
        if not re.fullmatch(r"--[a-z][a-z0-9-]*(=[^\n\r]*)?", option):
            origin = check.origins.get("slurm.extra", "slurm.extra")
            check.add(
                f"slurm.extra: {option!r} is not an option of sbatch", origin, 'long options, such as "--mail-type=END"'
            )
    return SlurmOptions(**texts, extra=extra)


def _environment(check: _Checker, table: Mapping[str, Any]) -> Environment:
    check.unknown(table, {f.name for f in fields(Environment)}, "env.")
    if "name" in table and "python" in table:
        check.add("env.name and env.python are both set", check.origins.get("env.python", ""), "one of them")
    variables = table.get("vars", {})
    if not isinstance(variables, dict):
        check.add(f"env.vars = {variables!r} is not a table", check.origins.get("env.vars", ""), "a table: [env.vars]")
        variables = {}
    for key, value in variables.items():
        origin = check.origins.get(f"env.vars.{key}", f"env.vars.{key}")
        if not PARAMETER_PATTERN.fullmatch(key):
            check.add(f"env.vars: {key!r} is not a variable's name", origin, "letters, digits and '_'")
        if not isinstance(value, str) or "\x00" in value:
            check.add(f"env.vars.{key} = {value!r} is not a string", origin, "a string in quotes")
    return Environment(
        name=check.text(table, "name", "env."),
        python=check.text(table, "python", "env."),
        modules=check.strings(table, "modules", "env."),
        vars=dict(variables),
    )


def _profile(check: _Checker, tree: Mapping[str, Any]) -> tuple[int, int] | None:
    if "profile" not in tree:
        return None
    table = check.table(tree, "profile")
    check.unknown(table, {"steps"}, "profile.")
    if not isinstance(tree["profile"], dict) or (table and "steps" not in table):
        return None  # told already
    steps = table.get("steps")
    origin = check.origins.get("profile.steps", check.origins.get("profile", "profile"))
    window = steps if isinstance(steps, list) and all(type(step) is int for step in steps) else []
    if len(window) != 2 or not 1 <= window[0] <= MOST or window[1] > MOST:
        what = (
            "profile.steps is missing" if steps is None else f"profile.steps = {steps!r} is not a first and a last step"
        )
        check.add(what, origin, "two whole numbers from 1, such as [10, 20]", "leave [profile] out for no profile")
        return None
    first, last = window
    if last < first:
        what = f"profile.steps = {steps!r} ends before it begins"
        check.add(what, origin, "the first step, then the last", f"[{last}, {first}]" if last > 0 else "")
    elif last - first >= LONGEST_PROFILE:
        what = f"profile.steps = {steps!r} is {last - first + 1:,} steps long; a profile grows with each of them"
        check.add(what, origin, f"at most {LONGEST_PROFILE} steps", f"[{first}, {first + 10}]")
    return first, last
