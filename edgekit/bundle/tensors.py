"""Named tensors: their descriptions, synthetic values for golden data, and archives of named arrays (.npz)."""

from __future__ import annotations

import math
import re
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.bounded import Arrays as Arrays
from edgekit.bundle.bounded import arrays_from_npz, limit, read_file
from edgekit.errors import EdgekitError

SPEC_HELP = "NAME:DTYPE:AXES, such as image:float32:batch,3,224,224"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named input or output, in rows: the first axis is the batch. A string in `shape` names an axis that may have
    any length, such as "batch", or any multiple of a number, such as "9*faces". `axes`: the model's own axes, if its
    batch is not the first of them; an input of which all rows of a call share the value has no batch among them."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    unit: str = ""
    axes: tuple[int | str, ...] | None = None

    def __post_init__(self) -> None:
        for text in (self.name, self.unit):
            if not text.isprintable():
                raise EdgekitError(f"the name or unit {text[:60]!r} of a tensor holds a control character; rename it")
        for axis in self.shape:
            if isinstance(axis, str) and not axis.isprintable():
                raise EdgekitError(f"{self.name!r}: the axis {axis[:60]!r} holds a control character; rename it")
            if isinstance(axis, str) and not _AXIS.fullmatch(axis):
                raise EdgekitError(f"{self.name!r}: axis {axis!r}; expected a name, or a multiple such as '9*faces'")
        try:
            dtype = np.dtype(self.dtype)
        except (TypeError, ValueError, SyntaxError):
            dtype = np.dtype("O")
        if dtype.kind not in "biuf":
            raise EdgekitError(f"{self.name!r}: unknown dtype {self.dtype[:40]!r}; expected float32, int64, ...")
        if any(isinstance(axis, int) and axis < 0 for axis in self.shape):
            raise EdgekitError(f"{self.name!r}: shape {self.shape_text}; expected lengths from 0, or names")
        if self.axes is not None and (not self.shape or [*self._without_batch] != [*self.shape[1:]]):
            raise EdgekitError(
                f"{self.name!r}: the axes {self.axes_text} are not those of rows of shape {self.shape_text}, with the "
                "batch elsewhere"
            )
        row = math.prod(axis if isinstance(axis, int) else multiple(axis) for axis in self.shape) * dtype.itemsize
        if row > limit(0):
            raise EdgekitError(
                f"{self.name!r}: one row of shape {self.shape_text} takes {row:,} bytes, and edgekit takes up to "
                f"{limit(0):,}; if you trust the model, raise the limit with: edgekit --read-limit SIZE COMMAND"
            )

    def check(self, array: npt.NDArray[Any]) -> None:
        """Raise if the array does not fit this spec."""
        fits = array.ndim == len(self.shape) and all(
            isinstance(want, str) or want == got for want, got in zip(self.shape, array.shape, strict=True)
        )
        if not fits:
            raise EdgekitError(f"input {self.name!r} has shape {array.shape}; expected {self.shape_text}")
        for number, got in enumerate(array.shape):
            step = multiple(self.shape[number])
            if got % step or (step > 1 and got == 0):  # if the axis comes in groups, length 0 is refused too
                below, above = got // step * step, (got // step + 1) * step
                nearest = f"{below} or {above}" if below else f"{above}"
                raise EdgekitError(
                    f"input {self.name!r} has length {got} along axis {number}; this model needs a multiple of {step} "
                    f"({nearest})"
                )
        if str(array.dtype) != self.dtype:
            raise EdgekitError(f"input {self.name!r} has dtype {array.dtype}; expected {self.dtype}")

    @property
    def shape_text(self) -> str:
        return "(" + ", ".join(str(axis) for axis in self.shape) + ")"

    @property
    def axes_text(self) -> str:
        return "(" + ", ".join(str(axis) for axis in self.own_axes) + ")"

    @property
    def own_axes(self) -> tuple[int | str, ...]:
        """Return the axes of the model's own tensor."""
        return self.shape if self.axes is None else self.axes

    @property
    def shared(self) -> bool:
        """Return whether all rows of a call share the value: the model's tensor has no batch."""
        return self.axes is not None and self.shape[0] not in self.axes

    @property
    def _without_batch(self) -> tuple[int | str, ...]:
        axes = list(self.axes or ())
        if self.shape[0] in axes:
            axes.remove(self.shape[0])
        return tuple(axes)

    def own(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return rows as the model's own tensor of one call."""
        if self.axes is None:
            return rows
        tensor = rows[0] if self.shared else np.moveaxis(rows, 0, self.axes.index(self.shape[0]))
        return np.asarray(tensor, order="C")

    def rows(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the model's own tensor as rows; one row if it has no batch."""
        if tensor.ndim != len(self.own_axes):
            raise EdgekitError(f"{self.name!r} has shape {tensor.shape}; expected {self.axes_text} in a call")
        if self.axes is None:
            return tensor
        return tensor[None] if self.shared else np.moveaxis(tensor, self.axes.index(self.shape[0]), 0)

    def to_json(self) -> dict[str, Any]:
        """Return the fields; without `axes` for a tensor whose batch is first, as manifests were always written."""
        fields = {"name": self.name, "shape": self.shape, "dtype": self.dtype, "unit": self.unit}
        return fields if self.axes is None else {**fields, "axes": self.axes}


_AXIS = re.compile(r"(?:([1-9][0-9]*)\*)?[^*\s]+")


def multiple(axis: int | str) -> int:
    """Return the number that the length of an axis must be a multiple of: 9 for "9*faces"."""
    found = _AXIS.fullmatch(axis) if isinstance(axis, str) else None
    return int(found[1]) if found and found[1] else 1


def golden_inputs(specs: tuple[TensorSpec, ...], rows: int) -> Arrays:
    """Return small inputs that nearly every model takes. Floats are smooth, bounded, different in every element; whole
    numbers are from 0 to 7, which even the smallest vocabulary has; masks hide nothing; there are two token types."""
    made = {}
    for number, spec in enumerate(specs):
        axes = tuple(axis if isinstance(axis, int) else 2 * multiple(axis) for axis in spec.shape[1:])
        index = np.arange(rows * math.prod(axes), dtype=np.int64)
        values = (
            np.sin(0.37 * index * (1 + number)) if np.dtype(spec.dtype).kind == "f" else _whole(spec, index, number)
        )
        made[spec.name] = same_rows(spec, values.reshape(rows, *axes).astype(spec.dtype))
    return made


def same_rows(spec: TensorSpec, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the rows; the first one everywhere if the rows of a call share the value."""
    return np.repeat(rows[:1], len(rows), axis=0) if spec.shared else rows


def _whole(spec: TensorSpec, index: npt.NDArray[np.int64], number: int) -> npt.NDArray[np.int64]:
    name = spec.name.lower()
    if "mask" in name:
        return np.full_like(index, "padding" not in name)
    return index % 2 if "token_type" in name or "segment" in name else index * (3 + number) % 8


def arrays_to_bytes(arrays: Arrays) -> bytes:
    """Return a compressed, byte-for-byte reproducible .npz (numpy.savez writes the time into the archive)."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in sorted(arrays.items()):
            inner = BytesIO()
            np.lib.format.write_array(inner, np.asarray(array, order="C"), allow_pickle=False)
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), inner.getvalue(), zipfile.ZIP_DEFLATED
            )
    return buffer.getvalue()


def read_arrays(path: Path) -> Arrays:
    """Return the named arrays of an .npz file."""
    if not path.is_file():
        raise EdgekitError(f"{path}: no such file; expected an .npz that holds the model's inputs by name")
    return arrays_from_npz(read_file(path), str(path))


def parse_spec(text: str) -> TensorSpec:
    """Parse 'image:float32:batch,3,224,224'."""
    parts = text.split(":")
    if len(parts) != 3 or not parts[2]:
        raise EdgekitError(f"--input {text!r}: expected {SPEC_HELP}")
    axes = tuple(int(axis) if axis.isdigit() else axis for axis in parts[2].split(","))
    if isinstance(axes[0], int):
        raise EdgekitError(f"--input {text!r}: the first axis is the batch, of any length; expected {SPEC_HELP}")
    try:
        return TensorSpec(parts[0], axes, parts[1])
    except EdgekitError as error:
        raise EdgekitError(f"--input {text!r}: {error}") from None
