"""What a person asks about runs: their state, progress and logs, to wait for them and to cancel them."""

from .control import cancel, wait
from .logs import Follower, follow, lines_of, log_paths, rank_logs
from .order import children
from .progress import in_words, progress
from .state import State, state_of, states_of
from .steps import chain_of, has_begun, is_chain, is_due, note_never

__all__ = [
    "Follower",
    "State",
    "cancel",
    "chain_of",
    "children",
    "follow",
    "has_begun",
    "in_words",
    "is_chain",
    "is_due",
    "lines_of",
    "log_paths",
    "note_never",
    "progress",
    "rank_logs",
    "state_of",
    "states_of",
    "wait",
]
