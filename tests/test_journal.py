"""The journal: what was acknowledged is there, whatever happened to the writer, the disk or the file."""

import ctypes
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hpcml.tracking import journal
from hpcml.tracking.journal import Journal

SRC = str(Path(journal.__file__).parents[2])


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start a Python that can import hpcml."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": SRC}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


def records(folder: Path) -> list[dict[str, object]]:
    return list(journal.read(folder))


ACKNOWLEDGING = """
import sys
from pathlib import Path
from hpcml.tracking.journal import Journal
journal = Journal(Path(sys.argv[1]))
n = 0
while True:
    if journal.metric(n, {"loss": n / 7}):
        print(n, flush=True)
    n += 1
"""


def test_kill_loses_nothing_acknowledged(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for attempt in range(5):
        path = tmp_path / str(attempt) / "0.0.rank.jsonl"
        wanted = rng.randrange(1, 3000)
        with python(ACKNOWLEDGING, path) as child:
            assert child.stdout is not None
            acknowledged = [int(child.stdout.readline()) for _ in range(wanted)]
            child.send_signal(signal.SIGKILL)
            acknowledged += [int(line) for line in child.stdout if line.endswith("\n")]
        assert child.returncode == -signal.SIGKILL
        kept = records(path.parent)
        assert [record["step"] for record in kept][: len(acknowledged)] == acknowledged
        assert all(record["values"] == {"loss": record["step"] / 7} for record in kept)  # type: ignore[operator]
        assert len(kept) - len(acknowledged) <= 1  # the one written and not yet acknowledged


@pytest.mark.parametrize(
    "tail", [b'{"t":1,"ki', b'{"t":1,"kind":"metric","step":3,"values":{"a":\xc3', b"{", b"\x00" * 9]
)
def test_a_torn_last_line_is_skipped_and_the_next_record_stands_alone(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "0.0.rank.jsonl"
    first = Journal(path)
    assert first.metric(1, {"a": 1})
    first.close()
    with path.open("ab") as file:
        file.write(tail)
    assert [record["step"] for record in records(tmp_path)] == [1]
    second = Journal(path)
    assert second.metric(2, {"a": 2})
    second.close()
    assert [(record["step"], record["line"]) for record in records(tmp_path)] == [(1, 1), (2, 3)]


@pytest.mark.parametrize("cut", [10, -1])
def test_a_line_being_written_is_seen_once_it_is_complete(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "0.0.rank.jsonl"
    line = b'{"t":1,"kind":"message","text":"x"}\n'
    path.write_bytes(line + line[:cut])
    assert [record["line"] for record in records(tmp_path)] == [1]
    with path.open("ab") as file:
        file.write(line[cut:])
    assert [record["line"] for record in records(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"garbage",
        b"[1, 2]",
        b"null",
        b'{"kind": "metric"}',
        b'{"t": "now", "kind": "metric"}',
        b'{"t": 1}',
        b"\xff\xfe\x00",
        pytest.param(b"[" * 200_000, id="brackets"),
        pytest.param(b"9" * 10_000, id="digits"),
    ],
)
def test_garbage_lines_are_skipped(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "0.0.rank.jsonl"
    good = b'{"t":1,"kind":"message","text":"%d"}\n'
    path.write_bytes(good % 1 + garbage + b"\n" + good % 2)
    assert [(record["text"], record["line"]) for record in records(tmp_path)] == [("1", 1), ("2", 3)]


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "3.2.telemetry.jsonl"
    text = "µ ≤ 日本 🦀 \u2028 \n \x00 caf\udce9"
    values = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "tiny": 5e-324, "third": 1 / 3, text: 1.0}
    writer = Journal(path)
    assert writer.metric(7, values)
    assert writer.message("warning", text)
    writer.close()
    metric, message = records(tmp_path)
    assert math.isnan(metric["values"].pop("nan")) and math.isnan(values.pop("nan"))  # type: ignore[attr-defined]
    assert metric["values"] == values
    assert (metric["rank"], metric["restart"], metric["writer"], metric["step"]) == (3, 2, "telemetry", 7)
    assert message["text"] == text
    assert len(path.read_bytes().splitlines()) == 2


class Odd:
    def __str__(self) -> str:
        return "odd"


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


def test_what_json_does_not_know_becomes_text(tmp_path: Path) -> None:
    writer = Journal(tmp_path / "0.0.rank.jsonl")
    assert writer.write("params", values={"path": Path("/a"), "odd": Odd(), "set": {1}, "bytes": b"x"})
    writer.close()
    assert records(tmp_path)[0]["values"] == {"path": "/a", "odd": "odd", "set": "{1}", "bytes": "b'x'"}


def test_what_cannot_be_written_is_said_once_and_never_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = Journal(tmp_path / "0.0.rank.jsonl")
    circle: list[object] = []
    circle.append(circle)
    assert not writer.write("params", values={"a": Broken()})
    assert not writer.write("params", values={("a", "b"): 1})
    assert not writer.write("params", values=circle)
    assert not writer.metric("third", {"a": 1})  # type: ignore[arg-type]
    assert not writer.metric(1, {"a": None, "b": 2})  # type: ignore[dict-item]
    writer.close()
    writer.close()
    assert not writer.metric(2, {"a": 1})
    assert writer.lost == 6
    assert capsys.readouterr().err.count("records are lost") == 1
    assert [record["values"] for record in records(tmp_path)] == [{"b": 2.0}]


def test_a_file_that_cannot_be_opened_loses_records_not_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "events").write_text("a file where the folder should be")
    writer = Journal(tmp_path / "events" / "0.0.rank.jsonl")
    assert not writer.metric(1, {"a": 1})
    assert capsys.readouterr().err.count("records are lost") == 1


FILLING = """
import json, resource, sys
from pathlib import Path
from hpcml.tracking.journal import Journal
path, limit = Path(sys.argv[1]), int(sys.argv[2])
if limit:  # Python ignores SIGXFSZ, so a write past the limit is an OSError, as ENOSPC is
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
journal = Journal(path)
told = [journal.metric(n, {"loss": 0.5, "padding": 1 / 3}) for n in range(400)]
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
else:
    Path(sys.argv[3]).unlink()
after = [journal.metric(1000 + n, {"loss": 0.5}) for n in range(3)]
print(json.dumps([told, after]))
"""


def check_full(path: Path, child: "subprocess.Popen[str]") -> None:
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    told, after = json.loads(out)
    assert True in told and False in told
    assert after == [True, True, True]
    assert err.count("records are lost") == 1 and len(err.splitlines()) == 1
    accepted = [n for n, kept in enumerate(told) if kept] + [1000, 1001, 1002]
    assert [record["step"] for record in records(path.parent)] == accepted


def test_a_file_at_its_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "0.0.rank.jsonl"
    check_full(path, python(FILLING, path, 5003, stderr=subprocess.PIPE))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root; the size limit's test covers the same path")
def test_a_full_disk(tmp_path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    if libc.mount(b"tmpfs", bytes(disk), b"tmpfs", 0, b"size=16k") != 0:
        pytest.skip(f"no mount here: {os.strerror(ctypes.get_errno())}")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * 4096)
        path = disk / "0.0.rank.jsonl"
        check_full(path, python(FILLING, path, 0, ballast, stderr=subprocess.PIPE))
    finally:
        assert libc.umount2(bytes(disk), 2) == 0


SHARING = """
import sys
from pathlib import Path
from hpcml.tracking.journal import Journal
journal = Journal(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.readline()
for n in range(2000):
    assert journal.write("message", writer_id=sys.argv[2], n=n, text=sys.argv[2] * (n % 300))
"""


def test_two_processes_on_one_file_leave_both_whole(tmp_path: Path) -> None:
    path = tmp_path / "0.0.rank.jsonl"
    children = [python(SHARING, path, name, stdin=subprocess.PIPE) for name in "ab"]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "open\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        with child:
            assert child.wait(timeout=60) == 0
    kept = records(tmp_path)
    assert len(kept) == 4000
    for name in "ab":
        mine = [record for record in kept if record["writer_id"] == name]
        assert [record["n"] for record in mine] == list(range(2000))
        assert all(record["text"] == name * (record["n"] % 300) for record in mine)  # type: ignore[operator]


def test_threads_share_a_writer(tmp_path: Path) -> None:
    writer = Journal(tmp_path / "0.0.rank.jsonl")
    threads = [
        threading.Thread(target=lambda k=k: [writer.metric(n, {str(k): n}) for n in range(500)]) for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    kept = records(tmp_path)
    assert sorted((*record["values"], record["step"]) for record in kept) == [  # type: ignore[misc]
        (str(k), n) for k in range(4) for n in range(500)
    ]


def test_files_are_private_and_foreign_names_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "events" / "0.0.rank.jsonl"
    Journal(path).close()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    line = '{"t":1,"kind":"message"}\n'
    for name in ("a.0.rank.jsonl", "0.b.rank.jsonl", "0.jsonl", "0.0.rank.json"):
        (path.parent / name).write_text(line)
    assert records(path.parent) == []
    (path.parent / "1.0.a.b.jsonl").write_text(line)
    assert [(record["rank"], record["writer"]) for record in records(path.parent)] == [(1, "a.b")]
    assert records(tmp_path / "absent") == []
