"""Units of any torch network that can be removed together: channels by torch-pruning's dependency graph (DepGraph, Fang
et al. 2023, arXiv 2301.12900, section 3), attention heads by the names and sizes of the module's parts.

torch-pruning only says which positions of which tensors belong together; edgekit.nn.module.remove does the cutting."""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgekit.errors import EdgekitError, missing_extra
from edgekit.nn.module import ranges, remove

# Names of the parts of attention modules. A module with other names loses no heads, and the plan says so.
HEADS = ("num_heads", "n_heads", "heads", "n_head", "num_attention_heads")
GROUPS = ("num_kv_heads", "n_kv_heads", "kv_heads", "num_key_value_heads")
WIDTHS = ("attn_dim", "inner_dim", "all_head_size")
FUSED = ("qkv", "to_qkv", "in_proj", "qkv_proj")
SEPARATE = (
    ("q", "k", "v"), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"), ("query_proj", "key_proj", "value_proj"),
)  # fmt: skip
PROJECTIONS = {*FUSED, *(key for keys in SEPARATE for key in keys)}
LAST = ("proj", "out_proj", "o_proj", "out", "combine", "to_out", "wo", "output")

TensorAxis = tuple[str, int]  # a parameter or buffer, and an axis


@dataclass(frozen=True, slots=True)
class Group:
    """Units that are removed together. axes: for each tensor and axis, the positions that each unit takes; consumers:
    those of the weights that the units' outputs are multiplied with; counts: attributes, and how much a unit is of
    them; step: the units left must be a multiple of it; shares: runs of units that must stay equally many."""

    name: str
    category: str
    size: int
    axes: Mapping[TensorAxis, Sequence[Sequence[int]]]
    consumers: tuple[TensorAxis, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    step: int = 1
    shares: int = 1


def find_groups(model: nn.Module, example: list[Tensor], round_to: int) -> tuple[list[Group], dict[str, str]]:
    """Return the groups of the network, and for each layer without a group the reason."""
    try:
        import torch_pruning as tp
    except ModuleNotFoundError:
        raise missing_extra("torch-pruning", "prune", "finding what can be removed from a network") from None
    groups, alone = _attention_heads(model, example)
    known: dict[TensorAxis, set[int]] = defaultdict(set)  # positions that belong to a group
    for group in groups:
        _claim(known, group)
    for name, module in model.named_modules():  # an attention of unknown structure also keeps its width
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS:
            known[f"{name}.weight", 0] |= set(range(module.out_features))
    names = {module: name for name, module in model.named_modules()}
    model.eval()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # warnings about parameters outside layers; their groups are tried like all others
        try:
            graph = tp.DependencyGraph().build_dependency(model, example_inputs=tuple(example))
        except Exception as error:  # tracing another person's network may raise anything
            raise EdgekitError(
                f"torch-pruning cannot trace this network ({type(error).__name__}: {str(error)[:200]}); "
                "leave dependency_prune out of the recipe"
            ) from error
        traced = _Traced(graph, names, {id(value): name for name, value in model.named_parameters()})
        for root, name in names.items():
            if not isinstance(root, (nn.Linear, _ConvNd)) or root not in graph.module2node:
                continue
            if traced.outputs(root) in known:
                continue
            found = traced.channels(root, round_to)
            if isinstance(found, str):
                alone[name] = found
            elif any(
                known.get(tensor_axis, set()) & {at for taken in units for at in taken}
                for tensor_axis, units in found.axes.items()
            ):
                alone[name] = "some of its channels also belong to another layer"
            else:
                _claim(known, found)
                groups.append(found)
    return groups, alone


def _claim(known: dict[TensorAxis, set[int]], group: Group) -> None:
    for tensor_axis, units in group.axes.items():
        known[tensor_axis] |= {at for taken in units for at in taken}


@dataclass(frozen=True, slots=True)
class _Traced:
    """torch-pruning's graph of a network, in terms of the network's own names."""

    graph: Any
    names: Mapping[nn.Module, str]
    parameters: Mapping[int, str]

    def channels(self, root: nn.Module, round_to: int) -> Group | str:
        """Return the group of a layer's output channels, or the reason why it has none."""
        prune = self.graph.get_pruner_of_module(root).prune_out_channels
        size = self.graph.get_out_channels(root)
        whole = self.graph.get_pruning_group(root, prune, [0])
        if len(self._touched(whole).get(self.outputs(root), ())) > 1:
            # Each channel brings others, as in the halves of a gated unit, so the loop asks for one at a time.
            units: list[dict[TensorAxis, list[int]]] = []
            known: set[int] = set()
            for channel in range(size):
                if channel not in known:
                    units.append(self._touched(self.graph.get_pruning_group(root, prune, [channel])))
                    known.update(units[-1][self.outputs(root)])
            axes = {tensor_axis: [unit[tensor_axis] for unit in units] for tensor_axis in units[0]}
            size = len(units)
        else:
            whole = self.graph.get_pruning_group(root, prune, list(range(size)))
            axes = defaultdict(lambda: [[] for _ in range(size)])
            for item in whole.items:
                for tensor_axis in self._axes(item.dep):
                    for position, unit in zip(item.idxs, item.root_idxs, strict=True):
                        axes[tensor_axis][unit].append(int(position))
        step, shares, consumers = round_to, 1, []
        for item in whole.items:
            module, found = item.dep.target.module, self._axes(item.dep)
            if not found and module in self.names and list(module.parameters(recurse=False)):
                kept = f"{self.names[module]}, a {type(module).__name__}"
                return f"its channels go through {kept}, which edgekit does not cut"
            if not self.graph.is_out_channel_pruning_fn(item.dep.handler):
                consumers += [
                    tensor_axis
                    for tensor_axis in found
                    if tensor_axis[0].endswith("weight") and tensor_axis not in consumers
                ]
            if isinstance(module, nn.GroupNorm):
                step = math.lcm(step, module.num_groups)
                shares = module.num_groups if module.num_channels == size else shares
        return Group(self.names[root], "channels", size, dict(axes), tuple(consumers), step=step, shares=shares)

    def outputs(self, module: nn.Module) -> TensorAxis:
        """Return the tensor and the axis that hold the output channels of a Linear or convolution."""
        return self._name(module, "weight"), 1 if isinstance(module, _ConvTransposeNd) else 0

    def _touched(self, group: Any) -> dict[TensorAxis, list[int]]:
        """Return all positions of a group of torch-pruning, by tensor and axis."""
        touched: dict[TensorAxis, set[int]] = defaultdict(set)
        for item in group.items:
            for tensor_axis in self._axes(item.dep):
                touched[tensor_axis].update(map(int, item.idxs))
        return {tensor_axis: sorted(taken) for tensor_axis, taken in touched.items()}

    def _axes(self, dependency: Any) -> list[TensorAxis]:
        """Return the tensors and axes that hold the output or input channels of a dependency."""
        module: Any = dependency.target.module
        if isinstance(module, nn.Parameter):
            name = self.parameters.get(id(module))
            return [(name, int(dependency.target.pruning_dim))] if name else []
        outward = self.graph.is_out_channel_pruning_fn(dependency.handler)
        axes: dict[str, int] = {}
        if isinstance(module, _ConvNd):
            out = 1 if isinstance(module, _ConvTransposeNd) else 0
            if module.groups == module.out_channels > 1:  # depthwise: each input channel is an output channel
                axes = {"weight": 0, "bias": 0}
            elif module.groups == 1:
                axes = {"weight": out, "bias": 0} if outward else {"weight": 1 - out}
        elif isinstance(module, nn.Linear):
            axes = {"weight": 0, "bias": 0} if outward else {"weight": 1}
        elif isinstance(module, _NormBase):
            axes = {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}
        elif isinstance(module, nn.Embedding):
            axes = {"weight": 1}
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU)):
            axes = {"weight": 0, "bias": 0} if getattr(module.weight, "ndim", 0) == 1 else {}
        return [(self._name(module, key), axis) for key, axis in axes.items() if getattr(module, key, None) is not None]

    def _name(self, module: nn.Module, key: str) -> str:
        """Return the first of a tensor's names, so that a tied tensor is cut once."""
        return self.parameters.get(id(getattr(module, key)), f"{self.names[module]}.{key}")


