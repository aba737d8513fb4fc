"""Delivery to MLflow, against its SQLite store and a real server on loopback."""

import base64
import contextlib
import fcntl
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlflow_server import DROP, Door, Server, door_of, serving

pytest.importorskip("mlflow", reason="needs the extra `mlflow`")

from hpcml import job, plan, site
from hpcml.errors import HpcmlError, ServiceSilent
from hpcml.rundir import RunDir, read_json, write_json
from hpcml.tracking import mlflow as delivery
from hpcml.tracking import store, translate
from hpcml.tracking.journal import Journal
from hpcml.tracking.mlflow import deliver, is_delivered, store_uri

SRC = str(Path(delivery.__file__).parents[2])
STARTED = 1_700_000_000.25
BIGGEST = sys.float_info.max


# ---- runs, stores, a server, and a door before it that can be slammed -------------------------------------------------


def make_run(root: Path, id: str = "20250101-120000-mnist", *, state: str | None = "COMPLETED", **tree: Any) -> RunDir:
    """Make a run directory as the launcher and the workers leave it."""
    run = RunDir(root, id).make()
    keys = {
        "name": "mnist",
        "command": ["python", "train.py"],
        "strategy": "original",
        "experiment": "MNIST",
        "params": {"epochs": 2, "lr": 0.1, "data": "v1.0"},
        "resources": {"cpus_per_task": 1},
        **tree,
    }
    write_json(run.plan, plan.resolve(job.from_tree(keys, {}, root), site.load("local")).to_json())
    write_json(run.submitted, {"slurm_job_id": 4711})
    run.script.write_text("#!/bin/bash\nsrun true\n")
    run.notebook(0).write_bytes(b'{"cells": [], "metadata": {"\xc3\xa9": 1}}\n')
    run.notebook(1).write_bytes(b"{}\n")
    run.log(0).write_bytes(b"epoch 1\r\nepoch 2\xff\n")
    (run.checkpoints / "big.bin").parent.mkdir(exist_ok=True)
    (run.checkpoints / "big.bin").write_bytes(b"not for MLflow")
    write_json(run.status_of(0), {"state": "COMPLETED", "exit_code": 0})
    if state:
        end(run, state)
    return run


def end(run: RunDir, state: str) -> None:
    write_json(run.status, {"state": state, "exit_code": 0, "started": STARTED, "ended": STARTED + 60.5})


def train(run: RunDir, steps: range = range(5), rank: int = 0, restart: int = 0) -> None:
    """Write metrics as a rank does: two values a step."""
    writer = Journal(run.event_file(rank, restart, "rank"))
    for step in steps:
        assert writer.metric(step, {"loss": 1 / (step + 1), "accuracy": step / 10})
    writer.close()


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs(uri: str, experiment: str = "MNIST") -> list[Any]:
    found = client(uri).get_experiment_by_name(experiment)
    return list(client(uri).search_runs([found.experiment_id])) if found else []


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client(uri).get_metric_history(run_id, name)]


@pytest.fixture(autouse=True)
def no_address_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables; making them takes seconds, copying them none."""
    folder = tmp_path_factory.mktemp("empty")
    deliver(make_run(folder), f"sqlite:///{folder}/mlflow.db")
    connection = client(f"sqlite:///{folder}/mlflow.db")
    connection.delete_run(runs(f"sqlite:///{folder}/mlflow.db")[0].info.run_id)
    connection.rename_experiment(connection.get_experiment_by_name("MNIST").experiment_id, "used")
    return folder / "mlflow.db"


@pytest.fixture
def sqlite(tmp_path: Path, empty_database: Path) -> str:
    """Address of a SQLite store of the test's own."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mlflow.db").write_bytes(empty_database.read_bytes())
    return f"sqlite:///{tmp_path}/store/mlflow.db"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    with serving(folder) as started:
        yield started


@pytest.fixture
def door(server: Server) -> Iterator[Door]:
    with door_of(server) as made:
        yield made


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest) -> str:
    """Both kinds of store."""
    return request.getfixturevalue("sqlite") if request.param == "sqlite" else request.getfixturevalue("server").uri


# ---- what arrives -----------------------------------------------------------------------------------------------------


