"""Delivery in the background against the real MLflow server: every fault of the server and of the follower itself.

After each of them MLflow holds exactly what the journal says: its SQLite file is read directly.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import HANG, Door, Server, door_of, serving

pytest.importorskip("mlflow", reason="needs the extra `mlflow`")

from hpcml import job, plan, site
from hpcml.cli.show import tell_unreadable
from hpcml.rundir import RunDir, claim, read_json, write_json
from hpcml.tracking import follow, store
from hpcml.tracking.mlflow import LOG, deliver, is_delivered, noted

SRC = str(Path(follow.__file__).parents[2])
NEW = float(sys.float_info.max)
# What MLflow's store keeps of a value: infinities as its largest numbers, NaN by a flag.
KEPT = {math.inf: (NEW, 0), -math.inf: (-NEW, 0)}
Stored = list[tuple[str, int, int, float, int]]


def stored(server: Server, experiment: str) -> Stored:
    """All points of an experiment's MLflow runs, as they lie in the database."""
    query = """SELECT key, step, timestamp, value, is_nan FROM metrics WHERE run_uuid IN (SELECT run_uuid FROM runs
        JOIN experiments USING (experiment_id) WHERE experiments.name = ?)"""
    with contextlib.closing(sqlite3.connect(f"file:{server.database}?mode=ro", uri=True, timeout=60)) as connection:
        return sorted(connection.execute(query, (experiment,)).fetchall())


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The server, alive before each test whatever the last one did to it."""
    running.signal(signal.SIGCONT)
    if running.child.poll() is not None:
        running.start()
    yield running
    running.signal(signal.SIGCONT)


@pytest.fixture
def door(server: Server) -> Iterator[Door]:
    with door_of(server) as made:
        yield made


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> RunDir:
    """A run that goes on, in an experiment of the test's own."""
    made = RunDir(tmp_path / "runs", "20250101-120000-faults").make()
    keys = {"name": "faults", "command": ["true"], "experiment": experiment_of(request)}
    write_json(made.plan, plan.resolve(job.from_tree(keys, {}, tmp_path), site.load("local")).to_json())
    made.log(0).write_text("epoch 1\n")
    made.log(1).touch()
    return made


def experiment_of(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    return experiment_of(request)


def write(run: RunDir, steps: range, rank: int = 0, values: Callable[[int], dict[str, float]] | None = None) -> None:
    """Append metrics as the journal does, two points a step."""
    made = values or (lambda step: {"loss": 1 / (step + 1), "accuracy": step / 1000})
    lines = ({"t": 1_700_000_000_000 + step, "kind": "metric", "step": step, "values": made(step)} for step in steps)
    with run.event_file(rank, 0, "rank").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def journal_of(run: RunDir) -> Stored:
    """What MLflow has to hold: each point of the journal once."""
    points = set()
    for path in run.events.glob("*.rank.jsonl"):
        rank = path.name.split(".")[0]
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                for name, value in record["values"].items():
                    key = name if rank == "0" else f"rank_{rank}/{name}"
                    kept = (0.0, 1) if math.isnan(value) else KEPT.get(value, (float(value), 0))
                    points.add((key, record["step"], record["t"], *kept))
    return sorted(points)


def end(run: RunDir) -> None:
    write_json(run.status, {"state": "COMPLETED", "exit_code": 0, "final": True, "ended": time.time()})


def sync(run: RunDir, uri: str) -> None:
    """What `hpcml sync` does at last."""
    deliver(run, uri)
    assert is_delivered(run, uri)


def follower(run: RunDir, uri: str, every_s: float = 0.05, *words: str) -> subprocess.Popen[bytes]:
    """Start a follower as its own process, faster than it is."""
    code = f"import sys; from hpcml.tracking import follow; follow.EVERY_S = {every_s}; follow.SHARE = 1.0\n"
    code += "follow.stand_back = lambda: None; follow.PATIENCE_S = 0.0\n"  # a busy machine would hold it up
    code += "follow.LONGEST_PAUSE_S = 0.2; sys.exit(follow.main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": SRC, "MLFLOW_TRACKING_URI": uri}
    return subprocess.Popen([sys.executable, "-c", code, *words, str(run.root), run.id], env=environment)


