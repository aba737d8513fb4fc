"""``hpcml top``: what there is to see of a run, at every size of terminal, live and as a snapshot."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pexpect
import pytest

from hpcml import queue, rundir
from hpcml.cli import draw, view
from hpcml.node import batch
from hpcml.queue import State
from hpcml.queue.watch import MOST_POINTS, Curve, Gpu, Look, Request, Watcher
from hpcml.rundir import RunDir
from hpcml.tracking.journal import Journal

NOW = 1_800_000_000.0
PLAN = {
    "name": "a", "work": "script", "strategy": "multiworker", "nodes": 2, "gpus_per_node": 2, "tasks_per_node": 2,
    "cpus_per_task": 16, "mem_gb": 32, "time_s": 3600, "target": ["a.py"],
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that this process keeps going."""
    made = rundir.create(tmp_path / "runs", "a")
    rundir.write_json(made.plan, PLAN)
    rundir.claim(made)
    return made


def writer(run: RunDir, rank: int = 0, restart: int = 0, name: str = "rank") -> Journal:
    return Journal(run.event_file(rank, restart, name))


def look_at(watcher: Watcher) -> Look:
    states, _ = queue.states_of(watcher.runs())
    return watcher.look({state.run_id: state for state in states})


def shown(look: Look, width: int = 80, height: int | None = 23, now: float = NOW) -> list[str]:
    return [line.plain for line in view.lines(look, view.Page(width, height), now)]


def state(name: str = "RUNNING", id: str = "20261122-120000-a", **more: Any) -> State:
    return State(run_id=id, name=name, **more)


def busy(gpus: int = 8, lines: int = 30) -> Look:
    """A run with something of everything."""
    points = tuple((step, math.exp(-step / 100)) for step in range(300))
    values = {"utilization_percent": 40.0, "memory_used_mib": 12_345.0, "memory_mib": 40_960.0}
    values |= {"power_w": 231.5, "temperature_c": 61.0}
    names = ("loss", "accuracy", "val_loss", "val_accuracy", "samples_per_s", "step_time_ms")
    return Look(
        state=state(started=NOW - 750, slurm_job_id=42),
        request=Request(nodes=2, gpus=gpus, cores=64, memory_mib=65_536, time_s=3600, strategy="multiworker"),
        progress={
            "cell": {"done": 3, "total": 9, "unit": "cell", "text": "Train"},
            "epoch": {"done": 2, "total": 5, "unit": "epoch", "text": "epoch 2/5 accuracy 0.900"},
        },
        curves={name: Curve(points, 1234.5) for name in names},
        gpus=tuple(Gpu(f"gpu{i}", "NVIDIA A100-PCIE-40GB", NOW - 1, values) for i in range(gpus)),
        host={"cpu/cores": 7.4, "memory/used_mib": 9300.0},
        warnings=("GPU 1 is idle while it holds 12 GiB",),
        lines=tuple((0, f"line {i} of a log") for i in range(lines)),
    )


# ------------------------------------------------------------------ the page


def test_everything_fits_an_ordinary_terminal() -> None:
    page = shown(busy())
    text = "\n".join(page)
    assert len(page) <= 23 and max(map(len, page)) <= 80
    for words in (
        "RUNNING 20261122-120000-a · job 42 · multiworker · 2 nodes, 8 GPUs",
        "00:12:30 of 01:00:00 (21%)",
        "4/9  Train",
        "2/5  epoch 2/5 accuracy 0.900",
        "1,234 samples/s · 1234 ms a step",
        "7.4 of 64 cores  memory 9.1/64 GiB",
        "GPU 1 is idle while it holds 12 GiB",
    ):
        assert words in text, f"{words!r} is not in\n{text}"
    for gpu in range(8):
        assert re.search(rf"^gpu{gpu} +█+░+  40 %  12\.1/40 GiB  232 W  61 °C", text, re.MULTILINE), text
    assert re.search(r"^loss .*█.*▁ 1234", text, re.MULTILINE) and "accuracy" in text
    assert page[-5:] == [f"  line {number} of a log" for number in range(25, 30)]


