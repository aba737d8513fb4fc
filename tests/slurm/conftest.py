"""Real Slurm clusters for tests, each started once per session by ``scripts/devcluster``."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "devcluster"
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged")
COMMANDS_ACCOUNTING = ("slurmdbd", "mariadbd")


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Args:
        name: what ``--name`` of the script was.
        env: the environment of its users: this one without SLURM_* and SBATCH_*, plus SLURM_CONF.
        directory: where its configuration, logs and sockets are.
    """

    name: str
    env: dict[str, str]
    directory: Path

    def run(self, *argv: str | Path, **kw: Any) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of the cluster would; keywords are those of subprocess.run."""
        options: dict[str, Any] = {"env": self.env, "text": True, "capture_output": True, "timeout": 60, **kw}
        return subprocess.run([str(word) for word in argv], **options)


def user_env(directory: Path) -> dict[str, str]:
    """This process's environment with the cluster's variables in place of any other cluster's."""
    foreign = ("SLURM_", "SBATCH_", "SALLOC_", "SLURMD_", "PMIX_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return {**kept, "SLURM_CONF": str(directory / "slurm.conf"), "HPCML_DEVICES": "cpu"}


def skip_without_slurm(*commands: str) -> None:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if os.geteuid() != 0 or not all(shutil.which(command, path=path) for command in (*COMMANDS, *commands)):
        extra = " slurmdbd mariadb-server" if commands else ""
        pytest.skip(f"real Slurm: needs root and apt-get install slurmctld slurmd slurm-client munge{extra}")


def devcluster(base: Path, *argv: str, **kw: Any) -> subprocess.CompletedProcess[str]:
    """Run ``scripts/devcluster`` on the clusters under ``base``."""
    options: dict[str, Any] = {"text": True, "capture_output": True, "timeout": 120, **kw}
    return subprocess.run([str(SCRIPT), *argv], env={**os.environ, "HPCML_DEVCLUSTER": str(base)}, **options)


@pytest.fixture(scope="session")
def devcluster_base() -> Iterator[Path]:
    """A directory for this session's clusters; whatever is still up in it at the end goes down."""
    # Short, because a unix socket's path ends after 107 bytes; tmp_path_factory's may be longer.
    base = Path(tempfile.mkdtemp(prefix="hpcml-slurm-"))
    try:
        yield base
    finally:
        down = devcluster(base, "down", "--all")
        shutil.rmtree(base, ignore_errors=True)
        assert down.returncode == 0, down.stderr


def start(base: Path, prefix: str, *options: str) -> Cluster:
    name = f"{prefix}{os.getpid()}"
    up = devcluster(base, "up", "--name", name, *options)
    if up.returncode != 0:
        pytest.fail(f"devcluster up {' '.join(options)}: exit status {up.returncode}\n{up.stdout}{up.stderr}")
    return Cluster(name, user_env(base / name), base / name)


def session_cluster(base: Path, prefix: str, *options: str) -> Iterator[Cluster]:
    cluster = start(base, prefix, *options)
    yield cluster
    down = devcluster(base, "down", "--name", cluster.name)
    assert down.returncode == 0, down.stderr


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """One node, two GPUs, no accounting: the plainest site."""
    skip_without_slurm()
    yield from session_cluster(request.getfixturevalue("devcluster_base"), "one")


@pytest.fixture(scope="session")
def cluster2(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two nodes with two GPUs each."""
    skip_without_slurm()
    yield from session_cluster(request.getfixturevalue("devcluster_base"), "two", "--nodes", "2")


@pytest.fixture(scope="session")
def cluster_cgroup(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """One node whose tasks can open only their own GPU devices: CUDA_VISIBLE_DEVICES is 0 in each."""
    skip_without_slurm()
    base = request.getfixturevalue("devcluster_base")
    yield from session_cluster(base, "cgroup", "--cgroup")


@pytest.fixture(scope="session")
def cluster_accounting(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """One node with slurmdbd, so that sacct answers."""
    skip_without_slurm(*COMMANDS_ACCOUNTING)
    yield from session_cluster(request.getfixturevalue("devcluster_base"), "acct", "--accounting")
