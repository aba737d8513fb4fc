"""The split of step time that a profile shows, and what to do about its largest part.

``python -m hpcml.tracking.profile RUN_FOLDER`` reads a run's newest profile, TensorFlow's by xprof's converters, torch's
by ``torch_trace``, and adds a record ``profile`` to the run's journal. xprof is slow to import and its converters are C++:
they run in a process of their own, bounded in time, so that nothing of theirs reaches a training or its exit code.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import rundir
from ..errors import HpcmlError
from ..rundir import RunDir
from . import journal, torch_trace

CONVERT_S = 60  # 11 steps of a small model take 0.2 s; more is a machine that has something else to do
NICENESS = 10
# xprof's parts of a step of "generic hardware" (CPU, GPU), as its input pipeline analyzer names them in
# PerGenericStepDetails (op_stats_to_input_pipeline_analysis.cc), by what a person can do about them:
_PARTS = {
    "infeedTimeMs": "input_ms",  # HOST_WAIT_INPUT + HOST_TO_DEVICE + DEVICE_WAIT_HOST
    "hostComputeTimeMs": "host_ms",  # operations that run on the CPU
    "kernelLaunchTimeMs": "host_ms",  # HOST_PREPARE
    "compileTimeMs": "host_ms",  # HOST_COMPILE
    "outfeedTimeMs": "host_ms",  # DEVICE_TO_HOST: reading results back
    "deviceComputeTimeMs": "device_compute_ms",  # kernels in 16 and 32 bits
    "deviceCollectivesTimeMs": "communication_ms",  # NCCL's kernels
    "deviceToDeviceTimeMs": "communication_ms",  # copies between devices, and waiting for one another
    "otherTimeMs": "idle_ms",  # nothing that was traced: Python between operations, waiting
}
# Where a graph holds a loop (steps_per_execution, a recurrent layer), xprof takes its iterations for the steps and finds
# none of ours (EventForest::ProcessTensorFlowLoop in group_events.cc). It knows a loop by the name of this statistic;
# under another of the same length the file stays whole and our marks are the steps, but by it xprof also knows which step
# waited for which data. So this is a second try.
_NO_LOOPS = (b"iter_num", b"loop_num")


@dataclass(frozen=True)
class Split:
    """Where the time of a training step goes, as means of the profiled steps in ms; the parts add up to the step.

    Attributes:
        steps: steps counted.
        step_ms: a whole step.
        input_ms: waiting for data, and moving it to the device.
        host_ms: the CPU computes, launches kernels or compiles while the device has nothing to do.
        device_compute_ms: a device computes.
        communication_ms: collectives and copies between devices that no computing hides.
        idle_ms: the rest: nothing that was traced.
        in_loop: the steps are in a loop of the graph; then waiting for data can't be told from host, and counts as it.
    """

    steps: int
    step_ms: float
    input_ms: float = 0.0
    host_ms: float = 0.0
    device_compute_ms: float = 0.0
    communication_ms: float = 0.0
    idle_ms: float = 0.0
    in_loop: bool = False

    @property
    def shares(self) -> dict[str, float]:
        """Each part's share of the step, from 0 to 1, the largest first."""
        parts = {name: getattr(self, f"{name}_ms") / self.step_ms if self.step_ms else 0.0 for name in PARTS}
        return dict(sorted(parts.items(), key=lambda part: -part[1]))


PARTS = tuple(f.name.removesuffix("_ms") for f in dataclasses.fields(Split)[2:] if f.name.endswith("_ms"))
_WORDS = {"device_compute": "device compute"}
_WHAT_HELPS = {
    "input": "The training waits for data: keep it in memory (dataset.cache()), end the pipeline with "
    "prefetch(tf.data.AUTOTUNE), map with num_parallel_calls=tf.data.AUTOTUNE, ask for more cpus_per_task, and pack many "
    "small files into a few large ones on the node's own disk.",
    "host": "The CPU can't feed the devices fast enough: compile(steps_per_execution=10) or more, jit_compile=True, a "
    "larger batch for each replica, no run_eagerly, and nothing in Python for each batch.",
    "device_compute": 'That is where the time should go. To be faster still: precision = "mixed_float16" (or '
    "mixed_bfloat16), a larger batch while memory allows, jit_compile=True, or more devices.",
    "communication": "The replicas wait for one another's gradients: a larger batch for each replica (fewer all-reduces a "
    "sample), 16-bit gradients by mixed precision, fewer and larger all-reduces, devices of one node rather than of two; and "
    "the same amount of data on every replica.",
    "idle": "Nothing that the profiler knows ran: Python between steps, callbacks for each batch, or waiting for another "
    "task. Try compile(steps_per_execution=10), fewer callbacks for each batch, and no reading of results at each step.",
}
_ON_CPU = (
    "On CPUs the computing itself counts as host. Faster are more cores (cpus_per_task), jit_compile=True, "
    "steps_per_execution where the model is small, or a GPU."
)
_NO_DEVICE = (
    "But the profile holds no work of a GPU at all: the profiler could not use CUPTI. Look for CUPTI in the log; its library, "
    "libcupti, comes with the CUDA toolkit and with tensorflow[and-cuda]."
)
_HELPS = {
    ("tensorflow", False): _WHAT_HELPS,
    ("tensorflow", True): _WHAT_HELPS | dict.fromkeys(("host", "device_compute"), _ON_CPU),
    ("torch", False): torch_trace.WHAT_HELPS,
    ("torch", True): torch_trace.WHAT_HELPS | torch_trace.WHAT_HELPS_ON_CPU,
}


