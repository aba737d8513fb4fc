"""A job's [data]: its version pulled for it, verified and agreed on by the nodes, staged, and told apart afterwards.

The story is that of two versions of MNIST digits: pushed to a real S3 server, each pulled into a fresh clone, each trained
on by a job.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from data_lab import BUCKET, KEY, SECRET, Lab, contents, end, lab, merge, need_dvc, serving

from hpcml.data import images
from hpcml.data.versions import receipt
from hpcml.errors import HpcmlError

need_dvc()
np = pytest.importorskip("numpy", reason="NumPy: not installed")

V1, V2 = 8, 4  # real digits of each class in v1.0, and more of each in v2.0
JOB = """\
name     = "digits"
script   = "train.py"

[data]
source   = "train"
version  = "v1.0"

[resources]
gpus_per_node = 0
cpus_per_task = 1
time          = "00:05:00"
"""
# The mean picture of each digit is all it learns; `seen` says which files a rank was given.
TRAIN = """\
import json, os
from pathlib import Path

import numpy as np

import hpcml
from hpcml.data import images

run = hpcml.begin()
found = images.load("train")
read = lambda file: np.frombuffer(Path(file).read_bytes(), np.uint8)[-800:].astype(float)
(files, labels), (test, truth) = found.train, found.test
means = np.stack([np.mean([read(f) for f, l in zip(files, labels) if l == label], axis=0) for label in range(10)])
right = [np.argmin(((means - read(f)) ** 2).sum(axis=1)) == l for f, l in zip(test, truth)]
run.log(1, accuracy=float(np.mean(right)))
seen = {"folder": str(found.path), "images": len(files) + len(test), "fingerprint": found.fingerprint}
Path(os.environ["SEEN"] + f".{run.topology.rank}").write_text(json.dumps(seen))
run.finish()
"""


@dataclass
class Story:
    """A fresh clone of a project whose two versions lie on an S3 server."""

    lab: Lab
    clone: Path
    first: dict[str, bytes]
    second: dict[str, bytes]

    @property
    def env(self) -> dict[str, str]:
        """For a command that pulls, trains and delivers."""
        store = f"sqlite:///{self.lab.home}/mlflow.db"
        own = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "MLFLOW_TRACKING_URI": store}
        return {
            **own,
            "HPCML_RUNS": str(self.lab.home / "runs"),
            "SEEN": str(self.lab.home / "seen"),
            "HPCML_DEVICES": "cpu",
        }

    def newest(self) -> Path:
        """The newest run directory."""
        return max(
            (path.parent for path in (self.lab.home / "runs").glob("*/plan.json")),
            key=lambda path: path.stat().st_ctime_ns,
        )

    def seen(self, rank: int = 0) -> dict[str, Any]:
        """What a rank's training was given."""
        told: dict[str, Any] = json.loads((self.lab.home / f"seen.{rank}").read_text())
        return told

    def folder(self, tag: str) -> Path:
        """Where a version is laid out."""
        (found,) = (self.lab.data / "versions" / "train").glob(f"{tag}-*")
        return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Tell the story up to a fresh clone, with nothing pulled yet."""
    from hpcml.data import offline_digits
    from hpcml.data.fetch.digits import write_images

    pictures, labels = offline_digits()
    rows = [np.flatnonzero(labels == digit) for digit in range(10)]
    folder = tmp_path_factory.mktemp("job")
    with serving(folder / "s3") as s3:
        person = lab(folder / "home")
        work = person.project("work")
        (work / "train.py").write_text(TRAIN)
        (work / "jobs").mkdir()
        (work / "jobs" / "digits.toml").write_text(JOB)
        person.git(work, "add", ".")
        person.git(work, "commit", "--quiet", "-m", "training")
        some = np.concatenate([each[:V1] for each in rows])
        write_images(pictures[some], labels[some], work / "train")
        first = contents(work / "train")
        person.version(work, "add", "train", "--tag", "v1.0")
        more = np.concatenate([each[V1 : V1 + V2] for each in rows])
        write_images(pictures[more], labels[more], folder / "train_v2")
        for path in (folder / "train_v2").rglob("*.png"):
            path.rename(path.with_name(f"more-{path.name}"))
        merge(folder / "train_v2", work / "train")
        second = contents(work / "train")
        person.version(work, "add", "train", "--tag", "v2.0")
        person.version(work, "remote", f"s3://{BUCKET}/mnist", "--endpoint", s3.uri)
        person.version(work, "push", AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET)
        person.git(person.home, "clone", "--quiet", "work", "clone")
        yield Story(person, person.home / "clone", first, second)


def test_mnist_from_two_versions_to_two_runs_that_are_told_apart(told: Story) -> None:
    job, env = "jobs/digits.toml", told.env
    # Nothing is pulled by a look at it.
    shown = told.lab.hpcml(told.clone, "render", job, "--site", "generic", **env)
    assert shown.code == 0 and "#SBATCH" in shown.out
    findings = json.loads(told.lab.hpcml(told.clone, "check", job, "--json", **env).out)
    (data,) = [one for one in findings if one["topic"] == "data"]
    assert data["verdict"] == "note" and f"{len(told.first)} files: not here yet" in data["text"]
    assert data["fix"] == "hpcml data version pull v1.0 train"
    assert not told.lab.data.exists()
    # On a node nothing is pulled either.
    refused = told.lab.hpcml(told.clone, "run", job, SLURM_JOB_ID="1", HPCML_SITE="local", **env)
    assert refused.code == 2 and "nothing is pulled on a node" in refused.err, refused
    assert f"on a login node, in {told.clone}: hpcml data version pull v1.0 train" in refused.err
    opened = told.lab.run(
        told.clone, sys.executable, "-m", "hpcml.node.batch", "open", job, "--site", "local", SLURM_JOB_ID="1", **env
    )
    assert opened.code == 2 and "hpcml data version pull v1.0 train" in opened.err, opened
    assert not told.lab.data.exists() and not list((told.lab.home / "runs").glob("*/plan.json"))

    found = {}
    for tag, files in (("v1.0", told.first), ("v2.0", told.second)):
        done = told.lab.hpcml(told.clone, "run", job, "--set", f"data.version={tag}", **env)
        assert done.code == 0, done
        assert f"data train {tag}: {len(files)} files at {told.folder(tag)}" in done.err
        assert f"hpcml: data train {tag} ({told.folder(tag).name[-12:]}): {len(files)} files" in done.out
        assert contents(told.folder(tag)) == files
        assert told.seen()["folder"] == str(told.folder(tag)) and told.seen()["images"] == len(files)
        found[tag] = told.newest(), told.seen()["fingerprint"]
    assert found["v1.0"][1] != found["v2.0"][1]
    assert not (told.clone / "train").exists() and told.lab.git(told.clone, "status", "--porcelain") == ""
    told_by_mlflow = _mlflow(env["MLFLOW_TRACKING_URI"])
    for tag, (run, _) in found.items():
        digest = (receipt.read(told.folder(tag)) or pytest.fail("no receipt")).digest
        plan = json.loads((run / "plan.json").read_text())
        assert plan["data"]["version"] == tag and plan["data_digest"] == digest
        assert json.loads((run / "provenance.json").read_text())["data"] == {
            "version": tag,
            "train": f"md5:{digest}.dir",
        }
        params = told_by_mlflow[run.name]
        assert (params["data.version"], params["data.train"]) == (tag, f"md5:{digest}.dir")
        assert params["data.staged"] == "no"
    report = re.sub("<wbr>|\u200b", "", (found["v2.0"][0] / "report.html").read_text())  # where a line may break
    assert "v2.0" in report and f"md5:{plan['data_digest']}.dir" in report


def _mlflow(uri: str) -> dict[str, dict[str, str]]:
    """The params of each run in a store, by the run's id."""
    words = (
        "import json, sys, mlflow; mlflow.set_tracking_uri(sys.argv[1]); "
        "runs = mlflow.search_runs(search_all_experiments=True, output_format='list'); "
        "print(json.dumps({run.data.tags['hpcml.run']: run.data.params for run in runs}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", words, uri], capture_output=True, text=True, check=True
    )
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def pulled(told: Story) -> Story:
    """Both versions are there."""
    for tag in ("v1.0", "v2.0"):
        told.lab.version(told.clone, "pull", tag, **told.env)
    return told


