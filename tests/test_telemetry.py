"""Telemetry: the job's GPUs through a stand-in for the driver's library, its processes from cgroup and /proc."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hpcml.tracking import cgroup, journal, telemetry, translate
from hpcml.tracking.gpus import Gpu
from hpcml.tracking.host import MIB, Host, Processes, Usage, idle_core_s, slurm_limit
from hpcml.tracking.visible import Seen, choose
from hpcml.tracking.watching import IDLE_S, THROTTLED_S, Totals, Warnings

COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_stub = pytest.mark.skipif(COMPILER is None, reason="stub of the GPU driver: needs a C compiler")
UUID = "GPU-{:08d}-0000-4000-8000-000000000000"

PRELUDE = """
import json, os, sys, threading, time
from pathlib import Path
from hpcml.tracking import journal, telemetry
folder = Path(sys.argv[1])
events = folder / "events" / "0.0.telemetry.jsonl"
def configure(*lines):
    (folder / "new").write_text("\\n".join(lines) + "\\n")
    os.replace(folder / "new", folder / "stub")
def watch(devices, **environment):
    watching = telemetry.Telemetry(events, devices, os.getpid(), 1.0, 0, True, environment)
    watching.open()
    return watching
me = os.getpid()
"""


@dataclass(frozen=True)
class Told:
    """What a scenario left behind."""

    records: list[dict[str, Any]]
    stderr: str

    def values(self, kind: str) -> list[dict[str, Any]]:
        return [record["values"] for record in self.records if record["kind"] == kind]

    def messages(self, level: str = "warning") -> list[str]:
        return [r["text"] for r in self.records if r["kind"] == "message" and r["level"] == level]


def of_gpu(values: dict[str, Any], number: int) -> dict[str, Any]:
    prefix = f"gpu{number}/"
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stand-in for the driver's library."""
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libnvidia-ml.so.1"
    source = Path(__file__).parent / "stubs" / "nvml.c"
    words = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)]
    subprocess.run([str(COMPILER), *words], check=True)
    return folder


def play(folder: Path, scenario: str, driver: Path) -> Told:
    """Run a scenario in a process of its own, which finds the driver's library by LD_LIBRARY_PATH as any other."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "NVML_STUB": str(folder / "stub"), "LD_LIBRARY_PATH": str(driver)}
    environment = {name: value for name, value in environment.items() if name != "CUDA_VISIBLE_DEVICES"}
    words = [sys.executable, "-c", PRELUDE + scenario, str(folder)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return Told(list(journal.read(folder / "events")), done.stderr)


@needs_stub
def test_every_quantity_of_the_jobs_gpus_and_totals(tmp_path: Path, driver: Path) -> None:
    told = play(
        tmp_path,
        """
configure("count 4", f"processes {me}:700,1:100", "memory_mib 1000", "energy_mj 5000", "nvlink_tx_kib 0",
          "reasons 0x117")  # idle, clocks set, power cap, sync boost, display: by design
watching = watch(["2", "3"])
watching.sample(100.0)
configure("count 4", f"processes {me}:900,1:100", "memory_mib 1200", "energy_mj 9000", "2.utilization 0",
          "nvlink_tx_kib 4096", "nvlink_rx_kib 2048", "reasons 0x24")
