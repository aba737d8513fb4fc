"""Job + site + facts → Plan: every value decided, each with its origin, all problems reported at once. Pure."""

from .fair import unfair
from .resolve import resolve
from .schema import NEVER_CHECKED, NOT_KERAS_3, ONE_PROCESS, Plan, from_json, warning_s

__all__ = ["NEVER_CHECKED", "NOT_KERAS_3", "ONE_PROCESS", "Plan", "from_json", "resolve", "unfair", "warning_s"]
