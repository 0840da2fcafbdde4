"""The result of a run has the values that its bundle holds, and it can be saved."""

import pytest

from edgekit.bundle.store import open_bundle
from edgekit.compression.record import records_of, summary_of
from edgekit.compression.run import run
from edgekit.errors import EdgekitError


def test_what_run_gives_is_what_its_bundle_holds(tiny_job, tmp_path):
    result = run(tiny_job([("cluster", {"bits": 4, "epochs": 0})]), tmp_path / "w")
    assert records_of(result.bundle) == result.records
    assert summary_of(result.bundle) == result.summary
    (record,) = result.records
    assert record.kept
    # a packed file holds the metrics too, which are not known before the end
    assert result.packed_bytes == pytest.approx(record.after.bytes, abs=64)
    assert record.after.bytes < record.before.bytes == pytest.approx(result.source_packed_bytes, abs=64)
    assert result.quality.value == pytest.approx(result.original.value + result.summary.change.value)
    assert "cluster: kept" in str(result)


def test_a_result_is_saved_with_its_report(tiny_job, tmp_path):
    result = run(tiny_job([("cluster", {"bits": 4, "epochs": 0})]), tmp_path / "w")
    written = result.save(tmp_path / "small.edge")
    assert open_bundle(tmp_path / "small.edge").digest == written.digest
    assert written.manifest.name == "small"
    result.report(tmp_path / "report.html")
    assert "<!doctype html>" in (tmp_path / "report.html").read_text()
    with pytest.raises(EdgekitError, match="already exists"):
        result.save(tmp_path / "small.edge")