def advise(split: Split, *, on_cpu: bool, framework: str = "tensorflow") -> str:
    """Return what to do about the largest part of a step, in words.

    Args:
        on_cpu: the training ran on CPU devices; the split then tells about this machine only.
        framework: ``tensorflow`` or ``torch``, whose names for the remedies are used.
    """
    part, share = next(iter(split.shares.items()))
    text = f"{100 * share:.0f} % of a step is {_WORDS.get(part, part)}. "
    if not on_cpu and split.device_compute_ms + split.communication_ms == 0:
        return text + (torch_trace.NO_DEVICE if framework == "torch" else _NO_DEVICE)
    text += _HELPS[framework, on_cpu][part]
    if split.in_loop and part == "host":
        text += " Waiting for data looks like host too where the graph holds a loop: with steps_per_execution > 1, "
        text += "profile once with 1."
    if on_cpu:
        text += " Measured on CPU devices, this tells about this machine only; on GPUs the parts are others."
    return text


def split(folder: Path) -> Split | None:
    """Split the step time of the newest profile below a folder; None where it holds no steps.

    Args:
        folder: of a run's profiles, or one session of it: TensorFlow's ``plugins/profile/<time>``, torch's ``<time>``.

    Raises:
        HpcmlError: xprof is not installed for TensorFlow's, or the profile can't be read.
    """
    files = _newest(folder)
    if not files:
        return None
    if files[0].match(torch_trace.PATTERN):
        return _from_means(*torch_trace.parts(files[0]))
    try:
        from xprof.convert.raw_to_tool_data import xspace_to_tool_data
    except ImportError as error:
        raise HpcmlError(
            f"the profile is there, but its step time can't be split: {error}", fix="pip install 'hpcml[profile]'"
        ) from None
    found = _from_tables(_convert(xspace_to_tool_data, files))
    if found is None and (looped := _from_tables(_convert(xspace_to_tool_data, files, _NO_LOOPS))):
        found = dataclasses.replace(looped, in_loop=True)
    return found


def _convert(
    xspace_to_tool_data: Callable[..., Any], files: list[Path], renamed: tuple[bytes, bytes] = (b"", b"")
) -> Any:
    """The tables of xprof's input pipeline analyzer; made from copies, beside which it keeps what it has read."""
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / file.name for file in files]
        for file, copy in zip(files, copies, strict=True):
            copy.write_bytes(file.read_bytes().replace(*renamed))
        data, _ = xspace_to_tool_data([str(copy) for copy in copies], "input_pipeline_analyzer", {})
    if data is None:
        raise HpcmlError(f"xprof can't read the profile in {files[0].parent}", fix="profile again, or look with: xprof")
    return json.loads(data)


def _newest(folder: Path) -> list[Path]:
    patterns = ("plugins/profile/*/*.xplane.pb", "*.xplane.pb", f"*/{torch_trace.PATTERN}", torch_trace.PATTERN)
    found = [path for pattern in patterns for path in folder.glob(pattern) if not path.name.startswith(".")]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return sorted(newest.parent.glob("*.xplane.pb")) or [newest] if newest else []


def _from_tables(tables: Iterable[Mapping[str, Any]]) -> Split | None:
    """Means over the steps of the analyzer's first table, in the form of Google's DataTable."""
    table = next((t for t in tables if {"stepnum", *_PARTS} <= {str(c.get("id")) for c in t.get("cols", ())}), None)
    rows = table["rows"] if table else []
    if table is None or not rows:
        return None
    names = [column["id"] for column in table["cols"]]
    totals = dict.fromkeys(_PARTS.values(), 0.0)
    for row in rows:
        for name, cell in zip(names, row["c"], strict=True):
            if name in _PARTS:
                totals[_PARTS[name]] += float(cell["v"])
    return _from_means(len(rows), {name: total / len(rows) for name, total in totals.items()})


def _from_means(steps: int, means: dict[str, Any]) -> Split | None:
    return Split(steps=steps, step_ms=sum(means.values()), **means) if steps else None


