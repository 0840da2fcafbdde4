"""Which values of a captured network torchao is to round, and how: the products of `static_int8`, in its two forms."""

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
PRESENT = 1.0  # of a weight's: the range it has now


class Int8Quantiser(Quantizer):  # type: ignore[misc]
    """Rounds weights of these names, one scale per output channel, and what they are multiplied with."""

    def __init__(self, form: str, weight_bits: int, names: Collection[str]) -> None:
        super().__init__()
        self.form, self.names = form, frozenset(names)
        running = {"observer": MovingAverageMinMaxObserver, "averaging_constant": AVERAGING}
        kind, low, high, scheme = (
            (torch.int8, -127, 127, torch.per_tensor_symmetric)
            if form == "s8s8"
            else (torch.uint8, 0, 255, torch.per_tensor_affine)
        )
        self.activation = QuantizationSpec(kind, FakeQuantize.with_args(**running), low, high, scheme)
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
        if self.form == "u8s8":
            for node in list(model.graph.nodes):
                if node.target in CONVOLUTIONS and Q_ANNOTATION_KEY in node.meta:
                    self._round_output(node)
        return model

    def _round_output(self, node: Node) -> None:
        """The CPU has no integer convolution with a float32 result: it is rounded as well, behind the normalisation and
        the rectifier that are computed with it."""
        last = node
        for following in ((NORMALISATION,), RECTIFIERS):
            readers = list(last.users)
            if len(readers) == 1 and readers[0].target in following:
                last = readers[0]
        if any(reader.op == "output" for reader in last.users):
            return
        known = last.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation(_annotated=True))
        known.output_qspec = self.activation

    def validate(self, model: GraphModule) -> None:
        """Nothing that torchao could not do has been asked for."""
