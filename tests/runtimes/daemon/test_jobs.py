"""Jobs are found by entry point, and one that keeps no contract is refused by name."""

from importlib.metadata import EntryPoint

import pytest

from edgekit import plugins
from edgekit.errors import EdgekitError
from runtimes.daemon.jobs import open_job
from runtimes.daemon.language_job import LanguageJob
from runtimes.daemon.session_job import SessionJob


def not_a_job(name):
    return object()


def test_our_jobs_are_registered():
    assert plugins.load("edgekit.jobs", "language") is LanguageJob
    assert plugins.load("edgekit.jobs", "session") is SessionJob


@pytest.mark.parametrize(
    ("value", "options", "reason"),
    [
        ("json:JSONDecoder", {}, "it has no method 'next_step'"),
        ("math:pi", {}, "it is a float, which makes nothing"),
        (f"{__name__}:not_a_job", {"name": "x"}, "the job that it makes has no 'name'"),
        ("runtimes.daemon.session_job:SessionJob", {"speed": 1}, "does not take these options"),
    ],
)
def test_a_job_that_keeps_no_contract_is_refused_by_name(monkeypatch, value, options, reason):
    point = EntryPoint("ours", value, "edgekit.jobs")
    if value.startswith(__name__):
        monkeypatch.setattr(EntryPoint, "load", lambda self: not_a_job)
    monkeypatch.setattr(plugins, "_points", lambda group: {"ours": point})
    with pytest.raises(EdgekitError, match=rf"the job 'ours' .*cannot be used: .*{reason}"):
        open_job("ours", **options)


def test_an_unknown_job_is_refused_with_the_names_that_there_are():
    with pytest.raises(EdgekitError, match=r"unknown job 'sesion'; expected one of: language, session"):
        open_job("sesion")
