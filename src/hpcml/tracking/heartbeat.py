"""How far a rank's training has come, told to its worker in memory that both share: no system call a step.

The worker makes a small file in memory and names it in ``$HPCML_HEARTBEAT``; the process that trains maps it. When
nothing moves any more the worker sends that process ``DUMP``, and faulthandler, which needs neither the GIL nor a main
thread that answers, appends the stacks of all threads to the same file. Where no worker watches, all this does nothing.
"""

import contextlib
import faulthandler
import mmap
import os
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "HPCML_HEARTBEAT"
# A real-time signal: NCCL may take USR1 for itself, and Slurm and schedulers send USR1 and USR2. Linux has it.
DUMP = signal.SIGRTMIN + 7
# What the training does: nothing that can stall; something else than steps, or its first one; steps.
IDLE, BETWEEN, STEPPING = range(3)

_FORM = struct.Struct("4q")
_PID, _BEATS, _STEP, _PHASE = range(4)

_cells: "list[int] | memoryview[int]" = [0] * 4  # that nobody reads, until a worker's file stands in for them


@dataclass(frozen=True)
class Beat:
    """What a worker reads.

    Attributes:
        pid: the process that trains; 0 before there is one.
        beats: how often anything was told.
        step: training steps done.
        phase: ``IDLE``, ``BETWEEN`` or ``STEPPING``.
    """

    pid: int = 0
    beats: int = 0
    step: int = 0
    phase: int = IDLE


def begin() -> None:
    """Let this process's worker see how its training goes on; the first process of the work that calls this is the one."""
    global _cells
    name = os.environ.get(VARIABLE)
    if not name or _cells[_PID]:
        return
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no watchdog is no reason to fail
        handle = os.open(name, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        cells = memoryview(mmap.mmap(handle, _FORM.size)).cast("q")
        if not cells[_PID]:
            faulthandler.register(DUMP, file=handle, all_threads=True, chain=False)
            cells[_PID] = os.getpid()
            _cells = cells


def is_watched() -> bool:
    """Whether a worker watches this process."""
    return bool(_cells[_PID])


def step(done: int) -> None:
    """Tell that a training step is over; 0.1 µs.

    Args:
        done: training steps so far.
    """
    _cells[_STEP], _cells[_PHASE] = done, STEPPING
    _cells[_BEATS] += 1


def pause() -> None:
    """Tell that the training goes on with something else than steps: validation, saving, the user's own code."""
    _cells[_PHASE] = BETWEEN
    _cells[_BEATS] += 1


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Have a worker watch for steps while this lasts, and no longer."""
    pause()
    try:
        yield
    finally:
        _cells[_PHASE] = IDLE
        _cells[_BEATS] += 1


def counting(function: Callable[[Any], Any], done: int, a_call: int = 1) -> Callable[[Any], Any]:
    """Return a training function each of whose calls tells its steps; the function itself where no worker watches.

    Args:
        done: training steps before its first call.
        a_call: steps that one call makes.
    """
    if not is_watched() or getattr(function, "tells_steps", False):
        return function
    steps = done

    def told(iterator: Any) -> Any:
        nonlocal steps
        result = function(iterator)
        steps += a_call
        step(steps)
        return result

    told.tells_steps = True  # type: ignore[attr-defined]
    return told


def make(path: Path) -> None:
    """Write a worker's file, in which nothing is told yet."""
    path.write_bytes(bytes(_FORM.size))


def read(path: Path) -> Beat:
    """Return what was told last; nothing where the file is gone."""
    with contextlib.suppress(OSError, struct.error), path.open("rb") as file:
        return Beat(*_FORM.unpack(file.read(_FORM.size)))
    return Beat()


def stacks(path: Path) -> str:
    """Return what faulthandler has written so far."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(_FORM.size)
        return file.read().decode(errors="replace")
    return ""