def test_a_run_arrives_whole_and_once(tmp_path: Path, uri: str, request: pytest.FixtureRequest) -> None:
    experiment = request.node.name  # the server is shared by the tests
    run = make_run(tmp_path / "runs", experiment=experiment, params={"epochs": 2, "lr": 0.1})
    train(run)
    train(run, rank=1)
    with contextlib.closing(Journal(run.event_file(0, 0, "engine"))) as writer:
        writer.write("params", values={"optimizer": "AdamW", "epochs": 99})
        writer.write("tags", values={"Phase": "Retraining", "hpcml.run": "another"})
        writer.write("replicas", in_sync=2, expected=2, devices=["GPU:0", "GPU:1"], virtual=False)

    first = deliver(run, uri)
    assert (first.points, first.experiment, first.uri) == (20, experiment, uri)
    (found,) = runs(uri, experiment)
    assert found.info.run_id == first.run_id and found.info.run_name == "mnist 20250101-120000"
    assert (found.info.status, found.info.start_time, found.info.end_time) == (
        "FINISHED",
        1_700_000_000_250,
        1_700_000_060_750,
    )
    assert (
        found.data.params.items()
        >= {
            "epochs": "2",  # the plan's, not what the journal says later
            "lr": "0.1",
            "optimizer": "AdamW",
            "strategy": "original",
            "resources.nodes": "1",
            "resources.cpus_per_task": "1",
        }.items()
    )
    assert (
        found.data.tags.items()
        >= {
            "hpcml.run": run.id,
            "Training device": "2 × GPU",
            "Phase": "Retraining",
            "strategy": "original",
            "site": "local",
            "slurm_job_id": "4711",
            "state": "COMPLETED",
        }.items()
    )
    assert history(uri, first.run_id, "loss") == [(step, 1 / (step + 1)) for step in range(5)]
    assert history(uri, first.run_id, "rank_1/accuracy") == [(step, step / 10) for step in range(5)]

    second = deliver(run, uri)
    assert (second.run_id, second.points, second.artifacts) == (first.run_id, 0, 0)
    train(run, range(5, 7))
    third = deliver(run, uri)
    assert (third.run_id, third.points) == (first.run_id, 4)

    run.delivered.unlink()
    again = deliver(run, uri)
    assert (again.run_id, again.points) == (first.run_id, 24)
    assert len(runs(uri, experiment)) == 1
    assert history(uri, first.run_id, "loss") == [(step, 1 / (step + 1)) for step in range(7)]


def test_artifacts_arrive_byte_by_byte_and_nothing_else(
    tmp_path: Path, uri: str, request: pytest.FixtureRequest
) -> None:
    run = make_run(tmp_path / "runs", experiment=request.node.name)
    run.plot.write_bytes(bytes(range(256)))
    (run.path / "report.html").write_text("<p>é")
    sent = deliver(run, uri)
    names = ["notebook.ipynb", "notebook.1.ipynb", "plan.json", "job.sbatch", "logs/out.0.txt", "comparison.png"]
    names += ["status.json", "report.html"]
    assert sent.artifacts == len(names)
    there = {item.path for folder in ("", "logs") for item in client(uri).list_artifacts(sent.run_id, folder or None)}
    assert there == {*names, "logs"}

    def same(name: str) -> bool:
        copy = client(uri).download_artifacts(sent.run_id, name, str(tmp_path))
        return Path(copy).read_bytes() == (run.path / name).read_bytes()

    assert all(same(name) for name in names)
    with run.log(0).open("ab") as log:
        log.write(b"epoch 3\n")
    run.notebook(0).write_bytes(b'{"cells": [1]}')
    assert deliver(run, uri).artifacts == 2
    assert same("logs/out.0.txt") and same("notebook.ipynb")


def test_marker_and_report_are_sent_last(tmp_path: Path, door: Door) -> None:
    run = make_run(tmp_path / "runs", experiment="order")
    (run.path / "report.html").write_text("<p>")
    (run.path / "zoom.png").write_bytes(b"png")
    (run.path / "profile" / "rank_0").mkdir(parents=True)
    (run.path / "profile" / "rank_0" / "trace.json").write_text("{}")
    (run.logs / delivery.LOG).write_text("of the delivery, not of the run")
    deliver(run, door.uri)
    sent = [path.partition("/artifacts/")[2].split("/", 2)[2] for path, _ in door.seen if "mlflow-artifacts" in path]
    assert [name.removeprefix("artifacts/") for name in sent][-2:] == ["status.json", "report.html"]
    assert any("profile/rank_0/trace.json" in name for name in sent)
    assert not any(delivery.LOG in name for name in sent)


