"""The compiled loop that runs a plan's operations over bytes. It checks that a byte exists before it reads the byte.

The format is that of the Apache Avro 1.12 specification, section "Binary encoding". Where the specification leaves
room, the loop reads strictly: an int has 32 bits, a boolean is 0 or 1, text is UTF-8 (if it is read), and a block of
items with a size in bytes has exactly that size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Function = TypeVar("Function", bound=Callable[..., Any])

# Each operation has a column (-1 if the value is skipped), two operands and a tag. The tag belongs to an optional
# value: the number before the value, XORed with the tag, gives 2 for a value and 0 for null. The tag is -1 if the value
# is not optional.
(
    # skip fields: the first item, the number of items. An item: bytes before its tag, bytes of the value, tag, bits
    # that are 0
    RUN,
    SKIP,  # bytes
    NUMBER,  # most bytes, whether the number becomes a double
    SIZED,  # whether the value is text, whether only its place is wanted
    FIXED,  # bytes
    FLOAT,  # -, whether the number becomes a double
    DOUBLE,
    BOOLEAN,
    ENUM,  # number of symbols
    NULL,  # level of an array's rows or 0
    PRESENT,
    UNION,  # number of branches; a JUMP follows for each of them
    JUMP,  # target
    BEGIN,  # index of the NEXT of an array or a map
    NEXT,  # body, level of its rows or -1; in place of a tag: fewest bytes of an item
    END,
) = range(16)
COLUMN, FIRST, SECOND, TAG = range(1, 5)
# The place of a value that is not copied: its first byte, shifted by PLACE_BITS, and its size, at most LARGEST_PLACED
PLACE_BITS = 24
LARGEST_PLACED = (1 << PLACE_BITS) - 1

# The codes that `walk` returns. FULL: a level or a column is full, and the caller begins the datum again with a larger
# one. LEFT: bytes are left over after the last datum.
OK, FULL, LEFT, ENDS, LONG, NEGATIVE, BEYOND, BRANCH, SYMBOL, BOOL, COUNT, SIZE, TEXT = range(13)
REASONS = {
    ENDS: "the data ends inside a value",
    LONG: "a number has too many bits",
    NEGATIVE: "a length is negative",
    BEYOND: "a length reaches beyond the end of the data",
    BRANCH: "a union has no such branch",
    SYMBOL: "an enum has no such symbol",
    BOOL: "a boolean is neither 0 nor 1",
    COUNT: "an array or a map claims more items than the data can hold",
    SIZE: "the items of an array or a map do not fill the size that it claims",
    TEXT: "a text is not UTF-8",
}

# Columns of the table of columns, columns of the table of levels, and indices in the report.
BASE, LEVEL, TEXT_BASE, TEXT_CAPACITY, TEXT_USED, TEXT_BEFORE, TEXT_AT_START = range(7)
ROWS, CAPACITY, ROWS_BEFORE, ROWS_AT_START = range(4)
DATUM, AT, FAULT_AT, OPERATION, FULL_BUFFER, NEEDED = range(6)


def _compiled(function: Function) -> Function:
    return cast(Function, njit(cache=True, nogil=True, error_model="numpy")(function))


@_compiled
def _byte(data: Bytes, at: int) -> Any:
    # with a signed index, numba would check for each byte whether the index is negative
    return np.int64(data[np.uint64(at)])


@_compiled
def _number(data: Bytes, at: int, end: int, most: int) -> tuple[Any, int]:
    """Return a zigzag number of at most `most` (5 or 10) bytes, and the byte after it or minus the error's code."""
    value = np.uint64(0)
    for k in range(most):
        if at >= end:
            return 0, -ENDS
        byte = _byte(data, at)
        at += 1
        value |= np.uint64(byte & 0x7F) << np.uint64(7 * k)
        if byte < 0x80:
            if k == most - 1 and byte > (1 if most == 10 else 15):
                return 0, -LONG
            return np.int64(value >> np.uint64(1)) ^ -np.int64(value & np.uint64(1)), at
    return 0, -LONG


@_compiled
def _length(data: Bytes, at: int, end: int) -> tuple[int, int]:
    """Return a length that fits into the data, and the byte after it or minus the error's code."""
    size, at = _number(data, at, end, 10)
    if at < 0:
        return 0, at
    if size < 0:
        return 0, -NEGATIVE
    if size > end - at:
        return 0, -BEYOND
    return size, at


