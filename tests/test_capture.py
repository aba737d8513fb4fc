"""MLflow's fluent API turned to the journal: real MLflow, a server that is not there, and nothing that waits for it."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import log_metric as imported_before
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import fluent

from hpcml.tracking import journal
from hpcml.tracking.capture import Capture
from hpcml.tracking.journal import Journal


class Listener:
    """A server that takes connections and never answers; ``met`` counts them."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.met = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        held = []
        while True:
            try:
                held.append(self.socket.accept())
            except OSError:
                return
            self.met += 1


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(made.uri)
    yield made
    mlflow.set_tracking_uri(before)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    made.socket.close()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path / "events" / "0.0.rank.jsonl")
    yield made
    made.close()


@pytest.fixture
def captured(writer: Journal, tmp_path: Path, listener: Listener) -> Iterator[Capture]:
    with_artifacts = Capture(writer, "20260101-000000-mine", tmp_path / "artifacts")
    yield with_artifacts
    with_artifacts.__exit__(None, None, None)
    assert listener.met == 0, "nothing went over the network"


def records(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in journal.read(tmp_path / "events") if record["kind"] == kind]


def test_what_scripts_log_is_in_the_journal(captured: Capture, tmp_path: Path) -> None:
    mlflow.set_experiment("digits")
    with mlflow.start_run(run_name="first", tags={"team": "a"}, description="a try") as run:
        mlflow.log_metric("loss", 0.5, step=3, timestamp=1234)
        mlflow.log_metrics({"loss": math.nan, "accuracy": 0.9}, step=4)
        mlflow.log_param("lr", 0.1)
        mlflow.log_params({"layers": [1, 2], "path": Path("/a")})
        mlflow.set_tag("stage", 1)
        mlflow.set_tags({"note": "µ"})
        imported_before("early", 1.0, step=9)
        fluent.log_metric("below", 2.0, step=9)
        assert run.info.run_id == "20260101-000000-mine"
        active = mlflow.active_run()
        assert active is not None and active.info.run_id == run.info.run_id
    mlflow.end_run()
    first, second, *rest = records(tmp_path, "metric")
    assert (first["step"], first["t"], first["values"]) == (3, 1234, {"loss": 0.5})
    assert (second["step"], second["values"]["accuracy"]) == (4, 0.9) and math.isnan(second["values"]["loss"])
    assert [record["values"] for record in rest] == [{"early": 1.0}, {"below": 2.0}]
    params = [record["values"] for record in records(tmp_path, "params")]
    assert params == [{"lr": 0.1}, {"layers": [1, 2], "path": "/a"}]
    tags: dict[str, str] = {}
    for record in records(tmp_path, "tags"):
        tags |= record["values"]
    assert tags == {"team": "a", "mlflow.note.content": "a try", "stage": "1", "note": "µ"}


def test_without_a_step_each_name_counts_its_own(captured: Capture, tmp_path: Path) -> None:
    for value in range(3):
        mlflow.log_metric("loss", value)
    mlflow.log_metrics({"loss": 3, "lr": 1})
    steps = [(name, record["step"]) for record in records(tmp_path, "metric") for name in record["values"]]
    assert steps == [("loss", 0), ("loss", 1), ("loss", 2), ("loss", 3), ("lr", 0)]


def test_asynchronous_calls_have_nothing_to_wait_for(captured: Capture, tmp_path: Path) -> None:
    done = mlflow.log_metric("loss", 1.0, synchronous=False)
    assert done is not None
    done.wait()
    mlflow.flush_async_logging()
    assert len(records(tmp_path, "metric")) == 1


def test_files_are_copied_at_once(captured: Capture, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "plot.png").write_bytes(b"\x89PNG")
    (source / "deep" / "table.csv").write_text("1,2")
    mlflow.log_artifact(str(source / "plot.png"))
    mlflow.log_artifact(str(source / "plot.png"), "plots/all")
    mlflow.log_artifact(str(source / "deep"))
    mlflow.log_artifacts(str(source), artifact_path="whole")
    mlflow.log_text("naïve", "notes/a.txt")
    mlflow.log_dict({"a": [1, Path("/b")]}, "b.json")
    (source / "plot.png").unlink()
    kept = tmp_path / "artifacts"
    assert {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()} == {
        "plot.png", "plots/all/plot.png", "deep/table.csv", "whole/plot.png", "whole/deep/table.csv", "notes/a.txt",
        "b.json",
    }  # fmt: skip
    assert (kept / "notes" / "a.txt").read_text() == "naïve"
    assert json.loads((kept / "b.json").read_text()) == {"a": [1, "/b"]}
    assert mlflow.get_artifact_uri("plots") == (kept / "plots").as_uri()