def test_mlflow_ui_shows_what_went_into_the_file(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, file = server.uri, server.store
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs", experiment="by file")
    train(run)
    sent = deliver(run, file)
    database = Path(file.removeprefix("sqlite:///"))
    with urllib.request.urlopen(f"{address}/get-artifact?path=notebook.ipynb&run_uuid={sent.run_id}") as answer:
        assert answer.read() == run.notebook(0).read_bytes()
    assert history(address, sent.run_id, "loss") == [(step, 1 / (step + 1)) for step in range(5)]
    assert (database.parent / "mlartifacts" / sent.run_id / "artifacts" / "notebook.ipynb").is_file()
    assert not (tmp_path / "mlruns").exists()


def test_samples_and_profiles_become_metrics(tmp_path: Path, sqlite: str) -> None:
    run = make_run(tmp_path / "runs")
    first = 1_700_000_000_900
    for rank in (0, 3):
        lines = [
            {"t": first + at, "kind": "sample", "values": {"gpu0/power_w": 60.5 + at, "cpu/percent": 0.0}}
            for at in (0, 1000, 1999, 2000)
        ]
        lines.append({"t": first, "kind": "profile", "first": 10, "last": 20, "split": {"input": 1.5, "idle": 0}})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        run.event_file(rank, 0, "telemetry").write_text(text)
    sent = deliver(run, sqlite)
    for prefix in ("", "rank_3/"):
        power = history(sqlite, sent.run_id, f"{prefix}system/gpu0/power_w")
        assert power == [(0, 60.5), (1, 1060.5), (1, 2059.5), (2, 2060.5)]
        assert history(sqlite, sent.run_id, f"{prefix}profile/input") == [(20, 1.5)]
    # A later delivery counts from the same first sample.
    with run.event_file(0, 0, "telemetry").open("a") as file:
        file.write(json.dumps({"t": first + 60_000, "kind": "sample", "values": {"gpu0/power_w": 1}}) + "\n")
    assert deliver(run, sqlite).points == 1
    assert history(sqlite, sent.run_id, "system/gpu0/power_w")[-1] == (60, 1.0)


A100 = "NVIDIA A100-SXM4-40GB"


@pytest.mark.parametrize(
    ("params", "replicas", "requested", "says"),
    [
        ({"gpu0.name": A100, "gpu1.name": A100}, {"in_sync": 2, "devices": ["GPU:0", "GPU:1"]}, 2, f"2 × {A100}"),
        ({"gpu0.name": A100, "gpu1.name": A100}, {"in_sync": 1, "devices": ["GPU:0"]}, 2, f"1 × {A100}"),
        ({"gpu0.name": A100, "gpu1.name": "T4"}, {"in_sync": 2, "devices": ["GPU:0"]}, 2, f"1 × {A100}, 1 × T4"),
        ({"gpu0.name": A100}, {}, 1, f"1 × {A100}"),
        ({}, {"in_sync": 4, "devices": ["GPU:0"]}, 4, "4 × GPU"),
        ({}, {}, 2, "2 × GPU (requested)"),
        ({"virtual_cpu_devices": 2}, {}, 2, "CPU"),
        ({}, {}, 0, "CPU"),
        ({}, {"in_sync": 1, "devices": ["CPU:0"]}, 0, "CPU"),
        ({}, {"in_sync": 2, "devices": ["CPU:0", "CPU:1"], "virtual": True}, 2, "CPU (2 virtual devices)"),
        ({}, {"in_sync": 1, "devices": ["CPU:0"], "virtual": True}, 0, "CPU (1 virtual device)"),
        (
            {"virtual_cpu_devices": 1},
            {"in_sync": 2, "devices": ["CPU:0"], "virtual": True},
            2,
            "CPU (2 virtual devices)",
        ),
        ({"virtual_cpu_devices": 0}, {"in_sync": 1, "devices": ["CPU:0"], "virtual": True}, 0, "CPU"),
        ({"virtual_cpu_devices": 0}, {"in_sync": 2, "devices": ["CPU:0"], "virtual": True}, 0, "CPU (2 ranks)"),
    ],
)
def test_the_device_that_trains(params: dict[str, Any], replicas: dict[str, Any], requested: int, says: str) -> None:
    said = translate.Said(params=params, replicas=replicas)
    assert translate.device({"nodes": 1, "gpus_per_node": requested}, said) == says


def test_what_is_unknown_is_no_param(tmp_path: Path, sqlite: str) -> None:
    run = make_run(tmp_path / "runs", strategy=None, params={"note": "", "shuffle": False, "warmup": 0})
    write_json(run.plan, read_json(run.plan) | {"mem_gb": None, "defaults": {"resume_from": None}})
    with contextlib.closing(Journal(run.event_file(0, 0, "rank"))) as writer:
        writer.write("params", values={"gpus": "", "virtual_cpu_devices": 0, "strategy": "mirrored"})
    deliver(run, sqlite)
    (found,) = runs(sqlite)
    assert not {"gpus", "note", "resume_from", "resources.mem_gb"} & found.data.params.keys()
    assert found.data.params.items() >= {"shuffle": "False", "warmup": "0", "virtual_cpu_devices": "0"}.items()
    assert found.data.params["strategy"] == found.data.tags["strategy"] == "mirrored", "begin() was told, not the job"


@pytest.mark.parametrize(
    ("strategy", "devices", "is_told"),
    [
        ("mirrored", [], True),
        ("ddp", ["GPU:0"], False),
        (None, [], False),
        ("horovod", [], False),
        ("horovod", ["GPU:0"], False),
        ("horovod", ["/device:GPU:0"], True),
    ],
)
def test_keras_is_told_where_keras_trains(strategy: str | None, devices: list[str], is_told: bool) -> None:
    said = translate.Said(replicas={"in_sync": 2, "devices": devices} if devices else {})
    told = translate.params({"strategy": strategy, "keras": "legacy", "precision": "float32"}, said)
    assert ("keras" in told, told["precision"]) == (is_told, "float32")


def test_bookkeeping_stays_in_the_journal(tmp_path: Path, sqlite: str) -> None:
    run = make_run(tmp_path / "runs")
    for rank in (0, 1):
        with contextlib.closing(Journal(run.event_file(rank, 0, "rank"))) as writer:
            writer.metric(1, {"loss": 0.5, "profiled_steps": 11})
    assert deliver(run, sqlite).points == 2
    (found,) = runs(sqlite)
    assert found.data.metrics == {"loss": 0.5, "rank_1/loss": 0.5}


def test_a_bare_script_stands_beside_its_jobs(tmp_path: Path, sqlite: str) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "train.py").write_text("")
    (tmp_path / "jobs" / "base.toml").write_text('experiment = "MNIST"\n')
    (tmp_path / "jobs" / "broken.toml").write_text("x = ")
    (tmp_path / "jobs" / "a.toml").write_text('base = "base.toml"\nscript = "train.py"\n')
    run = make_run(tmp_path / "runs")
    plan_of = read_json(run.plan) | {"work": "session", "project": str(tmp_path), "experiment": "train"}
    for target, where in (("train.py", "MNIST"), ("other.py", "train")):
        write_json(run.plan, plan_of | {"target": [target]})
        run.delivered.unlink(missing_ok=True)
        assert deliver(run, sqlite).experiment == where
    write_json(run.plan, plan_of | {"target": ["train.py"]})
    assert deliver(run, sqlite).experiment == "train"  # where it is, it stays
    (tmp_path / "jobs" / "b.toml").write_text('experiment = "CIFAR"\nscript = "train.py"\n')
    run.delivered.unlink()
    assert deliver(run, sqlite).experiment == "train"  # two jobs that disagree decide nothing


