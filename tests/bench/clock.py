"""The clock that a training carries in its own code: it reports spans of training to the benchmark, see turns.py.

All ranks have one. Rank 0's spans count; the others' files tell which processes are ranks. All leave after the same
epoch: when rank 0 finds the file of ``$BENCH_STOP`` at the end of an epoch it writes down the next one as the last. The
others can't come to the end of that one before: its steps need rank 0.

Spans hold whatever is done between two validations: the steps, and what hpcml does beside them and between epochs. The
first epoch, which warms up, is the first line, and not counted.
"""

SPANS = '''
import os
import time


class Spans:
    """Writes a line for each span of training: samples, begin, end."""

    def __init__(self, rank):
        self.path, self.rank, self.epoch = os.environ["BENCH_SPANS"], rank, 0
        self.began = time.perf_counter()
        self.file = open(f"{self.path}.{rank}" if rank else self.path, "w", buffering=1)

    def end(self, samples):
        self.file.write(f"{samples} {self.began!r} {time.perf_counter()!r}\\n")

    def begin(self):
        self.began = time.perf_counter()

    def last(self):
        """Whether the epoch that ends now is the last one."""
        self.epoch += 1
        last = f"{self.path}.last"
        if self.rank == 0 and os.path.exists(os.environ["BENCH_STOP"]) and not os.path.exists(last):
            with open(f"{last}.new", "w") as file:
                file.write(str(self.epoch + 1))
            os.replace(f"{last}.new", last)
        if not os.path.exists(last):
            return False
        with open(last) as file:
            return self.epoch >= int(file.read())


'''

# Keras calls callbacks in their order: those of hpcml come first, so their work is counted. Validation is left out. An epoch
# is two spans; its samples belong to the first one, which takes nearly all of its time, and both count or neither.
KERAS = (
    SPANS
    + '''
import json


class Clock(tf.keras.callbacks.Callback):
    """Reports the spans of a Keras training."""

    def __init__(self):
        super().__init__()
        task = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {})
        self.spans = Spans(task.get("index", 0))

    def on_test_begin(self, logs=None):
        self.spans.end(steps * global_batch)

    def on_test_end(self, logs=None):
        self.spans.begin()

    def on_epoch_end(self, epoch, logs=None):
        self.spans.end(0)  # the callbacks' part
        self.model.stop_training = self.spans.last() or self.model.stop_training
        self.spans.begin()


'''
)
