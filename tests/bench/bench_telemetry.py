"""What telemetry costs: the CPU time of one sample of eight GPUs and of the job's processes, at one sample a second.

The GPUs are those of a stand-in for the driver's library (tests/stubs/nvml.c), so this is the cost of hpcml and of
nvidia-ml-py; a real driver adds its own.

    scripts/bench telemetry [--quick]

Samples are taken back to back and written to a journal, as the telemetry thread does; CPU time is that thread's.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import pairs
from hpcml.tracking.telemetry import Telemetry

GPUS = 8
BATCH = 25
BATCHES = 20
# At 1 Hz, 10 ms of CPU time a sample are 1 % of a core; the ratio to it is the share in %.
PERCENT_MS = 10.0
BOUND = pairs.Bound(0.1, at_least=False, pairs=BATCHES)
STUB = Path(__file__).resolve().parents[1] / "stubs" / "nvml.c"


def load_stub(folder: Path) -> None:
    """Build the stand-in and load it, so that the name of the driver's library is taken."""
    library = folder / "libnvidia-ml.so.1"
    words = ["-shared", "-fPIC", "-O2", f"-Wl,-soname,{library.name}", "-o", str(library), str(STUB)]
    subprocess.run([shutil.which("cc") or "gcc", *words], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def cpu_ms(work: Callable[[], object], count: int) -> float:
    """Return the CPU time of one call, in milliseconds, over some calls."""
    began = time.thread_time()
    for _ in range(count):
        work()
    return (time.thread_time() - began) / count * 1000


def measure(journal: Path, batches: int) -> tuple[list[pairs.Pair], str]:
    """Return the cost of a sample in some batches, and of its parts in words."""
    names = [str(number) for number in range(GPUS)]
    telemetry = Telemetry(journal, names, os.getpid(), 1.0, 0, True, {})
    telemetry.open()
    if not telemetry.gpus or not telemetry.host:
        raise SystemExit("bench: the stand-in for the driver's library was not found")
    host, gpus, began = telemetry.host, telemetry.gpus, time.monotonic()
    beats = iter(range(10**9))
    cpu_ms(lambda: telemetry.sample(began + next(beats)), BATCH)  # the first reads settle what exists
    measured = [
        pairs.Pair(cpu_ms(lambda: telemetry.sample(began + next(beats)), BATCH), PERCENT_MS, ours_first=True)
        for _ in range(batches)
    ]
    values = telemetry.sample(began + next(beats))
    parts = {
        f"reading {GPUS} GPUs": cpu_ms(lambda: gpus.read(began + next(beats)), BATCH * 4),
        f"the processes ({len(os.listdir('/proc'))} entries in /proc, {int(values['processes/count'])} of the job)": cpu_ms(
            host.read, BATCH * 4
        ),
        f"as a line of JSON ({len(values)} values)": cpu_ms(lambda: json.dumps(values), BATCH * 4),
    }
    telemetry.stop()
    return measured, ", ".join(f"{name} {cost * 1000:.0f} µs" for name, cost in parts.items())


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two batches, nothing is judged")
    quick = parser.parse_args().quick
    pairs.announce("telemetry")
    if not shutil.which("cc") and not shutil.which("gcc"):
        print("bench: telemetry: needs a C compiler for the stand-in of the driver's library", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        load_stub(Path(name))
        measured, parts = measure(Path(name) / "events" / "0.0.telemetry.jsonl", 2 if quick else BATCHES)
    what = (
        f"CPU time of a sample of {GPUS} GPUs and of the host, each pair {BATCH} samples; against 1 % of a core at one "
        "sample a second, so the ratio is the share of a core in %."
    )
    figure = pairs.Figure("telemetry", what, ("hpcml", "1 % of a core"), "ms a sample", measured, BOUND)
    pairs.show("telemetry: what watching costs, in % of a core", [figure], [f"Of a sample: {parts}; the rest decides."])
    return 0


if __name__ == "__main__":
    sys.exit(main())
