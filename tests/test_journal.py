"""The journal: what was acknowledged is there, whatever happened to the writer, the disk or the file."""

import contextlib
import ctypes
import json
import math
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml.tracking import journal
from hpcml.tracking.journal import Journal, reader

SRC = str(Path(hpcml.__file__).parents[1])


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
    assert list(journal.problems(tmp_path)) == []


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
    assert not writer.metric(1, {"a": None, "b": 2})  # type: ignore[dict-item]
    writer.close()
    writer.close()
    assert not writer.metric(2, {"a": 1})
    assert writer.lost == 4, "what was left out of a metric is the caller's, and not lost"
    said = capsys.readouterr().err
    assert said.count("records are lost") == 1 and said.count("no number") == 1
    assert [r["values"] for r in records(tmp_path) if r["kind"] == "metric"] == [{"b": 2.0}]
    assert journal.lost(tmp_path) == 3, "those before the end; the fourth came after"


def test_what_is_left_out_is_told_for_each_metric_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = Journal(tmp_path / "2.1.rank.jsonl")
    assert not writer.metric(1, {"a": "abc"})  # type: ignore[dict-item]
    for step in range(4):
        assert not writer.metric(step, {"loss": None, "lr": 0.1})  # type: ignore[dict-item]
    assert not writer.metric(1, {"broken": Broken()})  # type: ignore[dict-item]
    assert writer.metric(9, {"text": "0.5"})  # type: ignore[dict-item]  # as float() and MLflow take it
    writer.close()
    assert journal.left_out(tmp_path) == journal.left_out(tmp_path, 2, 1) == {"a": 1, "loss": 4, "broken": 1}
    assert journal.left_out(tmp_path, rank=0) == journal.left_out(tmp_path, restart=0) == {}
    said = capsys.readouterr().err.splitlines()
    told = [f"hpcml: warning: {r['text']}" for r in records(tmp_path) if r["kind"] == "message"]
    assert said == told and len(said) == 3
    assert "'abc' is no number" in said[0] and "metric 'loss' is left out: None" in said[1]
    kept = [r["values"] for r in records(tmp_path) if r["kind"] == "metric"]
    assert kept == [{"lr": 0.1}] * 4 + [{"text": 0.5}]
    assert (writer.lost, writer.untold) == (0, 0)


@pytest.mark.parametrize(
    "step",
    [10**30, -(2**63) - 1, 2**63, 10**5000, "third", None, math.nan, math.inf, Broken()],
    ids=["10**30", "too low", "2**63", "10**5000", "text", "None", "nan", "inf", "broken"],
)
def test_a_step_that_mlflow_cannot_hold_is_refused(
    tmp_path: Path, step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = Journal(tmp_path / "0.0.rank.jsonl")
    assert not writer.metric(step, {"big": 1.0, "other": 2.0}) and not writer.metric(step, {"third": 1.0})
    assert writer.metric(2**63 - 1, {"most": 1.0}) and writer.metric(-(2**63), {"least": 1.0})
    writer.close()
    assert journal.left_out(tmp_path) == {"big": 1, "other": 1, "third": 1}
    assert [r["step"] for r in records(tmp_path) if r["kind"] == "metric"] == [2**63 - 1, -(2**63)]
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "step" in said


@pytest.mark.parametrize("t_ms", [-1, 2**63, "noon"])
def test_a_time_that_mlflow_cannot_hold_is_refused(tmp_path: Path, t_ms: Any) -> None:
    with contextlib.closing(Journal(tmp_path / "0.0.rank.jsonl")) as writer:
        assert not writer.metric(1, {"a": 1.0}, t_ms)
        assert writer.metric(1, {"a": 1.0}, 0)
    assert journal.left_out(tmp_path) == {"a": 1}
    assert [r["t"] for r in records(tmp_path) if r["kind"] == "metric"] == [0]


def test_a_thousand_bad_names_fill_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(Journal(tmp_path / "0.0.rank.jsonl")) as writer:
        assert not any(writer.metric(n, {f"m{n}": None}) for n in range(1000))  # type: ignore[dict-item]
    assert 1 < len(capsys.readouterr().err.splitlines()) <= 30
    assert len(journal.left_out(tmp_path)) == 1000


def test_a_file_that_cannot_be_opened_loses_records_not_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "events").write_text("a file where the folder should be")
    writer = Journal(tmp_path / "events" / "0.0.rank.jsonl")
    assert not writer.metric(1, {"a": 1})
    assert capsys.readouterr().err.count("records are lost") == 1
    assert (writer.lost, writer.untold) == (1, 1)


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
    assert [record["step"] for record in records(path.parent) if record["kind"] == "metric"] == accepted
    assert journal.lost(path.parent) == told.count(False)
    assert journal.lost(path.parent, rank=1) == journal.lost(path.parent, restart=1) == 0
    assert list(journal.problems(path.parent)) == [], "the torn half is told from garbage"


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