NASTY = [
    "a b",
    "größe/µ",
    "50%",
    "a:25",
    "a%",
    "../etc",
    "/abs",
    "a//b",
    "a/",
    "..",
    ".",
    "",
    "tab\t\n",
    "日本🦀",
    "q'\"`;",
]
NASTY += ["caf\udce9", "nul\0", "x" * 250, "x" * 251, "%" * 300, "a/./b"]


def test_numbers_and_names_that_mlflow_refuses(tmp_path: Path, uri: str, request: pytest.FixtureRequest) -> None:
    run = make_run(tmp_path / "runs", experiment=request.node.name + " ü/'\"", params={"epochs": 2})
    with contextlib.closing(Journal(run.event_file(0, 0, "rank"))) as writer:
        for step, value in enumerate([math.nan, math.inf, -math.inf, 1e-320, -0.0, BIGGEST]):
            writer.metric(step, {"loss": value})
        writer.metric(1, {name: number for number, name in enumerate(NASTY)})
        writer.write(
            "params",
            values={name: name or "no name" for name in NASTY} | {"long": "é" * 7000, "empty": "", "none": None},
        )
        writer.write("params", values={"list": [1, "a"]})
        writer.write("tags", values={name: name for name in NASTY} | {"long": "x" * 9000})
        # What must not stop a delivery for ever.
        writer.write("metric", step=2**70, values={"huge": 1.0})
        writer.write("metric", step=1, values={"text": "1", "none": None, "digits": 10**400, "true": True})
        writer.write("metric", step="1", values={"loss": 1.0})
        writer.write("metric", step=1, values=[1.0])
        writer.write("params", values=3)
        writer.write("replicas")
    sent = deliver(run, uri)
    assert deliver(run, uri).points == 0
    (found,) = runs(uri, request.node.name + " ü/'\"")
    loss = history(uri, sent.run_id, "loss")
    assert math.isnan(loss[0][1])
    assert [value for _, value in loss[1:]] == [BIGGEST, -BIGGEST, 1e-320, -0.0, BIGGEST]
    assert found.data.metrics["digits"] == BIGGEST and found.data.metrics["true"] == 1.0
    assert not {"huge", "text", "none"} & found.data.metrics.keys()
    for number, name in enumerate(NASTY):
        known = translate.mlflow_name(name)
        assert found.data.metrics[known] == number
        assert found.data.params[known] == translate.text(name or "no name", 6000)
        assert found.data.tags[known] == translate.text(name, 8000)
        assert found.data.tags.get(f"hpcml.name.{known}") == (None if known == name else translate.text(name, 8000))
    assert found.data.params["long"] == "é" * 5999 + "…" and not {"empty", "none"} & found.data.params.keys()
    assert found.data.params["list"] == "[1, 'a']"


