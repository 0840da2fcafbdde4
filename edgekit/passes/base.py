"""What a compression pass is: it says what it will change, then changes it. The guard, not the pass, decides whether
the result stays.

A pass is one file with one frozen dataclass of parameters. It works on the network, which can be trained, or on the
ONNX graph, which any framework gives; the first pass on the graph lowers the network to one. To add one, see
CONTRIBUTING.md.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from edgekit.bundle.encoding import Encoding, Float
from edgekit.bundle.tensors import TensorSpec, golden_inputs, parse_spec
from edgekit.data.dataset import Dataset, is_labelled
from edgekit.errors import EdgekitError
from edgekit.nn.families import build
from edgekit.nn.module import tied
from edgekit.nn.training import Schedule, balanced_class_weights, fit

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model on its way through the passes: decoded weights, and the encodings that say how few bits they take."""

    family: str
    arguments: Mapping[str, Any]
    model: nn.Module
    encodings: Mapping[str, Encoding] = field(default_factory=dict)

    def weights(self) -> dict[str, Float]:
        aliases = tied(self.model)  # stored once, under the first of its names
        state = self.model.state_dict()
        return {name: value.detach().numpy().copy() for name, value in state.items() if name not in aliases}

    def copy_model(self) -> nn.Module:
        """A model of its own for a pass to change, so that rolling back costs nothing."""
        return build(self.family, self.arguments, self.weights())


@dataclass(frozen=True, slots=True)
class GraphCandidate:
    """A model that has left its network: an ONNX graph, float32 or what earlier passes made of it."""

    model: ModelProto

    def copy_model(self) -> ModelProto:
        """A graph of its own for a pass to change."""
        copied = type(self.model)()
        copied.CopyFrom(self.model)
        return copied


def _nowhere(network: nn.Module) -> ModelProto:
    raise EdgekitError("this pass ends in a graph, and nothing was given that makes one of a network")


@dataclass(frozen=True, slots=True)
class Context:
    """What passes may use: training data (for calibration too), the network that compression started from, a way to
    show progress; for a pass that ends in a graph, the inputs and what makes a graph of a network by torch.export. A
    model that came as a graph has no network."""

    train: Dataset
    teacher: nn.Module | None
    seed: int
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    inputs: tuple[TensorSpec, ...] = ()
    lower: Callable[[nn.Module], ModelProto] = _nowhere


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a plan: what happens to a tensor."""

    tensor: str
    before: str
    after: str


class Pass(Protocol):
    """`plan` must not change the candidate and `apply` must return a new one, of the network or, in a pass that says
    `lowers = True`, of the graph that it has made of it."""

    name: ClassVar[str]
    summary: ClassVar[str]

    def plan(self, candidate: Candidate) -> list[Change]: ...

    def apply(self, candidate: Candidate, context: Context) -> Candidate | GraphCandidate: ...


class GraphPass(Protocol):
    """The same on a graph; its class says so by `level = GRAPH_LEVEL`. Either kind may say `prepares = True`: it gains
    nothing by itself, and is kept for the passes after it if it loses nothing."""

    name: ClassVar[str]
    summary: ClassVar[str]
    level: ClassVar[str]

    def plan(self, candidate: GraphCandidate) -> list[Change]: ...

    def apply(self, candidate: GraphCandidate, context: Context) -> GraphCandidate: ...


GRAPH_LEVEL = "graph"
AnyCandidate = Candidate | GraphCandidate


def recover(model: nn.Module, context: Context, epochs: int, learning_rate: float, what: str) -> nn.Module:
    """Fine-tune what a pass left trainable, half on the labels and half on the original model's probabilities."""
    if epochs == 0:
        return model.eval()
    if context.teacher is None:
        raise EdgekitError(f"{what}: there is no network to train; set epochs = 0")
    # unlabelled rows are learnt from the original model alone
    distillation = 0.5 if is_labelled(context.train) else 1.0
    schedule = Schedule(epochs=epochs, learning_rate=learning_rate, distillation=distillation)
    return fit(
        model,
        context.train,
        schedule,
        seed=context.seed,
        teacher=context.teacher,
        progress=lambda done, total, loss: context.progress(what, done, total),
    )


