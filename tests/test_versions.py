"""Versions of data with the real DVC, the real git and a real S3 server: what a person types, and what goes wrong."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import pytest
from data_lab import BUCKET, KEY, S3, SECRET, Lab, contents, fill, lab, merge, need_dvc, serving

from hpcml.data.versions import changes, dvc, locks, pointers, receipt
from hpcml.errors import HpcmlError, ServiceSilent

need_dvc()

V1, V2 = 6, 3  # pictures of each digit in v1.0, and more of each in v2.0


@dataclass
class Story:
    """The MNIST story so far: two versions made in ``work``, pushed to S3 and to ``origin``."""

    lab: Lab
    s3: S3
    work: Path
    origin: Path
    first: dict[str, bytes]
    second: dict[str, bytes]

    def clone(self, name: str) -> Path:
        """A fresh clone of another person."""
        self.lab.git(self.lab.home, "clone", "--quiet", self.origin, name)
        return self.lab.home / name

    @property
    def key(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Tell the story once; the tests look at what is there, and go on in clones of their own."""
    folder = tmp_path_factory.mktemp("versions")
    with serving(folder / "s3") as s3:
        person = lab(folder / "home")
        work = person.project("work")
        (work / "train.py").write_text("print('edited')\n")  # two edits of the person's own, one of them staged
        (work / "notes.txt").write_text("mine\n")
        person.git(work, "add", "notes.txt")
        first = contents(fill(work / "train", V1))
        person.version(work, "add", "train", "--tag", "v1.0")
        merge(fill(work / "train_v2", V2, seed=2), work / "train")
        (work / "train" / "7" / "0-0.png").unlink()
        (work / "train" / "8" / "0-1.png").write_bytes(b"\x89PNG changed")
        second = contents(work / "train")
        person.version(work, "add", "train", "--tag", "v2.0", "-m", "three more of each digit")
        person.version(work, "remote", f"s3://{BUCKET}/mnist", "--endpoint", s3.uri)
        story = Story(person, s3, work, folder / "origin.git", first, second)
        pushed = person.version(work, "push", **story.key)
        # 60 pictures and 30 more, one changed, two listings.
        assert f"pushed {10 * V1 + 10 * V2 + 1 + 2} files to s3://{BUCKET}/mnist" in pushed.out
        person.git(folder, "init", "--quiet", "--bare", "origin.git")
        person.git(work, "remote", "add", "origin", story.origin)
        person.git(work, "push", "--quiet", "origin", "HEAD", "--tags")
        yield story


def test_a_version_commits_its_pointer_and_nothing_of_the_persons_own(told: Story) -> None:
    names = told.lab.git(told.work, "show", "--format=", "--name-only", "v1.0^{commit}").split()
    assert sorted(names) == [".dvc/.gitignore", ".dvc/config", ".dvcignore", ".gitignore", "train.dvc"]
    assert told.lab.git(told.work, "show", "--format=", "--name-only", "v2.0^{commit}").split() == ["train.dvc"]
    assert told.lab.git(told.work, "status", "--porcelain").splitlines() == [
        "A  notes.txt",
        " M train.py",
        "?? train_v2/",
    ]
    assert "three more of each digit" in told.lab.git(told.work, "tag", "-n", "-l", "v2.0")


def test_what_is_there_already_is_not_made_again(told: Story) -> None:
    before = told.lab.git(told.work, "rev-parse", "HEAD", "v1.0", "v2.0")
    again = told.lab.version(told.work, "add", "train", "--tag", "v2.0")
    assert f"{len(told.second)} files" in again.out and "nothing has changed" in again.out
    refused = told.lab.version(told.work, "add", "train", "--tag", "v1.0", code=2).err
    assert f"for other content: {10 * V1} files" in refused and f"the folder has {len(told.second)} files" in refused
    assert "choose another tag, such as v2.0" in refused
    told.lab.git(told.work, "tag", "code-1.0", "v1.0~")
    refused = told.lab.version(told.work, "add", "train", "--tag", "code-1.0", code=2).err
    assert "the tag code-1.0 is there already, and has no data set train" in refused
    told.lab.git(told.work, "tag", "--delete", "code-1.0")
    assert told.lab.git(told.work, "rev-parse", "HEAD", "v1.0", "v2.0") == before
    assert "has all of it already" in told.lab.version(told.work, "push", "v1.0", **told.key).out
    assert "set already" in told.lab.version(told.work, "remote", f"s3://{BUCKET}/mnist", "--endpoint", told.s3.uri).out


