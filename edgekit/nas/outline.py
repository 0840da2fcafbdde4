"""The operators that ONNX Runtime would run for an architecture, written down without building, exporting or running
the network: some thousand architectures a second.

They are those of the exported graph after the runtime's own fusions (`edgekit.cost.profiled.optimized_work`), without
operators that only compute sizes. Parameters, multiply-accumulates, activations and time all follow from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from onnx import TensorProto

from edgekit.cost.memory import peak
from edgekit.cost.operators import Operator, Workload
from edgekit.graph.shapes import Value
from edgekit.nn.hiera_config import STEMS, Entry, HieraConfig

FLOAT = 4  # bytes


@dataclass(frozen=True, slots=True)
class Outline:
    """What one call at a batch size costs. parameters: stored numbers of the network with fused convolutions; macs:
    multiply-accumulates of products and convolutions, those of attention included; activations: most bytes that are
    alive at once."""

    work: Workload
    parameters: int
    macs: int
    activations: int


def outline(config: HieraConfig, batch: int = 1) -> Outline:
    """Return the operators of a network with fused convolutions, and their sums."""
    writer = _Writer(batch)
    image = writer.value((batch, config.channels, config.image, config.image))
    x = _stem(writer, config, image)
    first = config.first_attention
    for stage in range(first):
        for number in range(config.depths[stage]):
            x = _convolution(writer, config, stage, number, x)
    if first < len(config.depths):
        x = _enter_attention(writer, config, x)
    for stage in range(first, len(config.depths)):
        for number in range(config.depths[stage]):
            x = _attention(writer, config, stage, number, x)
    x = writer.rows("ReduceMean", x, (batch, config.widths[-1]))
    x = writer.normalized(x)
    logits = writer.product(x, config.classes)
    work = Workload(tuple(writer.operators), writer.values, {}, (image,), (logits,), ())
    macs = sum(item.operations for item in work.operators if item.product) / 2
    return Outline(work, writer.parameters, round(macs), round(peak(work)[0]))


def costs_of(found: Outline) -> dict[str, float]:
    """Return what [limits] may limit and needs no clock."""
    return {"parameters": found.parameters, "macs": found.macs, "activations": found.activations}


@dataclass(slots=True)
class _Writer:
    """Appends operators in the order in which they run. Methods take and return names of activations."""

    batch: int
    operators: list[Operator] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    parameters: int = 0

    def value(self, shape: tuple[int, ...]) -> str:
        name = f"v{len(self.values)}"
        self.values[name] = Value(shape, TensorProto.FLOAT)
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values[name].shape

    def add(
        self, op_type: str, inputs: tuple[str, ...], shape: tuple[int, ...], *, operations: int, weights: int = 0,
        matrices: int = 1, inner: int = 1, columns: int = 1, product: bool = False, outputs: int = 1,
    ) -> str:  # fmt: skip
        """shape: of the output; weights: stored numbers that it reads; outputs: it is written in so many equal parts,
        which count as one."""
        name = self.value(shape)
        read = FLOAT * sum(self.values[item].count for item in inputs)
        written = FLOAT * self.values[name].count
        self.parameters += weights
        self.operators.append(
            Operator(
                f"{op_type}{len(self.operators)}", op_type, float(operations), "float32", product, matrices, inner,
                columns, inputs, (name,), {"float32": float(read)}, {"float32": float(written)},
                {"float32": float(FLOAT * weights)} if weights else {},
            )
        )  # fmt: skip
        return name

    def rows(self, op_type: str, x: str, shape: tuple[int, ...]) -> str:
        """A reduction to this shape."""
        return self.add(op_type, (x,), shape, operations=self.values[x].count, matrices=_count(shape))

    def pointwise(self, op_type: str, inputs: tuple[str, ...], *, weights: int = 0) -> str:
        shape = self.shape(inputs[0])
        return self.add(op_type, inputs, shape, operations=_count(shape), weights=weights, matrices=_count(shape[:-1]))

    def moved(self, op_type: str, x: str, shape: tuple[int, ...]) -> str:
        """The same numbers in another order, or in several parts."""
        return self.add(
            op_type, (x,), shape, operations=0, matrices=1 if op_type == "Transpose" else _count(shape[:-1])
        )

    def view(self, x: str, shape: tuple[int, ...]) -> str:
        """The same numbers under another shape, or a part of what was split: no kernel runs, and the memory is x's."""
        name = self.value(shape)
        operator = Operator(
            f"Reshape{len(self.operators)}", "Reshape", 0.0, "float32", False, 1, 1, 1, (x,), (name,), {}, {}, {}, True
        )
        self.operators.append(operator)
        return name

    def normalized(self, x: str) -> str:
        return self.pointwise("LayerNormalization", (x,), weights=2 * self.shape(x)[-1])

    def product(self, x: str, columns: int, then: str = "Add") -> str:
        """A linear layer over the last axis; `then` adds its bias: Add, or BiasGelu."""
        *rows, inner = self.shape(x)
        y = self.add(
            "MatMul", (x,), (*rows, columns), operations=2 * _count(rows) * inner * columns, weights=inner * columns,
            inner=inner, columns=columns, product=True,
        )  # fmt: skip
        return self.pointwise(then, (y,), weights=columns)

    def convolved(
        self, x: str, out: int, kernel: int, stride: int = 1, padding: int | None = None, groups: int = 1,
        adds: str | None = None,
    ) -> str:  # fmt: skip
        """A convolution with its bias and activation; adds: an input that the same kernel adds to the result."""
        _, channels, side, _ = self.shape(x)
        new = (side + 2 * (kernel // 2 if padding is None else padding) - kernel) // stride + 1
        inner = channels // groups * kernel * kernel
        return self.add(
            "Conv", (x,) if adds is None else (x, adds), (self.batch, out, new, new),
            operations=2 * self.batch * out * new * new * inner, weights=out * (inner + 1), matrices=groups,
            inner=inner, columns=out // groups, product=True,
        )  # fmt: skip


def _count(shape: tuple[int, ...] | list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _stem(writer: _Writer, config: HieraConfig, x: str) -> str:
    kernels = STEMS[config.stem]
    for number, (kernel, stride, padding) in enumerate(kernels):
        out = config.width if number + 1 == len(kernels) else max(8, config.width // 2)
        x = writer.convolved(x, out, kernel, stride, padding)
    return x


def _convolution(writer: _Writer, config: HieraConfig, stage: int, number: int, x: str) -> str:
    entry, kind = config.entry(stage, number), config.kinds[stage]
    stride = 2 if entry.pool else 1
    adds = x if entry.channels == entry.out and stride == 1 else None
    if kind == "rep":
        return writer.convolved(x, entry.out, 3, stride)
    if kind == "separable":
        y = writer.convolved(x, entry.channels, 3, stride, groups=entry.channels)
        y = writer.convolved(y, entry.out, 1)
        return y if adds is None else writer.pointwise("Add", (y, adds))
    inner = entry.channels * config.ratios[stage]
    y = writer.convolved(x, inner, 1)
    y = writer.convolved(y, inner, 3, stride, groups=inner)
    return writer.convolved(y, entry.out, 1, adds=adds)


def _enter_attention(writer: _Writer, config: HieraConfig, x: str) -> str:
    """From an image of features to tokens ordered by mask unit."""
    first = config.first_attention
    if first:
        x = writer.convolved(x, config.widths[first], 3, 2 if config.pools[first - 1] else 1)
    batch, width, side, _ = writer.shape(x)
    x = writer.moved("Transpose", x, (batch, side * side, width))
    x = writer.pointwise("Add", (x,), weights=side * side * width)
    x = writer.moved("Transpose", x, (batch, side * side, width))
    return writer.view(x, (batch, config.units, config.mask_unit**2, width))


def _attention(writer: _Writer, config: HieraConfig, stage: int, number: int, x: str) -> str:
    entry, batch = config.entry(stage, number), writer.batch
    if config.kinds[stage] == "levit":
        return _levit(writer, config, entry, config.ratios[stage], x)
    left = entry.tokens // 4 if entry.pool else entry.tokens
    normed = writer.normalized(x)
    mixed = _mixed(writer, config, entry, normed, between_units=config.attention(stage, number) != "window")
    mixed = writer.product(mixed, entry.out)
    if entry.channels != entry.out:
        x = writer.product(normed, entry.out)
        x = _pooled(writer, x, entry) if entry.pool else x
    x = writer.pointwise("Add", (mixed, x))
    inner = writer.product(writer.normalized(x), config.ratios[stage] * entry.out, "BiasGelu")
    assert writer.shape(x) == (batch, entry.units, left, entry.out)
    return writer.pointwise("Add", (writer.product(inner, entry.out), x))


def _mixed(writer: _Writer, config: HieraConfig, entry: Entry, x: str, *, between_units: bool) -> str:
    """The weighted sums of values, before the last linear layer."""
    batch, units, tokens = writer.batch, entry.units, entry.tokens
    heads, width = entry.out // config.head_dim, config.head_dim
    left = tokens // 4 if entry.pool else tokens
    groups = (batch, units) if between_units else (batch * units, 1)
    together = writer.product(x, 3 * entry.out)
    parts = writer.moved("Split", together, (3, batch, units, tokens, entry.out))
    query = writer.view(parts, (batch, units, tokens, entry.out))
    query = _pooled(writer, query, entry) if entry.pool else query
    query = writer.pointwise("Mul", (query,), weights=0)
    rows, keys = groups[1] * left, groups[1] * tokens
    query = writer.moved("Transpose", query, (groups[0], heads, rows, width))
    key, value = (
        writer.moved(
            "Transpose", writer.view(parts, (batch, units, tokens, entry.out)), (groups[0], heads, keys, width)
        )
        for _ in range(2)
    )
    mixed = _weighted(writer, query, key, value)
    mixed = writer.moved("Transpose", mixed, (groups[0], rows, entry.out))
    return writer.view(mixed, (batch, units, left, entry.out))


def _weighted(writer: _Writer, query: str, key: str, value: str) -> str:
    """The weighted sums of values. All three are (images or units, heads, tokens, width)."""
    images, heads, rows, inner = writer.shape(query)
    keys, width = writer.shape(value)[2:]
    matrices = images * heads
    scores = writer.add(
        "MatMul", (query, key), (images, heads, rows, keys), operations=2 * matrices * rows * keys * inner,
        matrices=matrices, inner=inner, columns=keys, product=True,
    )  # fmt: skip
    scores = writer.pointwise("Softmax", (scores,))
    return writer.add(
        "MatMul", (scores, value), (images, heads, rows, width), operations=2 * matrices * rows * keys * width,
        matrices=matrices, inner=keys, columns=width, product=True,
    )  # fmt: skip


def _levit(writer: _Writer, config: HieraConfig, entry: Entry, ratio: int, x: str) -> str:
    batch, units, tokens, heads = writer.batch, entry.units, entry.tokens, entry.out // config.head_dim
    left = tokens // 4 if entry.pool else tokens
    asked = x
    if entry.pool:
        asked = writer.moved("Gather", x, (batch, units, left, entry.channels))
    query = writer.pointwise("Mul", (writer.product(asked, entry.out // 2),))
    q, k, v = (
        writer.moved("Transpose", part, (batch, heads, units * count, writer.shape(part)[-1] // heads))
        for part, count in (
            (query, left), (writer.product(x, entry.out // 2), tokens), (writer.product(x, entry.out), tokens),
        )
    )  # fmt: skip
    mixed = writer.moved("Transpose", _weighted(writer, q, k, v), (batch, units, left, entry.out))
    y = writer.product(_hardswish(writer, mixed), entry.out)
    x = writer.pointwise("Add", (x, y)) if entry.channels == entry.out else y
    inner = _hardswish(writer, writer.product(x, ratio * entry.out))
    return writer.pointwise("Add", (x, writer.product(inner, entry.out)))


def _hardswish(writer: _Writer, x: str) -> str:
    return writer.pointwise("Mul", (writer.pointwise("HardSigmoid", (x,)), x))


def _pooled(writer: _Writer, x: str, entry: Entry) -> str:
    """The largest of four neighbours."""
    batch, units, tokens, width = writer.shape(x)
    return writer.rows("ReduceMax", x, (batch, units, tokens // 4, width))
