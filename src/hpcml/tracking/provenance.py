"""Where a run comes from: the code in git's terms, data versions, the environment's packages and lock, the node.

Code and data are asked for on the person's side when a run is made, in milliseconds; the environment is what the work's
own Python finds when the run starts.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..plan import Plan
from ..rundir import RunDir, read_json, write_bytes, write_json
from .revision import Revision, ask

# What people compare runs by; packages.txt has all of them.
NOTABLE = (
    *("tensorflow", "tf-keras", "keras", "torch", "horovod", "numpy", "mlflow", "hpcml"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu13"),
)
# Slurm's output environment variables (sbatch(1), srun(1)) that say where a rank ran.
_SLURM = (
    *("CLUSTER_NAME", "JOB_ID", "STEP_ID", "PROCID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT"),
    *("JOB_PARTITION", "JOB_ACCOUNT", "JOB_QOS", "JOB_NODELIST", "JOB_RESERVATION"),
)


def begin(run: RunDir, plan: Plan) -> Callable[[], None]:
    """Let git work on its part and return what writes code and data versions into the run directory.

    ``provenance.json`` and, with edits, ``code.patch``. A run is never kept from starting by what can't be found out.
    """
    project = Path(plan.project)
    code: Callable[[], Revision] | None = None
    with contextlib.suppress(OSError):  # asked again below, and said
        code = ask(project)

    def record() -> None:
        try:
            found = (code or ask(project))()
            told = {name: value for name, value in vars(found).items() if name != "patch"}
            write_json(run.provenance, {"code": told, "data": _data(plan, project)})
            if found.patch:
                write_bytes(run.patch, found.patch)
        except Exception as error:
            _warn(error)

    return record


def complete(run: RunDir, project: Path) -> None:
    """Add this interpreter's environment, and leave ``packages.txt``: by one process of a run, as it starts.

    Args:
        project: where lock files lie.
    """
    from . import installed

    try:
        found = installed.look(project)
        notable = {name: found.packages[name] for name in NOTABLE if name in found.packages}
        own = {**vars(found), "packages": notable, "installed": len(found.packages)}
        write_json(run.provenance, {**read_json(run.provenance), **own})
        write_bytes(run.packages, installed.lines(found.packages).encode("utf-8", "surrogateescape"))
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    print(f"hpcml: warning: provenance is not recorded: {error}", file=sys.stderr)


def params(run: RunDir) -> dict[str, str]:
    """Return a run's provenance as params of a tracking server: flat, text, without what is empty."""
    kept = read_json(run.provenance)
    code, packages, data = (
        kept[key] if isinstance(kept.get(key), dict) else {} for key in ("code", "packages", "data")
    )
    left_out = code.get("left_out")
    flat = {
        **{f"git.{key}": code.get(key) for key in ("revision", "branch", "remote", "note")},
        "git.dirty": str(code["dirty"]).lower() if code.get("revision") else "",
        "git.left_out": "; ".join(map(str, left_out if isinstance(left_out, list) else ())),
        "env.python": kept.get("python_version"),
        "env.lock": kept.get("lock"),
        "env.lock_file": kept.get("lock_file") or ("installed packages" if kept.get("lock") else ""),
        **{f"env.{name}": version for name, version in packages.items()},
        **{f"data.{name}": version for name, version in data.items()},
    }
    return {name: str(value) for name, value in flat.items() if value}


def node_facts(environment: Mapping[str, str], gpus: Sequence[str] = ()) -> dict[str, str]:
    """Return what a rank can tell of its node, without a framework: Slurm's ids, kernel, processor, driver, GPUs.

    Args:
        environment: the rank's own.
        gpus: its devices as ``CUDA_VISIBLE_DEVICES`` names them: indices, or UUIDs.
    """
    slurm = {f"slurm.{name.lower()}": environment.get(f"SLURM_{name}", "") for name in _SLURM}
    machine = os.uname()
    facts = {
        "node": machine.nodename,
        "node.kernel": f"{machine.sysname} {machine.release}",
        "node.cpu": _first(Path("/proc/cpuinfo"), r"^(?:model name|Model)\s*:\s*(.+)$"),
        "node.gpu_driver": _first(Path("/proc/driver/nvidia/version"), r"Module(?: for \S+)?\s+([\d.]+)"),
        **slurm,
    }
    for place, gpu in enumerate(_chosen(_gpus(), environment, gpus)):
        facts |= {f"gpu.{place}.name": gpu["name"], f"gpu.{place}.uuid": gpu["uuid"]}
    return {name: value for name, value in facts.items() if value}


def data_versions(project: Path) -> dict[str, str]:
    """Return the data that DVC pointers of a project name (dvc.org, ".dvc files"), at its top and one level below."""
    found: dict[str, str] = {}
    for pointer in sorted((*project.glob("*.dvc"), *project.glob("[!.]*/*.dvc"))):
        if pointer.is_file():
            out = pointer.relative_to(project).with_suffix("")
            hashed = _first(pointer, r"^\s*-?\s*((?:md5|etag):\s*\S+)")
            found |= {str(out): hashed.replace(" ", "")} if hashed else {}
    return found


def _data(plan: Plan, project: Path) -> dict[str, str]:
    """Data sets with DVC's hashes: of those in the work tree, but of the job's own that of the version it asks for."""
    found = data_versions(project)
    if not plan.data.version:
        return found
    name = os.path.basename(os.path.normpath(str(plan.data.source)))
    others = {path: digest for path, digest in found.items() if os.path.basename(path) != name}
    return {"version": plan.data.version, name: f"md5:{plan.data_digest}.dir" if plan.data_digest else "", **others}


def _gpus() -> list[dict[str, str]]:
    """The node's GPUs as the driver's files tell, by index: free of NVML, which may be missing (NVIDIA driver README)."""
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        text = {"name": r"^Model:\s*(.+)$", "uuid": r"^GPU UUID:\s*(\S+)", "minor": r"^Device Minor:\s*(\d+)"}
        found.append({key: _first(path, pattern) for key, pattern in text.items()})
    return found


def _chosen(
    all_gpus: list[dict[str, str]], environment: Mapping[str, str], gpus: Sequence[str]
) -> list[dict[str, str]]:
    """Return the GPUs that a rank was given, where that is certain; none where it is not.

    Under cgroup constraints index 0 is another device in every task, so that an index alone says nothing in a job;
    Slurm's list of the step's devices does, where the rank has all of them.
    """
    if all(name.startswith("GPU-") for name in gpus):
        return [gpu for gpu in all_gpus if any(gpu["uuid"].startswith(name) for name in gpus)]
    wanted = list(gpus)
    if environment.get("SLURM_JOB_ID"):
        listed = environment.get("SLURM_STEP_GPUS") or environment.get("SLURM_JOB_GPUS") or ""
        wanted = [name for name in listed.split(",") if name]
        if len(wanted) != len(gpus) and len(gpus) != len(all_gpus):
            return []
    elif len({gpu["name"] for gpu in all_gpus}) > 1 and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return []  # CUDA numbers the fastest first (CUDA C++ Programming Guide, "CUDA Environment Variables")
    return all_gpus if len(gpus) == len(all_gpus) else [gpu for gpu in all_gpus if gpu["minor"] in wanted]


def _first(path: Path, pattern: str) -> str:
    try:
        match = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        return ""
    return match[1].strip() if match else ""