@given(st.text(st.characters(), max_size=80))
@example("a:25")
@example("::2F")
@example("a/../b%")
@example("..a")
def test_names_are_taken_and_come_back(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_tag_name

    known = translate.mlflow_name(name)
    _validate_metric_name(known)
    _validate_tag_name(f"hpcml.name.{known}")
    assert len(known) <= 250
    if known not in (name, "unnamed") and not re.search("-[0-9a-f]{8}$", known):
        raw = re.sub(rb":([0-9A-F]{2})", lambda match: bytes([int(match[1], 16)]), known.encode("utf-8"))
        assert raw.decode("utf-8", "surrogatepass") == name


def test_more_than_one_call_takes(tmp_path: Path, door: Door) -> None:
    run = make_run(tmp_path / "runs", experiment="many")
    with contextlib.closing(Journal(run.event_file(0, 0, "rank"))) as writer:
        for step in range(3):
            writer.metric(step, {f"{'🦀' * 20}{n:04d}": n for n in range(1100)})  # 240 bytes in MLflow's spelling
        writer.metric(0, {"界" * 200 + str(n): n for n in range(1500)})  # 1.2 MB in JSON, more than a request may have
        writer.write("params", values={f"p{n}": n for n in range(250)})
        writer.write("tags", values={f"t{n}": n for n in range(250)})
    assert deliver(run, door.uri).points == 4800
    (found,) = runs(door.uri, "many")
    assert len(found.data.metrics) == 2600
    assert 500_000 < door.largest < 1_000_000
    assert found.data.params["p249"] == "249" and found.data.tags["t249"] == "249"


def test_a_restart_repeats_steps_and_keeps_both(tmp_path: Path, sqlite: str) -> None:
    run = make_run(tmp_path / "runs", state=None)
    train(run, range(3))
    assert deliver(run, sqlite).points == 6
    train(run, range(2, 4), restart=1)
    end(run, "COMPLETED")
    sent = deliver(run, sqlite)
    assert sent.points == 4
    assert sorted(step for step, _ in history(sqlite, sent.run_id, "accuracy")) == [0, 1, 2, 2, 3]


# ---- states, parents, what a person did in MLflow ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "there"),
    [
        ("COMPLETED", "FINISHED"),
        ("CANCELLED by 1000", "KILLED"),
        ("TIMEOUT", "KILLED"),
        ("PREEMPTED", "KILLED"),
        ("FAILED", "FAILED"),
        ("OUT_OF_MEMORY", "FAILED"),
        ("NODE_FAIL", "FAILED"),
        ("UNKNOWN", "FAILED"),
        ("PENDING", "RUNNING"),
        (None, "RUNNING"),
    ],
)
def test_states(tmp_path: Path, sqlite: str, state: str | None, there: str) -> None:
    run = make_run(tmp_path / "runs", state=state)
    deliver(run, sqlite)
    (found,) = runs(sqlite)
    assert found.info.status == there
    assert found.data.tags["state"] == (state or "RUNNING")
    assert found.data.tags["Training device"] == "CPU"
    assert (found.info.end_time is None) == (there == "RUNNING")


def test_a_running_run_is_followed_to_its_end(tmp_path: Path, sqlite: str) -> None:
    run = make_run(tmp_path / "runs", state=None)
    write_json(run.status_of(0), {"started": STARTED})
    seen = []
    for state in (None, "PREEMPTED", "RUNNING", "COMPLETED"):
        if state:
            end(run, state)
        deliver(run, sqlite)
        (found,) = runs(sqlite)
        seen.append(found.info.status)
        assert read_json(run.delivered)["state"] == (state or "RUNNING")
    assert seen == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]
    assert (found.info.start_time, found.info.end_time) == (1_700_000_000_250, 1_700_000_060_750)


def test_variants_nest_below_their_parent(tmp_path: Path, sqlite: str) -> None:
    root = tmp_path / "runs"
    parent = RunDir(root, "20250101-120000-compare").make()  # a comparison that has no plan of its own yet
    write_json(parent.comparison, {"fair": True})
    ids = [deliver(make_run(root, f"{parent.id}/{name}"), sqlite).run_id for name in ("mirrored", "original")]
    other = make_run(root, "20250101-120000-tuned")
    ids.append(deliver(other, sqlite, parent=parent).run_id)
    assert deliver(parent, sqlite).points == 0
    by_name = {found.info.run_name: found for found in runs(sqlite)}
    assert set(by_name) == {"compare 20250101-120000", "mirrored", "original", "tuned 20250101-120000"}
    above = by_name["compare 20250101-120000"]
    for found in by_name.values():
        expected = above.info.run_id if found.info.run_id in ids else None
        assert found.data.tags.get("mlflow.parentRunId") == expected
    assert [item.path for item in client(sqlite).list_artifacts(above.info.run_id)] == ["comparison.json"]


def test_a_value_that_changed_keeps_its_first(tmp_path: Path, sqlite: str) -> None:
    run = make_run(tmp_path / "runs")
    deliver(run, sqlite)
    make_run(tmp_path / "runs", params={"epochs": 3, "seed": 1})
    deliver(run, sqlite)
    (found,) = runs(sqlite)
    assert (found.data.params["epochs"], found.data.params["seed"]) == ("2", "1")


def test_two_projects_may_have_runs_of_one_id(tmp_path: Path, sqlite: str) -> None:
    sent = [deliver(make_run(tmp_path / name), sqlite) for name in ("a", "b")]
    assert len({one.run_id for one in sent}) == len(runs(sqlite)) == 2


def test_another_store_gets_everything_and_the_first_no_copy(tmp_path: Path, sqlite: str, server: Any) -> None:
    run = make_run(tmp_path / "runs", experiment="moving")
    train(run)
    here = deliver(run, sqlite)
    there = deliver(run, server.uri)
    assert (there.points, there.artifacts) == (10, here.artifacts)
    assert deliver(run, sqlite).run_id == here.run_id
    assert len(runs(sqlite, "moving")) == len(runs(server.uri, "moving")) == 1
    assert len(history(sqlite, here.run_id, "loss")) == 5


