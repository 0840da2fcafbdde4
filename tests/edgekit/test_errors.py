"""Errors name the thing, the value, what is allowed and the next step."""

import pytest

from edgekit.errors import EdgekitError, missing_extra, unknown


def test_unknown_names_what_is_allowed_and_the_nearest():
    error = unknown("pass", "clustr", ["cluster", "quantize"], where="recipe.toml")
    assert isinstance(error, EdgekitError)
    assert str(error) == (
        "unknown pass 'clustr' in recipe.toml; expected one of: cluster, quantize; did you mean 'cluster'?"
    )


@pytest.mark.parametrize(("name", "hint"), [("p40", "; did you mean 'tesla-p40'?"), ("p50", ""), ("", "")])
def test_unknown_suggests_a_name_that_contains_the_text(name, hint):
    said = str(unknown("target", name, ["h200", "tesla-p40"]))
    assert said == f"unknown target {name!r}; expected one of: h200, tesla-p40{hint}"


def test_unknown_without_anything_near():
    assert str(unknown("metric", 7, ["log-loss"])) == "unknown metric '7'; expected one of: log-loss"


def test_missing_extra_gives_the_line_that_installs_it():
    assert "pip install 'edgekit[onnx]'" in str(missing_extra("onnx", "onnx", "export to ONNX"))