watching.sample(102.0)
watching.stop()
""",
        driver,
    )
    facts = told.values("params")[0]
    assert facts["driver"] == "555.42.06"
    assert [facts[f"gpu{n}.uuid"] for n in (0, 1)] == [UUID.format(2), UUID.format(3)]
    assert (facts["gpu0.name"], facts["gpu0.memory_mib"]) == ("NVIDIA A100-SXM4-40GB", 40960)
    assert "gpu2.uuid" not in facts
    first, second = told.values("sample")
    expected = {
        "utilization_percent": 90,
        "memory_used_mib": 1200,
        "memory_ours_mib": 900,
        "memory_others_mib": 100,
        "power_w": 250,
        "temperature_c": 60,
        "sm_clock_mhz": 1410,
        "memory_clock_mhz": 1215,
        "throttled": 1,
        "nvlink_tx_mib_s": 2,
        "nvlink_rx_mib_s": 1,
        "energy_j": 4,
        "pcie_rx_mib_s": 2,
        "pcie_tx_mib_s": 1,
    }
    assert of_gpu(second, 1) == expected
    in_turn = {name for name in expected if name.startswith("pcie")}
    assert of_gpu(second, 0) == {k: v for k, v in expected.items() if k not in in_turn} | {"utilization_percent": 0}
    assert in_turn < set(of_gpu(first, 0))  # one GPU at a time
    assert (of_gpu(first, 0)["energy_j"], of_gpu(first, 0)["throttled"]) == (0, 0)
    assert first["memory/used_mib"] > 5
    assert {"cpu/cores", "memory/peak_mib", "processes/count"} <= set(second)
    (totals,) = told.values("totals")
    assert of_gpu(totals, 0) == {
        "utilization_mean_percent": 45,
        "power_mean_w": 250,
        "energy_j": 4,
        "throttled_s": 2,
        "memory_peak_mib": 1200,
        "memory_ours_peak_mib": 900,
    }
    assert totals["telemetry/samples"] == 2
    assert totals["telemetry/seconds"] == 2
    assert told.messages() == []


@needs_stub
def test_what_a_gpu_does_not_have_is_left_out_for_good_and_zero_stays_zero(tmp_path: Path, driver: Path) -> None:
    told = play(
        tmp_path,
        """
configure("count 2", "0.power_mw unsupported", "0.nvlink_tx_kib unsupported", "0.nvlink_rx_kib unsupported",
          "0.temperature old", "1.energy_mj unsupported", "1.power_mw 0", "1.utilization 0", "0.pcie_rx_kib_s unsupported")
watching = watch(["0", "1"])
for second in range(3):
    watching.sample(float(second))
configure("count 2", "1.power_mw 100000", "1.energy_mj unsupported")
for second in range(3, 6):
    watching.sample(float(second))
watching.stop()
""",
        driver,
    )
    samples = told.values("sample")
    for sample in samples:
        assert not {"power_w", "nvlink_tx_mib_s", "temperature_c", "pcie_rx_mib_s"} & set(of_gpu(sample, 0))
    assert [of_gpu(sample, 1)["power_w"] for sample in samples] == [0, 0, 0, 100, 100, 100]
    assert of_gpu(samples[0], 1)["utilization_percent"] == 0
    # without a counter the power is integrated: a rise within one second is half of it, then 100 W
    assert [of_gpu(sample, 1)["energy_j"] for sample in samples] == [0, 0, 0, 50, 150, 250]
    assert told.messages() == []


@needs_stub
def test_an_old_driver_is_asked_by_the_old_names(tmp_path: Path, driver: Path) -> None:
    told = play(
        tmp_path,
        """
configure("count 1", "driver_year 2020", "memory_mib 77", "reasons 8")
watching = watch(["0"])
watching.sample(0.0)
watching.stop()
""",
        driver,
    )
    assert of_gpu(told.values("sample")[0], 0)["memory_used_mib"] == 77
    assert of_gpu(told.values("sample")[0], 0)["throttled"] == 1


@needs_stub
def test_a_lost_gpu_and_a_driver_error_are_told_once_and_the_rest_goes_on(tmp_path: Path, driver: Path) -> None:
    told = play(
        tmp_path,
        """
configure("count 3")
watching = watch(["0", "1", "2"])
watching.sample(0.0)
configure("count 3", "1.lost 1", "2.temperature unknown")
for second in range(1, 4):
    watching.sample(float(second))
watching.stop()
""",
        driver,
    )
    lost, broken = told.messages()
    assert "gpu1" in lost
    assert "lost" in lost
    assert "gpu2" in broken
    assert told.stderr.count("hpcml: warning:") == 2
    last = told.values("sample")[-1]
    assert of_gpu(last, 0)["temperature_c"] == 60
    assert not of_gpu(last, 1)
    assert "temperature_c" not in of_gpu(last, 2)
    assert of_gpu(last, 2)["power_w"] == 250
    assert of_gpu(told.values("totals")[0], 1)["utilization_mean_percent"] == 90


@needs_stub
def test_mig_instances_have_memory_but_no_sensors(tmp_path: Path, driver: Path) -> None:
    told = play(
        tmp_path,
        """
