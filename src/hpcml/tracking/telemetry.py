"""A job's GPUs, CPU, memory and I/O once a second, into the run's journal, with warnings while something can be done.

One thread of one worker on each node watches all of the job's processes there. Records of the journal:

========== ======================================================================================================
params     ``gpu{i}.name``, ``.uuid``, ``.memory_mib``, ``.mig`` (the UUID of the instance's GPU), ``driver``
sample     ``values``: of each GPU ``gpu{i}/`` ``utilization_percent memory_used_mib memory_ours_mib memory_others_mib
           power_w temperature_c sm_clock_mhz memory_clock_mhz throttled pcie_rx_mib_s pcie_tx_mib_s nvlink_rx_mib_s
           nvlink_tx_mib_s energy_j`` (since the start); ``cpu/cores`` (busy), ``memory/used_mib``, ``memory/peak_mib``,
           ``io/read_mib_s``, ``io/write_mib_s``, ``processes/count``. What is unknown is left out; PCIe is read of one
           GPU at each sample, in turn.
message    warnings
totals     ``values``, once, at the end: ``gpu{i}/`` ``energy_j memory_peak_mib memory_ours_peak_mib
           utilization_mean_percent power_mean_w throttled_s``; ``cpu/core_seconds``, ``memory/peak_mib``,
           ``io/read_mib``, ``io/write_mib``, ``telemetry/seconds``, ``telemetry/samples``, ``telemetry/cpu_seconds``
========== ======================================================================================================

MiB are 2**20 bytes; energy is in joules.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .gpus import Gpus, Values
from .host import Host
from .journal import Journal
from .watching import WATCHED, Totals, Warnings

# A GPU's utilisation is a mean over 1/6 to 1 s, by product (NVML, nvmlDeviceGetUtilizationRates): asked more often, it
# says the same twice.
SENSOR_WINDOW_S = 1.0
# How long the end of a job waits for a driver that doesn't answer.
STOP_S = 3.0


def start(
    journal_path: Path,
    devices: Sequence[str],
    pid: int,
    interval_s: float = 1.0,
    *,
    first_gpu: int = 0,
    host: bool = True,
    environment: Mapping[str, str] = os.environ,
) -> "Telemetry":
    """Watch a job on this node until ``stop()``; never raises, and says nothing where there is no driver.

    Args:
        journal_path: of the events file, ``run.event_file(rank, restart, "telemetry")``.
        devices: the GPUs to watch, as in CUDA_VISIBLE_DEVICES: positions or UUIDs; empty for none.
        pid: of the process whose tree is the job where Slurm has made no cgroup, itself included.
        interval_s: between samples; with GPUs at least SENSOR_WINDOW_S.
        first_gpu: the number of the first of these GPUs among the job's on this node.
        host: whether to watch CPU, memory and I/O too; one rank of a node does.
        environment: for what Slurm says of GPUs and memory.
    """
    telemetry = Telemetry(journal_path, devices, pid, interval_s, first_gpu, host, environment)
    try:
        telemetry.thread.start()
    except RuntimeError as error:  # a limit of threads
        telemetry.warn(f"no telemetry: {error}")
    return telemetry


def share_of(
    visible: Sequence[str] | None, mine: Sequence[str], local_rank: int, local_world: int
) -> tuple[tuple[str, ...], int, bool] | None:
    """Return what a rank watches: GPUs, the number of the first among the node's, and whether the host; None for nothing.

    The first rank of a node watches all that the ranks share. Where each sees only its own GPUs, each watches those.

    Args:
        visible: CUDA_VISIBLE_DEVICES as this rank was given it; None where it is unset.
        mine: what the rank takes of it; empty without GPUs.
    """
    first = local_rank == 0
    if mine and local_world > 1 and visible is not None and tuple(visible) == tuple(mine):
        return tuple(mine), local_rank * len(mine), first
    if not first:
        return None
    count = len(mine) * local_world
    if local_world == 1:
        return tuple(mine), 0, True
    return tuple(visible)[:count] if visible is not None else tuple(map(str, range(count))), 0, True


def until_beat(began: float, now: float, interval_s: float) -> float:
    """Return the seconds to the next beat, counted from the start: it doesn't drift, and beats that passed are left out."""
    return interval_s - (now - began) % interval_s