def test_garbage_is_named_by_file_and_line(tmp_path: Path) -> None:
    good = b'{"t":1,"kind":"message"}\n'
    (tmp_path / "0.0.rank.jsonl").write_bytes(good + b"\n" + b"x" * 100 + b"\n" + good + b'{"t":1,"ki\n' + b"torn")
    (tmp_path / "1.0.rank.jsonl").write_bytes(b"\xff\x00\n" + good)
    (tmp_path / "2.0.rank.jsonl").mkdir()
    assert list(journal.problems(tmp_path)) == [
        journal.Unreadable("0.0.rank.jsonl", 3, "x" * 60),
        journal.Unreadable("0.0.rank.jsonl", 5, '{"t":1,"ki'),
        journal.Unreadable("1.0.rank.jsonl", 1, "\\xff\0"),
        journal.Unreadable("2.0.rank.jsonl", 0, os.strerror(21)),
    ]
    assert [(record["rank"], record["line"]) for record in records(tmp_path)] == [(0, 1), (0, 4), (1, 2)]
    assert len(list(journal.scan(tmp_path))) == 7


def test_a_line_longer_than_any_record_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_LINE", 1000)
    good = b'{"t":1,"kind":"message"}\n'
    path = tmp_path / "0.0.rank.jsonl"
    path.write_bytes(good + b"\0" * 3500 + b"\n" + good + b"\0" * 2500)
    follower = journal.Reader(tmp_path)
    assert [record["line"] for record in records(tmp_path)] == [record["line"] for record in follower.new()] == [1, 3]
    with path.open("ab") as file:
        file.write(b"\n" + good)
    assert [record["line"] for record in follower.new()] == [5]
    assert [problem.line for problem in journal.problems(tmp_path)] == [2, 4]


def test_a_record_behind_the_half_of_another_writer_is_read(tmp_path: Path) -> None:
    whole = b'{"t":2,"kind":"params","values":{"t":1}}\n'
    (tmp_path / "0.0.rank.jsonl").write_bytes(b'{"t":1,"kind":"params","values":{"t":1' + whole)
    (record,) = records(tmp_path)
    assert (record["t"], record["values"]) == (2, {"t": 1})


def test_reading_goes_on_after_what_is_known(tmp_path: Path) -> None:
    with contextlib.closing(Journal(tmp_path / "0.0.rank.jsonl")) as writer:
        for n in range(4):
            writer.metric(n, {"a": n})
            writer.write("progress", done=n, total=4, unit="epoch")
    with contextlib.closing(Journal(tmp_path / "1.0.rank.jsonl")) as writer:
        writer.metric(9, {"a": 1})
    after = {"0.0.rank.jsonl": 5}
    kept = [(record["rank"], record["line"]) for record in journal.read(tmp_path, after)]
    assert kept == [(0, 6), (0, 7), (0, 8), (1, 1)]
    only = journal.read(tmp_path, after, kinds={"progress"})
    assert [(record["kind"], record["line"]) for record in only] == [("progress", 6), ("progress", 8)]