configure("count 2", "1.mig 3", "memory_mib 300", f"processes {me}:200", "utilization 0")
watching = watch(["MIG-00000001-0000-4000-8000-000000000002", "0"])
for second in range(0, 90, 30):
    watching.sample(float(second))
watching.stop()
""",
        driver,
    )
    facts = told.values("params")[0]
    assert facts["gpu0.mig"] == UUID.format(1)
    assert facts["gpu0.uuid"].startswith("MIG-")
    assert "MIG" in facts["gpu0.name"]
    assert "gpu1.mig" not in facts
    expected = {"memory_used_mib": 300, "memory_ours_mib": 200, "memory_others_mib": 0}
    assert [of_gpu(sample, 0) for sample in told.values("sample")] == [expected] * 3
    assert [text.split()[0] for text in told.messages()] == ["gpu1"]  # idle; an instance's utilisation is unknown


@needs_stub
def test_others_memory_at_the_start_is_told_once_with_its_pids(tmp_path: Path, driver: Path) -> None:
    told = play(
        tmp_path,
        """
configure("count 2", "memory_mib 5000", f"0.processes 1:4000,{me}:1000", f"1.processes {me}:5000")
watching = watch(["0", "1"])
watching.sample(0.0)
watching.sample(1.0)
watching.stop()
""",
        driver,
    )
    (text,) = told.messages()
    assert "gpu0" in text
    assert "4,000 MiB" in text
    assert "pid 1)" in text


@needs_stub
def test_owners_that_cannot_be_known_are_left_out(tmp_path: Path, driver: Path) -> None:
    told = play(
        tmp_path,
        """
configure("count 2", "memory_mib 100", f"0.processes {me}:-", "1.processes unsupported")
watching = watch(["0", "1"])
watching.sample(0.0)
watching.stop()
""",
        driver,
    )
    for number in (0, 1):
        mine = of_gpu(told.values("sample")[0], number)
        assert mine["memory_used_mib"] == 100
        assert not {"memory_ours_mib", "memory_others_mib"} & set(mine)


@needs_stub
def test_gpus_by_uuid_and_one_that_is_not_there(tmp_path: Path, driver: Path) -> None:
    told = play(
        tmp_path,
        f"""
configure("count 2")
watching = watch(["{UUID.format(1)}", "7"])
watching.sample(0.0)
watching.stop()
""",
        driver,
    )
    assert [v for k, v in told.values("params")[0].items() if k.endswith(".uuid")] == [UUID.format(1)]
    (text,) = told.messages()
    assert "GPU 7" in text


@pytest.mark.parametrize("lacks", ["library", pytest.param("driver", marks=needs_stub)])
def test_without_a_driver_there_is_the_host_alone_and_no_noise(
    tmp_path: Path, request: pytest.FixtureRequest, lacks: str
) -> None:
    if lacks == "library":  # nor any that this machine may have
        (tmp_path / "libnvidia-ml.so.1").write_text("")
    told = play(
        tmp_path,
        """
configure("driver unknown")
watching = telemetry.start(events, ["0"], me)
watching.stop()
watching.stop()
""",
        tmp_path if lacks == "library" else request.getfixturevalue("driver"),
    )
    assert told.stderr == ""
    (reason,) = told.messages("info")
    assert reason.startswith("no GPU telemetry")
    assert told.values("params") == []
    assert all(values["memory/used_mib"] > 5 for values in told.values("sample"))
    (totals,) = told.values("totals")
    assert not any(name.startswith("gpu") for name in totals)


@needs_stub
def test_the_thread_samples_until_it_is_stopped_and_the_end_is_sampled_too(tmp_path: Path, driver: Path) -> None:
    told = play(
        tmp_path,
        """
configure("count 1", "energy_mj 1000")
watching = telemetry.start(events, ["0"], me, interval_s=0.01, first_gpu=5)
while not any(record["kind"] == "sample" for record in journal.read(events.parent)):
    time.sleep(0.01)
