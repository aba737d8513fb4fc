"""What a person asks about runs: their state, progress and logs, to wait for them and to cancel them."""

from .control import cancel, wait
from .logs import Follower, follow, lines_of, log_paths, rank_logs
from .order import children
from .progress import in_words, progress
from .state import State, state_of, states_of

__all__ = [
    "Follower",
    "State",
    "cancel",
    "children",
    "follow",
    "in_words",
    "lines_of",
    "log_paths",
    "progress",
    "rank_logs",
    "state_of",
    "states_of",
    "wait",
]
