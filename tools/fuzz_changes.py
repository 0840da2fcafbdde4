"""How `fuzz_worker.py` changes valid files: bytes, numbers, values of JSON and TOML, and parts of other files."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

Files = dict[str, bytes]

BYTES = (0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x2E, 0x5B, 0x7B)
NUMBERS = (0, 1, -1, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63))
VALUES = (
    b"0",
    b"-1",
    b"1e999",
    b"1099511627776",
    b"9" * 40,
    b"1.5",
    b"null",
    b"true",
    b'""',
    b'"\\u0000"',
    b'"\\ud800"',
    b'"\\u001b[2J"',
    b'"a\\nb"',
    b"[]",
    b"{}",
    b"[[[[[]]]]]",
    b"[" * 3000,
    b'"' + b"x" * 3000 + b'"',
    b'"../../etc/passwd"',
    b'"O"',
)
CHANGES = (1, 1, 1, 2, 4)  # how many changes a set gets
# names and texts that make a careless reader run code, load other files, or print more than one line
TEXTS = (
    "",
    "x",
    "batch",
    "\x1b[2J",
    "\u202e",
    "\0",
    "a\nb",
    "\ud800",
    "x" * 3000,
    "../../etc/passwd",
    "__import__('os').system('true')",
    "[__import__('os').system('true')][0]",
    "torch.ops.aten.from_file.default",
    "_operator.attrgetter",
    "builtins.eval",
    "os.system",
    "evil/kernel",
    "ai.onnx.ml",
    "Loop",
    "If",
    "float32",
    "|O",
)
KEYS = (
    "auto_map",
    "_attn_implementation",
    "kernel_config",
    "quantization_config",
    "backbone",
    "expr_str",
    "guards_code",
    "target",
    "as_custom_obj",
    "use_pickle",
    "metadata",
    "factory",
    "files",
    "__metadata__",
)


def encode(files: Files) -> bytes:
    """Return a set of files as one text of bytes, as libFuzzer changes and stores it."""
    parts = [
        struct.pack("<HI", len(name.encode()), len(content)) + name.encode() + content
        for name, content in files.items()
    ]
    return b"".join(parts)


def decode(data: bytes) -> Files | None:
    """The inverse of `encode`; None for bytes that it does not give."""
    files, at = {}, 0
    try:
        while at < len(data):
            name_bytes, size = struct.unpack_from("<HI", data, at)
            at += 6
            name = data[at : at + name_bytes].decode()
            at += name_bytes
            files[name] = data[at : at + size]
            at += size
    except (struct.error, UnicodeDecodeError):
        return None
    return files if files and at == len(data) else None


def changed(files: Files, rng: random.Random) -> Files:
    """The files with one change or several."""
    result = dict(files)
    for _ in range(rng.choice(CHANGES)):
        name = rng.choice(sorted(result))
        result[name] = _changed(result[name], rng, [content for content in files.values() if content] or [b"x"])
    return result


def _changed(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice((1, 1, 2, 4, 16, 256)))
    other = rng.choice(others)
    start = rng.randrange(len(other))
    piece = other[start : start + rng.choice((1, 8, 64))]
    width = rng.choice((1, 2, 4, 8))
    number = (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))
    if content[:1] in (b"{", b"[") and rng.random() < 0.5:
        with contextlib.suppress(ValueError, RecursionError):  # it is no JSON any more
            return _with_json(content, rng)
    match rng.randrange(9):
        case 0:
            return content[:at] + bytes([rng.choice(BYTES)]) + content[at + 1 :]
        case 1 if at < len(content):
            return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        case 2:
            return content[:at] + number + content[at + width :]
        case 3:
            return content[:at]
        case 4:
            return content[:at] + content[end:]
        case 5:
            return content[:end] + content[at:]
        case 6:
            return content[:at] + piece + content[end:]
        case _:
            return _with_value(content, rng)


def _with_value(content: bytes, rng: random.Random) -> bytes:
    """JSON or TOML with one value replaced; other content with the value put somewhere."""
    marks = [at for at, byte in enumerate(content) if byte in b":=,[" and at + 1 < len(content)]
    at = rng.choice(marks) + 1 if marks else rng.randrange(len(content) + 1)
    end = next((n for n in range(at, len(content)) if content[n] in b",]}\n"), len(content))
    return content[:at] + b" " + rng.choice(VALUES) + content[end:]


def _with_json(content: bytes, rng: random.Random) -> bytes:
    """JSON with one value replaced, removed, copied from elsewhere, or added under a key that some loader obeys."""
    value = json.loads(content)
    spots = list(_spots(value))
    if not spots:
        return content
    (container, key), (other, other_key) = rng.choice(spots), rng.choice(spots)
    made = rng.choice((*TEXTS, *NUMBERS, None, True, [], {}, 0.5, float("nan"), copy.deepcopy(other[other_key])))
    if rng.random() < 0.15:
        del container[key]
    elif rng.random() < 0.6:
        container[key] = made
    elif isinstance(container, dict):
        container[rng.choice((*KEYS, *TEXTS, other_key if isinstance(other_key, str) else "x"))] = made
    else:
        container.insert(key, made)
    return json.dumps(value).encode()


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container in the value with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _spots(value[key])
