"""``hpcml.data.shards``: what is packed comes back byte for byte, whatever its names; what can't be packed is told."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpcml.cli.root import run as hpcml
from hpcml.data.shards import (
    Damaged,
    Progress,
    Shards,
    layout,
    pack,
    packing,
    plan,
    tar,
    unpack,
    verify,
    walk,
    workers,
    writing,
)
from hpcml.data.shards import index as indices
from hpcml.errors import HpcmlError

JPEG = b"\xff\xd8\xff" + bytes(range(200)) + b"\xff\xd9"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(100))
ROOT = os.geteuid() == 0


def fill(folder: Path, files: dict[bytes | str, bytes]) -> Path:
    for name, content in files.items():
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    return folder


def files_of(folder: Path) -> dict[bytes, tuple[bytes, bool]]:
    """Names, contents, and whether executable, of all regular files; links are followed."""
    found = {}
    for parent, _, names in os.walk(os.fsencode(folder)):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, "rb") as file:
                key = os.path.relpath(path, os.fsencode(folder))
                found[key] = file.read(), bool(os.stat(path).st_mode & 0o100)
    return found


def bytes_of(packed: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in packed.iterdir()}


def beside(dest: Path) -> list[str]:
    return sorted(path.name for path in dest.parent.iterdir() if path.name.startswith(f".{dest.name}"))


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Three classes of 40 files of 784 bytes."""
    generator = random.Random(5)
    names = (f"{label}/{number:03d}.bin" for label in "abc" for number in range(40))
    return fill(tmp_path / "digits", {name: generator.randbytes(784) for name in names})


ODD: dict[bytes | str, bytes] = {
    "plain.txt": b"text",
    "empty": b"",
    "with space/and\nnewline": b"1",
    "ümläut/日本語.bin": b"2" * 513,
    b"not-utf8/\xff\xfe\x80": b"3" * 512,
    "-rf": b"4",
    "a" * 100: b"5" * 511,
    "b" * 101: b"6",
    "/".join(["deep" * 20] * 20): b"7",
    b"long-\xff" + b"c" * 150: b"8",
    "é" * 60: b"9",
    ".hidden/.file": b"10",
    "odd.é\t\x7f": b"11",
    "large": bytes(range(256)) * 40_000,
}


def test_odd_names_come_back_by_unpack_and_by_tar(tmp_path: Path) -> None:
    source = fill(tmp_path / "odd", ODD)
    (source / "plain.txt").chmod(0o755)
    made = pack(source, tmp_path / "packed", shard_bytes=100_000, workers=2)
    assert made.samples == len(ODD) and made.shards > 1
    wanted = files_of(source)
    unpack(made.path, tmp_path / "back")
    assert files_of(tmp_path / "back") == wanted
    for number in range(made.shards):
        words = ["tar", "-xf", made.path / layout.shard_name(number), "-C", tmp_path / "by tar"]
        (tmp_path / "by tar").mkdir(exist_ok=True)
        done = subprocess.run(words, capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "by tar") == wanted


def test_shards_are_read_by_tarfile_with_the_offsets_of_the_index(digits: Path, tmp_path: Path) -> None:
    made = pack(digits, tmp_path / "packed", shard_bytes=50_000)
    shards = Shards(made.path)
    rows = iter(range(len(shards)))
    for number in range(made.shards):
        with tarfile.open(made.path / layout.shard_name(number)) as archive:
            for member in archive:
                row = next(rows)
                assert (member.name, member.offset_data) == (shards.names[row], int(shards.index.offsets[row]))
                assert (member.uid, member.gid, member.mtime, member.mode) == (0, 0, 0, 0o644)
                assert archive.extractfile(member).read() == shards.read([row])[0]  # type: ignore[union-attr]
    assert next(rows, None) is None


def test_a_plain_header_is_the_one_that_tarfile_makes() -> None:
    names = [b"a", b"folder/file.jpg", b"x" * 100]
    sizes, modes = np.array([0, 784, 8**11 - 1]), np.array([0o644, 0o755, 0o644])
    for name, size, mode, header in zip(names, sizes, modes, tar.headers(names, sizes, modes), strict=True):
        info = tarfile.TarInfo(name.decode())
        info.size, info.mode = int(size), int(mode)
        # tarfile leaves the device numbers empty, GNU tar writes zeros as here; the checksum differs by them.
        theirs = info.tobuf(tarfile.USTAR_FORMAT)
        assert header[:148] == theirs[:148] and header[156:329] == theirs[156:329]
        read = tarfile.TarInfo.frombuf(header, "utf-8", "strict")  # which checks the checksum
        assert (read.name, read.size, read.mode, read.type) == (info.name, info.size, info.mode, tarfile.REGTYPE)


