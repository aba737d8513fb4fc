"""Telemetry of a step on a real Slurm: its own cgroup, one rank of the node that tells of it, and who shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SCRIPT, Cluster, skip_without_slurm, user_env

from hpcml.tracking import journal

HPCML = [sys.executable, "-m", "hpcml"]
PATIENCE_S = 120
LIMIT_MIB, HELD_MIB = 1024, 200

JOB = """
script = "fill.py"
[resources]
gpus_per_node = 0
tasks_per_node = 2
cpus_per_task = 1
mem_gb = 1
time = "10"
"""
# Rank 0 holds 200 MiB, then all but 4 % of what the job has; each rank computes for a second of CPU time. Ranks and test
# wait for one another by files in the run directory.
FILL = """
import json, os, time
import numpy
import hpcml
from hpcml.tracking import journal
from hpcml.tracking.host import MIB, Host

run = hpcml.begin()

def until(found):
    while not found():
        time.sleep(0.05)

def mark(name):
    (run.dir.path / name).touch()

def marked(name):
    return (run.dir.path / name).exists()

def sampled_after(moment_ms):
    return any(record["kind"] == "sample" and record["t"] > moment_ms for record in journal.read(run.dir.events))

def ms():
    return time.time_ns() // 10**6

def compute():
    end = time.process_time() + 1
    while time.process_time() < end:
        pass

if run.topology.rank == 1:
    until(lambda: marked("begun"))
    compute()
    mark("computed")
