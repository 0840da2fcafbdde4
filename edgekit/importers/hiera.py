"""A folder of transformers with a published Hiera becomes a network of edgekit's own: it runs without transformers, and
its attention in four axes exports to every runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgekit.bundle.format import Bundle, Manifest, assemble
from edgekit.bundle.synthetic import candidates
from edgekit.bundle.tensors import Arrays, TensorSpec
from edgekit.errors import EdgekitError
from edgekit.importers.base import GOLDEN_ROWS
from edgekit.nn.hiera_config import HieraConfig, arguments

if TYPE_CHECKING:
    from torch import Tensor

# what edgekit's network has as the authors' have it; a folder with other values is imported as transformers' network
FIXED = {
    "patch_size": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3], "query_stride": [2, 2],
    "embed_dim_multiplier": 2.0, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip


def own_config(config: Mapping[str, Any]) -> HieraConfig | None:
    """Return the arguments of edgekit's network for a config.json that was checked; None if it has none for it."""
    if config.get("model_type") != "hiera" or config.get("architectures") != ["HieraForImageClassification"]:
        return None
    from edgekit.nn.hugging_face import configuration

    values = configuration(config).to_dict()  # with the values that a file leaves out
    try:
        stages = len(values["depths"])
        side, unit = values["image_size"][0], values["masked_unit_size"][0]
        width, heads, ratio = values["embed_dim"], values["num_heads"], values["mlp_ratio"]
        same = (
            all(values[name] == value for name, value in FIXED.items())
            and values["num_query_pool"] == stages - 1
            and (values["image_size"], values["masked_unit_size"]) == ([side, side], [unit, unit])
            and heads == [heads[0] << stage for stage in range(stages)]
            and ratio == int(ratio)
        )
        if not same:
            return None
        kinds = tuple("window" if local else "global" for local in values["masked_unit_attention"])
        return HieraConfig(
            tuple(values["depths"]), kinds, (int(ratio),) * stages, (True,) * (stages - 1), width, width // heads[0],
            unit, "conv7", side, values["num_channels"], len(config["id2label"]) if "id2label" in config else 2,
        )  # fmt: skip
    except (TypeError, LookupError, ZeroDivisionError, ValueError, OverflowError):
        return None  # the general importer says what is wrong


def bundle_of(config: HieraConfig, weights: Mapping[str, Tensor], golden: Arrays | None) -> Bundle:
    """Return the bundle of a network with these weights of transformers."""
    import torch

    from edgekit.nn import hiera

    model = hiera.build(**arguments(config)).eval()
    try:
        model.load_state_dict(hiera.from_transformers(weights, config.depths))
    except RuntimeError as error:
        raise EdgekitError(
            f"the safetensors are not those of config.json: {str(error).splitlines()[-1].strip()}"
        ) from None
    image = TensorSpec("pixel_values", ("batch", config.channels, config.image, config.image))
    manifest = Manifest(
        name="hiera", family="hiera", arguments=arguments(config), inputs=(image,),
        outputs=(TensorSpec("logits", ("batch", config.classes)),),
    )  # fmt: skip
    inputs = golden or next(iter(candidates(manifest.inputs, GOLDEN_ROWS, {})))
    with torch.no_grad():
        found = model(torch.from_numpy(inputs["pixel_values"])).numpy()
    stored = {name: value.numpy() for name, value in model.state_dict().items()}
    return assemble(replace(manifest, synthetic=golden is None), stored, {}, (dict(inputs), {"logits": found}))
