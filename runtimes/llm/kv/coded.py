"""A layer's keys and values in codes, block by block; the tokens of the block that is being filled are in float16."""

from __future__ import annotations

import torch

from runtimes.llm.kv.cache import NO_LIMIT, LayerCache, Prompt, Read, Tokens
from runtimes.llm.kv.codes import Codes, joined, quantized


class CodedLayer(LayerCache):
    """bits: of a code; block: tokens to a block; with 1, a token is stored in codes at once, and it sees itself so;
    key_axis: of the keys that share a scale: -2, those of a dimension in a block; -1, those of a token. A token's
    values share one. Codes have shape (kv heads, blocks, tokens to a block, head size)."""

    def __init__(self, prompt: Prompt, bits: int, block: int, key_axis: int) -> None:
        super().__init__(prompt.shape)
        self._bits, self._block, self._key_axis = bits, block, key_axis
        self._keys: Codes | None = None
        self._values: Codes | None = None
        self._new_keys, self._new_values = prompt.keys, prompt.values  # float16
        self.settle()

    def transform(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what is quantised of keys or values."""
        return rows

    def restore(self, rows: torch.Tensor) -> torch.Tensor:
        """Take `transform` back."""
        return rows

    @property
    def room(self) -> int:
        return NO_LIMIT if self._block == 1 else self._block - self._new_keys.shape[1]

    def append(self, tokens: Tokens) -> None:
        self._new_keys = torch.cat([self._new_keys, tokens.keys.half()], 1)
        self._new_values = torch.cat([self._new_values, tokens.values.half()], 1)
        if self._block == 1:
            self.settle()

    def read(self, queries: torch.Tensor) -> Read:
        dtype = self.shape.dtype
        keys, values = self._new_keys.to(dtype), self._new_values.to(dtype)
        if self._keys is not None and self._values is not None:
            keys = torch.cat([self.restore(self._keys.values(dtype)).flatten(1, 2), keys], 1)
            values = torch.cat([self.restore(self._values.values(dtype)).flatten(1, 2), values], 1)
        return Read(keys, values, torch.arange(keys.shape[1], device=self.shape.device)[None])

    def settle(self) -> None:
        block, new = self._block, (self._new_keys, self._new_values)
        full = self._new_keys.shape[1] // block * block
        if not full:
            return
        keys, values = (self.transform(part[:, :full].unflatten(1, (-1, block))) for part in new)
        self._keys = joined(self._keys, quantized(keys, self._key_axis, self._bits), 1)
        self._values = joined(self._values, quantized(values, -1, self._bits), 1)
        self._new_keys, self._new_values = (part[:, full:].clone() for part in new)
