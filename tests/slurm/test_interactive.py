"""interactive_1node_2gpus.sh on a real Slurm, typed into a real terminal."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pexpect
import pytest

if TYPE_CHECKING:
    from conftest import Cluster

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT = PROJECT / "interactive_1node_2gpus.sh"
PROMPT = "ON-THE-NODE> "

Terminal = Callable[..., "pexpect.spawn[str]"]


@pytest.fixture
def terminal(cluster: Cluster, tmp_path: Path) -> Iterator[Terminal]:
    """Types the script, with its arguments, into a terminal; hangs up at the end of the test."""
    (tmp_path / ".bashrc").write_text(f"PS1='{PROMPT}'\n")
    # A dumb terminal: no escape sequences between the words that are expected.
    env = {**cluster.env, "HOME": str(tmp_path), "TERM": "dumb"}
    for name in [name for name in env if name.startswith("HPCML_") and name != "HPCML_DEVICES"]:
        del env[name]
    opened: list[pexpect.spawn[str]] = []

    def open_terminal(*argv: str, project: Path = PROJECT, **variables: str) -> pexpect.spawn[str]:
        # Through bash, because pexpect takes a lone command apart at its spaces.
        words = [str(project / SCRIPT.name), *argv]
        options = {"env": {**env, **variables}, "cwd": str(project), "encoding": "utf-8", "dimensions": (24, 400)}
        child = pexpect.spawn("bash", words, timeout=60, **options)
        opened.append(child)
        return child

    yield open_terminal
    for child in opened:
        child.close(force=True)


def ask(child: pexpect.spawn[str], command: str) -> str:
    """Type a command at the prompt and return what it prints."""
    child.sendline(command)
    child.expect_exact(f"{command}\r\n")  # the terminal's echo
    child.expect_exact(PROMPT)
    answer = child.before or ""
    return re.sub(r"(\([^()]*\) )?$", "", answer).strip()  # "(.venv) " belongs to the prompt


def live_jobs(cluster: Cluster) -> list[str]:
    """Ids of the jobs that wait or run; one that is COMPLETING has ended."""
    return cluster.run("squeue", "--noheader", "--format=%A", "--states=PENDING,RUNNING").stdout.split()


def test_a_shell_on_one_node_with_two_gpus(cluster: Cluster, terminal: Terminal) -> None:
    shell = terminal()
    shell.expect_exact("asking for 1 node: gpu:2, 64 cores, 16G memory, for 00:59:00")
    shell.expect_exact(PROMPT)
    job = ask(shell, "echo $SLURM_JOB_ID")
    assert job in live_jobs(cluster)
    assert ask(shell, "echo $CUDA_VISIBLE_DEVICES") == "0,1"
    assert ask(shell, "echo $SLURM_CPUS_PER_TASK $SLURM_NTASKS $SLURM_NNODES") == "64 1 1"
    assert ask(shell, "echo $HPCML_PROJECT $PWD") == f"{PROJECT} {PROJECT}"
    shown = cluster.run("scontrol", "show", "job", job).stdout
    assert "TimeLimit=00:59:00" in shown
    assert "MinMemoryNode=16G" in shown

    assert f"already in job {job}" in ask(shell, "./interactive_1node_2gpus.sh")

    shell.sendline("exit 3")
    shell.expect(pexpect.EOF)
    shell.wait()
    assert shell.exitstatus == 3
    assert job not in live_jobs(cluster)


def test_a_job_step_in_the_shell_gets_the_gpus_too(terminal: Terminal) -> None:
    shell = terminal()
    shell.expect_exact(PROMPT)
    assert ask(shell, "srun --overlap -n1 -c64 printenv CUDA_VISIBLE_DEVICES") == "0,1"


def test_flags_arrive_in_slurm(cluster: Cluster, terminal: Terminal) -> None:
    shell = terminal("-p", "short", "-c", "4", "--mem=1G", "-t", "5", "--gres", "gpu:a100:1", "-J", "two words")
    shell.expect_exact(PROMPT)
    job = ask(shell, "echo $SLURM_JOB_ID")
    shown = cluster.run("squeue", "-h", "-j", job, "-o", "%P|%C|%m|%l|%b|%j").stdout.strip()
    assert shown == "short|4|1G|5:00|gres:gpu:a100:1|two words"


def test_ctrl_c_leaves_the_queue(cluster: Cluster, terminal: Terminal) -> None:
    blocker = cluster.run(
        "sbatch", "--parsable", "--gres=gpu:2", "--output=/dev/null", "--wrap", "sleep 600"
    ).stdout.strip()
    try:
        waiting = terminal()
        waiting.expect(r"srun: job (\d+) queued and waiting for resources")
        assert waiting.match is not None
        job = str(waiting.match.group(1))
        assert job in live_jobs(cluster)
        waiting.sendintr()
        waiting.expect(pexpect.EOF)
        waiting.wait()
        assert waiting.exitstatus != 0
        assert job not in live_jobs(cluster)
    finally:
        cluster.run("scancel", blocker)


def test_a_command_without_a_terminal(cluster: Cluster) -> None:
    work = 'echo "$CUDA_VISIBLE_DEVICES $SLURM_CPUS_PER_TASK"; exit 5'
    done = cluster.run(SCRIPT, "--", "sh", "-c", work, stdin=subprocess.DEVNULL)
    assert (done.stdout, done.returncode) == ("0,1 64\n", 5), done.stderr


def test_what_dry_run_prints_runs_when_pasted(cluster: Cluster) -> None:
    shown = cluster.run(SCRIPT, "--dry-run", "--", "printf", "[%s]", "a  b", "$HOME").stdout
    pasted = shown.replace(" --pty ", " ")  # this test has no terminal to paste into
    done = cluster.run("bash", "-c", pasted)
    assert (done.stdout, done.returncode) == ("[a  b][$HOME]", 0), done.stderr


# TensorFlow's import and five epochs: half a minute on two idle cores.
TRAINING_S = 400


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # MLflow's use of SQLAlchemy 2.1
def test_the_lesson_as_it_is_typed_in_the_shell(terminal: Terminal, tmp_path: Path) -> None:
    """``cd notebooks``, ``ipython simple2GPUsSol2.py``: one process on the shell's two GPUs; here it rehearses on CPUs."""
    project, runs, store = tmp_path / "lesson", tmp_path / "runs", f"sqlite:///{tmp_path}/mlflow.db"
    for folder in ("notebooks", "scripts"):
        shutil.copytree(PROJECT / folder, project / folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (project / SCRIPT.name).symlink_to(f"scripts/{SCRIPT.name}")
    (project / ".venv").symlink_to(sys.prefix)

    shell = terminal(project=project, HPCML_RUNS=str(runs), MLFLOW_TRACKING_URI=store, IPYTHONDIR=str(tmp_path / "ipy"))
    shell.expect_exact(PROMPT)
    job = int(ask(shell, "echo $SLURM_JOB_ID"))
    assert ask(shell, "cd notebooks") == ""
    shell.timeout = TRAINING_S
    said = ask(shell, "ipython simple2GPUsSol2.py")
    before = {path.relative_to(PROJECT / "notebooks") for path in (PROJECT / "notebooks").iterdir()}
    after = {path.relative_to(project / "notebooks") for path in (project / "notebooks").iterdir()}
    assert after <= before, "nothing lands beside the notebooks"
    assert "replicas in sync: 1" in said, said
    assert "one replica for each process: to rehearse two, run two tasks (tasks_per_node = 2)" in said, said
    accuracy = re.search(r"accuracy (0\.\d+), [\d,]+ images/s", said)
    assert accuracy and float(accuracy[1]) > 0.85, said
    (run,) = [path.parent for path in runs.glob("*/plan.json")]
    assert f"hpcml: run {run.name} · COMPLETED · {run}" in said
    marker = json.loads((run / "status.json").read_text())
    assert (marker["state"], marker["final"], marker["slurm_job_id"], marker["replicas_in_sync"]) == (
        *("COMPLETED", True, job, 1),
    )
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiments = [e.experiment_id for e in client.search_experiments()]
    (tracked,) = client.search_runs(experiments)
    assert tracked.info.status == "FINISHED"
    assert len(client.get_metric_history(tracked.info.run_id, "val_accuracy")) == 5