def split_apart(folder: Path, timeout_s: float = CONVERT_S) -> Split | None:
    """Split in a process of its own, which may crash or hang without harm.

    Raises:
        HpcmlError: as ``split``; also where it takes longer than ``timeout_s`` or dies.
    """
    words = [sys.executable, "-m", "hpcml.tracking.profile", "--split", str(folder)]
    again = f"try again when the machine is free: {sys.executable} -m hpcml.tracking.profile RUN_FOLDER"
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise HpcmlError(f"the profile was not split within {timeout_s:.0f} s", fix=again) from None
    told = done.stdout.rpartition("\n{")[2] if done.returncode == 0 else ""
    if not told:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise HpcmlError(f"the profile was not split: {lines[-1]}", fix=again)
    found = json.loads("{" + told)
    if "error" in found:
        raise HpcmlError(found["error"], fix=found["fix"])
    return Split(**found) if found["steps"] else None


def record(run: RunDir) -> Split | None:
    """Split a run's newest profile and write it, with advice, into its journal; once for each profile.

    What goes wrong becomes a message in the journal; a run that asked for no profile is left alone.
    """
    records = list(journal.read(run.events))
    profiled = max((r for r in records if r["kind"] == "profiled"), key=lambda r: (r["restart"], r["t"]), default=None)
    if profiled is None:
        _say_none(run, records)
        return None
    folder = run.path / profiled["folder"]
    if any(r["kind"] == "profile" and r["folder"] == profiled["folder"] for r in records):
        return None
    writer = journal.Journal(run.event_file(profiled["rank"], profiled["restart"], "profile"))
    try:
        found = split_apart(folder)
        if found is None:
            raise HpcmlError(f"the profile in {folder} holds no whole step", fix="profile more steps")
    except HpcmlError as error:
        writer.message("warning", str(error))
        print(f"hpcml: {error}", file=sys.stderr, flush=True)
        return None
    first, last = profiled["first"], profiled["last"]
    found = _per_step(found, (last - first + 1) / profiled["calls"])
    advice = advise(found, on_cpu=bool(profiled.get("virtual")), framework=profiled.get("framework", "tensorflow"))
    values = {"step_ms": found.step_ms, **{f"{name}_ms": getattr(found, f"{name}_ms") for name in PARTS}}
    if found.in_loop:
        del values["input_ms"]  # it is not zero, nobody knows it
    writer.write(
        "profile", first=first, last=last, folder=profiled["folder"], steps=found.steps, split=values, advice=advice
    )
    writer.close()
    shares = " · ".join(f"{_WORDS.get(n, n)} {100 * s:.0f} %" for n, s in found.shares.items() if round(100 * s))
    print(f"hpcml: profile of steps {first} to {last} · {found.step_ms:.3g} ms a step · {shares}", flush=True)
    print(f"hpcml: {advice}", flush=True)
    return found


def _say_none(run: RunDir, records: list[dict[str, Any]]) -> None:
    """Tell about a profile that was asked for and never taken, unless it was told why."""
    plan = rundir.read_json(run.plan)
    asked = plan.get("profile")
    if not asked or any(r["kind"] == "message" and "no profile" in str(r.get("text")) for r in records):
        return
    restart = max((r["restart"] for r in records), default=0)
    loop = (
        "for batch in run.steps(loader)"
        if plan.get("strategy") in ("ddp", "horovod")
        else "fit(callbacks=run.callbacks())"
    )
    text = f"no profile of steps {asked[0]} to {asked[1]}: no {loop} came to them"
    journal.Journal(run.event_file(0, restart, "profile")).message("warning", text)
    print(f"hpcml: {text}", file=sys.stderr, flush=True)


def _per_step(found: Split, steps_a_call: float) -> Split:
    """With steps_per_execution the marks are around several steps."""
    values = {name: value / steps_a_call for name, value in dataclasses.asdict(found).items() if name.endswith("_ms")}
    return Split(steps=round(found.steps * steps_a_call), in_loop=found.in_loop, **values)


def main() -> int:
    """``RUN_FOLDER`` adds the split to the run's journal; ``--split FOLDER`` prints it as JSON. 0 also where nothing is to do."""
    import argparse

    parser = argparse.ArgumentParser(prog="hpcml.tracking.profile")
    parser.add_argument("run", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--split", action="store_true")
    asked = parser.parse_args()
    if not asked.split:
        with contextlib.suppress(OSError):
            os.nice(NICENESS)
        record(RunDir(asked.run.absolute().parent, asked.run.name))
        return 0
    try:
        found = split(asked.run)
        told: dict[str, Any] = dataclasses.asdict(found) if found else {"steps": 0}
    except HpcmlError as error:
        told = {"error": error.problems[0].what, "fix": error.problems[0].fix}
    print("\n" + json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
