"""Checkpoints: whole or not there, whatever happens while one is saved."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcml import rundir
from hpcml.errors import HpcmlError
from hpcml.rundir import RunDir
from hpcml.training import checkpoint
from hpcml.training.checkpoint import LeaseLost, Place, Store

KILLS = 100 if os.environ.get("HPCML_TEST_KILLS") == "all" else 25


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path, "r").make()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def store(run: RunDir, told: list[str]) -> Callable[..., Store]:
    def open_store(restart: int = 0, model: str = "cnn") -> Store:
        made = Store(run, restart, model, told.append)
        made.claim()
        return made

    return open_store


def content(step: int) -> Callable[[Path], None]:
    return lambda folder: (folder / "weights").write_text(f"weights of step {step}") and None


def test_the_newest_is_found_and_two_are_kept(run: RunDir, store: Callable[..., Store]) -> None:
    kept = store()
    assert kept.latest() is None
    for epoch in (1, 2, 3):
        assert kept.save(Place(10 * epoch, epoch), content(10 * epoch))
    found = store(restart=1).latest()
    assert found is not None
    assert (found.place, (found.path / "weights").read_text()) == (Place(30, 3, 0), "weights of step 30")
    assert sorted(path.name for path in run.checkpoints.glob("step-*")) == ["step-00000020", "step-00000030"]
    assert rundir.kept_at(run) == (0, 30)
    assert {oct(path.stat().st_mode & 0o777) for path in run.checkpoints.rglob("*") if path.is_file()} == {"0o600"}


def spoil_size(folder: Path) -> None:
    (folder / "weights").write_text("weig")


def spoil_content(folder: Path) -> None:
    (folder / "weights").write_bytes((folder / "weights").read_bytes()[::-1])


def spoil_manifest(folder: Path) -> None:
    (folder / "checkpoint.json").write_text('{"place": {"st')


def spoil_model(folder: Path) -> None:
    told = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**told, "model": "another"}))


def spoil_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (spoil_size, "weights has 4 bytes, not 18"),
        (spoil_content, "weights has changed since it was saved"),
        (spoil_manifest, ""),
        (spoil_model, "it is of another model"),
        (spoil_all, ""),
    ],
)
def test_one_that_is_not_whole_is_passed_over_with_a_word(
    store: Callable[..., Store], told: list[str], spoil: Callable[[Path], None], why: str
) -> None:
    kept = store()
    for epoch in (1, 2):
        kept.save(Place(10 * epoch, epoch), content(10 * epoch))
    spoil(kept.of(Place(20, 2)))
    later = store(restart=1)
    found = later.latest()
    assert found is not None and found.place == Place(10, 1)
    assert len(told) == 1 and told[0].startswith(f"checkpoint step-00000020 is passed over: {why}")
    assert later.save(Place(20, 2), content(20))  # trained again, it takes the spoilt one's place
    again = store(restart=2).latest()
    assert again is not None and again.place == Place(20, 2)


def test_a_full_disk_costs_one_checkpoint(store: Callable[..., Store], told: list[str]) -> None:
    kept = store()
    kept.save(Place(10, 1), content(10))

    def full(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    assert not kept.save(Place(20, 2), full)
    assert told == ["no checkpoint at step 20, the end of epoch 2: No space left on device; the one before is kept"]
    found = kept.latest()
    assert found is not None and found.place == Place(10, 1)
    assert kept.save(Place(30, 3), content(30))


def test_an_earlier_execution_that_is_still_alive_can_no_longer_save(run: RunDir, store: Callable[..., Store]) -> None:
    ghost = store(restart=0)
    ghost.save(Place(10, 1), content(10))
    living = store(restart=1)
    with pytest.raises(LeaseLost, match="restart 1 holds its checkpoints"):
        ghost.save(Place(20, 2), content(666))
    with pytest.raises(LeaseLost):
        ghost.claim()
    assert living.save(Place(20, 2), content(20))
    found = living.latest()
    assert found is not None and (found.path / "weights").read_text() == "weights of step 20"
    assert not list(run.checkpoints.glob(".saving-*"))


def test_a_folder_that_cannot_be_written_is_said_at_once(run: RunDir, store: Callable[..., Store]) -> None:
    run.checkpoints.write_text("a file")
    with pytest.raises(HpcmlError, match="can't be written"):
        store()


SAVES = """
import sys
from pathlib import Path
from hpcml.rundir import RunDir
from hpcml.training.checkpoint import Place, Store
store = Store(RunDir(Path(sys.argv[1]), "r"), int(sys.argv[2]), "cnn", print)
store.claim()
found = store.latest()
step = found.place.step if found else 0
print("from", step, flush=True)
while True:
    step += 1
    store.save(Place(step, step), lambda folder: [(folder / f"part{n}").write_bytes(b"%d" % step * 50000) for n in range(3)])
    print("kept", step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_the_last_kept_one(run: RunDir, store: Callable[..., Store]) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    dice = random.Random(seed)
    kept = 0
    for restart in range(KILLS):
        words = [sys.executable, "-c", SAVES, str(run.root), str(restart)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() in (f"from {kept}\n", f"from {kept + 1}\n")
            process.stdout.readline()  # it has kept one
            time.sleep(dice.uniform(0, 0.02))  # the moment is what is random here
            process.send_signal(signal.SIGKILL)
            said = [int(line.split()[1]) for line in process.stdout if line.startswith("kept") and line.endswith("\n")]
        found = store(restart=KILLS + restart).latest()
        run.lease.unlink()
        assert found is not None
        kept = found.place.step
        assert kept >= max(said, default=1)
        assert {(path.name, path.read_bytes()) for path in found.path.glob("part*")} == {
            (f"part{n}", b"%d" % kept * 50000) for n in range(3)
        }


def test_a_place_says_where_it_is() -> None:
    assert str(Place(7, 1, 2)) == "step 7, 2 steps into epoch 2"
    assert str(Place(6, 1, 1)) == "step 6, 1 step into epoch 2"
    assert str(Place(5, 1)) == "step 5, the end of epoch 1"


def test_term_is_ignored_only_while_a_training_heeds_the_stop_file() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with checkpoint.heeding():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is before
