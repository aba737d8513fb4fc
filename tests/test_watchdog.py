"""The watchdog: a training of several ranks that stalls is ended with the stacks of all, one that takes its time is not."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from hpcml import facts, job, plan, rundir, site
from hpcml.errors import HpcmlError
from hpcml.launch import local
from hpcml.node import standing, watchdog
from hpcml.rundir import RunDir
from hpcml.tracking import heartbeat
from hpcml.tracking.heartbeat import BETWEEN, IDLE, STEPPING

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch: not installed (scripts/setup --torch)"
)
needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="TensorFlow: not installed (scripts/setup)"
)


# ------------------------------------------------------------------ the words of the reason

DUMP = """Thread 0x00007f1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait
  File "/home/me/project/background.py", line 3 in work

Current thread 0x00007f2 (most recent call first):
  File "/env/lib/python3.11/site-packages/torch/autograd/graph.py", line 979 in _engine_run_backward
  File "{own}", line 40 in steps
  File "{file}", line 16 in {function}
  File "<frozen runpy>", line 88 in _run_code
"""
OWN = str(Path(standing.__file__).resolve().parents[1] / "training" / "torch.py")


@pytest.mark.parametrize(
    ("file", "function", "place"),
    [
        ("/runs/a/code/train.py", "<module>", "train.py line 16"),
        ("/runs/a/code/train.py", "fit", "train.py line 16 in fit"),
        ("/tmp/ipykernel_12/345.py", "<module>", "line 16 of its cell"),
    ],
)
def test_the_place_is_the_users_own_line_in_the_main_thread(file: str, function: str, place: str) -> None:
    assert standing.place_of(DUMP.format(own=OWN, file=file, function=function)) == place


def test_a_dump_without_lines_of_the_user_still_has_a_place() -> None:
    assert standing.place_of(
        'Thread 0x1 (most recent call first):\n  File "/usr/lib/python3.11/ssl.py", line 9 in read\n'
    )
    assert standing.place_of("") == ""


def at(step: int, place: str = "", phase: int = STEPPING, stacks: bool = True, begun: bool = True) -> dict[str, Any]:
    return {"step": step, "place": place, "phase": phase, "stacks": stacks, "begun": begun}


@pytest.mark.parametrize(
    ("ranks", "says", "behind"),
    [
        pytest.param(
            [at(42, "a.py line 3"), at(41, "a.py line 9 in load"), at(42, "a.py line 3"), at(42, "a.py line 3")],
            "no step for 20 min: rank 1 is at step 41 (a.py line 9 in load), the others are at step 42 (a.py line 3); "
            "stacks of all ranks are in their logs (hpcml logs R)",
            [1],
            id="fewer steps",
        ),
        pytest.param(
            [at(41, "a.py line 3"), at(41, "a.py line 3"), at(41, "a.py line 9")],
            "no step for 20 min after step 41: rank 2 is at a.py line 9, the others are at a.py line 3; stacks of all",
            [2],
            id="a place of its own",
        ),
        pytest.param(
            [at(41, "a.py line 3"), at(41, "a.py line 9")],
            "after step 41: rank 0 is at a.py line 3, rank 1 is at a.py line 9; stacks of all ranks",
            [],
            id="two ranks",
        ),
        pytest.param(
            [at(5, "a.py line 3"), at(5, "a.py line 3")],
            "after step 5: all ranks are at a.py line 3; stacks of all ranks",
            [],
            id="all at one place",
        ),
        pytest.param(
            [at(7, "a.py line 3"), {"exit_code": 0}, at(7, "a.py line 3")],
            "no step for 20 min: rank 1 ended with exit code 0, the others are at step 7 (a.py line 3); "
            "stacks of ranks 0 and 2 are in the logs",
            [],
            id="one has ended",
        ),
        pytest.param(
            [at(7), at(7, "a.py line 30", IDLE), at(7)],
            "rank 1 is past its training (a.py line 30), the others are at step 7;",
            [1],
            id="one has left the loop",
        ),
        pytest.param(
            [at(0, "a.py line 8", IDLE), at(3, "a.py line 3")],
            "rank 0 is not yet in training (a.py line 8), rank 1 is at step 3 (a.py line 3)",
            [0],
            id="one never came",
        ),
        pytest.param(
            [{}, at(3, stacks=False), at(3, stacks=False)],
            "rank 0 said nothing, the others are at step 3; no rank could write its stacks",
            [],
            id="one is silent",
        ),
        pytest.param(
            [at(number, f"a.py line {number}") for number in range(9)],
            "rank 2 is at step 2 (a.py line 2), the other 6 elsewhere; stacks of all ranks",
            [0],
            id="all over the place",
        ),
    ],
)
def test_the_reason_says_who_stands_where(ranks: list[dict[str, Any]], says: str, behind: list[int]) -> None:
    told = {rank: one for rank, one in enumerate(ranks) if one}
    assert says in standing.reason(1200.0, told, len(ranks), "R")
    assert standing.behind(told) == behind


# ------------------------------------------------------------------ how long is too long


def test_pauses_and_what_took_long_before_get_more_time() -> None:
    assert watchdog.limit_s(600, STEPPING, 0) == 600
    assert watchdog.limit_s(600, BETWEEN, 0) == 2400
    assert watchdog.limit_s(600, STEPPING, 400) == 1600
    assert watchdog.limit_s(600, BETWEEN, 400) == 2400


@pytest.mark.parametrize(("text", "seconds"), [("", 1200), ("'off'", 0), ("'5'", 300), ("'00:00:30'", 30)])
def test_the_key_in_the_job_file(tmp_path: Path, text: str, seconds: int) -> None:
    path = tmp_path / "j.toml"
    path.write_text("command = ['true']\n" + (f"stall_timeout = {text}\n" if text else ""))
    assert job.load(path).stall_s == seconds


@pytest.mark.parametrize("text", ["0", "5", "'0'", "'soon'", "true", "''", "['5']"])
def test_a_wrong_key_says_what_is_allowed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "j.toml"
    path.write_text(f"command = ['true']\nstall_timeout = {text}\n")
    with pytest.raises(HpcmlError, match=r"j.toml: stall_timeout: .* is not a time\n  allowed: .*00:20:00.*off"):
        job.load(path)


# ------------------------------------------------------------------ the heartbeat


@pytest.fixture
def beats(tmp_path: Path) -> Path:
    heartbeat.make(tmp_path / "beats")
    return tmp_path / "beats"


def python(beats: Path | None, code: str, *words: str, **more: Any) -> subprocess.Popen[str]:
    named = {heartbeat.VARIABLE: str(beats)} if beats else {}
    env = {**os.environ, **named, "HPCML_DEVICES": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={**env, **more},
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


TOLD = """
from hpcml.tracking import heartbeat
heartbeat.begin()
with heartbeat.training():
    heartbeat.step(7)
    print(heartbeat.is_watched(), flush=True)
    input()
    heartbeat.pause()
    print("paused", flush=True)
    input()
