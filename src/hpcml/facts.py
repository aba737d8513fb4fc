"""What must be looked up before a job can be resolved: the machine, the queue, the work's declared parameters."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import HpcmlError
from .job import Job, Scalar
from .site import Site
from .slurm import commands
from .slurm.text import Partition

_CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)
PARAMETERS_TAG = re.compile(r"""tags\s*=\s*\[[^\]]*["']parameters["']""")


@dataclass(frozen=True)
class Declared:
    """The parameters that a notebook or percent script declares in its cell tagged ``parameters``.

    Attributes:
        defaults: each name with its default where that is a literal, else None.
    """

    defaults: Mapping[str, Scalar | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """Facts that a plan depends on; the default knows nothing and so refuses nothing.

    Attributes:
        target_exists: whether the notebook or script is there; None when not looked.
        target_is_folder: whether a folder is there instead.
        declared: None for work that takes ``--key value``.
        partitions: as sinfo tells them.
        cores, mem_gb, gpus: of this machine; only a local run looks. In a rehearsal there are no GPUs.
    """

    target_exists: bool | None = None
    target_is_folder: bool = False
    declared: Declared | None = None
    partitions: tuple[Partition, ...] = ()
    cores: int | None = None
    mem_gb: int | None = None
    gpus: int | None = None


def gather(job: Job, site: Site, *, ask_queue: bool = True) -> Facts:
    """Look up the facts that a job at a site depends on.

    Args:
        ask_queue: whether to ask sinfo; a bare render and a node of the allocation don't.
    """
    target = job.project / job.target[0] if job.work in ("notebook", "script") and job.target else None
    exists = os.path.isfile(target) if target else None
    partitions = tuple(commands.partitions()) if ask_queue and has_queue_here(site) else ()
    local = site.scheduler == "local"
    return Facts(
        target_exists=exists,
        target_is_folder=target is not None and os.path.isdir(target),
        declared=declared_parameters(target) if target and exists else None,
        partitions=partitions,
        cores=len(os.sched_getaffinity(0)) if local else None,
        mem_gb=_memory_gb() if local else None,
        gpus=(0 if os.environ.get("HPCML_DEVICES") == "cpu" else count_gpus()) if local else None,
    )


def has_queue_here(site: Site) -> bool:
    """Return whether the Slurm at hand, if there is one, is this site's: another cluster's limits say nothing of it."""
    if site.scheduler != "slurm" or not shutil.which("sinfo"):
        return False
    return not site.cluster_names or commands.cluster_name() in site.cluster_names


def count_gpus() -> int:
    """Return how many NVIDIA GPUs this process may use: ``CUDA_VISIBLE_DEVICES`` where it is set, else the device files."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdecimal()]
    if visible is not None:
        return min(len([v for v in visible.split(",") if v.strip() and v.strip() != "-1"]), len(devices))
    return len(devices)


def declared_parameters(path: Path) -> Declared | None:
    """Return the parameters that a notebook or percent script declares; None for a plain script.

    Raises:
        HpcmlError: the notebook isn't one, or its parameters cell isn't Python.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise HpcmlError(f"{path} can't be read: {error.strerror}", fix="make it readable") from None
    if path.suffix == ".ipynb":
        cell = _notebook_cell(path, text)
    elif _CELL.search(text):
        cell = _percent_cell(text)
    else:
        return None
    return Declared(_assignments(path, cell))


def _notebook_cell(path: Path, text: str) -> str:
    try:
        notebook = json.loads(text)
        cells = notebook["cells"] if notebook["nbformat"] else []
        tagged = (c for c in cells if "parameters" in c.get("metadata", {}).get("tags", []))
        return next(("".join(c["source"]) for c in tagged), "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise HpcmlError(
            f"{path} is not a notebook", fix="open and save it in JupyterLab, or point to another"
        ) from None


def _percent_cell(text: str) -> str:
    marks = list(_CELL.finditer(text))
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        if PARAMETERS_TAG.search(mark[1]):
            return text[mark.end() : following.start() if following else len(text)]
    return ""


def _assignments(path: Path, cell: str) -> dict[str, Scalar | None]:
    import ast  # only work with a parameters cell needs it

    try:
        body = ast.parse(cell).body
    except (SyntaxError, ValueError, RecursionError) as error:  # NUL characters are a ValueError
        where = f"{error.msg}, line {error.lineno}" if isinstance(error, SyntaxError) else str(error)
        fix = "only assignments such as epochs = 5 belong there"
        raise HpcmlError(f"the parameters cell of {path} is not Python: {where}", fix=fix) from None
    found: dict[str, Scalar | None] = {}
    for node in body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        try:
            value = ast.literal_eval(node.value) if node.value is not None else None
        except (ValueError, TypeError, RecursionError):
            value = None
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                found[target.id] = value if isinstance(value, str | int | float | bool) else None
    return found


def _memory_gb() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
