"""Staging: one verified copy a node where it pays, else the set itself with a reason; nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcml import filesystem
from hpcml.cli.root import run as cli
from hpcml.data import listing, locks, staging
from hpcml.data.staging import jobfolder, paying, scratch
from hpcml.errors import BAD_INPUT, DONE, HpcmlError


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This node's disk, as a cluster names it."""
    for name in scratch.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk").chmod(0o755)  # whatever the umask is
    monkeypatch.setenv("LOCALSCRATCH", str(tmp_path / "disk"))
    yield tmp_path / "disk"
    for job in list(jobfolder._held):
        jobfolder._release(job)


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """A set below ``lustre/``, which is a plain folder unless ``mounts`` says otherwise."""
    folder = tmp_path / "lustre" / "flowers"
    for kind in ("roses", "tulips"):
        (folder / kind).mkdir(parents=True)
        for number in range(20):
            (folder / kind / f"{number}.jpg").write_bytes(os.urandom(2000 + number))
    (folder / "empty").mkdir()
    (folder / "roses" / "line\nfeed \udcff.jpg").write_bytes(b"odd name")
    return folder


def mounts(monkeypatch: pytest.MonkeyPatch, folder: Path, **kinds: str) -> None:
    """Let the kernel's list of mounts show folders as file systems of other kinds."""
    shown = folder / "mounts"
    lines = ["/dev/vda / ext4 rw 0 0", *(f"none {folder / name} {kind} rw 0 0" for name, kind in kinds.items())]
    shown.write_text("\n".join(lines))
    monkeypatch.setattr(filesystem, "Path", lambda path: shown if path == "/proc/self/mounts" else Path(path))


def slow(monkeypatch: pytest.MonkeyPatch, folder: Path, each_s: float) -> None:
    """Let opening a file below a folder take a while, as on Lustre."""
    real = Path.open

    def opened(path: Path, *words: object, **named: object) -> object:
        if folder in path.parents:
            time.sleep(each_s)
        return real(path, *words, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", opened)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def place(folder: Path, stage: str, **named: int) -> tuple[Path, str]:
    said: list[str] = []
    path = staging.place(folder, stage, say=said.append, **named)
    return path, said[-1]


# ------------------------------------------------------------------ copying


def test_a_set_is_copied_whole_verified_and_not_twice(flowers: Path, disk: Path) -> None:
    path, said = place(flowers, "always")
    assert path.name == "flowers" and disk in path.parents
    assert tree(path) == tree(flowers)
    assert (path / "roses" / "3.jpg").stat().st_mtime_ns == (flowers / "roses" / "3.jpg").stat().st_mtime_ns
    assert said.startswith(f"data flowers: copied to {path} in ") and "41 files" in said
    inode = (path / "roses" / "3.jpg").stat().st_ino
    again, said = place(flowers, "always")
    assert (again, (path / "roses" / "3.jpg").stat().st_ino) == (path, inode)
    assert "verified before" in said
    assert disk.stat().st_mode & 0o777 == 0o755 and (disk / f"hpcml-{os.getuid()}").stat().st_mode & 0o777 == 0o700


def test_a_changed_set_is_copied_anew_and_the_old_copy_goes(flowers: Path) -> None:
    first, _ = place(flowers, "always")
    (flowers / "roses" / "new.jpg").write_bytes(b"new")
    second, _ = place(flowers, "always")
    assert first != second and not first.exists()
    assert tree(second) == tree(flowers)


def test_a_single_file_and_links(tmp_path: Path, flowers: Path) -> None:
    (tmp_path / "set.npz").write_bytes(b"arrays")
    path, _ = place(tmp_path / "set.npz", "always")
    assert (path.name, path.read_bytes()) == ("set.npz", b"arrays")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "roses").symlink_to(flowers / "roses")
    (linked / "one.jpg").symlink_to(flowers / "tulips" / "1.jpg")
    copy, _ = place(linked, "always")
    assert not (copy / "one.jpg").is_symlink() and tree(copy / "roses") == tree(flowers / "roses")
    (flowers / "roses" / "back").symlink_to(flowers)
    path, said = place(linked, "always")
    assert path == linked and said.endswith("/roses/back/roses can't be read: leads back to a folder above it")


CHILD = """
import sys
from pathlib import Path
from hpcml.data import staging
said = []
print(staging.place(Path(sys.argv[1]), "always", say=said.append), *said, sep="\\n")
"""