@pytest.mark.parametrize("seed", range(20))
def test_no_page_is_too_small(seed: int) -> None:
    print("seed", seed)
    dice = random.Random(seed)
    look = busy(dice.randrange(20), dice.randrange(70))
    below = tuple(replace(busy(2, 5), state=state(id=f"20261122-120000-a/{i}")) for i in range(dice.randrange(30)))
    look = replace(look, below=below, warnings=tuple(f"warning {i} " + "火" * dice.randrange(99) for i in range(5)))
    for _ in range(20):
        width, height = dice.randint(1, 200), dice.randint(1, 80)
        lines = view.lines(look, view.Page(width, height), NOW)
        assert len(lines) <= height
        assert max(line.cell_len for line in lines) <= width, (width, height)
        assert lines[0].plain.startswith("RUNNING"[: width - 1])


def test_a_larger_terminal_shows_more() -> None:
    small, large = shown(busy()), shown(busy(), 160, 60)
    curve = [next(line for line in page if line.startswith("loss")) for page in (small, large)]
    assert len(curve[1]) >= len(curve[0]) + 70
    assert sum("of a log" in line for line in large) == 30
    assert any(line.startswith("val_loss") for line in large)


def test_what_does_not_fit_is_counted() -> None:
    page = shown(busy(gpus=64))
    assert re.search(r"… and \d+ more GPUs", "\n".join(page))
    assert int(re.findall(r"and (\d+) more GPUs", "\n".join(page))[0]) + sum(p.startswith("gpu") for p in page) == 64


def test_waiting_in_the_queue() -> None:
    waits = state("PENDING", reason="Priority", submitted=NOW - 192, expected_start=NOW + 300, slurm_job_id=7)
    page = shown(Look(state=waits, request=Request(time_s=3600)))
    assert len(page) == 2 and page[0].startswith("PENDING")
    when = time.strftime("%H:%M", time.localtime(NOW + 300))
    assert page[1] == f"waits     00:03:12 · Slurm expects to start it at {when}, in 00:05:00 · Priority"[:80]
    assert shown(Look(state=replace(waits, expected_start=None), request=Request()))[1].endswith("00:03:12 · Priority")


def test_a_failed_run_says_why() -> None:
    ended = state("FAILED", reason="ValueError: no", started=NOW - 90, ended=NOW - 60)
    page = shown(Look(state=ended, request=Request(time_s=60)))
    assert page[1:] == ["time      30.0 s of 00:01:00 (50%)", "reason    ValueError: no"]


def test_nothing_known_yet_is_shown_as_nothing() -> None:
    page = shown(Look(state=state(), request=Request()))
    assert page == ["RUNNING 20261122-120000-a · 1 node"]


def test_a_gpu_that_tells_little() -> None:
    look = replace(busy(0, 0), gpus=(Gpu("gpu0", "", NOW - 60, {"temperature_c": 0.0}),))
    assert "gpu0        0 °C  not sampled for 00:01:00" in shown(look), "zero stays zero, the rest is left out"


def test_control_characters_never_reach_the_terminal() -> None:
    bad = "\x1b[2J\x1b]0;title\x07a\x07b\x08c\x1b[31md\re\tf\x9bg\x00"
    look = replace(busy(0), warnings=(bad,), lines=((0, bad),), state=state(reason=bad, started=NOW))
    text = "".join(shown(look, 200, None))
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", text) and "abcde   fg" in re.sub(" +", "   ", text)


# ------------------------------------------------------------------ sparklines and bars


def test_sparklines() -> None:
    assert draw.sparkline(range(8), 80) == "▁▂▃▄▅▆▇█"
    assert draw.sparkline(range(800), 8) == "▁▂▃▄▅▆▇█"
    assert draw.sparkline([1, math.nan, 2, math.inf, -math.inf], 80) == "▁ █  "
    assert draw.sparkline([math.nan], 80) == " " and draw.sparkline([], 80) == ""
    assert draw.sparkline([0.9] * 7, 7) == "▁" * 7
    assert draw.sparkline([0.1 + 0.2, 0.3], 2) == "▁▁", "rounding is no curve"
    assert draw.sparkline([1e308, 1e308, -1e308, -1e308], 2) == "█▁"
    assert draw.sparkline([5], 0) == draw.sparkline([5], -3) == ""