print("ended", flush=True)
input()
"""


def test_a_worker_reads_what_the_training_tells(beats: Path) -> None:
    with python(beats, TOLD) as process:
        assert process.stdout is not None and process.stdin is not None
        seen = []
        for _ in range(3):
            process.stdout.readline()
            beat = heartbeat.read(beats)
            seen.append((beat.pid, beat.step, beat.phase))
            process.stdin.write("\n")
            process.stdin.flush()
    assert seen == [(process.pid, 7, phase) for phase in (STEPPING, BETWEEN, IDLE)]


def test_without_a_worker_nothing_is_told_and_nothing_fails(tmp_path: Path) -> None:
    for file in (None, tmp_path / "absent"):
        said, _ = python(file, TOLD).communicate("\n\n\n", timeout=60)
        assert said.split() == ["False", "paused", "ended"]


def test_the_first_process_of_the_work_is_the_one(beats: Path) -> None:
    """What a training starts itself, such as loaders that import the script again, tells nothing."""
    child = f"import subprocess, sys\n{TOLD.replace('input()', '')}"
    child += "subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)\n"
    process = python(beats, child, TOLD.replace("input()", "").replace("7", "8"))
    said, _ = process.communicate(timeout=60)
    assert said.split() == ["True", "paused", "ended", "False", "paused", "ended"]
    assert (heartbeat.read(beats).pid, heartbeat.read(beats).step) == (process.pid, 7)


HOLDS_THE_GIL = """
import ctypes
from hpcml.tracking import heartbeat
heartbeat.begin()
def stuck():
    print("stuck", flush=True)
    while True:
        ctypes.PyDLL(None).sleep(600)
stuck()
"""


def test_stacks_come_from_a_process_that_answers_to_nothing_else(beats: Path) -> None:
    process = python(beats, HOLDS_THE_GIL)
    try:
        assert process.stdout is not None and process.stdout.readline() == "stuck\n"
        assert watchdog.is_ours(process.pid, beats)
        assert not watchdog.is_ours(os.getpid(), beats) and not watchdog.is_ours(0, beats)
        process.send_signal(heartbeat.DUMP)
        while not heartbeat.stacks(beats).endswith("in <module>\n"):
            assert process.poll() is None
        assert "in stuck" in heartbeat.stacks(beats)
    finally:
        process.kill()
        process.communicate()


KERAS = """
import json, os, sys
os.environ["TF_USE_LEGACY_KERAS"] = sys.argv[2]
from hpcml.tracking import heartbeat
heartbeat.begin()
import tensorflow as tf
from pathlib import Path
from hpcml.training import beats, tensorflow as training
from hpcml.training.common import Expected
from hpcml.tracking.journal import Journal

