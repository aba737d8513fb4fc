"""The only file that calls Slurm's commands. Each call has a timeout; its text is read in ``text.py``.

A silent or absent controller is ``ServiceSilent`` (exit 3), a missing command ``HpcmlError`` (exit 2).
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import HpcmlError, ServiceSilent
from . import text

# Clients of Slurm retry for about 9 s when no controller answers; beyond that nothing comes.
TIMEOUT_S = 20
_LEAKS = ("SLURM_", "SBATCH_", "SRUN_", "PMIX_", "PMI_")
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER")
_SILENT = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Connection refused",
    "Zero Bytes were transmitted",
)


def clean_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment without what an enclosing allocation would leak into a new job (SLURM_CPU_BIND, …)."""
    source = os.environ if environment is None else environment
    return {key: value for key, value in source.items() if not key.startswith(_LEAKS) or key in _KEPT}


def cluster_name() -> str | None:
    """Return Slurm's ClusterName: from the variable of a job, else the configuration file, else the controller."""
    if os.environ.get("SLURM_CLUSTER_NAME"):
        return os.environ["SLURM_CLUSTER_NAME"]
    if not shutil.which("sbatch"):
        return None
    path = Path(os.environ.get("SLURM_CONF") or "/etc/slurm/slurm.conf")
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        lines = _call(["scontrol", "show", "config"], check=False).stdout.splitlines()
    for line in lines:
        key, _, value = line.partition("=")
        if key.strip().lower() == "clustername":
            return value.split("#")[0].strip()
    return None


def submit(script: Path, environment: Mapping[str, str], cwd: Path, options: Sequence[str] = ()) -> int:
    """Queue a script with sbatch and return the job's id.

    Raises:
        HpcmlError: sbatch refused it, in Slurm's own words.
    """
    done = _call(
        ["sbatch", "--parsable", "--export=ALL", *options, str(script)], environment=environment, cwd=cwd, check=False
    )
    if done.returncode:
        raise HpcmlError(f"sbatch refused the job: {_words(done)}", fix="hpcml check JOB shows what the site allows")
    # A site's wrapper or plugin may print lines of its own before; the id is the last (sbatch(1), --parsable).
    job_id = (done.stdout.strip().splitlines() or [""])[-1].split(";")[0]
    if not job_id.isdecimal():
        raise HpcmlError(
            f"sbatch took the job but printed no job id: {done.stdout.strip()!r}",
            fix="squeue --me shows whether it is queued; scancel removes it",
        )
    return int(job_id)


def test_only(script: str, cwd: Path) -> tuple[bool, str]:
    """Ask sbatch --test-only about a script; returns whether it could ever start, and Slurm's words."""
    done = _call(["sbatch", "--test-only"], stdin=script, environment=clean_environment(), cwd=cwd, check=False)
    return done.returncode == 0, _words(done)


def partitions() -> list[text.Partition]:
    """Return what sinfo tells of the partitions."""
    # --exact: else nodes that differ are one line with the least of them (sinfo(1), -e).
    return text.partitions(_call(["sinfo", "--noheader", "--exact", f"--format={text.SINFO_FORMAT}"]).stdout)


def job_state(job_id: int | str) -> text.JobState | None:
    """Climb the ladder squeue → scontrol → sacct; None where none of them knows the job.

    Args:
        job_id: for one job of an array ``<array's id>_<index>``.

    Raises:
        ServiceSilent: one of them can't tell now, which is not the same as not knowing the job.
    """
    if lines := _squeue([str(job_id)]).strip().splitlines():
        return text.squeue_line(lines[0])
    shown = _call(["scontrol", "--oneliner", "show", "job", str(job_id)], check=False)
    if shown.returncode == 0 and shown.stdout.strip():
        return text.scontrol_job(shown.stdout)
    fields = ["--parsable2", "--noheader", "--allocations", "--format=State,ExitCode"]
    if not shutil.which("sacct"):
        return None
    account = _call(["sacct", f"--jobs={job_id}", *fields], check=False)
    if account.returncode == 0 and account.stdout.strip():
        return text.sacct_line(account.stdout.strip().splitlines()[-1])
    return None


