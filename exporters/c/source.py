"""Write a program as C: kernels.c, the constants and `model_run`, in one file that needs only libm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit import __version__
from edgekit.bundle.encoding import Affine, Encoding, Float
from edgekit.bundle.tensors import Arrays, TensorSpec
from exporters.c.program import LANES, Argument, Buffer, Port, Program, Tensor
from exporters.escape import in_c_comment

FOLDER = Path(__file__).parent
PER_LINE = 8  # numbers
MEMORY = "memory"  # the workspace in model_run, from its first cache line boundary on


@dataclass(frozen=True, slots=True)
class CSource:
    """The text of model.c and model.h. workspace: the floats that a caller must provide for each thread."""

    model: str
    header: str
    workspace: int


def write_source(program: Program, encodings: Mapping[str, Encoding], name: str, key: str) -> CSource:
    """Write C99 for a program. `encodings`: constants to store as codes, which each call of `model_run` decodes first.

    name: the model's name, for the comment at the top; key: the hash by which a session recognises the model.
    """
    offsets, size = _offsets(program)
    constants, decoders = [], []
    for tensor in _tensors(program):
        identifier, values = _identifier(tensor), program.tensors[tensor]
        if tensor not in encodings:
            constants.append(_array("float", identifier, values))
            continue
        texts, call = _decoder(identifier, encodings[tensor])
        constants += texts
        decoders += [f"float *const {identifier} = {MEMORY} + {size};", call]
        size += -(-values.size // LANES) * LANES
    buffers = [f"float *const {_identifier(buffer)} = {MEMORY} + {offset};" for buffer, offset in offsets.items()]
    ports = (*program.inputs, program.output)
    advance = ", ".join(["row++", *(f"{spec.name} += {_row(spec)}" for spec in ports)])
    calls = [f"{call.kernel}({', '.join(map(_argument, call.arguments))});" for call in program.calls]
    body = [
        f"float *const {MEMORY} = workspace + (0 - (uintptr_t)workspace / sizeof(float)) % {LANES};",
        *buffers,
        *decoders,
        f"for (size_t row = 0; row < rows; {advance}) {{",
        *(f"    {call}" for call in calls),
        "}",
    ]
    workspace = size + LANES
    model = [
        f"/* {in_c_comment(name)}, written by edgekit {__version__}. model.h says how to use it. */",
        '#include "model.h"',
        "",
        f"#define TOKENS {program.tokens}",
        f"#define STRIDE {program.stride} /* floats; a multiple of {LANES}, the widest vector */",
        f"#define HEAD_DIM {program.head_dim}",
        *_uses(program, encodings),
        "",
        (FOLDER / "kernels.c").read_text(),
        f'const char model_key[] = "{key}";',
        f"const size_t model_workspace = {workspace};",
        "const int model_lanes = LANES;",
        "",
        *constants,
        f"void model_run({_parameters(program)})",
        "{",
        *(f"    {line}" for line in body),
        "}",
    ]
    return CSource("\n".join(model) + "\n", _header(program, name, workspace), workspace)


def write_check(program: Program, inputs: Arrays, expected: Arrays, tolerance: float) -> str:
    """Return check.c: golden rows, and a program that exits with 0 if `model_run` gives their outputs."""
    names = [spec.name for spec in program.inputs]
    rows = len(inputs[names[0]])
    golden = [_array("float", f"in_{name}", inputs[name]) for name in names]
    pointers = [f"in_{spec.name} + row * {_row(spec)}" for spec in program.inputs]
    return "\n".join(
        [
            '#include "model.h"',
            "",
            f"#define ROWS {rows}",
            f"#define OUTPUTS {_row(program.output)} /* of one row */",
            f"#define TOLERANCE {tolerance:.1e}f",
            "",
            *golden,
            _array("float", "expected", expected[program.output.name]),
            "static void run(size_t row, size_t rows, float *out, float *workspace)",
            "{",
            f"    model_run(rows, {', '.join(pointers)}, out, workspace);",
            "}",
            "",
            (FOLDER / "check.c").read_text(),
        ]
    )


def _header(program: Program, name: str, workspace: int) -> str:
    described = [
        in_c_comment(f"  {spec.name}: rows x {' x '.join(map(str, spec.shape[1:]))}{', ' * bool(spec.unit)}{spec.unit}")
        for spec in (*program.inputs, program.output)
    ]
    return "\n".join(
        [
            f"/* {in_c_comment(name)}, written by edgekit {__version__}",
            " *",
            " *     cc -std=c99 -O3 -march=native -c model.c        (and -lm where you link)",
            " *",
            " * C99 and libm, no memory but the caller's, no state: any number of threads may run it, each with a",
            " * workspace of its own. Compile without -ffast-math. Two models in one program: compile each with",
            " * -Dmodel_run=NAME of its own, and likewise for model_key, model_lanes and model_workspace.",
            " */",
            "#ifndef EDGEKIT_MODEL_H",
            "#define EDGEKIT_MODEL_H",
            "",
            "#include <stddef.h>",
            "",
            f"#define MODEL_WORKSPACE {workspace} /* floats; alignment does not matter */",
            "",
            "#ifdef __cplusplus",
            'extern "C" {',
            "#endif",
            "",
            "/* One after the other, row by row, in float32:",
            *(f" * {line}" for line in described),
            " * Rows do not influence one another. Inputs must be finite. */",
            f"void model_run({_parameters(program)});",
            "",
            "extern const char model_key[];        /* SHA-256 of the model, as in manifest.json */",
            "extern const size_t model_workspace;  /* MODEL_WORKSPACE, for those who load a library */",
            "extern const int model_lanes;         /* floats in a vector: 16, 8, 4, or 1 if the compiler has none */",
            "",
            "#ifdef __cplusplus",
            "}",
            "#endif",
            "#endif",
            "",
        ]
    )


def _offsets(program: Program) -> tuple[dict[str, int], int]:
    """Return the offset of each buffer in the workspace, and the floats that all buffers take together. Two buffers
    that are never needed at the same time share memory, so that the workspace stays in the L2 cache."""
    spans: dict[str, tuple[Buffer, int, int]] = {}
    for time, call in enumerate(program.calls):
        for item in call.arguments:
            if isinstance(item, Buffer):
                buffer, first, _ = spans.get(item.name, (item, time, time))
                assert buffer == item, f"two buffers are called {item.name}"
                spans[item.name] = (buffer, first, time)
    offsets: dict[str, int] = {}
    size = 0
    for name, (buffer, first, last) in spans.items():
        wanted = buffer.features * program.stride
        taken = sorted(
            (offsets[other], offsets[other] + spans[other][0].features * program.stride)
            for other in offsets
            if spans[other][1] <= last and first <= spans[other][2]
        )
        offset = 0
        for start, end in taken:
            if start - offset >= wanted:
                break
            offset = max(offset, end)
        offsets[name] = offset
        size = max(size, offset + wanted)
    return offsets, size


def _tensors(program: Program) -> list[str]:
    """Return the names of the constants that the program uses, in the order of their first use."""
    used = (item.name for call in program.calls for item in call.arguments if isinstance(item, Tensor))
    return list(dict.fromkeys(used))


def _uses(program: Program, encodings: Mapping[str, Encoding]) -> list[str]:
    """Return switches for the kernels that not every model needs: compilers warn about functions that nobody calls."""
    kernels = {call.kernel for call in program.calls}
    encoding_types = {type(encodings[name]).__name__ for name in _tensors(program) if name in encodings}
    needs = {
        "REPEAT": "repeat" in kernels,
        "SOFTMAX": "softmax" in kernels,
        "SCALES": "Affine" in encoding_types,
        "PALETTES": "Palette" in encoding_types,
    }
    return [f"#define USES_{name}" for name, needed in needs.items() if needed]


def _decoder(identifier: str, encoding: Encoding) -> tuple[list[str], str]:
    """Return codes and their table as constants, and the call that decodes them."""
    rows, columns = len(encoding.codes), encoding.codes[0].size
    if isinstance(encoding, Affine):
        tables = [
            _array("int8_t", f"{identifier}_codes", encoding.codes),
            _array("float", f"{identifier}_scale", encoding.scale),
        ]
        numbers = f"{encoding.scale.size}, {rows}, {columns}"
        return tables, f"decode_scaled({identifier}, {identifier}_codes, {identifier}_scale, {numbers});"
    tables = [
        _array("uint8_t", f"{identifier}_codes", encoding.codes),
        _array("float", f"{identifier}_palette", encoding.palette),
    ]
    return tables, f"decode_palette({identifier}, {identifier}_codes, {identifier}_palette, {encoding.codes.size});"


def _parameters(program: Program) -> str:
    inputs = [f"const float *{spec.name}" for spec in program.inputs]
    return ", ".join(["size_t rows", *inputs, f"float *{program.output.name}", "float *workspace"])


def _row(spec: TensorSpec) -> int:
    """Return the number of floats in one row."""
    return int(np.prod([axis for axis in spec.shape[1:] if isinstance(axis, int)], dtype=np.int64))


def _argument(value: Argument) -> str:
    match value:
        case Port(name):
            return name
        case Buffer(name) | Tensor(name):
            return _identifier(name)
        case None:
            return "NULL"
        case float():
            return _float(value)
    return str(value)


def _identifier(name: str) -> str:
    """Return a buffer's or constant's name in C. It ends in `_`, as no name of an input or output does."""
    return name.replace(".", "_") + "_"


def _float(value: float) -> str:
    """Return a float32 as a C literal: nine digits restore every float32 exactly."""
    text = f"{value:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def _array(c_type: str, name: str, values: Float | npt.NDArray[np.int8] | npt.NDArray[np.uint8]) -> str:
    flat = values.ravel().tolist()
    texts = [_float(value) for value in flat] if c_type == "float" else [str(value) for value in flat]
    return f"static const {c_type} {name}[{len(texts)}] = {{\n{_lines(texts)}\n}};\n"


def _lines(texts: list[str]) -> str:
    return ",\n".join(_joined(texts[start : start + PER_LINE]) for start in range(0, len(texts), PER_LINE))


def _joined(texts: Iterable[str]) -> str:
    return "    " + ", ".join(texts)
