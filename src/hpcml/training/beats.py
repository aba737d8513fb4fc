"""A Keras callback that tells a rank's worker how its training goes on, where one watches for stalls.

Not by hooks of batches: with none, Keras 2 skips its calls for each batch altogether. The training function counts.
"""

from typing import Any

from ..tracking import heartbeat


class Beats:
    """The hooks; ``model`` is set by Keras. It comes before other callbacks that wrap the training function for a while."""

    model: Any

    def __init__(self) -> None:
        super().__init__()
        self._training = heartbeat.training()

    def on_train_begin(self, logs: Any = None) -> None:
        self._training = heartbeat.training()
        self._training.__enter__()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        model = self.model
        if callable(model.train_function):
            model.train_function = heartbeat.counting(model.train_function, _done(model), steps_a_call(model))

    def on_test_begin(self, logs: Any = None) -> None:
        heartbeat.pause()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        heartbeat.pause()

    def on_train_end(self, logs: Any = None) -> None:
        self._training.__exit__(None, None, None)


def callbacks(base: type) -> list[Any]:
    """Return the callback for a flavour of Keras; none where no worker watches.

    Args:
        base: the flavour's ``Callback``.
    """
    return [type("Beats", (Beats, base), {})()] if heartbeat.is_watched() else []


def steps_a_call(model: Any) -> int:
    """Steps that one call of ``train_function`` trains: compile's steps_per_execution; Keras 2 keeps a variable."""
    kept: Any = getattr(model, "_steps_per_execution", None) or getattr(model, "steps_per_execution", None)
    return int(kept.numpy() if hasattr(kept, "numpy") else kept or 1)


def _done(model: Any) -> int:
    counter = getattr(getattr(model, "optimizer", None), "iterations", None)
    return 0 if counter is None else int(counter.numpy())
