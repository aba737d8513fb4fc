"""A job's [data] version on a real Slurm: pulled at submit, missing under a plain sbatch, verified on both nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from calls import HPCML, call, logs, marker, only_run
from data_lab import contents, fill, lab, need_dvc

if TYPE_CHECKING:
    from conftest import Cluster

need_dvc()

JOB = """\
name     = "digits"
command  = ["bash", "-c", "echo $SLURM_PROCID reads $HPCML_DATASETS; ls -d $PWD"]

[data]
source   = "train"
version  = "v1.0"

[resources]
nodes         = 2
cpus_per_task = 1
time          = "00:02:00"
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two versions, none laid out for jobs yet; the cache is the remote."""
    person = lab(tmp_path_factory.mktemp("slurm") / "home")
    work = person.project("project")
    (work / "jobs").mkdir()
    (work / "jobs" / "digits.toml").write_text(JOB)
    person.git(work, "add", "jobs")
    person.git(work, "commit", "--quiet", "-m", "a job")
    fill(work / "train", 2)
    person.version(work, "add", "train", "--tag", "v1.0")
    return work


def test_a_version_is_missing_under_sbatch_pulled_by_submit_and_verified_on_each_node(
    cluster2: Cluster, project: Path, tmp_path: Path
) -> None:
    own = {"HPCML_DATA": str(tmp_path / "data"), "HOME": str(project.parent)}
    script = call(cluster2, project, *HPCML, "submit", "jobs/digits.toml", "--dry-run", **own)
    assert script.returncode == 0 and not (tmp_path / "data").exists(), script.stderr
    (project / "digits.sbatch").write_text(script.stdout)
    job = call(cluster2, project, "sbatch", "--parsable", "--wait", "digits.sbatch", **own)
    said = (project / f"slurm-{job.stdout.strip().partition(';')[0]}.out").read_text()
    assert job.returncode == 2, said
    assert "nothing is pulled on a node" in said and f"in {project}: hpcml data version pull v1.0 train" in said
    assert not (tmp_path / "data").exists() and not list((project / "runs").glob("*/plan.json"))

    done = call(cluster2, project, *HPCML, "submit", "jobs/digits.toml", "--wait", **own)
    run = only_run(project)
    assert done.returncode == 0, done.stderr + logs(run)
    (folder,) = (tmp_path / "data" / "versions" / "train").glob("v1.0-*")
    assert contents(folder) == contents(project / "train")
    for rank in (0, 1):
        log = (run / "logs" / f"out.{rank}.txt").read_text()
        assert f"data train v1.0 ({folder.name[-12:]}): 20 files at {folder}, as they should be" in log
        assert f'{rank} reads {{"train": "{folder}"}}' in log
    told = [json.loads((run / f"data.{node}.json").read_text()) for node in (0, 1)]
    assert told[0]["node"] != told[1]["node"] and told[0]["digest"] == told[1]["digest"]

    # Plain sbatch finds it now; and a file that is gone on the way stops the job on both nodes.
    job = call(cluster2, project, "sbatch", "--parsable", "--wait", "digits.sbatch", **own)
    assert job.returncode == 0
    next(path for path in folder.rglob("*.png")).unlink()
    job = call(cluster2, project, "sbatch", "--parsable", "--wait", "digits.sbatch", **own)
    newest = max(
        (path.parent for path in (project / "runs").glob("*/plan.json")), key=lambda path: path.stat().st_mtime_ns
    )
    ended = marker(newest)  # srun itself ends with 143, of the rank that waited for the other one
    assert job.returncode and (ended["state"], ended["exit_code"]) == ("FAILED", 2), (ended, logs(newest))
    assert "is missing" in ended["reason"]
    assert "is missing" in logs(newest) and "reads" not in logs(newest)
    # What submit finds damaged it mends.
    done = call(cluster2, project, *HPCML, "submit", "jobs/digits.toml", "--wait", **own)
    assert done.returncode == 0 and contents(folder) == contents(project / "train"), done.stderr
