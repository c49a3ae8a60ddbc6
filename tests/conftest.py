"""Hypothesis tries the same examples on every machine, and no example is failed for being slow on a busy one."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("project", derandomize=True, deadline=None)
settings.load_profile("project")
