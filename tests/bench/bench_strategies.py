"""What hpcml costs each strategy: the same script under ``hpcml run`` and started by hand, in samples a second.

    scripts/bench strategies [--only=NAME] [--no-keep] [--quick | --noise]

For original, mirrored, multiworker, ddp, fsdp and horovod: the training of its notebook, on virtual CPU devices, with one
thread a process. By hand it never imports hpcml: one process with plain Python, two with TF_CONFIG, two through torchrun,
two through horovodrun. Model, data, batch, steps, threads, devices and Keras are the same, and so is the clock: it counts from
the second epoch on, without validation, and includes what hpcml does in and between epochs. Both take turns on one core, all
their processes within the clock (see turns.py).
"""

import argparse
import importlib.util
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench import by_hand, pairs, turns
from hpcml.node import bootstrap

BIN = Path(sys.executable).parent
SECONDS = 6.0  # on each side of a pair
PAIRS, MOST_PAIRS = 6, 16
LIMIT_S = 13.5 * 60  # for all; what a strategy leaves the next ones have
BOUND = pairs.Bound(0.98, at_least=True, pairs=PAIRS, width=0.04)
KEPT = (bootstrap.LEGACY_KERAS, bootstrap.LOG_LEVEL, "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME")

JOB = """\
name = "{name}"
script = "{script}"
strategy = "{strategy}"
[resources]
gpus_per_node = {devices}
tasks_per_node = {ranks}
cpus_per_task = 1
"""
# Two workers with TF_CONFIG, as one would type them.
WITH_TF_CONFIG = """\
import json
import os
import subprocess
import sys

workers = [f"127.0.0.1:{port}" for port in sys.argv[2:]]
children = []
for index in range(len(workers)):
    config = json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}})
    children.append(subprocess.Popen([sys.executable, sys.argv[1]], env={**os.environ, "TF_CONFIG": config}))
sys.exit(max(abs(child.wait()) for child in children))
"""


def plain(script: str, ranks: int) -> list[str]:
    """One process."""
    return [sys.executable, script]


def with_tf_config(script: str, ranks: int) -> list[str]:
    """Processes that know one another by TF_CONFIG."""
    return [sys.executable, "with_tf_config.py", script, *map(str, free_ports(ranks))]


def torchrun(script: str, ranks: int) -> list[str]:
    """torch's own launcher."""
    (port,) = free_ports(1)
    where = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    return [str(BIN / "torchrun"), f"--nproc-per-node={ranks}", *where, script]


def horovodrun(script: str, ranks: int) -> list[str]:
    """Horovod's own launcher; on this machine alone it needs no ssh."""
    where = ["--gloo", "--network-interfaces", "lo"]
    return [str(BIN / "horovodrun"), "-np", str(ranks), *where, sys.executable, script]


@dataclass(frozen=True)
class Strategy:
    """A strategy to be measured.

    Attributes:
        name: for people; ``strategy``: as hpcml calls it.
        devices: virtual CPU devices of the machine; ``ranks``: processes.
        started: the words that start it by hand; ``starter``: what that is, for people.
        needs: modules without which it is skipped, and how to get them.
    """

    name: str
    strategy: str
    notebook: str
    devices: int
    ranks: int
    started: Callable[[str, int], list[str]]
    starter: str
    needs: tuple[str, ...]
    fix: str


# Those that start quickest come first, and leave the others time.
ALL = (
    Strategy("ddp", "ddp", "simple2GPUsDDP", 2, 2, torchrun, "torchrun", ("torch",), "scripts/setup --torch"),
    Strategy(
        "horovod", "horovod", "simple2GPUsHorovod", 2, 2, horovodrun, "horovodrun", ("horovod", "torch"),
        "scripts/setup --horovod",
    ),
    Strategy("fsdp", "ddp", "simple2GPUsFSDP", 2, 2, torchrun, "torchrun", ("torch",), "scripts/setup --torch"),
    Strategy("original", "original", "simple2GPUsOrig", 0, 1, plain, "python", ("tensorflow",), "scripts/setup"),
    Strategy("mirrored", "mirrored", "simple2GPUsSol", 2, 1, plain, "python", ("tensorflow",), "scripts/setup"),
    Strategy(
        "multiworker", "multiworker", "simple2GPUsSol2", 2, 2, with_tf_config, "python twice, with TF_CONFIG,",
        ("tensorflow", "tf_keras"), "scripts/setup",
    ),
)  # fmt: skip
LEFT_OUT = ("fsdp",)  # unless it is asked for


