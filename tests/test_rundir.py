"""Run directories: never reused, found again, private, and written atomically."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpcml import rundir
from hpcml.errors import HpcmlError
from hpcml.rundir import RunDir
from hpcml.site import Site

NOON = 1_800_000_000.0


def made(root: Path, name: str, stamp: float, slurm_job_id: int | None = None) -> RunDir:
    run = rundir.create(root, name, stamp)
    rundir.write_json(run.plan, {"name": name})
    if slurm_job_id:
        rundir.write_json(run.submitted, {"slurm_job_id": slurm_job_id})
    return run


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_racing_threads_get_a_directory_each(tmp_path: Path) -> None:
    count, together = 16, threading.Barrier(16)

    def create(_: int) -> str:
        together.wait()
        return rundir.create(tmp_path / "runs", "race", NOON).id

    with ThreadPoolExecutor(count) as pool:
        ids = list(pool.map(create, range(count)))
    assert len(set(ids)) == count
    assert {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()} == set(ids)


def test_a_run_is_named_after_time_and_job(tmp_path: Path) -> None:
    first, second = rundir.create(tmp_path, "mnist", NOON), rundir.create(tmp_path, "mnist", NOON)
    assert first.id.endswith("-mnist") and second.id == f"{first.id}-2"
    assert first.logs.is_dir() and first.events.is_dir()


def test_nothing_is_readable_by_others_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        run = rundir.create(tmp_path / "runs", "private", NOON)
        rundir.write_json(run.plan, {})
        child = run.child("variant").make()
    finally:
        os.umask(before)
    folders = [run.root, run.path, run.logs, run.events, child.path, child.logs]
    assert {mode(path) for path in folders} == {0o700}
    assert mode(run.plan) == 0o600


def test_where_no_directory_can_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HpcmlError, match="HPCML_RUNS"):
        rundir.create(tmp_path / "file" / "runs", "x")


def test_the_runs_folder_is_hpcml_runs_else_the_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site("s", runs="$HPCML_PROJECT/there")
    assert rundir.runs_root(site, tmp_path) == tmp_path / "there"
    monkeypatch.setenv("HPCML_RUNS", str(tmp_path / "here"))
    assert rundir.runs_root(site, tmp_path) == tmp_path / "here"


def test_a_run_is_found_by_id_by_slurm_id_and_as_the_newest(tmp_path: Path) -> None:
    old, middle = made(tmp_path, "b", NOON, 7), made(tmp_path, "c", NOON + 1, 8)
    new = made(tmp_path, "a", NOON + 2)
    child = middle.child("variant").make()
    rundir.write_json(child.plan, {})
    assert rundir.find(tmp_path, old.id) == old
    assert rundir.find(tmp_path, "8") == middle
    assert rundir.find(tmp_path, None) == new
    assert rundir.find(tmp_path, f"{middle.id}/variant") == child
    assert [run.id for run in rundir.every(tmp_path)] == [new.id, middle.id, child.id, old.id]


@pytest.mark.parametrize("reference", ["9", "nope", "../outside", "."])
def test_an_unknown_run_names_the_newest(tmp_path: Path, reference: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "plan.json").write_text("{}")
    run = made(tmp_path / "runs", "a", NOON)
    with pytest.raises(HpcmlError) as error:
        rundir.find(tmp_path / "runs", reference)
    assert run.id in str(error.value)


def test_an_id_cut_short_or_mistyped_is_asked_after(tmp_path: Path) -> None:
    older = made(tmp_path, "tiny", NOON)
    run, other = made(tmp_path, "tiny", NOON + 1), made(tmp_path, "mnist", NOON + 2)
    stamp = run.id.removesuffix("-tiny")
    swapped = run.id.replace("tiny", "tniy")
    for given, meant in [(stamp, run), ("tiny", run), (older.id[:-2], older), (swapped, run), ("mnist", other)]:
        with pytest.raises(HpcmlError) as error:
            rundir.find(tmp_path, given)
        assert f"did you mean '{meant.id}'?; hpcml runs list" in str(error.value)
    for given in ("qq", "?"):
        with pytest.raises(HpcmlError) as error:
            rundir.find(tmp_path, given)
        assert "did you mean" not in str(error.value)


@pytest.mark.parametrize("reference", [None, "x"])
def test_no_runs_at_all(tmp_path: Path, reference: str | None) -> None:
    with pytest.raises(HpcmlError, match="no runs in"):
        rundir.find(tmp_path / "absent", reference)


def test_a_projects_own_plan_json_is_no_run(tmp_path: Path) -> None:
    run = made(tmp_path, "a", NOON)
    run.code.mkdir()
    (run.code / "plan.json").write_text("{}")
    assert list(rundir.every(tmp_path)) == [run]


def test_readers_see_the_old_or_the_new_and_never_half(tmp_path: Path) -> None:
    path, values = tmp_path / "x.json", [{"n": n, "pad": "x" * 200_000} for n in (0, 1)]
    rundir.write_json(path, values[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            rundir.write_json(path, values[1])
            rundir.write_json(path, values[0])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            assert json.loads(path.read_text()) in values
    finally:
        stop.set()
        writer.join()
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_write_that_fails_leaves_the_old_and_no_litter(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        rundir.write_bytes(tmp_path / "folder", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"null"])
def test_what_is_no_json_object_reads_as_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert rundir.read_json(tmp_path / "x") == rundir.read_json(tmp_path / "absent") == {}


def test_whether_the_owner_lives(tmp_path: Path) -> None:
    run = made(tmp_path, "a", NOON)
    assert not rundir.owner_is_alive(run)
    rundir.claim(run)
    assert rundir.owner_is_alive(run)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owner = rundir.read_json(run.owner)
    for change, alive in [({"pid": ended.pid}, False), ({"start": "1"}, False), ({"host": "other", "pid": 1}, True)]:
        rundir.write_json(run.owner, {**owner, **change})
        assert rundir.owner_is_alive(run) is alive, change