else:
    host = Host(os.getpid())
    until(lambda: sampled_after(0))
    mark("begun")
    compute()
    until(lambda: marked("computed"))
    before = ms()
    until(lambda: sampled_after(before))
    start = ms()
    held = numpy.ones(200 * MIB // 8)
    end = ms()
    until(lambda: sampled_after(end))
    group, own = host.group, Host(os.getpid(), environment={}).limit
    counted = [name for name in ("cpu", "memory") if group and getattr(group, name)]
    told = {"start": start, "end": end, "limit": host.limit, "kernel_limit": own, "counted": counted}
    told["mark"] = group and group.mark
    print("TOLD", json.dumps(told), flush=True)
    rest = numpy.ones((int(0.96 * host.limit) - host.read().used) // 8)
    until(lambda: any(record["kind"] == "message" for record in journal.read(run.dir.events)))
    mark("full")
until(lambda: marked("looked"))
"""


def until(condition: Callable[[], bool], what: str, waiting: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert waiting.poll() is None, f"ended before: {what}\n{waiting.communicate()}"
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster_memory(devcluster_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A node whose steps are held to their memory, as on a production site: ``--cgroup`` with two controllers more."""
    skip_without_slurm()
    text = SCRIPT.read_text()
    for plain, more in (
        ("CONTROLLERS=(devices freezer)", "CONTROLLERS=(devices freezer memory cpuacct)"),
        ("ConstrainRAMSpace=no", "ConstrainRAMSpace=yes"),
        ("TaskPlugin=task/cgroup\n", "TaskPlugin=task/cgroup JobAcctGatherType=jobacct_gather/cgroup\n"),
    ):
        assert text.count(plain) == 1, f"scripts/devcluster no longer says {plain}"
        text = text.replace(plain, more)
    script = tmp_path_factory.mktemp("scripts") / "devcluster"
    script.write_text(text)
    script.chmod(0o755)
    name = f"memory{os.getpid()}"

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "HPCML_DEVCLUSTER": str(devcluster_base)}
        return subprocess.run([script, *words, "--name", name], env=env, text=True, capture_output=True, timeout=120)

    up = call("up", "--cgroup")
    if up.returncode == 3:
        pytest.skip(f"memory cgroup of version 1: {up.stderr.splitlines()[0]}")
    assert up.returncode == 0, up.stdout + up.stderr
    yield Cluster(name, user_env(devcluster_base / name), devcluster_base / name)
    down = call("down")
    assert down.returncode == 0, down.stderr


@pytest.mark.parametrize("kind", ["cluster_memory", "cluster_cgroup"])
def test_a_step_is_measured_by_one_of_its_ranks(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """By the kernel's own counts where Slurm limits memory by cgroup, else summed over the step's processes."""
    cluster: Cluster = request.getfixturevalue(kind)
    for name, text in (("fill.py", FILL), ("fill.toml", JOB), ("pyproject.toml", "")):
        (tmp_path / name).write_text(text)
    env = {**cluster.env, "HPCML_PYTHON": sys.executable, "HPCML_RUNS": str(tmp_path / "runs")}
    words = [*HPCML, "submit", "fill.toml", "--wait"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=tmp_path, env=env, **pipes) as waiting:
        try:
            until(lambda: bool(list(tmp_path.glob("runs/*/full"))), "the memory is full and that was told", waiting)
            [run] = [path.parent for path in tmp_path.glob("runs/*/full")]
            live = cluster.run(*HPCML, "top", "--json", env=env, cwd=tmp_path)
            (run / "looked").touch()
            out, err = waiting.communicate(timeout=PATIENCE_S)
        finally:
            waiting.kill()
    assert waiting.returncode == 0, out + err
    made = cluster.run(*HPCML, "report", "--json", env=env, cwd=tmp_path)
    for done in (live, made):
        assert done.returncode == 0, done.stdout + done.stderr

    assert [path.name for path in (run / "events").glob("*.telemetry.jsonl")] == ["0.0.telemetry.jsonl"]
    [told] = [json.loads(line[5:]) for line in (run / "logs/out.0.txt").read_text().splitlines() if line[:4] == "TOLD"]
    assert told["mark"].endswith("/step_0") and told["limit"] == LIMIT_MIB * 2**20
    by_kernel = kind == "cluster_memory"
    assert told["counted"] == (["cpu", "memory"] if by_kernel else [])
    assert told["kernel_limit"] == (told["limit"] if by_kernel else None)
    peak = check_journal(run, told)
    check_shown(json.loads(live.stdout), json.loads(made.stdout), peak)


def check_journal(run: Path, told: dict[str, Any]) -> float:
    """Check what telemetry wrote; return the peak of the memory in MiB."""
    records = [record for record in journal.read(run / "events") if record["writer"] == "telemetry"]
    samples = [(record["t"], record["values"]) for record in records if record["kind"] == "sample"]
    before = [values["memory/used_mib"] for t, values in samples if t <= told["start"]][-1]
    after = next(values["memory/used_mib"] for t, values in samples if t > told["end"])
    assert HELD_MIB - 5 < after - before < HELD_MIB + 50, "the array is seen, and nothing else that grew"
    assert 2 <= max(values["processes/count"] for _, values in samples) < 12, "two ranks; no other job, no daemon"
    assert all(values["memory/used_mib"] <= values["memory/peak_mib"] <= 1.05 * LIMIT_MIB for _, values in samples)
    [warning] = [record["text"] for record in records if record["kind"] == "message"]
    assert f"of its {LIMIT_MIB:,} MiB" in warning
    [totals] = [record["values"] for record in records if record["kind"] == "totals"]
    assert totals["memory/peak_mib"] == max(values["memory/peak_mib"] for _, values in samples)
    assert totals["memory/peak_mib"] > 0.95 * LIMIT_MIB
    assert 1.9 < totals["cpu/core_seconds"] < 2 * totals["telemetry/seconds"], "a second of each rank, on two cores"
    assert max(values.get("cpu/cores", 0) for _, values in samples) > 0
    return float(totals["memory/peak_mib"])


def check_shown(live: dict[str, Any], made: dict[str, Any], peak_mib: float) -> None:
    """Check that ``hpcml top`` showed it while it ran, and the report after it."""
    assert live["state"]["name"] == "RUNNING"
    assert (live["request"]["memory_mib"], live["request"]["cores"]) == (LIMIT_MIB, 2)
    assert 0.95 * LIMIT_MIB < live["host"]["memory/used_mib"] <= live["host"]["memory/peak_mib"]
    assert any(f"of its {LIMIT_MIB:,} MiB" in str(warning) for warning in live["warnings"])
    used = made["usage"]
    assert (used["memory_asked_gib"], used["cores_asked"]) == (1, 2)
    assert used["memory_peak_gib"] == pytest.approx(peak_mib / 1024, abs=1e-3)
    assert 0 < used["cores_mean"] <= 2.2
    assert {series["rank"] for series in made["telemetry"]} == {0}
    assert {"cpu/cores", "memory/used_mib", "memory/peak_mib"} <= {series["name"] for series in made["telemetry"]}
