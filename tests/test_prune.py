"""``hpcml runs prune``: what goes and what never does; whether MLflow has a run is the ledger's word alone here."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest

from hpcml import rundir
from hpcml.cli.root import run as hpcml
from hpcml.node import batch
from hpcml.rundir import RunDir
from hpcml.tracking import mlflow

MIB = 2**20
DAY = 86_400


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runs"
    monkeypatch.setenv("HPCML_RUNS", str(folder))
    monkeypatch.setenv("HPCML_SITE", "local")
    # The ledger's own tests use a real MLflow; here a mark in the run's folder stands for it.
    monkeypatch.setattr(mlflow, "is_delivered", lambda run, **_: (run.path / "is-delivered").exists())
    return folder


def make(root: Path, name: str, *, days: float = 0, mib: int = 0, ended: bool = True, delivered: bool = True) -> RunDir:
    """A run of so many days ago; names sort as the runs' ages do."""
    stamp = time.time() - days * DAY
    run = rundir.create(root, name, stamp)
    rundir.write_json(run.plan, {})
    (run.path / "profile").mkdir()
    (run.path / "profile" / "trace").write_bytes(os.urandom(mib * MIB // 2))
    (run.path / "model").write_bytes(os.urandom(mib * MIB - mib * MIB // 2))
    if ended:
        batch.close_run(run, 0)
        marker = rundir.read_json(run.status)
        rundir.write_json(run.status, marker | {"ended": stamp})
    else:
        rundir.claim(run)
    if delivered:
        (run.path / "is-delivered").touch()
    return run


def tune(root: Path, name: str, *, days: float = 0, mib: int = 0, ended: bool = True) -> RunDir:
    """A tuning of so many days ago with one trial, as hpcml tune leaves it: undelivered."""
    stamp = time.time() - days * DAY
    tuning = rundir.create(root / "tune", name, stamp)
    folder = RunDir(root, f"tune/{tuning.id}")
    trial = folder.child("01").make()
    rundir.write_json(trial.plan, {})
    (trial.path / "trace").write_bytes(os.urandom(mib * MIB))
    if ended:
        rundir.write_json(folder.path / "tune.json", {})
    for path in (trial.path, folder.path):
        os.utime(path, (stamp, stamp))
    return folder


def tuned(root: Path) -> list[str]:
    return sorted(path.name.rsplit("-", 1)[1] for path in (root / "tune").glob("2*"))


def left(root: Path) -> list[str]:
    return [run.id.rsplit("-", 1)[1] for run in rundir.every(root) if "/" not in run.id]


def prune(*words: str, code: int = 0) -> None:
    assert hpcml(["runs", "prune", "--yes", *words]) == code


def test_the_newest_are_kept(root: Path) -> None:
    for days, name in enumerate("abcde"):
        make(root, name, days=days)
    prune("--keep", "2")
    assert left(root) == ["a", "b"]


def test_by_itself_it_keeps_twenty(root: Path) -> None:
    for days in range(22):
        make(root, f"r{days}", days=days)
    prune()
    assert left(root) == [f"r{days}" for days in range(20)]


def test_what_is_not_ended_or_not_delivered_stays(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(root, "goes", days=3)
    make(root, "runs", days=4, ended=False)
    make(root, "unsent", days=5, delivered=False)
    parent = make(root, "parent", days=6)
    variant = parent.child("v").make()
    rundir.write_json(variant.plan, {})
    batch.close_run(variant, 0)  # ended, but MLflow has only its parent
    for words in (["--keep", "0"], ["--max-gb", "0"], ["--older-than", "1h"], ["--light"]):
        capsys.readouterr()
        prune(*words)
        assert left(root) == ["runs", "unsent", "parent"], words
        if words != ["--light"]:
            assert "3 older runs are kept" in capsys.readouterr().err
    assert all((run.path / "profile").is_dir() for run in rundir.every(root) if "/" not in run.id)


def test_older_than(root: Path) -> None:
    for days, name in ((1, "a"), (29, "b"), (31, "c"), (400, "d")):
        make(root, name, days=days)
    prune("--older-than", "30d")
    assert left(root) == ["a", "b"]
    prune("--older-than", "12h", "--keep", "1")
    assert left(root) == ["a"], "--keep goes before"


@pytest.mark.parametrize("age", ["30", "d", "-1d", "30 days", "1e3d", ""])
def test_what_is_no_age(root: Path, age: str, capsys: pytest.CaptureFixture[str]) -> None:
    make(root, "a", days=99)
    prune("--older-than", age, code=2)
    assert left(root) == ["a"] and "12h, 30d, 8w" in capsys.readouterr().err


def test_until_it_fits(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for days, name in enumerate("abcd"):
        make(root, name, days=days, mib=4)
    make(root, "unsent", days=9, mib=4, delivered=False)
    prune("--max-gb", str(13 / 1024))
    assert left(root) == ["a", "b", "unsent"], "the oldest that may go went first, no more of them than needed"
    assert "stay in" not in capsys.readouterr().err
    prune("--max-gb", str(13 / 1024))
    assert left(root) == ["a", "b", "unsent"]
    prune("--max-gb", "0.001")
    assert left(root) == ["unsent"] and "nothing more of it may go" in capsys.readouterr().err


def test_tunings_go_by_the_same_rules(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(root, "a")
    tune(root, "b", days=1, mib=4)
    make(root, "c", days=2, mib=4)
    tune(root, "d", days=40, mib=4)
    prune("--keep", "4")
    assert (left(root), tuned(root)) == (["a", "c"], ["b", "d"]), "they count as runs do"
    prune("--older-than", "30d")
    assert (left(root), tuned(root)) == (["a", "c"], ["b"])
    assert "deleted 0 runs and 1 tuning, 4" in capsys.readouterr().out
    prune("--max-gb", str(5 / 1024))
    assert (left(root), tuned(root)) == (["a"], ["b"]), "the oldest first, whatever it is"
    prune("--keep", "1")
    assert (left(root), tuned(root)) == (["a"], [])


def test_a_tuning_that_may_go_on_stays(root: Path) -> None:
    tune(root, "begun", days=0.5, ended=False)
    killed = tune(root, "killed", days=2, ended=False)
    alive = tune(root, "alive", days=3, ended=False)
    rundir.claim(alive.child("01"))
    os.utime(alive.child("01").path, (1, 1))
    prune("--keep", "0")
    assert tuned(root) == ["alive", "begun"] and not killed.path.exists()


def test_age_and_size_together(root: Path) -> None:
    for days, name in ((0, "a"), (1, "b"), (2, "c"), (50, "d")):
        make(root, name, days=days, mib=4)
    prune("--older-than", "30d", "--max-gb", str(9 / 1024))
    assert left(root) == ["a", "b"]


def test_light_deletes_profiles_only(root: Path) -> None:
    new, old = make(root, "new", mib=2), make(root, "old", days=300, mib=2)
    going = make(root, "going", days=9, ended=False)
    prune("--light")
    assert left(root) == ["new", "going", "old"]
    assert not (new.path / "profile").exists() and not (old.path / "profile").exists()
    assert (new.path / "model").stat().st_size == (old.path / "model").stat().st_size == MIB
    assert (going.path / "profile").is_dir(), "it may still write there"
    prune("--light", "--keep", "1")
    assert left(root) == ["new", "going"]


def test_sizes_are_shown_and_nothing_goes_without_a_yes(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    run = make(root, "a", days=1, mib=3)
    assert hpcml(["runs", "prune", "--keep", "0"]) == 2  # nobody answers
    assert left(root) == ["a"]
    assert capsys.readouterr().out.startswith(f"{run.id}  3.0 MiB\n")
    prune("--keep", "0", "--json")
    (told,) = json.loads(capsys.readouterr().out)
    assert told["path"] == str(run.path) and 3 * MIB <= told["bytes"] < 3.1 * MIB


def test_links_are_not_followed(root: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_bytes(os.urandom(5 * MIB))
    run = make(root, "a", days=1)
    (run.path / "data").symlink_to(precious)
    (run.path / "file").symlink_to(precious / "data")
    (run.path / "profile" / "data").symlink_to(precious)
    prune("--light")
    prune("--max-gb", str(3 / 1024))
    assert left(root) == ["a"], "what a link points to takes no room here"
    prune("--keep", "0")
    assert left(root) == [] and (precious / "data").exists()
