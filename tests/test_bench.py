"""The statistics of the benchmarks: pairs, intervals, verdicts; and that their two sides are the same work."""

import contextlib
import dataclasses
import os
import random
import re
import sqlite3
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from bench import bench_delivery, bench_resume, bench_strategies, bench_tune, by_hand, clock, interrupted, pairs, turns

from hpcml import job, rundir
from hpcml.rundir import RunDir
from hpcml.tune import space

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"


def side(name: str, values: Callable[[], float], order: list[str]) -> Callable[[], float]:
    """A side that notes when it is measured."""

    def measured() -> float:
        order.append(name)
        return values()

    return measured


def figure(ratios: list[float], bound: pairs.Bound) -> pairs.Figure:
    measured = [pairs.Pair(ratio, 1.0, index % 2 == 0) for index, ratio in enumerate(ratios)]
    return pairs.Figure("speed", "A against B.", ("A", "B"), "samples/s", measured, bound)


def test_orders_alternate_and_values_stay_with_their_side() -> None:
    order: list[str] = []
    measured = list(
        pairs.measure(pairs.in_turn(side("ours", lambda: 3.0, order), side("other", lambda: 2.0, order)), least=4)
    )
    assert order == ["ours", "other", "other", "ours"] * 2
    assert [(pair.ours, pair.other, pair.ours_first) for pair in measured] == [(3, 2, True), (3, 2, False)] * 2


def test_what_changes_between_pairs_falls_out() -> None:
    clock_rates = [1.0, 0.5, 0.25, 0.8, 0.1, 0.6]
    rates = iter([rate for rate in clock_rates for _ in range(2)])
    measured = pairs.measure(pairs.in_turn(lambda: 90 * next(rates), lambda: 100 * next(rates)), least=6)
    assert [pair.ratio for pair in measured] == pytest.approx([0.9] * 6)


def test_goes_on_while_the_interval_is_wide_and_no_further_than_allowed() -> None:
    wide = iter([1.0, 1.4] * 50)
    assert len(list(pairs.measure(lambda _: (next(wide), 1.0), least=4, most=10, width=0.04))) == 10


def test_stops_at_the_first_even_count_that_is_narrow() -> None:
    values = iter([1.0, 1.4, 1.0, 1.4, *[1.2] * 40])
    measured = list(pairs.measure(lambda _: (next(values), 1.0), least=4, most=40, width=0.04))
    assert 4 < len(measured) < 40 and len(measured) % 2 == 0
    low, high = pairs.interval([pair.ratio for pair in measured])
    assert high - low <= 0.04
    low, high = pairs.interval([pair.ratio for pair in measured[:-2]])
    assert high - low > 0.04


def test_starts_no_more_than_the_least_when_time_is_up() -> None:
    wide = iter([1.0, 1.4] * 50)
    assert len(list(pairs.measure(lambda _: (next(wide), 1.0), least=4, most=10, width=0.04, limit_s=-1))) == 4


def test_interval_is_the_same_for_a_seed_and_lies_around_the_median() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    ratios = [generator.gauss(1, 0.05) for _ in range(12)]
    low, high = pairs.interval(ratios, seed)
    assert (low, high) == pairs.interval(ratios, seed)
    assert min(ratios) <= low <= statistics.median(ratios) <= high <= max(ratios)
    assert pairs.interval([0.99] * 12) == (0.99, 0.99)


def test_interval_covers_the_true_median_as_often_as_it_says() -> None:
    """The percentile bootstrap of a median is a little short: 12 pairs and 200 resamples cover 92 %, 277 of 300 (σ 4.6)."""
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    covered = 0
    for experiment in range(300):
        low, high = pairs.interval([generator.lognormvariate(0, 0.02) for _ in range(12)], experiment, resamples=200)
        covered += low <= 1 <= high
    assert 277 - 25 <= covered <= 299
    narrower = pairs.interval([0.9, 0.95, 1, 1.05, 1.1], seed, confidence=0.5)
    wider = pairs.interval([0.9, 0.95, 1, 1.05, 1.1], seed)
    assert wider[0] < narrower[0] and narrower[1] < wider[1]


