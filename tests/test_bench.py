"""The statistics of the benchmarks: pairs, intervals, verdicts; and that their two sides are the same work."""

import difflib
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bench import bench_training, pairs, turns

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


def test_both_sides_of_training_are_the_same_script_but_for_hpcml() -> None:
    notebook = bench_training.NOTEBOOK.read_text(encoding="utf-8")
    ours, bare = (bench_training.script(notebook, bare=bare) for bare in (False, True))
    for name, text in (("ours", ours), ("bare", bare)):
        compile(text, name, "exec")
        assert "class Clock" in text and "Result" not in text
    lines = difflib.unified_diff(ours.splitlines(), bare.splitlines(), lineterm="", n=0)
    changed = [line for line in lines if line[0] in "+-" and not line.startswith(("+++", "---"))]
    removed = [line[1:].strip() for line in changed if line[0] == "-"]
    assert [line[1:].strip() for line in changed if line[0] == "+"] == [
        next(line for line in removed if "run.tuned(" in line).replace("run.tuned(", "dict("),
        next(line for line in removed if "Clock()" in line).replace("*run.callbacks(global_batch=global_batch), ", ""),
    ]
    assert sum("hpcml.begin(" in line for line in removed) == 1 and removed[-1] == "run.finish()"


def test_a_changed_notebook_is_noticed() -> None:
    with pytest.raises(ValueError, match="adapt bench_training"):
        bench_training.script("epochs = 7\n", bare=True)


def test_help_is_the_header_and_unknown_names_are_refused() -> None:
    told = subprocess.run([BENCH, "--help"], capture_output=True, text=True, check=True)
    assert "scripts/bench [NAME...] [--quick]" in told.stdout and "Exit status" in told.stdout
    refused = subprocess.run([BENCH, "trainig"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "training cli engine" in refused.stderr
