"""How fast a point is logged: ``run.log`` into the journal against ``mlflow.log_metric`` to a server of this machine.

    scripts/bench log [--quick]

The server is MLflow's own with an SQLite store, on a free port of the loopback. Both sides are measured in this process,
one after the other: ours for 100,000 calls, MLflow's for as many calls as fit into two seconds.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mlflow_server import serving

from bench import pairs

PAIRS = 8
BOUND = pairs.Bound(2000, at_least=True, pairs=PAIRS)
CALLS = 100_000
SERVER_S = 2.0
P99_CALLS, P99_US = 200_000, 50


def journal_side(log: Callable[..., bool], names: tuple[str, ...], calls: int) -> Callable[[], float]:
    """Return what measures the points/s of ``run.log``."""
    steps = itertools.count()

    def measured() -> float:
        values = dict.fromkeys(names, 0.0)
        began = time.perf_counter()
        for step in itertools.islice(steps, calls):
            for name in names:
                values[name] = step / 7
            if not log(step=step, **values):
                raise RuntimeError("run.log could not keep a point")
        return calls * len(names) / (time.perf_counter() - began)

    return measured


def server_side(seconds: float) -> Callable[[], float]:
    """Return what measures the points/s of ``mlflow.log_metric``, in the run that is active."""
    import mlflow

    steps = itertools.count()

    def measured() -> float:
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            step = next(steps)
            mlflow.log_metric("loss", step / 7, step=step)
            count += 1
        return count / (time.perf_counter() - began)

    return measured


def latencies(log: Callable[..., bool], calls: int) -> list[float]:
    """Return how long each call of ``run.log`` with two points took, in µs, sorted."""
    took = []
    for step in range(calls):
        began = time.perf_counter_ns()
        log(step=step, loss=step / 7, lr=0.001)
        took.append((time.perf_counter_ns() - began) / 1000)
    return sorted(took)


def main() -> int:
    """Print the table and the latencies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short pairs, nothing is judged")
    quick = parser.parse_args().quick
    pairs.announce("log")
    calls, seconds, count = (5000, 0.3, 2) if quick else (CALLS, SERVER_S, PAIRS)
    with tempfile.TemporaryDirectory() as name, serving(Path(name), environment=pairs.environment()) as server:
        own = {"HPCML_RUNS": f"{name}/runs", "HPCML_SITE": "local", "HPCML_DEVICES": "cpu"}
        os.environ.update({**own, "MLFLOW_TRACKING_URI": server.uri, "MLFLOW_DISABLE_TELEMETRY": "true"})
        import mlflow

        import hpcml

        run = hpcml.begin()
        figures = []
        with mlflow.start_run():
            other = server_side(seconds)
            for names in (("loss",), ("loss", "lr")):
                ours = journal_side(run.log, names, calls)
                ours(), other()  # the first calls import and connect
                measured = []
                for pair in pairs.measure(pairs.in_turn(ours, other), least=count):
                    measured.append(pair)
                    pairs.progress(f"log, {len(names)} a call", pair, len(measured))
                told = f"run.log(step=…, {', '.join(f'{name}=…' for name in names)}) against mlflow.log_metric of one."
                sides = ("run.log", "log_metric")
                figures.append(pairs.Figure(f"{len(names)} a call", told, sides, "points/s", measured, BOUND))
        took = latencies(run.log, 5000 if quick else P99_CALLS)
        run.session = None  # its million points are no use to a server that is about to end
        run.finish()
    p50, p99, p999 = (took[int(len(took) * part)] for part in (0.5, 0.99, 0.999))
    verdict = "holds" if p99 <= P99_US else "does not hold"
    note = (
        f"run.log with two points, {len(took):,} calls: median {p50:.1f} µs, 99 % within {p99:.1f} µs (at most {P99_US}: "
        f"{verdict}), 99.9 % within {p999:.1f} µs, the longest {took[-1] / 1000:.1f} ms."
    )
    pairs.show("log: what a point costs", figures, [note])
    return 0


if __name__ == "__main__":
    sys.exit(main())
