"""A site: what a cluster offers and how it wants to be asked, as frozen data read from TOML.

Built in are ``local``, ``generic`` and ``ft3``; a person's own lie in ``~/.config/hpcml/sites/*.toml`` or are given
by path. ``choose`` says which one applies here, and why.
"""

import os
import re
import shutil
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import HpcmlError, Problem, nearest
from .job import seconds

BUILT_IN = Path(__file__).parent / "sites"
SCHEDULERS = ("slurm", "local")
DELIVERIES = ("auto", "job", "login")


@dataclass(frozen=True)
class Limits:
    """The most that one job may ask for; None is unknown. Memory in GiB, time in Slurm's forms."""

    nodes: int | None = None
    cores_per_node: int | None = None
    gpus_per_node: int | None = None
    mem_gb_per_node: int | None = None
    max_time: str | None = None


@dataclass(frozen=True)
class Site:
    """One place where jobs run.

    Attributes:
        gpu_request: the value of ``--gres``, with ``{count}`` for GPUs per node.
        cores_per_gpu, mem_gb_per_gpu: what a job gets that does not say.
        runs, data, envs: folders, with environment variables in them.
        tracking: MLflow's address when ``MLFLOW_TRACKING_URI`` is not set.
        delivery: who sends a run to MLflow while it goes on: the ``job`` itself, the person's side (``login``), or
            ``auto``: see :meth:`delivers_in_job`.
        limits: for the whole site; ``partitions`` narrows them by partition.
    """

    name: str
    description: str = ""
    scheduler: str = "slurm"
    cluster_names: tuple[str, ...] = ()
    gpu_request: str = "gpu:{count}"
    cores_per_gpu: int = 8
    mem_gb_per_gpu: int | None = None
    modules: tuple[str, ...] = ()
    runs: str = "$HPCML_PROJECT/runs"
    data: str = "$HPCML_PROJECT/data"
    envs: str = "$HOME/envs"
    tracking: str = "sqlite:///$HPCML_PROJECT/runs/mlflow.db"
    delivery: str = "auto"
    limits: Limits = Limits()
    partitions: Mapping[str, Limits] = field(default_factory=dict)
    path: Path | None = None

    def delivers_in_job(self, address: str) -> bool:
        """Return whether a job sends its run to MLflow itself, while it goes on.

        By ``auto`` it does where MLflow is a server (http, https). An SQLite file is written on the person's side only,
        by one process at a time, whatever the site says: its locks don't hold across nodes
        (https://www.sqlite.org/faq.html#q5).
        """
        if address.startswith("sqlite") or self.delivery == "login":
            return False
        return self.delivery == "job" or address.startswith(("http://", "https://"))

    def limits_of(self, partition: str | None) -> Limits:
        """Return the limits that hold in a partition: its own where it has some, else the site's."""
        own = self.partitions.get(partition or "", Limits())
        set_here = {f.name: getattr(own, f.name) for f in fields(Limits) if getattr(own, f.name) is not None}
        return replace(self.limits, **set_here)


def known() -> dict[str, Path]:
    """Return the path of each site by name; a person's own file hides a built-in one of the same name."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    folders = (BUILT_IN, config / "hpcml" / "sites")
    return {path.stem: path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.toml"))}


def load(name: str, origin: str = "--site") -> Site:
    """Return a site by name, or by the path of its TOML file.

    Raises:
        HpcmlError: no such site, or a file with problems, all of them listed.
    """
    sites = known()
    path = Path(name) if name.endswith(".toml") else sites.get(name)
    if path is None or not os.path.isfile(path):
        raise HpcmlError(
            f"unknown site {name!r}",
            origin=origin,
            allowed=f"{', '.join(sites)}, or the path of a site's .toml",
            fix=nearest(name, sites) or "hpcml site list shows them; hpcml site detect writes one",
        )
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HpcmlError(
            f"not valid TOML: {error}", origin=str(path), fix="hpcml site show generic shows a site's file"
        ) from None
    # A site given by its file goes by its path, so that the node and later commands find it again.
    return _from_tree(path, tree, path.stem if path in sites.values() else str(path.absolute()))


def choose(name: str | None = None, cluster_name: str | None = None) -> tuple[Site, str]:
    """Return the site that applies here and the reason.

    Args:
        name: the value of ``--site``; wins over ``$HPCML_SITE``, then the site whose ``cluster_names`` holds
            ``cluster_name``, then ``generic`` where sbatch is on PATH, else ``local``.
        cluster_name: Slurm's ClusterName where it is known.
    """
    if name:
        return load(name), "--site"
    if os.environ.get("HPCML_SITE"):
        return load(os.environ["HPCML_SITE"], "$HPCML_SITE"), "$HPCML_SITE"
    if cluster_name:
        for path in known().values():
            site = load(str(path))
            if cluster_name in site.cluster_names:
                return site, f"ClusterName is {cluster_name}"
    if shutil.which("sbatch"):
        return load("generic"), "sbatch is on PATH"
    return load("local"), "no sbatch on PATH"


def expand(text: str, origin: str, project: Path) -> str:
    """Return a site's folder or address with its environment variables filled in.

    Raises:
        HpcmlError: a variable is not set.
    """
    variables = {"HPCML_PROJECT": str(project), **os.environ}
    variables["HPCML_PROJECT"] = str(project)
    missing = [name for name in re.findall(r"\$\{?(\w+)\}?", text) if not variables.get(name)]
    if missing:
        names = ", ".join(f"${name}" for name in missing)
        raise HpcmlError(
            f"{text!r} needs {names}, which is not set", origin=origin, fix="set it, or choose another site"
        )
    return re.sub(r"\$\{?(\w+)\}?", lambda match: variables[match[1]], text)


def data_root(site: Site, project: Path) -> Path:
    """Return the folder of data sets and weights: ``$HPCML_DATA``, else the site's."""
    if os.environ.get("HPCML_DATA"):
        return Path(os.environ["HPCML_DATA"]).expanduser().absolute()
    return Path(expand(site.data, f"site {site.name}: data", project))


