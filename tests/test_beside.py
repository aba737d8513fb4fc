"""What a run gets without asking: telemetry, the profile's split, provenance, the report, all of it in MLflow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcml import rundir
from hpcml.tracking import follow, journal

SCRIPT = """
import hpcml
run = hpcml.begin(strategy="original")
import numpy, tensorflow as tf
print("seed 3")
tf.keras.utils.set_random_seed(3)
x, y = numpy.random.rand(320, 8).astype("f4"), numpy.random.rand(320, 1).astype("f4")
model = tf.keras.Sequential([tf.keras.layers.Dense(16, input_shape=(8,)), tf.keras.layers.Dense(1)])
model.compile("sgd", "mse")
data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
model.fit(data, epochs=3, verbose=0, callbacks=run.callbacks(global_batch=16))
run.log_model(model, x[:4])
"""
JOB = """
name = "beside"
script = "train.py"
strategy = "original"
[resources]
gpus_per_node = 0
[profile]
steps = [25, 30]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> rundir.RunDir:
    """A small training under ``hpcml run`` that asks for a profile, in a project under git."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "train.py").write_text(SCRIPT)
    (folder / "job.toml").write_text(JOB)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder)]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    words = [sys.executable, "-m", "hpcml.cli", "run", "--site", "local", "job.toml"]
    environment = {**os.environ, "HPCML_PROJECT": str(folder), "HPCML_DEVICES": "cpu"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report " in done.stdout
    return rundir.find(folder / "runs", None)


def records(run: rundir.RunDir, kind: str) -> list[dict[str, object]]:
    return [record for record in journal.read(run.events) if record["kind"] == kind]


def test_the_machine_was_watched(run: rundir.RunDir) -> None:
    samples = records(run, "sample")
    assert samples and all(record["writer"] == "telemetry" for record in samples)
    peak = max(record["values"].get("memory/used_mib", 0) for record in samples)  # type: ignore[attr-defined]
    assert peak > 100  # TensorFlow alone takes more
    assert len(records(run, "totals")) == 1


def test_the_steps_that_the_job_named_were_profiled_and_split(run: rundir.RunDir) -> None:
    [found] = records(run, "profile")
    assert (found["first"], found["last"]) == (25, 30)
    split = found["split"]
    assert isinstance(split, dict) and split["step_ms"] > 0
    assert (run.path / str(found["folder"])).is_dir()


def test_it_is_known_where_code_and_packages_came_from(run: rundir.RunDir) -> None:
    head = subprocess.run(
        ["git", "-C", run.root.parent, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert json.loads(run.provenance.read_text())["code"]["revision"] == head.stdout.strip()
    assert "tensorflow==" in run.packages.read_text()


def test_mlflow_has_all_of_it(run: rundir.RunDir) -> None:
    ledger = json.loads(run.delivered.read_text())
    for name in ("report.html", "provenance.json", "packages.txt", "status.json", "model/MLmodel"):
        assert name in ledger["artifacts"], sorted(ledger["artifacts"])
    assert any(name.startswith("plots/") for name in ledger["artifacts"])
    assert any(name.endswith(".xplane.pb") for name in ledger["artifacts"])


def test_the_marker_counts_what_was_lost(run: rundir.RunDir) -> None:
    assert rundir.read_json(run.status)["lost"] == 0


_AUTOGROUP = Path("/proc/self/autogroup")


@pytest.mark.skipif(not _AUTOGROUP.exists(), reason="autogroup: not in this kernel")
@pytest.mark.parametrize("own", [True, False])
def test_a_follower_stands_back_with_its_own_session_only(own: bool) -> None:
    """The group's nice value holds for a whole session: a person's terminal must not get it.

    The file is empty for a session without a group of its own, as is that of a container's first process.
    """
    code = "from pathlib import Path; from hpcml.tracking import follow; follow.stand_back()\n"
    code += f"print(Path({str(_AUTOGROUP)!r}).read_text())"
    mine = _AUTOGROUP.read_text().split()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, start_new_session=own
    )
    group = done.stdout.split()
    assert _AUTOGROUP.read_text().split() == mine
    assert group[1:] == (["nice", str(follow.NICE)] if own and group else mine[1:])
