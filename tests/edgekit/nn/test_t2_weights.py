"""Reading published weights: the mapping, and files that are something else."""

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.nn.t2_weights import from_published


def published(bands=2, embed=32, ff=128, classes=14, seed=0):
    """Random arrays in the published layout."""
    rng = np.random.default_rng(seed)
    shapes = {
        "conv_embedding": (1, bands, embed),
        "ffn.0": (embed, ff),
        "ffn.1": (ff, embed),
        "classifier": (embed, classes),
    }
    shapes |= {f"att.{part}": (embed, embed) for part in ("query", "key", "value", "combine")}
    arrays = {f"{name}.kernel": rng.normal(size=shape) for name, shape in shapes.items()}
    arrays |= {f"{name}.bias": rng.normal(size=shape[-1]) for name, shape in shapes.items()}
    arrays |= {f"ln{n}.{part}": rng.normal(size=embed) for n in (1, 2) for part in ("gamma", "beta")}
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def test_every_array_finds_its_place_transposed():
    arrays = published(bands=6)
    model = from_published(arrays, context=2)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    assert model.config.bands == 6
    assert (model.config.heads, model.config.head_dim) == (16, 2)
    assert np.array_equal(state["embed.weight"], arrays["conv_embedding.kernel"][0].T)
    assert np.array_equal(state["blocks.0.expand.weight"], arrays["ffn.0.kernel"].T)
    assert np.array_equal(state["blocks.0.attention.combine.weight"], arrays["att.combine.kernel"].T)
    assert np.array_equal(state["blocks.0.norm2.weight"], arrays["ln2.gamma"])
    assert np.array_equal(state["blocks.0.norm1.bias"], arrays["ln1.beta"])
    # all different and all used: no two parameters were filled from one array
    assert sum(value.size for value in state.values()) == sum(value.size for value in arrays.values())
    assert len({value.tobytes() for value in state.values()}) == len(state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("att.key.bias"), "att.key.bias"),
        (lambda a: a.clear(), "and 19 more"),
        (lambda a: a["ffn.0.kernel"].__setitem__((3, 4), np.nan), "ffn.0.kernel.*NaN"),
        (lambda a: a.update({"ln1.gamma": np.ones(7, np.float32)}), "norm1"),
        (lambda a: a.update({"att.query.kernel": np.ones(32, np.float32)}), "att.query.kernel"),
        (lambda a: a.update({"ffn.1.kernel": np.ones((3, 128, 32), np.float32)}), r"\(3, 128, 32\)"),
        (lambda a: a.update({"ffn.0.bias": np.array(["x"] * 128)}), "ffn.0.bias"),
    ],
)
def test_what_is_not_a_published_weight_set_is_an_error_that_says_why(change, words):
    arrays = published()
    change(arrays)
    with pytest.raises(EdgekitError, match=words) as caught:
        from_published(arrays, context=0, source="weights.npz")
    assert str(caught.value).startswith("weights.npz: ")
    assert "\n" not in str(caught.value)
