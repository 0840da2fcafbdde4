"""Models of Hugging Face's transformers, from a folder with config.json and safetensors. The import downloads nothing
and runs no code of the folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from edgekit.errors import EdgekitError, missing_extra

try:
    import transformers
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "transformers", "transformers", "a Hugging Face folder") from None

FACTORY = "edgekit.nn.hugging_face:build"


class FirstOutput(nn.Module):
    """The model as a function of arrays that returns its first output, such as the logits."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, inputs

    def forward(self, *inputs: Tensor) -> Tensor:
        found: Tensor = self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]
        return found


def build(config: Mapping[str, Any], inputs: tuple[str, ...]) -> nn.Module:
    """Build a network with new random weights from the content of config.json."""
    return FirstOutput(model_class(config)(configuration(config)), tuple(inputs))


def configuration(config: Mapping[str, Any]) -> Any:
    """Return transformers' own configuration object. It selects the eager attention, which every exporter and the
    dependency graph can read."""
    values = {name: value for name, value in config.items() if name not in ("model_type", "transformers_version")}
    try:
        return transformers.AutoConfig.for_model(config["model_type"], **values, attn_implementation="eager")
    except (KeyError, ValueError, TypeError) as error:
        raise EdgekitError(
            f"config.json: transformers {transformers.__version__} cannot read it ({str(error).splitlines()[0]})"
        ) from None


def model_class(config: Mapping[str, Any]) -> Any:
    """Return the class that config.json names, which must be one of transformers' own."""
    names = config.get("architectures") or []
    found = getattr(transformers, names[0], None) if len(names) == 1 else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise EdgekitError(
            f"config.json: architectures = {names}; expected one class of transformers {transformers.__version__}"
        )
    return found
