"""Packing that is killed goes on to the same bytes: twenty kills here, 200 by ``scripts/bench packkills``."""

import random
from pathlib import Path

from bench import bench_packkills


def test_twenty_kills_change_no_byte(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    outcome = bench_packkills.kill_many(tmp_path, 20, seed)
    print(outcome)
    assert outcome.kills == 20 and outcome.holds
    assert outcome.resumed > 0, "the kills hit runs that had written shards"
