"""Deliveries that went wrong before: what was deleted in MLflow, killed runs, other addresses, full disks, slow servers."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import Server, door_of, serving

pytest.importorskip("mlflow", reason="mlflow: not installed (pip install 'hpcml[mlflow]')")

from hpcml import job, plan, rundir, site
from hpcml.cli.root import run as hpcml
from hpcml.errors import HpcmlError, ServiceSilent
from hpcml.rundir import RunDir, read_json, write_json
from hpcml.tracking import store
from hpcml.tracking.journal import Journal
from hpcml.tracking.mlflow import deliver, is_delivered

STARTED = 1_700_000_000.25


@pytest.fixture
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPCML_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HPCML_SITE", "local")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def run(runs_folder: Path, request: pytest.FixtureRequest) -> RunDir:
    """A run that goes on, in an experiment of the test's own."""
    made = RunDir(runs_folder, "20250101-120000-tiny").make()
    keys = {"name": "tiny", "command": ["true"], "experiment": str(request.node.name)}
    write_json(made.plan, plan.resolve(job.from_tree(keys, {}, runs_folder.parent), site.load("local")).to_json())
    log(made, range(3))
    return made


def log(run: RunDir, steps: range) -> None:
    with contextlib.closing(Journal(run.event_file(0, 0, "rank"))) as writer:
        assert all(writer.metric(step, {"loss": 1 / (step + 1)}) for step in steps)