def test_bars() -> None:
    assert [draw.bar(share, 4) for share in (0, 0.5, 1, 7, -1, math.nan)] == [
        "░░░░", "██░░", "████", "████", "░░░░", "░░░░",
    ]  # fmt: skip


# ------------------------------------------------------------------ what is read


def test_a_look_at_a_run(run: RunDir) -> None:
    journal, telemetry = writer(run), writer(run, name="telemetry")
    for step in range(5):
        journal.metric(step, {"loss": 1 / (step + 1)})
    writer(run, 1).metric(0, {"loss": 99.0})
    telemetry.write("params", values={"gpu0.name": "A100", "gpu0.memory_mib": 40_960, "gpu10.name": "B"})
    telemetry.write("sample", values={"gpu10/power_w": 3.0, "gpu0/power_w": 1.0, "gpu0/utilization_percent": 7.0})
    telemetry.write("sample", values={"gpu0/power_w": 2.0, "cpu/cores": 1.5, "memory/used_mib": 100.0})
    writer(run, 2, name="telemetry").write("sample", values={"cpu/cores": 2.0, "memory/used_mib": 50.0})
    journal.message("warning", "slow input")
    journal.message("info", "not for here")
    run.log(0).write_text("one\ntwo\n10%\r20%\r")
    look = look_at(Watcher(run))
    assert (look.curves["loss"].last, len(look.curves["loss"].points)) == (0.2, 5)
    assert [(gpu.name, gpu.model) for gpu in look.gpus] == [("gpu0", "A100"), ("gpu10", "B")]
    assert look.gpus[0].values == {"power_w": 2.0, "utilization_percent": 7.0, "memory_mib": 40_960.0}
    assert look.host == {"cpu/cores": 3.5, "memory/used_mib": 150.0}
    assert look.warnings == ("slow input",)
    assert look.lines == ((0, "one"), (0, "two"), (0, "20%"))
    assert look.request == Request(2, 4, 64, 65_536, 3600, "multiworker")
    assert look.state.name == "RUNNING" and look.state.started


def test_the_log_is_of_the_rank_that_failed(run: RunDir) -> None:
    for rank in (0, 1):
        run.log(rank).write_text(f"of rank {rank}\n")
    assert look_at(Watcher(run)).lines == ((0, "of rank 0"),)
    rundir.write_json(run.status, {"state": "FAILED", "final": True, "failed_rank": 1})
    look = look_at(Watcher(run))
    assert look.lines == ((1, "of rank 1"),) and shown(look)[-2:] == ["log of rank 1", "  of rank 1"]


def test_gpus_of_several_nodes_are_told_apart(run: RunDir) -> None:
    for rank in (0, 2):
        writer(run, rank, name="telemetry").write("sample", values={"gpu0/power_w": float(rank)})
    assert [gpu.name for gpu in look_at(Watcher(run)).gpus] == ["rank 0 gpu0", "rank 2 gpu0"]


def test_a_later_look_adds_what_is_new(run: RunDir) -> None:
    journal, watcher = writer(run), Watcher(run)
    journal.metric(1, {"loss": 3.0})
    assert look_at(watcher).curves["loss"].points == ((1, 3.0),)
    journal.metric(2, {"loss": 2.0})
    journal.write("progress", done=1, total=4, unit="epoch", text="")
    look = look_at(watcher)
    assert look.curves["loss"].points == ((1, 3.0), (2, 2.0)) and look.progress["epoch"]["done"] == 1
    assert look_at(watcher).curves == look.curves


