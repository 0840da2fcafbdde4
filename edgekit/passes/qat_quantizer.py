"""Tell torchao which values of a captured network to round and how: the products of `static_int8`, in its two
schemes."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
PRODUCTS = (aten.linear.default, *CONVOLUTIONS)
NORMALISATION = aten.batch_norm.default
RECTIFIERS = (aten.relu.default, aten.relu_.default)
AVERAGING = 0.01  # of an activation's running range: about the last hundred batches
PRESENT = 1.0  # of a weight's range: the range that it has now


class Int8Quantizer(Quantizer):  # type: ignore[misc]
    """Rounds the weights with these names, with one scale per output channel, and the activations that they
    multiply."""

    def __init__(self, scheme: str, weight_bits: int, names: Collection[str]) -> None:
        super().__init__()
        self.scheme, self.names = scheme, frozenset(names)
        running = {"observer": MovingAverageMinMaxObserver, "averaging_constant": AVERAGING}
        dtype, low, high, granularity = (
            (torch.int8, -127, 127, torch.per_tensor_symmetric)
            if scheme == "s8s8"
            else (torch.uint8, 0, 255, torch.per_tensor_affine)
        )
        self.activation = QuantizationSpec(dtype, FakeQuantize.with_args(**running), low, high, granularity)
        widest = 2 ** (weight_bits - 1) - 1
        present = {"observer": MovingAveragePerChannelMinMaxObserver, "averaging_constant": PRESENT}
        self.weight = QuantizationSpec(
            torch.int8, FakeQuantize.with_args(**present), -widest, widest, torch.per_channel_symmetric, ch_axis=0
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.target in PRODUCTS and node.args[1].op == "get_attr" and node.args[1].target in self.names:
                inputs = {node.args[0]: self.activation, node.args[1]: self.weight}
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(inputs, _annotated=True)
        if self.scheme == "u8s8":
            for node in list(model.graph.nodes):
                if node.target in CONVOLUTIONS and Q_ANNOTATION_KEY in node.meta:
                    self._round_output(node)
        return model

    def _round_output(self, node: Node) -> None:
        """Round the output of a convolution too, because CPUs have no integer convolution with a float32 result. The
        rounding comes after the normalization and the rectifier that are fused with the convolution."""
        last = node
        for following in ((NORMALISATION,), RECTIFIERS):
            consumers = list(last.users)
            if len(consumers) == 1 and consumers[0].target in following:
                last = consumers[0]
        if any(consumer.op == "output" for consumer in last.users):
            return
        known = last.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation(_annotated=True))
        known.output_qspec = self.activation

    def validate(self, model: GraphModule) -> None:
        """Accept every model: `annotate` requests nothing that torchao cannot do."""