@pytest.mark.parametrize("job", ["", "17"], ids=["by hand", "in a job"])
def test_the_tasks_of_a_node_copy_once(flowers: Path, job: str) -> None:
    env = {**os.environ, **({"SLURM_JOB_ID": job} if job else {})}
    words = [sys.executable, "-c", CHILD, str(flowers)]
    tasks = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) for _ in range(5)]
    said = [task.communicate(timeout=100)[0] for task in tasks]
    assert len({text.splitlines()[0] for text in said}) == 1, said
    inodes = len({path.stat().st_ino for path in Path(said[0].splitlines()[0]).rglob("*.jpg")})
    assert inodes == 41
    if not job:  # in a job the others repeat what the first has said
        assert sum("copied to" in text for text in said) == 1, said


def stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_ctime_ns


STUCK = """
import sys, threading
from pathlib import Path
from hpcml.data import staging
def progress(done, total):
    if done > total / 2:
        print("half", flush=True)
        threading.Event().wait()
staging.placed_for(Path(sys.argv[1]), "always", say=print, progress=progress)
"""


def test_what_a_killed_copier_has_finished_is_taken_over(flowers: Path, disk: Path) -> None:
    place(flowers, "always")
    (flowers / "roses" / "3.jpg").write_bytes(b"changed")  # so that it is copied again
    for lock in disk.rglob("*.lock"):
        os.utime(lock, (0, 0))  # it was held long ago: who holds it now doesn't hang
    task = subprocess.Popen([sys.executable, "-c", STUCK, str(flowers)], stdout=subprocess.PIPE, text=True)
    assert task.stdout and task.stdout.readline() == "half\n"
    said: list[str] = []
    done = threading.Event()

    def wait() -> None:
        said.append(str(staging.place(flowers, "always", say=said.append)))
        done.set()

    thread = threading.Thread(target=wait)
    thread.start()
    until = time.monotonic() + 60
    while "data flowers: waiting for this node's copy" not in said and time.monotonic() < until:
        time.sleep(0.01)
    assert not done.is_set(), "it waits while the other one lives"
    (journal,) = disk.rglob(".journal")
    names = [json.loads(line)[0] for line in journal.read_text().splitlines()]
    finished = {stamp(next(disk.rglob(f"flowers/{name}"))) for name in names}
    task.send_signal(signal.SIGKILL)
    task.communicate()
    assert done.wait(60)
    thread.join()
    path = Path(said[-1])
    assert tree(path) == tree(flowers)
    assert finished and finished <= {stamp(one) for one in path.rglob("*.jpg")}
    assert sorted(one.name for one in path.parent.iterdir()) == [".verified", "flowers"]


def test_a_lock_tells_since_when_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    os.utime(path, (0, 0))
    with locks.exclusive(path, on_wait=lambda: pytest.fail("nobody holds it")) as everywhere:
        assert everywhere and path.stat().st_mtime > time.time() - 60


