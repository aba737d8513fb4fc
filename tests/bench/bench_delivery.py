"""What delivery to MLflow costs: points a second, and what a training notices of a server that is dead all along.

    scripts/bench delivery [--quick]

A run directory with a journal of 100,000 points is delivered to a real MLflow server (SQLite store, one worker) on this
machine; on the other side MLflow's own client sends the same points, already in memory, by `log_batch` of 1,000. Then
once a million points. Last the training of bench_training.py, by `hpcml run` with MLflow's address at a port where nobody
listens, against the same with a store that is there; afterwards `hpcml sync` delivers what the dead server missed.
"""

import argparse
import contextlib
import json
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from mlflow_server import serving

from bench import pairs, turns
from bench.bench_training import HPCML, SECONDS, Training
from hpcml import job, plan, site
from hpcml.rundir import RunDir, create, every, write_json
from hpcml.tracking import journal
from hpcml.tracking.mlflow import deliver, is_delivered
from hpcml.tracking.translate import RUN_TAG

POINTS, MILLION = 100_000, 1_000_000
METRICS = 10  # of a step
CALL = 1_000  # points, the most that MLflow takes at once
PAIRS = 6
BOUND = pairs.Bound(0.9, at_least=True, pairs=PAIRS)
MILLION_BOUND = pairs.Bound(1.2, at_least=False, pairs=1)
DEAD_PAIRS, MOST_PAIRS, LIMIT_S = 12, 24, 25 * 60
DEAD_BOUND = pairs.Bound(0.98, at_least=True, pairs=DEAD_PAIRS, width=0.04)
START_MS = 1_700_000_000_000


