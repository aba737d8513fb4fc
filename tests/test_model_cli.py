"""``hpcml model`` as a person types it: over a run directory and MLflow's own stores."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
pytest.importorskip("sklearn", reason="needs the extra `mlflow`")

import numpy as np
from sklearn import linear_model

from hpcml import job, plan, site
from hpcml.cli import root
from hpcml.rundir import RunDir, write_json
from hpcml.tracking import journal, models
from hpcml.tracking.mlflow import deliver

RUN = "20250101-120000-mnist"
X = np.arange(12.0).reshape(4, 3)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one run that has a model: the sum of three numbers."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HPCML_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HPCML_SITE", "local")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    run = RunDir(tmp_path / "runs", RUN).make()
    keys = {"name": "mnist", "command": ["true"], "experiment": "MNIST", "resources": {"cpus_per_task": 1}}
    write_json(run.plan, plan.resolve(job.from_tree(keys, {}, tmp_path), site.load("local")).to_json())
    writer = journal.Journal(run.event_file(0, 0, "rank"))
    writer.metric(1, {"val_accuracy": 0.875})
    writer.close()
    write_json(run.status, {"state": "COMPLETED", "exit_code": 0, "started": 1.7e9, "ended": 1.7e9 + 60})
    models.save(run, linear_model.LinearRegression().fit(np.eye(3), np.ones(3) * 2.0), X)
    np.save(tmp_path / "x.npy", X)
    return tmp_path


@pytest.fixture
def sqlite(project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """The run, delivered to a SQLite store."""
    uri = f"sqlite:///{project}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    deliver(RunDir(project / "runs", RUN), uri)
    return uri


def hpcml(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = root.run(["model", *words])
    out, err = capsys.readouterr()
    assert "Traceback" not in err and "internal error" not in err
    return code, out, err


def numbers(text: str) -> list[float]:
    return [float(line) for line in text.splitlines()]


def walk_through(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """Register, promote, list and predict, as in the help."""
    expected = models.load(folder / "runs" / RUN / "model").predict(X).tolist()
    assert hpcml(capsys, "list")[:2] == (0, "no models yet: hpcml model register RUN\n")
    code, out, _ = hpcml(capsys, "register")
    assert (code, out.splitlines()[0]) == (0, f"MNIST/1 is the model of {RUN}")
    code, out, _ = hpcml(capsys, "register", RUN)
    assert (code, out.splitlines()[0]) == (0, f"MNIST/1 was already the model of {RUN}")
    assert hpcml(capsys, "promote", "MNIST", "1")[:2] == (0, "MNIST@champion is version 1\n")
    code, out, _ = hpcml(capsys, "list")
    assert code == 0 and all(word in out for word in ("MNIST", "champion", "0.875", RUN))
    listed = json.loads(hpcml(capsys, "list", "MNIST", "--json")[1])
    assert [(v["version"], v["aliases"], v["run"], v["metrics"]) for v in listed] == [
        (1, ["champion"], RUN, {"val_accuracy": 0.875})
    ]
    for reference in ("MNIST", "MNIST@champion", "MNIST/1"):
        code, out, err = hpcml(capsys, "predict", reference, str(folder / "x.npy"))
        assert (code, numbers(out), err) == (0, expected, "hpcml: predicting with MNIST/1 (champion)\n")


def test_register_promote_list_predict_on_sqlite(
    project: Path, sqlite: str, capsys: pytest.CaptureFixture[str]
) -> None:
    walk_through(capsys, project)
    code, _, err = hpcml(capsys, "predict", "MNIST", "x.npy", "-o", "y.npz")
    assert (code, err.splitlines()[-1]) == (0, "hpcml: wrote y.npz")
    expected = models.load(project / "runs" / RUN / "model").predict(X)
    np.testing.assert_array_equal(np.load("y.npz")["predictions"], expected)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """A real MLflow server on loopback that keeps artifacts itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/kept"]
    log = (folder / "server.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words], stdout=log, stderr=log, start_new_session=True, cwd=folder
    )
    uri = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=1):
                break
            time.sleep(0.1)
        yield uri
    finally:
        os.killpg(process.pid, 9)
        process.wait()
        log.close()


def test_register_promote_list_predict_on_a_server(
    project: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with server(tmp_path_factory.mktemp("server")) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        deliver(RunDir(project / "runs", RUN), uri)
        walk_through(capsys, project)


def test_a_run_predicts_without_mlflow_at_hand(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    expected = models.load(project / "runs" / RUN / "model").predict(X).tolist()
    code, out, err = hpcml(capsys, "predict", RUN, "x.npy")
    assert (code, numbers(out), err) == (0, expected, f"hpcml: predicting with run {RUN}\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("register",), f"fix: hpcml sync {RUN}"),
        (("register", "nothing"), "no run 'nothing'"),
        (("promote", "MNIST", "1"), "no model 'MNIST'"),
        (("list", "MNIST"), "no model 'MNIST'"),
        (("predict", "MNIST", "x.npy"), "hpcml model register RUN"),
        (("predict", RUN, "absent.npy"), "absent.npy can't be read"),
        (("predict", RUN, "wide.npy"), "shape (2, 4), the model takes (rows, 3) of float64"),
        (("predict", RUN, "x.npy", "-o", "y.txt"), "allowed: .npy, .npz, .csv, .json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_exit_2_and_says_what_to_do(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/new.db")
    np.save("wide.npy", np.zeros((2, 4)))
    code, out, err = hpcml(capsys, *words)
    assert code == 2 and told in err and out == ""


def test_a_run_without_a_model_says_how_to_save_one(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "runs" / RUN / "model").rename(project / "elsewhere")
    for words in (("register",), ("predict", RUN, "x.npy")):
        code, _, err = hpcml(capsys, *words)
        assert code == 2 and "run.log_model(model, example=x[:5])" in err


@pytest.mark.parametrize(
    "words", [("list",), ("promote", "m", "1"), ("predict", "m", "x.npy"), ("register",)], ids=" ".join
)
def test_a_silent_server_is_exit_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, out, err = hpcml(capsys, *words)
    assert (code, out) == (3, "") and "127.0.0.1:9" in err and "fix:" in err


def test_help_needs_no_mlflow_and_shows_each_command() -> None:
    code = (
        "import sys\nfrom hpcml.cli import root\nroot.run(['model', '--help'])\n"
        "print(sorted({'mlflow', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"\n  {name} " in done.stdout for name in ("register", "promote", "list", "predict"))
