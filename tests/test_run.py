"""``hpcml.begin()`` without a worker: markers, ids that agree, how a process ended; and runs inside runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HPCML = [sys.executable, "-m", "hpcml"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "pyproject.toml").touch()
    return tmp_path / "project"


def env(folder: Path, **more: str) -> dict[str, str]:
    # MLflow away at once: what is tested here is the run's own directory.
    own = {"HPCML_SITE": "local", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "HPCML_DEVICES": "cpu"}
    return {**os.environ, **own, **more}


def python(folder: Path, body: str, **more: str) -> subprocess.CompletedProcess[str]:
    (folder / "work.py").write_text(body)
    words = [sys.executable, "work.py"]
    return subprocess.run(words, cwd=folder, env=env(folder, **more), capture_output=True, text=True, timeout=120)


def markers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*/status.json"))]


def test_a_bare_run_ends_with_its_process(folder: Path) -> None:
    done = python(folder, "import hpcml\nrun = hpcml.begin()\nrun.log(1, loss=0.5)\n")
    assert done.returncode == 0, done.stderr
    (marker,) = markers(folder)
    assert (marker["state"], marker["final"]) == ("COMPLETED", True)
    assert "hpcml sync" in done.stderr, "MLflow was away: it says how to deliver later"
    assert (folder / "runs" / ".gitignore").read_text() == "*\n"


def test_a_bare_run_is_watched_too(folder: Path) -> None:
    body = """
import time, hpcml
from hpcml.tracking import journal
run = hpcml.begin()
while not (found := list(journal.read(run.dir.events, kinds={"sample"}))):
    time.sleep(0.05)
"""
    done = python(folder, body)
    assert done.returncode == 0, done.stderr
    (file,) = (folder / "runs").glob("*/events/0.0.telemetry.jsonl")
    kinds = {json.loads(line)["kind"] for line in file.read_text().splitlines()}
    assert kinds >= {"sample", "totals"}


def test_an_exception_that_nobody_caught_is_a_failure(folder: Path) -> None:
    done = python(folder, "import hpcml\nhpcml.begin()\nraise ValueError('no good')\n")
    (marker,) = markers(folder)
    assert (marker["state"], marker["reason"]) == ("FAILED", "ValueError: no good")
    assert done.returncode == 1


def test_ctrl_c_is_no_failure(folder: Path) -> None:
    python(folder, "import hpcml\nhpcml.begin()\nraise KeyboardInterrupt\n")
    (marker,) = markers(folder)
    assert (marker["state"], marker["reason"], marker["final"]) == ("CANCELLED", "interrupted", True)


def test_a_strategy_that_nothing_checked_is_a_failure(folder: Path) -> None:
    body = "import sys, types, hpcml, hpcml.training.tensorflow as t\nt.configure = lambda *a, **k: []\n"
    python(folder, body + "hpcml.begin(strategy='mirrored')\n")
    (marker,) = markers(folder)
    assert marker["state"] == "FAILED" and "never checked" in marker["reason"]


def test_finish_with_another_state_fails_the_run_under_a_worker_too(folder: Path) -> None:
    (folder / "work.py").write_text("import hpcml\nhpcml.begin().finish('FAILED', 'not good enough')\n")
    (folder / "job.toml").write_text('script = "work.py"\n')
    done = subprocess.run([*HPCML, "run", "job.toml"], cwd=folder, env=env(folder), capture_output=True, text=True)
    assert done.returncode == 1
    (marker,) = markers(folder)
    assert (marker["state"], marker["reason"]) == ("FAILED", "not good enough")


def test_a_second_begin_is_the_same_run_and_new_is_another(folder: Path) -> None:
    body = (
        "import hpcml\na = hpcml.begin()\nassert hpcml.begin() is a\nb = hpcml.begin(new=True)\nassert b.dir != a.dir\n"
    )
    done = python(folder, body)
    assert done.returncode == 0, done.stderr
    assert [marker["state"] for marker in markers(folder)] == ["COMPLETED", "COMPLETED"]


def test_a_framework_imported_before_is_refused(folder: Path) -> None:
    body = (
        "import sys, types\nsys.modules['tensorflow'] = types.ModuleType('tensorflow')\nimport hpcml\nhpcml.begin()\n"
    )
    done = python(folder, body)
    assert done.returncode == 2 and "restart the kernel" in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "runs").exists()


def test_a_runs_folder_that_takes_nothing_is_refused_in_plain_words(folder: Path) -> None:
    (folder / "file").write_text("where a folder should be")
    runs = {"HPCML_RUNS": str(folder / "file" / "runs")}
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}
    for more in ({}, ranks):
        done = python(folder, "import hpcml\nhpcml.begin()\nprint('TRAINED')\n", **runs, **more)
        assert (done.returncode, done.stdout.count("TRAINED")) == (2, 0), done.stderr
        assert done.stderr.startswith(f"hpcml: no run directory can be made in {folder / 'file' / 'runs'}: ")
        assert "\n  fix: set HPCML_RUNS to a folder" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("body", "code", "says", "frames"),
    [
        ("begin(strategy='mirorred')", 2, "hpcml: begin(): unknown strategy 'mirorred'\n  allowed: ", False),
        ("try:\n    begin(strategy='x')\nexcept HpcmlError:\n    raise ValueError('mine') from None", 1, "mine", True),
        (
            "try:\n    begin(strategy='x')\nexcept HpcmlError:\n    pass\nraise HpcmlError('of mine')",
            1,
            "of mine",
            True,
        ),
        ("try:\n    begin(strategy='x')\nexcept HpcmlError:\n    sys.exit(7)", 7, "", False),
    ],
    ids=["refused", "another exception", "another HpcmlError", "caught"],
)
def test_only_the_refusal_itself_ends_without_frames(
    folder: Path, body: str, code: int, says: str, frames: bool
) -> None:
    done = python(folder, f"import sys\nfrom hpcml import begin\nfrom hpcml.errors import HpcmlError\n{body}\n")
    assert (done.returncode, "Traceback" in done.stderr) == (code, frames), done.stderr
    assert says in done.stderr


def test_log_takes_its_step_by_place_or_name_and_never_raises(folder: Path) -> None:
    body = """
