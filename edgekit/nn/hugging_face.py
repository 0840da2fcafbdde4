"""Models of Hugging Face's transformers, from a folder with config.json and safetensors. The import downloads nothing
and runs no code of the folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from edgekit.bundle.bounded import LARGEST, limit
from edgekit.errors import EdgekitError, missing_extra

try:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
except ModuleNotFoundError as error:
    raise missing_extra(error.name or "transformers", "transformers", "a Hugging Face folder") from None

VERSION = transformers.__version__
FACTORY = "edgekit.nn.hugging_face:build"
MOST_LAYERS = 1_000  # of any real network, by the configurations' keys for a number of layers
MOST_MODULES = 100_000  # of a network; a mixture of 128 experts in 60 layers has a third of that
# keys that every model may have, beside those that its own configuration class declares
SHARED = frozenset(
    (
        "architectures",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "tie_word_embeddings",
        "is_decoder",
        "is_encoder_decoder",
        "chunk_size_feed_forward",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "sep_token_id",
        "cross_attention_hidden_size",
        "add_cross_attention",
        "tie_encoder_decoder",
        "finetuning_task",
        "pruned_heads",
    )
)
# keys that say how the model was saved
NOT_USED = frozenset(
    (
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_implementation",
        "auto_map",
        "quantization_config",
        "gradient_checkpointing",
    )
)
# keys that make transformers load something, and their values that load nothing
PARTS = (
    "auto_map",
    "quantization_config",
    "trust_remote_code",
    "custom_pipelines",
    "custom_generate",
    "backbone",
    "use_pretrained_backbone",
    "use_timm_backbone",
    "kernel_config",
    "use_kernels",
    "adapter_kwargs",
)
# keys that newer releases do not declare because only one of their values is left
OBSOLETE = {"position_embedding_type": "absolute"}
ATTENTION = ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation")
LOADERS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(PARTS, (None, False, "", {}, [])),
    **dict.fromkeys(ATTENTION, (None, "eager", "sdpa")),
}


class FirstOutput(nn.Module):
    """The model as a function of arrays that returns its first output, such as the logits."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, inputs

    def forward(self, *inputs: Tensor) -> Tensor:
        found: Tensor = self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]
        return found


