"""A run directory: the name of every file of a run, and atomic, private writes.

Nobody else spells these names. A run's id is its path below the runs folder; a comparison's variants lie one level
below their parent (``<parent>/<variant>``).
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import HpcmlError, nearest
from .site import Site, expand

_TELLING = 3  # letters of an id that are enough to tell what is meant
_LOG_END = 64 * 1024  # of a log, in bytes, that its last lines are looked for in


@dataclass(frozen=True)
class RunDir:
    """The files of one run, below ``root / id``."""

    root: Path
    id: str

    @property
    def path(self) -> Path:
        """The directory itself."""
        return self.root / self.id

    @property
    def plan(self) -> Path:
        """Values with origins, as submitted."""
        return self.path / "plan.json"

    @property
    def script(self) -> Path:
        """The batch script, as submitted."""
        return self.path / "job.sbatch"

    @property
    def submitted(self) -> Path:
        """Slurm's job id and the time of submission."""
        return self.path / "submitted.json"

    @property
    def owner(self) -> Path:
        """The process that a run outside Slurm belongs to."""
        return self.path / "owner.json"

    @property
    def code(self) -> Path:
        """The snapshot of the project that the work runs in."""
        return self.path / "code"

    @property
    def archive(self) -> Path:
        """The snapshot's files while the job waits; it unpacks them into ``code``."""
        return self.path / "code.tar"

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs."""
        return self.path / "logs"

    @property
    def events(self) -> Path:
        """Folder of the journal's files."""
        return self.path / "events"

    @property
    def functions(self) -> Path:
        """Folder that submitit keeps a function's pickles and logs in."""
        return self.path / "functions"

    @property
    def checkpoints(self) -> Path:
        """Folder for checkpoints."""
        return self.path / "checkpoints"

    @property
    def lease(self) -> Path:
        """Which execution of the run trains and keeps checkpoints: it looks for the stop file by itself."""
        return self.checkpoints / "lease.json"

    @property
    def profile(self) -> Path:
        """Folder of the profiler's files."""
        return self.path / "profile"

    @property
    def model(self) -> Path:
        """Folder of the trained model, in MLflow's format."""
        return self.path / "model"

    @property
    def artifacts(self) -> Path:
        """Folder for other files that the work wants to keep."""
        return self.path / "artifacts"

    @property
    def plots(self) -> Path:
        """Folder of the report's plots."""
        return self.path / "plots"

    @property
    def report(self) -> Path:
        """The report, one self-contained page."""
        return self.path / "report.html"

    @property
    def provenance(self) -> Path:
        """Where code, environment and data came from."""
        return self.path / "provenance.json"

    @property
    def patch(self) -> Path:
        """The uncommitted edits of the code."""
        return self.path / "code.patch"

    @property
    def packages(self) -> Path:
        """Name and version of every package in the environment."""
        return self.path / "packages.txt"

    @property
    def stop(self) -> Path:
        """Present once a signal asked the run to stop; holds the signal's name and time."""
        return self.path / "stop"

    @property
    def stalled(self) -> Path:
        """Which execution of the run made no step any more, and who noticed."""
        return self.path / "stalled.json"

    @property
    def delivered(self) -> Path:
        """What MLflow has of this run."""
        return self.path / "delivered.json"

    @property
    def status(self) -> Path:
        """The end marker: written last, atomically."""
        return self.path / "status.json"

    @property
    def comparison(self) -> Path:
        """A comparison's table as JSON; only a parent has it."""
        return self.path / "comparison.json"

    @property
    def plot(self) -> Path:
        """A comparison's plot; only a parent has it."""
        return self.path / "comparison.png"

    def log(self, rank: int) -> Path:
        """One rank's output, line-buffered and live."""
        return self.logs / f"out.{rank}.txt"

    def event_file(self, rank: int, restart: int, writer: str) -> Path:
        """The append-only file of one writer: ``rank``, ``engine``, …"""
        return self.events / f"{rank}.{restart}.{writer}.jsonl"

    def status_of(self, rank: int) -> Path:
        """One worker's own marker."""
        return self.path / f"status.{rank}.json"

    def stalled_of(self, rank: int) -> Path:
        """Where one rank stood when the training was found to stall."""
        return self.path / f"stalled.{rank}.json"

    def error_of(self, rank: int) -> Path:
        """The exception that ended a rank's function: its type, message and traceback."""
        return self.path / f"error.{rank}.json"

    def notebook(self, rank: int) -> Path:
        """The executed notebook; rank 0 has the first name."""
        return self.path / ("notebook.ipynb" if rank == 0 else f"notebook.{rank}.ipynb")

    def child(self, name: str) -> "RunDir":
        """The run directory of one variant of a comparison."""
        return RunDir(self.root, f"{self.id}/{name}")

    def make(self) -> "RunDir":
        """Create the directory and its folders, private to the user; what is there stays."""
        for folder in (self.path, self.logs, self.events):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self