import json, hpcml
from hpcml.tracking import journal
run = hpcml.begin()
told = [
    run.log(1, loss=0.5), run.log(step=2, loss=0.25), run.log(3, **{"step": 30, "loss": 0.125}),
    run.log(loss=1.0), run.log(4, 0.5), run.log(10**30, big=1.0), run.log(5, **{"self": 1.0}),
]
kept = [(r["step"], r["values"]) for r in journal.read(run.dir.events, kinds={"metric"})]
print("TOLD", json.dumps([told, kept]))
"""
    done = python(folder, body)
    assert done.returncode == 0, done.stderr
    told, kept = json.loads(done.stdout.split("TOLD ")[1].splitlines()[0])
    assert told == [True, True, True, False, False, False, True]
    assert kept == [[1, {"loss": 0.5}], [2, {"loss": 0.25}], [3, {"step": 30, "loss": 0.125}], [5, {"self": 1}]]
    (marker,) = (folder / "runs").glob("*/status.0.json")
    assert json.loads(marker.read_text())["left_out"] == {"loss": 1, "(no name)": 1, "big": 1}


RANK = """\
import os, sys, time, hpcml
run = hpcml.begin()
print("DIR", run.dir.id)
if run.topology.rank == 1:
    raise RuntimeError("rank 1 has had enough")
"""


def test_ranks_of_torchrun_share_one_run_and_the_failed_one_decides(folder: Path) -> None:
    (folder / "work.py").write_text(RANK)
    common = env(folder, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_PORT="29500", TORCHELASTIC_RUN_ID="x")
    ranks = [
        subprocess.Popen(
            [sys.executable, "work.py"],
            cwd=folder,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    ids = {line for out, _ in said for line in out.splitlines() if line.startswith("DIR")}
    assert len(ids) == 1, said
    (marker,) = markers(folder)
    assert (marker["state"], marker["reason"]) == ("FAILED", "RuntimeError: rank 1 has had enough")


def test_a_run_inside_a_run_takes_nothing_of_ours_for_the_users(folder: Path) -> None:
    (folder / "inner.py").write_text(
        "import os\nprint('INNER', os.environ['OMP_NUM_THREADS'], os.environ['HPCML_RUN'])\n"
    )
    (folder / "inner.toml").write_text('script = "inner.py"\n[resources]\ncpus_per_task = 1\n')
    body = f"import subprocess\nsubprocess.run({[*HPCML, 'run', 'inner.toml']!r}, check=True)\n"
    (folder / "outer.py").write_text(body)
    (folder / "outer.toml").write_text('script = "outer.py"\n[resources]\ncpus_per_task = 2\n')
    outer = env(folder, OMP_NUM_THREADS="") | {"HPCML_SITE": "local"}
    done = subprocess.run([*HPCML, "run", "outer.toml"], cwd=folder, env=outer, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    inner = next(line for line in done.stdout.splitlines() if line.startswith("INNER")).split()
    assert inner[1] == "1" and inner[2].endswith("-inner")


def test_ipython_shows_what_to_do_and_no_frames(folder: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "IPython",
        "--colors=NoColor",
        "-c",
        "import hpcml; hpcml.begin(strategy='mirorred')",
    ]
    done = subprocess.run(words, cwd=folder, env=env(folder), capture_output=True, text=True, timeout=120)
    shown = done.stdout + done.stderr
    assert "HpcmlError: begin(): unknown strategy 'mirorred'\n  allowed: original, mirrored" in shown
    assert "run.py" not in shown and "Traceback" not in shown
