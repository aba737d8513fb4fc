"""The facts of a report, its advice and causes, its text and JSON, and when it is made."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import report_samples as samples
from rich.console import Console

from hpcml import report, rundir
from hpcml.report import curves, facts, span, tables, terminal
from hpcml.report.advice import advice
from hpcml.report.causes import likely_cause
from hpcml.report.logs import last_lines
from hpcml.report.series import m4
from hpcml.report.settings import asked_of
from hpcml.report.text_of import cores
from hpcml.rundir import RunDir

HPCML = [sys.executable, "-m", "hpcml"]


def lines_of(run: RunDir) -> list[str]:
    return [line for one in advice(facts.collect(run)) for line in one.lines]


def shown(run: RunDir, **known: str) -> str:
    console = Console(width=80, force_terminal=False, color_system=None)
    with console.capture() as capture:
        terminal.text(facts.collect(run, **known), console)
    return capture.get()


def test_the_facts_of_a_full_run(tmp_path: Path) -> None:
    told = facts.collect(samples.full(tmp_path))
    assert (told.outcome.state, told.outcome.elapsed_s, told.hosts) == ("COMPLETED", 600.0, ("gpu07",))
    assert [(gpu.index, gpu.name, gpu.energy_j, gpu.energy_from) for gpu in told.gpus] == [
        (0, "NVIDIA H100", 300_000.0, "counter"),
        (1, "NVIDIA H100", 300_000.0, "counter"),
    ]
    assert told.usage.gpu_hours == pytest.approx(2 * 600 / 3600)
    assert told.usage.energy_wh == pytest.approx(600_000 / 3600)
    assert told.usage.memory_peak_gib == 9.0
    assert (told.queue.slurm_job_id, told.queue.waited_s) == (4711, 754.0)
    assert [wait.reason for wait in told.queue.waits] == ["Priority", "Resources"]
    assert list(told.epochs) == list(range(1, 9)) and told.epochs[8] == pytest.approx(592.5)
    assert told.split is not None and told.split.parts_ms["input"] == 3.1
    assert {setting.name: (setting.value, setting.origin) for setting in told.threads}["OMP_NUM_THREADS"] == (
        "32",
        "cpus-per-task",
    )
    assert told.missing == ()


def test_metrics_and_telemetry_share_one_clock(tmp_path: Path) -> None:
    told = facts.collect(samples.full(tmp_path))
    accuracy = next(s for s in told.metrics if s.name == "accuracy")
    busy = next(s for s in told.telemetry if s.name == "gpu0/utilization_percent")
    assert accuracy.times_s[0] == pytest.approx(told.epochs[1]) and busy.times_s[0] == 0.0
    assert busy.count == 600


def test_the_json_is_plain_and_keeps_what_json_has_no_number_for(tmp_path: Path) -> None:
    run = samples.a_run(tmp_path)
    writer = samples.Writer(run)
    for step, loss in enumerate((1.0, math.nan, math.inf, -math.inf)):
        writer.write(float(step), "metric", step=step, values={"loss": loss})
    told = json.loads(json.dumps(facts.collect(samples.end(run)).to_json(), allow_nan=False))
    assert told["metrics"][0]["values"] == [1.0, "NaN", "Infinity", "-Infinity"]
    assert told["metrics"][0]["mean"] == 1.0


@pytest.mark.parametrize(
    ("peak_mib", "asked", "line"),
    [
        (9 * 1024, 64, "mem_gb = 12"),  # 9 × 1.25 = 11.25
        (9 * 1024, 18, None),  # 18 is no more than 1.5 × 12
        (9 * 1024, 19, "mem_gb = 12"),
        (100, 64, "mem_gb = 2"),
        (100, 3, None),
        (15.5 * 1024, 16, "mem_gb = 20"),  # nearly full
    ],
)
def test_memory_to_ask_for(tmp_path: Path, peak_mib: float, asked: int, line: str | None) -> None:
    run = samples.a_run(tmp_path, mem_gb=asked)
    found = lines_of(samples.end(samples.telemetry(run, 20, peak_mib=peak_mib)))
    # the samples are still below their peak; the totals have it
    assert [one for one in found if one.startswith("mem_gb")] == ([line] if line else [])


def test_cores_and_time_to_ask_for(tmp_path: Path) -> None:
    run = samples.a_run(tmp_path, cpus_per_task=16, tasks_per_node=2, time_s=36_000, gpus_per_node=0)
    writer = samples.Writer(run, writer="telemetry")
    for second in range(100):
        writer.write(second, "sample", values={"cpu/cores": 6.0 if second < 96 else 32.0})
    found = lines_of(samples.end(run, elapsed_s=1000.0))
    assert found == ["cpus_per_task = 4", 'time = "00:25:00"']  # 6 / 2 × 1.25; 1000 s × 1.5 in whole 5 minutes


@pytest.mark.parametrize(
    ("busy", "asked", "lines"),
    [
        (25.0, {"gpus_per_node": 2}, ["gpus_per_node = 1"]),
        (85.0, {"gpus_per_node": 2}, []),
        (25.0, {"gpus_per_node": 8, "tasks_per_node": 8}, ["gpus_per_node = 4", "tasks_per_node = 4"]),
        (25.0, {"gpus_per_node": 8, "tasks_per_node": 4, "cpus_per_task": 4}, ["gpus_per_node = 4"]),
        (25.0, {"gpus_per_node": 2, "nodes": 4}, ["nodes = 2"]),
    ],
)
def test_gpus_to_ask_for(tmp_path: Path, busy: float, asked: dict[str, int], lines: list[str]) -> None:
    run = samples.telemetry(samples.a_run(tmp_path, **asked), 60, busy=busy)  # 60 s hold one dip: about 23 % on average
    found = [line for line in lines_of(samples.end(run)) if line.startswith(("nodes", "gpus", "tasks"))]
    assert found == lines


def test_on_this_machine_advice_says_that_requests_are_upper_bounds(tmp_path: Path) -> None:
    run = samples.telemetry(samples.a_run(tmp_path, scheduler="local", site="local", gpus_per_node=0), 20, gpus=0)
    found = advice(facts.collect(samples.end(run)))
    assert found and all("upper bounds only" in one.evidence for one in found)


def test_a_run_that_failed_is_not_told_to_ask_for_less(tmp_path: Path) -> None:
    assert lines_of(samples.failed(tmp_path)) == []


def test_a_run_that_ran_out_is_told_to_ask_for_more(tmp_path: Path) -> None:
    late = samples.end(
        samples.train(samples.a_run(tmp_path, "late", params={"epochs": 20}), 5, 7200.0), "TIMEOUT", 7200.0
    )
    assert lines_of(late) == ['time = "12:00:00"']  # 5 of 20 epochs in 2 h: 8 h × 1.5
    assert lines_of(samples.end(samples.a_run(tmp_path, "oom"), "OUT_OF_MEMORY")) == ["mem_gb = 96"]


CAUSES = [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "memory of a GPU"),
    ("slurmstepd: error: Detected 1 oom_kill event in StepId=1.0", "memory of the node"),
    ("OSError: [Errno 28] No space left on device", "disk is full"),
    ("hpcml: warning: records are lost: no space left on device", "disk is full"),
    ("OSError: [Errno 122] Disk quota exceeded: 'x'", "quota"),
    ("ModuleNotFoundError: No module named 'torch'", "package is missing"),
    ("ImportError: libcudnn.so.9: cannot open shared object file", "shared library"),
    ("RuntimeError: NCCL error in: ProcessGroupNCCL.cpp, unhandled system error", "NCCL"),
    ("UnavailableError: Collective ops is aborted by: failed to connect to all addresses", "lost its connection"),
    ("slurmstepd: error: *** JOB 12 ON c1 CANCELLED AT 2026 DUE TO TIME LIMIT ***", "time limit"),
    ("FileNotFoundError: [Errno 2] No such file or directory: 'data/x.npz'", "file is not there"),
    ("PermissionError: [Errno 13] Permission denied: '/data'", "may not be read or written"),
    ("bind: Address already in use", "port was taken"),
    ("RuntimeError: No CUDA GPUs are available", "cannot use the GPUs"),
    ("ValueError: no good", "error in the work itself"),
]


@pytest.mark.parametrize(("line", "words"), CAUSES, ids=[words for _, words in CAUSES])
def test_a_cause_from_the_log(tmp_path: Path, line: str, words: str) -> None:
    run = samples.end(samples.log(samples.a_run(tmp_path), ["epoch 1", line, ""]), "FAILED")
    cause = likely_cause(facts.collect(run))
    assert cause is not None and words in cause.what and cause.evidence == line and cause.fix


@pytest.mark.parametrize(
    ("state", "marker", "words"),
    [
        ("TIMEOUT", {}, "time limit"),
        ("OUT_OF_MEMORY", {}, "memory of the node"),
        ("CANCELLED", {}, "cancelled"),
        ("FAILED", {"exit_code": 137}, "SIGKILL"),
        ("FAILED", {"exit_code": 139}, "SIGSEGV"),
        ("FAILED", {"exit_code": 127}, "command was not found"),
    ],
)
def test_a_cause_from_the_state_or_the_exit_code(
    tmp_path: Path, state: str, marker: dict[str, Any], words: str
) -> None:
    cause = likely_cause(facts.collect(samples.end(samples.a_run(tmp_path), state, **marker)))
    assert cause is not None and words in cause.what


def test_what_slurm_says_goes_before_what_the_log_says(tmp_path: Path) -> None:
    run = samples.log(samples.a_run(tmp_path), ["ConnectionError: Connection refused"])
    cause = likely_cause(facts.collect(run, state="OUT_OF_MEMORY"))
    assert cause is not None and "memory" in cause.what


def test_what_the_others_say_of_a_killed_rank_is_not_the_cause(tmp_path: Path) -> None:
    run = samples.a_run(tmp_path, "mnist-ddp", "ddp", tasks_per_node=2)
    run.log(0).write_text("RuntimeError: Connection reset by peer\n")
    for rank in (0, 1):
        samples.Writer(run, rank).write(1.0, "metric", step=1, values={"loss": 0.5})
    samples.end(run, "FAILED", exit_code=137, failed_rank=1, reason="killed by SIGKILL")
    cause = likely_cause(facts.collect(run))
    assert cause is not None and "SIGKILL" in cause.what and "of rank 1" in cause.evidence


def test_a_completed_run_has_no_cause(tmp_path: Path) -> None:
    run = samples.end(samples.log(samples.a_run(tmp_path), ["ValueError: caught and fine"]))
    assert likely_cause(facts.collect(run)) is None


OWN_ERROR = ["global_batch = 7 is no multiple of 2", "  allowed: a multiple of 2 tasks", "  fix: -p global_batch=8"]
SAID = {
    "traceback": ['  File "train.py", line 5, in <module>', f"hpcml.errors.HpcmlError: {OWN_ERROR[0]}", *OWN_ERROR[1:]],
    "under torchrun": [f"[rank1]: hpcml.errors.JobFailed: {OWN_ERROR[0]}", *(f"[rank1]: {x}" for x in OWN_ERROR[1:])],
    "notebook": [
        f"HpcmlError: {OWN_ERROR[0]}",
        *OWN_ERROR[1:],
        "code/train.ipynb: cell 1 of 1 failed",
        f"  HpcmlError: {OWN_ERROR[0]}",
        "  fix: the traceback is in the log",
    ],
    "worker": [f"hpcml: {OWN_ERROR[0]}", *OWN_ERROR[1:]],
}


@pytest.mark.parametrize("lines", SAID.values(), ids=SAID.keys())
def test_an_error_that_says_what_to_do_is_the_cause(tmp_path: Path, lines: list[str]) -> None:
    run = samples.log(samples.a_run(tmp_path), ["epoch 1", *lines])
    cause = likely_cause(facts.collect(samples.end(run, "FAILED", reason=f"HpcmlError: {OWN_ERROR[0]}", failed_rank=0)))
    assert cause is not None and cause.what == cause.sentence == OWN_ERROR[0], "a name stays as it is"
    assert cause.fix == "-p global_batch=8; allowed: a multiple of 2 tasks"


def test_an_error_of_ours_that_was_survived_is_no_cause(tmp_path: Path) -> None:
    run = samples.log(samples.a_run(tmp_path), [*SAID["worker"], "FileNotFoundError: 'x.npz'"])
    cause = likely_cause(facts.collect(samples.end(run, "FAILED", reason="FileNotFoundError: 'x.npz'")))
    assert cause is not None and "file is not there" in cause.what


def keep_checkpoint(run: RunDir, step: int = 40) -> RunDir:
    place = run.checkpoints / f"step-{step:012}"
    place.mkdir(parents=True)
    rundir.write_json(place / "checkpoint.json", {"restart": 0, "place": {"step": step}})
    return run


@pytest.mark.parametrize(
    ("state", "code", "goes_on"),
    [
        ("CANCELLED", 75, True),
        ("TIMEOUT", 143, True),
        ("FAILED", 137, True),
        ("FAILED", 1, False),
        ("COMPLETED", 0, False),
    ],
)
def test_a_run_with_a_checkpoint_can_go_on_unless_it_would_fail_again(
    tmp_path: Path, state: str, code: int, goes_on: bool
) -> None:
    run = keep_checkpoint(samples.a_run(tmp_path))
    reason = "stopped by SIGTERM after step 40"
    text = " ".join(shown(samples.end(run, state, exit_code=code, reason=reason)).split())
    assert facts.collect(run).resume_step == (40 if goes_on else None)
    assert (f"hpcml resume {run.id} goes on from step 40" in text) is goes_on
    assert ("asked to stop, and saved" in text) is (code == 75)


def test_without_a_checkpoint_nothing_goes_on(tmp_path: Path) -> None:
    assert "hpcml resume" not in shown(samples.end(samples.a_run(tmp_path), "TIMEOUT", exit_code=143))


def test_a_killed_run_without_a_marker_is_reported(tmp_path: Path) -> None:
    told = facts.collect(samples.train(samples.a_run(tmp_path), 3, 100.0))
    assert told.outcome.state == "UNKNOWN" and "no end marker" in told.outcome.reason
    assert told.outcome.elapsed_s == pytest.approx(92.5)  # until its last record
    assert likely_cause(told) is not None


def test_where_the_code_came_from_is_told(tmp_path: Path) -> None:
    run = samples.end(samples.a_run(tmp_path))
    code = {"revision": "8c442ac", "branch": "main", "dirty": True, "remote": ""}
    origin = {"code": code, "packages": {"numpy": "2.4.6"}, "data": {"mnist": "v3"}, "python_version": "3.11.9"}
    rundir.write_json(run.path / "provenance.json", origin)
    told = facts.collect(run)
    known = {setting.name: setting.value for setting in told.provenance}
    assert known == {
        "git.revision": "8c442ac",
        "git.branch": "main",
        "git.dirty": "True",
        "env.numpy": "2.4.6",
        "python version": "3.11.9",
    }
    assert [(setting.name, setting.value) for setting in told.data] == [("mnist", "v3")]


def test_each_setting_is_told_once_and_an_empty_one_not_at_all(tmp_path: Path) -> None:
    run = samples.train(samples.a_run(tmp_path))
    own = {"gpus": "", "node": "gpu07", "git.revision": "8c442ac", "topology_source": "srun step"}
    samples.Writer(run).write(0.0, "params", values=own)
    code = {"revision": "8c442ac", "branch": "main"}
    rundir.write_json(run.path / "provenance.json", {"code": code, "python_version": "3.11.9"})
    told = [(one.name, one.value) for one in facts.collect(samples.end(run)).provenance]
    assert ("host", "gpu07") in told and ("python", "3.11.9") in told and ("git.branch", "main") in told
    assert not {"gpus", "node", "python version"} & {name for name, _ in told}
    assert len(told) == len(dict(told)) and all(value for _, value in told)
    rundir.write_json(run.path / "provenance.json", {"python_version": "3.12.0"})
    assert ("python version", "3.12.0") in [(one.name, one.value) for one in facts.collect(run).provenance]


def asked(run: RunDir) -> dict[str, tuple[str, str]]:
    told = facts.collect(run)
    return {one.name: (one.value, one.origin) for one in asked_of(told.plan, told.measured)}


def test_the_strategy_that_begin_was_told_is_told(tmp_path: Path) -> None:
    run = samples.a_run(tmp_path, strategy=None)
    assert "strategy" not in asked(run)
    samples.Writer(run).write(0.0, "params", values={"strategy": "mirrored"})
    assert asked(run)["strategy"] == ("mirrored", "begin()") and "strategy mirrored" in shown(run)
    assert asked(samples.a_run(tmp_path, "own"))["mem_gb"] == ("64", "jobs/mnist.toml"), "the key is there already"


@pytest.mark.parametrize(
    ("strategy", "device", "is_told"),
    [
        ("mirrored", "GPU:0", True),
        ("ddp", "GPU:0", False),
        ("horovod", "GPU:0", False),
        ("horovod", "/device:GPU:0", True),
    ],
)
def test_keras_is_told_where_keras_trains(tmp_path: Path, strategy: str, device: str, is_told: bool) -> None:
    run = samples.a_run(tmp_path, strategy=strategy)
    samples.Writer(run).write(9.0, "replicas", in_sync=2, expected=2, devices=[device], virtual=False)
    assert ("keras" in asked(run)) is is_told


def test_a_job_that_asked_for_no_gpu_has_no_virtual_devices(tmp_path: Path) -> None:
    for virtual, said in ((0, False), (2, True)):
        run = samples.a_run(tmp_path, f"v{virtual}", gpus_per_node=virtual)
        samples.Writer(run).write(0.0, "params", values={"virtual_cpu_devices": virtual})
        samples.Writer(run).write(9.0, "replicas", in_sync=2, expected=2, devices=["CPU:0"], virtual=True)
        assert ("virtual CPU devices" in shown(samples.end(run))) is said


def test_two_times_of_a_step_are_explained(tmp_path: Path) -> None:
    run = samples.full(tmp_path)
    samples.Writer(run).write(60.0, "metric", step=1, values={"profiled_steps": 11})
    told = facts.collect(run)
    words = "Steps 10 to 20 were profiled: 6.2 ms a step, with what the profiler itself costs."
    words += " By the epochs, which leave out 11 steps for it, a step takes 6.2 ms."
    text = " ".join(shown(run).split())
    assert words in text and "median of the epochs after the first; 6.2 ms a step" in text
    page = report.write(run).read_text()
    assert words in page and "leave out the 11 steps that the profile slowed down" in page
    assert not [series for series in told.metrics if series.name == "profiled_steps"], "it explains, and is no curve"


def test_columns_without_a_number_are_left_out(tmp_path: Path) -> None:
    run = samples.a_run(tmp_path)
    for epoch in (1, 2):
        samples.Writer(run).write(10.0 * epoch, "metric", step=epoch, values={"samples_per_s": 100.0, "loss": 0.5})
    table = tables.epochs(facts.collect(samples.end(run)))
    assert table is not None and [cell.text for cell in table.head] == ["Epoch", "Samples/s"]
    table = tables.epochs(facts.collect(samples.full(tmp_path)))
    assert table is not None and [cell.text for cell in table.head][2:] == ["Accuracy", "Validation accuracy"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0"), (0.04, "0.04"), (0.996, "1.0"), (12.34, "12.3"), (0.5, "0.5"), (None, "–")]
)
def test_hardly_busy_is_not_idle(value: float | None, text: str) -> None:
    assert cores(value) == text


def short_training(root: Path, startup_s: float, training_s: float) -> RunDir:
    """A run of ten epochs after a start-up."""
    run = samples.a_run(root)
    writer = samples.Writer(run)
    writer.write(startup_s, "metric", step=0, values={"time_to_first_step_s": startup_s})
    for epoch in range(1, 11):
        at = startup_s + training_s * epoch / 10
        writer.write(at, "metric", step=epoch, values={"loss": 1 / epoch, "samples_per_s": 100.0, "epoch_time_s": 0.1})
    return samples.end(samples.telemetry(run, 70, gpus=0), elapsed_s=70.0)


def test_a_long_start_up_does_not_squeeze_the_training(tmp_path: Path) -> None:
    told = facts.collect(short_training(tmp_path, 60.0, 8.0))
    part = span.training(told)
    assert part is not None and (part.first_s, part.last_s) == (60.0, 68.0)
    assert 59 < part.begin_s < 60 and 68 < part.end_s < 70
    page = report.write(RunDir(tmp_path, told.id)).read_text()
    assert "Start-up took 1 min 00 s, training 8.0 s: these curves begin with the first step." in page
    assert "start-up, 60 s, is left out" in page and "shaded: training" in page
    assert span.training(facts.collect(short_training(tmp_path / "long", 10.0, 55.0))) is None
    assert span.training(facts.collect(samples.full(tmp_path / "full"))) is None


def test_what_was_not_kept_is_told_once(tmp_path: Path) -> None:
    run = samples.a_run(tmp_path)
    writer = samples.Writer(run)
    writer.write(10.0, "metric", step=1, values={"": 0.5, "val_": 0.5, "loss": 0.5})
    writer.write(11.0, "metric", step=2, values={"": 0.4, "val_": 0.4, "loss": 0.4})
    writer.write(12.0, "lost", count=978)
    writer.write(13.0, "left_out", names=["lr", "lr"])
    page = report.write(samples.end(run, lost=978)).read_text()
    assert "(no name)" in page
    assert "978 records: they could not be written" in page and "values that are no numbers: lr (2 times)" in page


def test_what_was_logged_once_is_told_as_a_number(tmp_path: Path) -> None:
    run = samples.a_run(tmp_path)
    writer = samples.Writer(run)
    writer.write(10.0, "metric", step=1, values={"loss": 0.5, "test_error": 0.0625, "time_to_first_step_s": 2.5})
    writer.write(11.0, "metric", step=2, values={"loss": 0.4})
    told = facts.collect(samples.end(run))
    assert [panel.title for panel in curves.training(told)] == ["Loss"]
    once = tables.single(told)
    assert once is not None and [[cell.text for cell in row] for row in once.rows] == [["test_error", "0.0625"]]
    page = report.write(RunDir(tmp_path, told.id)).read_text()
    assert "Logged once" in page and "test_error" in page
    assert shown(RunDir(tmp_path, told.id)).split("Logged once")[1].split()[:2] == ["test_error", "0.0625"]


def test_an_empty_directory_has_a_report(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "20270101-000000-nothing").make()
    told = facts.collect(run)
    assert len(told.missing) == 3 and told.plan is None
    assert "UNKNOWN" in shown(run)
    assert "Not recorded" in report.write(run).read_text()


def test_garbage_in_the_run_directory_is_left_out(tmp_path: Path) -> None:
    run = samples.train(samples.a_run(tmp_path))
    writer = samples.Writer(run, writer="foreign")
    writer.write(1.0, "sample", values={"cpu/cores": "many", "gpu0/power_w": None, "x": True, "big": 10**400})
    writer.write(1.0, "sample", values=[1])
    writer.write(1.0, "metric", step="one", values="none")
    writer.write(1.0, "profile", split={"input_ms": "long"}, first="a")
    writer.write(1.0, "totals", values={"gpu0/energy_j": "much"})
    writer.write(1.0, "progress", unit="epoch", done="most")
    writer.write(1.0, "nobody knows", values={})
    rundir.write_json(run.status, {"state": "FAILED", "exit_code": "x", "started": "then", "restarts": None})
    rundir.write_json(run.submitted, {"submitted": "now", "waits": [{"reason": 1}, "x"]})
    (run.notebook(0)).write_text("{]")
    assert "can't be shown" in report.write(run).read_text()
    assert facts.collect(run).telemetry == ()


def test_only_the_last_restart_is_told(tmp_path: Path) -> None:
    run = samples.end(samples.train(samples.a_run(tmp_path)))
    samples.Writer(run, restart=1).write(900.0, "metric", step=1, values={"loss": 0.5})
    told = facts.collect(run)
    assert [series.name for series in told.metrics] == ["loss"]
    assert told.outcome.state == "UNKNOWN", "the marker is of the restart before"


def test_the_text_fits_80_columns_and_tells_everything(tmp_path: Path) -> None:
    text = shown(samples.full(tmp_path))
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "COMPLETED",
        "97.08 %",
        "mem_gb = 12",
        "asked 64 GiB, peak 9.0 GiB",
        "167 Wh",
        "input",
        "12 min 34 s",
    ):
        assert words in text


def test_the_text_of_a_failed_run_has_its_last_40_lines_and_the_cause(tmp_path: Path) -> None:
    text = shown(samples.failed(tmp_path))
    assert "memory of a GPU was not enough" in text and "epoch 23/8" in text and "epoch 22/8" not in text


def test_text_that_looks_like_markup_is_text(tmp_path: Path) -> None:
    run = samples.end(samples.log(samples.a_run(tmp_path), ["[bold]no[/] <b>no</b>"]), "FAILED", reason="[red]x[/nope]")
    assert "[bold]no[/] <b>no</b>" in shown(run) and "[red]x[/nope]" in shown(run)
    page = report.write(run).read_text()
    assert "&lt;b&gt;no&lt;/b&gt;" in page and "<b>no</b>" not in page


def test_a_log_is_shown_as_a_terminal_would(tmp_path: Path) -> None:
    log = tmp_path / "out.0.txt"
    log.write_bytes(b"\x1b[31mred\x1b[0m\n 10%\r 90%\r100%\n\xff\x00bad\n" + b"x" * 1000 + b"\n\n")
    lines = last_lines(log)
    assert lines[:3] == ("red", "100%", "\ufffdbad") and len(lines[3]) == 400 and len(lines) == 4


def test_a_million_points_become_a_few_that_draw_the_same(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    values = [rng.gauss(0, 1) for _ in range(1_000_000)]
    values[123_456], values[654_321] = 50.0, -50.0
    kept = m4(range(len(values)), values, 250)
    assert len(kept) <= 4 * 251 and kept == sorted(kept) and {0, 123_456, 654_321, 999_999} <= set(kept)


def test_m4_keeps_gaps_and_copes_with_one_moment() -> None:
    values = [1.0] * 500 + [math.nan] * 500 + [2.0] * 5000
    kept = m4(range(len(values)), values, 60)
    assert any(math.isnan(values[i]) for i in kept)
    assert m4([7.0] * 1000, list(range(1000)), 10) == [0, 999]


def test_a_million_points_are_reduced_as_they_are_read(tmp_path: Path) -> None:
    run = samples.a_run(tmp_path)
    writer = samples.Writer(run)
    lines = (
        f'{{"t":{round((samples.BEGAN_S + n / 500) * 1000)},"kind":"metric","step":{n},"values":{{"loss":{1 / (n + 1)}}}}}\n'
        for n in range(1_000_000)
    )
    with writer.journal.path.open("a") as file:
        file.writelines(lines)
    told = facts.collect(samples.end(run, elapsed_s=2000.0))
    assert (told.metrics[0].count, told.metrics[0].low) == (1_000_000, 1e-6)
    assert len(told.metrics[0].values) <= 1004


def test_a_report_is_private_and_written_whole(tmp_path: Path) -> None:
    run = samples.full(tmp_path)
    page = report.write(run)
    assert stat.S_IMODE(page.stat().st_mode) == 0o600 and page == run.path / "report.html"
    assert {path.name for path in run.plots.iterdir()} == {"training.png", "machine.png", "split.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in run.plots.iterdir())
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def test_each_picture_is_less_than_100_kb(tmp_path: Path) -> None:
    from hpcml.report import pictures

    run = samples.telemetry(samples.train(samples.a_run(tmp_path, gpus_per_node=8)), 3600, gpus=8)
    told = facts.collect(samples.end(run, elapsed_s=3600.0))
    for picture in pictures.draw(told):
        assert len(picture.wide) < 100_000 and len(picture.narrow) < 100_000, picture.name


def test_it_is_made_when_due_and_only_then(tmp_path: Path) -> None:
    run = samples.full(tmp_path)
    assert report.is_due(run)
    page = report.ensure(run)
    assert page == run.path / "report.html" and not report.is_due(run)
    made = page.stat().st_mtime_ns
    assert report.ensure(run) == page and page.stat().st_mtime_ns == made
    os.utime(run.status, (time.time() + 5, time.time() + 5))
    assert report.is_due(run)


def test_a_comparison_brings_the_reports_of_its_variants(tmp_path: Path) -> None:
    parent = samples.comparison(tmp_path)
    assert report.ensure(parent) is not None
    assert all(child.report.is_file() for child in rundir.children(parent))
    told = facts.collect(parent)
    assert told.comparison is not None and [row.measured.name for row in told.comparison.rows] == [
        "original",
        "mirrored",
        "multiworker",
    ]
    assert "1.82×" in parent.report.read_text()


def test_a_failed_comparison_tells_of_the_variant_that_failed(tmp_path: Path) -> None:
    parent = samples.comparison(tmp_path)
    (parent.logs / "slurm-7.out").write_text("original went well\n" * 50)
    failed = samples.log(parent.child("mirrored"), ["epoch 1", "FileNotFoundError: 'data/x.npz'"])
    samples.end(failed, "FAILED", reason="exit code 1")
    samples.end(parent, "FAILED", reason="exit code 1")
    text = " ".join(shown(parent).split())
    assert "mirrored: a file is not there FileNotFoundError: 'data/x.npz' what to do:" in text
    assert "mirrored FAILED: exit code 1" in text and "Mirrored" not in text
    assert "Last 2 lines of" in text and "went well" not in text
    page = report.write(parent).read_text()
    assert "mirrored: a file is not there" in page and "the log of rank 0 of mirrored" in page
    data = facts.collect(parent).to_json()
    assert data["failed"] == [failed.id] and json.dumps(data)


def test_the_variants_of_a_running_comparison_are_not_unknown(tmp_path: Path) -> None:
    parent = samples.comparison(tmp_path)
    for run in (parent, parent.child("mirrored"), parent.child("multiworker")):
        run.status.unlink()
    shutil.rmtree(parent.child("multiworker").events)
    rundir.claim(parent)

    def states(**known: Any) -> list[str]:
        found = facts.collect(parent, **known).comparison
        assert found is not None
        return [row.measured.state for row in found.rows]

    assert states() == ["COMPLETED", "RUNNING", "PENDING"]
    text = shown(parent)
    assert "UNKNOWN" not in text and "no end marker" not in text and "Likely cause" not in text
    told = {"mirrored": ("TIMEOUT", "past its time limit"), "original": ("FAILED", "its own marker says otherwise")}
    assert states(states=told) == ["COMPLETED", "TIMEOUT", "PENDING"]
    parent.owner.unlink()
    assert states() == ["COMPLETED", "UNKNOWN", "UNKNOWN"]


def test_the_command_on_a_running_comparison_asks_for_the_states(project: Path) -> None:
    parent = samples.comparison(project / "runs")
    for run in (parent, parent.child("mirrored"), parent.child("multiworker")):
        run.status.unlink()
    rundir.claim(parent)
    rundir.claim(parent.child("mirrored"))
    told = hpcml(project, "report", parent.id)
    assert told.returncode == 0, told.stderr
    assert "RUNNING" in told.stdout and "PENDING" in told.stdout and "UNKNOWN" not in told.stdout


def rehearsed(root: Path, **changes: Any) -> RunDir:
    run = samples.telemetry(samples.a_run(root, "rehearsed", **changes), 20, gpus=0)
    samples.Writer(run).write(0.0, "params", values={"gpus": "", "virtual_cpu_devices": 2})
    return samples.end(run)


def test_a_rehearsal_is_no_measure_for_the_run_on_gpus(tmp_path: Path) -> None:
    run = rehearsed(tmp_path)
    assert advice(facts.collect(run)) == []
    text = shown(run)
    assert text.count("tell nothing about the run on GPUs") == 1 and "Ask for" not in text
    assert "2 given, none used" in text and "0 given" not in text
    page = report.write(run).read_text()
    assert page.count("tell nothing about the run on GPUs") == 1 and "mem_gb = " not in page
    assert "none here" in shown(rehearsed(tmp_path / "here", scheduler="local", site="local"))


def test_a_job_that_asked_for_no_gpu_is_no_rehearsal(tmp_path: Path) -> None:
    assert advice(facts.collect(rehearsed(tmp_path, gpus_per_node=0)))


def test_one_is_singular(tmp_path: Path) -> None:
    one = shown(samples.end(samples.a_run(tmp_path, cpus_per_task=1, tasks_per_node=2)))
    assert "1 node, 2 tasks of 1 core ·" in one.replace("\n", " ") or "2 tasks of 1 core\n" in one
    assert "tasks of" not in shown(samples.comparison(tmp_path))


def test_what_goes_wrong_with_a_report_is_no_matter_of_the_run(tmp_path: Path) -> None:
    run = samples.full(tmp_path)
    (run.path / "report.html").mkdir()
    assert report.ensure(run) is None
    assert report.ensure(RunDir(tmp_path, "no-such-run")) is None


def test_a_state_that_only_slurm_knows_reaches_the_report(tmp_path: Path) -> None:
    run = samples.train(samples.a_run(tmp_path))
    page = report.ensure(run, state="OUT_OF_MEMORY", reason="--told by sacct")
    assert page is not None and "OUT_OF_MEMORY" in page.read_text() and "--told by sacct" in page.read_text()


def hpcml(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    own = {"HPCML_SITE": "local", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "HPCML_DEVICES": "cpu"}
    return subprocess.run(
        [*HPCML, *words], cwd=folder, env={**os.environ, **own}, capture_output=True, text=True, timeout=120
    )


WORK = """
import hpcml, time
run = hpcml.begin()
for step in range(1, 6):
    run.log(step, loss=1 / step, accuracy=step / 5)
    time.sleep(0.05)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "job.toml").write_text('script = "work.py"\n')
    return tmp_path