assert watching.interval_s == telemetry.SENSOR_WINDOW_S
configure("count 1", "energy_mj 3000")
watching.stop()
assert not watching.thread.is_alive()
""",
        driver,
    )
    assert told.values("sample")[-1]["gpu5/energy_j"] == 2
    assert told.values("totals")[0]["gpu5/energy_j"] == 2
    assert told.records[-1]["kind"] == "totals"
    assert told.stderr == ""


def test_samples_on_the_beat_have_a_step_each_however_slow_the_first_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    elapsed = 0.0  # of both clocks, in seconds

    class Clock:
        """A node whose reading takes 0.9 s at first, and whose every look at the clock takes up to a millisecond."""

        def monotonic(self) -> float:
            nonlocal elapsed
            elapsed += rng.random() / 1000
            return elapsed

        def time_ns(self) -> int:
            return 1_800_000_000_000_000_000 + int(self.monotonic() * 1e9)

        thread_time = time.thread_time

    watching = telemetry.Telemetry(tmp_path / "0.0.telemetry.jsonl", (), os.getpid(), 1.0, 0, True, {})
    beats = 0

    def wait(seconds: float) -> bool:
        nonlocal elapsed, beats
        elapsed, beats = elapsed + seconds, beats + 1
        return beats == 50

    def read(host: Host) -> Usage:
        nonlocal elapsed
        elapsed += 0.01 if beats else 0.9
        return Usage(processes=3)

    monkeypatch.setattr(telemetry, "time", Clock())
    monkeypatch.setattr(journal.writer, "_time_ns", Clock().time_ns)
    monkeypatch.setattr(Host, "read", read)
    monkeypatch.setattr(watching._stop, "wait", wait)
    thread = threading.Thread(target=watching._run)  # it blocks the signals of its thread
    thread.start()
    thread.join()
    samples = list(journal.read(tmp_path, kinds={"sample"}))
    said = translate.Said()
    steps = [point.step for record in samples for point in translate.points(record, said, samples[0]["t"])]
    assert sorted(set(steps)) == list(range(51)) and len(samples) == 51


@needs_stub
def test_a_driver_that_hangs_does_not_hold_the_end_of_the_job(tmp_path: Path, driver: Path) -> None:
    told = play(
        tmp_path,
        """
telemetry.STOP_S = 0.2
configure("count 1", "slow_ms 600000")
watching = telemetry.start(events, ["0"], me)
while not events.exists() or not any(record["kind"] == "params" for record in journal.read(events.parent)):
    time.sleep(0.01)