def matrices(model: nn.Module, include: tuple[str, ...]) -> list[str]:
    """Names of the weights with two or more dimensions that match a shell-style pattern, in the model's order."""
    weights = [name for name, value in model.named_parameters() if value.ndim >= 2]
    chosen = [name for name in weights if any(fnmatch.fnmatch(name, pattern) for pattern in include)]
    if not chosen:
        raise EdgekitError(f"no weight matches {', '.join(include)}; the model has {', '.join(weights)}")
    return chosen


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name in it."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def at_least(name: str, value: float, low: float, high: float) -> None:
    """Raise unless low <= value <= high."""
    if not (isinstance(value, (int, float)) and low <= value <= high):
        raise EdgekitError(f"{name} = {value!r}; expected {low:g} to {high:g}")


def frozen(model: nn.Module, names: Iterable[str]) -> None:
    """Keep training away from parameters whose encodings stay as they are."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)


def register(model: nn.Module, name: str, parametrization: nn.Module) -> None:
    """Put a parametrization on a weight. One that several modules share stays one parameter behind it."""
    module, attribute = owner(model, name)
    consumers = [owner(model, other) for other, first in tied(model).items() if first == name]
    for consumer, key in consumers:  # torch changes the parameter in place, under the feet of the others
        setattr(consumer, key, nn.Parameter(getattr(module, attribute).detach().clone()))
    parametrize.register_parametrization(module, attribute, parametrization)
    for consumer, key in consumers:
        parametrize.register_parametrization(consumer, key, parametrization)
        consumer.parametrizations[key].original = module.parametrizations[attribute].original  # type: ignore[index, union-attr]


def unregister(model: nn.Module, name: str) -> Tensor:
    """Take it off again, leaving its result as the weight, shared as before; what was trained behind it."""
    module, attribute = owner(model, name)
    original: Tensor = module.parametrizations[attribute].original  # type: ignore[index, union-attr]
    others = [
        f"{path}.{key}"
        for path, consumer in model.named_modules()
        if consumer is not module and parametrize.is_parametrized(consumer)
        for key, item in consumer.parametrizations.items()
        if item.original is original
    ]
    trained = original.detach().clone()
    consumers = [owner(model, other) for other in others]
    for consumer, key in consumers:
        consumer.parametrizations[key].original = nn.Parameter(trained.clone())  # type: ignore[index, union-attr]
    for holder, key in [(module, attribute), *consumers]:
        parametrize.remove_parametrizations(holder, key, leave_parametrized=True)
    for consumer, key in consumers:
        setattr(consumer, key, getattr(module, attribute))
    return trained


def decoded(encodings: Mapping[str, Encoding], model: nn.Module) -> None:
    """Copy encoded values into the model, so that weights and encodings agree to the last bit."""
    state = model.state_dict()
    for name, encoding in encodings.items():
        state[name].copy_(torch.from_numpy(np.ascontiguousarray(encoding.decode())))


def loss(output: Tensor, labels: np.ndarray[Any, Any], everything: np.ndarray[Any, Any], original: Tensor) -> Tensor:
    """Of the labels where they say what the output should be, else of what the network gave originally. everything:
    the labels of all rows, by which classes are balanced."""
    if labels.dtype.kind == "f":
        return F.mse_loss(output, torch.from_numpy(labels).reshape(output.shape))
    if output.ndim != 2:
        return F.mse_loss(output, original)
    if (labels < 0).any():
        return F.cross_entropy(output, original.argmax(dim=1))
    weights = balanced_class_weights(everything, output.shape[-1])
    return F.cross_entropy(output, torch.from_numpy(labels), weight=weights)


def example_inputs(candidate: Candidate) -> list[Tensor]:
    """Two made-up rows of the inputs that the network is called with."""
    described = candidate.arguments.get("inputs")
    if not described:
        raise EdgekitError("this bundle does not say what its network is called with; import the model again")
    specs = tuple(parse_spec(f"{name}:{text}") for name, text in described.items())
    return [torch.from_numpy(array) for array in golden_inputs(specs, 2).values()]
