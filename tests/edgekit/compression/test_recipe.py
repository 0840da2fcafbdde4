"""Recipes: TOML there and back, and one clear error for every mistake."""

import pytest

from edgekit.compression import recipe
from edgekit.compression.recipe import Step, parse, read, to_toml
from edgekit.errors import EdgekitError
from edgekit.passes.cluster import Cluster
from edgekit.passes.structured_prune import StructuredPrune

GOOD = """
[[pass]]
name = "structured_prune"
keep = { heads = 8, ff_dim = 64 }

[[pass]]
name = "cluster"
bits = 4
learning_rate = 1
include = ["blocks.*", "classifier.*"]
"""


def write(tmp_path, text):
    (tmp_path / "recipe.toml").write_text(text)
    return tmp_path / "recipe.toml"


def test_a_recipe_becomes_passes(tmp_path):
    first, second = (step.build() for step in read(write(tmp_path, GOOD)))
    assert first == StructuredPrune(keep={"heads": 8, "ff_dim": 64})
    assert second == Cluster(bits=4, learning_rate=1.0, include=("blocks.*", "classifier.*"))
    assert isinstance(second.learning_rate, float)
    assert isinstance(second.include, tuple)


def test_toml_there_and_back(tmp_path):
    steps = read(write(tmp_path, GOOD))
    assert read(write(tmp_path, to_toml(steps))) == steps
    from_python = [Step("cluster", {"bits": 3, "include": ("a*",)})]
    assert [step.build() for step in parse(recipe.to_tables(from_python), "x")] == [Cluster(bits=3, include=("a*",))]


MISTAKES = {
    "no passes": ("", "no passes"),
    "not a list": ("pass = 3", "no passes"),
    "key outside": ('passes = 1\n[[pass]]\nname = "cluster"\nbits = 4', "unknown key 'passes'.*did you mean 'pass'"),
    "no name": ("[[pass]]\nbits = 4", "pass 1 has no name.*cluster"),
    "unknown pass": ('[[pass]]\nname = "clustr"\nbits = 4', "unknown pass 'clustr'.*did you mean 'cluster'"),
    "unknown parameter": ('[[pass]]\nname = "cluster"\nbit = 4', "unknown parameter 'bit'.*did you mean 'bits'"),
    "missing parameter": ('[[pass]]\nname = "cluster"', "parameter 'bits' is missing"),
    "text for a number": ('[[pass]]\nname = "cluster"\nbits = "4"', "bits = '4'; expected a whole number"),
    "fraction for a whole number": ('[[pass]]\nname = "cluster"\nbits = 4.0', "bits = 4.0; expected a whole number"),
    "truth for a number": ('[[pass]]\nname = "cluster"\nbits = true', "bits = True; expected a whole number"),
    "truth for a fraction": ('[[pass]]\nname = "magnitude_prune"\nsparsity = true', "True; expected a number"),
    "text for a list": ('[[pass]]\nname = "cluster"\nbits = 4\ninclude = "a"', "include = 'a'; expected an array"),
    "number in a list": ('[[pass]]\nname = "cluster"\nbits = 4\ninclude = ["a", 1]', r"include\[1\] = 1"),
    "number for a table": ('[[pass]]\nname = "structured_prune"\nkeep = 8', "keep = 8; expected a table"),
    "fraction in a table": ('[[pass]]\nname = "structured_prune"\nkeep = {heads = 2.5}', "keep.heads = 2.5"),
    "out of range": ('[[pass]]\nname = "cluster"\nbits = 9', "bits = 9; expected 1 to 8"),
    "not a number at all": ('[[pass]]\nname = "magnitude_prune"\nsparsity = nan', "sparsity = nan"),
    "no learning": ('[[pass]]\nname = "cluster"\nbits = 4\nlearning_rate = -1', "learning_rate = -1"),
    "not TOML": ("[[pass]\nname", "not valid TOML"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_error_that_names_file_and_thing(text, words, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(EdgekitError, match=words) as caught:
        read(path)
    assert str(caught.value).startswith(str(path)) or f" in {path}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_not_text(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path, words in (
        (tmp_path / "none.toml", "no such recipe"),
        (tmp_path, "no such recipe"),
        (tmp_path / "binary.toml", "not valid TOML"),
    ):
        with pytest.raises(EdgekitError, match=words):
            read(path)


def test_passes_and_parameters_are_known_by_their_old_names():
    half = {"name": "half", "kind": "bf16"}
    values = {"pass": [{"name": "quantise", "bits": 4}, {"name": "static_int8", "form": "s8s8"}, half]}
    first, second, third = recipe.parse(values, "old.toml")
    assert dict(third.parameters) == {"dtype": "bf16"}
    assert (first.name, dict(second.parameters)) == ("quantize", {"scheme": "s8s8"})


@pytest.mark.parametrize("content", [b"a = " + b"[" * 100_000, b"\xff", b"a = 9" + b"9" * 5000, b"\0"])
def test_a_file_that_breaks_the_parser_is_one_line(content, tmp_path):
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(EdgekitError, match=r"x\.toml: ") as caught:
        read(tmp_path / "x.toml")
    assert "\n" not in str(caught.value)
