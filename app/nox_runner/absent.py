"""Modules that Python's own libraries ask for, and that this host's Python does not have."""

from __future__ import annotations

import importlib.util
import sys

_OTHERS = ("java", "org", "tzdata")
"""What pickle, platform and xml ask for on Jython, and zoneinfo where a zone is unknown."""


def absent() -> list[str]:
    """Their names. Whoever finds such a file in the shared directory would run it.

    To say `import pickle` is to look for `org`, and a module of that name that a run has left there
    would run in every later run that says it.
    """
    names = {*sys.stdlib_module_names, *_OTHERS} - set(sys.modules)
    return sorted(name for name in names if importlib.util.find_spec(name) is None)
