"""Run directories as hpcml's own writers leave them, for tests of the report: a training of ten minutes on two GPUs."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from test_comparison import a_plan

from hpcml import rundir
from hpcml.rundir import RunDir
from hpcml.tracking.journal import Journal

BEGAN_S = 1_790_000_000.0
FACTS = {
    "world_size": 1,
    "nodes": 1,
    "topology_source": "alone",
    "gpus": "0,1",
    "virtual_cpu_devices": 0,
    "cores_per_task": 32,
    "threads.OMP_NUM_THREADS": "32 (cpus-per-task)",
    "threads.TF_NUM_INTEROP_THREADS": "2 (default)",
    "data.staged_to": "/scratch/42/mnist",
    "python": "3.11.9",
    "host": "gpu07",
    "git.revision": "8c442ac",
    **{f"gpu{i}.name": "NVIDIA H100" for i in range(2)},
    **{f"gpu{i}.uuid": f"GPU-{i}" for i in range(2)},
    **{f"gpu{i}.memory_mib": 81559.0 for i in range(2)},
}


class Writer:
    """One rank's journal with a clock of its own: ``at`` is seconds since the run began."""

    def __init__(self, run: RunDir, rank: int = 0, restart: int = 0, writer: str = "rank") -> None:
        self.journal = Journal(run.event_file(rank, restart, writer))

    def write(self, at: float, kind: str, **fields: Any) -> None:
        assert self.journal.write(kind, **{**fields, "t": round((BEGAN_S + at) * 1000)})


def a_run(root: Path, name: str = "mnist-mirrored", strategy: str | None = "mirrored", **changes: Any) -> RunDir:
    """Make a run directory with a plan and nothing else."""
    run = RunDir(root, f"20260922-100000-{name}").make()
    own = {"gpus_per_node": 2, "cpus_per_task": 32, "mem_gb": 64, "time_s": 7200, "site": "ft3", "scheduler": "slurm"}
    own |= {"origins": {"params.epochs": "jobs/mnist.toml", "resources.mem_gb": "jobs/mnist.toml"}}
    rundir.write_json(run.plan, a_plan(name, strategy, **{**own, **changes}).to_json())
    return run


def end(run: RunDir, state: str = "COMPLETED", elapsed_s: float = 600.0, **more: Any) -> RunDir:
    """Write the end marker."""
    code = 0 if state == "COMPLETED" else 1
    marker = {"state": state, "exit_code": code, "final": True, "reason": "", "restarts": 0, "started": BEGAN_S}
    rundir.write_json(run.status, {**marker, "ended": BEGAN_S + elapsed_s, **more})
    return run


def train(run: RunDir, epochs: int = 8, seconds: float = 600.0, rank: int = 0) -> RunDir:
    """Write what a training records: facts, replicas, metrics of each epoch, and the loss of each fifth second."""
    writer, rng = Writer(run, rank), random.Random(1)
    writer.write(0.0, "params", values=FACTS)
    writer.write(9.0, "replicas", in_sync=2, expected=2, devices=["/device:GPU:0", "/device:GPU:1"], virtual=False)
    writer.write(12.5, "metric", step=0, values={"time_to_first_step_s": 12.5})
    for epoch in range(1, epochs + 1):
        at = 12.5 + (seconds - 20) * epoch / epochs
        accuracy = 1 - 0.5 * math.exp(-epoch / 2)
        values = {"samples_per_s": 9_000 if epoch == 1 else rng.gauss(41_000, 600), "step_time_ms": 6.2, "lr": 0.001}
        values |= {"accuracy": accuracy, "val_accuracy": accuracy - 0.02, "loss": 1.6 * math.exp(-epoch / 3)}
        values |= {"val_loss": 1.7 * math.exp(-epoch / 3) + 0.05, "epoch_time_s": seconds / epochs}
        writer.write(at, "metric", step=epoch, values=values)
        writer.write(at, "progress", done=epoch, total=epochs, unit="epoch", text=f"epoch {epoch}/{epochs}")
    return run