SPEED = pairs.Bound(0.99, at_least=True, pairs=4, width=0.04)
TIME = pairs.Bound(4, at_least=False, pairs=4)


@pytest.mark.parametrize(
    ("ratios", "bound", "expected"),
    [
        ([0.98, 0.985, 0.99, 0.995], SPEED, "holds"),  # the interval reaches 0.99, its median does not
        ([0.97, 0.975, 0.98, 0.985], SPEED, "does not hold"),
        ([0.9, 0.95, 1, 1.1], SPEED, "not judged: interval 0.200 wide, 0.04 allowed"),
        ([0.5, 0.6, 0.7, 0.8], SPEED, "does not hold"),  # wide, and too slow all the same
        ([1.0, 1.0, 1.0], SPEED, "not judged: 3 of 4 pairs"),
        ([1, 3.9, 3.9, 9], TIME, "holds"),  # without a width the median decides
        ([3, 4.1, 4.1, 4.2], TIME, "does not hold"),
    ],
)
def test_verdict(ratios: list[float], bound: pairs.Bound, expected: str) -> None:
    assert pairs.verdict(figure(ratios, bound)) == expected


def test_table_says_everything(capsys: pytest.CaptureFixture[str]) -> None:
    pairs.show("training", [figure([0.98, 0.985, 0.99, 0.995], SPEED)], ["a note [in brackets]"])
    shown = capsys.readouterr().out
    for word in ("training", "speed (samples/s)", "A 0.988", "B 1.000", "0.988", "0.980 … 0.995", "≥ 0.99", "holds"):
        assert word in shown
    assert "A against B. Ratio 0.985 with ours first, 0.990 with it second." in shown
    assert f"seed {pairs.SEED}" in shown and "a note [in brackets]" in shown


def test_only_time_in_turns_counts() -> None:
    own = [(1.0, 2.0), (4.0, 6.0), (9.0, 10.0)]
    assert turns.overlap(own, 0, 20) == 4
    assert turns.overlap(own, 1.5, 4.5) == 1
    assert turns.overlap(own, 2.5, 3.5) == 0
    assert turns.overlap(own, 5, 9.25) == 1.25


COUNTS = """
import os, time
with open(os.environ["BENCH_SPANS"], "w", buffering=1) as spans:
    while not os.path.exists(os.environ["BENCH_STOP"]):
        began = time.perf_counter()
        until = time.process_time() + {cpu_s}
        while time.process_time() < until:
            pass
        spans.write(f"10 {{began!r}} {{time.perf_counter()!r}}\\n")
"""


def test_programs_that_take_turns_are_told_apart_and_leave_nothing(tmp_path: Path) -> None:
    """One does in 2 ms of computing what the other does in 1: a factor of two in the rate, whatever else the machine does."""
    environment = pairs.environment()

    def program(name: str, cpu_s: float) -> turns.Program:
        return turns.Program(name, [sys.executable, "-c", COUNTS.format(cpu_s=cpu_s)], environment, tmp_path)

    cores = os.sched_getaffinity(0)
    both = [program("quick", 0.001), program("slow", 0.002)]
    quick, slow = turns.race(both, 1.0)
    assert quick > 1.2 * slow > 0
    assert [one.child.poll() for one in both] == [0, 0] and os.sched_getaffinity(0) == cores
    assert all(0.9 < one.seconds < 30 for one in both)


def test_a_program_that_fails_is_told_with_its_words_and_the_other_ended(tmp_path: Path) -> None:
    environment = pairs.environment()
    fails = turns.Program("fails", [sys.executable, "-c", "raise SystemExit('no such data')"], environment, tmp_path)
    waits = turns.Program("waits", [sys.executable, "-c", COUNTS.format(cpu_s=0.001)], environment, tmp_path)
    with pytest.raises(RuntimeError, match="no such data"):
        turns.race([waits, fails], 1.0)
    assert waits.child.poll() is not None


