"""Published networks of other projects, with random weights: development-only peers of `edgekit search`.

They come from timm and fastervit, whose licences do not all allow use in a product, so they are neither dependencies
nor in the environment of the project: a folder of their own holds them.

    pip install --no-deps --target FOLDER timm==1.0.31 fastervit==1.0.0
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

PEERS = ("timm==1.0.31", "fastervit==1.0.0")
# timm imports parts of torchvision that these networks do not use, and torchvision has no build for each torch
UNUSED = (
    "", ".datasets", ".models", ".models.feature_extraction", ".ops", ".ops.misc", ".transforms",
    ".transforms.functional", ".utils",
)  # fmt: skip
FULL = {
    "EfficientViT-B2": "efficientvit_b2", "EfficientFormerV2-S2": "efficientformerv2_s2", "LeViT-384": "levit_384",
    "RepViT-M1.5": "repvit_m1_5", "MobileViTv2-2.0": "mobilevitv2_200",
}  # fmt: skip
FAMILIES = ("EfficientViT", "EfficientFormerV2", "LeViT", "RepViT", "FasterViT", "MobileViTv2")
STEPS = [n / 32 for n in range(1, 65)]  # of the width multiplier


def use(folder: Path) -> dict[str, str]:
    """Make the peers importable, and return their versions. Ends the program if they are not in the folder."""
    sys.path.append(str(folder))
    try:
        importlib.import_module("torchvision")
    except ImportError:
        for part in UNUSED:
            sys.modules[f"torchvision{part}"] = MagicMock(__spec__=None)
    try:
        importlib.import_module("timm")
        importlib.import_module("fastervit.models.faster_vit")
    except ImportError as error:
        raise SystemExit(
            f"{folder}: {error}; install the peers there: pip install --no-deps --target {folder} {' '.join(PEERS)}"
        ) from None
    finally:  # torch's exporter registers what torchvision has, if it is there
        for name in [name for name, module in sys.modules.items() if isinstance(module, MagicMock)]:
            del sys.modules[name]
    versions = importlib.import_module("importlib.metadata").version
    return {name: versions(name) for name in ("timm", "fastervit")}


def full(name: str) -> nn.Module:
    """Return a published network for 224x224 colour images and 1000 classes, in evaluation mode."""
    if name == "FasterViT-0":
        model = importlib.import_module("fastervit.models.faster_vit").faster_vit_0_224()
    else:
        model = importlib.import_module("timm").create_model(FULL[name])
    found: nn.Module = model.eval()
    if hasattr(found, "fuse"):  # RepViT's branches become one convolution, LeViT's normalizations disappear
        found.fuse()
    return found


def macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the multiply-accumulates of one input, those of attention included."""
    training = model.training
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    model.train(training)
    return int(counted.get_total_flops()) // 2


def scaled(family: str, image: int, classes: int, most: float, *, late: bool) -> Callable[[], nn.Module] | None:
    """Return a builder of the widest network of a family that takes at most `most` multiply-accumulates of a grey
    image, None if the narrowest takes more. late: the first convolution keeps the side, which a small image may need;
    it is halved otherwise, as in the published networks."""
    widest = None
    for width in STEPS:
        try:
            found = macs(_scaled(family, image, classes, width, late=late), (1, image, image))
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError):  # these widths do not fit together
            continue
        if found > most:
            break
        widest = width
    return None if widest is None else functools.partial(_scaled, family, image, classes, widest, late=late)


def _scaled(family: str, image: int, classes: int, width: float, *, late: bool) -> nn.Module:
    """The smallest published depths of the family, with this multiple of their widths."""

    def wide(*channels: int, step: int = 8) -> tuple[int, ...]:
        return tuple(max(step, round(n * width / step) * step) for n in channels)

    def module(name: str) -> Any:
        return importlib.import_module(f"timm.models.{name}")

    seen = 2 * image if late else image  # the image whose sizes the network has behind its first convolution
    common = {"in_chans": 1, "num_classes": classes}
    model: nn.Module
    if family == "EfficientViT":  # B0
        model = module("efficientvit_mit").EfficientVit(
            widths=wide(8, 16, 32, 64, 128), depths=(1, 2, 2, 2, 2), head_dim=min(16, *wide(64)),
            head_widths=wide(1024, 1280), **common,
        )  # fmt: skip
        first = model.stem.in_conv.conv
    elif family == "EfficientFormerV2":  # S0
        theirs = module("efficientformer_v2")
        model = theirs.EfficientFormerV2(
            theirs.EfficientFormer_depth["S0"], img_size=seen, embed_dims=wide(*theirs.EfficientFormer_width["S0"]),
            num_vit=2, mlp_ratios=theirs.EfficientFormer_expansion_ratios["S0"], distillation=False, **common,
        )  # fmt: skip
        first = model.stem.conv1.conv
    elif family == "LeViT":  # 128S
        heads = tuple(max(1, round(n * width)) for n in (4, 6, 8))
        model = module("levit").Levit(
            seen, embed_dim=wide(128, 256, 384), key_dim=16, num_heads=heads, depth=(2, 3, 4), **common
        )
        first = model.stem.conv1.linear
    elif family == "RepViT":  # M0.9
        model = module("repvit").RepVit(
            img_size=seen, embed_dim=wide(48, 96, 192, 384), depth=(2, 2, 14, 2), distillation=False, **common
        )
        first = model.stem.conv1.c
    elif family == "FasterViT":  # 0
        (dim,) = wide(64)
        model = importlib.import_module("fastervit.models.faster_vit").FasterViT(
            dim=dim, in_dim=dim, depths=[2, 3, 6, 5], num_heads=[2, 4, 8, 16], ct_size=2, mlp_ratio=4,
            window_size=[7, 7, max(1, seen // 16), max(1, seen // 32)], resolution=seen, **common,
        )  # fmt: skip
        first = model.patch_embed.conv_down[0]
    else:  # MobileViTv2
        cfg = module("mobilevit")._mobilevitv2_cfg(width)
        model = module("byobnet").ByobNet(cfg, **common)
        first = model.stem.conv
    if late:
        assert first.stride == (2, 2), family
        first.stride = (1, 1)
    return model
