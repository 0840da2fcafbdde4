"""The stored numbers are summaries that a reader can look through, not raw samples."""

import json

import pytest

from tests.conftest import ROOT

MOST = 20_000  # bytes of a stored file
STORED = sorted((ROOT / "benchmarks").glob("*.json"))


def problems(path):
    """Return the faults of a stored file: raw samples make it long, and a number without its machine cannot be
    compared."""
    found = []
    if (size := path.stat().st_size) > MOST:
        found.append(f"{path.name} has {size:,} bytes; store percentiles, counts and extremes in at most {MOST:,}")
    if "machine" not in json.loads(path.read_text()):
        found.append(f"{path.name} does not say on which machine it was measured")
    return found


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.name)
def test_stored_numbers_are_small_and_name_their_machine(path):
    assert problems(path) == []


def test_raw_samples_and_a_missing_machine_are_found(tmp_path):
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps({"samples": [0.123456789] * 2000}))
    assert len(problems(raw)) == 2
