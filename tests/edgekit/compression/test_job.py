"""The key of a job covers everything on which a state depends, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from edgekit.compression.job import versions
from edgekit.targets import profile


def test_the_same_job_has_the_same_key_whatever_its_recipe(tiny_job):
    assert tiny_job([]).key() == tiny_job([("cluster", {})]).key()


def changed_rows(job):
    data = job.test.take(np.arange(len(job.test)))
    data.inputs["light_curve"][0, 0, 0] += 1
    return replace(job, test=data)


def reshaped_rows(job):
    data = job.test.take(np.arange(len(job.test)))
    inputs = {name: array.reshape(len(data), 2, 12) for name, array in data.inputs.items()}
    return replace(job, test=replace(data, inputs=inputs))


CHANGES = {
    "seed": lambda job: replace(job, seed=1),
    "metric": lambda job: replace(job, metric="error-rate"),
    "runtime": lambda job: replace(job, runtime="torch"),
    "limits": lambda job: replace(job, limits=replace(job.limits, min_gain=0.5)),
    "agree": lambda job: replace(job, agree=("torch",)),
    "replay": lambda job: replace(job, replay=True),
    "target": lambda job: replace(job, target=profile.find("jetson-nano")),
    "fewer rows": lambda job: replace(job, train=job.train.take(np.arange(9))),
    "one number of one row": changed_rows,
    "the same numbers in another shape": reshaped_rows,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_setting_changes_the_key(change, tiny_job):
    assert change(tiny_job([])).key() != tiny_job([]).key()


def test_a_target_that_is_elsewhere_is_estimated(tiny_job):
    assert not tiny_job([]).estimated
    assert tiny_job([], target=profile.find("jetson-nano")).estimated


def test_versions_name_what_is_installed():
    assert {"python", "edgekit", "torch", "numpy"} <= set(versions())
