"""Profiles of torch trainings: the split of traces made by hand, of GPUs too, and of a real training under Gloo."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcml import rundir
from hpcml.errors import HpcmlError
from hpcml.rundir import RunDir
from hpcml.tracking import journal, profile, torch_trace
from hpcml.tracking.profile import Split, advise

# ------------------------------------------------------------------ traces made by hand

Event = dict[str, Any]


def event(category: str, name: str, began_ms: float, ms: float, **args: Any) -> Event:
    return {"ph": "X", "cat": category, "name": name, "ts": 1000 * began_ms, "dur": 1000 * ms, "args": args}


def step(number: int, began_ms: float, ms: float) -> Event:
    return event("user_annotation", f"ProfilerStep#{number}", began_ms, ms)


def waits(began_ms: float, ms: float) -> Event:
    return event("user_annotation", "hpcml.input", began_ms, ms)


def op(name: str, began_ms: float, ms: float) -> Event:
    return event("cpu_op", name, began_ms, ms)


class Gpu:
    """Launches and the work of them."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def work(self, category: str, name: str, launched_ms: float, began_ms: float, ms: float) -> Gpu:
        number = len(self.events)
        self.events.append(event("cuda_runtime", "cudaLaunchKernel", launched_ms, 0, correlation=number))
        self.events.append(event(category, name, began_ms, ms, correlation=number))
        return self

    def kernel(self, launched_ms: float, began_ms: float, ms: float, name: str = "sm90_xmma_gemm_bf16") -> Gpu:
        return self.work("kernel", name, launched_ms, began_ms, ms)


NCCL = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


def write(folder: Path, events: list[Event], **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rank0.pt.trace.json.gz"
    with gzip.open(file, "wt") as text:
        json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, *events], **more}, text)
    return file


def parts(folder: Path, events: list[Event], **more: Any) -> dict[str, float]:
    """The parts that are not zero, in ms a step, after a check that all of them add up."""
    random.Random(1).shuffle(events)  # the order in the file must not matter
    split = profile.split(write(folder, events, **more).parent)
    assert split is not None
    found = {name: round(getattr(split, f"{name}_ms"), 6) for name in profile.PARTS}
    assert sum(found.values()) == pytest.approx(split.step_ms)
    return {name: ms for name, ms in found.items() if ms}


def test_a_gpu_that_computes_hides_host_input_and_communication(tmp_path: Path) -> None:
    gpu = Gpu().kernel(1, 2, 7).kernel(1.5, 4, 4, NCCL)
    events = [step(1, 0, 10), waits(2, 2), op("aten::mm", 0, 9), *gpu.events]
    assert parts(tmp_path, events) == {"device_compute": 7, "host": 2, "idle": 1}


def test_a_collective_counts_only_where_no_computing_hides_it(tmp_path: Path) -> None:
    gpu = Gpu().kernel(0, 0, 5).kernel(1, 4, 4, NCCL)
    assert parts(tmp_path, [step(1, 0, 10), *gpu.events]) == {"device_compute": 5, "communication": 3, "idle": 2}


def test_waiting_for_data_comes_before_a_collective_and_the_host(tmp_path: Path) -> None:
    gpu = Gpu().kernel(0.1, 1, 4, NCCL)
    torch_own = event("user_annotation", "enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__", 8, 1)
    events = [step(1, 0, 10), waits(0, 3), op("aten::select", 0, 7), torch_own, *gpu.events]
    assert parts(tmp_path, events) == {"input": 4, "communication": 2, "host": 2, "idle": 2}


