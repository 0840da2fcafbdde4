"""`edgekit quantize`: one line with sizes, times and the cosine, and a bundle that runs."""

import json

import numpy as np
import pytest

from edgekit.bundle.store import open_bundle


def test_a_bundle_is_written_and_told_about(tiny_file, edgekit, tmp_path):
    done = edgekit("quantize", tiny_file, "--to", "fp16", "-o", tmp_path / "half.edge")
    assert done.status == 0, done.err
    assert "half.edge: half; " in " ".join(done.out.split())
    assert open_bundle(tmp_path / "half.edge").is_graph
    again = edgekit("quantize", tiny_file, "--to", "fp16", "-o", tmp_path / "half.edge")
    assert again.failed_with(1, "half.edge", "--force")
    as_json = edgekit("quantize", tiny_file, "--to", "fp16", "-o", tmp_path / "half.edge", "--force", "--json")
    found = json.loads(as_json.out)
    assert found["bytes"][0] > found["bytes"][1]
    assert found["cosine"] > 0.999


def test_a_limit_that_is_not_met_leaves_no_file(tiny_file, edgekit, tmp_path):
    done = edgekit("quantize", tiny_file, "--to", "fp16", "-o", tmp_path / "x.edge", "--least-cosine", "1.1")
    assert done.failed_with(1, "cosine", "Nothing was written")
    assert not (tmp_path / "x.edge").exists()


@pytest.mark.parametrize(("after", "warned"), [(0.003, True), (0.001, False)])
def test_a_result_that_is_slower_is_said(after, warned, tiny_file, edgekit, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "edgekit.compression.quick.time_in_turns", lambda *arguments, **options: np.array([[0.001, after]] * 3)
    )
    done = edgekit("quantize", tiny_file, "--to", "fp16", "-o", tmp_path / "half.edge")
    assert done.status == 0, done.err
    assert ("it is 3.0 times slower than the original" in " ".join(done.err.split())) == warned
