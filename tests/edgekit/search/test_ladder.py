"""The ladder: narrower codes until the file fits, or an error with the best size."""

import re
from dataclasses import replace

import numpy as np
import pytest

from edgekit.compression.run import run
from edgekit.errors import EdgekitError
from edgekit.search.ladder import narrowed

START = [("cluster", {"bits": 6, "epochs": 1})]


@pytest.fixture
def small_job(tiny_job):
    """The tiny job on a quarter of its training set: a ladder has many rungs."""
    return lambda *steps, **options: replace(job := tiny_job(*steps, **options), train=job.train.take(np.arange(96)))


def bits(bundle):
    return {encoding.bits for encoding in bundle.encodings().values()}


def test_what_fits_is_left_alone(small_job, tmp_path):
    job = small_job(START)
    result = run(job, tmp_path / "w")
    assert narrowed(job, result, result.packed_bytes, tmp_path / "w") is result


def test_codes_get_narrower_until_the_file_fits(small_job, tmp_path):
    job = small_job(START, max_loss=0.3)
    result = run(job, tmp_path / "w")
    limit = int(0.93 * result.packed_bytes)
    said = []
    smaller = narrowed(job, result, limit, tmp_path / "w", notify=said.append)
    assert smaller.packed_bytes <= limit
    assert bits(result.bundle) == {6}
    assert max(bits(smaller.bundle)) < 6
    assert sum("clustering to" in line for line in said) == len(smaller.bundle.manifest.records) - 1
    assert smaller.bundle.manifest.recipe["pass"][-1] == {"name": "cluster", "bits": min(bits(smaller.bundle))}


def test_from_no_codes_at_all(small_job, tmp_path):
    job = small_job([("magnitude_prune", {"sparsity": 0.3, "epochs": 1})], max_loss=0.3)
    result = run(job, tmp_path / "w")
    smaller = narrowed(job, result, int(0.95 * result.packed_bytes), tmp_path / "w")
    first, *rungs = smaller.bundle.manifest.records
    assert first["kept"]
    # 256 shared values take more bytes than these small matrices save: rolled back, and stepped over
    assert rungs[0]["parameters"] == {"bits": 8}
    assert not rungs[0]["kept"]
    assert rungs[-1]["kept"]


def test_a_size_that_cannot_be_had_is_an_error_with_the_best_one(small_job, tmp_path):
    job = small_job(START, max_loss=100.0)
    result = run(job, tmp_path / "w")
    with pytest.raises(EdgekitError, match=r"smallest result within --max-loss 100 .*--max-size allows 100") as caught:
        narrowed(job, result, 100, tmp_path / "w")
    best = int(re.search(r"is ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
    assert 100 < best < result.packed_bytes


def test_quality_comes_before_size(small_job, tmp_path):
    job = small_job(START, max_loss=0.02)
    result = run(job, tmp_path / "w")
    with pytest.raises(EdgekitError, match="max-loss"):
        narrowed(job, result, 100, tmp_path / "w")


class StoppedError(BaseException):
    pass


def test_a_stopped_ladder_goes_on_where_it_was(small_job, tmp_path):
    job = small_job(START, max_loss=100.0)
    limit = int(0.72 * run(job, tmp_path / "straight").packed_bytes)
    straight = narrowed(job, run(job, tmp_path / "straight"), limit, tmp_path / "straight")
    assert len(straight.bundle.manifest.records) >= 3

    def stop(message):
        if message.startswith("pass 3 "):
            raise StoppedError

    def whole(notify):
        return narrowed(job, run(job, tmp_path / "w", notify=notify), limit, tmp_path / "w", notify=notify)

    with pytest.raises(StoppedError):
        whole(stop)
    said = []
    resumed = whole(said.append)
    assert not any(line.startswith(("pass 1 ", "pass 2 ")) for line in said)
    assert resumed.bundle.contents == straight.bundle.contents
