"""MLflow's fluent API turned to a run's journal: nothing of it reaches the network while it is captured.

The functions are replaced wherever a loaded module holds them, so ``from mlflow import log_metric`` is captured too,
and put back at the end. hpcml has one MLflow run for each job: whatever run a call names, it is recorded in this one.
``MlflowClient`` is captured where it is called with this run's id; other runs it finds at the server as ever.

Otherwise than MLflow's own, ``log_metric`` without a step counts up, for each name from 0, and a second value of a param
is left out with a warning instead of an exception. Files whose names the run has for its own, such as ``plan.json`` or
``model/``, arrive below ``artifacts/``.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import HpcmlError
from . import capture_client
from .capture_recorder import Recorder
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
        recorder = Recorder(journal, run_id, artifacts, self._say)
        recorded = {name: getattr(recorder, name) for name in vars(Recorder) if not name.startswith("_")}
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
        self._undo.enter_context(capture_client.captured(recorder, self._say))

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
            except Exception as error:
                if name == "get_run":  # of another run, which only the server knows: without an answer nothing goes on
                    raise
                # What is logged must not end the training.
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


def _swap(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Put the second of each pair wherever a loaded module holds the first."""
    by_id = {id(old): (old, new) for old, new in pairs}
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        for name, value in list(names.items()) if isinstance(names, dict) else ():
            if id(value) in by_id:
                names[name] = by_id[id(value)][1]  # type: ignore[index]
