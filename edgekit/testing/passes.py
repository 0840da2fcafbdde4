"""What holds for every pass, whatever it does to a model."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from edgekit.compression.recipe import Step
from edgekit.passes.base import AnyCandidate, Candidate, Change, Context, GraphCandidate, Level, Pass, problem_with


def check_pass(compression: Pass[Any], candidate: AnyCandidate, context: Context) -> AnyCandidate:
    """Run a pass on a candidate and check the contract of `edgekit.passes.base.Pass`; returns what the pass made.

    The candidate must be one that the pass changes: a network for a pass on networks, a graph for one on graphs."""
    pass_class, name = type(compression), compression.name
    problem = problem_with(pass_class, name)
    assert not problem, f"{pass_class.__name__} is no pass: {problem}"
    _check_parameters(compression)
    wanted = GraphCandidate if pass_class.level == Level.GRAPH else Candidate
    assert isinstance(candidate, wanted), (
        f"{name} works on a {wanted.__name__}, it was given a {type(candidate).__name__}"
    )
    before = _content(candidate)
    teacher = None if context.teacher is None else _state(context.teacher)
    changes = compression.plan(candidate)
    assert changes, (
        f"{name}: its plan is empty, although it is applied; a plan lists what changes, or raises EdgekitError"
    )
    strange = [item for item in changes if not isinstance(item, Change)]
    assert not strange, f"{name}: its plan holds a {type(strange[0]).__name__}; expected Change" if strange else ""
    assert _content(candidate) == before, f"{name}: plan has changed its candidate; only apply may, and only a copy"
    after, again = compression.apply(candidate, context), compression.apply(candidate, context)
    assert _content(candidate) == before, f"{name}: apply has changed its candidate; it must change a copy (copy_model)"
    if teacher is not None and context.teacher is not None:
        assert _state(context.teacher) == teacher, f"{name}: apply has changed the network that it learns from"
    result = GraphCandidate if pass_class.lowers or pass_class.level == Level.GRAPH else Candidate
    assert isinstance(after, result), f"{name}: apply gave a {type(after).__name__}; expected a {result.__name__}"
    assert _content(after) != before, f"{name}: apply has changed nothing; give the check a candidate that it changes"
    assert _content(after) == _content(again), f"{name}: the same seed gave two results; draw from context.seed alone"
    if isinstance(after, Candidate):
        _check_network(name, after)
    else:
        _check_graph(name, after)
    return after


def _check_parameters(compression: Pass[Any]) -> None:
    """Check that a recipe can hold the pass: its parameters come back from TOML's types."""
    pass_class, name = type(compression), compression.name
    values = {item.name: getattr(compression, item.name) for item in fields(compression)}  # type: ignore[arg-type]
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    rebuilt = Step(name, plain).build_as(pass_class)
    assert rebuilt == compression, f"{name}: a recipe with its parameters gives {rebuilt}, expected {compression}"


def _check_network(name: str, after: Candidate) -> None:
    weights = after.weights()
    for tensor, encoding in after.encodings.items():
        assert tensor in weights, f"{name}: it encodes {tensor!r}, which the network does not have"
        same = encoding.decode().tobytes() == weights[tensor].tobytes()
        assert same, f"{name}: the encoding of {tensor!r} does not decode to the weight, bit for bit"
    assert not after.model.training, f"{name}: it leaves the network in training mode; return model.eval()"
    rebuilt = Candidate(after.family, after.arguments, after.copy_model()).weights()
    same = {key: value.tobytes() for key, value in rebuilt.items()} == {key: v.tobytes() for key, v in weights.items()}
    assert same, f"{name}: the network built from its arguments and weights is another one; keep `arguments` in step"


def _check_graph(name: str, after: GraphCandidate) -> None:
    import onnx

    try:
        onnx.checker.check_model(after.model)
    except onnx.checker.ValidationError as error:
        raise AssertionError(f"{name}: its graph is not valid ONNX: {str(error).splitlines()[0]}") from None


def _content(candidate: AnyCandidate) -> Any:
    if isinstance(candidate, GraphCandidate):
        return candidate.model.SerializeToString(deterministic=True)
    encodings = {name: encoding.decode().tobytes() for name, encoding in candidate.encodings.items()}
    weights = {name: value.tobytes() for name, value in candidate.weights().items()}
    return weights, encodings, repr(sorted(candidate.arguments.items()))


def _state(network: Any) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in network.state_dict().items()}
