"""Live processes, stopped, continued and moved; one that has ended meanwhile is nobody's mistake."""

import contextlib
import os
import signal
import time
from collections.abc import Sequence

import psutil

STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def confine(processes: Sequence[psutil.Process], cores: Sequence[int]) -> None:
    """Move all threads of processes to some cores; what they start later is there too."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for thread in process.threads():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, cores)


def await_stop(processes: Sequence[psutil.Process]) -> None:
    """Wait until the kernel has stopped processes: only then another may run."""
    for process in processes:
        while status(process) not in STOPPED:
            time.sleep(0.0002)


def status(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD


def send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