def test_the_command_on_a_real_run(project: Path) -> None:
    (project / "work.py").write_text(WORK)
    ran = hpcml(project, "run", "job.toml")
    assert ran.returncode == 0, ran.stderr
    told = hpcml(project, "report")
    assert told.returncode == 0, told.stderr
    assert "COMPLETED" in told.stdout and "Accuracy" in told.stdout and "report.html" in told.stdout
    page = next((project / "runs").glob("*/report.html"))
    assert "<svg" in page.read_text()
    data = json.loads(hpcml(project, "report", "--json").stdout)
    assert data["outcome"]["state"] == "COMPLETED" and data["metrics"][0]["count"] == 5
    assert data["likely_cause"] is None
    copied = hpcml(project, "report", "-o", "mine.html")
    assert copied.returncode == 0 and (project / "mine.html").read_text().startswith("<!doctype html>")


def test_the_command_on_a_real_failure(project: Path) -> None:
    (project / "work.py").write_text("print('reading')\nopen('no-such-data.npz')\n")
    assert hpcml(project, "run", "job.toml").returncode == 1
    told = hpcml(project, "report")
    assert told.returncode == 0 and "A file is not there" in told.stdout and "no-such-data.npz" in told.stdout


KILLED = """
import hpcml, time
run = hpcml.begin()
run.log(1, loss=1.0)
print("begun", flush=True)
time.sleep(600)
"""


