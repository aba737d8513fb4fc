"""Where a run comes from: the code in git's terms, the environment's packages and lock, data versions, the node.

Collected on the person's side when a run is made, in milliseconds and without starting the work's Python: installed
packages are read from the names of the metadata folders in its site-packages (PEP 376, "The .dist-info directory").
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..interpreter import python_of
from ..plan import Plan
from ..rundir import RunDir, read_json, write_bytes, write_json
from .revision import Revision, ask

# What people compare runs by; packages.txt has all of them.
NOTABLE = (
    *("tensorflow", "tf-keras", "keras", "torch", "horovod", "numpy", "mlflow", "hpcml"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu13"),
)
_METADATA = re.compile(r"(?P<name>[^-]+)-(?P<version>[^-]+)(?:-py\d[\d.]*)?\.(?:dist|egg)-info$")
_PIN = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?\s*==\s*(?P<version>[^\s;\\,]+)(?P<marker>\s*;)?", re.M)
_LOCKED = re.compile(r'^\[\[packages?\]\]\s*\nname = "(?P<name>[^"]+)"\s*\nversion = "(?P<version>[^"]+)"', re.M)
# Slurm's output environment variables (sbatch(1), srun(1)) that say where a rank ran.
_SLURM = (
    *("CLUSTER_NAME", "JOB_ID", "STEP_ID", "PROCID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT"),
    *("JOB_PARTITION", "JOB_ACCOUNT", "JOB_QOS", "JOB_NODELIST", "JOB_RESERVATION"),
)


@dataclass(frozen=True)
class Provenance:
    """What a run was made from.

    Attributes:
        code: the checkout; its patch is kept in a file of its own.
        python: the interpreter of the work; empty where none is known yet.
        python_version: as far as its environment tells: ``3.11.2``, or ``3.11``.
        packages: installed distribution → version, normalised names (PEP 503).
        lock: SHA-256 of the lock file, else of the sorted ``name==version`` lines of what is installed.
        lock_file: the lock file, relative to the project where it lies in it; empty where none fits what is installed.
        data: file that a DVC pointer stands for → its hash.
    """

    code: Revision
    python: str
    python_version: str
    packages: Mapping[str, str]
    lock: str
    lock_file: str
    data: Mapping[str, str]


def collect(project: Path, python: str | None = None, code: Callable[[], Revision] | None = None) -> Provenance:
    """Return where a run of this project comes from; never raises for what it can't read.

    Args:
        project: the project's folder, in a git checkout or not.
        python: the interpreter that runs the work; by default the one that runs this.
        code: from ``revision.ask``, where git was asked before.
    """
    code = code or ask(project)
    packages = installed(python)
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(packages.items()))
    found = lock_of(project, _prefix(python), packages)
    lock = hashlib.sha256(found.read_bytes() if found else lines.encode()).hexdigest() if found or packages else ""
    name = "" if found is None else str(found.relative_to(project) if project in found.parents else found)
    return Provenance(code(), python or sys.executable, _version(python), packages, lock, name, _data(project))


def write(run: RunDir, found: Provenance) -> None:
    """Leave ``provenance.json``, ``packages.txt`` and, with edits, ``code.patch`` in a run directory."""
    code = {f.name: getattr(found.code, f.name) for f in dataclasses.fields(found.code) if f.name != "patch"}
    rest = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name not in ("code", "packages")}
    notable = {name: found.packages[name] for name in NOTABLE if name in found.packages}
    write_json(run.provenance, {"code": code, **rest, "packages": notable, "installed": len(found.packages)})
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(found.packages.items()))
    write_bytes(run.packages, lines.encode("utf-8", "surrogateescape"))
    if found.code.patch:
        write_bytes(run.patch, found.code.patch)


def begin(run: RunDir, plan: Plan) -> Callable[[], None]:
    """Let git work on its part and return what collects and writes it all.

    A run is never kept from starting by what can't be found out.
    """
    project = Path(plan.project)
    code: Callable[[], Revision] | None = None
    with contextlib.suppress(OSError):  # asked again below, and said
        code = ask(project)

    def record() -> None:
        try:
            write(run, collect(project, shutil.which(python_of(plan)) or python_of(plan), code))
        except Exception as error:
            print(f"hpcml: warning: provenance is not recorded: {error}", file=sys.stderr)

    return record


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


def installed(python: str | None = None) -> dict[str, str]:
    """Return the distributions of an environment, name → version; the first on its path wins, as for imports."""
    found: dict[str, str] = {}
    for folder in _folders(python):
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        for name in sorted(names):
            if match := _METADATA.match(name):
                found.setdefault(_normal(match["name"]), match["version"])
    return found


def lock_of(project: Path, prefix: Path, packages: Mapping[str, str]) -> Path | None:
    """Return the lock file that this environment was made from: the largest one that says what is installed.

    A lock fits where no version that it pins is installed in another, and all of its unconditional pins are there.
    """
    places = [prefix / name for name in ("environment.lock", "pylock.toml", "requirements.txt")]
    places += [project / name for name in ("uv.lock", "pylock.toml", "environment.lock", "requirements.txt")]
    best: tuple[int, Path | None] = (0, None)
    for path in (*places, *sorted(project.glob("envs/*/requirements.txt"))):
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        except OSError:
            continue
        agreeing = _agreeing(text, packages)
        if agreeing > best[0]:
            best = (agreeing, path)
    return best[1]


def _agreeing(text: str, packages: Mapping[str, str]) -> int:
    """How many pins of a lock are installed so; 0 where one contradicts what is installed."""
    pins: dict[str, tuple[set[str], bool]] = {}
    lines = "\n".join(line for line in text.split("\n") if line[:1].isalnum())  # most of a lock is hashes
    locked = _LOCKED.finditer(text) if "[[package" in text else ()
    for match in (*_PIN.finditer(lines), *locked):
        versions, needed = pins.setdefault(_normal(match["name"]), (set(), match.re is _PIN and not match["marker"]))
        versions.add(match["version"])
        pins[_normal(match["name"])] = versions, needed and match.re is _PIN and not match["marker"]
    for name, (versions, needed) in pins.items():
        if packages.get(name, None if needed else next(iter(versions))) not in versions:
            return 0
    return sum(name in packages for name in pins)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _prefix(python: str | None) -> Path:
    # Not resolved: an environment's python is a link to the one that it was made with.
    return Path(sys.prefix) if python is None else Path(os.path.abspath(python)).parent.parent


def _folders(python: str | None) -> Iterator[str]:
    """Yield where an interpreter finds packages: its own path where it is this one, else by the usual layout."""
    prefix = _prefix(python)
    if python is None or prefix == Path(sys.prefix):
        yield from (folder for folder in sys.path if folder)
        return
    for lib in ("lib", "lib64"):
        yield from map(str, sorted((prefix / lib).glob("python3*/*-packages")))
    settings = _pyvenv(prefix)
    if settings.get("include-system-site-packages") == "true" and settings.get("home"):
        base = Path(settings["home"]).parent
        yield from map(str, sorted(base.glob("lib/python3*/*-packages")))


def _version(python: str | None) -> str:
    prefix = _prefix(python)
    if python is None or prefix == Path(sys.prefix):
        return sys.version.split()[0]
    settings = _pyvenv(prefix)
    libraries = (path.name.removeprefix("python") for path in sorted(prefix.glob("lib/python3.*")))
    return settings.get("version") or settings.get("version_info") or next(libraries, "")


def _pyvenv(prefix: Path) -> dict[str, str]:
    try:
        lines = (prefix / "pyvenv.cfg").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def _data(project: Path) -> dict[str, str]:
    """Return the data that DVC pointers of a project name (dvc.org, ".dvc files"), at its top and one level below."""
    found: dict[str, str] = {}
    for pointer in sorted((*project.glob("*.dvc"), *project.glob("[!.]*/*.dvc"))):
        if pointer.is_file():
            out = pointer.relative_to(project).with_suffix("")
            hashed = _first(pointer, r"^\s*-?\s*((?:md5|etag):\s*\S+)")
            found |= {str(out): hashed.replace(" ", "")} if hashed else {}
    return found


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