def eventually(true: Callable[[], bool], child: subprocess.Popen[bytes] | None = None, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "not in time"
        assert child is None or child.poll() is None, f"ended with {child.returncode}"
        time.sleep(0.01)


def step(run: RunDir, uri: str) -> tuple[follow.Follower, io.StringIO]:
    log = io.StringIO()
    return follow.Follower(run, uri, log), log


# ---- in the background -------------------------------------------------------------------------------------------------


def test_a_run_arrives_while_it_goes_on(run: RunDir, server: Server, experiment: str) -> None:
    child = follower(run, server.uri)
    for until in (10, 30):
        write(run, range(until - 10, until))
        eventually(lambda: stored(server, experiment) == journal_of(run), child)
    assert child.poll() is None
    write(run, range(30, 40))
    end(run)
    assert child.wait(60) == 0
    assert stored(server, experiment) == journal_of(run) and is_delivered(run, server.uri)
    assert (run.logs / LOG).read_text() == ""


def test_the_starter_lets_it_deliver_once_more(run: RunDir, server: Server, experiment: str) -> None:
    secret = server.uri.replace("http://", "http://ann:secret@")
    child = follow.start(run, secret)
    assert child is not None
    assert b"secret" not in Path(f"/proc/{child.pid}/cmdline").read_bytes()
    write(run, range(5))
    end(run)
    for number in (signal.SIGTERM, signal.SIGINT):  # Slurm's, to all of a step: before Python is up it may end it
        eventually(lambda number=number: _ignores(child.pid, number), child)  # type: ignore[misc]
        child.send_signal(number)
    assert os.sched_getscheduler(child.pid) == os.SCHED_IDLE
    assert os.getpriority(os.PRIO_PROCESS, child.pid) == follow.NICE
    assert follow.finish(child, 240) and follow.finish(child)
    assert stored(server, experiment) == journal_of(run) and is_delivered(run, server.uri)


def _ignores(pid: int, number: int) -> bool:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("SigIgn"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("idle_s", "patience_s", "steps"),
    [
        pytest.param(itertools.repeat(0.0), 60.0, 0, id="busy"),
        pytest.param(itertools.repeat(0.0), -1.0, 3, id="busy for long"),
        pytest.param(itertools.count(0.0, 5.0), 60.0, 3, id="a core idle"),
        pytest.param(itertools.repeat(None), 60.0, 3, id="unknown"),
    ],
)
def test_mlflow_is_imported_where_a_core_is_idle(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, idle_s: Iterator[float | None], patience_s: float, steps: int
) -> None:
    looks, done = iter(["", "", "", "over"]), list[bool]()
    monkeypatch.setattr(follow.host, "idle_core_s", lambda: next(idle_s))
    monkeypatch.setattr(follow, "PATIENCE_S", patience_s)
    monkeypatch.setattr(follow, "_wait", lambda *_, held: next(looks))
    monkeypatch.setattr(follow.Follower, "step", lambda _, last=False: done.append(last) or follow.EVERY_S)
    follow.follow(run, "", io.StringIO(), held=False)
    assert done == [False] * steps + [True]


def test_it_hurries_when_the_work_is_done(
    run: RunDir, server: Server, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has waited for an idle core; now it delivers at once, and at a higher priority."""
    write(run, range(5))
    code = "import sys; from hpcml.tracking import follow, host; host.idle_core_s = lambda: 0.0; follow.PATIENCE_S = 3600.0\n"
    code += "follow.EVERY_S = 3600.0; sys.exit(follow.main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, follow._HELD, str(run.root), run.id]
    environment = {**os.environ, "PYTHONPATH": SRC, "MLFLOW_TRACKING_URI": server.uri}
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE) as child:
        eventually(lambda: os.sched_getscheduler(child.pid) == os.SCHED_IDLE, child)
        follow.hurry(child)
        eventually(lambda: stored(server, experiment) == journal_of(run), child)
        assert os.sched_getscheduler(child.pid) == os.SCHED_OTHER
        end(run)
        assert follow.finish(child, 60)


def test_it_ends_with_a_starter_that_was_killed(run: RunDir, server: Server, experiment: str) -> None:
    write(run, range(5))
    code = (
        "import os, sys; from pathlib import Path; from hpcml.rundir import RunDir; from hpcml.tracking import follow\n"
    )
    code += "print(follow.start(RunDir(Path(sys.argv[1]), sys.argv[2]), sys.argv[3]).pid, flush=True)\n"
    code += "os.kill(os.getpid(), 9)"
    words = [sys.executable, "-c", code, str(run.root), run.id, server.uri]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": SRC}, capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    eventually(lambda: _is_gone(pid), seconds=240)
    assert stored(server, experiment) == journal_of(run)


def _is_gone(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):  # in a container nobody may reap it
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


def test_without_a_starter_it_ends_with_the_owner(run: RunDir, server: Server, experiment: str) -> None:
    owner = subprocess.Popen(["sleep", "600"])
    claim(run, owner.pid)
    write(run, range(5))
    child = follower(run, server.uri)
    eventually(lambda: len(stored(server, experiment)) == 10, child)
    write(run, range(5, 8))
    owner.kill()
    owner.wait()
    assert child.wait(60) == 0
    assert stored(server, experiment) == journal_of(run)


def test_a_store_that_never_answers_does_not_hold_the_starter(run: RunDir) -> None:
    write(run, range(5))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        child = follow.start(run, f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert child is not None
        assert child.stdin is not None
        child.stdin.close()
        silent.settimeout(60)
        connection, _ = silent.accept()  # it has asked, and waits
        with connection:
            assert not follow.finish(child, 0.1)
    assert child.returncode == -signal.SIGKILL


def test_variants_of_a_comparison_are_followed(run: RunDir, server: Server, experiment: str) -> None:
    variant = run.child("mirrored").make()
    write_json(variant.plan, read_json(run.plan))
    child = follower(run, server.uri)
    write(variant, range(5))
    eventually(lambda: stored(server, experiment) == journal_of(variant), child)
    end(variant)
    end(run)
    assert child.wait(60) == 0
    assert is_delivered(variant, server.uri) and is_delivered(run, server.uri)


# ---- faults of the server ----------------------------------------------------------------------------------------------


def test_refused_then_there(run: RunDir, server: Server, experiment: str) -> None:
    server.kill()
    one, log = step(run, server.uri)
    write(run, range(700))
    pauses = [one.step() for _ in range(6)]
    assert pauses == sorted(pauses) and pauses[0] > follow.EVERY_S and pauses[-1] == follow.LONGEST_PAUSE_S
    assert log.getvalue().count("hpcml sync") == 1  # an outage of a night is one entry
    server.start()
    assert one.step() < follow.LONGEST_PAUSE_S
    assert "delivers again, after 6 failures" in log.getvalue()
    assert stored(server, experiment) == journal_of(run)


def test_a_server_that_hangs(run: RunDir, server: Server, experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ANSWER_S", 1)
    one, log = step(run, server.uri)
    write(run, range(10))
    one.step()
    server.signal(signal.SIGSTOP)
    write(run, range(10, 20))
    assert one.step() > follow.EVERY_S
    assert "imed out" in log.getvalue()
    server.signal(signal.SIGCONT)
    one.step()
    assert stored(server, experiment) == journal_of(run)


def test_a_server_that_hangs_in_mid_batch(
    run: RunDir, server: Server, door: Door, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CALL_S", 1)
    one, log = step(run, door.uri)
    write(run, range(1200))
    door.verdict = lambda path, count: HANG if "log-batch" in path else None
    assert one.step() > follow.EVERY_S and "imed out" in log.getvalue()
    door.verdict = lambda path, count: None
    monkeypatch.undo()
    one.step()
    assert stored(server, experiment) == journal_of(run)


@pytest.mark.parametrize("code", [500, 502, 401, 403])
def test_a_server_that_refuses(run: RunDir, server: Server, door: Door, experiment: str, code: int) -> None:
    one, log = step(run, door.uri)
    write(run, range(10))
    door.verdict = lambda path, count: code
    assert one.step() > follow.EVERY_S and str(code) in log.getvalue()
    door.verdict = lambda path, count: None
    one.step()
    assert stored(server, experiment) == journal_of(run)


def test_wrong_credentials_at_a_server_with_logins(
    run: RunDir, tmp_path: Path, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth]")
    ini = tmp_path / "auth.ini"
    ini.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{tmp_path}/auth.db\nadmin_username = ann\n"
        "admin_password = a-long-password\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(ini))
    monkeypatch.setenv("MLFLOW_FLASK_SERVER_SECRET_KEY", "of the test")
    folder = tmp_path / "server"
    folder.mkdir()
    with serving(folder, "--app-name", "basic-auth") as guarded:
        write(run, range(10))
        one, log = step(run, guarded.uri.replace("//", "//ann:wrong-password@"))
        assert one.step() > follow.EVERY_S and "401" in log.getvalue() and "wrong-password" not in log.getvalue()
        one.uri = guarded.uri.replace("//", "//ann:a-long-password@")
        one.step()
        assert stored(guarded, experiment) == journal_of(run)
        assert "a-long-password" not in run.delivered.read_text()


def test_an_experiment_that_was_deleted_and_restored(run: RunDir, server: Server, experiment: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=server.uri)
    one, log = step(run, server.uri)
    write(run, range(10))
    one.step()
    number = client.get_experiment_by_name(experiment).experiment_id
    client.delete_experiment(number)
    write(run, range(10, 20))
    assert one.step() > follow.EVERY_S
    assert f"mlflow experiments restore --experiment-id {number}" in log.getvalue()
    client.restore_experiment(number)
    one.step()
    assert stored(server, experiment) == journal_of(run)


def test_a_server_killed_in_mid_batch_and_started_again(run: RunDir, server: Server, experiment: str) -> None:
    write(run, range(6000))
    child = follower(run, server.uri)
    eventually(lambda: len(stored(server, experiment)) > 0, child)
    server.kill()
    assert 0 < len(stored(server, experiment)) < 12_000
    server.start()
    end(run)
    child.wait(120)  # its last try may have met the dead server
    sync(run, server.uri)
    assert stored(server, experiment) == journal_of(run)


# ---- faults of the follower --------------------------------------------------------------------------------------------


def test_a_follower_killed_at_any_moment(run: RunDir, server: Server, experiment: str) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    odd = [math.nan, math.inf, -math.inf, -0.0, 0.5]
    write(run, range(4000))
    write(run, range(2000), rank=1, values=lambda step: {"größe": odd[step % 5], "loss": odd[step % 5]})
    for _ in range(4):
        before = len(stored(server, experiment))
        child = follower(run, server.uri)
        more = generator.randrange(3000)
        eventually(lambda before=before, more=more: len(stored(server, experiment)) > min(11_000, before + more), child)  # type: ignore[misc]
        time.sleep(generator.random() * 0.05)  # somewhere between two calls, or in one
        child.kill()
        child.wait()
    end(run)
    sync(run, server.uri)
    assert stored(server, experiment) == journal_of(run)
    assert len(stored(server, experiment)) == 12_000


def test_a_call_that_was_stored_and_never_noted_is_sent_again(run: RunDir, server: Server, experiment: str) -> None:
    odd = [math.nan, math.inf, -math.inf, -0.0, 0.0]
    write(run, range(700), values=lambda step: {"loss": odd[step % 5], "accuracy": math.nan})
    write(run, range(10), values=lambda step: {"loss": odd[step % 5]})  # the same points again
    empty = deliver(run, server.uri)
    run.delivered.unlink()  # as if killed before each note
    again = deliver(run, server.uri)
    assert (again.run_id, again.points) == (empty.run_id, 1410)
    there, wanted = stored(server, experiment), journal_of(run)
    assert len(there) == len(wanted) == 1400 and there == wanted


# ---- a journal full of garbage -----------------------------------------------------------------------------------------


def test_garbage_is_named_and_all_else_arrives(
    run: RunDir, server: Server, experiment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, range(3))
    garbage = [b"\xff\xfe\0\n", b"[1, 2]\n", b'{"t": "x"}\n', b"[" * 100_000 + b"\n", b"\n", b'{"kind": "metric"}\n']
    with run.event_file(0, 0, "rank").open("ab") as file:
        file.writelines(garbage)
    write(run, range(3, 6))
    with run.event_file(0, 0, "rank").open("ab") as file:
        file.write(b'{"t": 1, "kind": "met')  # torn: still being written, or cut off for good
    end(run)
    sent = deliver(run, server.uri)
    assert sent.points == 12 and [line for _, line, _ in sent.unreadable] == [4, 5, 6, 7, 9]
    assert len(stored(server, experiment)) == 12
    for _ in range(2):  # it is said each time
        assert tell_unreadable(run) == 5
        said = capsys.readouterr().err
        assert f"{run.event_file(0, 0, 'rank')} line 4 is no record" in said and "line 9 is no record" in said
    assert is_delivered(run, server.uri)
    with run.event_file(0, 0, "rank").open("ab") as file:
        file.write(b"\n" * 3 + b"junk\n" * 30)
    assert not is_delivered(run, server.uri)
    again = deliver(run, server.uri)
    assert (again.points, again.skipped, len(noted(run).unreadable)) == (0, 36, 20)
    tell_unreadable(run)
    assert "16 lines more" in capsys.readouterr().err


def test_a_foreign_line_of_any_length_takes_bounded_memory(
    run: RunDir, server: Server, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpcml.tracking.journal import reader

    monkeypatch.setattr(reader, "MAX_LINE", 4096)
    write(run, range(3))
    with run.event_file(0, 0, "rank").open("ab") as file:
        file.write(b"x" * 4096 + b"\n" + b"y" * 100_000 + b"\n" + b"z" * 4095 + b"\n")
    write(run, range(3, 6))
    assert [line for _, line, _ in deliver(run, server.uri).unreadable] == [4, 5, 6]
    assert stored(server, experiment) == journal_of(run)


def test_a_ledger_that_is_garbage_costs_time_and_no_point(run: RunDir, server: Server, experiment: str) -> None:
    write(run, range(6))
    first: Any = deliver(run, server.uri)
    for text in ("{", "[]", '{"offsets": {}}'):
        run.delivered.write_text(text)
        assert deliver(run, server.uri).run_id == first.run_id
    assert stored(server, experiment) == journal_of(run)