watching.stop()
assert watching.thread.is_alive()
""",
        driver,
    )
    assert told.records[-1]["kind"] == "totals"


def test_beats_keep_to_the_start_and_those_that_passed_are_left_out() -> None:
    began = 50.0
    assert telemetry.until_beat(began, 50.25, 1.0) == 0.75
    assert telemetry.until_beat(began, 51.0, 1.0) == 1.0
    assert telemetry.until_beat(began, 57.5, 1.0) == 0.5  # a driver that took 7.5 s: one wait, not seven samples
    seed = random.randrange(10**6)
    print("seed", seed)
    draw, now = random.Random(seed), began
    for _ in range(1000):
        now += draw.uniform(0, 3)
        now += telemetry.until_beat(began, now, 1.0)
        assert abs(now - began - round(now - began)) < 1e-6


# Which GPUs a name means: seen by NVML, CUDA_VISIBLE_DEVICES, SLURM_STEP_GPUS, expected UUIDs.
FOUR = [Seen(None, f"GPU-{letter}", minor) for minor, letter in enumerate("abcd")]
DIVIDED = [FOUR[0], Seen(None, "MIG-1", 1, "GPU-b"), Seen(None, "MIG-2", 1, "GPU-b"), FOUR[2]]
CASES = {
    "no Slurm": (FOUR, "0,2", "", ["GPU-a", "GPU-c"]),
    "Slurm without constraint: the ids themselves": (FOUR, "2,3", "2,3", ["GPU-c", "GPU-d"]),
    "constrained, NVML shows the job's": (FOUR[2:], "0,1", "2,3", ["GPU-c", "GPU-d"]),
    "constrained, NVML shows all": (FOUR, "0,1", "2,3", ["GPU-c", "GPU-d"]),
    "one of a shared list": (FOUR, "1", "0,1", ["GPU-b"]),
    "own share of a constrained list": (FOUR[3:], "0", "3", ["GPU-d"]),
    "UUIDs, one shortened, in their order": (FOUR, "GPU-D,gpu-a", "0,1", ["GPU-d", "GPU-a"]),
    "instances": (DIVIDED, "MIG-2,0", "", ["MIG-2", "GPU-a"]),
    "positions count instances": (DIVIDED, "2,3", "", ["MIG-2", "GPU-c"]),
    "not there": (FOUR[:1], "1,GPU-x", "", [None, None]),
}


@pytest.mark.parametrize(("seen", "names", "ids", "expected"), CASES.values(), ids=CASES)
def test_which_gpus_are_the_jobs(seen: list[Seen], names: str, ids: str, expected: list[str | None]) -> None:
    found = choose(names.split(","), seen, tuple(filter(None, ids.split(","))))
    assert [one.uuid if one else None for one in found] == expected


@pytest.mark.parametrize(
    ("visible", "mine", "rank", "world", "expected"),
    [
        (("0", "1", "2", "3"), ("0", "1"), 0, 2, (("0", "1", "2", "3"), 0, True)),  # one list, shared
        (("0", "1", "2", "3"), ("2", "3"), 1, 2, None),
        (("0", "1", "2", "3"), ("0",), 0, 2, (("0", "1"), 0, True)),  # the job asks for fewer than there are
        (("0",), ("0",), 0, 2, (("0",), 0, True)),  # each sees its own
        (("0",), ("0",), 1, 2, (("0",), 1, False)),
        (None, ("0",), 0, 2, (("0", "1"), 0, True)),
        (("3", "5"), ("3", "5"), 0, 1, (("3", "5"), 0, True)),
        (("0", "1"), (), 0, 2, ((), 0, True)),  # a rehearsal on CPUs
        (None, (), 1, 2, None),
    ],
)
def test_what_each_rank_watches(
    visible: tuple[str, ...] | None, mine: tuple[str, ...], rank: int, world: int, expected: object
) -> None:
    assert telemetry.share_of(visible, mine, rank, world) == expected


def watched(said: list[str]) -> tuple[Warnings, Gpu]:
    return Warnings(said.append), Gpu("gpu0", "GPU-a", None, {}, [])


def test_an_idle_gpu_that_holds_our_memory_is_told_once_after_a_minute() -> None:
    said: list[str] = []
    warnings, gpu = watched(said)
    idle = {"utilization_percent": 4.0, "memory_ours_mib": 3000.0, "memory_others_mib": 0.0, "memory_used_mib": 3000.0}
    warnings.gpu(0, gpu, idle)
    warnings.gpu(IDLE_S - 1, gpu, {**idle, "utilization_percent": 5.0})  # at work: counted anew
    for second in range(IDLE_S):
        warnings.gpu(IDLE_S + second, gpu, idle)
    assert said == []
    for second in range(3 * IDLE_S):
        warnings.gpu(2 * IDLE_S + second, gpu, idle)
    (text,) = said
    assert "gpu0" in text
    assert "3,000 MiB" in text


@pytest.mark.parametrize(
    ("start", "later", "expected"),
    [
        ({"memory_ours_mib": 0.0, "memory_used_mib": 9000.0, "memory_others_mib": 0.0}, {}, 0),  # holds nothing
        ({"memory_used_mib": 100.0}, {"memory_used_mib": 4100.0}, 1),  # owners unknown: it came with the job
        ({"memory_used_mib": 100.0}, {"memory_used_mib": 150.0}, 0),
    ],
)
def test_idle_needs_memory_of_ours(start: dict[str, float], later: dict[str, float], expected: int) -> None:
    said: list[str] = []
    warnings, gpu = watched(said)
    warnings.gpu(0, gpu, start | {"utilization_percent": 0.0})
    for second in range(1, IDLE_S + 2):
        warnings.gpu(second, gpu, start | later | {"utilization_percent": 0.0})
    assert len([text for text in said if "idle" in text]) == expected


def test_throttling_is_told_once_for_each_cause_that_lasts() -> None:
    said: list[str] = []
    warnings, gpu = watched(said)
    for second, reasons in enumerate([0x40] * THROTTLED_S + [0] + [0x80] * (THROTTLED_S + 1) + [0xC0] * 30):
        gpu.reasons = reasons
        warnings.gpu(second, gpu, {})
    assert ["brake" in said[0], "hardware, heat" in said[1], len(said)] == [True, True, 2]


def test_memory_taken_before_by_processes_out_of_sight() -> None:
    said: list[str] = []
    warnings, gpu = watched(said)
    warnings.gpu(0, gpu, {"memory_used_mib": 3000.0})
    warnings.gpu(1, gpu, {"memory_used_mib": 9000.0})
    (text,) = said
    assert "3,000 MiB" in text
    assert "can't be seen" in text


def test_memory_near_its_limit_is_told_once() -> None:
    said: list[str] = []
    warnings = Warnings(said.append)
    for used in (940, 949, 950, 990):
        warnings.memory(Usage(used=used * MIB), 1000 * MIB)
        assert len(said) == (used >= 950)
    assert "950 of its 1,000 MiB" in said[0]
    warnings.memory(Usage(used=MIB), None)


def test_slurms_limit_of_memory() -> None:
    assert slurm_limit({"SLURM_MEM_PER_NODE": "2048"}) == 2048 * MIB
    assert slurm_limit({"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "4"}) == 400 * MIB
    assert slurm_limit({"SLURM_MEM_PER_NODE": "0"}) is None  # all of the node
    assert slurm_limit({}) is None


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7"
V1 = "sys/fs/cgroup/{}/slurm/uid_1000/job_7"


def version_2(root: Path) -> Path:
    """A node with cgroup v2: a step of two tasks, 300 MiB in use of which 100 MiB are page cache, 4 GiB allowed."""
    step = f"{V2}/step_0"
    return write(
        root,
        {
            "proc/self/cgroup": "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n",
            "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
            f"{V2}/memory.max": f"{4096 * MIB}\n",
            f"{step}/memory.max": "max\n",
            f"{step}/memory.current": f"{300 * MIB}\n",
            f"{step}/memory.peak": f"{700 * MIB}\n",
            f"{step}/memory.stat": f"anon 1\nfile 2\ninactive_file {60 * MIB}\nactive_file {40 * MIB}\n",
            f"{step}/cpu.stat": "usage_usec 2500000\nuser_usec 2000000\n",
            f"{step}/io.stat": f"8:0 rbytes={10 * MIB} wbytes={3 * MIB} rios=1 wios=1\n8:16 rbytes={2 * MIB} wbytes=0\n",
            f"{step}/cgroup.procs": "",
            f"{step}/user/task_0/cgroup.procs": "101\n102\n",
            f"{step}/user/task_1/cgroup.procs": "103\n",
            f"{V2}/step_extern/cgroup.procs": "99\n",
        },
    )


def version_1(root: Path) -> Path:
    """The same with cgroup v1, each controller in its own tree, CPU and accounting in a joint one."""
    lines = "9:memory:/slurm/uid_1000/job_7/step_0/task_0\n8:cpu,cpuacct:/slurm/uid_1000/job_7/step_0/task_0\n"
    mount = "{} 23 0:26 / /sys/fs/cgroup/{} rw - cgroup cgroup rw,{}\n"
    memory, cpu = V1.format("memory") + "/step_0", V1.format("cpu,cpuacct") + "/step_0"
    return write(
        root,
        {
            "proc/self/cgroup": lines + "7:blkio:/\n1:name=systemd:/init.scope\n0::/\n",
            "proc/self/mountinfo": mount.format(31, "memory", "memory")
            + mount.format(32, "cpu,cpuacct", "cpu,cpuacct")
            + mount.format(33, "blkio", "blkio"),
            "sys/fs/cgroup/blkio/blkio.throttle.io_service_bytes": f"8:0 Read {999 * MIB}\n",
            f"{V1.format('memory')}/memory.limit_in_bytes": f"{4096 * MIB}\n",
            f"{memory}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{memory}/memory.usage_in_bytes": f"{300 * MIB}\n",
            f"{memory}/memory.max_usage_in_bytes": f"{700 * MIB}\n",
            f"{memory}/memory.stat": "inactive_file 1\ntotal_inactive_file 62914560\ntotal_active_file 41943040\n",
            f"{memory}/task_0/cgroup.procs": "101\n102\n",
            f"{memory}/task_1/cgroup.procs": "103\n",
            f"{cpu}/cpuacct.usage": "2500000000\n",
            f"{cpu}/task_0/cgroup.procs": "101\n102\n",
            f"{cpu}/task_1/cgroup.procs": "103\n",
        },
    )


@pytest.mark.parametrize("make", [version_1, version_2])
def test_a_step_is_measured_by_its_cgroup(tmp_path: Path, make: Any) -> None:
    host = Host(1, make(tmp_path), {"SLURM_MEM_PER_NODE": "8192"})
    usage = host.read()
    assert host.limit == 4096 * MIB
    assert usage.core_s == 2.5
    assert usage.used == 200 * MIB
    assert usage.peak == 600 * MIB  # the kernel's, without the page cache of now
    assert usage.processes == 3
    if make is version_2:
        assert (usage.read, usage.written) == (12 * MIB, 3 * MIB)
    else:
        assert usage.read == 0  # Slurm limits no I/O here: the root's counts are everybody's


def test_a_kernel_peak_of_page_cache_alone_does_not_count(tmp_path: Path) -> None:
    host = Host(1, version_2(tmp_path), {})
    host.read()
    step = tmp_path / V2 / "step_0"
    (step / "memory.peak").write_text(f"{3000 * MIB}\n")
    (step / "memory.current").write_text(f"{3000 * MIB}\n")
    (step / "memory.stat").write_text(f"inactive_file {2800 * MIB}\nactive_file 0\n")
    assert host.read().peak == 600 * MIB
    (step / "memory.stat").write_text("inactive_file 0\nactive_file 0\n")  # given back since; the peak is no news
    (step / "memory.current").write_text(f"{650 * MIB}\n")
    assert host.read().peak == 650 * MIB


def test_before_linux_5_19_the_samples_make_the_peak(tmp_path: Path) -> None:
    root = version_2(tmp_path)
    (root / V2 / "step_0" / "memory.peak").unlink()
    assert Host(1, root, {}).read().peak == 200 * MIB


@pytest.mark.parametrize("make", [version_1, version_2])
def test_processes_are_told_apart_by_their_cgroup(tmp_path: Path, make: Any) -> None:
    root = make(tmp_path)
    mine = (root / "proc/self/cgroup").read_text()
    files = {
        "proc/104/cgroup": mine.replace("task_0", "task_1"),
        "proc/105/cgroup": mine.replace("job_7/step_0", "job_7/step_1"),
        "proc/106/cgroup": mine.replace("job_7", "job_77"),
    }
    host = Host(1, write(root, files), {})
    host.read()
    assert [host.owns(pid) for pid in (101, 104, 105, 106)] == [True, True, False, False]
    assert host.owns(999) is None  # a container's own numbers

    (root / "proc/self/ns").mkdir()
    (root / "proc/self/ns/pid").symlink_to("pid:[4026531836]")
    assert Host(1, root, {}).owns(999) is False


def test_idle_time_is_that_of_the_cores_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    lines = [f"cpu{core} 9 9 9 {core * tick} {tick} 9 9 9 9 9" for core in range(12)]
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("\n".join([f"cpu 9 9 9 {99 * tick} 0 9 9 9 9 9", *lines, "intr 1"]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 11})
    assert idle_core_s(tmp_path) == (1 + 1) + (11 + 1)
    assert idle_core_s(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "line", ["0::/user.slice/user-1000.slice/session-1.scope", "0::/", "4:memory:/docker/abc", "0::/job_7"]
)
def test_a_cgroup_that_is_not_there_or_not_slurms_is_not_taken(tmp_path: Path, line: str) -> None:
    version_2(tmp_path)
    (tmp_path / "proc/self/cgroup").write_text(line + "\n")
    assert cgroup.find(tmp_path) is None


def stat(pid: int, parent: int, session: int) -> dict[str, str]:
    """A line of proc(5): CPU time 1.5 s and with its children 2 s, 10 pages, an awkward name."""
    tick = os.sysconf("SC_CLK_TCK")
    rest = f"S {parent} 1 {session} 0 0 0 0 0 0 0 {tick} {tick // 2} {tick // 2} 0 20 0 1 0 1 1 10 0"
    return {f"proc/{pid}/stat": f"{pid} (a) b (c) {rest}\n"}


def test_the_tree_below_a_process(tmp_path: Path) -> None:
    files = {
        **stat(50, 1, 40),
        **stat(60, 50, 60),  # a child in a session of its own
        **stat(59, 60, 60),
        **stat(61, 1, 60),  # left its parent, not the session
        **stat(70, 1, 40),  # somebody else in the session of the first
        **stat(71, 70, 71),
    }
    root = write(tmp_path, files)
    assert Processes(50, root).find() == {50, 59, 60, 61}
    usage = Host(50, root, {}).read()
    assert usage.processes == 4
    assert usage.core_s == 8
    assert usage.used == usage.peak == 40 * os.sysconf("SC_PAGE_SIZE")


CHILD = """
import sys, time
print("up", flush=True)
sys.stdin.readline()
held = bytearray(200 * 2**20)
while time.process_time() < 1.0:
    pass