def test_copies_count_by_their_direction(tmp_path: Path) -> None:
    gpu = Gpu().work("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 0, 0, 1)
    gpu.work("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 0, 2, 2)
    gpu.work("gpu_memcpy", "Memcpy PtoP (Device -> Device)", 0, 5, 3)
    gpu.work("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 0, 9, 4)
    gpu.work("gpu_memset", "Memset (Device)", 0, 14, 5)
    found = parts(tmp_path, [step(1, 0, 20), *gpu.events])
    assert found == {"input": 1, "host": 2, "communication": 3, "device_compute": 9, "idle": 5}


def test_work_that_goes_on_after_the_last_step_belongs_to_it(tmp_path: Path) -> None:
    # The host is done with both steps after 4 ms; the GPU works through what they launched until 20.
    gpu = Gpu().kernel(1, 1, 9).kernel(3, 10, 10)
    assert parts(tmp_path, [step(1, 0, 2), step(2, 2, 2), *gpu.events]) == {"device_compute": 9.5, "idle": 0.5}


def test_what_a_loop_does_between_its_steps_is_left_out(tmp_path: Path) -> None:
    # Between the steps the ranks' weights are compared, which takes a collective of its own.
    gpu = Gpu().kernel(1, 2, 4).kernel(21, 22, 4).kernel(8, 9, 5, NCCL)
    events = [step(1, 0, 5), op("c10d::allgather_", 7, 9), step(2, 20, 10), *gpu.events]
    # The first step's kernel ends 1 ms after its span.
    assert parts(tmp_path, events) == {"device_compute": 4, "idle": 4}


def test_a_step_that_waited_for_a_batch_which_never_came_is_none(tmp_path: Path) -> None:
    events = [step(7, 0, 10), op("aten::mm", 0, 10), step(8, 10, 3), waits(10, 3)]
    assert parts(tmp_path / "kept", events, hpcml_steps=[7]) == {"host": 10}
    assert parts(tmp_path / "all", events) == {"host": 5, "input": 1.5}


def test_without_a_gpu_the_host_computes_and_hides_gloo(tmp_path: Path) -> None:
    gloo = event("user_annotation", "gloo:all_reduce", 3, 5)
    events = [step(1, 0, 10), waits(0, 1), op("aten::select", 0, 1), op("aten::mm", 1, 3), gloo]
    events += [op("c10d::allreduce_", 3, 4), op("_c10d_functional::wait_tensor", 4, 4)]
    found = parts(tmp_path, [*events, event("user_annotation", "Optimizer.step#SGD.step", 8, 2)])
    assert found == {"input": 1, "host": 3, "communication": 4, "idle": 2}


def test_the_gpus_copy_of_a_steps_span_is_no_step(tmp_path: Path) -> None:
    gpu = Gpu().kernel(0, 0, 4)
    copy = event("gpu_user_annotation", "ProfilerStep#1", 3, 90)
    assert parts(tmp_path, [step(1, 0, 10), copy, *gpu.events]) == {"device_compute": 4, "idle": 6}


def test_work_of_a_launch_that_was_not_traced_counts_where_it_began(tmp_path: Path) -> None:
    events = [step(1, 10, 10), event("kernel", "k", 5, 4), event("kernel", "k", 12, 4)]
    assert parts(tmp_path, events) == {"device_compute": 4, "idle": 6}


def test_a_trace_without_steps_has_no_split(tmp_path: Path) -> None:
    assert profile.split(write(tmp_path, [op("aten::mm", 0, 1)]).parent) is None
    assert profile.split(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"{", mtime=0), gzip.compress(b"[1]", mtime=0), gzip.compress(b"{}", mtime=0)],
)
def test_a_trace_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    file = write(tmp_path, [])
    file.write_bytes(content)
    with pytest.raises(HpcmlError, match=r"rank0.pt.trace.json.gz can't be read(?s:.*)profile again"):
        profile.split(tmp_path)


def test_a_torn_trace_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, [op(f"aten::{n}", n, 1) for n in range(500)])
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(HpcmlError, match="can't be read"):
        profile.split(tmp_path)


def test_the_newest_session_is_read(tmp_path: Path) -> None:
    for number, ms in ((1, 5), (2, 7)):
        file = write(tmp_path / f"session-{number}", [step(1, 0, ms), op("aten::mm", 0, ms)])
        os.utime(file, (number, number))
    (tmp_path / "session-1" / ".part.rank0.pt.trace.json.gz").touch()  # newer, but never finished
    found = profile.split(tmp_path)
    assert found is not None and found.step_ms == 7


intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda pair: (pair[0], pair[0] + pair[1])))


@given(intervals, intervals)
def test_union_and_subtract_are_those_of_sets(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    def cells(of: Any) -> set[int]:
        return {cell for begin, end in of for cell in range(int(begin), int(end))}

    joined = torch_trace.union(some)
    assert cells(joined) == cells(some)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(joined))
    left = torch_trace.subtract(joined, torch_trace.union(others))
    assert cells(left) == cells(some) - cells(others)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(left))


