"""``MlflowClient`` in a captured run: what names this run is recorded like fluent calls; other runs are the server's."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .capture_recorder import Recorder

_LEFT_OUT = (
    "log_figure", "log_image", "log_table", "load_table", "log_stream", "log_inputs", "log_outputs", "delete_tag",
    "delete_run", "restore_run", "get_metric_history", "download_artifacts",
)  # fmt: skip


@contextlib.contextmanager
def captured(recorder: Recorder, say: Callable[..., None]) -> Iterator[None]:
    """Turn the client's methods to a recorder, for calls with its run's id; nothing of them reaches the network."""
    from mlflow.tracking import MlflowClient

    active = [True]
    calls = _calls(recorder)
    # Not every version of the client has all of them.
    originals = {name: vars(MlflowClient)[name] for name in (*calls, *_LEFT_OUT) if name in vars(MlflowClient)}

    def guarded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(client: Any, *args: Any, **kwargs: Any) -> Any:
            run_id = args[0] if args else kwargs.get("run_id")
            if not active or run_id != recorder.run_id:
                return original(client, *args, **kwargs)
            if name in _LEFT_OUT:
                return say(
                    f"client.{name}", f"MlflowClient.{name} of this run is left out", "do it once it was delivered"
                )
            try:
                return calls[name](*args, **kwargs)
            except Exception as error:  # what is logged must not end the training
                return say(f"client.{name}", f"MlflowClient.{name}: {type(error).__name__}: {error}")

        return call

    for name, original in originals.items():
        setattr(MlflowClient, name, guarded(name, original))
    try:
        yield
    finally:
        active.clear()  # for a method that somebody has kept
        for name, original in originals.items():
            setattr(MlflowClient, name, original)


def _calls(to: Recorder) -> dict[str, Callable[..., Any]]:
    """What stands in for the client's methods, with their arguments."""

    def log_metric(
        run_id: str, key: str, value: float, timestamp: int | None = None, step: int | None = None,
        synchronous: bool | None = None, **about: Any,
    ) -> Any:  # fmt: skip
        return to.log_metric(key, value, step, synchronous, timestamp)

    def log_param(run_id: str, key: str, value: Any, synchronous: bool | None = None) -> Any:
        return to.log_param(key, value)

    def set_tag(run_id: str, key: str, value: Any, synchronous: bool | None = None) -> Any:
        return to.set_tag(key, value, synchronous)

    def log_batch(
        run_id: str, metrics: Iterable[Any] = (), params: Iterable[Any] = (), tags: Iterable[Any] = (),
        synchronous: bool | None = None,
    ) -> Any:  # fmt: skip
        for metric in metrics:
            to.log_metric(metric.key, metric.value, metric.step, timestamp=metric.timestamp)
        to.log_params({param.key: param.value for param in params})
        return to.set_tags({tag.key: tag.value for tag in tags}, synchronous)

    def log_artifact(run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        to.log_artifact(local_path, artifact_path)

    def log_artifacts(run_id: str, local_dir: str, artifact_path: str | None = None) -> None:
        to.log_artifacts(local_dir, artifact_path)

    def log_text(run_id: str, text: str, artifact_file: str) -> None:
        to.log_text(text, artifact_file)

    def log_dict(run_id: str, dictionary: dict[str, Any], artifact_file: str) -> None:
        to.log_dict(dictionary, artifact_file)

    def ends_with_its_process(run_id: str, *how: Any, **more: Any) -> None:
        """``run.finish()`` ends it too."""

    return {
        **{call.__name__: call for call in (log_metric, log_param, set_tag, log_batch, log_text, log_dict)},
        "log_artifact": log_artifact,
        "log_artifacts": log_artifacts,
        "get_run": to.get_run,
        **dict.fromkeys(("set_terminated", "update_run"), ends_with_its_process),
    }
