"""How far a run is, in words, without reading its whole journal again and again."""

import json
import os
from pathlib import Path
from typing import Any

from .. import rundir
from ..rundir import RunDir

_BLOCK = 1 << 18
_MARK = b'"kind":"progress"'
# file → (size of what was looked through, its newest progress record): who polls reads only what came since.
_seen: dict[Path, tuple[int, dict[str, Any] | None]] = {}


def progress(run: RunDir) -> str:
    """Return how far rank 0 is, in words; empty before it said anything in this restart."""
    plan = rundir.read_json(run.plan)
    if plan.get("work") in ("comparison", "chain") and rundir.children(run):
        names = plan["target"]
        number = min(sum(run.child(name).status.exists() for name in names), len(names) - 1)
        return f"[{number + 1}/{len(names)}] {names[number]} · {progress(run.child(names[number]))}".rstrip(" ·")
    newest = newest_progress(run)
    return " · ".join(in_words(newest[unit]) for unit in sorted(newest))


def in_words(record: dict[str, Any]) -> str:
    """Return a progress record as a person reads it, such as ``cell 5/9``: the cell that it is in, not those done."""
    text, unit = str(record.get("text") or ""), record["unit"]
    if unit == "epoch" and text:
        return text
    done = record["done"] + (unit == "cell" and record["done"] < record["total"])
    return f"{unit} {done}/{record['total']} {text}".rstrip()


def newest_progress(run: RunDir) -> dict[str, dict[str, Any]]:
    """Return rank 0's newest progress record for each unit, ``cell`` and ``epoch``, of the newest restart.

    A writer counts in one unit, so of each file only the newest record is looked for, from the file's end.
    """
    files: dict[int, list[Path]] = {}
    for path in sorted(run.events.glob("0.*.*.jsonl")):
        restart = path.name.split(".")[1]
        if restart.isdecimal():
            files.setdefault(int(restart), []).append(path)
    records = [_newest_of(path) for path in (files[max(files)] if files else ())]
    return {record["unit"]: record for record in records if record}


def _newest_of(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            before, record = _seen.get(path, (0, None))
            if size < before:  # replaced
                before, record = 0, None
            if size > before:
                whole = _whole_lines(file.fileno(), before, size)
                record = _last_in(file.fileno(), before, whole) or record
                _seen[path] = (whole, record)
            return record
    except OSError:
        return None


def _whole_lines(descriptor: int, start: int, end: int) -> int:
    """Where the last whole line between two offsets ends; a line that is being written is left for the next time."""
    while end > start:
        begin = max(start, end - _BLOCK)
        newline = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return start


def _last_in(descriptor: int, start: int, end: int) -> dict[str, Any] | None:
    """The last progress record between two offsets at line starts, read backwards block by block."""
    rest = b""
    while end > start:
        begin = max(start, end - _BLOCK)
        block = os.pread(descriptor, end - begin, begin) + rest
        end = begin
        # The first line of a block may begin in the one before it.
        cut = 0 if begin == start else block.find(b"\n") + 1
        rest, lines = (block[:cut], block[cut:]) if cut or begin == start else (block, b"")
        if _MARK in lines:
            for line in reversed(lines.split(b"\n")):
                if _MARK in line and (record := _record(line)):
                    return record
    return None


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    usable = isinstance(record, dict) and record.get("kind") == "progress" and isinstance(record.get("unit"), str)
    return record if usable and isinstance(record.get("done"), int) and isinstance(record.get("total"), int) else None