def test_a_copier_that_hangs_is_not_waited_for(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = subprocess.Popen([sys.executable, "-c", STUCK, str(flowers)], stdout=subprocess.PIPE, text=True)
    try:
        assert task.stdout and task.stdout.readline() == "half\n"
        monkeypatch.setattr(staging, "PATIENCE_S", 0.0)
        path, said = place(flowers, "always")
        assert path == flowers and "has done nothing for 0 s" in said
    finally:
        task.kill()
        task.communicate()


@pytest.mark.parametrize("fault", ["a flipped byte", "a source that changes", "an unreadable file"])
def test_what_is_not_the_source_is_not_used(
    flowers: Path, disk: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = threading.Event()

    def progress(done: int, total: int) -> None:
        copies = list(disk.rglob("*.jpg"))
        if fault == "a flipped byte" and done == total:
            copies[0].write_bytes(b"!" + copies[0].read_bytes()[1:])
            spoilt.set()
        if fault == "a source that changes" and not spoilt.is_set():
            spoilt.set()
            for path in flowers.rglob("*.jpg"):
                path.write_bytes(path.read_bytes() + b"more")

    if fault == "an unreadable file":
        # The kernel's answer for another user's file; root may read them all.
        real = Path.open

        def opened(path: Path, *words: object, **named: object) -> object:
            if path == flowers / "tulips" / "7.jpg":
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *words, **named)  # type: ignore[call-overload]

        monkeypatch.setattr(Path, "open", opened)
    placed = staging.placed_for(flowers, "always", say=print, progress=progress)
    told = {
        "a flipped byte": "the copy of ",
        "a source that changes": " changed while it was copied",
        "an unreadable file": "tulips/7.jpg: Permission denied",
    }
    assert (placed.path, placed.staged) == (flowers, False) and told[fault] in placed.reason
    assert list(disk.rglob("*.jpg")) == []


def test_a_packed_set_is_compared_with_its_own_index(flowers: Path, tmp_path: Path) -> None:
    pytest.importorskip("numpy", reason="NumPy: not installed")
    from hpcml.data import shards

    for image in list(flowers.rglob("*.jpg")):
        image.rename(image.with_suffix(".bin"))  # no whole images
    shards.pack(flowers, tmp_path / "packed", say=lambda sentence: None)
    path, said = place(tmp_path / "packed", "always")
    assert tree(path) == tree(tmp_path / "packed") and "verified" in said
    assert paying.samples_of(path) == 41
    shard = tmp_path / "packed" / "shard-00000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 4
    shard.write_bytes(content)
    path, said = place(tmp_path / "packed", "always")
    assert path == tmp_path / "packed" and "the set itself is damaged: shard-00000.tar: byte 700" in said


needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="mounts: needs root")


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    words = ["mount", "-t", "tmpfs", "-o", size, "none", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounts: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@needs_mounts
def test_a_disk_that_fills_meanwhile_is_left_as_it_was(
    flowers: Path, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(disk, "size=1m"):
        mounts(monkeypatch, tmp_path, lustre="lustre", disk="xfs")

        def others(done: int, total: int) -> None:
            with contextlib.suppress(OSError), (disk / "others").open("ab", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

        placed = staging.placed_for(flowers, "always", say=print, progress=others)
        assert (placed.path, placed.staged) == (flowers, False)
        assert placed.reason.startswith("read from lustre: no copy here: ") and placed.reason.endswith(" is full")
        assert list(disk.rglob("*.jpg")) == []
        (disk / "others").unlink()
        assert staging.placed_for(flowers, "always", say=print).staged
        (flowers / "more.jpg").write_bytes(bytes(2**20))
        _, said = place(flowers, "always")
        assert f"don't fit on {disk} (xfs, $LOCALSCRATCH), which has room for " in said


# ------------------------------------------------------------------ whether


def test_on_the_nodes_own_disk_and_by_never_nothing_is_copied(flowers: Path, disk: Path) -> None:
    path, said = place(flowers, "auto")
    assert path == flowers and said.endswith(" is this node's own")
    assert place(flowers, "never") == (flowers, "data flowers: read where it lies (stage is never)")
    assert list(disk.iterdir()) == []


def test_auto_copies_where_opening_is_slow_and_says_what_it_reckons(
    flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts(monkeypatch, tmp_path, lustre="lustre")
    slow(monkeypatch, flowers, 0.02)
    path, said = place(flowers, "auto", epochs=1)
    assert path == flowers and "a copy doesn't pay" in said and "(1 epochs)" in said.replace("1 epoch)", "1 epochs)")
    path, said = place(flowers, "auto", epochs=400)
    assert path != flowers and "an epoch's reading takes about" in said and "(400 epochs)" in said
    assert tree(path) == tree(flowers)


def test_auto_leaves_a_quick_file_system_alone(flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts(monkeypatch, tmp_path, lustre="lustre")
    path, said = place(flowers, "auto")
    assert path == flowers
    assert said.startswith("data flowers: read from lustre: a copy doesn't pay: 41 files, ")
    assert "(if there are 3 epochs)" in said


def packed(folder: Path, samples: int, size: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "shard-00000.tar").write_bytes(os.urandom(size))
    shards = [{"name": "shard-00000.tar", "bytes": size, "samples": samples}]
    (folder / "dataset.json").write_text(json.dumps({"shards": shards}))
    return folder


def test_shards_that_stay_in_memory_are_not_copied_and_larger_ones_are(tmp_path: Path) -> None:
    source = listing.listing(packed(tmp_path / "set", 60_000, 2**20))
    speed = paying.Speed(each_s=0.002, bytes_per_s=1e5)
    small = paying.estimate(source, speed, epochs=10, memory=2**30)
    assert not small.pays
    large = paying.estimate(source, speed, epochs=10, memory=2**20)
    assert large.pays and large.epoch_s == pytest.approx(
        max(60_000 * 0.002 / listing.READERS, (2**20 + 70) / 1e5), rel=0.01
    )


def test_a_scratch_folder_on_a_shared_file_system_is_none(
    flowers: Path, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    mounts(monkeypatch, tmp_path, lustre="lustre", disk="nfs4")
    found, _ = scratch.find()
    assert found and found.path == Path("/tmp"), "the next best"
    monkeypatch.setattr(
        scratch, "candidates", lambda environment: [("$LOCALSCRATCH", disk), ("$TMPDIR", tmp_path / "gone")]
    )
    path, said = place(flowers, "always")
    assert path == flowers
    assert (
        f"this node has no disk of its own: $LOCALSCRATCH is {disk} on nfs4, $TMPDIR is {tmp_path}/gone, which" in said
    )


def test_memory_counts_as_memory(flowers: Path, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts(monkeypatch, tmp_path, lustre="lustre", disk="tmpfs")
    monkeypatch.setenv("HPCML_SCRATCH", str(disk))
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    (flowers / "large.jpg").write_bytes(bytes(800_000))
    path, said = place(flowers, "always")
    assert path == flowers and f"{disk} (tmpfs, $HPCML_SCRATCH) is memory, of which 768 KiB may go" in said
    (flowers / "large.jpg").unlink()
    assert place(flowers, "always")[0] != flowers
    for name, told in (("gone", "no folder that can be written"), ("lustre", "on lustre, which nodes share")):
        monkeypatch.setenv("HPCML_SCRATCH", str(tmp_path / name))
        with pytest.raises(HpcmlError, match=rf"HPCML_SCRATCH: .*/{name} is {told}"):
            place(flowers, "always")


def test_a_folder_that_somebody_else_could_write_to_is_not_used(flowers: Path, disk: Path) -> None:
    (disk / f"hpcml-{os.getuid()}").mkdir()
    (disk / f"hpcml-{os.getuid()}").chmod(0o777)
    path, said = place(flowers, "always")
    assert path == flowers and "is not this user's alone" in said


def test_wrong_calls(flowers: Path) -> None:
    with pytest.raises(HpcmlError, match="allowed: auto, always, never"):
        place(flowers, "sometimes")
    with pytest.raises(HpcmlError, match="nothing at"):
        place(flowers / "none", "auto")


# ------------------------------------------------------------------ the end


def test_the_end_of_a_job_removes_its_own_only(flowers: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand, _ = place(flowers, "always")
    (disk / "somebody's").write_text("else")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    of_job, _ = place(flowers, "always")
    assert by_hand != of_job
    assert staging.clean() >= sum(path.stat().st_size for path in flowers.rglob("*.jpg"))
    assert not of_job.exists() and not of_job.parents[2].exists()
    assert tree(by_hand) == tree(flowers) and (disk / "somebody's").exists()
    assert staging.clean() == 0
    again, said = place(flowers, "always")
    assert again == of_job and "copied to" in said


READS = """
import sys
from pathlib import Path
from hpcml.data import staging
print(staging.place(Path(sys.argv[1]), "always", say=lambda sentence: None), flush=True)
sys.stdin.read()
"""


def test_a_run_that_ends_takes_nothing_from_another_run_of_its_job(
    flowers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    words = [sys.executable, "-c", READS, str(flowers)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout
    path = Path(other.stdout.readline().strip())
    assert place(flowers, "always")[0] == path
    said: list[str] = []
    assert staging.clean(say=said.append) == 0
    assert path.exists() and "stays: another process reads there" in said[0]
    other.communicate("")
    assert staging.clean() > 0 and not path.exists()


# ------------------------------------------------------------------ by hand


def test_by_hand(
    flowers: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HPCML_DATA", str(flowers.parent))
    assert cli(["data", "stage", "flowers"]) == DONE
    shown = capsys.readouterr()
    path = Path(shown.out.rstrip("\n"))
    assert tree(path) == tree(flowers) and "copied to" in shown.err
    assert cli(["data", "stage", "flowers", "--auto", "--json"]) == DONE
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(flowers) and told["staged"] is False
    assert cli(["data", "stage"]) == BAD_INPUT
    assert cli(["data", "stage", "--clean"]) == DONE
    assert not path.exists() and list(disk.iterdir()) == []
    assert cli(["data", "stage", "tulips"]) == BAD_INPUT
    assert "no folder at" in capsys.readouterr().err
