"""What holds for every session, whatever runs the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgekit.bundle.format import Bundle
from edgekit.errors import EdgekitError
from edgekit.session import ATTRIBUTES, METHODS, Session, problem_with


def check_session(opener: Callable[..., Session], bundle: Bundle, *, tolerance: float = 1e-4) -> Session:
    """Open a bundle and check the contract of `edgekit.session.Session`; returns the session.

    opener: a class or a function that is called with (bundle, threads=..., chunk=...). tolerance: how far an output may
    be from the bundle's golden outputs, relative to the largest of them."""
    name = getattr(opener, "__name__", str(opener))
    problem = problem_with(opener, name)
    assert not problem, f"{name} opens no session: {problem}"
    session = opener(bundle, threads=1, chunk=3)
    missing = [item for item in (*ATTRIBUTES, *METHODS) if not hasattr(session, item)]
    assert not missing, f"{name}: the session has no {missing[0]!r}" if missing else ""
    for attribute in ("device", "provider"):
        text = getattr(session, attribute)
        assert isinstance(text, str) and text, f"{name}: {attribute} is {text!r}; expected what really runs the model"  # noqa: PT018
    assert tuple(session.inputs) == bundle.manifest.inputs, f"{name}: its inputs are not the bundle's"
    assert tuple(session.outputs) == bundle.manifest.outputs, f"{name}: its outputs are not the bundle's"
    session.warmup(2)
    _check_rows(name, session, bundle, tolerance)
    _check_refusals(name, session, bundle)
    return session


def _check_rows(name: str, session: Session, bundle: Bundle, tolerance: float) -> None:
    """Golden rows give golden outputs, alone, together, in another order, and as often as asked."""
    inputs, expected = bundle.golden()
    rows = len(next(iter(inputs.values())))
    order = np.arange(2 * rows + 1)[::-1] % rows
    for what, chosen in (("all rows", np.arange(rows)), ("one row", np.array([0])), ("rows in another order", order)):
        before = {key: array[chosen].copy() for key, array in inputs.items()}
        given = {key: array.copy() for key, array in before.items()}
        found = session.run(given)
        assert list(found) == list(expected), f"{name}: outputs are {list(found)}; expected {list(expected)}"
        for key, array in expected.items():
            wanted = array[chosen]
            assert found[key].shape == wanted.shape, (
                f"{name}: {what}: {key!r} has shape {found[key].shape}; expected {wanted.shape}"
            )
            assert found[key].dtype == wanted.dtype, (
                f"{name}: {what}: {key!r} is {found[key].dtype}; expected {wanted.dtype}"
            )
            scale = max(1.0, float(np.abs(array.astype(np.float64)).max(initial=0)))
            far = float(np.abs(found[key].astype(np.float64) - wanted).max(initial=0)) / scale
            assert far <= tolerance, (
                f"{name}: {what}: {key!r} is {far:.2g} from the golden outputs; {tolerance:g} allowed"
            )
        changed = [key for key in given if given[key].tobytes() != before[key].tobytes()]
        assert not changed, f"{name}: run has changed the input {changed[0]!r} in place" if changed else ""


def _check_refusals(name: str, session: Session, bundle: Bundle) -> None:
    inputs, _ = bundle.golden()
    first = bundle.manifest.inputs[0]
    array = inputs[first.name]
    wrong: dict[str, dict[str, Any]] = {
        "an input of another dtype": {
            first.name: array.astype(np.float64 if array.dtype != np.float64 else np.float32)
        },
        "an input with an axis more": {first.name: array[..., None]},
        "an unknown input": {**inputs, "no such input": array},
    }
    if array.dtype.kind == "f":
        broken = array.copy()
        broken.flat[0] = np.nan
        wrong["an input with NaN"] = {first.name: broken}
    for what, change in wrong.items():
        try:
            session.run({**inputs, **change})
        except EdgekitError:
            continue
        raise AssertionError(f"{name}: run took {what}; call edgekit.session.check_inputs first")
    del_one = {key: value for key, value in inputs.items() if key != first.name}
    try:
        session.run(del_one)
    except EdgekitError:
        return
    raise AssertionError(
        f"{name}: run went on without the input {first.name!r}; call edgekit.session.check_inputs first"
    )
