"""What records MLflow's fluent calls in a run's journal and artifacts, and tells what was recorded."""

import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from ..rundir import write_bytes
from .journal import Journal


class Recorder:
    """What takes the place of MLflow's functions: each public method has the name and arguments of one of them."""

    def __init__(self, journal: Journal, run_id: str, artifacts: Path, say: Callable[..., None]) -> None:
        self._journal, self.run_id, self._artifacts, self._say = journal, run_id, artifacts, say
        self._steps: dict[str, itertools.count[int]] = {}
        self._began_ms = _now_ms()
        # What this process has logged, for who asks.
        self._metrics: dict[str, tuple[float, int, int]] = {}
        self._params: dict[str, str] = {}
        self._tags: dict[str, str] = {}

    def log_metric(
        self, key: str, value: float, step: int | None = None, synchronous: bool | None = None,
        timestamp: int | None = None, run_id: str | None = None, model_id: str | None = None, dataset: Any = None,
    ) -> Any:  # fmt: skip
        """Without a step each name counts its own from 0, where MLflow would put all at 0."""
        self._check_run(run_id)
        step = next(self._steps.setdefault(key, itertools.count())) if step is None else step
        self._metric(step, {key: value}, timestamp)
        return _nothing_to_wait_for(synchronous)

    def log_metrics(
        self, metrics: dict[str, float], step: int | None = None, synchronous: bool | None = None,
        run_id: str | None = None, timestamp: int | None = None, model_id: str | None = None, dataset: Any = None,
    ) -> Any:  # fmt: skip
        if step is None:
            for key, value in metrics.items():
                self.log_metric(key, value, timestamp=timestamp, run_id=run_id)
        else:
            self._check_run(run_id)
            self._metric(step, metrics, timestamp)
        return _nothing_to_wait_for(synchronous)

    def _metric(self, step: int, metrics: dict[str, float], timestamp: int | None) -> None:
        if self._journal.metric(step, metrics, timestamp):
            t = _now_ms() if timestamp is None else timestamp
            self._metrics.update({key: (float(value), t, int(step)) for key, value in metrics.items()})

    def log_param(self, key: str, value: Any, synchronous: bool | None = None) -> Any:
        self.log_params({key: value})
        return value

    def log_params(self, params: dict[str, Any], synchronous: bool | None = None, run_id: str | None = None) -> Any:
        """A param keeps its first value, as in MLflow; None is a value of its own, and MLflow has it as text."""
        self._check_run(run_id)
        first = {}
        for key, value in params.items():
            before = self._params.setdefault(key, str(value))
            if before == str(value):
                first[key] = "None" if value is None else value
            else:
                self._say(f"param {key}", f"the param {key!r} is {before} already: {value} is left out")
        if first:
            self._journal.write("params", values=first)
        return _nothing_to_wait_for(synchronous)

    def set_tag(self, key: str, value: Any, synchronous: bool | None = None) -> Any:
        return self.set_tags({key: value}, synchronous)

    def set_tags(self, tags: dict[str, Any], synchronous: bool | None = None) -> Any:
        told = {key: str(value) for key, value in tags.items()}
        self._tags |= told
        if told:
            self._journal.write("tags", values=told)
        return _nothing_to_wait_for(synchronous)

    def log_artifact(self, local_path: str, artifact_path: str | None = None, run_id: str | None = None) -> None:
        self._check_run(run_id)
        source = Path(local_path)
        if source.is_dir():
            self._copy(source, self._below(artifact_path, source.name))
        else:
            self._copy(source, self._below(artifact_path) / source.name)

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None, run_id: str | None = None) -> None:
        self._check_run(run_id)
        self._copy(Path(local_dir), self._below(artifact_path))

    def log_text(self, text: str, artifact_file: str, run_id: str | None = None) -> None:
        self._check_run(run_id)
        write_bytes(_made(self._below(artifact_file)), text.encode("utf-8", "backslashreplace"))

    def log_dict(self, dictionary: dict[str, Any], artifact_file: str, run_id: str | None = None) -> None:
        """As JSON, which is YAML as well."""
        self.log_text(json.dumps(dictionary, indent=2, default=str), artifact_file, run_id)

    def start_run(
        self, run_id: str | None = None, experiment_id: str | None = None, run_name: str | None = None,
        nested: bool = False, parent_run_id: str | None = None, tags: dict[str, Any] | None = None,
        description: str | None = None, log_system_metrics: bool | None = None,
    ) -> Any:  # fmt: skip
        if nested or parent_run_id is not None:
            self._say("nested", "a nested MLflow run is recorded in its parent", "[sweep] or hpcml compare")
        self._check_run(run_id)
        given = {**(tags or {}), **({"mlflow.note.content": description} if description else {})}
        if given:
            self.set_tags(given)
        return self.active_run()

    def active_run(self) -> Any:
        """The hpcml run in MLflow's form; used in a ``with``, it asks nobody."""
        import mlflow

        return mlflow.ActiveRun(self.get_run(self.run_id))

    def get_run(self, run_id: str) -> Any:
        """This run as far as this process has logged it; another one from the server."""
        from mlflow.entities import Metric, Param, Run, RunData, RunInfo, RunTag
        from mlflow.tracking import MlflowClient

        if run_id != self.run_id:
            return MlflowClient().get_run(run_id)
        info = RunInfo(
            run_id=run_id, experiment_id="0", user_id="", status="RUNNING", start_time=self._began_ms,
            end_time=None, lifecycle_stage="active", artifact_uri=self._artifacts.as_uri(), run_name=run_id,
        )  # fmt: skip
        return Run(
            info,
            RunData(
                [Metric(key, value, t, step) for key, (value, t, step) in self._metrics.items()],
                [Param(*pair) for pair in self._params.items()],
                [RunTag(*pair) for pair in self._tags.items()],
            ),
        )

    def last_active_run(self) -> Any:
        return self.active_run()

    def end_run(self, status: str = "FINISHED") -> None:
        """The run ends with its process or ``run.finish()``."""

    def flush_async_logging(self) -> None:
        """Nothing waits to be written."""

    def set_experiment(self, experiment_name: str | None = None, experiment_id: str | None = None, **more: Any) -> Any:
        from mlflow.entities import Experiment

        self._say("set_experiment", "mlflow.set_experiment is left out", 'experiment = "…" in the job file')
        name = str(experiment_name or experiment_id or "hpcml")
        return Experiment(str(experiment_id or "0"), name, self._artifacts.as_uri(), "active")

    def get_artifact_uri(self, artifact_path: str | None = None) -> str:
        return self._below(artifact_path).as_uri()

    def _check_run(self, run_id: str | None) -> None:
        if run_id not in (None, self.run_id):
            self._say("run_id", f"what is logged to the MLflow run {run_id} is recorded in this run's")

    def _below(self, *parts: str | None) -> Path:
        """Return a path in the artifacts' folder.

        Raises:
            ValueError: it would lie outside.
        """
        path = PurePosixPath(*(part for part in parts if part))
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{str(path)!r} is not below the run's artifacts")
        return self._artifacts / path

    def _copy(self, source: Path, target: Path) -> None:
        """Copy now: the work may change or remove its file before the delivery."""
        if source.is_dir():
            shutil.copytree(source, _made(target), dirs_exist_ok=True)
        else:
            shutil.copy2(source, _made(target))


def _made(path: Path) -> Path:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _nothing_to_wait_for(synchronous: bool | None) -> Any:
    """Return what ``synchronous=False`` gives, so that ``.wait()`` works; else None."""
    if synchronous is not False:
        return None
    from mlflow.utils.async_logging.run_operations import RunOperations

    return RunOperations([])