def prepare(root: Path, count: int) -> RunDir:
    """Make a run directory whose journal holds so many points, ten metrics a step, 10 ms from step to step."""
    keys = {"name": "delivery", "command": ["true"], "experiment": "ours"}
    run = create(root, "delivery")
    write_json(run.plan, plan.resolve(job.from_tree(keys, {}, root), site.load("local")).to_json())
    with run.event_file(0, 0, "rank").open("w") as file:
        for step in range(count // METRICS):
            values = {f"metric_{number}": step / (number + 1) for number in range(METRICS)}
            record = {"t": START_MS + 10 * step, "kind": "metric", "step": step, "values": values}
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
    return run


def with_hpcml(root: Path, count: int, uri: str) -> float:
    """Return the seconds that a delivery takes."""
    run = prepare(root, count)
    started = time.perf_counter()
    sent = deliver(run, uri)
    took = time.perf_counter() - started
    if sent.points != count or not is_delivered(run, uri):
        raise RuntimeError(f"{sent.points} of {count} points were sent")
    return took


def with_mlflow(count: int, uri: str) -> float:
    """Return the seconds that MLflow's own client takes for the same points, which lie in memory."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("bare")
    number = found.experiment_id if found else client.create_experiment("bare")
    points = [
        (f"metric_{number}", step / (number + 1), START_MS + 10 * step, step)
        for step in range(count // METRICS)
        for number in range(METRICS)
    ]
    started = time.perf_counter()
    run_id = client.create_run(number).info.run_id
    for first in range(0, count, CALL):
        metrics = [Metric(*point) for point in points[first : first + CALL]]
        client.log_batch(run_id, metrics=metrics, synchronous=True)
    client.set_terminated(run_id)
    return time.perf_counter() - started


def speeds(folder: Path, *, quick: bool) -> list[pairs.Figure]:
    """Measure delivery against MLflow's own client."""
    count, large = (5_000, 20_000) if quick else (POINTS, MILLION)
    with serving(folder, environment=pairs.environment()) as server:
        runs, uri = folder / "runs", server.uri
        both = pairs.in_turn(lambda: count / with_hpcml(runs, count, uri), lambda: count / with_mlflow(count, uri))
        with_hpcml(runs, CALL, uri), with_mlflow(CALL, uri)  # imports MLflow, makes the experiments
        measured = []
        for pair in pairs.measure(both, least=2 if quick else PAIRS):
            measured.append(pair)
            pairs.progress("delivery", pair, len(measured))
        once = pairs.Pair(with_hpcml(runs, large, uri), with_mlflow(large, uri), ours_first=True)
        pairs.progress(f"{large:,} points", once, 1)
    told = f"from the journal on disk to the server, against `log_batch` of {CALL:,} of the same points from memory."
    sides = ("hpcml", "log_batch")
    return [
        pairs.Figure("delivery", f"{count:,} points, {told}", sides, "points/s", measured, BOUND),
        pairs.Figure(f"{large:,} points", f"once, {told}", sides, "s", [once], MILLION_BOUND),
    ]


def dead_server(folder: Path, *, quick: bool) -> tuple[pairs.Figure, str]:
    """Measure a training with a dead server against one with a live store; deliver what is left, and count it."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        sides = Training(folder)
        live = f"sqlite:///{folder}/live.db"
        addresses = {"dead": f"http://127.0.0.1:{closed.getsockname()[1]}", "live": live}

        def started(name: str) -> turns.Program:
            environment = sides.environment | {"MLFLOW_TRACKING_URI": addresses[name]}
            return turns.Program(name, [HPCML, "run", "--site", "local", "bench.toml"], environment, folder)

        seconds, least, most = (2.0, 2, 2) if quick else (SECONDS, DEAD_PAIRS, MOST_PAIRS)
        race = turns.racing(partial(started, "dead"), partial(started, "live"), seconds)
        measured = []
        for pair in pairs.measure(race, least=least, most=most, width=DEAD_BOUND.width, limit_s=LIMIT_S):
            measured.append(pair)
            pairs.progress("dead server", pair, len(measured))
    what = "the training of scripts/bench training with MLflow's server dead throughout, against one with a store."
    return pairs.Figure("dead server", what, ("dead", "live"), "samples/s", measured, DEAD_BOUND), synced(
        folder, sides.environment
    )


def synced(folder: Path, environment: Mapping[str, str]) -> str:
    """Deliver the runs below a folder to its `live.db` by `hpcml sync`; return what arrived of what the journals hold."""
    runs, live = folder / "runs", f"sqlite:///{folder}/live.db"
    missed = [run for run in every(runs) if not is_delivered(run, live)]
    words = [HPCML, "sync", "--site", "local", *(run.id for run in missed)]
    own = {**environment, "HPCML_RUNS": str(runs), "MLFLOW_TRACKING_URI": live}
    subprocess.run(words, env=own, cwd=folder, check=True, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    wanted = {
        (run.id, name, record["step"], record["t"], value)
        for run in every(runs)
        for record in journal.read(run.events, kinds={"metric"})
        for name, value in record["values"].items()
    }
    query = f"""SELECT tags.value, metrics.key, step, timestamp, metrics.value FROM metrics JOIN tags USING (run_uuid)
        WHERE tags.key = '{RUN_TAG}' AND metrics.key NOT LIKE 'system/%' AND metrics.key NOT LIKE 'profile/%'"""
    with contextlib.closing(sqlite3.connect(folder / "live.db")) as database:
        there = database.execute(query).fetchall()
    percent = 100 * len(wanted & set(there)) / len(wanted)
    more = f", {len(there) - len(wanted)} too many" if len(there) > len(wanted) else ""
    return (
        f"After `hpcml sync` of {len(missed)} runs the store has {percent:g} % of the {len(wanted):,} points of all "
        f"journals{more}."
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few thousand points, two pairs; nothing is judged")
    quick = parser.parse_args().quick
    pairs.announce("delivery")
    with tempfile.TemporaryDirectory(prefix="hpcml-bench-") as name:
        folder = Path(name)
        for part in ("server", "training"):
            (folder / part).mkdir()
        figures = speeds(folder / "server", quick=quick)
        figure, note = dead_server(folder / "training", quick=quick)
    pairs.show("delivery: what it costs to send a run to MLflow", [*figures, figure], [note])
    return 0


if __name__ == "__main__":
    sys.exit(main())
