"""SIGKILL at random moments takes no acknowledged point from a journal: thirty here, 300 by ``scripts/bench kills``."""

import random
from pathlib import Path

from bench import bench_kills


def test_thirty_kills_lose_nothing(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    outcome = bench_kills.kill_many(tmp_path, 30, seed)
    print(outcome)
    assert (outcome.kills, outcome.lost, outcome.duplicates, outcome.unreadable) == (30, 0, 0, 0)
    assert outcome.acknowledged > 300, "the kills hit writers at work"
    assert outcome.kept - outcome.acknowledged <= 30, "at most the one point that each had not acknowledged yet"


def test_the_count_sees_what_is_missing_and_what_is_doubled(tmp_path: Path) -> None:
    for seed in range(1, 100):  # on a busy machine the end may come before a few points are written
        runs = tmp_path / f"runs{seed}"
        assert bench_kills.kill_many(runs, 1, seed).holds
        (path,) = runs.rglob("*.jsonl")
        if len(whole := path.read_bytes().splitlines(keepends=True)) > 4:
            break
    print("seed", seed)
    assert len(whole) > 4
    said = [int(line.split(b'"step":')[1].split(b",")[0]) for line in whole[:4]]
    path.write_bytes(b"".join([whole[0], whole[0], b"garbage\n", *whole[2:4]]))
    counted = bench_kills.count(runs, [(path.parent.name, step) for step in said], kills=1)
    assert (counted.lost, counted.duplicates, counted.unreadable, counted.holds) == (1, 1, 1, False)
