"""MLflow's fluent API turned to a run's journal: nothing of it reaches the network while it is captured.

The functions are replaced wherever a loaded module holds them, so ``from mlflow import log_metric`` is captured too,
and put back at the end. hpcml has one MLflow run for each job: whatever run a call names, it is recorded in this one.
"""

import contextlib
import functools
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from ..errors import HpcmlError
from ..rundir import write_bytes
from .journal import Journal

# What can't be recorded, and what to do instead.
_FILE = "save it to a file and mlflow.log_artifact(path)"
_LATER = "do it with MlflowClient after the run was delivered"
_LEFT_OUT = {
    **dict.fromkeys(("log_figure", "log_image", "log_table", "log_stream"), _FILE),
    **dict.fromkeys(("log_input", "log_inputs", "log_outputs"), "name the data set with mlflow.set_tag"),
    **dict.fromkeys(("log_model_params", "initialize_logged_model", "create_external_model"), _LATER),
    **dict.fromkeys(("delete_tag", "set_experiment_tag", "set_experiment_tags", "delete_experiment_tag"), _LATER),
    **dict.fromkeys(("create_experiment", "delete_experiment", "delete_run", "register_model"), _LATER),
    "autolog": "pass run.callbacks() to fit, or log by mlflow.log_metric",
}
_MODEL = "save it below run.dir.path, and hpcml model register"


class Capture(contextlib.AbstractContextManager[None]):
    """MLflow's fluent API, captured from its making until ``with`` ends or ``__exit__`` is called.

    Args:
        journal: gets metrics, params and tags.
        run_id: what ``mlflow.active_run().info.run_id`` says.
        artifacts: the folder that files are copied to.
        on_end: called at the end.

    Raises:
        HpcmlError: MLflow is not installed.
    """

    def __init__(
        self, journal: Journal, run_id: str, artifacts: Path, on_end: Callable[[], None] = lambda: None
    ) -> None:
        try:
            import mlflow
            from mlflow.tracking import fluent
            from mlflow.utils.autologging_utils import disable_autologging
        except ImportError as error:
            raise HpcmlError(f"mlflow can't be imported: {error}", fix="pip install 'hpcml[mlflow]'") from None
        self._on_end = on_end
        self._said: set[str] = set()
        self._active = True
        recorder = _Recorder(journal, run_id, artifacts, self._say)
        recorded = {name: getattr(recorder, name) for name in vars(_Recorder) if not name.startswith("_")}
        self._swaps: list[tuple[Any, Any]] = []
        for name in (*recorded, *_LEFT_OUT):
            original = getattr(mlflow, name, None) or getattr(fluent, name, None)
            if original is not None:  # not every version has all of them
                self._swaps.append((original, self._guarded(name, original, recorded.get(name))))
        _swap(self._swaps)
        self._undo = contextlib.ExitStack()
        # Autologging that was switched on before would look for its run at the server.
        self._undo.enter_context(disable_autologging())
        self._undo.enter_context(self._without_models())

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._active = False
            _swap([(ours, original) for original, ours in self._swaps])
            self._undo.close()
            self._on_end()

    def _guarded(self, name: str, original: Callable[..., Any], replacement: Callable[..., Any] | None) -> Any:
        """Return what stands in for a function: it never raises, and once the capture is over it is the function."""

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return original(*args, **kwargs)
            if replacement is None:
                return self._say(name, f"mlflow.{name} is left out", _LEFT_OUT[name])
            try:
                return replacement(*args, **kwargs)
            except Exception as error:  # what is logged must not end the training
                return self._say(name, f"mlflow.{name}: {type(error).__name__}: {error}")

        return call

    @contextlib.contextmanager
    def _without_models(self) -> Iterator[None]:
        """Every flavour's ``log_model`` ends in this method."""
        from mlflow.models import Model

        original = vars(Model)["log"]

        def log(*args: Any, **kwargs: Any) -> None:
            self._say("log_model", "log_model is left out", _MODEL)

        Model.log = staticmethod(log)
        try:
            yield
        finally:
            Model.log = original

    def _say(self, about: str, text: str, instead: str = "") -> None:
        if about not in self._said:
            self._said.add(about)
            advice = f"; instead: {instead}" if instead else ""
            with contextlib.suppress(Exception):  # stderr may be closed
                print(f"hpcml: warning: {text}{advice}", file=sys.stderr, flush=True)


class _Recorder:
    """What takes the place of MLflow's functions: each public method has the name and arguments of one of them."""

    def __init__(self, journal: Journal, run_id: str, artifacts: Path, say: Callable[..., None]) -> None:
        self._journal, self._run_id, self._artifacts, self._say = journal, run_id, artifacts, say
        self._steps: dict[str, itertools.count[int]] = {}
        self._run: Any = None

    def log_metric(
        self, key: str, value: float, step: int | None = None, synchronous: bool | None = None,
        timestamp: int | None = None, run_id: str | None = None, model_id: str | None = None, dataset: Any = None,
    ) -> Any:  # fmt: skip
        """Without a step each name counts its own from 0, where MLflow would put all at 0."""
        self._check_run(run_id)
        step = next(self._steps.setdefault(key, itertools.count())) if step is None else step
        self._journal.metric(step, {key: value}, timestamp)
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
            self._journal.metric(step, metrics, timestamp)
        return _nothing_to_wait_for(synchronous)

    def log_param(self, key: str, value: Any, synchronous: bool | None = None) -> Any:
        self._journal.write("params", values={key: value})
        return value

    def log_params(self, params: dict[str, Any], synchronous: bool | None = None, run_id: str | None = None) -> Any:
        self._check_run(run_id)
        self._journal.write("params", values=dict(params))
        return _nothing_to_wait_for(synchronous)

    def set_tag(self, key: str, value: Any, synchronous: bool | None = None) -> Any:
        return self.set_tags({key: value}, synchronous)

    def set_tags(self, tags: dict[str, Any], synchronous: bool | None = None) -> Any:
        self._journal.write("tags", values={key: str(value) for key, value in tags.items()})
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
        if self._run is None:
            self._run = _active_run(self._run_id, self._artifacts)
        return self._run

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
        if run_id not in (None, self._run_id):
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


def _swap(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Put the second of each pair wherever a loaded module holds the first."""
    by_id = {id(old): (old, new) for old, new in pairs}
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        for name, value in list(names.items()) if isinstance(names, dict) else ():
            if id(value) in by_id:
                names[name] = by_id[id(value)][1]  # type: ignore[index]


def _active_run(run_id: str, artifacts: Path) -> Any:
    """Return the hpcml run in MLflow's form; used in a ``with``, it asks nobody."""
    import mlflow
    from mlflow.entities import Run, RunData, RunInfo

    info = RunInfo(
        run_id=run_id, experiment_id="0", user_id="", status="RUNNING", start_time=round(time.time() * 1000),
        end_time=None, lifecycle_stage="active", artifact_uri=artifacts.as_uri(), run_name=run_id,
    )  # fmt: skip
    return mlflow.ActiveRun(Run(info, RunData()))


def _nothing_to_wait_for(synchronous: bool | None) -> Any:
    """Return what ``synchronous=False`` gives, so that ``.wait()`` works; else None."""
    if synchronous is not False:
        return None
    from mlflow.utils.async_logging.run_operations import RunOperations

    return RunOperations([])