def test_a_node_reads_its_own_copy_which_is_removed_at_the_end(pulled: Story, tmp_path: Path) -> None:
    words = ("--set", "data.stage=always", "--set", "resources.tasks_per_node=2", "--set", "resources.cpus_per_task=1")
    done = pulled.lab.hpcml(pulled.clone, "run", "jobs/digits.toml", *words, HPCML_SCRATCH=str(tmp_path), **pulled.env)
    assert done.code == 0, done
    both = [pulled.seen(rank) for rank in (0, 1)]
    assert both[0] == both[1] and both[0]["folder"].startswith(str(tmp_path)) and both[0]["images"] == len(pulled.first)
    assert not list(tmp_path.rglob("*.png")), "the copy goes with the job"
    logs = [(pulled.newest() / "logs" / f"out.{rank}.txt").read_text() for rank in (0, 1)]
    assert ["as they should be" in log for log in logs] == [True, False], "verified once a node"
    assert "copied to" in "".join(logs)


def test_a_version_that_is_not_whole_stops_the_job_before_it_trains(pulled: Story) -> None:
    victim = pulled.folder("v1.0") / "4"
    kept = next(victim.iterdir())
    kept.rename(victim / "renamed.png")
    (pulled.lab.home / "seen.0").unlink(missing_ok=True)
    # Started as by sbatch: hpcml run itself would look first, and mend it.
    run = _opened(pulled, "v1.0")
    done = _worker(pulled, run, {})
    (victim / "renamed.png").rename(kept)
    assert done.code == 2, done
    assert (
        f"4/{kept.name} is missing; 4/renamed.png is not part of it" in done.err
        and "pull v1.0 train --verify" in done.err
    )
    assert not (pulled.lab.home / "seen.0").exists()
    assert json.loads((run / "status.0.json").read_text())["exit_code"] == 2
    assert _worker(pulled, run, {}).code == 0 and pulled.seen()["images"] == len(pulled.first)