told = []
class Look(tf.keras.callbacks.Callback):
    def look(self, *_, **__):
        beat = heartbeat.read(Path(os.environ[heartbeat.VARIABLE]))
        told[-1].append([beat.step, beat.phase])
    on_train_begin = on_train_batch_end = on_test_end = on_train_end = look

model = tf.keras.Sequential([tf.keras.Input((3,)), tf.keras.layers.Dense(1)])
model.compile("sgd", "mse", steps_per_execution=2)
data = tf.data.Dataset.from_tensor_slices((tf.ones((16, 3)), tf.ones((16, 1)))).batch(4)
own = training.callbacks(Journal(Path(sys.argv[1])), Expected("original"), global_batch=4, began=0.0, rank=0)
for _ in range(2):
    told.append([])
    model.fit(data, epochs=2, validation_data=data, verbose=0, callbacks=[*own, Look()])
beat = heartbeat.read(Path(os.environ[heartbeat.VARIABLE]))
print(json.dumps([*told, [beat.step, beat.phase], len(own)]))
"""


@needs_tensorflow
@pytest.mark.parametrize("legacy", ["1", "0"], ids=["keras-2", "keras-3"])
def test_keras_tells_its_steps_without_hooks_of_batches(beats: Path, tmp_path: Path, legacy: str) -> None:
    done = python(beats, KERAS, str(tmp_path / "0.0.rank.jsonl"), legacy)
    said, _ = done.communicate(timeout=240)
    assert done.returncode == 0, said
    first, second, last, callbacks = json.loads(said.splitlines()[-1])
    assert callbacks == 2, "a recorder and this"
    # At the beginning, after two training calls of two steps, in validation; twice; at the end.
    epoch = [[2, STEPPING], [4, STEPPING], [4, BETWEEN]]
    fit = [[0, BETWEEN], *epoch, *([step + 4, phase] for step, phase in epoch)]
    assert first[:-1] == fit and first[-1][0] == 8, first
    assert second[:-1] == [[8, BETWEEN], *([step + 8, phase] for step, phase in fit[1:])], second
    assert last == [16, IDLE]


# ------------------------------------------------------------------ whole runs, without a framework

# Ranks that train as one: nobody begins a step before all have ended the one before.
TOGETHER = """\
import os, time
from pathlib import Path
from hpcml.node import batch, bootstrap
from hpcml.tracking import heartbeat

heartbeat.begin()
place = bootstrap.received(os.environ).topology
run = batch.current_run().path

def all_reduce(step):
    (run / f"step.{{step}}.{{place.rank}}").touch()
    while len(list(run.glob(f"step.{{step}}.*"))) < place.world:
        time.sleep(0.01)

def train():
    for step in range(1, 11):
        {does}
        all_reduce(step)
        heartbeat.step(step)

with heartbeat.training():
    train()