@pytest.mark.parametrize(("name", "size"), [(b"x" * 300, 5), (b"big", 8**11), (b"\xff" * 120, 9 * 2**30)])
def test_what_a_header_does_not_hold_is_in_a_pax_header(name: bytes, size: int) -> None:
    sizes = np.array([size])
    (header,) = tar.headers([name], sizes, np.array([0o644]))
    assert len(header) == tar.header_lengths([name], sizes)[0]
    with tarfile.open(fileobj=io.BytesIO(header), errors="surrogateescape") as archive:
        member = archive.next()
    assert member is not None
    assert (os.fsencode(member.name), member.size, member.offset_data) == (name, size, len(header))


def test_the_same_files_give_the_same_bytes(digits: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    for name in sorted(files_of(digits), reverse=True):
        fill(copied, {name: (digits / os.fsdecode(name)).read_bytes()})
        os.utime(copied / os.fsdecode(name), (0, 0))
    for folder, count in itertools.product((digits, copied), (1, 2, 5)):
        pack(folder, tmp_path / f"{folder.name}{count}", shard_bytes=30_000, workers=count)
    first, *others = [bytes_of(path) for path in sorted(tmp_path.glob("*[125]"))]
    assert len(first) > 4 and len(others) == 5
    assert all(other == first for other in others)


def test_samples_are_mixed_and_all_shards_about_as_large(digits: Path, tmp_path: Path) -> None:
    made = pack(digits, tmp_path / "packed", shard_bytes=50_000)
    shards = Shards(made.path)
    sizes = [shard["bytes"] for shard in shards.described["shards"]]
    assert max(sizes) <= 50_000 + 2048 and min(sizes) > max(sizes) * 0.8
    assert {name[0] for name in shards.names[:30]} == {"a", "b", "c"}


def test_how_many_shards_there_are_follows_from_the_bytes() -> None:
    def count(total: int, shard_bytes: int | None = None) -> int:
        sizes = np.full(100, total // 100)
        names = [b"%d" % number for number in range(100)]
        modes = times = np.zeros(100, dtype=np.int64)
        listing = walk.Listing(Path("/"), names, sizes, times, modes, (), ())
        return len(plan.planned(listing, shard_bytes).bytes)

    assert count(0) == 1
    assert count(40 * 2**20) == 10 + 1  # of 4 MiB, and the headers
    assert count(64 * 2**30, 2**20) == 100  # a file for each, no empty ones
    assert [count(mib * 2**20) for mib in (100, 1000, 4000)] == [16, 16, 16]
    assert count(16 * 2**30) == 16 * 4 + 1, "of 256 MiB"
    assert count(1024 * 2**30, 2**30) == 100


def test_classes_labels_and_single_files(tmp_path: Path) -> None:
    files = {"a/1": b"x", "b/1": b"y", "b/2": b"z", "LICENSE": b"l", "b/deep/3": b"d", ".git/x": b"g"}
    made = pack(fill(tmp_path / "source", dict(files)), tmp_path / "packed")
    shards = Shards(made.path)
    assert made.classes == ("a", "b") and shards.classes == ["a", "b"]
    told = dict(zip(shards.names, shards.labels.tolist(), strict=True))
    assert told == {"a/1": 0, "b/1": 1, "b/2": 1, "LICENSE": -1, "b/deep/3": -1, ".git/x": -1}
    assert shards.described["kind"] == "files"


def test_progress_ends_where_all_is_done(digits: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        told: list[Progress] = []
        pack(digits, tmp_path / f"packed{count}", shard_bytes=20_000, workers=count, progress=told.append)
        assert told[-1] == Progress(120, 120, 120 * 784, 120 * 784)
        assert [one.files for one in told] == sorted(one.files for one in told)


# What can't be packed.


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    files = {
        "a/good.jpg": JPEG, "a/empty.jpg": b"", "a/cut.jpg": JPEG[:-2], "b/good.png": PNG, "b/text.PNG": b"hello",
        "b/empty.txt": b"", "b/._good.jpg": b"of a Mac",
    }  # fmt: skip
    return fill(tmp_path / "images", dict(files))


def test_damaged_images_are_told_all_at_once(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(Damaged) as caught:
        pack(damaged, tmp_path / "packed")
    assert {(problem.origin, problem.what) for problem in caught.value.damaged} == {
        ("a/empty.jpg", "an empty file"),
        ("a/cut.jpg", "a JPEG that is cut off"),
        ("b/text.PNG", "neither JPEG nor PNG, whatever its name says"),
    }
    assert "--skip-damaged" in str(caught.value) and not (tmp_path / "packed").exists()


def test_damaged_images_are_left_out_if_asked(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(Damaged):
        pack(damaged, tmp_path / "packed")
    made = pack(damaged, tmp_path / "packed", skip_damaged=True)
    assert [problem.origin for problem in made.skipped] == ["a/cut.jpg", "a/empty.jpg", "b/text.PNG"]
    assert verify(made.path) == []
    assert Shards(made.path).described["packed"]["left_out"][0] == {
        "name": "a/cut.jpg",
        "why": "a JPEG that is cut off",
    }
    unpack(made.path, tmp_path / "back")
    assert sorted(files_of(tmp_path / "back")) == [b"a/good.jpg", b"b/._good.jpg", b"b/empty.txt", b"b/good.png"]
    assert beside(made.path) == []


def test_a_mended_file_is_packed_by_the_next_run(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(Damaged):
        pack(damaged, tmp_path / "packed")
    for name, content in {"a/empty.jpg": JPEG, "a/cut.jpg": JPEG, "b/text.PNG": PNG}.items():
        (damaged / name).write_bytes(content)
    assert pack(damaged, tmp_path / "packed").samples == 7


def test_what_could_not_be_read_once_is_read_again(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, *arguments: int, **more: int) -> int:
        if path == b"a/007.bin":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return really(path, *arguments, **more)  # type: ignore[arg-type]

    really = os.open
    with monkeypatch.context() as patch, pytest.raises(Damaged, match=r"a/007.bin: can't be read: Permission denied"):
        patch.setattr(os, "open", refuse)
        pack(digits, tmp_path / "packed", workers=1)
    made = pack(digits, tmp_path / "packed", skip_damaged=True)
    assert (made.samples, made.skipped) == (120, ())


@pytest.fixture
def broken_off(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Packing that was interrupted at the fourth shard; from then on the list of the shards that are written."""
    written: list[str] = []

    def noted(source: writing.Source, path: Path, say: workers.Say) -> writing.Part:
        if path.name == layout.shard_name(3) and path.name not in written:
            written.append(path.name)
            raise KeyboardInterrupt
        written.append(path.name)
        return really(source, path, say)

    really = packing.write_shard
    monkeypatch.setattr(packing, "write_shard", noted)
    with pytest.raises(KeyboardInterrupt):
        pack(digits, tmp_path / "packed", shard_bytes=20_000, workers=1)
    assert len(list((tmp_path / ".packed.packing/parts").iterdir())) == 3
    return written


def test_only_what_is_missing_is_written_again(broken_off: list[str], digits: Path, tmp_path: Path) -> None:
    broken_off[:] = [layout.shard_name(3)]
    made = pack(digits, tmp_path / "packed", shard_bytes=20_000, workers=1)
    assert made.resumed == 3
    assert broken_off[1:] == [layout.shard_name(number) for number in range(3, made.shards)]


def test_shards_of_an_earlier_run_are_of_no_use_when_a_file_has_changed(
    broken_off: list[str], digits: Path, tmp_path: Path
) -> None:
    for label in "abc":
        fill(digits, {f"{label}/{number:03d}.bin": bytes(784) for number in range(40)})
    made = pack(digits, tmp_path / "packed", shard_bytes=20_000)
    assert made.resumed == 0
    unpack(made.path, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(digits)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Damaged):
        pack(fill(tmp_path / "source", {"a/1.jpg": b""}), tmp_path / "packed", skip_damaged=True)


# Root may read everything, but for those capabilities.
_CAPABILITIES = "-dac_override,-dac_read_search"
MORTAL = ["setpriv", f"--bounding-set={_CAPABILITIES}", f"--inh-caps={_CAPABILITIES}"] if ROOT else []


@pytest.mark.skipif(
    ROOT and not shutil.which("setpriv"), reason="setpriv: as root it takes the right to read everything"
)
def test_unreadable_files_and_folders_are_told(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", {"a/1": b"x", "a/2": b"y", "closed/3": b"z", "blind/4": b"w"})
    for name, mode in {"a/2": 0, "closed": 0, "blind": 0o644}.items():
        (source / name).chmod(mode)
    code = "import sys; from hpcml.cli.root import run; sys.exit(run(sys.argv[1:]))"
    words = [*MORTAL, sys.executable, "-c", code, "data", "pack", source, tmp_path / "packed", "--json"]
    try:
        first = subprocess.run(words, capture_output=True, text=True)
        second = subprocess.run([*words, "--skip-damaged"], capture_output=True, text=True)
    finally:
        for name in ("closed", "blind"):
            (source / name).chmod(0o755)
    assert first.returncode == 2, first.stderr
    denied = "can't be read: Permission denied"
    told = {(one["name"], one["why"]) for one in json.loads(first.stdout)["damaged"]}
    assert told == {("a/2", denied), ("closed/", denied), ("blind/4", denied)}
    assert second.returncode == 0, second.stderr
    assert Shards(tmp_path / "packed").names == ["a/1"]


def test_links_inside_are_followed_and_others_told(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", {"a/1": b"x", "b/2": b"y"})
    outside = fill(tmp_path / "outside", {"3": b"z"})
    (source / "a/file").symlink_to("../b/2")
    (source / "folder").symlink_to("b")
    links = {"a/up": "..", "a/self": "self", "out": outside, "file out": outside / "3", "nowhere": "gone"}
    for name, target in links.items():
        (source / name).symlink_to(target)
    os.mkfifo(source / "pipe")
    with pytest.raises(Damaged) as caught:
        pack(source, tmp_path / "packed")
    told = {problem.origin: problem.what for problem in caught.value.damaged}
    assert told == {
        "a/up": "a symbolic link that leads back to a folder above it",
        "a/self": "a symbolic link that leads round in a circle",
        "out": f"a symbolic link that leads out of the folder, to {outside}",
        "file out": f"a symbolic link that leads out of the folder, to {outside / '3'}",
        "nowhere": "a symbolic link: No such file or directory",
        "pipe": "neither a file nor a folder",
    }
    made = pack(source, tmp_path / "packed", skip_damaged=True)
    assert sorted(Shards(made.path).names) == ["a/1", "a/file", "b/2", "folder/2"]


def test_empty_folders_and_names_that_clash_are_noted(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", {"Cat/1": b"", "cat/2": b"", "dog/X.bin": b"", "dog/x.bin": b""})
    (source / "nothing" / "in here").mkdir(parents=True)
    empty, clash = pack(source, tmp_path / "packed").notes
    assert "1 empty folder left out: nothing/in here/" in empty
    assert "Cat and cat" in clash and "dog/X.bin and dog/x.bin" in clash


@pytest.mark.parametrize("change", [b"12345", b"1", None], ids=["grown", "shrunk", "gone"])
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_a_file_that_changes_meanwhile_is_an_error(
    change: bytes | None, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = 2 * 2**20 if large else 1
    source = fill(tmp_path / "source", {"a": b"123" * unit, "b": b"1"})

    def then_change(*arguments: object) -> walk.Listing:
        listing = look(*arguments)
        (source / "a").unlink()
        if change is not None:
            (source / "a").write_bytes(change * unit)
        return listing

    look = packing.walk
    monkeypatch.setattr(packing, "walk", then_change)
    with pytest.raises(HpcmlError, match=r"a: it changed while it was packed"):
        pack(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_places_that_can_not_be(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(source: Path, dest: Path) -> str:
        with pytest.raises(HpcmlError) as caught:
            pack(source, dest)
        return str(caught.value)

    assert "no such folder" in told(tmp_path / "none", tmp_path / "x")
    assert "is no folder" in told(digits / "a/001.bin", tmp_path / "x")
    assert "lie in each other" in told(digits, digits / "packed")
    assert "lie in each other" in told(digits / "a", digits)
    (tmp_path / "link").symlink_to(digits)
    assert "lie in each other" in told(digits, tmp_path / "link/packed")
    (tmp_path / "void").mkdir()
    assert "holds no file" in told(tmp_path / "void", tmp_path / "x")
    assert "is there already" in told(digits / "a", digits / "b")
    assert beside(tmp_path / "x") == [] and files_of(tmp_path / "digits")
    monkeypatch.chdir(tmp_path / "void")
    assert "the folder you are in" in told(digits, Path("."))
    monkeypatch.chdir(tmp_path)
    pack(digits, Path("void"))  # an empty folder is no obstacle
    assert "hpcml data verify" in told(digits, tmp_path / "void")


def test_one_at_a_time(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_PATIENCE_S", 0.3)
    with (tmp_path / ".packed.packing.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(HpcmlError, match="another process is packing into"):
            pack(digits, tmp_path / "packed")
    assert pack(digits, tmp_path / "packed").samples == 120


# A full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 300 KiB and 8 files."""
    if not ROOT:
        pytest.skip("mounting: needs root")
    libc = ctypes.CDLL(None, use_errno=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    if libc.mount(b"tmpfs", bytes(disk), b"tmpfs", 0, b"size=300k,nr_inodes=12") != 0:
        pytest.skip(f"mounting: not here: {os.strerror(ctypes.get_errno())}")
    try:
        yield disk
    finally:
        assert libc.umount2(bytes(disk), 2) == 0


def enlarge(disk: Path, options: bytes) -> None:
    assert ctypes.CDLL(None).mount(b"tmpfs", bytes(disk), b"tmpfs", 32, options) == 0  # MS_REMOUNT


@pytest.mark.parametrize("count", [1, 2])
def test_a_disk_that_runs_full(count: int, digits: Path, tmp_path: Path, small_disk: Path) -> None:
    whole = pack(digits, tmp_path / "whole", shard_bytes=20_000)
    with pytest.raises(HpcmlError, match=r"no space left\n  fix: make room.* run it again"):
        pack(digits, small_disk / "packed", shard_bytes=20_000, workers=count)
    assert not (small_disk / "packed").exists()
    enlarge(small_disk, b"size=2m,nr_inodes=100")
    made = pack(digits, small_disk / "packed", shard_bytes=20_000, workers=count)
    assert made.resumed > 0 and bytes_of(made.path) == bytes_of(whole.path)


def test_a_disk_that_is_too_small_is_told_before(digits: Path, small_disk: Path) -> None:
    fill(digits, {"more": bytes(400_000)})
    with pytest.raises(HpcmlError, match=r"1 MiB are needed and 0 MiB free"):
        pack(digits, small_disk / "packed")


def test_unpacking_on_a_full_disk_leaves_nothing(digits: Path, tmp_path: Path, small_disk: Path) -> None:
    pack(digits, tmp_path / "packed")
    with pytest.raises(HpcmlError, match=r"no space left\n  fix: make room"):
        unpack(tmp_path / "packed", small_disk / "back")
    assert list(small_disk.iterdir()) == []


def test_a_quota_is_told(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, content: bytes) -> int:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch, pytest.raises(HpcmlError, match=r"shard-00000.tar: the quota is used up"):
        patch.setattr(os, "write", refuse)
        pack(digits, tmp_path / "packed", workers=1)
    assert pack(digits, tmp_path / "packed").samples == 120


# Damage.


@pytest.fixture
def packed(digits: Path, tmp_path: Path) -> Path:
    fill(digits, {"x" * 150: b"long name", "large": bytes(range(256)) * 20_000, "none": b""})
    return pack(digits, tmp_path / "packed", shard_bytes=60_000).path


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


SEED = random.SystemRandom().randrange(2**32)


def test_a_flipped_bit_is_found_wherever_it_is(packed: Path) -> None:
    print("seed", SEED)
    generator = random.Random(SEED)
    large = int(Shards(packed).row("large"))
    for path in sorted(packed.iterdir()):
        for _ in range(8):
            at, bit = generator.randrange(path.stat().st_size), generator.randrange(8)
            flip(path, at, bit)
            (damage,) = verify(path.parent, workers=1)
            flip(path, at, bit)
            assert damage.file == path.name, (path, at, bit)
            is_large = damage.sample == "large" and damage.end - damage.begin == Shards(packed).sizes[large]
            assert damage.begin <= at < damage.end, (path, at, bit, damage)
            assert is_large or damage.end - damage.begin == 1, (path, at, bit, damage)
    assert verify(packed) == []


def test_damage_is_told_with_sample_and_part(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = Shards(packed)
    row = shards.row("b/017.bin")
    number, offset = int(shards.index.shards[row]), int(shards.index.offsets[row])
    file = packed / layout.shard_name(number)
    for at in (offset - 512, offset + 5, offset + 784):
        flip(file, at, 3)
    assert [str(one) for one in verify(packed, workers=2)] == [
        f"{file.name}: byte {offset - 512}: not what was packed: the header of 'b/017.bin'",
        f"{file.name}: byte {offset + 5}: not what was packed: the content of 'b/017.bin'",
        f"{file.name}: byte {offset + 784}: not what was packed: the padding of 'b/017.bin'",
    ]
    assert hpcml(["data", "verify", str(packed)]) == 1
    assert f"{file.name}: byte {offset + 5}: not what was packed: the content of 'b/017.bin'" in capsys.readouterr().err
    with pytest.raises(HpcmlError, match=f"{file.name}: byte {offset} and on, 'b/017.bin'"):
        unpack(packed, packed.with_name("back"))
    assert not packed.with_name("back").exists() and beside(packed.with_name("back")) == []


def test_lost_cut_and_lengthened_files(packed: Path) -> None:
    file = packed / layout.shard_name(1)
    content = file.read_bytes()
    file.write_bytes(content + b"\0")
    assert [one.what for one in verify(packed)] == ["more than was packed"]
    file.write_bytes(content[:3000])
    (cut,) = verify(packed)
    assert (cut.begin, cut.end) == (3000, len(content)) and "cut off" in cut.what
    with pytest.raises(HpcmlError, match="is not what was packed: 3000 bytes instead of"):
        Shards(packed).read(range(len(Shards(packed))))
    file.unlink()
    (lost,) = verify(packed)
    assert (lost.file, lost.what) == (file.name, "can't be read: No such file or directory")
    with pytest.raises(HpcmlError, match=r"shard-00001.tar: No such file"):
        Shards(packed).gather(range(len(Shards(packed)))[:1])
    file.write_bytes(content)
    (packed / layout.INDEX).unlink()
    assert [one.file for one in verify(packed)] == [layout.INDEX]
    with pytest.raises(HpcmlError, match=r"index.npz: No such file"):
        Shards(packed)
    (packed / layout.DATASET).unlink()
    with pytest.raises(HpcmlError, match="no packed data set"):
        verify(packed)


@pytest.mark.parametrize("name", [b"../out", b"/abs", b"a/../../out", b"a//b", b"a/.", b"", b"x\0y", b"..", b"a/"])
def test_a_name_that_leads_out_is_refused(name: bytes, tmp_path: Path) -> None:
    evil = tmp_path / "in/evil"
    evil.mkdir(parents=True)
    columns = np.array([2]), np.array([0o644]), np.zeros((1, 32), np.uint8), np.zeros(1, np.int32)
    index, (size,) = indices.placed([name], *columns, 1)
    raw = index.to_bytes()
    (evil / layout.INDEX).write_bytes(raw)
    (evil / layout.DATASET).write_bytes(indices.describe(index, raw, [size], {"left_out": []}))
    (evil / layout.shard_name(0)).write_bytes(bytes(size))
    with pytest.raises(HpcmlError, match="would lead out of the folder"):
        unpack(evil, tmp_path / "in/back")
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["in", "evil", *bytes_of(evil)])


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    packed = pack(fill(tmp_path / "source", {"a/1": b"x"}), tmp_path / "packed").path
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "back").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HpcmlError, match="is there already"):
        unpack(packed, tmp_path / "back")
    assert list((tmp_path / "elsewhere").iterdir()) == []


# Reading.


def test_reading_in_any_order(digits: Path, packed: Path) -> None:
    with Shards(packed) as shards:
        assert len(shards) == 123 and sum(map(len, shards.read(range(123)))) == shards.described["bytes"]
        rows = random.Random(1).sample([row for row, name in enumerate(shards.names) if name.endswith(".bin")], 50)
        wanted = [(digits / shards.names[row]).read_bytes() for row in rows]
        assert shards.read(rows) == wanted
        array = shards.gather(np.array(rows))
        assert array.shape == (50, 784) and [line.tobytes() for line in array] == wanted
        assert shards.gather([]).size == 0
        with pytest.raises(HpcmlError, match="differ in size"):
            shards.gather([*rows, shards.row("large")])
        assert b"".join(shards.pieces(shards.row("large"))) == (digits / "large").read_bytes()
        assert list(shards.pieces(shards.row("none"))) == [] and shards.gather([shards.row("none")]).shape == (1, 0)
        shards.advise()
        again = pickle.loads(pickle.dumps(shards))
        assert again.read(rows) == wanted and again.fingerprint == shards.fingerprint
    assert shards.read(rows) == wanted, "a closed one opens its files again"


def test_files_are_opened_once_each_and_closed(packed: Path) -> None:
    shards = Shards(packed)
    assert held(packed) == 0
    for _ in range(3):
        shards.read(range(len(shards)))
        shards.gather([shards.row("a/001.bin")])
    assert held(packed) == shards.count == mapped(packed)
    del shards
    assert held(packed) == mapped(packed) == 0


def mapped(packed: Path) -> int:
    """How many mappings of a set's shards this process has."""
    return Path("/proc/self/maps").read_text().count(f"{packed}/shard-")


def held(packed: Path) -> int:
    """How many of a set's shards this process has open."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += f"{packed}/shard-" in os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the listing's own
            continue
    return count


def test_threads_and_forked_processes_read_at_once(packed: Path) -> None:
    shards = Shards(packed)
    everything = range(len(shards))
    wanted = Shards(packed).read(everything)
    found: list[bool] = []

    def look() -> None:
        found.append(all(shards.read(everything) == wanted for _ in range(5)))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    told: list[int] = []
    workers.run(
        lambda _, say: say({"sum": sum(map(len, shards.read(everything)))}),
        range(4),
        4,
        lambda m: told.append(m["sum"]),
    )
    assert told == [sum(map(len, wanted))] * 4


def test_without_addresses_for_a_mapping_gather_reads(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(packed)
    rows = [shards.row(f"a/{number:03d}.bin") for number in range(40)]
    mapped = shards.gather(rows)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    other = Shards(packed)
    monkeypatch.setattr(other, "_bytes", other._bytes)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, limits[1]))
    try:
        read = other.gather(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert other._content is None and (read == mapped).all()


# Processes.


def test_a_process_that_is_killed_is_told() -> None:
    def die(task: int, say: workers.Say) -> None:
        os.kill(os.getpid(), 9)

    with pytest.raises(HpcmlError, match=r"ended by SIGKILL, as the kernel does when memory runs out"):
        workers.run(die, range(4), 2, lambda _: None)


def test_what_a_process_raises_is_raised_here() -> None:
    def raise_it(error: Exception) -> None:
        def work(task: int, say: workers.Say) -> None:
            if task == 3:
                raise error

        workers.run(work, range(6), 2, lambda _: None)

    with pytest.raises(HpcmlError, match=r"here: wrong\n  fix: right"):
        raise_it(HpcmlError("wrong", origin="here", fix="right"))
    with pytest.raises(OSError, match="No space") as caught:
        raise_it(OSError(errno.ENOSPC, "No space", "/x"))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/x")
    with pytest.raises(RuntimeError, match="ZeroDivisionError: by nought"):
        raise_it(ZeroDivisionError("by nought"))


@pytest.mark.parametrize("tasks", [1, 7, 40_000])
def test_each_task_is_done_once(tasks: int) -> None:
    done: list[int] = []
    workers.run(lambda task, say: say({"task": task}), range(tasks), 3, lambda message: done.append(message["task"]))
    assert sorted(done) == list(range(tasks))


# Memory.

LIMIT = 100 * 2**20
PACK_AND_READ = """
import sys
from pathlib import Path
from hpcml.data.shards import Shards, pack, unpack, verify
source, dest, back = map(Path, sys.argv[1:])
pack(source, dest, workers=2, shard_bytes=128 * 2**20)
assert verify(dest, workers=2) == []
shards = Shards(dest)
for row in range(len(shards)):
    for piece in shards.pieces(row):
        pass
unpack(dest, back, workers=2)
import re, resource
own = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]  # ru_maxrss begins with the parent's
print(max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


def in_cgroup(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture
def limited() -> Iterator[Path | None]:
    """A group of processes that may use ``LIMIT`` of memory, file cache included; None where none can be made."""
    one, two = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group = (one if one.is_dir() else two) / f"hpcml-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if one.is_dir() else "memory.max")).write_text(str(LIMIT))
    except OSError:
        if group.is_dir():
            group.rmdir()
        yield None
        return
    yield group
    group.rmdir()


def test_a_set_twice_as_large_as_the_memory(tmp_path: Path, limited: Path | None) -> None:
    source = tmp_path / "source"
    block = random.Random(3).randbytes(2**20)
    fill(source, {f"{number % 7}/{number}.bin": block[number : number + 500_000] for number in range(280)})
    with (source / "large").open("wb") as file:
        for _ in range(80):
            file.write(block)
    assert sum(len(content) for content, _ in files_of(source).values()) > 2 * LIMIT
    words = [sys.executable, "-c", PACK_AND_READ, source, tmp_path / "packed", tmp_path / "back"]
    enter = None if limited is None else lambda: in_cgroup(limited)
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=enter)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < LIMIT, "of each process, in KiB"
    shutil.rmtree(tmp_path / "packed")
    assert files_of(tmp_path / "back") == files_of(source)


# The commands.


def test_the_commands(digits: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    def told(*words: str, code: int = 0) -> tuple[str, str]:
        assert hpcml(["data", *words]) == code
        out, err = capfdbinary.readouterr()
        return out.decode(), err.decode()

    fill(digits, {"a/odd\nname": b"\x00\xff"})
    dest = str(tmp_path / "packed")
    out, err = told("pack", str(digits), dest, "--shard-mb", "0.05")
    first, second, third = out.splitlines()
    assert first.startswith(f"packed {digits} into {dest}: 121 files, 92 KiB, in ") and err == ""
    assert second.startswith("  4 shards of 4") and "3 classes" in second and "fingerprint" in second
    assert f"hpcml data ls {dest}" in third and f'hpcml.data.open("{dest}")' in third
    out, err = told("ls", dest, "a/00*")
    assert out.splitlines() == [f"784  a/00{number}.bin" for number in range(10)]
    assert err == "10 files, 7.7 KiB, in 4 shards\n"
    assert told("ls", dest, "*odd*")[0] == "2  a/odd\\nname\n"
    (listed,) = json.loads(told("ls", dest, "*odd*", "--json")[0])
    assert listed["name"] == "a/odd\nname" and listed["bytes"] == 2
    with open(tmp_path / "packed" / listed["shard"], "rb") as file:
        file.seek(listed["offset"])
        assert file.read(2) == b"\x00\xff"
    assert hpcml(["data", "cat", dest, "a/odd\nname"]) == 0
    assert capfdbinary.readouterr().out == b"\x00\xff"
    assert "did you mean 'a/001.bin'?" in told("cat", dest, "a/001.bim", code=2)[1]
    assert told("verify", dest)[0] == f"{dest}: whole, every byte is as it was packed\n"
    assert json.loads(told("verify", dest, "--json")[0]) == []
    back = str(tmp_path / "back")
    assert told("unpack", dest, back)[0].startswith(f"unpacked {dest} into {back}: 121 files, 92 KiB, all as they were")
    assert files_of(tmp_path / "back") == files_of(digits)
    made = json.loads(told("pack", str(digits), str(tmp_path / "again"), "--json")[0])
    assert made["samples"] == 121 and made["path"] == str(tmp_path / "again") and made["seconds"] > 0
    assert "is there already" in told("pack", str(digits), dest, code=2)[1]
    assert "no packed data set" in told("ls", str(digits), code=2)[1]


def test_a_bare_name_is_one_in_the_data_folder(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HPCML_DATA", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert hpcml(["data", "pack", "digits", "packed"]) == 0
    assert hpcml(["data", "verify", "packed"]) == 0
    assert hpcml(["data", "pack", "letters", "x"]) == 2
    assert "no folder 'letters' here, and none in the data folder" in capsys.readouterr().err
