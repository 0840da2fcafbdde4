"""OpenAI's embeddings, by a bundle that takes token ids and gives a vector for each text or for each token.

Each text runs as a row of its own length: nothing is padded, so that the rows beside it change no vector.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.tensors import Arrays, TensorSpec
from edgekit.errors import EdgekitError, missing_extra
from runtimes.daemon.batching import BatchLoop
from runtimes.daemon.config import ModelSettings
from runtimes.daemon.fields import Fields, plain
from runtimes.daemon.refusal import RefusedError

MOST_TEXTS = 256  # of a request
LONGEST = 1 << 20  # characters of a text
IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"  # as exports of encoders name them
FIELDS = ("model", "input", "encoding_format", "user", "deadline_ms")


def request(body: Mapping[str, Any]) -> tuple[str, Sequence[str | Sequence[int]], bool, float | None]:
    """Return the model, the inputs, whether vectors come as base64, and the seconds that it may take."""
    fields = Fields(body)
    model = fields.take("model", str, needed=True)
    inputs = fields.prompts("input", MOST_TEXTS)
    packed = fields.choice("encoding_format", "float", ("float", "base64")) == "base64"
    deadline = fields.number("deadline_ms", 0, 1, 1e9) / 1e3 if "deadline_ms" in fields else None
    fields.take("user", str)
    fields.finish(FIELDS, {"dimensions": None})
    if any(isinstance(item, str) and not 0 < len(item) <= LONGEST for item in inputs):
        raise RefusedError(400, f"input: expected texts of 1 to {LONGEST} characters", parameter="input")
    return model, inputs, packed, deadline


def token_ids(inputs: Sequence[str | Sequence[int]], name: str, settings: ModelSettings) -> list[list[int]]:
    """Return the token ids of each input."""
    if all(not isinstance(item, str) for item in inputs):
        return [list(map(int, item)) for item in inputs]
    if not settings.tokenizer:
        raise RefusedError(
            400, f"the model {name!r} has no tokenizer: send arrays of token ids, or set models.{name}.tokenizer"
        )
    tokenizer = opened(settings.tokenizer)
    return [tokenizer.encode(plain(item, "input")).ids if isinstance(item, str) else list(item) for item in inputs]


@lru_cache(maxsize=16)
def opened(path: str) -> Any:
    """Return the tokenizer of a folder, or of a tokenizer.json."""
    try:
        import tokenizers
    except ImportError:
        raise missing_extra("tokenizers", "llm", "a tokenizer") from None
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        found = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise RefusedError(503, f"the tokenizer {file} cannot be read: {error}") from None
    found.no_padding()
    found.no_truncation()
    return found


async def vectors(queue: BatchLoop, ids: Sequence[Sequence[int]], until: float) -> list[npt.NDArray[np.float32]]:
    """Return a vector of length 1 for each row of token ids."""
    inputs, output = queue.session.inputs, _output(queue)
    runs = [asyncio.wrap_future(queue.submit(_arrays(inputs, row), until)) for row in ids]
    try:
        found = await asyncio.gather(*runs)
    except BaseException:
        for run in runs:
            run.cancel()
        raise
    return [_vector(arrays, output) for arrays in found]


def _output(queue: BatchLoop) -> str:
    """Return the name of the output with the vectors. Raises RefusedError if the bundle is no embedding model."""
    session = queue.session
    names = {spec.name for spec in session.inputs}
    output = session.outputs[0]
    if IDS not in names or names - {IDS, MASK, TYPES} or len(output.shape) not in (2, 3) or output.dtype[:5] != "float":
        raise RefusedError(
            400,
            f"the model {queue.name!r} is no embedding model: it takes {', '.join(sorted(names))} and gives "
            f"{output.name} of shape {output.shape_text}; expected {IDS}, and a vector for each text or token",
        )
    return output.name


def _arrays(inputs: Sequence[TensorSpec], ids: Sequence[int]) -> Arrays:
    values = {IDS: np.array([ids], np.int64), MASK: np.ones((1, len(ids))), TYPES: np.zeros((1, len(ids)))}
    if max(ids, default=0) > np.iinfo(np.int32).max:
        raise EdgekitError("a token id is larger than any vocabulary")
    return {spec.name: values[spec.name].astype(spec.dtype) for spec in inputs}


def _vector(arrays: Arrays, output: str) -> npt.NDArray[np.float32]:
    """Return one vector of length 1: the mean over the tokens, if each token has one."""
    found = arrays[output][0].astype(np.float64)
    vector = found.mean(axis=0) if found.ndim == 2 else found
    length = float(np.linalg.norm(vector))
    if not 0 < length < float("inf"):
        raise RefusedError(400, "the model gives no vector for this input: its length is 0, or not finite")
    scaled: npt.NDArray[np.float32] = (vector / length).astype(np.float32)
    return scaled


def answer(model: str, found: Sequence[npt.NDArray[np.float32]], packed: bool, tokens: int) -> dict[str, Any]:
    def written(vector: npt.NDArray[np.float32]) -> str | list[float]:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode() if packed else vector.tolist()

    data = [
        {"object": "embedding", "index": number, "embedding": written(vector)} for number, vector in enumerate(found)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": model, "data": data, "usage": usage}


def until(deadline: float | None, most: float) -> float:
    """Return the monotonic seconds by which a request must have begun to run."""
    return time.monotonic() + min(most, deadline or most)
