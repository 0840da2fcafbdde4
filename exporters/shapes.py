"""The shapes for which an engine is built: those that the user will use, and never a guess.

    --data FILE.npz                       the lengths of real inputs, whose rows become the golden rows
    --shapes image=MIN:OPT:MAX            such as image=1x3x32x320:8x3x48x320:32x3x48x640
    --axis tokens=16:64:256               the same for one free axis
    golden rows that are real             their lengths

If none of these gives the length of a free axis, the export is refused with these options as the remedy. Only the batch
has a default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgekit.bundle.format import Bundle, replace_golden
from edgekit.bundle.synthetic import synthetic_inputs
from edgekit.bundle.tensors import Arrays, TensorSpec, multiple, read_arrays
from edgekit.errors import EdgekitError, unknown
from edgekit.graph.lower import lower
from edgekit.graph.vocabulary import vocabularies
from edgekit.session import check_inputs, open_session

BATCH = (1, 16, 64)  # least, best, largest: a few alerts, up to the batch that a small device holds
ROWS = 8  # golden rows out of data
AXIS = re.compile(r"([^=]+)=(\d+):(\d+):(\d+)")
SHAPES = re.compile(r"([^=]+)=(\d+(?:x\d+)*):(\d+(?:x\d+)*):(\d+(?:x\d+)*)")
Lengths = tuple[int, int, int]  # least, best, largest
Profile = dict[str, dict[str, list[int]]]


def for_shapes(bundle: Bundle, axes: tuple[str, ...], shapes: tuple[str, ...], data: str) -> tuple[Bundle, Profile]:
    """Return the shapes of the engine, and the bundle with golden rows that fit them: rows of the data, or synthetic
    rows of the best shape if the bundle's rows are synthetic too."""
    given = _given_axes(bundle, axes) | _given_shapes(bundle, shapes)
    if data:
        rows = read_arrays(Path(data))
        inputs = {spec.name: rows[spec.name][:ROWS] for spec in bundle.manifest.inputs if spec.name in rows}
        check_inputs(bundle.manifest.inputs, inputs)
        bundle = _with_golden(bundle, inputs, synthetic=False)
    elif bundle.manifest.synthetic and given.keys() & _free_axes(bundle.manifest.inputs):
        bundle = _with_golden(bundle, _at_best(bundle, given), synthetic=True)
    return bundle, profile_of(bundle, given)


def _with_golden(bundle: Bundle, inputs: Arrays, *, synthetic: bool) -> Bundle:
    """Return the bundle with these golden inputs, and the outputs that the model gives for them."""
    outputs = open_session(bundle, "onnxruntime", threads=1).run(inputs)
    changed = replace_golden(bundle, (inputs, outputs))
    return replace(changed, manifest=replace(changed.manifest, synthetic=synthetic))


def _at_best(bundle: Bundle, given: Mapping[str, Lengths]) -> Arrays:
    """Return synthetic inputs of the best lengths; an axis without one keeps the length of the golden rows."""
    lengths = {axis: length for axis, (length, _) in _golden_lengths(bundle).items()}
    lengths |= {axis: best for axis, (_, best, _) in given.items()}
    rows = len(next(iter(bundle.golden()[0].values())))
    known = vocabularies(lower(bundle, weights="float32"))
    return synthetic_inputs(bundle.manifest.inputs, rows, lengths, known)


def _golden_lengths(bundle: Bundle) -> dict[str, tuple[int, str]]:
    """Return for each free axis except the batch its length in the golden rows, and an input that has it."""
    golden, _ = bundle.golden()
    return {
        axis: (int(golden[spec.name].shape[number]), spec.name)
        for spec in bundle.manifest.inputs
        for number, axis in enumerate(spec.shape)
        if number and isinstance(axis, str)
    }


def _free_axes(specs: tuple[TensorSpec, ...]) -> set[str]:
    return {axis for spec in specs for axis in spec.shape[1:] if isinstance(axis, str)}


def _given_axes(bundle: Bundle, axes: tuple[str, ...]) -> dict[str, Lengths]:
    """Read 'NAME=LEAST:BEST:LARGEST' for each axis."""
    names = dict.fromkeys(axis for spec in bundle.manifest.inputs for axis in spec.shape if isinstance(axis, str))
    found: dict[str, Lengths] = {}
    for text in axes:
        parts = AXIS.fullmatch(text)
        if not parts:
            raise EdgekitError(f"axis {text!r}; expected NAME=LEAST:BEST:LARGEST, such as batch=1:16:64")
        name = next((axis for axis in names if parts[1] in (axis, axis.rpartition("*")[2])), None)
        if name is None:
            raise unknown("axis", parts[1], names, where=bundle.manifest.name)
        found[name] = _checked(f"axis {text!r}", name, (int(parts[2]), int(parts[3]), int(parts[4])))
    return found