def test_a_reader_gives_each_record_once_as_it_comes(tmp_path: Path) -> None:
    follower, only = journal.Reader(tmp_path / "events"), journal.Reader(tmp_path / "events", kinds={"progress"})
    assert follower.new() == []
    path = tmp_path / "events" / "0.0.rank.jsonl"
    with contextlib.closing(Journal(path)) as writer:
        writer.metric(1, {"a": 1})
        assert [record["step"] for record in follower.new()] == [1]
        assert follower.new() == []
        writer.metric(2, {"a": 1})
        with contextlib.closing(Journal(path.with_name("1.0.rank.jsonl"))) as other:
            other.metric(3, {"a": 1})
        line = b'{"t":1,"kind":"progress","done":1}\n'
        with path.open("ab") as file:
            file.write(line[:20])
            file.flush()
            assert [(r["step"], r["line"]) for r in follower.new()] == [(2, 2), (3, 1)]
            file.write(line[20:])
        assert [(r["kind"], r["line"]) for r in follower.new()] == [("progress", 3)]
    assert [r["line"] for r in only.new()] == [3]
    path.write_bytes(line)
    assert [r["line"] for r in follower.new()] == [1], "a shorter file is another one"


class Tensor:
    """Such as TensorFlow's and torch's: a number by ``float`` and ``int``."""

    def __float__(self) -> float:
        return 0.25

    def __int__(self) -> int:
        return 4


def test_whatever_is_a_number_is_one(tmp_path: Path) -> None:
    given = {
        "float": 0.1, "int": 3, "true": True, "np32": np.float32(0.5), "np64": np.float64(1 / 3), "int8": np.int8(-1),
        "bool_": np.bool_(True), "zero-d": np.array(7.0), "tensor": Tensor(), "nan": np.float32("nan"),
        "inf": np.float64("-inf"), "max": sys.float_info.max, "-0": -0.0,
    }  # fmt: skip
    writer = Journal(tmp_path / "0.0.rank.jsonl")
    assert writer.metric(1, given)
    for step in (np.int64(2), np.int32(3), Tensor(), True, 2**63 - 1):
        assert writer.metric(step, {"a": 1.0}), step
    assert writer.metric(8, {1: 0.5}) and writer.metric(8, {True: 0.5})  # type: ignore[dict-item]
    assert writer.metric(7, {"when": 1.0}, t_ms=12345)
    writer.close()
    first, *others, one, true, last = records(tmp_path)
    assert (one["values"], true["values"]) == ({"1": 0.5}, {"true": 0.5}), "names as JSON has them"
    wanted = {name: float(value) for name, value in given.items()}
    assert math.isnan(first["values"].pop("nan")) and math.isnan(wanted.pop("nan"))  # type: ignore[attr-defined]
    assert first["values"] == wanted and math.copysign(1, first["values"]["-0"]) == -1
    assert {type(value) for value in first["values"].values()} == {float}  # type: ignore[attr-defined]
    assert [record["step"] for record in others] == [2, 3, 4, 1, 2**63 - 1]
    assert last["t"] == 12345


