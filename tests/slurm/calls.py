"""What tests of jobs on a cluster share: a command in a project, and what its run left."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conftest import Cluster

HPCML = [sys.executable, "-m", "hpcml"]
# A notebook of the examples takes half a minute on two idle cores.
LIMIT_S = 400


def call(cluster: Cluster, project: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, in a project whose runs lie in it."""
    env = {**cluster.env, "HPCML_PYTHON": sys.executable, "HPCML_RUNS": str(project / "runs"), **more}
    return cluster.run(*words, env=env, cwd=project, timeout=LIMIT_S)


def only_run(project: Path) -> Path:
    (run,) = [path.parent for path in (project / "runs").glob("*/plan.json")]
    return run


def marker(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "status.json").read_text())
    return value


def logs(run: Path) -> str:
    return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted((run / "logs").glob("*")))


def until(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.05)