def test_list_and_diff_count_files_bytes_and_classes(told: Story) -> None:
    rows = json.loads(told.lab.version(told.work, "list", "--json").out)
    assert [(row["tag"], row["path"], row["files"]) for row in rows] == [
        ("v1.0", "train", len(told.first)),
        ("v2.0", "train", len(told.second)),
    ]
    assert [row["bytes"] for row in rows] == [sum(map(len, files.values())) for files in (told.first, told.second)]
    assert ["work tree" in row["here"] for row in rows] == [False, True]
    diff = json.loads(told.lab.version(told.work, "diff", "v1.0", "v2.0", "--json").out)
    size = len(told.first["8/0-1.png"])
    assert diff["added"] == {"files": 10 * V2, "bytes": sum(len(told.second[name]) for name in diff["names"]["added"])}
    assert diff["removed"] == {"files": 1, "bytes": len(told.first["7/0-0.png"])}
    assert diff["names"]["changed"] == ["8/0-1.png"] and diff["grown"] == len(b"\x89PNG changed") - size
    assert diff["classes"]["7"] == [V1, V1 + V2 - 1] and diff["classes"]["0"] == [V1, V1 + V2]
    shown = told.lab.version(told.work, "diff", "v1.0", "v2.0", "--names").out
    assert "removed  7/0-0.png" in shown and "changed  8/0-1.png" in shown and "class" in shown


def test_a_fresh_clone_pulls_both_beside_each_other_and_mends_what_is_damaged(told: Story, tmp_path: Path) -> None:
    clone, root = told.clone("fresh"), tmp_path / "data"
    env = {**told.key, "HPCML_DATA": str(root)}
    (one,) = json.loads(told.lab.version(clone, "pull", "v1.0", "--json", **env).out)
    (two,) = json.loads(told.lab.version(clone, "pull", "v2.0", "train", "--json", **env).out)
    assert one["new"] and two["new"]
    assert contents(Path(one["folder"])) == told.first and contents(Path(two["folder"])) == told.second
    assert (
        Path(one["folder"]).name == f"v1.0-{one['hash'][:12]}"
        and Path(one["folder"]).parent == root / "versions" / "train"
    )
    assert not (clone / "train").exists(), "the work tree stays as it is"
    receipts = [receipt.read(Path(each["folder"])) for each in (one, two)]
    assert [told and (told.tag, told.digest, len(told.files)) for told in receipts] == [
        ("v1.0", one["hash"], len(told.first)),
        ("v2.0", two["hash"], len(told.second)),
    ]
    # All of it is here: no server is asked, with no key.
    again = told.lab.version(clone, "pull", "v1.0", HPCML_DATA=str(root))
    assert "already" in again.out
    victim = Path(one["folder"]) / "3" / "0-2.png"
    content = bytearray(victim.read_bytes())
    content[20] ^= 1
    victim.chmod(0o644)
    victim.write_bytes(content)  # of the same size: names and sizes don't show it
    assert "already" in told.lab.version(clone, "pull", "v1.0", **env).out
    mended = told.lab.version(clone, "pull", "v1.0", "--verify", **env)
    assert "already" not in mended.out and contents(Path(one["folder"])) == told.first
    assert "and whole" in told.lab.version(clone, "pull", "v1.0", "--verify", **env).out
    assert {path.name for path in (root / "versions" / "train").iterdir() if not path.name.endswith(".lock")} == {
        Path(each["folder"]).name for each in (one, two)
    }, "nothing is left behind"