print("held", flush=True)
sys.stdin.readline()
del held
print("freed", flush=True)
sys.stdin.readline()
"""


def test_a_real_child_is_measured(tmp_path: Path) -> None:
    watching = telemetry.Telemetry(tmp_path / "0.0.telemetry.jsonl", (), os.getpid(), 1.0, 0, True, {})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", CHILD], text=True, start_new_session=True, **pipes) as child:
        assert child.stdin
        assert child.stdout
        watching.open()
        samples = []
        for second, word in enumerate(("up", "held", "freed")):
            assert child.stdout.readline() == f"{word}\n"
            samples.append(watching.sample(float(second)))
            child.stdin.write("\n")
            child.stdin.flush()
        child.wait()
    watching.stop()
    used = [sample["memory/used_mib"] for sample in samples]
    assert 150 < used[1] - used[0] < 250
    assert 150 < used[1] - used[2] < 250
    assert samples[2]["memory/peak_mib"] == used[1]
    assert samples[1]["cpu/cores"] >= 0.9  # a second of CPU time, which a clock of ours calls a second
    assert samples[0]["processes/count"] >= 2
    totals = next(record["values"] for record in journal.read(tmp_path) if record["kind"] == "totals")
    assert totals["memory/peak_mib"] == used[1]
    assert totals["cpu/core_seconds"] >= 0.9
    assert json.loads((tmp_path / "0.0.telemetry.jsonl").read_text().splitlines()[0])["kind"] == "sample"


def test_a_rate_over_a_moment_waits_for_the_next_sample_and_no_use_is_lost() -> None:
    totals = Totals()
    assert "cpu/cores" not in totals.host(0.0, Usage(core_s=10.0))
    assert totals.host(1.0, Usage(core_s=12.0, read=0))["cpu/cores"] == 2
    assert "cpu/cores" not in totals.host(1.1, Usage(core_s=12.2, read=5 * MIB))
    assert totals.host(2.0, Usage(core_s=13.0))["cpu/cores"] == 1
    assert totals.host(3.0, Usage(core_s=0.5))["cpu/cores"] == 0  # a process took its count with it
    values = totals.values([], None)
    assert (values["cpu/core_seconds"], values["io/read_mib"]) == (3, 5)
    assert "io/write_mib" not in values


def test_a_journal_that_cannot_be_written_stops_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events").write_text("a file where a folder should be")
    watching = telemetry.start(tmp_path / "events" / "0.0.telemetry.jsonl", (), os.getpid())
    watching.stop()
    assert capfd.readouterr().err.count("records are lost") == 1
