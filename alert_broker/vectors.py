"""Vectors of eight doubles for numba, because LLVM does not vectorise numba's own loops over slices of a matrix.

Inside compiled code, use `load` and `store` at an element of a contiguous array, `splat` a number, `spread` an element,
then arithmetic, `sqrt`, `exp`, `maximum` and `lane_sum`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 8  # doubles in a vector: one AVX-512 register, two of AVX2, four of NEON
Vector = Any  # eight doubles inside compiled code

# for small functions that are called for every tile
inlined: Callable[..., Any] = njit(cache=True, error_model="numpy", forceinline=True)


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"vector of {LANES} doubles")


# the decorated function is called with other arguments than the ones in its signature
_lowered: Callable[..., Any] = intrinsic
_vector: Any = _VectorType()
_DOUBLES = ir.VectorType(ir.DoubleType(), LANES)
_INTEGERS = ir.VectorType(ir.IntType(64), LANES)
_LANE = ir.IntType(32)


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _DOUBLES)  # type: ignore[no-untyped-call]


def _define_operator(function: Callable[..., Any], instruction: str) -> None:
    cases = [_vector(_vector, _vector)]  # numba writes a signature as result(arguments)
    infer_global(function)(type("_", (ConcreteTemplate,), {"cases": cases}))  # type: ignore[no-untyped-call]

    @lower_builtin(function, _vector, _vector)  # type: ignore[no-untyped-call]
    def lower(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        # a * b + c is rounded once where the processor can do it
        return getattr(builder, instruction)(*arguments, flags=("contract",))


for _function, _instruction in {"add": "fadd", "sub": "fsub", "mul": "fmul", "truediv": "fdiv"}.items():
    _define_operator(getattr(operator, _function), _instruction)


def _element(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
    """Return the address of array[index], without numba's check for a negative index."""
    return builder.gep(context.make_array(sig.args[0])(context, builder, value=arguments[0]).data, [arguments[1]])


def _broadcast(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_DOUBLES, ir.Undefined)
    lanes = ir.Constant(ir.VectorType(_LANE, LANES), [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(undefined, value, ir.Constant(_LANE, 0)), undefined, lanes)


@_lowered
def load(typing: Any, array: Any, index: Any) -> Any:
    """Return eight elements, starting at array[index]."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        vector = builder.load(builder.bitcast(_element(context, builder, sig, arguments), _DOUBLES.as_pointer()))
        vector.align = 8
        return vector

    return _vector(array, types.intp), generate


@_lowered
def store(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        address = builder.bitcast(_element(context, builder, sig, arguments), _DOUBLES.as_pointer())
        builder.store(arguments[2], address).align = 8
        return context.get_dummy_value()

    return types.void(array, types.intp, _vector), generate


@_lowered
def spread(typing: Any, array: Any, index: Any) -> Any:
    """Return array[index] in all lanes."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        return _broadcast(builder, builder.load(_element(context, builder, sig, arguments)))

    return _vector(array, types.intp), generate


@_lowered
def splat(typing: Any, value: Any) -> Any:
    """Return a number in all lanes."""
    return _vector(types.float64), lambda context, builder, sig, arguments: _broadcast(builder, arguments[0])


def _call(name: str) -> Callable[..., Any]:
    full_name = f"llvm.{name}.v{LANES}f64"

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        function_type = ir.FunctionType(_DOUBLES, [_DOUBLES] * len(arguments))
        function = builder.module.globals.get(full_name) or ir.Function(builder.module, function_type, full_name)
        return builder.call(function, arguments)

    return generate


@_lowered
def sqrt(typing: Any, a: Any) -> Any:
    return _vector(_vector), _call("sqrt")


@_lowered
def maximum(typing: Any, a: Any, b: Any) -> Any:
    return _vector(_vector, _vector), _call("maxnum")


@_lowered
def lane_sum(typing: Any, a: Any) -> Any:
    """Return the sum of the lanes. It adds halves, always in the same order."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        vector, width = arguments[0], LANES
        while width > 1:
            width //= 2
            low, high = (
                ir.Constant(ir.VectorType(_LANE, width), list(range(start, start + width))) for start in (0, width)
            )
            vector = builder.fadd(
                builder.shuffle_vector(vector, vector, low), builder.shuffle_vector(vector, vector, high)
            )
        return builder.extract_element(vector, ir.Constant(_LANE, 0))

    return types.float64(_vector), generate


@_lowered
def _power_of_two(typing: Any, shifted: Any) -> Any:
    """Return 2^k for an argument k + _ROUNDER. Its low bits are the integer k, which a shift moves into the
    exponent."""

    def generate(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        exponent = builder.shl(builder.bitcast(arguments[0], _INTEGERS), ir.Constant(_INTEGERS, [52] * LANES))
        return builder.bitcast(builder.add(exponent, ir.Constant(_INTEGERS, [1023 << 52] * LANES)), _DOUBLES)

    return _vector(_vector), generate


_ROUNDER = 1.5 * 2.0**52  # a double to which this was added has no bits left for a fraction
_LOG2_E = 1.0 / math.log(2.0)
_LN2_HIGH = 6.93147180369123816490e-01  # ln 2 in two parts (Cody & Waite 1980): k * high has no rounding error
_LN2_LOW = 1.90821492927058770002e-10
_TAYLOR = tuple(1.0 / math.factorial(k) for k in range(13))  # gives e^r to 2e-16 for |r| < ln(2) / 2


@inlined
def exp(x: Vector) -> Vector:
    """Return e^x for x <= 0 to 3 ulp, but at least e^-300, so that products of two such numbers do not become denormal,
    which is slow."""
    x = maximum(x, splat(-300.0))
    shifted = x * splat(_LOG2_E) + splat(_ROUNDER)
    k = shifted - splat(_ROUNDER)
    r = x - k * splat(_LN2_HIGH) - k * splat(_LN2_LOW)
    r2 = r * r  # Estrin's scheme: its terms do not wait for each other as in Horner's scheme
    r4 = r2 * r2
    p0 = splat(_TAYLOR[0]) + splat(_TAYLOR[1]) * r + (splat(_TAYLOR[2]) + splat(_TAYLOR[3]) * r) * r2
    p4 = splat(_TAYLOR[4]) + splat(_TAYLOR[5]) * r + (splat(_TAYLOR[6]) + splat(_TAYLOR[7]) * r) * r2
    p8 = splat(_TAYLOR[8]) + splat(_TAYLOR[9]) * r + (splat(_TAYLOR[10]) + splat(_TAYLOR[11]) * r) * r2
    return (p0 + (p4 + (p8 + splat(_TAYLOR[12]) * r4) * r4) * r4) * _power_of_two(shifted)