@_compiled
def _is_text(data: Bytes, at: int, end: int) -> bool:
    """Whether these bytes are UTF-8 (RFC 3629, section 4)."""
    while at < end:
        first = _byte(data, at)
        at += 1
        if first < 0x80:
            continue
        low, high = 0x80, 0xBF
        if 0xC2 <= first <= 0xDF:
            more = 1
        elif 0xE0 <= first <= 0xEF:
            more = 2
            if first == 0xE0:
                low = 0xA0
            elif first == 0xED:  # the range that would encode surrogates
                high = 0x9F
        elif 0xF0 <= first <= 0xF4:
            more = 3
            if first == 0xF0:
                low = 0x90
            elif first == 0xF4:
                high = 0x8F
        else:
            return False
        if more > end - at:
            return False
        for _ in range(more):
            byte = _byte(data, at)
            if byte < low or byte > high:
                return False
            low, high = 0x80, 0xBF
            at += 1
    return True


@_compiled
def _four(data: Bytes, at: int) -> Any:
    return _byte(data, at) | _byte(data, at + 1) << 8 | _byte(data, at + 2) << 16 | _byte(data, at + 3) << 24


@_compiled
def walk(
    data: Bytes,
    end: int,
    count: int,
    program: Integers,
    items: Integers,
    cells: Integers,
    valid: Bytes,
    text: Bytes,
    columns: Integers,
    levels: Integers,
    stack: Integers,
    scratch: Integers,
    ends: Integers,
    report: Integers,
) -> int:
    """Read datums up to number `count`, which fill data[:end], starting where `report` says. Return a code: OK if all
    datums were read.

    cells: values of all columns, column by column, as 64 bits; valid: 0 for null; text: bytes of the string columns,
    whose cells hold the end of each string, or the place of a value that is not copied; ends: the byte at which each
    datum ends. A datum that fails leaves no rows; the report then holds the byte and the operation of the fault. If
    bytes are left over, no datum leaves rows, because nobody knows where each datum starts.
    """
    double, double_bits = scratch[:1].view(np.float64), scratch[:1]
    single, single_bits = scratch[1:].view(np.float32), scratch[1:].view(np.uint32)
    code = OK
    datum, start = report[DATUM], report[AT]
    at = start
    if datum == 0:
        levels[:, ROWS_AT_START] = levels[:, ROWS]
        columns[:, TEXT_AT_START] = columns[:, TEXT_USED]
    while datum < count:
        start = at
        levels[:, ROWS_BEFORE] = levels[:, ROWS]
        columns[:, TEXT_BEFORE] = columns[:, TEXT_USED]
        pc = 0
        index: Any = np.uint64(0)  # unsigned as an index: a signed one costs a comparison each time
        depth = -1
        if levels[0, ROWS] == levels[0, CAPACITY]:
            report[FULL_BUFFER], report[NEEDED] = 0, levels[0, ROWS] + 1
            code = FULL
        while code == OK:
            index = np.uint64(pc)
            operation, column, first = program[index, 0], program[index, COLUMN], program[index, FIRST]
            pc += 1
            if operation == RUN:
                for k in range(first, first + program[index, SECOND]):
                    item = np.uint64(k)
                    if items[item, 0] >= end - at:
                        code = ENDS
                        break
                    at += items[item, 0]
                    tag = _byte(data, at) ^ items[item, 2]
                    at += 1
                    if tag == 2:
                        if items[item, 1] > end - at:
                            code = ENDS
                            break
                        if _byte(data, at) & items[item, 3]:
                            code = BOOL
                            break
                        at += items[item, 1]
                    elif tag != 0:
                        at -= 1
                        code = BRANCH
                        break
            elif operation == SKIP:
                if first > end - at:
                    code = ENDS
                else:
                    at += first
            elif operation <= NULL:
                present = operation != NULL
                value = columns[column, TEXT_USED] if column >= 0 else 0  # the end of a null string; 0 in other columns
                if program[index, TAG] >= 0:
                    if at >= end:
                        code = ENDS
                        continue
                    tag = _byte(data, at) ^ program[index, TAG]
                    if tag & ~2:
                        code = BRANCH
                        continue
                    at += 1
                    present = tag == 2
                after = at
                if not present:
                    if operation == NULL and first > 0:
                        value = levels[first, ROWS]
                elif operation == NUMBER:
                    value, after = _number(data, at, end, first)
                    if program[index, SECOND]:
                        double[0] = value
                        value = double_bits[0]
                elif operation in (SIZED, FIXED):
                    size = first
                    if operation == SIZED:
                        size, after = _length(data, at, end)
                    elif size > end - at:
                        after = -ENDS
                    if after >= 0 and column >= 0 and operation == SIZED and program[index, SECOND]:
                        value = after << PLACE_BITS | min(size, LARGEST_PLACED)
                    elif after >= 0 and column >= 0:
                        if operation == SIZED and first and not _is_text(data, after, after + size):
                            code = TEXT
                            continue
                        if value + size > columns[column, TEXT_CAPACITY]:
                            report[FULL_BUFFER], report[NEEDED] = len(levels) + column, value + size
                            code = FULL
                            continue
                        target = columns[column, TEXT_BASE] + value
                        for k in range(size):
                            text[np.uint64(target + k)] = data[np.uint64(after + k)]
                        value += size
                        columns[column, TEXT_USED] = value
                    if after >= 0:
                        after += size
                elif operation == FLOAT:
                    if end - at < 4:
                        after = -ENDS
                    else:
                        value = _four(data, at)
                        if program[index, SECOND]:
                            single_bits[0] = value
                            double[0] = single[0]
                            value = double_bits[0]
                        after = at + 4
                elif operation == DOUBLE:
                    if end - at < 8:
                        after = -ENDS
                    else:
                        value = _four(data, at) | _four(data, at + 4) << 32
                        after = at + 8
                elif operation == BOOLEAN:
                    if at >= end:
                        after = -ENDS
                    else:
                        value = _byte(data, at)
                        after = at + 1 if value <= 1 else -BOOL
                else:  # ENUM
                    value, after = _number(data, at, end, 5)
                    if after >= 0 and (value < 0 or value >= first):
                        after = -SYMBOL
                if after < 0:
                    code = -after
                    continue
                at = after
                if column >= 0:
                    cell = np.uint64(columns[column, BASE] + levels[columns[column, LEVEL], ROWS])
                    cells[cell] = value
                    valid[cell] = present
            elif operation == NEXT:
                level = program[index, SECOND]
                if stack[depth, 0] > 0:
                    stack[depth, 0] -= 1
                    if level >= 0:
                        levels[level, ROWS] += 1
                if stack[depth, 0] > 0:
                    pc = first
                    continue
                if stack[depth, 1] >= 0 and at != stack[depth, 1]:
                    code = SIZE
                    continue
                number, after = _number(data, at, end, 10)
                limit = end
                stack[depth, 1] = -1
                if after >= 0 and number < 0:
                    size, after = _length(data, after, end)
                    limit = stack[depth, 1] = after + size
                    number = -number
                if after < 0:
                    code = -after
                # the second condition: -2^63 is its own negative
                elif number < 0 or number > (limit - after) // program[index, TAG]:
                    code = COUNT
                elif number == 0:
                    at = after
                    if level >= 0:
                        cell = columns[column, BASE] + levels[columns[column, LEVEL], ROWS]
                        cells[cell] = levels[level, ROWS]
                        valid[cell] = 1
                    depth -= 1
                elif level >= 0 and number > levels[level, CAPACITY] - levels[level, ROWS]:
                    report[FULL_BUFFER], report[NEEDED] = level, levels[level, ROWS] + number
                    code = FULL
                else:
                    at = after
                    stack[depth, 0] = number
                    pc = first
            elif operation == UNION:
                branch, after = _number(data, at, end, 10)
                if after < 0:
                    code = -after
                elif branch < 0 or branch >= first:
                    code = BRANCH
                else:
                    at = after
                    pc += branch
            elif operation == JUMP:
                pc = first
            elif operation == BEGIN:
                depth += 1
                stack[depth, 0] = 0  # items left in the block
                stack[depth, 1] = -1  # the byte at which the block says that it ends
                pc = first
            elif operation == PRESENT:
                valid[columns[column, BASE] + levels[columns[column, LEVEL], ROWS]] = 1
            else:  # END
                break
        if code != OK:
            levels[:, ROWS] = levels[:, ROWS_BEFORE]
            columns[:, TEXT_USED] = columns[:, TEXT_BEFORE]
            report[FAULT_AT], report[OPERATION] = at, index
            break
        levels[0, ROWS] += 1
        ends[datum] = at
        datum += 1
    if code == OK and at != end:
        levels[:, ROWS] = levels[:, ROWS_AT_START]
        columns[:, TEXT_USED] = columns[:, TEXT_AT_START]
        datum, start, report[FAULT_AT], code = 0, 0, at, LEFT
    report[DATUM], report[AT] = datum, start
    return code