def test_checkout_changes_the_data_folder_and_its_pointer_alone_and_loses_nothing(told: Story) -> None:
    clone = told.clone("switching")
    (clone / "train.py").write_text("print('my edit')\n")
    out = told.lab.version(clone, "checkout", "v1.0", **told.key).out
    assert f"train has now the {len(told.first)} files of v1.0" in out
    assert contents(clone / "train") == told.first
    assert told.lab.git(clone, "status", "--porcelain").splitlines() == [" M train.dvc", " M train.py"]
    assert "had already" in told.lab.version(clone, "checkout", "v1.0").out
    (clone / "train" / "5" / "0-0.png").write_bytes(b"a label corrected by hand")
    refused = told.lab.version(clone, "checkout", "v2.0", code=2, **told.key).err
    assert "train holds changes that no version has" in refused and "--tag NEW keeps them" in refused
    assert (clone / "train" / "5" / "0-0.png").read_bytes() == b"a label corrected by hand"
    told.lab.version(clone, "checkout", "v2.0", "--force", **told.key)
    assert contents(clone / "train") == told.second
    assert told.lab.git(clone, "status", "--porcelain").splitlines() == [" M train.py"]
    # What DVC has taken up and no commit or tag names would be lost just the same.
    (clone / "train" / "5" / "0-0.png").write_bytes(b"another")
    assert told.lab.run(clone, str(Path(sys.executable).with_name("dvc")), "add", "-q", "train").code == 0
    refused = told.lab.version(clone, "checkout", "v1.0", code=2).err
    assert "content that dvc add has taken and no commit has" in refused
    told.lab.version(clone, "add", "train", "--tag", "v2.1")
    told.lab.version(clone, "checkout", "v1.0")
    assert contents(clone / "train") == told.first


def test_a_folder_can_be_the_remote(tmp_path: Path) -> None:
    person = lab(tmp_path / "home")
    work = person.project("work")
    fill(work / "images" / "digits", 1)
    assert "no remote is set" not in person.version(work, "add", "images/digits", "--tag", "data/v1").out
    assert "no remote is set" in person.version(work, "push", code=2).err
    (work / ".dvc" / "config.local").write_text("")  # as DVC leaves it, for all to read
    (work / ".dvc" / "config.local").chmod(0o644)
    person.version(work, "remote", "../store")
    assert stat.S_IMODE((work / ".dvc" / "config.local").stat().st_mode) == 0o600
    assert "pushed 11 files" in person.version(work, "push").out
    person.git(person.home, "clone", "--quiet", work, "clone")
    inside = {"HPCML_DATA": str(person.home / "clone" / "data")}  # as a site has it that says nothing
    (one,) = json.loads(
        person.version(person.home / "clone", "pull", "data/v1", "images/digits", "--json", **inside).out
    )
    assert person.git(person.home / "clone", "status", "--porcelain") == "", "no part of the project"
    assert Path(one["folder"]).parent.name == "digits" and "data%2Fv1-" in one["folder"]
    assert contents(Path(one["folder"])) == contents(work / "images" / "digits")
    store = json.loads(person.version(person.home / "clone", "remote", "--json").out)["url"]
    assert store == str(tmp_path / "home" / "store")
    # From a folder below, and by the name alone.
    assert "already" in person.version(person.home / "clone" / "images", "pull", "data/v1", "digits", **inside).out


# ------------------------------------------------------------------ the key


def test_the_key_is_nowhere_but_in_a_private_file(told: Story, tmp_path: Path) -> None:
    clone = told.clone("login")
    words, watching = list[str](), threading.Event()

    def watch() -> None:
        while not watching.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    if int(path.parent.name) not in (told.s3.child.pid, os.getpid()):
                        words.append(path.read_text(errors="replace"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        before = len(told.lab.said)
        refused = told.lab.version(clone, "remote", "--login", given="only one line\n", code=2).err
        assert "two lines: access key id, secret access key" in refused
        wrong = told.lab.version(clone, "remote", "--login", given=f"{KEY}\n{SECRET[::-1]}\n", code=2).err
        assert "refuses the key (SignatureDoesNotMatch)" in wrong and "config.local" in wrong
        private = clone / ".dvc" / "config.local"
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
        told.lab.version(clone, "remote", "--login", given=f"{KEY}\n{SECRET}\n")
        told.lab.version(clone, "pull", "v1.0", HPCML_DATA=str(tmp_path / "data"))
    finally:
        watching.set()
        watcher.join()
    assert SECRET in private.read_text()
    assert told.lab.git(clone, "status", "--porcelain") == ""
    assert words and not [line for line in words if SECRET in line or SECRET[::-1] in line]
    assert not [text for text in told.lab.said[before:] if SECRET in text]
    places = [clone, told.origin, told.lab.home / ".config", tmp_path, told.s3.folder]
    holding = [
        path for place in places for path in place.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()
    ]
    assert holding == [private]
    in_git = told.lab.git(clone, "rev-list", "--objects", "--all")
    assert "config.local" not in in_git


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        ("ftp://host/path", [], "ftp:// is no remote here"),
        (f"s3://{KEY}:{SECRET}@bench/x", [], "an address with a key in it would be kept in git"),
        ("s3://bench/x", ["--endpoint", f"http://{KEY}:{SECRET}@host"], "an address with a key in it"),
        ("s3://bench/x", ["--endpoint", "host:9000"], "'host:9000' is no address of a server"),
        ("../store", ["--endpoint", "http://host"], "--endpoint is about S3"),
    ],
    ids=["unknown scheme", "key in it", "key in the endpoint", "no endpoint", "endpoint of a folder"],
)
def test_an_address_that_is_none_is_refused(told: Story, url: str, options: list[str], says: str) -> None:
    before = (told.work / ".dvc" / "config").read_text()
    typed = told.lab.version(told.work, "remote", url, *options, code=2)
    assert says in typed.err and SECRET not in typed.err + typed.out
    assert (told.work / ".dvc" / "config").read_text() == before


