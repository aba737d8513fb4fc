"""``scripts/devcluster``: a Slurm that comes up, behaves like one, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SCRIPT, Cluster, devcluster, skip_without_slurm, user_env

CGROUPS = Path("/sys/fs/cgroup")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: sockets' paths have 108 letters, and pytest's folders long names where it has several processes."""
    with tempfile.TemporaryDirectory(prefix="hpcml-") as name:
        yield Path(name)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Poll, and fail the test when the condition has not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not true after {timeout_s} s"
        time.sleep(0.05)


def processes_with(text: str) -> list[str]:
    """Command lines, this process's excepted, that contain a text."""
    found = []
    for proc in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = proc.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line and proc.parent.name != str(os.getpid()):
            found.append(line)
    return found


def daemon_pids(cluster: Cluster) -> dict[str, int]:
    """Daemon name → pid, from ``devcluster status``."""
    status = devcluster(cluster.directory.parent, "status", "--name", cluster.name)
    return {name: int(pid) for name, pid in re.findall(r"^ +(\S+) +alive, pid (\d+)$", status.stdout, re.MULTILINE)}


@pytest.fixture
def own(devcluster_base: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A cluster that one test may break; ``indirect`` parameters are options of ``up``."""
    skip_without_slurm()
    name = f"own{os.getpid()}"
    up = devcluster(devcluster_base, "up", "--name", name, *getattr(request, "param", ()))
    assert up.returncode == 0, up.stdout + up.stderr
    yield Cluster(name, user_env(devcluster_base / name), devcluster_base / name)
    assert devcluster(devcluster_base, "down", "--name", name).returncode == 0


# ------------------------------------------------------------------ up, status, down


@pytest.mark.parametrize("own", [(), ("--cgroup",)], ids=["plain", "cgroup"], indirect=True)
def test_down_leaves_no_process_directory_mount_or_cgroup(own: Cluster) -> None:
    base = own.directory.parent
    assert devcluster(base, "status", "--name", own.name).returncode == 0
    assert processes_with(f"{own.directory}/")
    # One child of the job step, and one that has left its session and its environment.
    seconds = f"{8_000_000 + os.getpid()}"
    job = own.run("sbatch", "-o", "/dev/null", "--wrap", f"setsid env -i sleep {seconds} & srun sleep {seconds}")
    assert job.returncode == 0, job.stderr
    wait_until(lambda: sum(line.startswith(("sleep", "/usr/bin/sleep")) for line in processes_with(seconds)) == 2)

    down = devcluster(base, "down", "--name", own.name)

    assert down.returncode == 0, down.stderr
    assert processes_with(f"{own.directory}/") == []
    assert processes_with(seconds) == []
    assert not own.directory.exists()
    assert str(own.directory) not in Path("/proc/mounts").read_text()
    assert list(CGROUPS.glob(f"*/devcluster-{own.name}-*")) == []
    status = devcluster(base, "status", "--name", own.name)
    assert status.returncode == 3
    assert "not up" in status.stderr


def test_down_of_an_absent_cluster_is_no_error(tmp_path: Path) -> None:
    assert devcluster(tmp_path, "down", "--name", "absent").returncode == 0
    assert devcluster(tmp_path / "missing", "down", "--all").returncode == 0


def test_down_keeps_a_directory_that_is_no_cluster(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    down = devcluster(tmp_path, "down", "--name", "mine")
    assert down.returncode == 1
    assert "no devcluster" in down.stderr
    assert devcluster(tmp_path, "down", "--all").returncode == 0
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_up_on_a_healthy_cluster_changes_nothing(cluster: Cluster) -> None:
    before = daemon_pids(cluster)
    up = devcluster(cluster.directory.parent, "up", "--name", cluster.name)
    assert up.returncode == 0, up.stderr
    assert "already up" in up.stdout
    assert daemon_pids(cluster) == before
    assert set(before) == {"munged", "slurmctld", "slurmd-gpu01"}


def test_up_refuses_another_shape(cluster: Cluster) -> None:
    up = devcluster(cluster.directory.parent, "up", "--name", cluster.name, "--gpus", "4")
    assert up.returncode == 1
    assert f"down --name {cluster.name}" in up.stderr
    assert cluster.run("scontrol", "ping").returncode == 0


@pytest.mark.parametrize("dead", [("slurmctld",), ("slurmd-gpu01",), ("slurmctld", "slurmd-gpu01", "munged")])
def test_up_repairs_after_a_crash(own: Cluster, dead: tuple[str, ...]) -> None:
    pids = daemon_pids(own)
    for name in dead:
        os.kill(pids[name], signal.SIGKILL)
    wait_until(lambda: not set(dead) & set(daemon_pids(own)))
    status = devcluster(own.directory.parent, "status", "--name", own.name)
    assert status.returncode == 3
    assert re.search(rf"{dead[0]} +dead", status.stdout)

    up = devcluster(own.directory.parent, "up", "--name", own.name)

    assert up.returncode == 0, up.stderr
    assert not set(pids.values()) & set(daemon_pids(own).values()), "a daemon of the old cluster still lives"
    assert own.run("srun", "true").returncode == 0


def test_two_clusters_side_by_side(cluster: Cluster, cluster2: Cluster) -> None:
    one = cluster.run("srun", "-N1", "printenv", "SLURM_CLUSTER_NAME")
    two = cluster2.run("srun", "-N2", "--gpus-per-node=2", "printenv", "SLURM_CLUSTER_NAME", "SLURMD_NODENAME")
    assert one.stdout.split() == [f"dev{cluster.name}"]
    assert sorted(two.stdout.split()) == [f"dev{cluster2.name}"] * 2 + ["gpu01", "gpu02"]
    listed = devcluster(cluster.directory.parent, "list").stdout
    assert re.search(rf"^{cluster.name} +up +1 node", listed, re.MULTILINE)
    assert re.search(rf"^{cluster2.name} +up +2 node", listed, re.MULTILINE)


def test_daemons_listen_on_loopback_only(cluster_accounting: Cluster) -> None:
    pids = set(daemon_pids(cluster_accounting).values())
    listening = subprocess.run(["ss", "-Hltnp"], text=True, capture_output=True, check=True).stdout
    ours = [line.split()[3] for line in listening.splitlines() if pids & set(map(int, re.findall(r"pid=(\d+)", line)))]
    assert len(ours) == 3, ours  # slurmctld, slurmdbd, slurmd; munged and MariaDB have sockets in the directory
    assert all(address.startswith("127.0.0.1:") for address in ours)


# ------------------------------------------------------------------ it is a Slurm


@pytest.mark.parametrize("request_gpus", ["--gres=gpu:2", "--gres=gpu:a100:2", "--gpus-per-node=2"])
def test_a_job_with_two_gpus_sees_two(cluster: Cluster, request_gpus: str) -> None:
    job = cluster.run("srun", request_gpus, "printenv", "CUDA_VISIBLE_DEVICES")
    assert job.stdout.strip() == "0,1", job.stderr


def test_an_over_ask_is_refused(cluster: Cluster) -> None:
    fits = cluster.run("sbatch", "--test-only", "--gres=gpu:2", "--wrap", "true")
    too_many = cluster.run("sbatch", "--test-only", "--gres=gpu:3", "--wrap", "true")
    too_long = cluster.run("sbatch", "--test-only", "--partition=short", "--time=31", "--wrap", "true")
    assert fits.returncode == 0, fits.stderr
    assert too_many.returncode == 1
    assert "Requested node configuration is not available" in too_many.stderr
    assert too_long.returncode == 1
    assert "time limit" in too_long.stderr


def test_a_requeued_job_runs_again_soon(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = 'echo run ${SLURM_RESTART_COUNT:-0}; [ "${SLURM_RESTART_COUNT:-0}" = 1 ] || sleep 60'
    submit = ("sbatch", "--parsable", "--requeue", "--open-mode=append", "-o", out, "--wrap", script)
    job = cluster.run(*submit).stdout.strip()
    wait_until(lambda: out.exists() and out.read_text() == "run 0\n")
    assert cluster.run("scontrol", "requeue", job).returncode == 0
    wait_until(lambda: out.read_text().endswith("run 1\n"), timeout_s=40)


def test_cgroup_gives_each_task_its_own_device(cluster_cgroup: Cluster) -> None:
    devices = cluster_cgroup.directory / "dev"
    script = f'for i in 0 1; do (exec 3<{devices}/nvidia$i) 2>/dev/null && echo "$SLURM_PROCID $CUDA_VISIBLE_DEVICES $i"; done; true'
    tasks = cluster_cgroup.run("srun", "-n2", "--gpus-per-task=1", "bash", "-c", script)
    # Task, CUDA_VISIBLE_DEVICES (a position, so 0 in both), and the one device that it could open.
    assert sorted(tasks.stdout.splitlines()) == ["0 0 0", "1 0 1"], tasks.stderr


def test_accounting_tells_completed_from_timeout(cluster_accounting: Cluster) -> None:
    def submit(wrap: str, *options: str) -> str:
        job = cluster_accounting.run("sbatch", "--parsable", "-o", "/dev/null", *options, "--wrap", wrap)
        assert job.returncode == 0, job.stderr
        return job.stdout.strip()

    def sacct(job: str, field: str) -> str:
        return cluster_accounting.run("sacct", "-nPX", "-j", job, "-o", field).stdout.strip()

    done = submit("true", "--gres=gpu:1")
    slow = submit("sleep 300", "--time=1")
    wait_until(lambda: sacct(slow, "state") == "RUNNING")
    # Limits are whole minutes; an end moved to now acts at the controller's next look, every 30 s.
    end = cluster_accounting.run("scontrol", "update", f"JobId={slow}", "EndTime=now")
    assert end.returncode == 0, end.stderr
    wait_until(lambda: sacct(done, "state") == "COMPLETED")
    assert "gres/gpu=1" in sacct(done, "alloctres")
    wait_until(lambda: sacct(slow, "state") == "TIMEOUT", timeout_s=60)


# ------------------------------------------------------------------ the command itself


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "up, shell, status, list, down"),
        (("start",), "up, shell, status, list, down"),
        (("up", "--nodez", "2"), "--nodes --gpus"),
        (("up", "--gpus", "17"), "from 0 to 16"),
        (("up", "--nodes", "two"), "from 1 to 64"),
        (("up", "--nodes"), "needs a value"),
        (("up", "--name", "../etc"), "--name is"),
        (("status", "--all"), "it takes: --name"),
        (("shell", "hostname"), "it takes: --name --"),
    ],
)
def test_wrong_usage_says_what_is_allowed(tmp_path: Path, argv: tuple[str, ...], said: str) -> None:
    wrong = devcluster(tmp_path, *argv)
    assert wrong.returncode == 2
    assert said in wrong.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_is_the_header(tmp_path: Path) -> None:
    header = SCRIPT.read_text().split("\nset -euo")[0].splitlines()[1:]
    shown = devcluster(tmp_path, "--help")
    assert shown.returncode == 0
    assert shown.stdout.splitlines() == [re.sub("^# ?", "", line) for line in header]


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    # A PATH on which bash and the few tools that the check needs are, and no Slurm.
    for tool in ("bash", "realpath", "sed", "env"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    text = SCRIPT.read_text().replace("PATH=$PATH:/usr/sbin:/sbin", ":")
    script = tmp_path / "devcluster"
    script.write_text(text)
    env = {"PATH": str(tmp_path), "HPCML_DEVCLUSTER": str(tmp_path / "base")}
    up = subprocess.run(["/usr/bin/bash", script, "up", "--accounting"], env=env, text=True, capture_output=True)
    assert up.returncode == 2
    assert "apt-get install" in up.stderr
    for package in ("slurmctld", "slurmd", "slurm-client", "munge", "slurmdbd", "mariadb-server"):
        assert package in up.stderr
    assert not (tmp_path / "base").exists()


def test_shell_gives_the_environment_and_passes_the_exit_status(cluster: Cluster, tmp_path: Path) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("HPCML_TEST_")}
    env = {**own, "HPCML_DEVCLUSTER": str(cluster.directory.parent), "SLURM_JOB_ID": "7", "SBATCH_DEBUG": "1"}
    script = 'env | grep -E "^(SLURM|SBATCH|HPCML)" | sort; pwd; exit 5'
    argv = [SCRIPT, "shell", "--name", cluster.name, "--", "bash", "-c", script]
    shell = subprocess.run(argv, env=env, cwd=tmp_path, text=True, capture_output=True)
    assert shell.returncode == 5
    assert shell.stdout.splitlines() == [
        f"HPCML_DEVCLUSTER={cluster.directory.parent}",
        f"HPCML_DEVCLUSTER_NAME={cluster.name}",
        "HPCML_DEVICES=cpu",
        f"SLURM_CONF={cluster.directory}/slurm.conf",
        str(tmp_path),
    ]


def test_shell_of_an_absent_cluster_says_how_to_start_it(tmp_path: Path) -> None:
    shell = devcluster(tmp_path, "shell", "--name", "absent", "--", "true")
    assert shell.returncode == 3
    assert "up --name absent" in shell.stderr


def test_a_failed_up_leaves_nothing_and_shows_the_log(tmp_path: Path) -> None:
    skip_without_slurm()
    stub = tmp_path / "bin" / "slurmd"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho 'fatal: no such luck' >&2\nexit 1\n")
    stub.chmod(0o755)
    base = tmp_path / "base"
    env = {**os.environ, "HPCML_DEVCLUSTER": str(base), "PATH": f"{stub.parent}:{os.environ['PATH']}"}
    up = subprocess.run([SCRIPT, "up", "--name", "broken"], env=env, text=True, capture_output=True, timeout=60)
    assert up.returncode == 1
    assert "fatal: no such luck" in up.stderr
    assert list(base.iterdir()) == []
    assert processes_with(f"{base}/") == []
