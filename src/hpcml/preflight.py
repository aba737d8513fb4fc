"""Looks before anything is queued: a job's preflight, the machine's health, a site's description from sinfo."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import rundir
from . import site as sites
from .errors import HpcmlError, ServiceSilent
from .facts import count_gpus, has_queue_here
from .filesystem import PARALLEL, file_system
from .interpreter import python_of
from .job import clock, project_of
from .launch import sbatch
from .launch.prepare import Prepared, remedy
from .plan import Plan
from .slurm import commands, text

# Executed notebooks, logs and checkpoints of a run need some room.
LEAST_FREE_GB = 1
_PROBE = (
    "import importlib.util as u, json, sys; "
    "print(json.dumps({'version': sys.version.split()[0], 'missing': [n for n in sys.argv[1:] if not u.find_spec(n)]}))"
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``verdict`` is good, bad, silent (a service gives no answer) or note."""

    topic: str
    verdict: str
    text: str
    fix: str = ""


def check(ready: Prepared) -> list[Finding]:
    """Look at everything that a job depends on; the plan's own limits have been checked when it was resolved."""
    plan, site = ready.plan, ready.site
    found = [
        Finding("site", "good", f"{site.name} ({ready.why})"),
        Finding("request", "good", _request(plan)),
        *(Finding("note", "note", note) for note in plan.notes),
        Finding(
            "work", "good", f"{plan.work} {' '.join(plan.target)}" + (f" · {plan.strategy}" if plan.strategy else "")
        ),
    ]
    if site.scheduler == "slurm":
        found.append(_start_estimate(ready))
    found += _folders(site, Path(plan.project))
    if plan.data.source:
        found.append(_data(plan))
    needed = ["hpcml", *(["papermill", "ipykernel"] if plan.work == "notebook" else [])]
    return [*found, _environment(plan, [*needed, *plan.frameworks])]


def doctor(site_name: str | None) -> list[Finding]:
    """Look at this machine: Slurm, Python, packages, folders, GPUs, and where MLflow's data goes."""
    found = [Finding("python", "good", f"{sys.version.split()[0]} at {sys.executable}")]
    try:
        site, why = sites.choose(site_name, None if site_name else commands.cluster_name())
    except HpcmlError as error:
        return [*found, Finding("site", "bad", str(error.problems[0]), error.problems[0].fix)]
    found.append(Finding("site", "good", f"{site.name} ({why})"))
    found.append(_queue_health(site))
    found += [_package(name) for name in _PACKAGES]
    gpus = count_gpus()
    seen = (
        f"{gpus} NVIDIA GPUs on this machine" if gpus else "no NVIDIA GPU on this machine: virtual CPU devices stand in"
    )
    found.append(Finding("gpu", "note", seen))
    project = project_of(Path.cwd() / "job.toml")
    return [*found, _git(project), *_folders(site, project)]