@pytest.mark.parametrize(
    "value", [None, "loss", [1.0], {}, object(), 1j, 10**400, np.zeros(2)], ids=lambda value: type(value).__name__
)
def test_what_is_no_number_is_left_out_and_the_rest_kept(
    tmp_path: Path, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = Journal(tmp_path / "0.0.rank.jsonl")
    for step in range(3):
        assert not writer.metric(step, {"before": 1.0, "b\u00e4d": value, "after": math.inf})  # type: ignore[dict-item]
    writer.close()
    kept = [record["values"] for record in records(tmp_path) if record["kind"] == "metric"]
    assert kept == [{"before": 1.0, "after": math.inf}] * 3
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "'b\u00e4d'" in said
    assert writer.lost == 0


def test_the_metrics_line_is_what_json_makes_of_it(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    path = tmp_path / "0.0.rank.jsonl"
    odd = ["loss", "", 'a"b\\c', "\n\t\0", "日本 🦀 \u2028", "caf\udce9", "x" * 5000, '{"t":1}']
    writer, given = Journal(path), []
    for step in range(6000):  # more names than are kept in their JSON form
        names = [*rng.sample(odd, rng.randrange(len(odd))), f"name {rng.randrange(10**9)}"]
        given.append({name: rng.choice([rng.random(), rng.gauss(0, 1e200), float(step)]) for name in names})
        assert writer.metric(step, given[-1])
    writer.close()
    assert [record["values"] for record in records(tmp_path)] == given
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        again = json.dumps(json.loads(line), ensure_ascii=False, separators=(",", ":"))
        assert again.encode("utf-8", "backslashreplace") == line.encode()


def test_clock_steps_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [2_000_000_000, 1_000_000_000, 3_000_000_000]
    monkeypatch.setattr(journal.writer, "_time_ns", iter(times).__next__)
    writer = Journal(tmp_path / "0.0.rank.jsonl")
    assert all(writer.metric(n, {"a": n}) for n in range(3))
    writer.close()
    assert [(record["step"], record["t"]) for record in records(tmp_path)] == [(0, 2000), (1, 1000), (2, 3000)]


def test_a_million_points_are_read_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "0.0.rank.jsonl"
    values = ",".join(f'"m{k}":0.5' for k in range(100))
    with path.open("w") as file:
        file.writelines(f'{{"t":{n},"kind":"metric","step":{n},"values":{{{values}}}}}\n' for n in range(10_000))
    tracemalloc.start()
    assert sum(len(record["values"]) for record in journal.read(tmp_path)) == 1_000_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 4


# ---- what the disk gets -----------------------------------------------------------------------------------------------


class Disk:
    """Stands before ``fdatasync`` and notes how long each file was when it was synced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: queue.Queue[int] = queue.Queue()
        self.real = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        self.real(descriptor)
        self.synced.put(size)


def syncing() -> list[threading.Thread]:
    """The threads that sync journals, also those of other tests that nobody closed."""
    return [one for one in threading.enumerate() if one.name == "hpcml-journal"]


def test_what_is_written_is_synced_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, path, before = Disk(monkeypatch), tmp_path / "0.0.rank.jsonl", set(syncing())
    writer = Journal(path)
    for n in range(3):
        assert writer.metric(n, {"a": n})
        size = path.stat().st_size
        while disk.synced.get(timeout=30) < size:  # the first sync may have come between two writes
            pass
    (thread,) = set(syncing()) - before
    writer.close()
    assert not thread.is_alive()


def test_nothing_is_synced_where_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    monkeypatch.setattr(journal.writer, "SYNC_S", 0.001)
    before = set(syncing())
    writer = Journal(tmp_path / "0.0.rank.jsonl")
    assert set(syncing()) <= before
    assert writer.metric(1, {"a": 1})
    disk.synced.get(timeout=30)
    with pytest.raises(queue.Empty):
        while True:  # one more, where the write fell between the wake and the sync; and then no more
            disk.synced.get(timeout=0.2)
    writer.close()
    assert disk.synced.get_nowait() > 0, "closing syncs"


def test_a_sync_that_fails_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = threading.Semaphore(0)

    def quota(descriptor: int) -> None:
        failed.release()
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(os, "fdatasync", quota)
    monkeypatch.setattr(journal.writer, "SYNC_S", 0.001)
    writer = Journal(tmp_path / "0.0.rank.jsonl")
    for n in range(3):
        assert writer.metric(n, {"a": n})
        assert failed.acquire(timeout=30)
    writer.close()
    assert capsys.readouterr().err.count("may be lost") == 1


FORKING = """
import os, sys, threading
from pathlib import Path
from hpcml.tracking.journal import Journal
journal = Journal(Path(sys.argv[1]))
stop = threading.Event()
def busy():
    n = 0
    while not stop.is_set():
        assert journal.metric(n, {"parent": n}); n += 1
thread = threading.Thread(target=busy)
thread.start()
for child in range(20):
    pid = os.fork()
    if pid == 0:
        ok = all(journal.metric(n, {f"child{child}": n}) for n in range(5))
        ok &= any(one.name == "hpcml-journal" for one in threading.enumerate())  # it syncs what it wrote
        journal.close(); journal.close()
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
assert journal.metric(-1, {"parent": -1})
stop.set(); thread.join(); journal.close()
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_children_write_on_and_hold_nobody_up(tmp_path: Path) -> None:
    with python(FORKING, tmp_path / "0.0.rank.jsonl") as child:
        assert child.wait(timeout=60) == 0
    kept = [(name, record["step"]) for record in records(tmp_path) for name in record["values"]]  # type: ignore[attr-defined]
    assert len(kept) == len(set(kept))
    assert {(f"child{child}", n) for child in range(20) for n in range(5)} | {("parent", -1)} <= set(kept)
    assert list(journal.problems(tmp_path)) == []
