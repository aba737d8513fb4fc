"""Profiles: where the window lies, what comes of a profiler that fails, and what the split of step time says."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcml.errors import HpcmlError
from hpcml.rundir import RunDir
from hpcml.tracking import journal, profile
from hpcml.tracking.profile import Split, advise
from hpcml.training.profile import ProfiledSteps, Profiler, clamp, only_clock

# ------------------------------------------------------------------ the window


@pytest.mark.parametrize(
    ("asked", "steps", "epochs", "window", "says"),
    [
        ((10, 20), 100, 1, (10, 20), ""),
        ((10, 20), 20, 3, (10, 20), ""),
        ((1, 5), 5, 1, (1, 5), ""),
        ((10, 20), 14, 3, (4, 14), "a profile lies within one epoch of 14"),
        ((10, 20), 5, 9, (6, 10), "a profile lies within one epoch of 5"),
        ((10, 20), 15, 1, (5, 15), "the training has 15"),
        ((100, 110), 10, 3, (21, 30), "the training has 30"),
        ((10, 20), 5, 1, (2, 5), "the training has 5"),  # step 1 builds the graph
        ((3, 14), 10, 2, (11, 20), "a profile lies within one epoch of 10"),
        ((10, 20), 1, 1, (1, 1), "the training has 1"),
        ((10, 20), 1, 30, (10, 10), "a profile lies within one epoch of 1"),
        ((10, 20), None, 3, (10, 20), ""),
        ((10, 20), 5, None, (10, 20), ""),
    ],
)
def test_a_window_is_moved_into_one_epoch_of_the_training(
    asked: tuple[int, int], steps: int | None, epochs: int | None, window: tuple[int, int], says: str
) -> None:
    moved, note = clamp(asked, steps, epochs)
    assert moved == window
    assert note == (says and f"profile of steps {window[0]} to {window[1]} instead of {asked[0]} to {asked[1]}: {says}")


@pytest.mark.parametrize(
    ("asked", "steps", "epochs", "a_call", "window", "says"),
    [
        ((6, 10), 20, 1, 5, (6, 10), ""),
        ((7, 8), 20, 1, 5, (6, 10), "a call trains 5"),
        ((10, 20), 15, 3, 5, (16, 30), "a profile lies within one epoch of 15"),  # the first call builds the graph
        ((10, 20), 15, 1, 5, (6, 15), "the training has 15"),
        ((18, 19), 19, 1, 5, (16, 19), "a call trains 5"),
        ((2, 3), 20, 2, 5, (1, 5), "a call trains 5"),
        ((1, 1), 4, 1, 5, (1, 4), "a call trains 5"),
    ],
)
def test_a_window_holds_whole_calls(
    asked: tuple[int, int], steps: int, epochs: int, a_call: int, window: tuple[int, int], says: str
) -> None:
    moved, note = clamp(asked, steps, epochs, a_call)
    assert moved == window
    assert note.endswith(says) and bool(note) == bool(says)


@given(st.integers(1, 500), st.integers(0, 199), st.integers(1, 60), st.integers(1, 8))
def test_a_window_always_lies_in_one_epoch_and_is_as_long_as_fits(
    first: int, more: int, steps: int, epochs: int
) -> None:
    (start, end), _ = clamp((first, first + more), steps, epochs)
    assert 1 <= start <= end <= steps * epochs
    assert (start - 1) // steps == (end - 1) // steps
    assert end - start + 1 >= min(more + 1, steps) - (start == 2)


# ------------------------------------------------------------------ the steps of a training


class Training:
    """Steps driven by hand under a profiler that writes down what it is asked."""

    def __init__(self, folder: Path, asked: tuple[int, int], *, rank: int = 0, fails: str = "") -> None:
        self.events: list[str] = []
        self.fails = fails
        self.folder = folder
        tool = Profiler(self.start, self.stop, self.mark, lambda result: self.events.append("wait"))
        self.steps = ProfiledSteps(
            journal.Journal(folder / f"{rank}.0.rank.jsonl"),
            asked,
            tool if rank == 0 else only_clock(tool.wait),
            rank=rank,
            virtual=True,
        )
        self.left_out: list[int] = []

    def start(self) -> None:
        if self.fails == "start":
            raise RuntimeError("another profiler runs\nand more")
        self.events.append("start")

    def stop(self) -> Path:
        self.events.append("stop")
        if self.fails == "stop":
            raise OSError("disk full")
        return Path("profile/session")

    @contextlib.contextmanager
    def mark(self, step: int) -> Iterator[None]:
        self.events.append(f"mark {step}")
        yield

    def train(self, step: int) -> int:
        self.events.append(f"train {step}")
        return step

    def run(self, steps: int, epochs: int, a_call: int = 1, known: bool = True) -> Training:
        for epoch in range(epochs):
            watch = self.steps.begin_epoch(steps if known else None, epochs - epoch, a_call)
            for step in range(0, steps, a_call):
                train = functools.partial(self.train, epoch * steps + step + 1)
                self.steps.watched(train) if watch else train()
            self.events.append("epoch")
            self.steps.end_epoch()
            self.left_out.append(self.steps.left_out_steps)
        return self

    def around(self) -> list[str]:
        """What happens from one event before the profiler starts to one after it stops."""
        return self.events[self.events.index("start") - 1 : self.events.index("stop") + 2]

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in journal.read(self.folder) if record["kind"] == kind]


def test_the_profiler_runs_from_before_the_first_step_to_after_the_last(tmp_path: Path) -> None:
    training = Training(tmp_path, (3, 4)).run(6, 1)
    assert training.around() == ["wait", "start", "mark 3", "train 3", "mark 4", "train 4", "wait", "stop", "train 5"]
    assert [e for e in training.events if e.startswith("train")] == [f"train {n}" for n in range(1, 7)]
    (record,) = training.records("profiled")
    assert (record["first"], record["last"], record["calls"]) == (3, 4, 2)
    assert (record["folder"], record["virtual"]) == ("profile/session", True)
    assert training.left_out == [2]
    assert training.steps.left_out_s > 0


def test_a_window_that_ends_with_its_epoch_ends_before_the_validation(tmp_path: Path) -> None:
    training = Training(tmp_path, (7, 9)).run(3, 4)
    around = training.around()
    assert around[:2] == ["epoch", "start"]
    assert around[-4:] == ["wait", "epoch", "stop", "train 10"]
    assert training.left_out == [0, 0, 3, 0]
    assert training.events.count("start") == 1


def test_a_window_that_had_to_be_moved_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(tmp_path, (10, 20)).run(5, 1)
    (record,) = training.records("profiled")
    assert (record["first"], record["last"]) == (2, 5)
    (message,) = training.records("message")
    assert message["level"] == "info" and message["text"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "steps", "a_call", "first", "last", "calls"),
    [((5, 7), 20, 4, 5, 8, 1), ((6, 10), 20, 4, 5, 12, 2), ((10, 10), 10, 4, 9, 10, 1), ((1, 1), 8, 8, 1, 8, 1)],
)
def test_several_steps_of_one_call_are_profiled_as_a_whole(
    tmp_path: Path, asked: tuple[int, int], steps: int, a_call: int, first: int, last: int, calls: int
) -> None:
    (record,) = Training(tmp_path, asked).run(steps, 2, a_call).records("profiled")
    assert (record["first"], record["last"], record["calls"]) == (first, last, calls)


def test_an_epoch_of_unknown_length_ends_the_window(tmp_path: Path) -> None:
    training = Training(tmp_path, (5, 20)).run(8, 3, known=False)
    (record,) = training.records("profiled")
    assert (record["first"], record["last"]) == (5, 8)
    assert training.left_out == [4, 0, 0]


def test_other_ranks_leave_the_same_steps_out_and_the_one_that_waits_for_rank_0(tmp_path: Path) -> None:
    training = Training(tmp_path, (3, 4), rank=1).run(8, 1)
    assert training.left_out == [3]
    assert training.records("profiled") == []
    assert "start" not in training.events


@pytest.mark.parametrize("fails", ["start", "stop"])
def test_a_profiler_that_fails_costs_the_profile_only(
    tmp_path: Path, fails: str, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(tmp_path, (3, 4), fails=fails).run(6, 2)
    assert [e for e in training.events if e.startswith("train")] == [f"train {n}" for n in range(1, 13)]
    assert training.records("profiled") == []
    (message,) = training.records("message")
    assert message["level"] == "warning"
    assert "no profile, the training goes on" in message["text"] and "\n" not in message["text"]
    assert message["text"] in capsys.readouterr().err


def test_a_training_that_breaks_off_and_begins_again_still_has_one_profile(tmp_path: Path) -> None:
    training = Training(tmp_path, (2, 4))
    training.steps.begin_epoch(6, 1)

    def interrupted() -> None:
        raise KeyboardInterrupt

    training.steps.watched(lambda: None)
    with pytest.raises(KeyboardInterrupt):
        training.steps.watched(interrupted)
    training.run(6, 2)
    (record,) = training.records("profiled")
    assert (record["first"], record["last"]) == (2, 4)
    assert training.left_out == [3, 0]
    assert training.events.count("start") == training.events.count("stop") == 2


def test_a_window_that_begins_where_an_epoch_of_unknown_length_ends_comes_with_the_next(tmp_path: Path) -> None:
    (record,) = Training(tmp_path, (9, 10)).run(8, 2, known=False).records("profiled")
    assert (record["first"], record["last"], record["calls"]) == (9, 10, 2)


# ------------------------------------------------------------------ real trainings

TRAINING = """
import os, sys, time
from pathlib import Path
import numpy as np
import tensorflow as tf
from hpcml.tracking.journal import Journal
from hpcml.training import tensorflow as training