def test_a_program_that_ends_too_soon_is_told_and_the_other_ended(tmp_path: Path) -> None:
    endless = COUNTS.format(cpu_s=0.001)
    short = endless.replace('while not os.path.exists(os.environ["BENCH_STOP"])', "for _ in range(300)")
    assert short != endless
    ends, goes_on = (
        turns.Program(name, [sys.executable, "-c", text], pairs.environment(), tmp_path)
        for name, text in (("ends", short), ("goes_on", endless))
    )
    with pytest.raises(RuntimeError, match="exit status 0"):
        turns.race([ends, goes_on], 600.0)
    assert goes_on.child.poll() is not None


RANKS = """
import os, time
rank = os.fork()
name = os.environ["BENCH_SPANS"] + ("" if rank else ".1")
with open(name, "w", buffering=1) as spans:
    while not os.path.exists(os.environ["BENCH_STOP"]):
        began = time.perf_counter()
        until = time.process_time() + 0.001
        while time.process_time() < until:
            pass
        spans.write(f"10 {began!r} {time.perf_counter()!r}\\n")
if rank:
    raise SystemExit(os.waitpid(rank, 0)[1])
"""


@pytest.mark.parametrize("to_the_end", [True, False])
def test_all_ranks_of_a_program_run_in_its_turns_only_and_end_with_it(tmp_path: Path, to_the_end: bool) -> None:
    environment = pairs.environment()
    both = [
        turns.Program(name, [sys.executable, "-W", "ignore", "-c", RANKS], environment, tmp_path) for name in ("a", "b")
    ]
    turns.race(both, 0.5, to_the_end=to_the_end)
    for program in both:
        for name in (program.spans, Path(f"{program.spans}.1")):
            spans = [tuple(map(float, line.split()[1:])) for line in name.read_text().splitlines(keepends=True)[:-1]]
            began, ended = program.turns[0][0], program.turns[-1][1]
            inside = [span for span in spans if began <= span[0] and span[1] <= ended]
            assert len(inside) > 10 and all(turns.overlap(program.turns, *span) > 0 for span in inside)
        holders = [one for one in psutil.process_iter(["environ"]) if (one.info["environ"] or {}).get("BENCH_SPANS")]
        assert not [one for one in holders if one.info["environ"]["BENCH_SPANS"] == str(program.spans)]


def test_ranks_leave_after_the_same_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = tmp_path / "stop"
    monkeypatch.setenv("BENCH_SPANS", str(tmp_path / "spans"))
    monkeypatch.setenv("BENCH_STOP", str(stop))
    names: dict[str, Any] = {}
    exec(clock.SPANS, names)
    first, second = (names["Spans"](rank) for rank in (0, 1))
    assert not first.last() and not second.last()
    stop.touch()
    assert not second.last(), "rank 0 has not said anything yet"
    assert not first.last(), "the other may be past its end of this epoch"
    assert [first.last(), second.last()] == [True, True]
    first.file.close()
    second.file.close()


HPCML = re.compile(r"\b(hpcml|run)\b")


def of_hpcml(line: str) -> bool:
    return bool(HPCML.search(line))


def code(script: str) -> list[str]:
    """The lines of a script without their comments."""
    return [line.partition("#")[0].rstrip() for line in script.splitlines()]