# The fixed names in a run directory; a comparison's variants lie beside them.
NAMES = frozenset(
    getattr(RunDir(Path(), ""), name).name for name, value in vars(RunDir).items() if isinstance(value, property)
) | {RunDir(Path(), "").notebook(0).name}


def runs_root(site: Site, project: Path) -> Path:
    """Return the runs folder: ``$HPCML_RUNS``, else the site's."""
    if os.environ.get("HPCML_RUNS"):
        return Path(os.environ["HPCML_RUNS"]).absolute()
    return Path(expand(site.runs, f"site {site.name}: runs", project))


def create(root: Path, name: str, stamp: float | None = None) -> RunDir:
    """Make a new run directory named after the time (local) and the job; never one that exists."""
    base = time.strftime("%Y%m%d-%H%M%S", time.localtime(stamp)) + f"-{name}"
    try:
        _make_root(root)
        for count in range(1, 10_000):
            run = RunDir(root, base if count == 1 else f"{base}-{count}")
            try:
                run.path.mkdir(mode=0o700)
            except FileExistsError:
                continue
            return run.make()
    except OSError as error:
        raise unwritable(root, error) from None
    raise HpcmlError(f"{root} holds 10,000 runs of one second named {name}", fix="hpcml runs prune")


def unwritable(root: Path, error: OSError) -> HpcmlError:
    """Return what to tell of a runs folder that takes no run."""
    fix = "set HPCML_RUNS to a folder that you can write to, or free space"
    return HpcmlError(f"no run directory can be made in {root}: {error.strerror or error}", fix=fix)


def restart_of(environment: Mapping[str, str]) -> int:
    """How many times a run was begun before this: resumed by a person, and requeued by Slurm since."""
    return int(environment.get("HPCML_RESUMED") or 0) + int(environment.get("SLURM_RESTART_COUNT") or 0)


def heeds_stop(run: RunDir, restart: int) -> bool:
    """Whether the work of a restart looks for the stop file, saves, and ends by itself."""
    return bool(read_json(run.lease).get("restart") == restart)


def kept_at(run: RunDir) -> tuple[int, int]:
    """Return the restart and the step of a run's newest checkpoint; -1 and 0 where it has none."""
    newest = max(run.checkpoints.glob("step-*/checkpoint.json"), default=None, key=lambda path: path.parent.name)
    told = read_json(newest) if newest else {}
    return told.get("restart", -1), told.get("place", {}).get("step", 0)


def claim(run: RunDir, pid: int | None = None) -> None:
    """Note that a process, by default this one, runs the run, so that others can tell whether it still does."""
    pid = os.getpid() if pid is None else pid
    write_json(run.owner, {"host": os.uname().nodename, "pid": pid, "start": _start_time(pid)})


def owner_is_alive(run: RunDir) -> bool:
    """Return whether the process that claimed a run still runs; one of another machine is taken to."""
    owner = read_json(run.owner)
    if not owner:
        return False
    elsewhere = owner["host"] != os.uname().nodename
    return elsewhere or bool(owner["start"] == _start_time(owner["pid"]))


def is_owned_here(run: RunDir) -> bool:
    """Return whether the process that claimed a run is, or was, one of this machine."""
    return bool(read_json(run.owner).get("host") == os.uname().nodename)


