"""How a bare run's process ended: its exit code is what the run's marker says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BEGIN = "import sys, hpcml\nrun = hpcml.begin()\n"
HELD = """
def main():
    try:
        sys.exit(5)
    except BaseException as error:
        kept = error
        raise
main()
"""


def end_of(folder: Path, body: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run a script that begins a run; returns how it ended and its run's marker."""
    (folder / "pyproject.toml").touch()
    (folder / "work.py").write_text(BEGIN + body)
    # No address at all, refused before MLflow is imported: what is tested here is the run's own directory.
    own = {"HPCML_SITE": "local", "MLFLOW_TRACKING_URI": "http://[no", "HPCML_DEVICES": "cpu"}
    words = [sys.executable, "work.py"]
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )  # fmt: skip
    (marker,) = (folder / "runs").glob("*/status.json")
    return done, json.loads(marker.read_text())


@pytest.mark.parametrize(
    ("body", "code", "reason"),
    [
        ("sys.exit(3)", 3, "exit code 3"),
        ("exit(4)", 4, "exit code 4"),
        ("sys.exit('no data')", 1, "no data"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['--what'])", 2, "exit code 2"),
        ("try:\n    sys.exit(3)\nfinally:\n    run.log(1, a=1)", 3, "exit code 3"),
        (HELD, 5, "exit code 5"),
        ("sys.exit(256 + 7)", 7, "exit code 7"),
        ("raise ValueError('no good')", 1, "ValueError: no good"),
    ],
    ids=["sys.exit", "exit", "text", "argparse", "finally", "held by its own traceback", "a byte", "exception"],
)  # fmt: skip
def test_a_script_that_exits_with_a_code_has_failed(tmp_path: Path, body: str, code: int, reason: str) -> None:
    done, marker = end_of(tmp_path, body + "\n")
    assert (done.returncode, marker["state"], marker["exit_code"]) == (code, "FAILED", code), done.stderr
    assert marker["reason"] == reason


@pytest.mark.parametrize(
    "body",
    [
        "sys.exit()",
        "sys.exit(0)",
        "sys.exit(None)",
        "try:\n    sys.exit(3)\nexcept SystemExit as error:\n    assert error.code == 3",
        "import threading\nthread = threading.Thread(target=sys.exit, args=(3,))\nthread.start(); thread.join()",
        "import os\nif os.fork() == 0:\n    sys.exit(3)\nos.wait()",
    ],
    ids=["nothing", "0", "None", "caught", "a thread's", "a forked child's"],
)
def test_a_script_that_ends_well_has_completed(tmp_path: Path, body: str) -> None:
    done, marker = end_of(tmp_path, body + "\n")
    assert (done.returncode, marker["state"], marker["exit_code"]) == (0, "COMPLETED", 0), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count(" · COMPLETED · ") == 1 and "FAILED" not in done.stdout


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
kept = [run.log(n, a=n) for n in range(1000)]
print("LOST", kept.count(False))
"""
ROOM = "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"


@pytest.mark.parametrize(
    "after", ["", ROOM, f"{ROOM}run.log(1000, a=1)\n"], ids=["never room again", "at the end", "while it runs"]
)
def test_the_marker_counts_what_a_full_disk_lost(tmp_path: Path, after: str) -> None:
    done, _ = end_of(tmp_path, FULL + after)
    lost = int(done.stdout.split("LOST ")[1].split()[0])
    (marker,) = (tmp_path / "runs").glob("*/status.0.json")
    assert json.loads(marker.read_text())["lost"] == lost + (0 if after else 1), "without room the finish record too"
    assert lost > 0
    assert done.stderr.count("records are lost") == 1


def test_the_end_of_the_run_puts_everything_back(tmp_path: Path) -> None:
    body = (
        "import builtins\nassert repr(sys.exit) != before[0] and repr(exit) == before[1]\nrun.finish()\n"
        "assert [repr(sys.exit), repr(exit)] == before and type(exit).__module__ == '_sitebuiltins'\nsys.exit(3)\n"
    )
    done, marker = end_of(tmp_path, body.replace("before", "['<built-in function exit>', repr(exit)]"))
    assert (done.returncode, marker["state"]) == (3, "COMPLETED"), done.stderr