@pytest.mark.parametrize("strategy", bench_strategies.ALL, ids=lambda strategy: strategy.name)
def test_both_sides_are_the_same_script_but_for_hpcml(strategy: bench_strategies.Strategy) -> None:
    """Whatever has nothing of hpcml is there by hand too, in the same order; what else is there is written down here."""
    notebook = (by_hand.NOTEBOOKS / f"{strategy.notebook}.py").read_text(encoding="utf-8")
    ours, bare = (by_hand.script(notebook, bare=bare, devices=2) for bare in (False, True))
    for name, text in (("ours", ours), ("by hand", bare)):
        compile(text, name, "exec")
        assert "class Spans" in text and "Result" not in text
    assert "hpcml.begin(" in ours and not any(map(of_hpcml, code(bare)))
    rest = iter(code(bare))
    own = []  # of the script by hand
    for line in code(ours):
        if not of_hpcml(line):
            while (other := next(rest, None)) != line:
                assert other is not None, f"{line!r} is not there by hand, or elsewhere"
                own.append(other.strip())
    torch = "import torch" in ours
    prelude = f"{by_hand.LOAD}{by_hand._TORCH if torch else by_hand._DEVICES.format(count=2)}".splitlines()
    own = [line for line in own if line and line not in map(str.strip, prelude)]
    wanted = ["load()", "dict("]
    wanted += (
        ["range(1, epochs + 1)", "in train:", "device"] if torch else ["range(0, ", "initial_epoch=0", "[Clock()]"]
    )
    assert own and not [line for line in own if not any(part in line for part in wanted)]
    assert all(any(part in line for line in own) for part in wanted)


@pytest.mark.parametrize("strategy", bench_strategies.ALL, ids=lambda strategy: strategy.name)
def test_checkpoints_can_be_left_out(strategy: bench_strategies.Strategy) -> None:
    notebook = (by_hand.NOTEBOOKS / f"{strategy.notebook}.py").read_text(encoding="utf-8")
    kept, without = (by_hand.script(notebook, bare=False, keep=keep) for keep in (True, False))
    compile(without, strategy.name, "exec")
    changed = [(a, b) for a, b in zip(code(kept), code(without), strict=True) if a != b]
    assert len(changed) == 1 and "keep=" in changed[0][0] and "keep=" not in changed[0][1]


def test_a_changed_notebook_is_noticed() -> None:
    with pytest.raises(ValueError, match="adapt by_hand"):
        by_hand.script("epochs = 7\n", bare=True)
    notebook = (by_hand.NOTEBOOKS / "simple2GPUsDDP.py").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"still has hpcml(.|\n)*run\.device_count"):
        by_hand.script(notebook.replace("model.train()", "run.device_count(), model.train()", 1), bare=True)


def test_a_strategy_is_measured_under_hpcml_and_by_hand(tmp_path: Path) -> None:
    """Two ranks on either side, by ``hpcml run`` and by torchrun, both to their own end."""
    pytest.importorskip("torch")
    strategy = next(one for one in bench_strategies.ALL if one.name == "ddp")
    by_hand.write_data(tmp_path)
    effort = bench_strategies.Effort(seconds=0.3, least=1, most=1, to_the_end=True)
    (pair,) = bench_strategies.measured(strategy, tmp_path, effort, limit_s=0).pairs
    assert pair.ours > 0 and pair.other > 0
    (run,) = rundir.every(tmp_path / "runs")
    assert rundir.read_json(run.status)["replicas_in_sync"] == 2


def test_a_strategy_without_its_framework_is_left_out_by_name() -> None:
    one = bench_strategies.ALL[0]
    told = bench_strategies.missing(dataclasses.replace(one, needs=("no_such_framework",), fix="install it"))
    assert one.name in told and "no_such_framework" in told and "install it" in told


def trial(trained: int, missing: int = 0, difference: float = 0.0) -> bench_resume.Trial:
    return bench_resume.Trial("ddp", "USR2", 1, 40, 30, trained, missing, difference)


def test_repeated_work_is_what_all_executions_have_trained_beyond_the_uninterrupted_run() -> None:
    steps = interrupted.EPOCHS * interrupted.STEPS
    assert trial(steps).repeated == 0 and trial(steps).holds(0)
    assert trial(steps + interrupted.STEPS).holds(0) and trial(steps + interrupted.STEPS).repeated == 1
    assert not trial(steps + interrupted.STEPS + 1).holds(0)
    assert not trial(steps, missing=1).holds(1), "a step that none has trained"
    assert trial(steps - 1, missing=1).repeated == 0
    assert not trial(steps, difference=1e-9).holds(0) and trial(steps, difference=1e-6).holds(1e-5)