# ------------------------------------------------------------------ a remote that fails


@contextlib.contextmanager
def silent(port: int) -> Iterator[None]:
    """Take connections and say nothing."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen(50)
        yield


def test_each_failure_of_the_remote_has_a_sentence_of_its_own(told: Story) -> None:
    clone = told.clone("failing")
    told.lab.version(clone, "remote", f"s3://{BUCKET}/mnist", "--endpoint", told.s3.uri, "--timeout", "1")

    def pull(code: int, **env: str) -> str:
        return told.lab.version(clone, "pull", "v1.0", code=code, **env).err

    assert "no key for the remote" in pull(2)
    wrong = pull(2, AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY="x" * 20)
    assert "refuses the key (SignatureDoesNotMatch)" in wrong and "check AWS_ACCESS_KEY_ID" in wrong
    stranger = pull(2, AWS_ACCESS_KEY_ID="x" * 20, AWS_SECRET_ACCESS_KEY=SECRET)
    assert "refuses the key (InvalidAccessKeyId)" in stranger
    bucket = told.s3.folder / BUCKET
    told.s3.stop()  # it would remember the bucket for a while
    bucket.rename(told.s3.folder / "gone")
    told.s3.start()
    try:
        gone = pull(2, **told.key)
        assert f"the remote has no bucket '{BUCKET}'" in gone and told.s3.uri in gone and "make it there" in gone
        told.s3.stop()
        bucket.mkdir()
        told.s3.start()
        lacking = pull(2, **told.key)
        assert "the remote lacks some of the data" in lacking and "data version push" in lacking
    finally:
        told.s3.stop()
        bucket.rmdir()
        (told.s3.folder / "gone").rename(bucket)
        told.s3.start()
    told.s3.stop()
    try:
        refused = pull(3, **told.key)
        assert "refuses the connection: nothing listens there" in refused and told.s3.uri in refused
        with silent(told.s3.port):
            assert "the remote gives no answer in 1 s" in pull(3, **told.key)
    finally:
        told.s3.start()
    (one,) = json.loads(told.lab.version(clone, "pull", "v1.0", "--json", **told.key).out)
    assert one["new"] and contents(Path(one["folder"])) == told.first, "after all that it is pulled for the first time"


@pytest.mark.parametrize(
    ("said", "kind", "means"),
    [
        (
            'ERROR: unexpected error - Could not connect to the endpoint URL: "http://h"',
            ServiceSilent,
            "refuses the connection",
        ),
        ('ERROR: unexpected error - Read timeout on endpoint URL: "http://h"', ServiceSilent, "gives no answer"),
        ("ERROR: unexpected error - [Errno 28] No space left on device: 'x'", HpcmlError, "the disk is full"),
        ("ERROR: unexpected error - [Errno 122] Disk quota exceeded: 'x'", HpcmlError, "the quota is used up"),
        ("ERROR: failed to push data to the cloud - 2 files failed to upload", HpcmlError, "lacks some of the data"),
        ("ERROR: something never seen\n\nHaving any troubles? Hit us up", HpcmlError, "something never seen"),
        ("", HpcmlError, "exit code 255"),
    ],
)
def test_what_dvc_says_is_told_in_plain_words(said: str, kind: type[HpcmlError], means: str) -> None:
    error = dvc._told("push", 255, said)
    assert type(error) is kind and means in str(error) and "fix: " in str(error) and "troubles" not in str(error)
    assert "SIGKILL" in str(dvc._told("push", -9, ""))


# ------------------------------------------------------------------ locks, kills, two at once


def test_a_lock_of_a_dead_dvc_is_cleared_and_one_of_the_living_is_waited_for(tmp_path: Path) -> None:
    person = lab(tmp_path / "home")
    work = person.project("work")
    fill(work / "train", 1)
    person.version(work, "add", "train", "--tag", "v1")
    tmp, said = work / ".dvc" / "tmp", SimpleQueue[str]()

    def add() -> None:
        dvc.run(work, "add", "train", doing="add train", say=said.put)

    with subprocess.Popen(["sleep", "60"]) as other:  # it has been given the number of a DVC that was killed
        try:
            entry = {"pid": other.pid, "cmd": "dvc add train"}
            (tmp / "rwlock").write_text(json.dumps({"read": {}, "write": {str(work / "train"): entry}}))
            add()
            assert said.get_nowait() == f"cleared DVC's locks of process {other.pid}, which is gone"
        finally:
            other.kill()
    (tmp / "rwlock").write_text('{"read": {"/x": [{"pid"')
    add()
    assert "half written" in said.get_nowait()
    local = work / ".dvc" / "config.local"
    local.write_text("[core]\n    hardlink_lock = true\n")
    (tmp / "lock").write_text(f"{tmp}/lock|{os.uname().nodename}|{other.pid}|12345\n")
    add()
    assert f"process {other.pid}, which held it, is gone" in said.get_nowait()
    local.unlink()
    words = [sys.executable, "-c", "import sys; sys.stdin.read()", "dvc push"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as holder, (tmp / "lock").open("w") as file:
        file.write(f"{holder.pid}\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = threading.Thread(target=add)
        waiting.start()
        told = said.get(timeout=60)
        assert f"waiting for another DVC, process {holder.pid}, to end" in told and "dvc push" in told
        fcntl.flock(file, fcntl.LOCK_UN)
        waiting.join(60)
        assert not waiting.is_alive() and said.empty()
        holder.communicate()


def test_a_process_id_given_again_is_not_taken_for_dvc(tmp_path: Path) -> None:
    said = list[str]()
    (tmp_path / "rwlock").write_text(
        json.dumps({"read": {"/a": [{"pid": os.getppid(), "cmd": "dvc pull"}]}, "write": {}})
    )
    busy = f"ERROR: '/a' is busy, it is being blocked by:\n  (PID {os.getppid()}): dvc pull\n"
    if "dvc" not in locks._words(os.getppid()):
        assert locks.freed(tmp_path, busy, said.append) and "which is gone" in said[0]
        assert json.loads((tmp_path / "rwlock").read_text()) == {"read": {}, "write": {}}
    assert not locks.freed(tmp_path, "ERROR: something else", said.append)


def test_a_pull_that_is_killed_and_two_at_once_give_the_same(told: Story, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    clone, wait = told.clone("killed"), random.Random(seed)
    env = {**told.lab.env, **told.key, "HPCML_DATA": str(tmp_path / "data")}
    words = told.lab.command("data", "version", "pull", "v2.0")
    for _ in range(2):
        child = subprocess.Popen(words, cwd=clone, env=env, start_new_session=True, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("data/versions/train/.*pulling")) and child.poll() is None:
            assert time.monotonic() < deadline
        time.sleep(wait.uniform(0, 2.5))
        child.send_signal(signal.SIGKILL)  # hpcml alone: DVC is not to go on without it
        child.communicate()
    target = next((path for path in tmp_path.glob("data/versions/train/v2.0-*")), None)
    assert target is None or contents(target) == told.second
    both = [
        subprocess.Popen(words, cwd=clone, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outs = [child.communicate(timeout=120) for child in both]
    assert [child.returncode for child in both] == [0, 0], outs
    assert sum("already" in out for out, _ in outs) >= 1
    (folder,) = [path for path in tmp_path.glob("data/versions/train/*") if path.is_dir()]
    assert folder.name.startswith("v2.0-") and contents(folder) == told.second
    assert not list(tmp_path.glob("data/versions/train/.*pulling*"))


# ------------------------------------------------------------------ what can't be a version


def test_what_can_not_be_a_version_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    person = lab(tmp_path / "home")
    alone = tmp_path / "alone"
    fill(alone / "train", 1)

    def refused(where: Path, *words: str, **env: str) -> str:
        return person.version(where, "add", *words, code=2, **env).err

    assert "is in no git repository" in refused(alone, "train", "--tag", "v1")
    work = person.project("work")
    fill(work / "train", 1)
    assert "no folder at nothing" in refused(work, "nothing", "--tag", "v1")
    assert "train.py is no folder" in refused(work, "train.py", "--tag", "v1")
    assert "is the repository itself" in refused(work, ".", "--tag", "v1")
    for tag in ("-x", "a b", "a..b", "v1.lock", "", "x/"):
        assert "is no name of a tag" in refused(work, "train", f"--tag={tag}")
    (work / "empty").mkdir()
    assert "empty holds no files" in refused(work, "empty", "--tag", "v1")
    odd = os.fsencode(work / "train") + b"/0/\xff.png"
    with open(odd, "wb"):
        pass
    assert "the name 0/\\xff.png is not UTF-8" in refused(work, "train", "--tag", "v1")
    os.unlink(odd)
    (work / "train" / "0" / "up").symlink_to("..")
    assert "0/up is a link to a folder" in refused(work, "train", "--tag", "v1")
    (work / "train" / "0" / "up").unlink()
    (work / ".gitignore").write_text("mine\n")
    assert ".gitignore has edits of yours" in refused(work, "train", "--tag", "v1")
    assert not (work / "train.dvc").exists() and person.git(work, "tag") == ""
    (work / ".gitignore").unlink()
    person.git(work, "add", "--force", "train")
    person.git(work, "commit", "--quiet", "-m", "images in git")
    assert "git tracks files of the folder itself" in refused(work, "train", "--tag", "v1")
    person.git(work, "rm", "-r", "--quiet", "--cached", "train")
    person.git(work, "commit", "--quiet", "-m", "and out again")
    (person.home / ".gitconfig").write_text("[user]\n  useConfigOnly = true\n")
    assert "it does not know who you are" in refused(work, "train", "--tag", "v1")
    lab(person.home)
    # What was interrupted there goes on, names with spaces, newlines and unicode among it; empty folders are told of.
    (work / "train" / "0" / "two\nlines é 火.png").write_bytes(b"\x89PNG")
    (work / "train" / "none").mkdir()
    done = person.version(work, "add", "train", "--tag", "v1")
    assert "1 empty folder is no part of a version: none" in done.err and "11 files" in done.out
    assert person.git(work, "status", "--porcelain") == ""


def test_without_dvc_it_says_how_to_get_it(told: Story, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HpcmlError, match="dvc is not installed") as error:
        dvc.command()
    assert "hpcml[versions]" in str(error.value)


def test_a_tag_that_is_not_there_names_those_that_are(told: Story) -> None:
    refused = told.lab.version(told.work, "pull", "v2.1", code=2).err
    assert "no tag 'v2.1'" in refused and "v2.0, v1.0" in refused and "did you mean 'v2.0'?" in refused
    refused = told.lab.version(told.work, "pull", "v2.0", "tran", code=2).err
    assert "tag 'v2.0' has no data set 'tran'" in refused and "did you mean 'train'?" in refused
    old = "outs:\n- md5: 3db43872913b13bfb3057559dff540c7.dir\n  size: 131\n  nfiles: 40\n  path: train\n"
    with pytest.raises(HpcmlError, match="format of DVC 2"):
        pointers.parse(old, "train")
    assert (
        pointers.parse("outs:\n- md5: 3db43872913b13bfb3057559dff540c7\n  hash: md5\n  path: model.bin\n", "model.bin")
        is None
    )


def test_moved_files_and_folders_without_classes() -> None:
    before = {"a": ("1" * 32, 5), "b": ("2" * 32, 5)}
    found = changes.between(before, {"c": ("1" * 32, 5), "b": ("3" * 32, 7)})
    assert (found.added.files, found.removed.files, found.changed.files, found.moved, found.grown) == (1, 1, 1, 1, 2)
    assert found.classes == {}