# ------------------------------------------------------------------ what it says


def of(**parts: float) -> Split:
    return Split(5, sum(parts.values()), **{f"{name}_ms": ms for name, ms in parts.items()})


@pytest.mark.parametrize(
    ("largest", "says"),
    [
        ("input", ["num_workers", "pin_memory", "non_blocking", "cpus_per_task"]),
        ("host", ["torch.compile", "fused=True", ".item()"]),
        ("device_compute", ["bfloat16", "torch.compile", "larger batch"]),
        ("communication", ["gradient_as_bucket_view", "bucket_cap_mb", "no_sync", "bf16_compress_hook"]),
        ("idle", ["torch.compile", ".item()"]),
    ],
)
def test_the_advice_is_torchs_own(largest: str, says: list[str]) -> None:
    text = advise(of(**({"device_compute": 4.0} | {largest: 6.0})), on_cpu=False, framework="torch")
    for words in says:
        assert words in text
    for words in ("tf.data", "jit_compile", "steps_per_execution", "cache()", "tensorflow"):
        assert words not in text
    on_cpu = advise(of(idle=1.0, **({"host": 4.0} | {largest: 6.0} if largest != "idle" else {"host": 0.5})),
                    on_cpu=True, framework="torch")  # fmt: skip
    assert "this machine only" in on_cpu and "steps_per_execution" not in on_cpu and "pin_memory" not in on_cpu


def test_a_gpu_job_whose_profile_holds_no_gpu_is_told() -> None:
    assert "CUPTI" in advise(of(host=5.0, idle=1.0), on_cpu=False, framework="torch")
    assert "CUPTI" not in advise(of(host=5.0, idle=1.0), on_cpu=True, framework="torch")


# ------------------------------------------------------------------ real trainings

