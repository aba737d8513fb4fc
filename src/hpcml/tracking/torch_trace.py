"""Where the time of a training step goes, read from a trace of torch's profiler, and what to do about it.

xprof's converters read XSpace protocol buffers only, so the trace's own events are counted here, by xprof's rule: each
moment of a step belongs to one part, and where several events overlap, to the first of ``_ORDER``.
"""

import bisect
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import HpcmlError

PATTERN = "*.pt.trace.json.gz"

Interval = tuple[float, float]  # microseconds on the trace's clock
Intervals = list[Interval]  # apart and in order
Event = Mapping[str, Any]

_STEP = "ProfilerStep#"  # the span of a step: torch.profiler.profile.step(), and hpcml's own
_STEPS = "hpcml_steps"  # the steps that came to their end
# Waiting for a batch: hpcml's span, and torch's own around DataLoader.__next__ (torch/utils/data/dataloader.py).
_INPUT = ("hpcml.input", "enumerate(DataLoader)#")
_LAUNCHES = ("cuda_runtime", "cuda_driver")  # calls into CUDA, as Kineto names their categories (ActivityType.cpp)
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# The order of xprof's EventType (xprof/utils/event_span.h): where two overlap, the larger one there counts. Computing
# on the device hides everything; a collective hides operations of the host, and waiting for input hides a collective.
_ORDER = (
    ("kernel", "device_compute_ms"),  # DEVICE_COMPUTE_*; also copies within a device's own memory
    ("to_host", "host_ms"),  # DEVICE_TO_HOST: reading results back
    ("between", "communication_ms"),  # DEVICE_TO_DEVICE
    ("input", "input_ms"),  # HOST_WAIT_INPUT
    ("operation_on_cpu", "host_ms"),  # where no device works, the computing is the host's: it hides a collective too
    ("collective", "communication_ms"),  # DEVICE_COLLECTIVES
    ("launch", "host_ms"),  # HOST_PREPARE
    ("to_device", "input_ms"),  # HOST_TO_DEVICE
    ("operation", "host_ms"),  # HOST_COMPUTE
)

WHAT_HELPS = {
    "input": "The training waits for data: DataLoader(num_workers=…) with about as many workers as there are cores to spare, "
    "persistent_workers=True, pin_memory=True with .to(device, non_blocking=True); for data in memory, whole batches by "
    "a BatchSampler instead of sample by sample; more cpus_per_task; many small files packed into a few large ones on the "
    "node's own disk.",
    "host": "The CPU can't feed the GPU fast enough: torch.compile(model) (mode='reduce-overhead' replays CUDA graphs), a "
    "larger batch for each rank, an optimizer with fused=True, and no .item(), .cpu() or print of a tensor at each step: "
    "they wait for the GPU.",
    "device_compute": "That is where the time should go. To be faster still: torch.autocast('cuda', torch.bfloat16), "
    "torch.set_float32_matmul_precision('high'), torch.compile(model), channels_last for convolutions, a larger batch while "
    "memory allows, or more GPUs.",
    "communication": "The ranks wait for one another's gradients: a larger batch for each rank, or gradients added up over "
    "several batches under model.no_sync() (fewer all-reduces a sample); DistributedDataParallel(gradient_as_bucket_view=True, "
    "bucket_cap_mb=…), with other sizes than 25 tried; gradients in 16 bits by "
    "register_comm_hook(None, default_hooks.bf16_compress_hook); GPUs of one node rather than of two; and the same amount of "
    "data on every rank.",
    "idle": "Nothing that the profiler knows ran: Python between operations, or waiting for another rank. torch.compile(model) "
    "takes Python out of the step; log, print and read results (.item()) every so many steps, not at each.",
}
WHAT_HELPS_ON_CPU = {
    "input": "The training waits for data: whole batches by a BatchSampler instead of sample by sample where the data is in "
    "memory; else DataLoader(num_workers=…), with cores of their own (cpus_per_task).",
    "host": "On CPUs the computing itself counts as host. Faster are more cores (cpus_per_task), torch.compile(model), "
    "torch.autocast('cpu', torch.bfloat16) on CPUs that have it, channels_last for convolutions, or a GPU.",
    "communication": "The ranks wait for one another's gradients, and ranks that share cores for the cores too: a larger "
    "batch for each rank, gradients added up over several batches under model.no_sync(), cores of their own for each rank "
    "(cpus_per_task), and the same amount of data on every rank.",
    "idle": "No operation ran: Python between them, or waiting for a core. A larger batch, an optimizer with foreach=True or "
    "fused=True, torch.compile(model), and no reading of results at each step.",
}
NO_DEVICE = (
    "But the profile holds no work of a GPU at all: the profiler could not use CUPTI. Look for CUPTI in the log; another "
    "profiler on the node may hold it (nsys, ncu, a monitoring of the site's by DCGM)."
)


