"""The contract of a compression pass: it plans a change and then applies it. The guard, not the pass, decides whether
the loop keeps the result.

A pass is one file with one frozen dataclass of parameters. It works on the network, which can be trained, or on the
ONNX graph, which any framework can export; the first pass on the graph lowers the network to one. CONTRIBUTING.md
explains how to add a pass.
"""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from edgekit import plugins
from edgekit.bundle.encoding import Encoding, Float
from edgekit.bundle.family import build, tied
from edgekit.bundle.tensors import TensorSpec, golden_inputs, parse_spec
from edgekit.data.dataset import Dataset, is_labelled
from edgekit.errors import EdgekitError
from edgekit.nn.training import Schedule, balanced_class_weights, fit
from edgekit.passes.change import Change as Change

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True, slots=True)
class Candidate:
    """A network between two passes: decoded weights, and the encodings that say how few bits store them."""

    family: str
    arguments: Mapping[str, Any]
    model: nn.Module
    encodings: Mapping[str, Encoding] = field(default_factory=dict)

    def weights(self) -> dict[str, Float]:
        aliases = tied(self.model)  # a tied weight is stored once, under the first of its names
        state = self.model.state_dict()
        return {name: value.detach().numpy().copy() for name, value in state.items() if name not in aliases}

    def copy_model(self) -> nn.Module:
        """Return a copy that a pass may change, so that a rollback costs nothing."""
        return build(self.family, self.arguments, self.weights())


@dataclass(frozen=True, slots=True)
class GraphCandidate:
    """A model that is an ONNX graph, in float32 or as earlier passes have changed it."""

    model: ModelProto

    def copy_model(self) -> ModelProto:
        """Return a copy that a pass may change."""
        copied = type(self.model)()
        copied.CopyFrom(self.model)
        return copied


def _nowhere(network: nn.Module) -> ModelProto:
    raise EdgekitError("this pass ends in a graph; set Context.lower to a function that lowers a network")


@dataclass(frozen=True, slots=True)
class Context:
    """Data and functions that a pass may use: training data (for calibration too), the network that compression started
    from, a callback for progress, and for a pass that lowers, the inputs and a function that lowers a network by
    torch.export. `teacher` is None if the model came as a graph."""

    train: Dataset
    teacher: nn.Module | None
    seed: int
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    inputs: tuple[TensorSpec, ...] = ()
    lower: Callable[[nn.Module], ModelProto] = _nowhere


class Level(StrEnum):
    """The form of the model that a pass works on."""

    NETWORK = "network"
    GRAPH = "graph"


AnyCandidate = Candidate | GraphCandidate
Subject = TypeVar("Subject", Candidate, GraphCandidate)


class Pass(ABC, Generic[Subject]):
    """A compression technique with its parameters: a frozen dataclass that plans a change and applies it.

    A pass on networks derives from Pass[Candidate], one on graphs from Pass[GraphCandidate] with `level = Level.GRAPH`.
    The class attributes declare all that the loop, targets, the search and the help need to know about a pass.
    """

    __slots__ = ()

    name: ClassVar[str]  # its name in recipes
    summary: ClassVar[str]  # one line of help
    level: ClassVar[Level] = Level.NETWORK
    lowers: ClassVar[bool] = False  # it takes a network and returns a graph
    # It brings no gain by itself; the loop keeps it for later passes if it loses nothing.
    prepares: ClassVar[bool] = False
    computes_in: ClassVar[tuple[str, ...]] = ()  # precisions below float32 in which the result computes
    writes: ClassVar[tuple[str, ...]] = ()  # operators that it adds and that not every runtime supports
    # The names of parameters whose meaning other code relies on; "" if the pass has no such parameter.
    epochs_parameter: ClassVar[str] = ""  # epochs of training; with 0 the pass does not train
    multiple_parameter: ClassVar[str] = ""  # the number of remaining channels is a multiple of its value
    scheme_parameter: ClassVar[str] = ""  # quantization scheme of the graph that the pass writes: "u8s8" or "s8s8"
    weight_bits_parameter: ClassVar[str] = ""  # bits of a weight's codes

    @abstractmethod
    def plan(self, candidate: Subject) -> list[Change]:
        """Return the changes that `apply` would make, tensor by tensor, and change nothing. Raises EdgekitError if
        `apply` would."""

    @abstractmethod
    def apply(self, candidate: Subject, context: Context) -> AnyCandidate:
        """Return a changed copy: a candidate of the same class, or a GraphCandidate from a pass that `lowers`."""

    def precisions(self) -> tuple[str, ...]:
        """Return the precisions below float32 in which the result computes with these parameters."""
        return self.computes_in

    def without_training(self) -> Self:
        """Return the pass with 0 epochs of training."""
        return replace(self, **{self.epochs_parameter: 0}) if self.epochs_parameter else self  # type: ignore[type-var]


PARAMETERS = ("epochs_parameter", "multiple_parameter", "scheme_parameter", "weight_bits_parameter")


def load_pass(name: str) -> type[Pass[Any]]:
    """Find the class of a pass by its name, and check it against the contract."""
    pass_class: type[Pass[Any]] = plugins.load("edgekit.passes", name, problem_with)
    return pass_class


def parameters_of(pass_class: type[Pass[Any]]) -> dict[str, Field[Any]]:
    """Return the parameters of a pass by name, as the dataclass declares them."""
    return {item.name: item for item in fields(pass_class)}  # type: ignore[arg-type]


