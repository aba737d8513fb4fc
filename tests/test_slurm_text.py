"""What Slurm prints, as Slurm 22.05 really printed it, and host lists against Slurm's own expansion."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcml.errors import HpcmlError, ServiceSilent
from hpcml.slurm import commands, text
from hpcml.slurm.text import JobState, Partition

SCONTROL_JOB = (
    "JobId=3 JobName=a b UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901757 Nice=0 Account=(null) "
    "QOS=(null) JobState=FAILED Reason=JobLaunchFailure Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 "
    "ExitCode=0:9 RunTime=00:00:00 TimeLimit=1-00:00:00 TimeMin=N/A SubmitTime=2026-11-22T07:49:48 "
    "EligibleTime=2026-11-22T07:49:48 AccrueTime=2026-11-22T07:49:48 StartTime=2026-11-22T07:49:50 "
    "EndTime=2026-11-22T07:49:50 Deadline=N/A SuspendTime=None SecsPreSuspend=0 LastSchedEval=2026-11-22T07:49:50 "
    "Scheduler=Backfill Partition=main AllocNode:Sid=localhost:21569 ReqNodeList=(null) ExcNodeList=(null) "
    "NodeList=gpu01 BatchHost=gpu01 NumNodes=1 NumCPUs=1 NumTasks=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:* "
    "TRES=cpu=1,mem=4000M,node=1,billing=1 Socks/Node=* NtasksPerN:B:S:C=0:0:*:* CoreSpec=* MinCPUsNode=1 "
    "MinMemoryCPU=4000M MinTmpDiskNode=0 Features=(null) DelayBoot=00:00:00 OverSubscribe=OK Contiguous=0 "
    "Licenses=(null) Network=(null) Command=(null) WorkDir={} StdErr=/p/slurm-3.out StdIn=/dev/null "
    "StdOut=/p/slurm-3.out Power= TresPerNode=gres:gpu:2 \n"
)
BEGAN = time.mktime((2026, 11, 22, 7, 49, 50, 0, 0, -1))
SCONTROL_STATE = JobState("FAILED", "JobLaunchFailure", 137, "scontrol", BEGAN, 0)
SCONTROL_NODES = (
    "NodeName=gpu01 Arch=x86_64 CoresPerSocket=32  CPUAlloc=1 CPUEfctv=64 CPUTot=64 CPULoad=1.28 "
    "AvailableFeatures=(null) ActiveFeatures=(null) Gres=gpu:a100:2 NodeAddr=10.0.0.1 NodeHostName=vm Port=26016 "
    "Version=22.05.8 OS=Linux 6.18.44 #1 SMP PREEMPT_DYNAMIC @0  RealMemory=512000 AllocMem=4000 FreeMem=22008 "
    "Sockets=2 Boards=1 State=MIXED ThreadsPerCore=1 TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A "
    "Partitions=main,short  BootTime=2026-11-22T07:08:28 SlurmdStartTime=2026-11-22T07:49:48\n"
)


# ------------------------------------------------------------------ host lists


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("", []),
        ("gpu1", ["gpu1"]),
        ("gpu[01-03,7],login1", ["gpu01", "gpu02", "gpu03", "gpu7", "login1"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("c[1-2]-ib", ["c1-ib", "c2-ib"]),
    ],
)
def test_a_host_list_is_expanded(expression: str, expected: list[str]) -> None:
    assert text.hosts(expression) == expected


@pytest.mark.parametrize("expression", ["a[1-2", "a1]", "a]1[", "a[x-y]"])
def test_what_is_no_host_list(expression: str) -> None:
    with pytest.raises(ValueError):
        text.hosts(expression)


@st.composite
def _ranges(draw: st.DrawFn) -> str:
    low = draw(st.integers(0, 120))
    high = low + draw(st.integers(0, 3))
    width = draw(st.sampled_from([1, 2, 3, 4]))
    return f"{low:0{width}d}" if low == high else f"{low:0{width}d}-{high:0{width}d}"


_brackets = st.lists(_ranges(), min_size=1, max_size=3, unique=True).map(lambda r: f"[{','.join(r)}]")
_hosts = st.one_of(
    st.from_regex(r"[a-z][a-z0-9-]{0,5}[a-z][0-9]{0,3}", fullmatch=True),
    # Slurm writes nothing after the last bracket: it lists names with a suffix one by one.
    st.tuples(st.sampled_from(["n", "gpu", "rack-a"]), _brackets).map("".join),
    st.tuples(st.just("r"), _brackets, st.just("n"), _brackets).map("".join),
)


@settings(max_examples=40, deadline=None)
@given(expression=st.lists(_hosts, min_size=1, max_size=3).map(",".join))
def test_host_lists_are_expanded_as_slurm_does(expression: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if not shutil.which("scontrol"):
        pytest.skip("Slurm: scontrol is not installed (apt-get install slurm-client)")
    conf = tmp_path_factory.getbasetemp() / "slurm.conf"  # hostnames asks no controller, but wants a configuration
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost\n")
    words = ["scontrol", "show", "hostnames", expression]
    done = subprocess.run(words, env={**os.environ, "SLURM_CONF": str(conf)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert text.hosts(expression) == done.stdout.split()


@pytest.mark.parametrize(
    ("expression", "expected"),
    [("1", [1]), ("2(x3),1", [2, 2, 2, 1]), ("3,1(x2)", [3, 1, 1]), ("16(x2),4,16", [16, 16, 4, 16])],
)
def test_tasks_per_node(expression: str, expected: list[int]) -> None:
    assert text.tasks_per_node(expression) == expected


@pytest.mark.parametrize("expression", ["", "x", "2x3", "2(3)", "1,,1"])
def test_what_are_no_tasks_per_node(expression: str) -> None:
    with pytest.raises(ValueError):
        text.tasks_per_node(expression)


# ------------------------------------------------------------------ jobs


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("CANCELLED|None\n", JobState("CANCELLED", "", None, "squeue")),
        ("FAILED|NonZeroExitCode", JobState("FAILED", "NonZeroExitCode", None, "squeue")),
        ("PENDING|DependencyNeverSatisfied", JobState("PENDING", "DependencyNeverSatisfied", None, "squeue")),
        ("PENDING|ReqNodeNotAvail, UnavailableNodes:gpu[01-02]", None),
        ("RUNNING|None", JobState("RUNNING", "", None, "squeue")),
    ],
)
def test_squeue(line: str, expected: JobState | None) -> None:
    got = text.squeue_line(line)
    assert got == (expected or JobState("PENDING", "ReqNodeNotAvail, UnavailableNodes:gpu[01-02]", None, "squeue"))


def test_squeue_with_times_and_ids() -> None:
    assert text.squeue_line("RUNNING|None|2026-11-22T07:49:50|7") == JobState("RUNNING", "", None, "squeue", BEGAN)
    assert text.squeue_line("PENDING|Priority|N/A|7").start is None
    printed = "RUNNING|None|2026-11-22T07:49:50|7\nPENDING|Dependency|N/A|8_0\nsomething else\n"
    jobs = text.squeue_jobs(printed)
    assert {key: job.state for key, job in jobs.items()} == {"7": "RUNNING", "8_0": "PENDING"}
    assert jobs["8_0"].reason == "Dependency" and jobs["8_0"].waiting and not jobs["7"].waiting


@pytest.mark.parametrize("words", ["N/A", "", "Unknown", "2026-11-22", "9999999999999-01-01T00:00:00"])
def test_what_is_no_moment(words: str) -> None:
    assert text.moment(words) is None


def test_sacct_for_many() -> None:
    jobs = text.sacct_jobs("7|CANCELLED by 0|0:0\n8_3|FAILED|3:0\nbanner\n")
    assert {key: (job.state, job.exit_code) for key, job in jobs.items()} == {
        "7": ("CANCELLED", 0), "8_3": ("FAILED", 3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "state", "code"),
    [
        ("CANCELLED by 0|0:0", "CANCELLED", 0),
        ("FAILED|3:0", "FAILED", 3),
        ("FAILED|0:9", "FAILED", 137),
        ("OUT_OF_MEMORY|0:125", "OUT_OF_MEMORY", 253),
        ("CANCELLED+|0:15", "CANCELLED", 143),
        ("TIMEOUT|0:0", "TIMEOUT", 0),
        ("NODE_FAIL|1:0", "NODE_FAIL", 1),
    ],
)
def test_sacct(line: str, state: str, code: int) -> None:
    assert text.sacct_line(line) == JobState(state, "", code, "sacct")


def test_scontrol_show_job() -> None:
    assert text.scontrol_job(SCONTROL_JOB.format("/p")) == SCONTROL_STATE
    fields = text.pairs(SCONTROL_JOB.format("/home/x y/p"))
    assert (fields["JobName"], fields["WorkDir"]) == ("a b", "/home/x y/p")
    assert (fields["SubmitTime"], fields["TimeLimit"]) == ("2026-11-22T07:49:48", "1-00:00:00")
    assert fields["TRES"] == "cpu=1,mem=4000M,node=1,billing=1"


def test_a_folder_that_looks_like_a_state_is_none() -> None:
    assert text.scontrol_job(SCONTROL_JOB.format("/p JobState=COMPLETED ExitCode=0:0")).state == "FAILED"


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "CONFIGURING"])
def test_what_has_not_ended(state: str) -> None:
    assert not JobState(state).ended


# ------------------------------------------------------------------ sinfo


def test_sinfo_as_it_prints() -> None:
    printed = "main|up|3|64|512000|1-00:00:00|gpu:a100:2|main*\nshort|up|3|64|512000|30:00|gpu:a100:2|short\n"
    main, short = text.partitions(printed)
    assert main == Partition("main", True, 3, 64, 500, "1-00:00:00", 2, "a100")
    assert short == Partition("short", False, 3, 64, 500, "30:00", 2, "a100")


@pytest.mark.parametrize("line", ["Welcome to the cluster!", "m|up|many|8|8000|1:00|(null)|m", "m|up|1|8|8000|1:00|m"])
def test_a_line_that_is_not_sinfos_is_named(line: str) -> None:
    good = "m|up|1|8|8000|1:00|(null)|m*"
    with pytest.raises(HpcmlError, match="not one of its own") as error:
        text.partitions(f"{good}\n{line}\n")
    assert repr(line) in str(error.value) and "fix: " in str(error.value)
    assert len(text.partitions(f"\n{good}\n\n")) == 1


def test_the_lines_of_one_partition_are_one() -> None:
    printed = "m|up|2|32|64000|infinite|(null)|m\nm|up|1|128|1024000|infinite|gpu:h100:4(S:0-1)|m\n"
    assert text.partitions(printed) == [Partition("m", False, 3, 128, 1000, None, 4, "h100")]


@pytest.mark.parametrize(
    ("gres", "count", "kind"),
    [
        ("(null)", 0, None),
        ("gpu:2", 2, None),
        ("gpu:a100:2(S:0-1)", 2, "a100"),
        ("gpu:1g.10gb:7", 7, "1g.10gb"),
        ("gpu:a100:1,gpu:1g.10gb:7", 8, "a100"),
        ("gpu:nvidia_a100-pcie-40gb:2(S:0,2)", 2, "nvidia_a100-pcie-40gb"),
        ("gpu:2,shard:8", 2, None),
        ("shard:8", 0, None),
        ("nogpu:3", 0, None),
    ],
)
def test_gpus_of_a_gres(gres: str, count: int, kind: str | None) -> None:
    (partition,) = text.partitions(f"m|up|1|8|8000|1:00:00|{gres}|m\n")
    assert (partition.gpus_per_node, partition.gpu_type) == (count, kind)


def test_test_onlys_estimate() -> None:
    words = "Job 7 to start at 2026-11-22T23:49:51 using 1 processors on nodes gpu01 in partition main"
    assert text.test_only_estimate(words) == "2026-11-22T23:49:51"
    assert text.test_only_estimate("allocation failure: Requested node configuration is not available") is None


# ------------------------------------------------------------------ the commands, by stubs on PATH


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH beside the base tools; ``say`` puts commands there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("cat", "sh"):
        (folder / tool).symlink_to(shutil.which(tool) or "")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def say(folder: Path, command: str, out: str = "", err: str = "", code: int = 0) -> None:
    """Make a command that prints and exits; its words go to a file beside it."""
    for stream, content in (("out", out), ("err", err)):
        (folder / f"{command}.{stream}").write_text(content)
    path = folder / command
    here = str(path)
    path.write_text(
        f'#!/bin/sh\nfor w in "$@"; do echo "$w"; done > {here}.words\ncat {here}.out\ncat {here}.err >&2\nexit {code}\n'
    )
    path.chmod(0o755)


def test_node_addresses(stub: Path) -> None:
    assert commands.node_addresses(["gpu01"]) == {}
    say(stub, "scontrol", SCONTROL_NODES + SCONTROL_NODES.replace("gpu01", "gpu02").replace("10.0.0.1", "10.0.0.2"))
    assert commands.node_addresses(["gpu01", "gpu02"]) == {"gpu01": "10.0.0.1", "gpu02": "10.0.0.2"}


def test_nodes_that_differ_are_told_apart(stub: Path) -> None:
    say(stub, "sinfo", "m|up|1|8|8000|1:00|(null)|m*\n")
    assert [p.name for p in commands.partitions()] == ["m"]
    assert "--exact" in (stub / "sinfo.words").read_text().split("\n")


def test_without_slurm_it_is_said(stub: Path) -> None:
    with pytest.raises(HpcmlError, match="squeue is not on PATH") as error:
        commands.job_state(1)
    assert error.value.exit_code == 2


INVALID = "slurm_load_jobs error: Invalid job id specified\n"


@pytest.mark.parametrize(
    ("command", "err"),
    [
        ("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"),
        ("squeue", "squeue: fatal: Could not establish a configuration source\n"),
        ("squeue", "slurm_load_jobs error: Protocol authentication error\n"),
        ("sacct", "sacct: error: failed to open persistent connection to host:db:6819: Connection refused\n"),
    ],
)
def test_a_silent_service_is_not_a_forgotten_job(stub: Path, command: str, err: str) -> None:
    say(stub, "squeue", err=INVALID, code=1)
    say(stub, "scontrol", err=INVALID, code=1)
    say(stub, command, err=err, code=1)
    with pytest.raises(ServiceSilent) as error:
        commands.job_state(1)
    assert error.value.exit_code == 3


@pytest.mark.parametrize("sacct", [None, ("Slurm accounting storage is disabled\n", 1), ("", 0)])
def test_a_forgotten_job_is_none(stub: Path, sacct: tuple[str, int] | None) -> None:
    say(stub, "squeue", err=INVALID, code=1)
    say(stub, "scontrol", err=INVALID, code=1)
    if sacct:
        say(stub, "sacct", err=sacct[0], code=sacct[1])
    assert commands.job_state(1) is None


def test_the_ladder_is_climbed_in_order(stub: Path) -> None:
    say(stub, "sacct", "TIMEOUT|0:0\n")
    say(stub, "scontrol", err=INVALID, code=1)
    say(stub, "squeue", err=INVALID, code=1)
    assert commands.job_state(1) == JobState("TIMEOUT", "", 0, "sacct")
    say(stub, "scontrol", SCONTROL_JOB.format("/p"))
    assert commands.job_state(1) == SCONTROL_STATE
    say(stub, "squeue", "RUNNING|None\n")
    assert commands.job_state(1) == JobState("RUNNING", "", None, "squeue")


def test_nothing_of_an_allocation_leaks_into_a_new_job() -> None:
    inside = {"SLURM_CPU_BIND": "x", "SBATCH_PARTITION": "y", "PMIX_RANK": "0", "SRUN_DEBUG": "3", "PMI_RANK": "1"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin", "MYSLURM_X": "1"}
    assert commands.clean_environment({**inside, **kept}) == kept


def test_a_refusal_is_in_slurms_own_words(stub: Path, tmp_path: Path) -> None:
    say(stub, "sbatch", err="sbatch: error: Batch job submission failed: Invalid account\n", code=1)
    with pytest.raises(HpcmlError, match="sbatch refused the job: Batch job submission failed: Invalid account"):
        commands.submit(tmp_path / "s", dict(os.environ), tmp_path)
    say(stub, "sbatch", "42;zeus\n")
    assert commands.submit(tmp_path / "s", dict(os.environ), tmp_path) == 42


def test_an_id_below_a_wrappers_banner(stub: Path, tmp_path: Path) -> None:
    say(stub, "sbatch", "Your project has 12 hours left\n42\n")
    assert commands.submit(tmp_path / "s", dict(os.environ), tmp_path) == 42
    say(stub, "sbatch", "Submitted!\n")
    with pytest.raises(HpcmlError, match="printed no job id: 'Submitted!'"):
        commands.submit(tmp_path / "s", dict(os.environ), tmp_path)