def telemetry(run: RunDir, seconds: int = 600, gpus: int = 2, busy: float = 85.0, peak_mib: float = 9216.0) -> RunDir:
    """Write a sample for each second: GPUs that wait at the end of each epoch, memory that grows to its peak."""
    writer, rng = Writer(run, writer="telemetry"), random.Random(2)
    for second in range(seconds):
        dip = 0.25 if second % 75 < 6 else 1.0
        values: dict[str, float] = {}
        for gpu in range(gpus):
            load = min(100.0, max(0.0, rng.gauss(busy, 5) * dip))
            values[f"gpu{gpu}/utilization_percent"] = load
            values[f"gpu{gpu}/memory_used_mib"] = 21_000.0 + 500 * gpu
            values[f"gpu{gpu}/memory_ours_mib"] = 20_500.0
            values[f"gpu{gpu}/power_w"] = 120 + 4.5 * load
            values[f"gpu{gpu}/temperature_c"] = 40 + 0.3 * load
            values[f"gpu{gpu}/throttled"] = 0.0
        values |= {
            "cpu/cores": max(0.0, rng.gauss(4.2, 0.6)),
            "io/read_mib_s": 120.0 if dip < 1 else 2.0,
            "io/write_mib_s": 0.5,
        }
        values |= {
            "memory/used_mib": min(peak_mib, 2000 + 40.0 * second),
            "memory/peak_mib": min(peak_mib, 2000 + 40.0 * second),
        }
        writer.write(float(second), "sample", values=values)
    writer.write(
        seconds,
        "totals",
        values={f"gpu{gpu}/energy_j": 300_000.0 for gpu in range(gpus)} | {"memory/peak_mib": peak_mib},
    )
    return run


def profile(run: RunDir) -> RunDir:
    """Write a profile whose largest part is the input."""
    split = {
        "step_ms": 6.2,
        "input_ms": 3.1,
        "host_ms": 0.4,
        "device_compute_ms": 2.0,
        "communication_ms": 0.5,
        "idle_ms": 0.2,
    }
    advice = "The input is what the step waits for: cache the data, or prefetch with more threads."
    Writer(run, writer="profile").write(
        50.0, "profile", first=10, last=20, folder="profile", split=split, advice=advice
    )
    return run


def log(run: RunDir, lines: Sequence[str], rank: int = 0) -> RunDir:
    """Write a rank's log."""
    run.log(rank).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return run


def submitted(run: RunDir, waited_s: float = 754.0, reasons: Sequence[str] = ("Priority", "Resources")) -> RunDir:
    """Note a time in the queue."""
    at = BEGAN_S - waited_s
    waits = [{"reason": reason, "since": at + 10 * number} for number, reason in enumerate(reasons)]
    rundir.write_json(run.submitted, {"slurm_job_id": 4711, "submitted": at, "waits": waits})
    return run


def notebook(run: RunDir, extra: Sequence[Mapping[str, Any]] = ()) -> RunDir:
    """Write an executed notebook: text, a table, a picture, and whatever ``extra`` outputs hold."""
    import nbformat
    from nbformat import v4

    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    outputs = [
        v4.new_output("stream", text="epoch 8/8 accuracy 0.991\n"),
        v4.new_output("display_data", data={"image/png": png}),
        *(v4.new_output("display_data", data=dict(data)) for data in extra),
    ]
    cells = [
        v4.new_markdown_cell("# MNIST on two GPUs\nOne process, *MirroredStrategy*."),
        v4.new_code_cell("model.fit(train, epochs=epochs)", execution_count=1, outputs=outputs),
    ]
    nbformat.write(v4.new_notebook(cells=cells), run.notebook(0))
    return run


def full(root: Path) -> RunDir:
    """Return a run that has everything."""
    return end(submitted(notebook(log(profile(telemetry(train(a_run(root)))), ["epoch 8/8", "done"]))))


FAILED_LOG = [
    "hpcml: rank 0 of 1 (alone) · GPU 0,1 · 32 cores (cpus-per-task)",
    *(f"epoch {n}/8 loss {1.6 / n:.3f}" for n in range(1, 60)),
    "Traceback (most recent call last):",
    '  File "train.py", line 41, in <module>',
    "tensorflow.python.framework.errors_impl.ResourceExhaustedError: OOM when allocating tensor with shape[8192,4096]",
]


def failed(root: Path, name: str = "mnist-failed") -> RunDir:
    """Return a run that a GPU's memory was too small for."""
    run = log(telemetry(train(a_run(root, name), 3, 240.0), 240), FAILED_LOG)
    return end(run, "FAILED", 240.0, reason="ResourceExhaustedError: OOM when allocating tensor", failed_rank=0)


def comparison(root: Path) -> RunDir:
    """Return a comparison of three variants."""
    parent = a_run(root, "compare-mnist", None, work="comparison", target=("original", "mirrored", "multiworker"))
    for name, replicas, speed in (("original", 1, 22_000.0), ("mirrored", 2, 40_000.0), ("multiworker", 2, 37_000.0)):
        child = parent.child(name).make()
        rundir.write_json(child.plan, a_plan(name, name).to_json())
        writer = Writer(child)
        devices = [f"/device:GPU:{number}" for number in range(replicas)]
        writer.write(5.0, "replicas", in_sync=replicas, expected=replicas, devices=devices, virtual=False)
        for epoch in range(1, 6):
            values = {"samples_per_s": speed, "step_time_ms": 256_000 / speed, "val_accuracy": 0.99 - 0.2 / epoch**2}
            writer.write(10.0 * epoch, "metric", step=epoch, values=values)
        end(child, elapsed_s=60.0)
    return end(parent, elapsed_s=190.0)