def test_what_was_deleted_in_mlflow_is_an_error_with_a_way_out(tmp_path: Path, sqlite: str) -> None:
    run = make_run(tmp_path / "runs")
    train(run)
    sent = deliver(run, sqlite)
    client(sqlite).delete_run(sent.run_id)
    with pytest.raises(HpcmlError, match=f"mlflow runs restore --run-id {sent.run_id}") as caught:
        deliver(run, sqlite)
    assert not isinstance(caught.value, ServiceSilent)
    run.delivered.unlink()  # the other way that the message offers
    anew = deliver(run, sqlite)
    assert anew.run_id != sent.run_id and anew.points == 10

    (found,) = runs(sqlite)
    client(sqlite).delete_experiment(found.info.experiment_id)
    fix = f"mlflow experiments restore --experiment-id {found.info.experiment_id}"
    noted = run.delivered.read_bytes()
    for _ in range(2):  # with delivered.json and without
        with pytest.raises(HpcmlError, match=fix) as caught:
            deliver(run, sqlite)
        assert not isinstance(caught.value, ServiceSilent)
        run.delivered.unlink(missing_ok=True)
    run.delivered.write_bytes(noted)
    client(sqlite).restore_experiment(found.info.experiment_id)  # and all runs in it, the first one too
    assert deliver(run, sqlite).run_id == anew.run_id


def test_a_store_that_forgot_the_run_gets_it_anew(tmp_path: Path, sqlite: str, empty_database: Path) -> None:
    run = make_run(tmp_path / "runs")
    train(run)
    deliver(run, sqlite)
    (tmp_path / "store" / "mlflow.db").write_bytes(empty_database.read_bytes())
    assert deliver(run, sqlite).points == 10


@pytest.mark.parametrize("prepare", [lambda run: None, lambda run: run.make()], ids=["absent", "no plan"])
def test_what_is_no_run(tmp_path: Path, sqlite: str, prepare: Callable[[RunDir], object]) -> None:
    run = RunDir(tmp_path / "runs", "20250101-120000-x")
    prepare(run)
    with pytest.raises(HpcmlError, match="hpcml runs list"):
        deliver(run, sqlite)


# ---- silence, faults, secrets ------------------------------------------------------------------------------------------


