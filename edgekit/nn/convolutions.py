"""Blocks of convolutions with batch normalization: inverted bottlenecks (Sandler et al. 2018, arXiv 1801.04381),
depthwise-separable convolutions (Howard et al. 2017, arXiv 1704.04861), and branches that become one convolution for
inference (Ding et al. 2021, "RepVGG", arXiv 2101.03697)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval


class ConvNorm(nn.Module):
    """A convolution and its batch normalization, over (batch, channels, height, width)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.convolution(x))
        return found

    def fused(self) -> nn.Conv2d:
        """Return one convolution with the same result in evaluation mode."""
        return fuse_conv_bn_eval(self.convolution.eval(), self.norm.eval())


class Inverted(nn.Module):
    """1x1 to `ratio` times the width, depthwise 3x3, 1x1 back; added to the input if the shape is the same."""

    def __init__(self, channels: int, out: int, stride: int, ratio: int) -> None:
        super().__init__()
        inner = channels * ratio
        self.expand = ConvNorm(channels, inner, 1)
        self.depthwise = ConvNorm(inner, inner, 3, stride, groups=inner)
        self.project = ConvNorm(inner, out, 1)
        self.adds = channels == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))
        return x + y if self.adds else y


class Separable(nn.Module):
    """Depthwise 3x3, then 1x1; added to the input if the shape is the same."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.depthwise = ConvNorm(channels, channels, 3, stride, groups=channels)
        self.pointwise = ConvNorm(channels, out, 1)
        self.adds = channels == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.pointwise(F.relu(self.depthwise(x))))
        return x + y if self.adds else y


class Rep(nn.Module):
    """The sum of a 3x3 and a 1x1 convolution, and of the normalized input if the shape is the same."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.wide, self.narrow = ConvNorm(channels, out, 3, stride), ConvNorm(channels, out, 1, stride)
        self.identity = nn.BatchNorm2d(channels) if channels == out and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x) + self.narrow(x)
        return F.relu(y if self.identity is None else y + self.identity(x))

    def fused(self) -> nn.Sequential:
        """Return one 3x3 convolution and its ReLU with the same result in evaluation mode."""
        total, narrow = self.wide.fused(), self.narrow.fused()
        assert total.bias is not None
        assert narrow.bias is not None
        with torch.no_grad():
            total.weight += F.pad(narrow.weight, (1, 1, 1, 1))
            total.bias += narrow.bias
            if self.identity is not None:
                norm = self.identity.eval()
                assert norm.running_var is not None
                assert norm.running_mean is not None
                scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                channel = torch.arange(len(scale))
                total.weight[channel, channel, 1, 1] += scale
                total.bias += norm.bias - norm.running_mean * scale
        return nn.Sequential(total, nn.ReLU())