def _attention_heads(model: nn.Module, example: list[Tensor]) -> tuple[list[Group], dict[str, str]]:
    """Return a group for each attention module whose parts have known names; a trial cut of one head proves it."""
    groups, alone = [], {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            alone[name] = (
                "torch's MultiheadAttention has as many outputs as inputs, so none of its heads can be removed"
            )
            continue
        counts = [key for key in HEADS if isinstance(getattr(module, key, None), int)]
        if not counts:
            continue
        group = _heads(name, module, getattr(module, counts[0]))
        if group is None:
            alone[name] = f"attention whose projections have other names than {FUSED[0]}, {'/'.join(SEPARATE[1])}, ..."
        elif group.size > 1 and _same_without(model, example, group):
            groups.append(group)
        else:
            alone[name] = "one head" if group.size == 1 else "its heads are laid out in another order"
    return groups, alone


def _heads(name: str, module: nn.Module, heads: int) -> Group | None:
    prefix = f"{name}." if name else ""
    children = {key: child for key, child in module.named_children() if isinstance(child, nn.Linear)}
    last = next((key for key in LAST if key in children), None)
    fused = next((key for key in FUSED if key in children), None)
    separate = next((keys for keys in SEPARATE if set(keys) <= set(children)), None)
    if last is None or (fused is None and separate is None):
        return None
    sharing = [key for key in GROUPS if isinstance(getattr(module, key, None), int)]
    size = getattr(module, sharing[0]) if sharing else heads
    width = children[last].in_features // heads
    each = heads // size * width  # columns of the last projection that a unit takes: its heads' values

    def runs(length: int, starts: Sequence[int] = (0,)) -> list[list[int]]:
        return [[start + unit * length + k for start in starts for k in range(length)] for unit in range(size)]

    axes: dict[TensorAxis, list[list[int]]] = {(f"{prefix}{last}.weight", 1): runs(each)}
    if fused is not None:
        layout = {fused: runs(width, [part * heads * width for part in range(3)])}
    else:
        assert separate is not None
        layout = {key: runs(each if number == 0 else width) for number, key in enumerate(separate)}
    for key, taken in layout.items():
        if children[key].out_features != sum(map(len, taken)):
            return None
        axes[f"{prefix}{key}.weight", 0] = taken
        if children[key].bias is not None:
            axes[f"{prefix}{key}.bias", 0] = taken
    counted = {key: heads // size for key in HEADS if getattr(module, key, None) == heads}
    counted |= dict.fromkeys(sharing, 1)
    counted |= {key: each for key in WIDTHS if getattr(module, key, None) == heads * width}
    counts = {f"{prefix}{key}": count for key, count in counted.items()}
    category = "heads" if size == heads else "groups of heads"
    return Group(name, category, size, axes, ((f"{prefix}{last}.weight", 1),), counts)


def _same_without(model: nn.Module, example: list[Tensor], group: Group) -> bool:
    """Return whether cutting a head gives the same outputs, apart from rounding, as weights of 0 for that head."""
    unit = [group.size // 2]
    consumer, _ = group.consumers[0]
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):  # some code insists on float32
        rows = [value.to(dtype) if value.is_floating_point() else value for value in example]
        silent, cut = (copy.deepcopy(model).to(dtype) for _ in range(2))
        silent.get_parameter(consumer).data[:, list(group.axes[group.consumers[0]][unit[0]])] = 0
        try:
            with torch.no_grad():
                ones, others = results(silent, rows), results(remove(cut, removal(model, [(group, unit)])), rows)
        except (RuntimeError, ValueError, AssertionError, EdgekitError):
            continue
        return all(
            one.shape == other.shape and float((one - other).abs().max()) <= tolerance * float(one.abs().max())
            for one, other in zip(ones, others, strict=True)
        )
    return False


def removal(model: nn.Module, chosen: Sequence[tuple[Group, Sequence[int]]]) -> list[dict[str, Any]]:
    """Return the steps for edgekit.nn.module.remove; axes that lose the same positions share a step."""
    lost: dict[TensorAxis, set[int]] = defaultdict(set)
    attributes = {}
    for group, units in chosen:
        for tensor_axis, taken in group.axes.items():
            lost[tensor_axis].update(at for unit in units for at in taken[unit])
        for name, count in group.counts.items():
            path, _, attribute = name.rpartition(".")
            attributes[name] = getattr(model.get_submodule(path), attribute) - count * len(units)
    shared: dict[str, list[str]] = defaultdict(list)
    for (name, axis), removed in lost.items():
        if removed:
            shared[ranges(removed)].append(f"{name}:{axis}")
    steps: list[dict[str, Any]] = [{"removed": removed, "from": axes} for removed, axes in shared.items()]
    return [*steps, {"attributes": attributes}] if attributes else steps


def results(model: nn.Module, example: list[Tensor]) -> list[Tensor]:
    """Return the network's outputs as a list."""
    raw = model(*example)
    return list(raw) if isinstance(raw, (tuple, list)) else [raw]