def test_weights_are_the_same_only_where_all_bits_are(tmp_path: Path) -> None:
    import numpy as np

    def saved(name: str, *weights: Any) -> RunDir:
        run = RunDir(tmp_path, name)
        run.path.mkdir()
        np.savez(run.path / interrupted.WEIGHTS, *weights)
        return run

    ones, zeros = np.ones((2, 3), "float32"), np.zeros(4, "float32")
    right = saved("right", ones, zeros).path / interrupted.WEIGHTS
    assert bench_resume.difference(saved("same", ones, zeros), right) == 0
    assert bench_resume.difference(saved("off", ones, zeros + 0.5), right) == 0.5
    assert 0 < bench_resume.difference(saved("negative", ones, -zeros), right) < 1e-300
    assert bench_resume.difference(saved("fewer", ones), right) == float("inf")


def test_an_interrupted_training_is_resumed_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(bench_resume, "PACE_S", 0.1)
    seed = random.randrange(2**31)
    print("seed", seed)
    done = bench_resume.Bench(interrupted.ALL[0], tmp_path).trial("USR2", seed)
    print(done)
    assert done.holds(0) and done.repeated == 0 and 0 < done.resumed == done.stopped


def test_what_keeps_no_checkpoints_is_left_out_by_name() -> None:
    pytest.importorskip("torch")
    case = interrupted.ALL[0]
    assert not interrupted.missing(case)
    assert case.name in interrupted.missing(dataclasses.replace(case, keeps="no such call"))


def test_the_grid_has_both_ends_of_every_setting() -> None:
    start = space.Start(
        cores=8, world=1, gpus=0, replicas=1, steps=15, step_s=0.01,
        values={"intra_op_threads": 8, "inter_op_threads": 2, "prefetch": -1, "steps_per_execution": 1},
    )  # fmt: skip
    axes = space.axes(start, only=bench_tune.SETTINGS)
    few = [
        dataclasses.replace(axis, values=bench_tune.spread(axis.values, bench_tune.EACH[axis.name])) for axis in axes
    ]
    points = bench_tune.grid(few)
    assert len(points) == len({tuple(point.items()) for point in points}) == 64
    for axis, fewer in zip(axes, few, strict=True):
        assert {axis.values[0], axis.values[-1]} <= set(fewer.values) <= set(axis.values)


def test_a_point_of_the_grid_reaches_the_job_that_is_raced(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    bench = bench_tune.Bench(tmp_path, 1.0)
    tuned = job.load(bench._job("point", bench_tune.RACING, {"prefetch": -1, "intra_op_threads": 1}))
    assert tuned.tuning.given == {"prefetch": -1, "intra_op_threads": 1}
    course = job.load(bench._job("course", bench_tune.RACING, {}, bench_tune.COURSE))
    assert course.env.vars == bench_tune.COURSE and not course.tuning.given


def test_help_is_the_header_and_unknown_names_are_refused() -> None:
    told = subprocess.run([BENCH, "--help"], capture_output=True, text=True, check=True)
    assert "scripts/bench [NAME...] [--quick]" in told.stdout and "Exit status" in told.stdout
    refused = subprocess.run([BENCH, "trainig"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "training strategies resume cli engine" in refused.stderr


def test_what_arrived_of_the_journals_is_counted_point_by_point(tmp_path: Path) -> None:
    bench_delivery.prepare(tmp_path / "runs", 50)
    told = bench_delivery.synced(tmp_path, os.environ)
    assert told == "After `hpcml sync` of 1 runs the store has 100 % of the 50 points of all journals."
    with contextlib.closing(sqlite3.connect(tmp_path / "live.db")) as database:
        database.execute("DELETE FROM metrics WHERE key = 'metric_0' AND step = 3")
        database.commit()
    assert "98 % of the 50 points" in bench_delivery.synced(tmp_path, os.environ)