TRAINING = """
import sys, time
from pathlib import Path

import torch
from hpcml.tracking.journal import Journal
from hpcml.training import ddp, torch as training
from hpcml.training.common import Expected

expected, cpu = Expected("ddp", virtual=True), torch.device("cpu")
rows = torch.randn(96, 4)
alive = []  # profilers made
made = torch.profiler.profile.__init__
torch.profiler.profile.__init__ = lambda self, *a, **k: (alive.append(self), made(self, *a, **k))[1]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows)


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return len(rows)

    def __getitem__(self, number):
        time.sleep(0.01)
        return rows[number]


def train(name, window, data=rows, epochs=2, each=lambda number: None, batch=8):
    run = Path(sys.argv[1]) / name
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loader = torch.utils.data.DataLoader(data, batch_size=batch)
    if isinstance(data, Stream):
        loader = (x for x in loader), (x for x in loader)  # generators, without a length
    loop = training.Training(
        Journal(run / "events" / "0.0.rank.jsonl"), expected, cpu, model=model, epochs=epochs, global_batch=batch,
        began=time.perf_counter(), rank=0, stop=ddp.Stop(Path(sys.argv[1]) / "none"), profile=window,
        folder=run / "profile",
    )
    alive.clear()
    number = 0
    for epoch in loop.epochs():
        for xs in loop.steps(loader[epoch - 1] if isinstance(loader, tuple) else loader):
            number += 1
            optimizer.zero_grad()
            model(xs).square().mean().backward()
            optimizer.step()
            if each(number):
                break
    return number


assert train("plain", None) == 24 and not alive
assert train("slow", (14, 18), Slow()) == 24 and len(alive) == 1
compare = training.same_weights
training.same_weights = lambda model, **more: (time.sleep(1), compare(model))[1]
assert train("checked", (8, 11)) == 24
training.same_weights = compare
assert train("whole", (1, 50), epochs=1) == 12
assert train("stream", (5, 40), Stream()) == 24
assert train("left", (3, 9), each=lambda number: number == 5) == 17
def kaput(number):
    if number == 5:
        raise KeyError("the user's own")
try:
    train("raises", (3, 9), each=kaput)
except KeyError:
    pass
(Path(sys.argv[1]) / "fails").mkdir()
(Path(sys.argv[1]) / "fails" / "profile").touch()
assert train("fails", (4, 6)) == 24
with torch.profiler.profile() as own:  # the user's; torch crashes where two run at once
    assert train("two", (4, 6)) == 24
own.export_chrome_trace(sys.argv[1] + "/own.json")
own = torch.profiler.profile()
def starts(number):
    if number == 5:
        own.start()
    if number == 9:
        own.stop()
assert train("later", (4, 6), each=starts) == 24
own.export_chrome_trace(sys.argv[1] + "/own-later.json")
own = torch.profiler.profile()
def within(number):
    if number == 5:
        own.start()
        own.stop()
assert train("within", (4, 6), each=within) == 24
own.export_chrome_trace(sys.argv[1] + "/own-within.json")
torch.profiler.profile.export_chrome_trace = lambda self, path: (_ for _ in ()).throw(OSError(28, "No space left"))
assert train("full", (4, 6)) == 24
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch: not installed (scripts/setup --torch)")
    folder = tmp_path_factory.mktemp("trained")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TRAINING, str(folder)], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return folder


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in journal.read(run / "events") if record["kind"] == kind]


def epochs(run: Path) -> dict[int, dict[str, float]]:
    return {record["step"]: record["values"] for record in records(run, "metric")}


def test_a_slow_loader_is_seen_in_the_split(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = profile.record(RunDir(trained, "slow"))
    assert found is not None
    (window,) = records(trained / "slow", "profiled")
    assert (window["first"], window["last"], window["calls"], window["framework"]) == (14, 18, 5, "torch")
    (record,) = records(trained / "slow", "profile")
    assert (record["first"], record["last"], record["steps"], record["rank"]) == (14, 18, 5, 0)
    split = record["split"]
    assert set(split) == {"step_ms", *(f"{name}_ms" for name in profile.PARTS)}
    assert sum(ms for name, ms in split.items() if name != "step_ms") == pytest.approx(split["step_ms"])
    assert next(iter(found.shares)) == "input" and split["input_ms"] > 80  # 8 rows of 10 ms
    assert split["host_ms"] > 0 and split["device_compute_ms"] == 0
    assert "of a step is input" in record["advice"] and "num_workers" in record["advice"]
    assert record["advice"] in capsys.readouterr().out
    (trace,) = (trained / "slow" / record["folder"]).iterdir()
    assert trace.name == "rank0.pt.trace.json.gz"
    names = {e["name"] for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {f"ProfilerStep#{n}" for n in range(14, 19)} == {name for name in names if name.startswith("ProfilerStep")}


def test_profiled_steps_are_left_out_of_the_measured_speed(trained: Path) -> None:
    with_profile = epochs(trained / "slow")[2]
    assert with_profile["profiled_steps"] == 5 and "profiled_steps" not in epochs(trained / "slow")[1]
    clean_s = (12 - 5) * 8 / with_profile["samples_per_s"]
    assert with_profile["step_time_ms"] == pytest.approx(1000 * clean_s / 7)
    assert 0 < clean_s < with_profile["epoch_time_s"]


def test_the_comparison_of_weights_inside_the_window_is_no_step_and_counted_once(trained: Path) -> None:
    """It comes after steps 1 and 10, and takes a second each time."""
    (window,) = records(trained / "checked", "profiled")
    assert (window["first"], window["last"]) == (8, 11)
    values = epochs(trained / "checked")[1]
    assert values["profiled_steps"] == 4
    assert 0 < 8 * 8 / values["samples_per_s"] < values["epoch_time_s"]
    found = profile.split(trained / "checked" / window["folder"])
    assert found is not None and found.steps == 4 and found.step_ms < 1000 / 4


def test_an_epoch_that_is_profiled_as_a_whole_still_has_a_speed(trained: Path) -> None:
    (window,) = records(trained / "whole", "profiled")
    assert (window["first"], window["last"]) == (1, 12)
    assert "instead of 1 to 50" in [m["text"] for m in records(trained / "whole", "message")][-1]
    values = epochs(trained / "whole")[1]
    assert values["profiled_steps"] == 12
    assert values["samples_per_s"] * values["epoch_time_s"] == pytest.approx(96)


def test_a_loader_of_unknown_length_ends_the_window_with_its_epoch(trained: Path) -> None:
    (window,) = records(trained / "stream", "profiled")
    assert (window["first"], window["last"], window["calls"]) == (5, 12, 8)
    found = profile.split(trained / "stream" / window["folder"])
    assert found is not None and found.steps == 8  # the ninth waited for a batch that never came


def test_a_loop_that_is_left_early_ends_the_window(trained: Path) -> None:
    (window,) = records(trained / "left", "profiled")
    assert (window["first"], window["last"], window["calls"]) == (3, 4, 2)  # the fifth was never finished
    found = profile.split(trained / "left" / window["folder"])
    assert found is not None and found.steps == 2


def test_a_training_that_breaks_off_keeps_what_it_has(trained: Path) -> None:
    (window,) = records(trained / "raises", "profiled")
    assert (window["first"], window["last"]) == (3, 4)


@pytest.mark.parametrize("scene", ["fails", "two", "later", "within", "full"])
def test_a_profile_that_fails_costs_the_profile_only(trained: Path, scene: str) -> None:
    assert set(epochs(trained / scene)) == {0, 1, 2}
    assert records(trained / scene, "profiled") == []
    (message,) = [m for m in records(trained / scene, "message") if m["level"] == "warning" and "profile" in m["text"]]
    assert "no profile, the training goes on" in message["text"]
    left = [p for p in (trained / scene).rglob("*") if p.name.startswith((".part", "rank0"))]
    assert left == []


# ------------------------------------------------------------------ a whole run

WORK = """
import time