def job_states(job_ids: Sequence[str]) -> dict[str, text.JobState]:
    """Ask about many jobs with one squeue and, for those it has forgotten, one sacct; unknown jobs are left out.

    Args:
        job_ids: an array's id stands for all of its jobs, which come back as ``<array's id>_<index>``.

    Raises:
        ServiceSilent: as in ``job_state``.
    """
    if not job_ids:
        return {}
    found = text.squeue_jobs(_squeue(job_ids, "--array"))
    known = {key.partition("_")[0] for key in found}
    forgotten = [job_id for job_id in job_ids if job_id.partition("_")[0] not in known]
    if forgotten and shutil.which("sacct"):
        fields = ["--parsable2", "--noheader", "--allocations", "--format=JobID,State,ExitCode"]
        account = _call(["sacct", f"--jobs={','.join(forgotten)}", *fields], check=False)
        found |= text.sacct_jobs(account.stdout) if account.returncode == 0 else {}
    return found


def queued_state(job_id: int | str) -> text.JobState | None:
    """Return what squeue alone says of a job, with scontrol's count of its restarts where it runs."""
    lines = _squeue([str(job_id)]).strip().splitlines()
    known = text.squeue_line(lines[0]) if lines else None
    if known is None or known.ended or known.waiting:
        return known
    shown = _call(["scontrol", "--oneliner", "show", "job", str(job_id)], check=False)
    return text.scontrol_job(shown.stdout) if shown.returncode == 0 and shown.stdout.strip() else known


def _squeue(job_ids: Sequence[str], *more: str) -> str:
    """Return squeue's lines of some jobs; empty where it knows none of them."""
    words = ["squeue", "--noheader", "--states=all", *more, f"--format={text.SQUEUE_FORMAT}"]
    done = _call([*words, f"--jobs={','.join(job_ids)}"], check=False)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ServiceSilent(f"squeue failed: {_words(done)}", fix="try again; scontrol ping tells more")
    return done.stdout if done.returncode == 0 else ""


def job_fields(job_id: int) -> dict[str, str]:
    """Return what ``scontrol show job`` says of a job, by key; empty where it is unknown."""
    done = _call(["scontrol", "--oneliner", "show", "job", str(job_id)], check=False)
    return text.pairs(done.stdout.splitlines()[0]) if done.returncode == 0 and done.stdout.strip() else {}


def node_addresses(names: Sequence[str]) -> dict[str, str]:
    """Return each node's NodeAddr, the address the controller reaches it by; empty where scontrol can't be asked."""
    if not shutil.which("scontrol"):
        return {}
    done = _call(["scontrol", "--oneliner", "show", "node", ",".join(names)], check=False)
    nodes = [text.pairs(line) for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
    return {node["NodeName"]: node["NodeAddr"] for node in nodes if "NodeAddr" in node}


def cancel(job_id: int | str) -> None:
    """Cancel a job, an array, or one job of an array (``<array's id>_<index>``).

    Raises:
        HpcmlError: scancel refused, in Slurm's own words.
    """
    done = _call(["scancel", str(job_id)], check=False)
    if done.returncode:
        raise HpcmlError(f"scancel refused: {_words(done)}", fix="hpcml status shows the job")


def requeue(job_id: int | str) -> None:
    """Put a job back into the queue, from within it too: it is ended, and starts anew.

    Raises:
        HpcmlError: scontrol refused, in Slurm's own words.
    """
    done = _call(["scontrol", "requeue", str(job_id)], check=False)
    if done.returncode:
        raise HpcmlError(f"scontrol requeue refused: {_words(done)}", fix="hpcml resume RUN submits it again")


def _words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.split("error: ", 1)[-1].strip() for line in done.stderr.splitlines() if line.strip()]
    fatal = [line for line in lines if "fatal: " in line]
    return "; ".join(fatal or lines) or f"exit {done.returncode}"


def _call(
    argv: Sequence[str],
    *,
    stdin: str | None = None,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            list(argv), input=stdin, stdin=None if stdin is not None else subprocess.DEVNULL,
            capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, cwd=cwd, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise HpcmlError(
            f"{argv[0]} is not on PATH: no Slurm here",
            fix="log in to the cluster, practise with scripts/devcluster, or run it here: hpcml run JOB",
        ) from None
    except subprocess.TimeoutExpired:
        raise ServiceSilent(
            f"{argv[0]} gave no answer in {TIMEOUT_S} s", fix="try again; scontrol ping tells more"
        ) from None
    if done.returncode and any(words in done.stderr for words in _SILENT):
        raise ServiceSilent(
            f"Slurm's controller does not answer: {_words(done)}", fix="try again; scontrol ping tells more"
        )
    if check and done.returncode:
        raise ServiceSilent(
            f"{argv[0]} failed: {_words(done)}",
            fix="scontrol ping tells whether the controller is up; --site local runs on this machine",
        )
    return done