def _start_time(pid: int) -> str:
    """Start time of a process in clock ticks since boot (proc(5)): a pid that was given again has another."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


def started_at(pid: int) -> float:
    """Return when a process started, in seconds since the epoch; the same whoever asks. 0 where it is gone."""
    ticks = _start_time(pid)
    booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    return float(booted.split()[1]) + float(ticks) / os.sysconf("SC_CLK_TCK") if ticks else 0.0


def adopt(root: Path, id: str) -> RunDir:
    """Return the run directory with this id, made by whichever rank comes first."""
    _make_root(root)
    return RunDir(root, id).make()


def _make_root(root: Path) -> None:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (root / ".gitignore").exists():
        (root / ".gitignore").write_text("*\n")  # runs are never part of a project


def every(root: Path) -> Iterator[RunDir]:
    """Yield the runs below a root, the newest first; variants follow their parent."""
    names = sorted((p.name for p in root.iterdir() if p.is_dir()), reverse=True) if root.is_dir() else []
    for name in names:
        run = RunDir(root, name)
        if run.plan.exists():
            yield run
        yield from children(run)


def children(run: RunDir) -> list[RunDir]:
    """Return the runs one level below a run: a comparison's variants, an array's calls."""
    plans = sorted(path for path in run.path.glob("*/plan.json") if path.parent != run.code)
    return [run.child(path.parent.name) for path in plans]


def find(root: Path, reference: str | None) -> RunDir:
    """Return the run meant by a run id, a Slurm job id, or nothing (the newest).

    Raises:
        HpcmlError: no such run; the newest few are named.
    """
    words = reference.rstrip("/").split("/") if reference else []  # completion in a shell adds a slash
    is_id = 0 < len(words) <= 2 and not {"", ".", "..", "code"} & set(words)
    if is_id and os.path.isfile(RunDir(root, "/".join(words)).plan):
        return RunDir(root, "/".join(words))
    ids: list[str] = []
    for run in every(root):
        ids.append(run.id)
        if reference is None and "/" not in run.id:
            return run
        if reference is not None and reference.isdecimal() and slurm_job_id(run) == int(reference):
            return run
    if not ids:
        raise HpcmlError(f"no runs in {root}", fix="start one: hpcml run JOB, hpcml submit JOB")
    fix = "; ".join(filter(None, (_meant(reference or "", ids), "hpcml runs list")))
    raise HpcmlError(f"no run {reference!r} in {root}", allowed=", ".join(ids[:5]), fix=fix)


def _meant(reference: str, ids: Sequence[str]) -> str:
    """Return which run an id cut short or mistyped means: the newest that it begins or that holds it, else the nearest."""
    word = reference.rpartition("/runs/")[2].strip("/")  # a path into the runs folder
    alike = [id for id in ids if id.startswith(word)] or [id for id in ids if word in id]
    if len(word) >= _TELLING and alike:
        return f"did you mean {alike[0]!r}?"
    return nearest(word, ids[:1000])  # the newest: ids are compared letter by letter


def slurm_job_id(run: RunDir) -> int | None:
    """Return the Slurm job that a run belongs to, None where it has none."""
    number = read_json(run.submitted).get("slurm_job_id")
    return number if isinstance(number, int) else None


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty where the file is absent or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, readable by the user alone."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=False, default=str) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its target, then rename it: a reader sees the old or the new, never half."""
    # One name for each writer: mkstemp would do, but its module costs a submit 5 ms.
    temporary = f"{path.parent}/.{path.name}.{os.uname().nodename}.{os.getpid()}.{time.monotonic_ns()}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def last_lines(log: Path, most: int) -> list[str]:
    """Return a log's last lines, read from its end; an unfinished last line counts. None where it can't be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_END))
            lines = file.read().removesuffix(b"\n").split(b"\n")
    except OSError:
        return []
    return [shown(line) for line in lines[-most:]] if lines != [b""] else []


def shown(line: bytes) -> str:
    """Return a line of a log as a terminal shows it at last: a progress bar redraws its own many times."""
    return line.rstrip(b"\r\n").rpartition(b"\r")[2].decode(errors="replace")