def _from_tree(path: Path, tree: Mapping[str, Any], name: str) -> Site:
    problems: list[Problem] = []
    top = {f.name for f in fields(Site)} - {"name", "path"}
    _unknown(problems, tree, top, path, "")
    values: dict[str, Any] = {"name": name, "path": path}
    for key in top & set(tree) - {"limits", "partitions"}:
        want: type = type(getattr(Site("x"), key)) if key != "mem_gb_per_gpu" else int
        value = tuple(tree[key]) if want is tuple and isinstance(tree[key], list) else tree[key]
        if not _fits(value, want):
            allowed = {tuple: "a list of strings", int: "a whole number from 1", str: "a string"}[want]
            problems.append(Problem(f"{key} = {tree[key]!r} has the wrong type", str(path), allowed))
        else:
            values[key] = value
    if tree.get("scheduler", "slurm") not in SCHEDULERS:
        problems.append(Problem(f"scheduler = {tree['scheduler']!r}", str(path), ", ".join(SCHEDULERS)))
    if values.get("delivery", "auto") not in DELIVERIES:
        problems.append(Problem(f"delivery = {tree['delivery']!r}", str(path), ", ".join(DELIVERIES)))
    if "{count}" not in values.get("gpu_request", "{count}"):
        what = f"gpu_request = {tree['gpu_request']!r} does not say how many GPUs"
        problems.append(Problem(what, str(path), '"gpu:{count}", or with a type "gpu:a100:{count}"'))
    values["limits"] = _limits(problems, tree.get("limits", {}), path, "limits.")
    partitions = tree.get("partitions", {})
    if not isinstance(partitions, dict):
        problems.append(Problem(f"partitions = {partitions!r} is not a table", str(path), "[partitions.NAME]"))
        partitions = {}
    values["partitions"] = {
        name: _limits(problems, table, path, f"partitions.{name}.") for name, table in partitions.items()
    }
    if problems:
        raise HpcmlError(problems)
    return Site(**values)


def _fits(value: Any, want: type) -> bool:
    if not isinstance(value, want) or isinstance(value, bool):
        return False
    if isinstance(value, tuple):
        return all(isinstance(item, str) for item in value)
    return not isinstance(value, int) or value >= 1


def _limits(problems: list[Problem], table: Any, path: Path, prefix: str) -> Limits:
    if not isinstance(table, dict):
        problems.append(Problem(f"{prefix[:-1]} = {table!r} is not a table", str(path)))
        return Limits()
    _unknown(problems, table, {f.name for f in fields(Limits)}, path, prefix)
    values: dict[str, Any] = {}
    for f in fields(Limits):
        value = table.get(f.name)
        if value is None:
            continue
        if f.name == "max_time":
            try:
                seconds(value if isinstance(value, str) else "")
            except ValueError:
                problems.append(Problem(f"{prefix}max_time = {value!r} is not a time limit", str(path), '"1-00:00:00"'))
                continue
        elif not isinstance(value, int) or isinstance(value, bool) or value < 0:
            problems.append(Problem(f"{prefix}{f.name} = {value!r} is not a whole number", str(path)))
            continue
        values[f.name] = value
    return Limits(**values)


def _unknown(problems: list[Problem], tree: Mapping[str, Any], names: Iterable[str], path: Path, prefix: str) -> None:
    names = sorted(names)
    problems += [
        Problem(f"unknown key {prefix + key!r}", str(path), ", ".join(names), nearest(key, names))
        for key in tree
        if key not in names
    ]