def _given_shapes(bundle: Bundle, shapes: tuple[str, ...]) -> dict[str, Lengths]:
    """Read 'INPUT=MIN:OPT:MAX', with a shape such as 1x3x224x224 for each, as lengths of the free axes."""
    specs = {spec.name: spec for spec in bundle.manifest.inputs}
    found: dict[str, Lengths] = {}
    for text in shapes:
        parts = SHAPES.fullmatch(text)
        if not parts:
            raise EdgekitError(
                f"--shapes {text!r}; expected INPUT=MIN:OPT:MAX, such as x=1x3x32x32:1x3x320x320:8x3x960x960"
            )
        if parts[1] not in specs:
            raise unknown("input", parts[1], specs, where=bundle.manifest.name)
        spec = specs[parts[1]]
        three = [tuple(map(int, part.split("x"))) for part in parts.groups()[1:]]
        if any(len(shape) != len(spec.own_axes) for shape in three):
            raise EdgekitError(f"--shapes {text!r}: expected {len(spec.own_axes)} lengths each, as in {spec.axes_text}")
        for axis, least, best, largest in zip(spec.own_axes, *three, strict=True):
            if isinstance(axis, int) and {least, best, largest} != {axis}:
                raise EdgekitError(f"--shapes {text!r}: this axis always has length {axis}, as in {spec.axes_text}")
            if isinstance(axis, str):
                lengths = _checked(f"--shapes {text!r}", axis, (least, best, largest))
                if found.setdefault(axis, lengths) != lengths:
                    raise EdgekitError(f"--shapes {text!r}: axis {axis!r} has {found[axis]} elsewhere; give it once")
    return found


def _checked(what: str, axis: str, lengths: Lengths) -> Lengths:
    step = multiple(axis)
    if sorted(lengths) != list(lengths) or min(lengths) < 1 or any(length % step for length in lengths):
        of = f" multiples of {step}" if step > 1 else ""
        raise EdgekitError(f"{what}; expected three rising lengths of at least 1{of}")
    return lengths


def profile_of(bundle: Bundle, given: Mapping[str, Lengths]) -> Profile:
    """Return least, best and largest shape of each input. Raises if nothing tells the length of a free axis, and if the
    golden rows do not fit, with which the device is checked."""
    rows = bundle.manifest.rows_per_call
    batch = BATCH if rows is None else (rows, rows, rows)
    found = {spec.shape[0]: batch for spec in bundle.manifest.inputs} | dict(given)
    for axis, (length, name) in _golden_lengths(bundle).items():
        if axis not in found and bundle.manifest.synthetic:
            example = "x".join(str(part) if isinstance(part, int) else part for part in _spec(bundle, name).own_axes)
            raise EdgekitError(
                f"{bundle.manifest.name}: input {name!r} takes any length of axis {axis!r}, and its golden rows are "
                f"made up; say for which shapes the engine is: --shapes {name}=MIN:OPT:MAX (each {example}), or --data "
                "FILE.npz with real inputs"
            )
        least, _, largest = found.setdefault(axis, (length, length, length))
        if not least <= length <= largest:
            raise EdgekitError(
                f"axis {axis!r} from {least} to {largest} leaves out the golden data's {length}, with which the device "
                "is checked; give real inputs of these lengths: --data FILE.npz"
            )
    return {
        spec.name: {
            key: [found[axis][number] if isinstance(axis, str) else axis for axis in spec.own_axes]
            for number, key in enumerate(("min", "opt", "max"))
        }
        for spec in bundle.manifest.inputs
    }


def _spec(bundle: Bundle, name: str) -> TensorSpec:
    return next(spec for spec in bundle.manifest.inputs if spec.name == name)


def shapes_text(profile: Profile) -> list[str]:
    """Return a line for each input: its least, best and largest shape."""
    return [
        f"{name}: from {_times(ranges['min'])} to {_times(ranges['max'])}, fastest at {_times(ranges['opt'])}"
        for name, ranges in profile.items()
    ]


def _times(shape: list[int]) -> str:
    return "x".join(map(str, shape))