def test_a_restart_begins_anew(run: RunDir) -> None:
    watcher, old = Watcher(run), writer(run)
    old.metric(1, {"loss": 3.0})
    old.message("warning", "of the first time")
    look_at(watcher)
    writer(run, restart=1).metric(1, {"accuracy": 0.5})
    old.metric(2, {"loss": 3.0})
    look = look_at(watcher)
    assert (set(look.curves), look.warnings) == ({"accuracy"}, ())
    old.metric(3, {"loss": 3.0})
    assert set(look_at(watcher).curves) == {"accuracy"}, "what is left of the earlier one may still write"


def test_a_long_curve_is_thinned(run: RunDir) -> None:
    journal = writer(run)
    for step in range(10_000):
        journal.metric(step, {"loss": float(step)})
    curve = look_at(Watcher(run)).curves["loss"]
    assert MOST_POINTS / 2 <= len(curve.points) <= 2 * MOST_POINTS and curve.last == 9999.0
    assert curve.points[0] == (0, 0.0) and curve.points[-1][0] > 9900
    assert [step for step, _ in curve.points] == sorted(step for step, _ in curve.points)


def test_a_journal_of_garbage_is_looked_through(run: RunDir) -> None:
    path = run.event_file(0, 0, "rank")
    odd = [
        '{"t":1,"kind":"metric","step":"x","values":{"loss":1}}', '{"t":1,"kind":"metric","step":1,"values":7}',
        '{"t":1,"kind":"metric","step":1,"values":{"loss":"high"}}', '{"t":1,"kind":"progress","done":null}',
        '{"t":1,"kind":"sample","values":{"gpuX/power_w":1,"gpu0":2,"/":3}}', "[" * 5000, "garbage", "\x00",
        '{"t":1,"kind":"params"}', '{"t":1,"kind":"progress","done":1,"total":0,"unit":"epoch"}',
    ]  # fmt: skip
    path.write_text("\n".join(odd) + "\n")
    look = look_at(Watcher(run))
    assert (look.curves, look.gpus) == ({}, ())
    assert shown(look)[-1].startswith("epochs") and json.dumps(view.as_json(look))


# ------------------------------------------------------------------ comparisons and arrays


def test_a_comparison_has_a_line_for_each_variant(run: RunDir) -> None:
    names = ["original", "mirrored", "multiworker"]
    rundir.write_json(run.plan, {**PLAN, "work": "comparison", "target": names})
    children = [run.child(name).make() for name in names]
    for child in children:
        rundir.write_json(child.plan, PLAN)
    first = writer(children[0])
    first.metric(1, {"val_accuracy": 0.5, "loss": 2.0, "samples_per_s": 1000.0})
    batch.close_run(children[0], 0)
    rundir.claim(children[1])
    second = writer(children[1])
    second.metric(1, {"loss": 1.25})
    second.write("progress", done=1, total=5, unit="epoch", text="epoch 1/5")
    children[1].log(0).write_text("hello from mirrored\n")
    page = shown(look_at(Watcher(run)), now=time.time())
    variants = [line for line in page if line.startswith("  ") and line.split()[0] in names]
    assert [line.split()[:2] for line in variants] == [
        ["original", "COMPLETED"], ["mirrored", "RUNNING"], ["multiworker", "PENDING"],
    ]  # fmt: skip
    assert "val_accuracy 0.5 · 1,000 samples/s" in variants[0] and "epoch 1/5" in variants[1]
    assert any(re.match(r"loss .* 1\.25", line) for line in page), "the curves are of the variant that runs"
    assert page[-2:] == ["log of mirrored", "  hello from mirrored"]


def test_an_arrays_calls_are_in_order(run: RunDir) -> None:
    rundir.write_json(run.submitted, {"array": 12, "submitted": 0})
    for index in range(12):
        child = run.child(str(index)).make()
        rundir.write_json(child.plan, {"work": "function"})
        batch.close_run(child, 0)
    page = shown(look_at(Watcher(run)), height=None)
    assert [line.split()[:2] for line in page if line.startswith("  ")] == [
        [str(index), "COMPLETED"] for index in range(12)
    ]


