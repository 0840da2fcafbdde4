"""Write small GGUF files: language models with random weights, and damaged ones."""

import struct
from pathlib import Path

import numpy as np

from edgekit.importers.gguf_formats import FORMATS

TYPES = {int: (4, "<I"), float: (6, "<f"), bool: (7, "<?")}
NUMBER_OF = {form.name: number for number, form in FORMATS.items()}
SIZES = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "head_size": 32, "hidden": 96, "vocabulary": 307}


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, value) -> bytes:
    """One key of the metadata."""
    if isinstance(value, bytes):  # type and value as they are to be written
        return text(key) + value
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        if value and isinstance(value[0], str):
            return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        return text(key) + struct.pack("<IIQ", 9, 5, len(value)) + np.array(value, "<i4").tobytes()
    number, code = TYPES[type(value)]
    return text(key) + struct.pack("<I", number) + struct.pack(code, value)


def gguf(metadata: dict, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], version: int = 3) -> bytes:
    """A file. tensors: (format, shape with the innermost axis last, content) by name."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    header += b"".join(entry(key, value) for key, value in metadata.items())
    data = b""
    for name, (form, shape, content) in tensors.items():
        header += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", NUMBER_OF[form], len(data))
        data += content + bytes(-len(content) % 32)
    return header + bytes(-len(header) % 32) + data


def encoded(values: np.ndarray, form: str) -> bytes:
    """Values in a format, rounded to the nearest that it can store in the plainest way."""
    if form == "F32":
        return values.astype("<f4").tobytes()
    if form == "F16":
        return values.astype("<f2").tobytes()
    if form == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    blocks = values.reshape(-1, 32)
    if form == "Q8_0":
        scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype("<f2")
        codes = np.rint(blocks / scale).astype(np.int8)
        return b"".join(s.tobytes() + c.tobytes() for s, c in zip(scale, codes, strict=True))
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    if form == "Q4_0":
        scale = (np.abs(blocks).max(1, keepdims=True) / 7).astype("<f2")
        codes, heads = np.clip(np.rint(blocks / scale) + 8, 0, 15), [s.tobytes() for s in scale]
    else:
        assert form == "Q4_1"
        scale, least = ((high - low) / 15).astype("<f2"), low.astype("<f2")
        codes = np.clip(np.rint((blocks - least) / scale), 0, 15)
        heads = [s.tobytes() + m.tobytes() for s, m in zip(scale, least, strict=True)]
    codes = codes.astype(np.uint8)
    return b"".join(h + (c[:16] | c[16:] << 4).tobytes() for h, c in zip(heads, codes, strict=True))


def toy_weights(family: str, seed: int = 0, tied: bool = True, **sizes: int) -> dict[str, np.ndarray]:
    """Random weights of a small model by the names of the file."""
    of = SIZES | sizes
    rng = np.random.default_rng(seed)
    queries, keys = of["heads"] * of["head_size"], of["kv_heads"] * of["head_size"]

    def matrix(rows, inputs):
        return rng.normal(0, inputs**-0.5, (rows, inputs)).astype(np.float32)

    def norm(size):
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    found = {"token_embd.weight": matrix(of["vocabulary"], of["width"]), "output_norm.weight": norm(of["width"])}
    if not tied:
        found["output.weight"] = matrix(of["vocabulary"], of["width"])
    for number in range(of["layers"]):
        layer = {
            "attn_norm.weight": norm(of["width"]),
            "attn_q.weight": matrix(queries, of["width"]),
            "attn_k.weight": matrix(keys, of["width"]),
            "attn_v.weight": matrix(keys, of["width"]),
            "attn_output.weight": matrix(of["width"], queries),
            "ffn_norm.weight": norm(of["width"]),
            "ffn_gate.weight": matrix(of["hidden"], of["width"]),
            "ffn_up.weight": matrix(of["hidden"], of["width"]),
            "ffn_down.weight": matrix(of["width"], of["hidden"]),
        }
        if family == "qwen2":
            layer |= {f"attn_{part}.bias": norm(size) for part, size in (("q", queries), ("k", keys), ("v", keys))}
        if family == "qwen3":
            layer |= {f"attn_{part}_norm.weight": norm(of["head_size"]) for part in "qk"}
        found |= {f"blk.{number}.{name}": value for name, value in layer.items()}
    return found


def toy_metadata(family: str, **sizes: int) -> dict:
    """The metadata of such a model: 256 bytes are its tokens, then pairs of letters, then two control tokens."""
    of = SIZES | sizes
    letters = byte_letters()
    merges = ["t h", "i n", "th e", "a n", "r e"]
    tokens = [*letters, *("".join(merge.split()) for merge in merges)]
    tokens += [f"<|{number}|>" for number in range(of["vocabulary"] - len(tokens))]
    control = of["vocabulary"] - len(letters) - len(merges)
    return {
        "general.architecture": family,
        "general.name": f"toy {family}",
        f"{family}.block_count": of["layers"],
        f"{family}.context_length": 2048,
        f"{family}.embedding_length": of["width"],
        f"{family}.feed_forward_length": of["hidden"],
        f"{family}.attention.head_count": of["heads"],
        f"{family}.attention.head_count_kv": of["kv_heads"],
        f"{family}.attention.key_length": of["head_size"],
        f"{family}.attention.value_length": of["head_size"],
        f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{family}.rope.freq_base": 10000.0,
        f"{family}.rope.dimension_count": of.get("rope_size", of["head_size"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - control) + [3] * control,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": of["vocabulary"] - 1,
        "tokenizer.chat_template": "{% for m in messages %}<|0|>{{ m.role }}: {{ m.content }}{% endfor %}<|1|>",
    }


def byte_letters() -> list[str]:
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in own] + [chr(256 + number) for number in range(256 - len(own))]


def toy_model(
    folder: Path, family: str = "llama", form: str = "Q4_0", *, tied: bool = True, seed: int = 0, **sizes
) -> Path:
    """Write a small model; vectors stay in float32."""
    tensors = {
        name: (kind := "F32" if value.ndim == 1 else form, value.shape, encoded(value, kind))
        for name, value in toy_weights(family, seed, tied, **sizes).items()
    }
    path = folder / f"{family}-{form}-{tied}-{seed}.gguf"
    path.write_bytes(gguf(toy_metadata(family, **sizes), tensors))
    return path