"""
STALLS = "if (step, place.rank) == (7, 1): time.sleep(600)"
LEAVES = "if (step, place.rank) == (7, 1): break"
RESTS = "if step == 7: heartbeat.pause(); time.sleep(2.5)"
JOB = """
{work} = "{file}"
name = "together"
{strategy}
stall_timeout = "{timeout}"
[resources]
tasks_per_node = {tasks}
cpus_per_task = 1
time = "5"
"""
Started = Callable[..., RunDir]


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for the ranks' temporary files: a kernel's sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="hpcml-") as name:
        yield Path(name)


@pytest.fixture
def started(tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    """Run a job of several tasks here; its workers and its work keep their temporary files in ``short``."""

    def start(
        body: str, *, timeout: str = "00:00:02", tasks: int = 3, work: str = "script", strategy: str = ""
    ) -> RunDir:
        (tmp_path / "pyproject.toml").touch()
        file = "train.py" if work == "script" else "train.ipynb"
        if work == "script":
            (tmp_path / file).write_text(body)
        else:
            nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(body)]), tmp_path / file)
        (tmp_path / "job.toml").write_text(
            JOB.format(work=work, file=file, timeout=timeout, tasks=tasks, strategy=strategy)
        )
        for name, value in {"HPCML_DEVICES": "cpu", "TMPDIR": str(short)}.items():
            monkeypatch.setenv(name, value)
        wanted, where = job.load(tmp_path / "job.toml"), site.load("local")
        decided = plan.resolve(wanted, where, facts.gather(wanted, where, ask_queue=False))
        run = local.make(decided, tmp_path / "runs")
        local.run(decided, run)
        return run

    return start


def stacks_of(run: RunDir, rank: int) -> str:
    return run.log(rank).read_text().partition(f"; the stacks of rank {rank}:\n")[2].partition("\nhpcml: ")[0]


@pytest.mark.parametrize("work", ["script", "notebook"])
def test_a_stall_ends_the_run_with_the_stacks_of_all_ranks(started: Started, short: Path, work: str) -> None:
    run = started(TOGETHER.format(does=STALLS), work=work)
    marker = rundir.read_json(run.status)
    assert (marker["state"], marker["exit_code"], marker["failed_rank"], marker["signal"]) == ("FAILED", 1, 1, None)
    lines = TOGETHER.format(does=STALLS).splitlines()
    slept = lines.index("        " + STALLS) + 1
    place = f"train.py line {slept} in train" if work == "script" else f"line {slept} of its cell in train"
    assert marker["reason"].startswith(f"no step for 2 s after step 6: rank 1 is at {place}, "), marker["reason"]
    assert f"; stacks of all ranks are in their logs (hpcml logs {run.id})" in marker["reason"]
    for rank in range(3):
        stacks, log = stacks_of(run, rank), run.log(rank).read_text()
        assert "in train\n" in stacks and ("in all_reduce\n" in stacks) == (rank != 1), (rank, log)
        assert log.endswith(f"hpcml: {marker['reason']}\n") or rank == 1, log
    assert not list(short.iterdir()), "nothing of it is left on the node"


def test_a_rank_that_left_the_loop_is_named(started: Started) -> None:
    run = started(TOGETHER.format(does=LEAVES) + "all_reduce('last')\n")
    marker = rundir.read_json(run.status)
    assert (marker["failed_rank"], marker["state"]) == (1, "FAILED"), marker
    assert "rank 1 is past its training (train.py line" in marker["reason"], marker["reason"]


def test_a_rank_that_has_ended_is_named(started: Started) -> None:
    run = started(TOGETHER.format(does=LEAVES))
    reason = rundir.read_json(run.status)["reason"]
    assert "rank 1 ended with exit code 0, the others are at step 6" in reason
    assert "stacks of ranks 0 and 2 are in the logs" in reason


def test_a_rank_that_cannot_be_looked_into_does_not_hold_up_the_others(started: Started) -> None:
    stops = "if (step, place.rank) == (7, 1): import signal; os.kill(os.getpid(), signal.SIGSTOP)"
    run = started(TOGETHER.format(does=stops))
    marker = rundir.read_json(run.status)
    assert marker["state"] == "FAILED" and "no step for 2 s after step 6: rank 1 is at step 6" in marker["reason"], (
        marker
    )
    assert "stacks of ranks 0 and 2 are in the logs" in marker["reason"]
    assert "none to be had of it: its process" in stacks_of(run, 1) and "in state T (stopped)" in stacks_of(run, 1)


@pytest.mark.parametrize(
    ("does", "timeout", "tasks"),
    [
        pytest.param(RESTS, "00:00:02", 2, id="a pause that is told"),
        pytest.param("if step == 7: time.sleep(2.5)", "off", 2, id="switched off"),
        pytest.param("if step == 7: time.sleep(2.5)", "00:00:02", 1, id="one rank waits for nobody"),
        pytest.param("if step == 1: time.sleep(2.5)", "00:00:02", 2, id="the first step may compile"),
    ],
)
def test_what_takes_its_time_is_no_stall(started: Started, short: Path, does: str, timeout: str, tasks: int) -> None:
    run = started(TOGETHER.format(does=does), timeout=timeout, tasks=tasks)
    assert rundir.read_json(run.status)["state"] == "COMPLETED", run.log(0).read_text()
    assert not run.stalled.exists() and not list(short.iterdir())


# ------------------------------------------------------------------ a real collective

DDP = """
import time
import hpcml
run = hpcml.begin(strategy="ddp")
import torch
torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
def elsewhere():
    time.sleep(600)
for epoch in run.epochs(1, model, global_batch=world):
    for step, _ in enumerate(run.steps(iter(lambda: 0, 1)), 1):
        if (step, rank) == (12, 1):
            elsewhere()
        model(torch.ones(1, 4)).sum().backward()
"""


@needs_torch
def test_an_all_reduce_that_waits_for_a_rank_elsewhere(started: Started) -> None:
    run = started(DDP, timeout="00:00:04", tasks=2, strategy='strategy = "ddp"')
    marker = rundir.read_json(run.status)
    assert marker["state"] == "FAILED"
    assert (
        "no step for 4 s after step 11: rank 0 is at train.py line 15, rank 1 is at train.py line 10 in elsewhere"
        in (marker["reason"])
    )
    assert "in _engine_run_backward" in stacks_of(run, 0) and "in elsewhere" in stacks_of(run, 1)


def test_the_signal_is_nobody_elses() -> None:
    assert signal.SIGRTMIN < heartbeat.DUMP < signal.SIGRTMAX