class Telemetry:
    """What watches; made by ``start``."""

    def __init__(
        self,
        journal_path: Path,
        devices: Sequence[str],
        pid: int,
        interval_s: float,
        first_gpu: int,
        host: bool,
        environment: Mapping[str, str],
    ) -> None:
        self.journal = Journal(journal_path)
        self.devices, self.first_gpu = tuple(devices), first_gpu
        self.interval_s = max(interval_s, SENSOR_WINDOW_S) if devices else interval_s
        self.watch_host = host
        self.host: Host | None = None
        self.gpus: Gpus | None = None
        self.totals = Totals()
        self.warnings = Warnings(self.warn)
        self.thread = threading.Thread(target=self._run, name="hpcml-telemetry", daemon=True)
        self._pid, self._environment = pid, environment
        self._stop = threading.Event()
        self._ended = threading.Lock()

    def stop(self) -> None:
        """Take the last sample and write the totals; a driver that hangs is waited for STOP_S at most. Never raises."""
        self._stop.set()
        with contextlib.suppress(RuntimeError):  # never started
            self.thread.join(STOP_S)
        self._finish()

    def open(self) -> None:
        """Find what there is to watch and record what doesn't change. Without a driver there is only the rest."""
        self.host = Host(self._pid, environment=self._environment)
        if not self.devices:
            return
        try:
            self.gpus = Gpus(self.devices, _slurm_ids(self._environment), self.first_gpu, self.host.owns, self.warn)
        except Exception as error:  # no nvidia-ml-py, no driver, or one of another version than its library
            self.journal.message("info", f"no GPU telemetry: {type(error).__name__}: {error}")
            return
        self.journal.write("params", values=self.gpus.facts())

    def sample(self, now: float, t_ms: int | None = None) -> Values:
        """Take and record one sample.

        Args:
            now: monotonic seconds.
            t_ms: the same moment in milliseconds since the epoch; by default that of the call.
        """
        t_ms = time.time_ns() // 1_000_000 if t_ms is None else t_ms  # not when a slow driver has answered
        assert self.host, "open() comes first"
        values: Values = {}
        usage = self.host.read()  # also where it isn't recorded: it knows which processes are ours
        if self.watch_host:
            values |= self.totals.host(now, usage)
            self.warnings.memory(usage, self.host.limit)
        if self.gpus:
            values |= self.gpus.read(now)
            for gpu in self.gpus.gpus:
                mine = {name: values[key] for name in WATCHED if (key := f"{gpu.label}/{name}") in values}
                self.totals.gpu(now, gpu.label, mine)
                self.warnings.gpu(now, gpu, mine)
        self.totals.sampled(now)
        values = {name: round(value, 3) for name, value in values.items()}
        if values and not self._ended.locked():
            self.journal.write("sample", t=t_ms, values=values)
        return values

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # signals are for the main thread
        try:
            self.open()
            now, t_ms = _clocks()
            began = now
            while True:
                self.sample(now, t_ms)
                ended = self._stop.wait(until_beat(began, time.monotonic(), self.interval_s))
                now, t_ms = _clocks()
                if ended:
                    break
            self.sample(now, t_ms)
        except Exception as error:  # whatever it is, the training goes on
            self.warn(f"telemetry ended early: {type(error).__name__}: {error}")
        finally:
            self.totals.cpu_s = time.thread_time()
            self._finish()
            if self.gpus:
                self.gpus.close()

    def _finish(self) -> None:
        if self._ended.acquire(blocking=False):  # for good: whoever comes first, the thread or stop()
            gpus = self.gpus.gpus if self.gpus else []
            peak = (self.host.peak or None) if self.host and self.watch_host else None
            self.journal.write("totals", values=self.totals.values(gpus, peak))
            self.journal.close()

    def warn(self, text: str) -> None:
        """Tell people, in the journal and on stderr."""
        self.journal.message("warning", text)
        with contextlib.suppress(Exception):  # stderr may be closed
            print(f"hpcml: warning: {text}", file=sys.stderr, flush=True)


def _clocks() -> tuple[float, int]:
    """Monotonic seconds and milliseconds since the epoch; these first, so that a beat of 1 s is never 999 ms later."""
    t_ms = time.time_ns() // 1_000_000
    return time.monotonic(), t_ms


def _slurm_ids(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The minor numbers of the step's GPUs, else the job's; the job's may be those of the batch script's node."""
    value = environment.get("SLURM_STEP_GPUS") or environment.get("SLURM_JOB_GPUS") or ""
    return tuple(part.strip() for part in value.split(",") if part.strip())