@pytest.mark.filterwarnings("ignore:.*Any type hint:UserWarning")  # of mlflow.pyfunc, while it is imported
def test_what_cannot_be_recorded_is_said_once_and_ends_nothing(
    captured: Capture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        mlflow.log_metric("loss", None)  # type: ignore[arg-type]
        mlflow.log_artifact(str(tmp_path / "absent"))
        mlflow.log_text("x", "../outside.txt")
        mlflow.log_figure(object(), "figure.png")  # type: ignore[arg-type]
        mlflow.autolog()
        mlflow.pyfunc.log_model(name="model", python_model="model.py")
        mlflow.log_metric("loss", 1.0, run_id="another")
        mlflow.log_metric()  # type: ignore[call-arg]
        with mlflow.start_run(nested=True):
            pass
    said = capsys.readouterr().err.splitlines()
    for word in ("no number", "absent", "outside.txt", "log_figure", "autolog", "log_model", "another", "nested"):
        assert sum(word in line for line in said) == 1, (word, said)
    assert all(line.startswith("hpcml: warning: ") for line in said)
    assert not (tmp_path / "outside.txt").exists()
    assert [record["values"] for record in records(tmp_path, "metric")] == [{"loss": 1.0}] * 2


def test_who_asks_for_this_run_gets_what_was_logged(captured: Capture) -> None:
    mlflow.log_metrics({"loss": 0.5, "accuracy": 0.25}, step=3, timestamp=1234)
    mlflow.log_metric("loss", 0.25, step=4)
    mlflow.log_param("lr", 0.1)
    mlflow.set_tag("stage", 1)
    active = mlflow.active_run()
    assert active is not None
    for run in (mlflow.get_run(active.info.run_id), mlflow.MlflowClient().get_run(active.info.run_id), active):
        assert run.info.run_id == "20260101-000000-mine"
        assert (run.data.metrics, run.data.params) == ({"loss": 0.25, "accuracy": 0.25}, {"lr": "0.1"})
        assert run.data.tags == {"stage": "1"}


def test_a_client_that_names_this_run_is_recorded_too(
    captured: Capture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, mine = mlflow.MlflowClient(), "20260101-000000-mine"
    (tmp_path / "note.txt").write_text("a note")
    client.log_metric(mine, "loss", 0.5, 1234, 3)
    client.log_metric(run_id=mine, key="loss", value=0.25, step=4)
    client.log_batch(mine, [Metric("a", 1.0, 99, 7)], [Param("lr", "0.1")], [RunTag("team", "b")])
    client.log_param(mine, "layers", 2)
    client.set_tag(mine, "stage", 1)
    client.log_artifact(mine, str(tmp_path / "note.txt"))
    client.log_text(mine, "naïve", "notes/a.txt")
    client.set_terminated(mine)
    client.log_metric(mine, "loss", "much")  # type: ignore[arg-type]
    client.log_figure(mine, object(), "figure.png")  # type: ignore[arg-type]
    client.log_artifact(mine, "absent")
    kept = [(r["step"], r["values"]) for r in records(tmp_path, "metric")]
    assert kept == [(3, {"loss": 0.5}), (4, {"loss": 0.25}), (7, {"a": 1.0})]
    assert [r["t"] for r in records(tmp_path, "metric")][::2] == [1234, 99]
    assert [r["values"] for r in records(tmp_path, "params")] == [{"lr": "0.1"}, {"layers": 2}]
    assert [r["values"] for r in records(tmp_path, "tags")] == [{"team": "b"}, {"stage": "1"}]
    assert (tmp_path / "artifacts" / "note.txt").exists() and (tmp_path / "artifacts" / "notes" / "a.txt").exists()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.startswith("hpcml: warning: ") for line in said), said


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's store, with SQLAlchemy 2.1
def test_another_run_is_the_servers(captured: Capture, tmp_path: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("real", artifact_location=(tmp_path / "art").as_uri())
    other = client.create_run(experiment).info.run_id
    client.log_metric(other, "loss", 0.5)
    client.log_param(other, "lr", 0.1)
    assert client.get_run(other).data.params == {"lr": "0.1"} and records(tmp_path, "metric") == []
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    assert mlflow.get_run(other).data.metrics == {"loss": 0.5}
    with pytest.raises(MlflowException, match="not found"):
        mlflow.get_run("0123456789abcdef0123456789abcdef")


def test_a_param_keeps_its_first_value_and_none_is_one(
    captured: Capture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow.log_params({"c": None, "alpha": 0.1})
    for _ in range(2):
        mlflow.log_param("alpha", 0.2)
    mlflow.log_params({"alpha": "0.1", "beta": 3})
    mlflow.log_params({"beta": 4})
    kept: dict[str, Any] = {}
    for record in records(tmp_path, "params"):
        kept = {**record["values"], **kept}
    assert {name: str(value) for name, value in kept.items()} == {"c": "None", "alpha": "0.1", "beta": "3"}
    assert kept["c"] == "None", "JSON's null says nothing, and is not delivered"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "'alpha' is 0.1 already: 0.2 is left out" in said[0] and "'beta'" in said[1]


def held() -> list[object]:
    names = ("log_metric", "log_params", "start_run", "active_run", "log_figure", "autolog", "set_experiment")
    places = [getattr(place, name) for place in (mlflow, fluent) for name in names]
    clients = [vars(mlflow.MlflowClient)[name] for name in ("log_metric", "log_batch", "get_run", "log_figure")]
    return [*places, imported_before, vars(mlflow.models.Model)["log"], *clients]


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's store, with SQLAlchemy 2.1
def test_everything_is_put_back(writer: Journal, tmp_path: Path, listener: Listener) -> None:
    before = held()
    ended: list[bool] = []
    with Capture(writer, "mine", tmp_path / "artifacts", on_end=lambda: ended.append(True)) as nothing:
        assert nothing is None
        kept = mlflow.log_param
        assert all(now is not then for now, then in zip(held(), before, strict=True))
    assert all(now is then for now, then in zip(held(), before, strict=True)) and ended == [True]
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.create_experiment("real", artifact_location=(tmp_path / "art").as_uri())
    mlflow.set_experiment("real")
    with mlflow.start_run() as run:
        kept("lr", 0.1)  # taken while it was captured: it is MLflow's own again
    assert mlflow.get_run(run.info.run_id).data.params == {"lr": "0.1"}
    assert records(tmp_path, "params") == []


SCRIPT = """
import sys, hpcml
run = hpcml.begin()
assert "mlflow" not in sys.modules
run.capture_mlflow()
import mlflow
from mlflow import log_metric
log_metric("loss", 0.5, step=1)
with run.capture_mlflow():
    mlflow.log_param("lr", 0.1)
mlflow.log_metric("loss", 0.25, step=2)
with mlflow.start_run():
    mlflow.log_metric("loss", 0.125, step=3)
run.finish()
assert log_metric.__module__ == "mlflow.tracking.fluent" and "hpcml" not in log_metric.__code__.co_filename
try:
    run.capture_mlflow()
except hpcml.errors.HpcmlError as error:
    assert "has ended" in str(error)
else:
    raise AssertionError
"""


def test_a_script_with_its_server_away(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "work.py").write_text(SCRIPT)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and nobody listens: refused at once
        own = {"HPCML_SITE": "local", "HPCML_DEVICES": "cpu", "HPCML_RUNS": str(tmp_path / "runs")}
        own |= {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{closed.getsockname()[1]}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        words = [sys.executable, "work.py"]
        done = subprocess.run(
            words, cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True, timeout=180
        )
    assert done.returncode == 0, done.stderr
    (events,) = (tmp_path / "runs").glob("*/events")
    kept = [(r["step"], r["values"]) for r in journal.read(events) if r["kind"] == "metric"]
    assert kept == [(1, {"loss": 0.5}), (2, {"loss": 0.25}), (3, {"loss": 0.125})]
    assert any(r["values"].get("lr") == 0.1 for r in journal.read(events) if r["kind"] == "params")
    assert "Traceback" not in done.stderr