expected = training.Expected("original", virtual=True)
training.configure(expected, precision="float32")

def rows():  # an input pipeline that takes 10 ms a step, where a step takes about 2
    for _ in range(12):
        time.sleep(0.01)
        yield np.ones((8, 4), "float32"), np.zeros(8, "int64")

slow = tf.data.Dataset.from_generator(rows, output_signature=(tf.TensorSpec((8, 4)), tf.TensorSpec(8, tf.int64)))
slow = slow.apply(tf.data.experimental.assert_cardinality(12))
fast = tf.data.Dataset.from_tensor_slices((tf.ones((96, 4)), tf.zeros(96, tf.int64))).batch(8)

def train(name, data, window, epochs=2, rank=0, **more):
    run = Path(sys.argv[1]) / name
    callbacks = training.callbacks(
        Journal(run / "events" / f"{rank}.0.rank.jsonl"), expected, global_batch=8, began=time.perf_counter(), rank=rank,
        profile=window, folder=run / "profile",
    )
    model = tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(3)])
    model.compile("sgd", tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True), **more)
    model.fit(data, epochs=epochs, verbose=0, callbacks=callbacks, validation_data=fast.take(1))
    assert model.train_function.__name__ != "watched", "the profile is over and still costs something"

train("input", slow, (14, 18))
train("calls", fast, (16, 17), steps_per_execution=4)
train("whole", fast, (1, 50), epochs=1)
train("other", fast, (4, 6), rank=1)
(Path(sys.argv[1]) / "fails").mkdir()
(Path(sys.argv[1]) / "fails" / "profile").touch()
train("fails", fast, (4, 6))
(Path(sys.argv[1]) / "lost" / "profile").mkdir(parents=True)
(Path(sys.argv[1]) / "lost" / "profile" / "plugins").touch()
train("lost", fast, (4, 6))
"""


@pytest.fixture(scope="module", params=["1", "0"], ids=["tf-keras", "Keras 3"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (importlib.util.find_spec("tensorflow") and importlib.util.find_spec("tf_keras")):
        pytest.skip("TensorFlow: not installed (pip install 'hpcml[tensorflow]')")
    folder = tmp_path_factory.mktemp("trained")
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": request.param, "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in journal.read(run / "events") if record["kind"] == kind]


def epochs(run: Path) -> dict[int, dict[str, float]]:
    return {record["step"]: record["values"] for record in records(run, "metric")}


@pytest.fixture
def needs_xprof() -> None:
    if not importlib.util.find_spec("xprof"):
        pytest.skip("xprof: not installed (pip install 'hpcml[profile]')")


@pytest.mark.usefixtures("needs_xprof")
def test_a_slow_input_is_seen_in_the_split(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained / "input"
    found = profile.record(RunDir(trained, "input"))
    assert found is not None
    (record,) = records(run, "profile")
    assert (record["first"], record["last"], record["steps"], record["rank"]) == (14, 18, 5, 0)
    parts = record["split"]
    assert set(parts) == {"step_ms", *(f"{name}_ms" for name in profile.PARTS)}
    assert sum(ms for name, ms in parts.items() if name != "step_ms") == pytest.approx(parts["step_ms"], rel=1e-3)
    assert next(iter(found.shares)) == "input"
    assert parts["step_ms"] > 8  # 10 ms of sleep a step, partly beside other work
    assert "of a step is input" in record["advice"] and "prefetch" in record["advice"]
    assert "this machine only" in record["advice"]
    assert (trained / "input" / record["folder"]).is_dir()
    told = capsys.readouterr().out
    assert "profile of steps 14 to 18" in told and record["advice"] in told
    assert profile.record(RunDir(trained, "input")) is None  # once for each profile
    assert len(records(run, "profile")) == 1


@pytest.mark.usefixtures("needs_xprof")
def test_a_step_of_several_in_one_call_is_split_as_one(trained: Path) -> None:
    found = profile.record(RunDir(trained, "calls"))
    assert (
        found is not None and found.steps == 8
    )  # one call ends with the window's first step, one begins with its last
    (window,) = records(trained / "calls", "profiled")
    assert (window["first"], window["last"], window["calls"]) == (13, 20, 2)
    whole = profile.split(trained / "calls" / window["folder"])
    assert whole is not None and (whole.steps, whole.step_ms) == (2, pytest.approx(4 * found.step_ms))
    (record,) = records(trained / "calls", "profile")
    assert "input_ms" not in record["split"] and "profile once with 1" in record["advice"]


def test_profiled_steps_are_left_out_of_the_measured_speed(trained: Path) -> None:
    with_profile = epochs(trained / "input")[2]
    assert with_profile["profiled_steps"] == 5
    assert "profiled_steps" not in epochs(trained / "input")[1]
    clean_s = (12 - 5) * 8 / with_profile["samples_per_s"]
    assert with_profile["step_time_ms"] == pytest.approx(1000 * clean_s / 7)
    assert clean_s < with_profile["epoch_time_s"]


def test_an_epoch_that_is_profiled_as_a_whole_still_has_a_speed(trained: Path) -> None:
    (window,) = records(trained / "whole", "profiled")
    assert (window["first"], window["last"]) == (1, 12)
    assert "instead of 1 to 50" in records(trained / "whole", "message")[0]["text"]
    values = epochs(trained / "whole")[1]
    assert values["profiled_steps"] == 12
    assert values["samples_per_s"] * values["epoch_time_s"] == pytest.approx(96)


def test_only_rank_0_profiles(trained: Path) -> None:
    assert not (trained / "other" / "profile").exists()
    assert records(trained / "other", "profiled") == []
    assert epochs(trained / "other")[1]["profiled_steps"] == 4  # and the step that waits for rank 0


@pytest.mark.parametrize("scene", ["fails", "lost"])
def test_a_folder_that_cannot_be_written_does_not_end_the_training(trained: Path, scene: str) -> None:
    assert set(epochs(trained / scene)) == {0, 1, 2}
    assert records(trained / scene, "profiled") == []
    (message,) = records(trained / scene, "message")
    assert message["level"] == "warning"
    assert "no profile, the training goes on" in message["text"]


# ------------------------------------------------------------------ the split and what it says


def of(**parts: float) -> Split:
    return Split(5, sum(parts.values()), **{f"{name}_ms": ms for name, ms in parts.items()})


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"input": 6.0, "device_compute": 4.0}, ["60 % of a step is input", "cache()", "prefetch", "cpus_per_task"]),
        ({"host": 5.0, "device_compute": 4.0}, ["56 % of a step is host", "steps_per_execution", "jit_compile"]),
        ({"device_compute": 9.0, "idle": 1.0}, ["90 % of a step is device compute", "mixed_float16", "larger batch"]),
        (
            {"communication": 5.0, "device_compute": 4.0},
            ["communication", "larger batch for each replica", "all-reduces"],
        ),
        ({"idle": 5.0, "device_compute": 4.0}, ["is idle", "steps_per_execution", "callbacks"]),
        ({"host": 5.0, "idle": 4.0}, ["no work of a GPU", "CUPTI"]),
    ],
)
def test_each_largest_part_has_its_advice(parts: dict[str, float], says: list[str]) -> None:
    text = advise(of(**parts), on_cpu=False)
    for words in says:
        assert words in text
    assert "this machine only" not in text


def test_on_cpus_computing_is_host_and_the_split_is_this_machines() -> None:
    text = advise(of(host=9.0, idle=1.0), on_cpu=True)
    assert "90 % of a step is host" in text and "computing itself counts as host" in text
    assert text.endswith("Measured on CPU devices, this tells about this machine only; on GPUs the parts are others.")
    assert "profile once with 1" not in text
    looped = dataclasses.replace(of(host=9.0, idle=1.0), in_loop=True)
    assert "profile once with 1" in advise(looped, on_cpu=True)


def test_shares_add_up_and_a_step_of_no_time_has_none() -> None:
    shares = of(input=1.0, host=2.0, device_compute=3.0, communication=4.0, idle=5.0).shares
    assert list(shares) == ["idle", "communication", "device_compute", "host", "input"]
    assert sum(shares.values()) == pytest.approx(1)
    assert set(Split(1, 0.0).shares.values()) == {0.0}


# ------------------------------------------------------------------ the end of a run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path, "run").make()


def profiled(run: RunDir, session: str = "profile/plugins/profile/1", restart: int = 0) -> Path:
    """A run whose training has profiled steps 3 to 5; returns the folder of the profile."""
    writer = journal.Journal(run.event_file(0, restart, "rank"))
    writer.write("profiled", first=3, last=5, calls=3, folder=session, virtual=True)
    (run.path / session).mkdir(parents=True)
    return run.path / session


def end(run: RunDir, **environment: str) -> subprocess.CompletedProcess[str]:
    """What is called at the end of a run."""
    return subprocess.run(
        [sys.executable, "-m", "hpcml.tracking.profile", str(run.path)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def messages(run: RunDir) -> list[str]:
    return [record["text"] for record in journal.read(run.events) if record["kind"] == "message"]


def test_a_run_without_a_profile_is_left_alone(run: RunDir) -> None:
    done = end(run)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(run.events.iterdir()) == []


def test_a_profile_that_was_asked_for_and_never_taken_is_told_once(run: RunDir) -> None:
    run.plan.write_text(json.dumps({"profile": [10, 20]}))
    assert end(run).returncode == 0
    assert "no profile of steps 10 to 20" in messages(run)[0]
    end(run)
    assert len(messages(run)) == 1


def test_without_xprof_the_way_to_it_is_told(run: RunDir, tmp_path: Path) -> None:
    (profiled(run) / "host.xplane.pb").write_bytes(b"\n\x00")
    (tmp_path / "without" / "xprof").mkdir(parents=True)
    (tmp_path / "without" / "xprof" / "__init__.py").write_text("raise ImportError('no xprof here')")
    done = end(run, PYTHONPATH=str(tmp_path / "without"))
    assert done.returncode == 0
    assert "no xprof here" in done.stderr and "pip install 'hpcml[profile]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert "pip install 'hpcml[profile]'" in messages(run)[0]


@pytest.mark.usefixtures("needs_xprof")
@pytest.mark.parametrize("content", [None, b"", b"not a profile at all"])
def test_a_profile_that_cannot_be_read_is_a_message(run: RunDir, content: bytes | None) -> None:
    folder = profiled(run)
    if content is not None:
        (folder / "host.xplane.pb").write_bytes(content)
    done = end(run)
    assert done.returncode == 0
    assert len(messages(run)) == 1 and str(folder) in messages(run)[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("does", "says"), [("import time; time.sleep(60)", "within 1 s"), ("import os; os._exit(134)", "exit code 134")]
)
def test_a_converter_that_hangs_or_dies_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, says: str
) -> None:
    (tmp_path / "xprof").mkdir()
    (tmp_path / "xprof" / "__init__.py").write_text(does)
    (tmp_path / "host.xplane.pb").write_bytes(b"")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(HpcmlError, match=says):
        profile.split_apart(tmp_path, timeout_s=1)


def test_a_restarted_run_has_the_split_of_its_last_profile(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    profiled(run, "profile/plugins/profile/1")
    folder = profiled(run, "profile/plugins/profile/2", restart=1)
    monkeypatch.setattr(profile, "split_apart", lambda asked: of(input=2.0) if asked == folder else None)
    assert profile.record(run) == of(input=2.0)
    (record,) = [record for record in journal.read(run.events) if record["kind"] == "profile"]
    assert (record["restart"], record["folder"]) == (1, "profile/plugins/profile/2")