def parts(file: Path) -> tuple[int, dict[str, float]]:
    """Return the number of steps in a trace, and the means of their parts in ms, which add up to the step.

    A step lasts from the start of its span to its end; work of a device belongs to the step that launched it, and where
    it goes on after the last span, the last step lasts until it is done.

    Args:
        file: a Chrome trace of torch's profiler, compressed.

    Raises:
        HpcmlError: it can't be read.
    """
    try:
        with gzip.open(file, "rt", encoding="utf-8", errors="replace") as text:
            trace = json.load(text)
        return _parts(trace)
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise HpcmlError(f"the trace in {file} can't be read: {reason}", fix="profile again") from None


def _parts(trace: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    spans = [event for event in events if _is_step(event)]
    if _STEPS in trace:
        ended = {f"{_STEP}{number}" for number in trace[_STEPS]}
        spans = [event for event in spans if event["name"] in ended]
    if not spans:
        return 0, {}
    steps = union(map(_interval, spans))
    device = _of_steps(events, steps)
    kinds = _kinds(events, device)
    rest = union([*steps, *(_interval(event) for event in device)])
    means = dict.fromkeys((part for _, part in _ORDER), 0.0)
    for kind, part in _ORDER:
        left = subtract(rest, kinds[kind])
        means[part] += _length(rest) - _length(left)
        rest = left
    means["idle_ms"] = _length(rest)
    return len(spans), {part: total / 1000 / len(spans) for part, total in means.items()}


def _is_step(event: Event) -> bool:
    """Kineto repeats a host's span on the GPU's own rows, as gpu_user_annotation; that one is no step."""
    return event.get("cat") == "user_annotation" and str(event["name"]).startswith(_STEP)


def _of_steps(events: Sequence[Event], steps: Intervals) -> list[Event]:
    """The device's work that was launched within the steps, by the number that Kineto gives a launch and its work.

    Work whose launch is not in the trace counts where it began.
    """
    launched = {
        event["args"]["correlation"]: float(event["ts"])
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", ())
    }
    device = [event for event in events if event.get("cat") in _ON_DEVICE]
    at = [launched.get(event.get("args", {}).get("correlation"), float(event["ts"])) for event in device]
    begins = [begin for begin, _ in steps]
    last = [bisect.bisect(begins, time) - 1 for time in at]  # the step that began last before the launch
    return [event for event, time, step in zip(device, at, last, strict=True) if step >= 0 and time <= steps[step][1]]


def _kinds(events: Sequence[Event], device: Sequence[Event]) -> dict[str, Intervals]:
    """The times of each kind of event in ``_ORDER``."""
    found: dict[str, list[Interval]] = {kind: [] for kind, _ in _ORDER}
    for event in device:
        found[_kind_on_device(event)].append(_interval(event))
    on_cpu = not any(event.get("cat") in _ON_DEVICE for event in events)
    for event in events:
        if kind := _kind_on_host(event, on_cpu):
            found[kind].append(_interval(event))
    return {kind: union(intervals) for kind, intervals in found.items()}


def _kind_on_device(event: Event) -> str:
    name = str(event["name"])
    if event["cat"] == "gpu_memcpy":
        # "Memcpy HtoD (Pageable -> Device)" and the like: Kineto's memcpyKindString (CuptiActivity.cpp)
        for direction, kind in (("DtoH", "to_host"), ("HtoD", "to_device"), ("PtoP", "between")):
            if direction in name:
                return kind
    # ncclDevKernel_AllReduce_…, ncclKernel_… of older ones, and RCCL's, which bears the same name
    return "collective" if "nccl" in name.lower() else "kernel"


def _kind_on_host(event: Event, on_cpu: bool) -> str | None:
    category, name = event.get("cat"), str(event["name"])
    if category in _LAUNCHES:
        return "launch"
    if category == "user_annotation":
        if name.startswith(_INPUT):
            return "input"
        return "collective" if name.startswith("gloo:") else None  # Gloo's own thread works (ProcessGroupGloo.cpp)
    if category != "cpu_op":
        return None
    if not on_cpu:
        return "operation"
    # The operation hands a collective to Gloo's thread, or waits for it (_c10d_functional::wait_tensor): no computing.
    return None if name.startswith(("c10d::", "_c10d_functional::")) else "operation_on_cpu"


def _interval(event: Event) -> Interval:
    began = float(event["ts"])
    return began, began + float(event.get("dur", 0.0))


def union(intervals: Iterable[Interval]) -> Intervals:
    """Return the time that any of the intervals covers."""
    joined: Intervals = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def subtract(intervals: Intervals, others: Intervals) -> Intervals:
    """Return what the others leave of the intervals; both apart and in order, as ``union`` returns them."""
    left: Intervals = []
    first = 0
    for begin, end in intervals:
        while first < len(others) and others[first][1] <= begin:
            first += 1
        at = first
        while at < len(others) and others[at][0] < end:
            if others[at][0] > begin:
                left.append((begin, others[at][0]))
            begin = max(begin, others[at][1])
            at += 1
        if begin < end:
            left.append((begin, end))
    return left


def _length(intervals: Intervals) -> float:
    return sum(end - begin for begin, end in intervals)
