"""Find jobs by their entry points."""

from __future__ import annotations

import inspect
from typing import Any

from edgekit import plugins
from edgekit.session import Job

GROUP = "edgekit.jobs"
METHODS = ("next_step", "run", "slack", "backlog")


def open_job(name: str, /, **options: Any) -> Job:
    """Make a job by its name in the entry point group `edgekit.jobs`. options: of that job."""
    opener = plugins.load(GROUP, name, _problem_with)
    try:
        inspect.signature(opener).bind(**options)
    except TypeError as error:
        raise plugins.refused(GROUP, name, f"it does not take these options: {error}") from None
    job: Job = opener(**options)
    if missing := [item for item in ("name", *METHODS) if not hasattr(job, item)]:
        raise plugins.refused(GROUP, name, f"the job that it makes has no {missing[0]!r}")
    return job


def _problem_with(opener: Any, name: str) -> str:
    """Return why an object cannot make a job; "" if it can."""
    if not callable(opener):
        return f"it is a {type(opener).__name__}, which makes nothing"
    if isinstance(opener, type) and (
        missing := [item for item in METHODS if not callable(getattr(opener, item, None))]
    ):
        return f"it has no method {missing[0]!r}"
    return ""