def test_a_server_that_is_down_loses_nothing(tmp_path: Path, door: Door) -> None:
    run = make_run(tmp_path / "runs", experiment="down")
    train(run, range(1500))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        with pytest.raises(ServiceSilent, match="hpcml sync"):
            deliver(run, f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert not run.delivered.exists()

    # The server dies with the third call of points: stored there, never acknowledged here.
    door.verdict = lambda path, count: DROP if path.endswith("runs/log-batch") and count == 2 else None
    with pytest.raises(ServiceSilent, match="nothing is lost"):
        deliver(run, door.uri)
    noted = sum(read_json(run.delivered)["lines"].values())
    assert 0 < noted < 1500

    door.verdict = lambda path, count: None
    sent = deliver(run, door.uri)
    assert sent.points == 3000 - 2 * noted
    assert len(runs(door.uri, "down")) == 1
    for name in ("loss", "accuracy"):
        assert [step for step, _ in history(door.uri, sent.run_id, name)] == list(range(1500))
    assert deliver(run, door.uri).points == 0


def test_a_server_that_accepts_and_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ANSWER_S", 1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
    run = make_run(tmp_path / "runs")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(ServiceSilent, match=r"[Tt]imed? ?out"):
            deliver(run, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - start < 60  # a bound, where MLflow alone would wait for minutes
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "600" and os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "7"


@pytest.mark.parametrize("code", ["401", "403", "500", "503"])
def test_a_server_that_refuses_is_quoted(tmp_path: Path, door: Door, code: str) -> None:
    door.verdict = lambda path, count: code
    with pytest.raises(ServiceSilent, match=code) as caught:
        deliver(make_run(tmp_path / "runs"), door.uri)
    assert caught.value.exit_code == 3


def test_an_artifact_store_that_fails_comes_after_the_points(tmp_path: Path, door: Door) -> None:
    run = make_run(tmp_path / "runs", experiment="artifacts fail")
    train(run)
    door.verdict = lambda path, count: "500" if "mlflow-artifacts" in path else None
    with pytest.raises(ServiceSilent):
        deliver(run, door.uri)
    (found,) = runs(door.uri, "artifacts fail")
    assert found.info.status == "FINISHED" and len(history(door.uri, found.info.run_id, "loss")) == 5
    door.verdict = lambda path, count: None
    sent = deliver(run, door.uri)
    assert (sent.points, sent.artifacts) == (0, 6)


def test_files_of_the_work_arrive_where_it_said_and_never_over_the_runs_own(tmp_path: Path, server: Server) -> None:
    run = make_run(tmp_path / "runs", experiment="files of the work")
    for name in ("curve.png", "tables/all.csv", "plan.json", "model/weights.bin"):
        path = run.artifacts / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("the work's own")
    sent = deliver(run, server.uri)

    def read(name: str) -> bytes:
        with urllib.request.urlopen(f"{server.uri}/get-artifact?path={name}&run_uuid={sent.run_id}") as answer:
            return bytes(answer.read())

    for name in ("curve.png", "tables/all.csv", "artifacts/plan.json", "artifacts/model/weights.bin"):
        assert read(name) == b"the work's own"
    assert read("plan.json") == run.plan.read_bytes()


def test_credentials_reach_the_server_and_nobody_else(
    tmp_path: Path, door: Door, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "runs", experiment="secret")
    train(run)
    login = door.uri.replace("http://", "http://ann%40uni:s%2Fcr%3At@")
    sent = deliver(run, login)
    expected = "Basic " + base64.b64encode(b"ann@uni:s/cr:t").decode()
    assert {header for _, header in door.seen} == {expected}
    door.verdict = lambda path, count: "500"
    with pytest.raises(ServiceSilent) as caught:
        deliver(run, login)
    dead = "http://ann%40uni:s%2Fcr%3At@127.0.0.1:1"
    with pytest.raises(ServiceSilent) as gone:
        deliver(run, dead)
    sql = "postgresql://ann:s%2Fcr%3At@127.0.0.1:1/mlflow?password=s/cr:t"
    with pytest.raises(HpcmlError) as driver:
        deliver(run, sql)
    said = [repr(sent), run.delivered.read_text(), *capfd.readouterr()]
    said += ["".join(traceback.format_exception(error.value)) for error in (caught, gone, driver)]
    assert not [text for text in said if "s/cr" in text or "s%2Fcr" in text or "ann" in text]
    assert sent.uri == door.uri
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ


@pytest.mark.parametrize("uri", ["./mlruns", "file:///x/mlruns", "/x/mlruns", "http://[::1"])
def test_addresses_that_mlflow_does_not_take(tmp_path: Path, uri: str) -> None:
    with pytest.raises(HpcmlError, match="MLFLOW_TRACKING_URI") as caught:
        deliver(make_run(tmp_path / "runs"), uri)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"])
def test_a_setting_of_mlflow_that_is_no_number_is_named(
    tmp_path: Path, sqlite: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "soon")
    with pytest.raises(HpcmlError, match=f"{name}='soon' is no number"):
        deliver(make_run(tmp_path / "runs"), sqlite)


def test_a_database_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, and long enough to be asked for its header " * 9)
    with pytest.raises(HpcmlError, match="not a database"):
        deliver(make_run(tmp_path / "runs"), f"sqlite:///{tmp_path}/mlflow.db")


LOUD = """
import logging, os, socket, sys
from pathlib import Path
logging.basicConfig(level=logging.DEBUG, format="user %(message)s")
calls = []
socket.socket.connect = lambda self, address: calls.append(address)
before = dict(os.environ)
from hpcml.rundir import RunDir
from hpcml.tracking.mlflow import deliver
deliver(RunDir(Path(sys.argv[1]), sys.argv[2]), sys.argv[3])
os.environ.pop("_MLFLOW_TELEMETRY_SESSION_ID", None)  # what importing MLflow sets, telemetry or not
assert os.environ == before, set(os.environ.items()) ^ set(before.items())
assert not calls, calls
assert logging.getLogger().level == logging.DEBUG and not logging.getLogger("mine").disabled
logging.getLogger("mine").info("still here")
"""


def test_nothing_is_printed_sent_elsewhere_or_left_behind(tmp_path: Path) -> None:
    """A process of its own: MLflow is imported there by the delivery, which makes the tables too."""
    run = make_run(tmp_path / "runs")
    train(run)
    folder = tmp_path / "with space ü"
    arguments = [sys.executable, "-c", LOUD, str(run.root), run.id, f"sqlite:///{folder}/sub/mlflow.db"]
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("CI", "PYTEST_CURRENT_TEST", "_MLFLOW_TELEMETRY_SESSION_ID")
    }
    done = subprocess.run(
        arguments, capture_output=True, text=True, cwd=tmp_path, env={**environment, "PYTHONPATH": SRC}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    own = [line for line in done.stderr.splitlines() if not line.startswith("user ")]
    assert own == [] and "user still here" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "with space ü"}
    assert (folder / "sub").stat().st_mode & 0o777 == 0o700
    assert (folder / "sub" / "mlflow.db").stat().st_mode & 0o777 == 0o600
    (copy,) = (folder / "sub" / "mlartifacts").glob("*/artifacts/notebook.ipynb")
    assert copy.read_bytes() == run.notebook(0).read_bytes()


# ---- one writer at a time ----------------------------------------------------------------------------------------------


def test_a_held_lock_is_told_and_not_waited_for_ever(
    tmp_path: Path, sqlite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "LOCK_TELL_S", 0)
    monkeypatch.setattr(store, "LOCK_WAIT_S", 0.3)
    run = make_run(tmp_path / "runs")
    with (tmp_path / "store" / "mlflow.db.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ServiceSilent, match="hpcml sync"):
            deliver(run, sqlite)
    assert capsys.readouterr().err.count("waiting for another delivery") == 1
    deliver(run, sqlite)
    assert capsys.readouterr().err == ""


RACING = """
import os, sys
from pathlib import Path
import mlflow
from hpcml.rundir import RunDir
from hpcml.tracking.mlflow import deliver
ready = os.pipe()
for uri in sys.argv[3:]:
    for racer in range(2):
        if os.fork() == 0:
            os.close(ready[1])
            os.read(ready[0], 1)  # ends when the starter closes its end: all start at once
            os.write(1, f"{deliver(RunDir(Path(sys.argv[1]), sys.argv[2]), uri).points}\\n".encode())
            os._exit(0)
os.close(ready[1])
sys.exit(any(os.wait()[1] for _ in sys.argv[3:] for racer in range(2)))
"""


@pytest.mark.parametrize("kind", [0, 1], ids=["server", "sqlite"])
def test_two_processes_deliver_one_run_at_once(tmp_path: Path, server: Server, sqlite: str, kind: int) -> None:
    uri = (server.uri, sqlite)[kind]
    run = make_run(tmp_path / "runs", experiment="race")
    train(run, range(1200))
    environment = {**os.environ, "PYTHONPATH": SRC, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", RACING, str(run.root), run.id, uri]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Counter(done.stdout.split()) == Counter(["2400", "0"])
    (found,) = runs(uri, "race")
    assert [step for step, _ in history(uri, found.info.run_id, "loss")] == list(range(1200))


# ---- where MLflow is ---------------------------------------------------------------------------------------------------


def test_the_address_is_the_variable_else_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = site.Site("here", tracking="sqlite:///$HPCML_PROJECT/some.db")
    lacking = site.Site("lacking", tracking="sqlite:///$HPCML_NOWHERE/some.db")
    assert store_uri(here, tmp_path) == f"sqlite:///{tmp_path}/some.db"
    with pytest.raises(HpcmlError, match="HPCML_NOWHERE"):
        store_uri(lacking, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert store_uri(here, tmp_path) == store_uri(lacking, tmp_path) == "http://127.0.0.1:5000"


def test_the_users_logging_is_as_before(tmp_path: Path, sqlite: str) -> None:
    logger = logging.getLogger("mlflow")
    before = (logger.level, list(logger.handlers), logger.propagate, logger.disabled)
    deliver(make_run(tmp_path / "runs"), sqlite)
    assert (logger.level, list(logger.handlers), logger.propagate, logger.disabled) == before


def test_delivered_json_says_what_mlflow_has(tmp_path: Path, sqlite: str) -> None:
    run = make_run(tmp_path / "runs")
    train(run)
    sent = deliver(run, sqlite)
    noted = json.loads(run.delivered.read_text())
    assert {key: noted[key] for key in ("uri", "experiment", "run_id", "state", "lines")} == {
        "uri": sqlite,
        "experiment": "MNIST",
        "run_id": sent.run_id,
        "state": "COMPLETED",
        "lines": {"0.0.rank.jsonl": 5},
    }
    assert noted["offsets"] == {"0.0.rank.jsonl": run.event_file(0, 0, "rank").stat().st_size}
    stat = run.notebook(0).stat()
    assert noted["artifacts"]["notebook.ipynb"] == [stat.st_mtime_ns, stat.st_size]


def test_delivered_means_all_of_it(tmp_path: Path, door: Door) -> None:
    run = make_run(tmp_path / "runs", experiment="all of it")
    train(run)
    assert not is_delivered(run)
    door.verdict = lambda path, count: "500" if "mlflow-artifacts" in path else None
    with pytest.raises(ServiceSilent):
        deliver(run, door.uri)
    assert run.delivered.exists() and not is_delivered(run)
    door.verdict = lambda path, count: None
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: train(run, range(5, 6)),
        lambda: train(run, rank=1),
        lambda: run.log(0).write_text("more"),
        lambda: run.plot.write_bytes(b"new"),
        lambda: end(run, "FAILED"),
    ]
    for change in changes:
        change()
        assert not is_delivered(run)
        deliver(run, door.uri)
        assert is_delivered(run)


DIES_BEFORE_THE_DATABASE_IS_THERE = """
import os, sys
from pathlib import Path
from hpcml.rundir import RunDir
from hpcml.tracking import mlflow
os.replace = lambda *_: os._exit(9)
mlflow.deliver(RunDir(Path(sys.argv[1]), sys.argv[2]), sys.argv[3])
"""


def test_a_delivery_killed_while_it_makes_the_database_leaves_none_half_made(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    train(run)
    uri = f"sqlite:///{tmp_path}/fresh 100%25.db"
    words = [sys.executable, "-W", "ignore", "-c", DIES_BEFORE_THE_DATABASE_IS_THERE, run.root, run.id, uri]
    assert subprocess.run(words, check=False, timeout=120).returncode == 9
    assert not (tmp_path / "fresh 100%.db").exists()
    assert deliver(run, uri).points > 0
    assert [path.name for path in sorted(tmp_path.glob("fresh*"))] == ["fresh 100%.db", "fresh 100%.db.lock"]
    assert len(runs(uri)) == 1
