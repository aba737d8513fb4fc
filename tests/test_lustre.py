"""The stripe layout: set on Lustre only, by the rule, and never in the way of the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcml import filesystem
from hpcml.data import lustre

GIB = 2**30
LFS = """#!/bin/sh
printf '%s\\n' "$*" >> "$LFS_CALLS"
[ -z "$LFS_FAILS" ] || { echo "error: setstripe: $LFS_FAILS" >&2; exit 22; }
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder ``lustre/`` that the kernel's list of mounts shows as Lustre, and the calls of ``lfs``."""
    (tmp_path / "lustre" / "set").mkdir(parents=True)
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\n10.0.0.1@o2ib:/scratch {tmp_path}/lustre lustre rw,flock 0 0\n")
    monkeypatch.setattr(filesystem, "Path", lambda path: mounts if path == "/proc/self/mounts" else Path(path))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "lfs").write_text(LFS)
    (programs / "lfs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("LFS_CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(lustre, "_said", set())
    return tmp_path / "calls"


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (0, 1),
        (784, 1),
        (GIB, 1),
        (GIB + 1, 4),
        (8 * GIB, 4),
        (16 * GIB, 4),
        (17 * GIB, 5),
        (64 * GIB, 8),
        (1024 * GIB, 32),
    ],
)
def test_the_layout_follows_the_size_of_a_file(calls: Path, size: int, count: int) -> None:
    folder = calls.parent / "lustre" / "set"
    said: list[str] = []
    lustre.stripe(folder, size, say=said.append)
    assert calls.read_text() == f"setstripe -c {count} -S 4M {folder}\n"
    assert said == [f"on Lustre: {count} stripe{'s' * (count > 1)} of 4M for files in {folder}"]


def test_a_link_to_lustre_is_lustre_and_another_disk_is_not(calls: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "lustre")
    (tmp_path / "lustre2").mkdir()
    said: list[str] = []
    lustre.stripe(tmp_path / "lustre2", GIB, say=said.append)
    assert (said, calls.exists()) == ([], False)
    lustre.stripe(tmp_path / "link" / "set", GIB, say=said.append)
    assert len(calls.read_text().splitlines()) == 1


def test_without_lfs_it_is_said_once(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    said: list[str] = []
    for name in ("a", "b"):
        folder = calls.parent / "lustre" / name
        folder.mkdir()
        lustre.stripe(folder, GIB, say=said.append)
    assert said == ["the stripe layout stays as it is: no lfs on PATH (it comes with the Lustre client)"]


@pytest.mark.parametrize("trouble", ["fails", "hangs", "is no program"])
def test_what_lfs_says_is_a_note_and_never_the_end(calls: Path, monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    program = calls.parent / "bin" / "lfs"
    if trouble == "fails":
        monkeypatch.setenv("LFS_FAILS", "cannot set stripes: Invalid argument (22)")
    elif trouble == "hangs":
        program.write_text("#!/bin/sh\nexec sleep 60\n")
        monkeypatch.setattr(lustre, "_PATIENCE_S", 0.2)
    else:
        program.write_bytes(b"\0")
    folder = calls.parent / "lustre" / "set"
    said: list[str] = []
    lustre.stripe(folder, GIB, say=said.append)
    lustre.stripe(folder, GIB, say=said.append)
    (sentence,) = said
    assert sentence.startswith(f"the stripe layout of {folder} stays as it is: ")
    told = {
        "fails": "Invalid argument (22)",
        "hangs": "timed out after 0.2 seconds",
        "is no program": "Exec format error",
    }
    assert told[trouble] in sentence