def test_a_node_without_git_finds_the_version_by_what_is_laid_out(pulled: Story, tmp_path: Path) -> None:
    run = _opened(pulled, "v2.0", PATH=str(tmp_path))
    digest = (receipt.read(pulled.folder("v2.0")) or pytest.fail("no receipt")).digest
    assert json.loads((run / "plan.json").read_text())["data_digest"] == digest


def test_nodes_that_disagree_on_the_version_stop_before_training(pulled: Story, tmp_path: Path) -> None:
    run = _opened(pulled, "v1.0")
    # The other node's data folder holds under this version's name what is another one.
    other = tmp_path / "data"
    there = other / "versions" / "train" / pulled.folder("v1.0").name
    there.parent.mkdir(parents=True)
    subprocess.run(["cp", "-r", str(pulled.folder("v2.0")), str(there)], check=True)
    steps = [
        {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "nodea,nodeb", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NUM_TASKS": "2",
         "SLURM_NODEID": str(node), "SLURM_PROCID": str(node), "SLURM_LOCALID": "0"}
        for node in range(2)
    ]  # fmt: skip
    steps[1]["HPCML_DATA"] = str(other)
    (pulled.lab.home / "seen.0").unlink(missing_ok=True)
    children = [
        subprocess.Popen(
            _WORKER, cwd=pulled.clone, env={**pulled.lab.env, **pulled.env, "HPCML_RUN": run.name, **step},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        for step in steps
    ]  # fmt: skip
    try:
        told = [child.communicate(timeout=60)[1] for child in children]
    finally:
        for child in children:
            end(child)
    assert [child.returncode for child in children] == [2, 2], told
    assert re.search(r"is train v2\.0 \(\w{12}\), the job is for \w{12}", told[1]), told[1]
    assert "the data set was refused" in told[0] and not (pulled.lab.home / "seen.0").exists()


def test_a_tag_that_is_moved_after_the_submission_changes_nothing(pulled: Story) -> None:
    run = _opened(pulled, "v1.0")
    pulled.lab.git(pulled.clone, "tag", "--force", "v1.0", "v2.0^{}")
    try:
        assert _worker(pulled, run, {}).code == 0
        assert pulled.seen()["images"] == len(pulled.first)
    finally:
        pulled.lab.git(pulled.clone, "fetch", "--quiet", "--force", "--tags", "origin")


def test_a_name_of_the_jobs_data_leads_to_where_its_node_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "data" / "other").mkdir(parents=True)
    monkeypatch.setenv("HPCML_DATA", str(tmp_path / "data"))
    monkeypatch.setenv(
        "HPCML_DATASETS", json.dumps({"sets/train": str(tmp_path / "here"), "train": str(tmp_path / "here")})
    )
    assert images.find("train") == images.find("sets/train") == tmp_path / "here"
    assert images.find("other") == tmp_path / "data" / "other"
    with pytest.raises(HpcmlError, match="no folder at"):
        images.find("none")