def detect(cluster_name: str, partitions: Sequence[text.Partition]) -> str:
    """Return a site's TOML for a cluster from what sinfo tells of its partitions."""
    kinds = sorted({p.gpu_type for p in partitions if p.gpu_type})
    request = f"gpu:{kinds[0]}:{{count}}" if len(kinds) == 1 else "gpu:{count}"
    with_gpus = [p for p in partitions if p.gpus_per_node]
    share = min((p.cores_per_node // p.gpus_per_node for p in with_gpus), default=8)
    lines = [
        f"# {cluster_name}, from what sinfo told; folders and modules are yours to set.",
        f'description   = "{cluster_name}"',
        'scheduler     = "slurm"',
        f'cluster_names = ["{cluster_name}"]',
        f'gpu_request   = "{request}"' + (f"     # kinds here: {', '.join(kinds)}" if kinds else ""),
        f"cores_per_gpu = {share}",
        'runs          = "$HPCML_PROJECT/runs"',
        'data          = "$HPCML_PROJECT/data"',
        'envs          = "$HOME/envs"',
        'tracking      = "sqlite:///$HPCML_PROJECT/runs/mlflow.db"',
    ]
    for p in partitions:
        lines += ["", f"[partitions.{json.dumps(p.name)}]" + ("     # the default" if p.is_default else "")]
        lines += [f"nodes           = {p.nodes}", f"cores_per_node  = {p.cores_per_node}"]
        lines += [f"gpus_per_node   = {p.gpus_per_node}", f"mem_gb_per_node = {p.mem_gb_per_node}"]
        lines += [f'max_time        = "{p.max_time}"'] if p.max_time else []
    return "\n".join(lines) + "\n"


_PACKAGES = ("tensorflow", "tf_keras", "torch", "papermill", "mlflow", "mlxtend")


def _package(name: str) -> Finding:
    from importlib import metadata
    from importlib.util import find_spec

    if find_spec(name) is None:
        return Finding(name, "note", "not installed", remedy([name]))
    with contextlib.suppress(metadata.PackageNotFoundError):
        return Finding(name, "good", metadata.version(name))
    return Finding(name, "good", "installed")


def _queue_health(site: sites.Site) -> Finding:
    if not shutil.which("sbatch"):
        return Finding(
            "slurm", "note", "no sbatch on PATH: jobs run on this machine", "scripts/devcluster up gives a real one"
        )
    try:
        names = [p.name + ("*" if p.is_default else "") for p in commands.partitions()]
    except ServiceSilent as error:
        verdict = "silent" if site.scheduler == "slurm" else "note"
        return Finding("slurm", verdict, str(error.problems[0].what), error.problems[0].fix)
    except HpcmlError as error:
        return Finding("slurm", "bad", str(error.problems[0].what), error.problems[0].fix)
    return Finding("slurm", "good", f"cluster {commands.cluster_name()}, partitions {', '.join(names)}")


def _git(project: Path) -> Finding:
    """What a snapshot of the project will hold: without git it is a copy of the whole folder."""
    if not shutil.which("git"):
        return Finding("git", "bad", "git is not on PATH: snapshots copy the whole folder", "install git")
    words = ["git", "-C", str(project), "rev-parse", "--is-inside-work-tree"]
    try:
        english = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False, env=english)
    except (OSError, subprocess.TimeoutExpired):
        return Finding("git", "bad", f"git gives no answer in {project}", "see what git status says there")
    if done.returncode == 0 and done.stdout.strip() == "true":
        return Finding("git", "good", "snapshots hold what git tracks and uncommitted edits")
    if "not a git repository" not in done.stderr and done.returncode:  # such as "dubious ownership"
        words_of_git = (done.stderr.strip().splitlines() or ["it failed"])[0]
        return Finding("git", "bad", f"{project}: {words_of_git}", "see what git status says there")
    return Finding("git", "note", f"{project} is no git repository: snapshots copy the whole folder", "git init there")


def _request(plan: Plan) -> str:
    gpus = f", {plan.gpus_per_node} GPUs" if plan.gpus_per_node else ""
    memory = f", {plan.mem_gb} GiB" if plan.mem_gb else ""
    tasks = f"{plan.tasks_per_node} task{'s' * (plan.tasks_per_node > 1)} × {plan.cpus_per_task} cores"
    nodes = f"{plan.nodes} node{'s' * (plan.nodes > 1)}"
    return f"{nodes}, each {tasks}{gpus}{memory}; {clock(plan.time_s)}: within the limits"


def _start_estimate(ready: Prepared) -> Finding:
    if not has_queue_here(ready.site):
        return Finding("queue", "note", f"no start estimate: this machine has no queue of site {ready.site.name}")
    script = sbatch.render(ready.plan, ready.site, ready.overrides)
    try:
        accepted, words = commands.test_only(script, Path(ready.plan.project))
    except ServiceSilent as error:
        return Finding("queue", "silent", error.problems[0].what, error.problems[0].fix)
    if not accepted:
        return Finding(
            "queue", "bad", f"sbatch --test-only refuses it: {words}", "change the request; sinfo shows the nodes"
        )
    start = text.test_only_estimate(words)
    return Finding("queue", "good", f"would start at {start} as things are now" if start else words)


def _folders(site: sites.Site, project: Path) -> Iterator[Finding]:
    try:
        root = rundir.runs_root(site, project)
    except HpcmlError as error:
        yield Finding("runs", "bad", error.problems[0].what, error.problems[0].fix)
        return
    existing = next(p for p in (root, *root.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Finding("runs", "bad", f"{root} can't be written to", "set HPCML_RUNS to a folder of yours")
        return
    free_gb = shutil.disk_usage(existing).free / 2**30
    kind = file_system(existing)
    verdict, fix = (
        ("good", "") if free_gb >= LEAST_FREE_GB else ("bad", "free space, or set HPCML_RUNS to another folder")
    )
    yield Finding("runs", verdict, f"{root}: {kind}, {free_gb:.0f} GiB free", fix)
    try:
        store = os.environ.get("MLFLOW_TRACKING_URI") or sites.expand(
            site.tracking, f"site {site.name}: tracking", project
        )
    except HpcmlError as error:
        yield Finding("mlflow", "bad", error.problems[0].what, error.problems[0].fix)
        return
    if store.startswith("sqlite:///"):
        folder = next(p for p in Path(store.removeprefix("sqlite:///")).parents if p.exists())
        if (kind := file_system(folder)) in PARALLEL:
            yield Finding(
                "mlflow", "bad", f"{store} lies on {kind}, where SQLite's locks are not safe", "set MLFLOW_TRACKING_URI"
            )
            return
    from .tracking.store import parse

    yield Finding("mlflow", "good", f"metrics go to {parse(store).shown}")


def _data(plan: Plan) -> Finding:
    """Where the job's data set is; a version that isn't there yet is pulled by ``hpcml submit`` and ``hpcml run``."""
    from .data.versions import jobs

    try:
        if not plan.data.version:
            return Finding("data", "good", f"{plan.data} at {jobs.unversioned(plan)}")
        pointer, folder, held = jobs.is_there(plan)
    except HpcmlError as error:
        return Finding("data", "bad", error.problems[0].what, error.problems[0].fix or error.problems[0].allowed)
    what = f"{plan.data} ({pointer.short}), {pointer.files:,} files"
    if held:
        return Finding("data", "good", f"{what} at {folder}")
    return Finding("data", "note", f"{what}: not here yet; submit and run pull it", jobs.command(plan))


def _environment(plan: Plan, needed: list[str]) -> Finding:
    """Ask the job's Python for the modules that the job needs."""
    python = python_of(plan)
    fix = "set HPCML_PYTHON or [env] in the job file, or make .venv: scripts/setup"
    try:
        done = subprocess.run([python, "-c", _PROBE, *needed], capture_output=True, text=True, timeout=60, check=False)
        told = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return Finding("environment", "bad", f"{python} is no Python that starts", fix)
    if told["missing"]:
        missing = ", ".join(told["missing"])
        return Finding("environment", "bad", f"{python} lacks {missing}", remedy(told["missing"]))
    return Finding("environment", "good", f"Python {told['version']} at {python} has {', '.join(needed)}")