def _is_frozen_dataclass(pass_class: Any) -> bool:
    return is_dataclass(pass_class) and bool(getattr(pass_class, "__dataclass_params__").frozen)  # noqa: B009 - typeshed does not know it


def problem_with(pass_class: Any, name: str) -> str:
    """Say why recipes cannot use a class as the pass `name`; "" if they can."""
    if not isinstance(pass_class, type) or not issubclass(pass_class, Pass):
        return "it does not derive from edgekit.passes.base.Pass"
    if not _is_frozen_dataclass(pass_class):
        return "it is not a frozen dataclass"
    if missing := [item for item in ("name", "summary") if not isinstance(getattr(pass_class, item, None), str)]:
        return f"it declares no {missing[0]!r}"
    if pass_class.name != name:
        return f"its name is {pass_class.name!r}, and it is registered as {name!r}"
    if unwritten := sorted(pass_class.__abstractmethods__):
        return f"it has no method {unwritten[0]!r}"
    if pass_class.level not in list(Level):  # Python 3.11 raises TypeError for a string `in Level`
        return f"its level is {pass_class.level!r}; expected {Level.NETWORK} or {Level.GRAPH}"
    known = parameters_of(pass_class)
    for role in PARAMETERS:
        if (parameter := getattr(pass_class, role)) and parameter not in known:
            return f"its {role} is {parameter!r}, which is not among its parameters {', '.join(sorted(known))}"
    return ""


def recover(model: nn.Module, context: Context, epochs: int, learning_rate: float, stage: str) -> nn.Module:
    """Fine-tune the trainable weights that a pass left: half on the labels, half on the original model's
    probabilities."""
    if epochs == 0:
        return model.eval()
    if context.teacher is None:
        raise EdgekitError(f"{stage}: there is no network to train; set epochs = 0")
    # rows without labels teach through the original model's outputs only
    distillation = 0.5 if is_labelled(context.train) else 1.0
    schedule = Schedule(epochs=epochs, learning_rate=learning_rate, distillation=distillation)
    return fit(
        model,
        context.train,
        schedule,
        seed=context.seed,
        teacher=context.teacher,
        progress=lambda done, total, loss: context.progress(stage, done, total),
    )


def matrices(model: nn.Module, include: tuple[str, ...]) -> list[str]:
    """Return the names of the weights with two or more dimensions that match a shell-style pattern, in the model's
    order."""
    weights = [name for name, value in model.named_parameters() if value.ndim >= 2]
    chosen = [name for name in weights if any(fnmatch.fnmatch(name, pattern) for pattern in include)]
    if not chosen:
        raise EdgekitError(f"no weight matches {', '.join(include)}; the model has {', '.join(weights)}")
    return chosen


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter, and the parameter's name in it."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def at_least(name: str, value: float, low: float, high: float) -> None:
    """Raise unless low <= value <= high."""
    if not (isinstance(value, (int, float)) and low <= value <= high):
        raise EdgekitError(f"{name} = {value!r}; expected {low:g} to {high:g}")


def frozen(model: nn.Module, names: Iterable[str]) -> None:
    """Exclude parameters from training, so that their encodings stay valid."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)


def register(model: nn.Module, name: str, parametrization: nn.Module) -> None:
    """Register a parametrization on a weight. If several modules share the weight, they also share the parameter behind
    it."""
    module, attribute = owner(model, name)
    consumers = [owner(model, other) for other, first in tied(model).items() if first == name]
    # torch changes the parameter in place, so the other modules that share it get copies first
    for consumer, key in consumers:
        setattr(consumer, key, nn.Parameter(getattr(module, attribute).detach().clone()))
    parametrize.register_parametrization(module, attribute, parametrization)
    for consumer, key in consumers:
        parametrize.register_parametrization(consumer, key, parametrization)
        consumer.parametrizations[key].original = module.parametrizations[attribute].original  # type: ignore[index, union-attr]


def unregister(model: nn.Module, name: str) -> Tensor:
    """Remove a parametrization and keep its result as the weight, shared as before. Return the parameter that was
    trained behind it."""
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
    """Copy the decoded values into the model, so that weights and encodings agree to the last bit."""
    state = model.state_dict()
    for name, encoding in encodings.items():
        state[name].copy_(torch.from_numpy(np.ascontiguousarray(encoding.decode())))


def loss(output: Tensor, labels: np.ndarray[Any, Any], everything: np.ndarray[Any, Any], original: Tensor) -> Tensor:
    """Return the loss against the labels if they define the output, else against the network's original output.
    `everything`: the labels of all rows, which give the weights that balance the classes."""
    if labels.dtype.kind == "f":
        return F.mse_loss(output, torch.from_numpy(labels).reshape(output.shape))
    if output.ndim != 2:
        return F.mse_loss(output, original)
    if (labels < 0).any():
        return F.cross_entropy(output, original.argmax(dim=1))
    weights = balanced_class_weights(everything, output.shape[-1])
    return F.cross_entropy(output, torch.from_numpy(labels), weight=weights)


def example_inputs(candidate: Candidate) -> list[Tensor]:
    """Return two synthetic rows of the network's inputs."""
    described = candidate.arguments.get("inputs")
    if not described:
        raise EdgekitError("this bundle does not say what its network is called with; import the model again")
    specs = tuple(parse_spec(f"{name}:{text}") for name, text in described.items())
    return [torch.from_numpy(array) for array in golden_inputs(specs, 2).values()]