def test_a_run_whose_launcher_was_killed_has_an_end_and_a_report(project: Path) -> None:
    (project / "work.py").write_text(KILLED)
    own = {"HPCML_SITE": "local", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "HPCML_DEVICES": "cpu"}
    with subprocess.Popen([*HPCML, "run", "job.toml"], cwd=project, env={**os.environ, **own}, stdout=-1) as launcher:
        assert launcher.stdout is not None
        assert any(b"begun" in line for line in launcher.stdout)
        launcher.kill()
        launcher.stdout.read()  # its rank holds the other end until it has ended
    told = hpcml(project, "status")
    assert told.returncode == 0 and told.stdout.startswith("CANCELLED"), told.stdout + told.stderr
    assert "its launcher was killed, which ended the work" in told.stdout and "report.html" in told.stdout
    page = next((project / "runs").glob("*/report.html")).read_text()
    assert "The process that started it was killed" in page and "CANCELLED" in page


def test_status_tells_how_a_stopped_run_goes_on(project: Path) -> None:
    run = samples.end(keep_checkpoint(samples.a_run(project / "runs")), "CANCELLED", exit_code=75, reason="stopped")
    assert f"resume    hpcml resume {run.id} goes on from step 40" in hpcml(project, "status", run.id).stdout


def test_the_command_says_which_runs_there_are(project: Path) -> None:
    told = hpcml(project, "report", "nothing")
    assert told.returncode == 2 and "fix:" in told.stderr


def test_an_output_that_cannot_be_written_is_told(project: Path) -> None:
    samples.full(project / "runs")
    told = hpcml(project, "report", "-o", "no/such/folder/x.html")
    assert told.returncode == 2 and "-o" in told.stderr and "Traceback" not in told.stderr