import hpcml

run = hpcml.begin(strategy="ddp")

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
data = torch.utils.data.TensorDataset(torch.randn(96, 4), torch.randn(96, 1))
sampler = torch.utils.data.DistributedSampler(data)
loader = torch.utils.data.DataLoader(data, batch_size=8 // dist.get_world_size(), sampler=sampler)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.01)
for epoch in run.epochs(2, model, global_batch=8):
    for xs, ys in {steps}:
        optimizer.zero_grad()
        time.sleep(0.01 * dist.get_rank())  # the first rank has to wait for the second
        torch.nn.functional.mse_loss(model(xs), ys).backward()
        optimizer.step()
if "run.steps" not in {steps!r}:
    run.journal.write("replicas", in_sync=dist.get_world_size(), expected=dist.get_world_size())
dist.destroy_process_group()
"""
JOB = 'script = "work.py"\nstrategy = "ddp"\n[resources]\ngpus_per_node = {tasks}\ntasks_per_node = {tasks}\n'


def whole_run(folder: Path, tasks: int, steps: str) -> RunDir:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch: not installed (scripts/setup --torch)")
    (folder / "pyproject.toml").touch()
    (folder / "work.py").write_text(WORK.format(steps=steps))
    (folder / "job.toml").write_text(JOB.format(tasks=tasks) + "cpus_per_task = 1\n[profile]\nsteps = [8, 11]\n")
    own = {"HPCML_SITE": "local", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "HPCML_DEVICES": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "hpcml", "run", "job.toml"], cwd=folder, env={**os.environ, **own}, capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = [path for path in (folder / "runs").glob("*") if path.is_dir()]
    return RunDir(folder / "runs", run.name)


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_job_with_a_profile_has_its_split_in_journal_and_report(tmp_path: Path, tasks: int) -> None:
    run = whole_run(tmp_path, tasks, "run.steps(loader)")
    assert rundir.read_json(run.status)["state"] == "COMPLETED"
    (record,) = records(run.path, "profile")
    assert (record["first"], record["last"], record["steps"], record["rank"]) == (8, 11, 4, 0)
    if tasks == 2:
        assert record["split"]["communication_ms"] > 0
    (folder,) = (
        run.profile.iterdir()
    )  # rank 0's; the others only leave the same steps out, and the one that waits for it
    assert folder == run.path / record["folder"]
    page = run.report.read_text()
    assert "Steps 8 to 11 were profiled" in page
    left_out = {r["rank"]: r["values"]["profiled_steps"] for r in records(run.path, "metric") if r["step"] == 1}
    assert left_out == {0: 4, 1: 5} if tasks == 2 else left_out == {0: 4}


def test_a_loop_without_run_steps_is_told_what_is_missing(tmp_path: Path) -> None:
    run = whole_run(tmp_path, 1, "loader")
    (told,) = [r["text"] for r in records(run.path, "message") if "no profile" in r["text"]]
    assert "for batch in run.steps(loader)" in told and "fit(" not in told
