"""What a file system gives: measured, cleaned up, and turned into advice for the set that lies there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcml import filesystem
from hpcml.cli.root import run as cli
from hpcml.data import listing, measure
from hpcml.data.staging import scratch
from hpcml.errors import BAD_INPUT, DONE, INTERRUPTED


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "digits"
    for label in range(3):
        (folder / str(label)).mkdir(parents=True)
        for number in range(20):
            (folder / str(label) / f"{number}.png").write_bytes(os.urandom(880))
    return folder


def names(folder: Path) -> set[str]:
    return {
        str(Path(above, name).relative_to(folder))
        for above, folders, files in os.walk(folder)  # unlike rglob, it takes it well when a folder goes meanwhile
        for name in (*folders, *files)
    }


def slow(monkeypatch: pytest.MonkeyPatch, each_s: float, *, below: str) -> None:
    """Let opening the files of a folder take a while, as on Lustre."""
    real = Path.open

    def opened(path: Path, *words: object, **named: object) -> object:
        if f"/{below}/" in str(path):
            time.sleep(each_s)
        return real(path, *words, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", opened)


def test_it_measures_tells_and_leaves_nothing(
    digits: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(digits.parent)
    monkeypatch.setenv("HPCML_DATA", str(digits.parent))
    assert cli(["data", "bench", "digits", "--seconds", "1"]) == DONE
    told = capsys.readouterr().out
    assert "60 files, 52 KiB" in told and "→ nothing to do" in told
    assert cli(["data", "bench", str(digits), "--seconds", "1", "--json"]) == DONE
    found = json.loads(capsys.readouterr().out)
    assert (found["files"], found["bytes"], found["samples"]) == (60, 60 * 880, None)
    assert found["where"] == str(digits.parent), "beside the set"
    assert found["speeds"]["piece"] == 880
    assert all(found["speeds"][name] > 0 for name in ("created", "opened", "opened_many", "written", "read", "random"))
    assert found["epoch_s"] > 0 and found["packed_s"] > 0
    assert names(digits.parent) == before


def test_many_slow_openings_call_for_packing(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(400):
        (digits / "0" / f"more{number}.png").write_bytes(b"x")
    slow(monkeypatch, 0.05, below="digits")
    done = measure.bench(digits, 2)
    assert done.own and done.own < listing.READERS / 0.05
    assert done.epoch_s == pytest.approx(460 / done.own)
    assert done.advice == (f"pack it: hpcml data pack {digits} DEST",)


def test_a_slow_network_calls_for_staging(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = tmp_path / "mounts"
    shown.write_text(f"/dev/vda / ext4 rw 0 0\nnone {tmp_path}/data nfs4 rw 0 0\n")
    monkeypatch.setattr(filesystem, "Path", lambda path: shown if path == "/proc/self/mounts" else Path(path))
    for name in scratch.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for number in range(400):
        (digits / "0" / f"more{number}.png").write_bytes(b"x")
    slow(monkeypatch, 0.1, below="data")
    done = measure.bench(digits, 2)
    assert done.kind == "nfs4"
    assert [sentence.partition(":")[0] for sentence in done.advice] == ["pack it", "have each node copy it first"]


def test_a_packed_set_is_told_by_its_samples(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("numpy", reason="NumPy: not installed")
    from hpcml.data import shards

    for path in list(digits.rglob("*.png")):
        path.rename(path.with_suffix(".bin"))  # no whole images
    shards.pack(digits, digits.parent / "packed", say=lambda sentence: None)
    done = measure.bench(digits.parent / "packed", 1)
    assert (done.samples, done.own, done.epoch_s) == (60, None, done.packed_s)
    assert cli(["data", "bench", str(digits.parent / "packed"), "--seconds", "1"]) == DONE
    assert "this set: 60 samples in " in capsys.readouterr().out


def test_an_empty_folder_is_measured_without_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["data", "bench", str(tmp_path), "--seconds", "1"]) == DONE
    told = capsys.readouterr().out
    assert "small files" in told and "this set" not in told and "→" not in told


def test_nothing_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["data", "bench", str(tmp_path / "none")]) == BAD_INPUT
    assert f"{tmp_path}/none: No such file or directory\n  fix: give the path" in capsys.readouterr().err
    assert cli(["data", "bench", "flowerz"]) == BAD_INPUT
    assert "no folder at" in capsys.readouterr().err


needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="mounts: needs root")


@needs_mounts
@pytest.mark.parametrize("options", ["size=3m", "size=3m,ro"], ids=["small", "read-only"])
def test_where_little_or_nothing_can_be_written(
    tmp_path: Path, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounts: {done.stderr.strip()}")
    try:
        (folder / "set").mkdir()
        (folder / "set" / "1.png").write_bytes(b"x")
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
        assert cli(["data", "bench", str(folder / "set"), "--seconds", "1"]) == DONE
        told = capsys.readouterr().out
        assert ("it can't be written to" if "ro" in options else "no room for a large file") in told
        assert names(folder) == {"set", "set/1.png"}
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_it_leaves_nothing(digits: Path, number: int) -> None:
    before = names(digits.parent)
    words = [sys.executable, "-m", "hpcml", "data", "bench", str(digits), "--seconds", "60"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while names(digits.parent) == before and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == INTERRUPTED
    assert names(digits.parent) == before