# ------------------------------------------------------------------ the command


def environment(run: RunDir, **more: str) -> dict[str, str]:
    own = {"HPCML_SITE": "local", "HPCML_RUNS": str(run.root), "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
    return {**os.environ, **own, **more}


def top(run: RunDir, *words: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "hpcml", "top", *words], env=environment(run, **more),
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_piped_it_is_one_plain_snapshot(run: RunDir) -> None:
    writer(run).metric(1, {"loss": 0.5})
    done = top(run)
    assert done.stdout.startswith(f"RUNNING {run.id}") and "\x1b" not in done.stdout and done.stderr == ""
    assert re.search(r"^loss +▁ 0\.5$", done.stdout, re.MULTILINE)
    assert re.search(r"^loss +_ 0\.5$", top(run, "--once", PYTHONIOENCODING="ascii").stdout, re.MULTILINE)


def test_as_json_it_is_strict(run: RunDir) -> None:
    journal = writer(run)
    journal.metric(1, {"loss": math.nan})
    journal.metric(2, {"loss": math.inf})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    told = json.loads(top(run, "--json", run.id).stdout, parse_constant=refuse)
    assert told["metrics"]["loss"] == {"last": "inf", "points": [[1, "nan"], [2, "inf"]]}
    assert (told["state"]["name"], told["request"]["gpus"], told["gpus"]) == ("RUNNING", 4, [])


def test_no_such_run_is_an_input_error(run: RunDir) -> None:
    assert "no run 'x'" in top(run, "x", code=2).stderr


def test_a_silent_controller_is_noted(run: RunDir, tmp_path: Path) -> None:
    run.owner.unlink()
    rundir.write_json(run.submitted, {"slurm_job_id": 7, "submitted": time.time()})
    stubs = tmp_path / "bin"
    stubs.mkdir()
    (stubs / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Connection refused' >&2\nexit 1\n")
    (stubs / "squeue").chmod(0o755)
    done = top(run, PATH=f"{stubs}:{os.environ['PATH']}")
    assert done.stdout.startswith("PENDING") and "shown as last known" in done.stderr


@pytest.fixture
def live(run: RunDir) -> Any:
    writer(run).metric(1, {"loss": 0.5})
    process = pexpect.spawn(
        sys.executable, ["-m", "hpcml", "top"], env=environment(run), dimensions=(24, 80), encoding="utf-8", timeout=60
    )  # fmt: skip
    try:
        process.expect_exact("q leaves")
        yield process
    finally:
        process.close(force=True)


@pytest.mark.parametrize("key", ["q", "\x03", "\x1b"], ids=["q", "Ctrl-C", "Escape"])
def test_leaving_is_no_failure(live: Any, run: RunDir, key: str) -> None:
    live.send(key)
    live.expect(pexpect.EOF)
    live.wait()
    assert (live.exitstatus, live.signalstatus) == (0, None)
    assert "\x1b[?1049l" in live.before, "the terminal is as it was"
    assert queue.state_of(run).name == "RUNNING"


def test_it_follows_the_run_to_its_end(live: Any, run: RunDir) -> None:
    writer(run).write("progress", done=2, total=5, unit="epoch", text="epoch 2/5 accuracy 0.750")
    live.expect_exact("epoch 2/5 accuracy 0.750")
    with run.log(0).open("a") as file:
        file.write("a line of the log\n")
    live.expect_exact("a line of the log")
    for rank in range(4):
        rundir.write_json(
            run.status_of(rank), {"rank": rank, "exit_code": 0, "restart": 0, "started": 1.0, "ended": 2.0}
        )
    batch.close_run(run, 0)
    live.expect(pexpect.EOF)
    live.wait()
    assert live.exitstatus == 0
    after = re.sub(r"\x1b\[[0-9;?]*[a-z]", "", live.before.rpartition("\x1b[?1049l")[2])
    assert after.lstrip().startswith(f"COMPLETED {run.id}"), "its end stays on the screen"
