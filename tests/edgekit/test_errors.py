"""Errors name the thing, the value, what is allowed and the next step."""

from edgekit.errors import EdgekitError, missing_extra, unknown


def test_unknown_names_what_is_allowed_and_the_nearest():
    error = unknown("pass", "clustr", ["cluster", "quantize"], where="recipe.toml")
    assert isinstance(error, EdgekitError)
    assert str(error) == (
        "unknown pass 'clustr' in recipe.toml; expected one of: cluster, quantize; did you mean 'cluster'?"
    )


def test_unknown_without_anything_near():
    assert str(unknown("metric", 7, ["log-loss"])) == "unknown metric '7'; expected one of: log-loss"


def test_missing_extra_gives_the_line_that_installs_it():
    assert "pip install 'edgekit[onnx]'" in str(missing_extra("onnx", "onnx", "export to ONNX"))