def test_a_set_without_a_version_is_where_the_job_says(pulled: Story) -> None:
    sets = pulled.lab.home / "sets"
    if not sets.exists():
        merge(pulled.folder("v1.0"), sets / "train")
    for source, folder in (("$SETS/train", sets / "train"), ("train", sets / "train")):
        text = JOB.replace('"train"\nversion  = "v1.0"', f'"{source}"')
        (pulled.clone / "jobs" / "plain.toml").write_text(text)
        env = {**pulled.env, "SETS": str(sets), "HPCML_DATA": str(sets)}
        findings = json.loads(pulled.lab.hpcml(pulled.clone, "check", "jobs/plain.toml", "--json", **env).out)
        assert [one["text"] for one in findings if one["topic"] == "data"] == [f"{source} at {folder}"]
    done = pulled.lab.hpcml(pulled.clone, "run", "jobs/plain.toml", **env)
    assert done.code == 0 and pulled.seen()["folder"] == str(sets / "train"), done
    (pulled.clone / "jobs" / "plain.toml").unlink()


def test_a_job_whose_data_is_not_there_says_so_before_it_trains(told: Story) -> None:
    (told.lab.home / "seen.0").unlink(missing_ok=True)
    done = told.lab.hpcml(told.clone, "run", "jobs/digits.toml", "--set", "data.version=v9", **told.env)
    assert done.code == 2 and "no tag 'v9'" in done.err and "--set data.version" in done.err, done
    findings = json.loads(
        told.lab.hpcml(told.clone, "check", "jobs/digits.toml", "--set", "data.version=v9", "--json").out
    )
    assert [one["text"] for one in findings if one["topic"] == "data"] == ["no tag 'v9'"]
    assert not (told.lab.home / "seen.0").exists()


_WORKER = [sys.executable, "-P", "-m", "hpcml.node.worker"]


def _opened(told: Story, tag: str, **env: str) -> Path:
    """Make a run as the batch script of a plain sbatch does, on a node."""
    settings = json.dumps({"settings": {"data.version": tag}})
    words = ("-P", "-m", "hpcml.node.batch", "open", "jobs/digits.toml", "--site", "local", "--overrides", settings)
    opened = told.lab.run(told.clone, sys.executable, *words, **{**told.env, "SLURM_JOB_ID": "7", **env})
    assert opened.code == 0, opened
    return Path(told.env["HPCML_RUNS"], opened.out.strip())


def _worker(told: Story, run: Path, env: dict[str, str]) -> Any:
    """Run the one rank of a run."""
    return told.lab.run(
        told.clone, *_WORKER, **{**told.env, "HPCML_RUN": run.name, "HPCML_RANK": "0", "HPCML_WORLD_SIZE": "1", **env}
    )
