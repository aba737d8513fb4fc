"""A chain of steps, each a run of its own: ``[[steps]]`` in a job file → dependent Slurm jobs, or one after the other here."""

from .read import is_chain, load
from .schema import ACTIONS, Pipeline, Registration, Step

__all__ = ["ACTIONS", "Pipeline", "Registration", "Step", "is_chain", "load"]