class SentenceEmbedding(FirstOutput):
    """The model as a function of tokens that returns one vector for each text. Padding has no part in it."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], mode: str, normalize: bool) -> None:
        super().__init__(model, inputs)
        self.mode, self.normalize = mode, normalize

    def forward(self, *inputs: Tensor) -> Tensor:
        tokens = super().forward(*inputs)
        mask = inputs[self.names.index("attention_mask")].unsqueeze(-1).to(tokens.dtype)
        pooled = self._pooled(tokens, mask)
        if not self.normalize:
            return pooled
        length = (
            (pooled * pooled).sum(dim=-1, keepdim=True).sqrt()
        )  # ReduceL2, which torch's own writes, is not portable
        return pooled / length.clamp(min=1e-12)

    def _pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        if self.mode == "cls":
            return tokens[:, 0]
        if self.mode == "max":
            return tokens.masked_fill(mask == 0, -1e9).amax(dim=1)
        count = mask.sum(dim=1).clamp(min=1e-9)
        return (tokens * mask).sum(dim=1) / (count if self.mode == "mean" else count.sqrt())


def build(config: Mapping[str, Any], inputs: tuple[str, ...], pooling: str = "", normalize: bool = False) -> nn.Module:
    """Build a network with new random weights from the content of config.json. pooling: of a sentence model, mean, cls,
    max or mean_sqrt_len."""
    check_size(config)
    names = tuple(inputs)
    if not pooling:
        return FirstOutput(_constructed(config), names)
    if pooling not in ("mean", "cls", "max", "mean_sqrt_len") or "attention_mask" not in names:
        raise EdgekitError(
            f"pooling {str(pooling)[:30]!r} of {', '.join(names)}; expected one that edgekit import wrote"
        )
    return SentenceEmbedding(_constructed(config), names, pooling, normalize)


def check_size(config: Mapping[str, Any]) -> None:
    """Raise if the network of a configuration would take too much memory, or have more modules than any real one. The
    network is built without numbers: its parameters have shapes only."""
    for key, value in config.items():
        if key.endswith(("layers", "n_layer", "depth")) and isinstance(value, int) and value > MOST_LAYERS:
            raise EdgekitError(f"config.json: {key} = {value}; edgekit builds networks of up to {MOST_LAYERS:,} layers")
    modules = 0

    def count(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > MOST_MODULES:
            raise EdgekitError(f"config.json: its network has more than {MOST_MODULES:,} modules; it cannot be built")

    handle = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            model = _constructed(config)
    finally:
        handle.remove()
    numbers = sum(value.numel() for value in (*model.parameters(), *model.buffers()))
    allowed = limit(LARGEST)
    if 4 * numbers > allowed:
        raise EdgekitError(
            f"config.json: its network has {numbers:,} numbers, which take {4 * numbers:,} bytes, and edgekit takes up "
            f"to {allowed:,}; if you trust the model, raise the limit with: edgekit --read-limit SIZE COMMAND"
        )


def _constructed(config: Mapping[str, Any]) -> nn.Module:
    found, settings = model_class(config), configuration(config)
    try:
        model: nn.Module = found(settings)
    except EdgekitError:
        raise
    except Exception as error:  # any value that the class does not expect
        raise EdgekitError(f"config.json: {found.__name__} cannot be built from it ({_reason(error)})") from None
    return model


def configuration(config: Mapping[str, Any]) -> Any:
    """Return transformers' own configuration object, made of the keys that the model's class declares. It selects the
    eager attention, which every exporter and the dependency graph can read."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise EdgekitError(f"config.json: model_type = {str(model_type)[:60]!r}; transformers {VERSION} cannot read it")
    declared = set(inspect.signature(CONFIG_MAPPING[model_type].__init__).parameters) - {"self", "kwargs"}
    values, others = {}, {}
    for name, value in config.items():
        _refuse_loaders(name, value)
        if name in declared | SHARED:
            values[name] = value
        elif name not in NOT_USED and OBSOLETE.get(name) != value:
            others[name] = value
    try:
        found = transformers.AutoConfig.for_model(model_type, **values, attn_implementation="eager")
    except Exception as error:  # each class checks its values in its own way
        if not others:
            raise EdgekitError(f"config.json: transformers {VERSION} cannot read it ({_reason(error)})") from None
        found = None
    computed = found.to_dict() if found is not None else {}  # classes save values that they compute from the others
    for name, value in others.items():
        if name not in computed or computed[name] != value:
            raise EdgekitError(
                f"config.json: the key {name[:60]!r} is not one that transformers {VERSION} declares for "
                f"{model_type!r}; update transformers, or remove the key if the model does not need it"
            )
    return found


def _refuse_loaders(name: str, value: Any) -> None:
    """Raise if a key, or a key anywhere inside its value, makes transformers load code, kernels or another model."""
    if name in LOADERS and value not in LOADERS[name]:
        raise EdgekitError(
            f"config.json: {name} = {repr(value)[:60]} makes transformers load code or another model, "
            "which edgekit does not do; remove the key, or export the model to ONNX"
        )
    for inner, item in value.items() if isinstance(value, Mapping) else ():
        _refuse_loaders(str(inner), item)
    for item in value if isinstance(value, list) else ():
        _refuse_loaders("", item)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def model_class(config: Mapping[str, Any]) -> Any:
    """Return the class that config.json names, which must be one of transformers' own."""
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise EdgekitError(
            f"config.json: architectures = {repr(names)[:60]}; expected one class of transformers {VERSION}"
        )
    return found