class Sides:
    """Both sides of a strategy, in a project folder."""

    def __init__(self, strategy: Strategy, folder: Path, *, keep: bool) -> None:
        self.strategy, self.folder = strategy, folder
        notebook = (by_hand.NOTEBOOKS / f"{strategy.notebook}.py").read_text(encoding="utf-8")
        self.scripts = f"{strategy.name}_hpcml.py", f"{strategy.name}_by_hand.py"
        devices = max(1, strategy.devices // strategy.ranks)
        for name, bare in zip(self.scripts, (False, True), strict=True):
            (folder / name).write_text(
                by_hand.script(notebook, bare=bare, devices=devices, keep=keep), encoding="utf-8"
            )
        job = JOB.format(
            name=strategy.name, script=self.scripts[0], strategy=strategy.strategy, devices=strategy.devices,
            ranks=strategy.ranks,
        )  # fmt: skip
        (folder / f"{strategy.name}.toml").write_text(job, encoding="utf-8")
        self.environment = pairs.environment() | {"HPCML_PROJECT": str(folder), "HPCML_DEVICES": "cpu"}
        self.variables = variables(strategy, self.environment)

    def ours(self) -> turns.Program:
        """Start the script under ``hpcml run``."""
        words = [str(BIN / "hpcml"), "run", "--site", "local", f"{self.strategy.name}.toml"]
        return turns.Program("ours", words, self.environment, self.folder)

    def by_hand(self, name: str = "by_hand") -> turns.Program:
        """Start the script without hpcml."""
        words = self.strategy.started(self.scripts[1], self.strategy.ranks)
        return turns.Program(name, words, self.environment | self.variables, self.folder)


def variables(strategy: Strategy, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a person would set for threads, Keras and network, with the values that hpcml will choose."""
    asked = {"HPCML_CPUS_PER_TASK": "1"}
    prepared = bootstrap.prepare({**environment, **asked}, strategy.strategy, gpus_per_node=strategy.devices)
    kept = {*prepared.threads.variables, *KEPT}
    chosen = {name: value for name, value in prepared.variables.items() if name in kept}
    return {**chosen, "no_grpc_proxy": "127.0.0.1"} if strategy.name == "multiworker" else chosen


def free_ports(count: int) -> list[int]:
    """Return ports that are free on the loopback address."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def missing(strategy: Strategy) -> str:
    """Return why a strategy can't be measured here; empty where it can."""
    lacking = [name for name in strategy.needs if importlib.util.find_spec(name) is None]
    return f"{strategy.name} is left out: no {' and no '.join(lacking)} here ({strategy.fix})" if lacking else ""


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: on each side of a pair; ``least``, ``most``: pairs.
        noise: by hand against by hand: what the machine itself adds.
        keep: whether hpcml saves checkpoints.
        to_the_end: let each training come to its end, instead of killing it when it was measured.
    """

    seconds: float = SECONDS
    least: int = PAIRS
    most: int = MOST_PAIRS
    noise: bool = False
    keep: bool = True
    to_the_end: bool = False


def measured(strategy: Strategy, folder: Path, effort: Effort, limit_s: float) -> pairs.Figure:
    """Measure one strategy."""
    sides = Sides(strategy, folder, keep=effort.keep)
    found = []
    ours = partial(sides.by_hand, "again") if effort.noise else sides.ours
    race = turns.racing(ours, sides.by_hand, effort.seconds, to_the_end=effort.to_the_end)
    for pair in pairs.measure(race, least=effort.least, most=effort.most, width=BOUND.width, limit_s=limit_s):
        found.append(pair)
        pairs.progress(strategy.name, pair, len(found))
    against = f"{strategy.starter} without hpcml"
    who = f"`hpcml run` with {strategy.ranks} process{'es' * (strategy.ranks > 1)}, checkpoints {'kept' if effort.keep else 'off'}"
    who = against if effort.noise else who
    what = (
        f"notebooks/{strategy.notebook}.py up to its training, {effort.seconds:g} s of it after the second epoch began: {who} "
        f"against {against}."
    )
    return pairs.Figure(
        strategy.name, what, ("again" if effort.noise else "hpcml", "by hand"), "samples/s", found, BOUND
    )


def all_measured(chosen: Sequence[Strategy], effort: Effort) -> tuple[list[pairs.Figure], list[str]]:
    """Measure strategies one after the other; return the figures and what was left out."""
    notes = [why for strategy in chosen if (why := missing(strategy))]
    here = [strategy for strategy in chosen if not missing(strategy)]
    figures, began = list[pairs.Figure](), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hpcml-bench-") as name:
        folder = Path(name)
        by_hand.write_data(folder)
        (folder / "with_tf_config.py").write_text(WITH_TF_CONFIG, encoding="utf-8")
        for count, strategy in enumerate(here, 1):
            limit_s = LIMIT_S * count / len(here) - (time.monotonic() - began)
            figures.append(measured(strategy, folder, effort, limit_s))
    notes.append(f"All processes on one core, one thread each; {time.monotonic() - began:.0f} s in all.")
    return figures, notes


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs of 1.5 s, to the end; nothing is judged")
    parser.add_argument("--noise", action="store_true", help="by hand against by hand: what the machine itself adds")
    parser.add_argument("--no-keep", action="store_true", help="no checkpoints under hpcml either")
    parser.add_argument("--only", action="append", choices=[one.name for one in ALL], help="this strategy; repeatable")
    asked = parser.parse_args()
    pairs.announce("strategies")
    effort = Effort(seconds=1.5, least=2, most=2, to_the_end=True) if asked.quick else Effort()
    wanted = asked.only or [one.name for one in ALL if one.name not in LEFT_OUT]
    chosen = [one for one in ALL if one.name in wanted]
    figures, notes = all_measured(chosen, replace(effort, noise=asked.noise, keep=not asked.no_keep))
    if figures:
        pairs.show("strategies: what hpcml costs each", figures, notes)
    else:
        print("bench: strategies: " + " ".join(notes), file=sys.stderr)
    return 0 if figures else 1


if __name__ == "__main__":
    sys.exit(main())