def end(run: RunDir) -> RunDir:
    marker = {"state": "COMPLETED", "exit_code": 0, "final": True, "started": STARTED, "ended": STARTED + 60}
    write_json(run.status, marker)
    return run


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """MLflow's tables: making them takes seconds, copying them none."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("empty")
    with store.silenced(), warnings.catch_warnings(action="ignore"):  # SQLAlchemy's, of MLflow
        MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_experiments()
    return (folder / "mlflow.db").read_bytes()


@pytest.fixture
def sqlite(tmp_path: Path, empty_database: bytes) -> str:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mlflow.db").write_bytes(empty_database)
    return f"sqlite:///{tmp_path}/store/mlflow.db"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: bytes) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(empty_database)
    with serving(folder) as started:
        yield started


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def found(uri: str, run_id: str) -> Any:
    return client(uri).get_run(run_id)


# ---- deleted in MLflow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_what_was_deleted_in_a_file_is_not_delivered(run: RunDir, sqlite: str, what: str) -> None:
    sent = deliver(end(run), sqlite)
    assert is_delivered(run)
    number = found(sqlite, sent.run_id).info.experiment_id
    client(sqlite).delete_run(sent.run_id) if what == "run" else client(sqlite).delete_experiment(number)
    assert not is_delivered(run), "the file is asked"
    with pytest.raises(HpcmlError, match="was deleted") as caught:
        deliver(run, sqlite)
    assert not is_delivered(run)
    command = caught.value.problems[0].fix.partition(";")[0]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, shell=True, check=True, capture_output=True, timeout=120, env={**os.environ, "PATH": path})
    assert deliver(run, sqlite).run_id == sent.run_id
    assert is_delivered(run)


def test_what_a_server_says_is_deleted_is_not_delivered(run: RunDir, server: Server) -> None:
    sent = deliver(end(run), server.uri)
    number = found(server.uri, sent.run_id).info.experiment_id
    client(server.uri).delete_experiment(number)
    with pytest.raises(HpcmlError, match="was deleted"):
        deliver(run, server.uri)
    assert not is_delivered(run) and not is_delivered(run, server.uri)
    client(server.uri).restore_experiment(number)
    deliver(run, server.uri)
    assert is_delivered(run)


def test_a_run_whose_experiment_was_deleted_is_never_pruned(
    run: RunDir, sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite)
    sent = deliver(end(run), sqlite)
    client(sqlite).delete_experiment(found(sqlite, sent.run_id).info.experiment_id)
    assert hpcml(["runs", "prune", "--keep", "0", "--yes"]) == 0
    assert run.plan.exists()


def test_a_database_that_was_removed_has_nothing(run: RunDir, sqlite: str, tmp_path: Path) -> None:
    deliver(end(run), sqlite)
    (tmp_path / "store" / "mlflow.db").rename(tmp_path / "elsewhere")
    assert not is_delivered(run)
    (tmp_path / "elsewhere").rename(tmp_path / "store" / "mlflow.db")
    assert is_delivered(run)


# ---- runs that were killed ---------------------------------------------------------------------------------------------


def test_a_killed_run_ends_in_mlflow(run: RunDir, sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite)
    with subprocess.Popen(["sleep", "600"]) as owner:
        rundir.claim(run, owner.pid)
        sent = deliver(run, sqlite)
        assert found(sqlite, sent.run_id).info.status == "RUNNING" and is_delivered(run)
        owner.kill()
    assert not is_delivered(run), "nobody has told MLflow of its end"
    newest = time.time_ns() // 1_000_000
    assert hpcml(["sync"]) == 0
    there = found(sqlite, sent.run_id)
    assert (there.info.status, there.data.tags["state"]) == ("FAILED", "UNKNOWN")
    assert there.info.end_time == read_json(run.delivered)["last_ms"] <= newest
    assert is_delivered(run) and is_delivered(run, state="UNKNOWN")


def test_the_state_that_slurm_told_reaches_mlflow(run: RunDir, sqlite: str) -> None:
    sent = deliver(run, sqlite)
    assert is_delivered(run) and not is_delivered(run, state="TIMEOUT")
    deliver(run, sqlite, state="TIMEOUT")
    there = found(sqlite, sent.run_id)
    assert (there.info.status, there.data.tags["state"]) == ("KILLED", "TIMEOUT")
    assert is_delivered(run, state="TIMEOUT")
    end(run)
    deliver(run, sqlite, state="TIMEOUT")
    assert found(sqlite, sent.run_id).data.tags["state"] == "COMPLETED", "its own end marker wins"


# ---- addresses ---------------------------------------------------------------------------------------------------------


def test_sync_all_looks_at_the_address_asked(
    run: RunDir, sqlite: str, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end(run)
    for uri in (sqlite, server.uri):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert hpcml(["sync", "--all"]) == 0
        assert "already" not in capsys.readouterr().out
        assert is_delivered(run, uri)
    assert hpcml(["sync", "--all"]) == 0
    assert "1 run is in MLflow already" in capsys.readouterr().out


def test_sync_all_takes_no_run(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert hpcml(["sync", "--all", "nosuch"]) == 2
    assert "--all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("foo", "'foo' is no address of MLflow"),
        ("{tmp}/mlruns", "keeps no runs in a folder"),
        ("sqlite:///{tmp}/no/such/mlflow.db", "there is no folder {tmp}/no/such"),
        ("sqlite:///{tmp}/tiny.py", "is not a database"),
    ],
)
def test_a_mistyped_address_is_bad_input_and_leaves_nothing(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str,
    says: str,
) -> None:  # fmt: skip
    (tmp_path / "tiny.py").write_text("print('a script, and no database')\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.format(tmp=tmp_path))
    end(run)
    assert hpcml(["sync"]) == 2
    assert says.format(tmp=tmp_path) in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "tiny.py"}


@pytest.mark.parametrize("code", [401, 403])
def test_who_is_refused_is_told_of_credentials(run: RunDir, server: Server, code: int) -> None:
    with door_of(server) as door:
        door.verdict = lambda path, count: code
        with pytest.raises(ServiceSilent) as caught:
            deliver(end(run), door.uri)
    assert "MLFLOW_TRACKING_USERNAME" in caught.value.problems[0].fix
    assert "delivers it later" not in str(caught.value)


def test_a_missing_driver_is_named_as_pip_knows_it(run: RunDir) -> None:
    with contextlib.suppress(ImportError):
        import psycopg2  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401

        pytest.skip("psycopg2: installed here")
    with pytest.raises(HpcmlError) as caught:
        deliver(end(run), "postgresql+psycopg2://127.0.0.1:1/mlflow")
    assert caught.value.problems[0].fix == "pip install psycopg2-binary"


# ---- disks and servers -------------------------------------------------------------------------------------------------


def test_a_runs_folder_that_takes_no_file_is_named(run: RunDir, server: Server) -> None:
    end(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # Python ignores SIGXFSZ: a write is an OSError, as ENOSPC is
    try:
        with pytest.raises(HpcmlError) as caught:
            deliver(run, server.uri)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(run.path) in str(caught.value) and "did not take" not in str(caught.value)
    deliver(run, server.uri)
    assert is_delivered(run)


def test_a_server_that_drips_is_given_up(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ANSWER_S", 1)
    given_up = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n")
                for _ in range(60):
                    connection.sendall(b" ")
                    if given_up.wait(0.5):
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with pytest.raises(ServiceSilent, match="no whole answer"):
                deliver(end(run), f"http://127.0.0.1:{listening.getsockname()[1]}")
        finally:
            given_up.set()
            thread.join()


def test_how_much_was_sent_is_told(run: RunDir, sqlite: str) -> None:
    log(run, range(3, 3500))
    told: list[tuple[int, float]] = []
    deliver(end(run), sqlite, tell=lambda points, share: told.append((points, share)))
    assert [points for points, _ in told] == [1000, 2000, 3000]
    shares = [share for _, share in told]
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] <= 1


# ---- what MLflow's page shows -----------------------------------------------------------------------------------------


def test_where_values_came_from_stands_behind_what_ran(run: RunDir, sqlite: str) -> None:
    sent = deliver(end(run), sqlite)
    tags = found(sqlite, sent.run_id).data.tags
    order = list(tags)
    origins = [name for name in order if name.startswith("origin.")]
    assert origins and order.index("Training device") < order.index("state") < order.index(origins[0])
    assert run.id in tags["mlflow.note.content"] and "report.html" in tags["mlflow.note.content"]
    client(sqlite).set_tag(sent.run_id, "mlflow.note.content", "the good one")
    log(run, range(3, 5))
    deliver(run, sqlite)
    assert found(sqlite, sent.run_id).data.tags["mlflow.note.content"] == "the good one"


# ---- looking, and cleaning up ------------------------------------------------------------------------------------------


def test_looking_at_a_report_changes_nothing(run: RunDir, sqlite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite)
    end(run)
    assert hpcml(["sync"]) == 0
    assert is_delivered(run)
    page = run.report.read_bytes()
    assert hpcml(["report"]) == 0
    assert run.report.read_bytes() == page and is_delivered(run)
    log(run, range(3, 9))
    os.utime(run.report, (1, 1))  # made before these points
    assert hpcml(["report"]) == 0
    assert run.report.read_bytes() != page, "what is out of date is made anew"


def test_prune_without_anybody_to_ask_wants_yes(
    run: RunDir, sqlite: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deliver(end(run), sqlite)
    assert hpcml(["runs", "prune", "--keep", "0", "--dry-run"]) == 0
    assert run.id in capsys.readouterr().out and run.plan.exists()
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert hpcml(["runs", "prune", "--keep", "0"]) == 2
    assert "--yes" in capsys.readouterr().err and run.plan.exists()
