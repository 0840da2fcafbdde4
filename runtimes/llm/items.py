"""The most probable items of a catalogue, such as the products that a recommender may name.

The items are sequences of tokens, and a trie holds their common beginnings once. The search is best first: it goes on
with the beginning that is most probable so far. A longer sequence is never more probable than its beginning, so the
first whole item that comes up is the most probable one of the catalogue, and no sequence outside of it is ever scored.
(GREAM and other generative recommenders decode item ids along such a trie, by beam search, which may miss the best.)
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edgekit.errors import EdgekitError
from runtimes.llm.answers import log_softmax
from runtimes.llm.engine import Engine, Floats, Ids, Item

WIDTH = 16  # beginnings to a step; 16 rows take a few times as long as one
CHUNK = 256  # tokens of the prompt to a step
PROMPT, FIRST = -3, -4  # sequences of the prompt, and of the beginnings, downwards


@dataclass(slots=True)
class Node:
    """A beginning of items. item: its index in the catalogue if it is a whole one."""

    path: tuple[int, ...] = ()
    children: dict[int, Node] = field(default_factory=dict)
    item: int | None = None


def trie(items: Sequence[Sequence[int]]) -> Node:
    """Return the root. No item may be empty, or the beginning of another one: behind it the search could not say
    whether it ends."""
    if not items:
        raise EdgekitError("the catalogue is empty; expected at least one item")
    root = Node()
    for index, tokens in enumerate(items):
        if not len(tokens):
            raise EdgekitError(f"item {index + 1} of the catalogue is empty; expected at least one token")
        node = root
        for token in tokens:
            _check_end(node, index)
            node = node.children.setdefault(token, Node((*node.path, token)))
        _check_end(node, index)
        if node.children:
            raise EdgekitError(f"item {index + 1} is the beginning of another one; end each item with a line end")
        node.item = index
    return root


def best_items(engine: Engine, prompt: Ids, items: Sequence[Sequence[int]], most: int) -> list[tuple[int, float]]:
    """Return the index and the log probability of the `most` most probable items behind a prompt, the best first."""
    root = trie(items)
    if not 1 <= most <= len(items):
        raise EdgekitError(f"the best {most} items of {len(items)}; expected 1 to {len(items)}")
    longest, vocabulary = max(map(len, items)), engine.architecture.vocabulary
    if wrong := [token for item in items for token in item if not 0 <= token < vocabulary]:
        raise EdgekitError(f"the catalogue has the token id {wrong[0]}; expected 0 to {vocabulary - 1}")
    found: list[tuple[int, float]] = []
    try:
        order = itertools.count()  # of beginnings with equal probabilities, the first that was seen
        queue = _children(root, 0.0, _read(engine, prompt), order)
        while len(found) < most:
            if (item := queue[0][2].item) is not None:
                found.append((item, -heapq.heappop(queue)[0]))
                continue
            nodes = _unfinished(queue, _width(engine, longest))
            for (minus, _, node), row in zip(nodes, _logits(engine, [node for *_, node in nodes]), strict=True):
                for child in _children(node, -minus, row, order):
                    heapq.heappush(queue, child)
        return found
    finally:
        for sequence in [number for number in engine.blocks.tables if number <= PROMPT]:
            engine.remove(sequence)


Entry = tuple[float, int, Node]  # minus the log probability, a number that breaks ties, the beginning


def _children(node: Node, logprob: float, logits: Floats, order: itertools.count[int]) -> list[Entry]:
    """Return the beginnings that are one token longer, the most probable first. logits: (vocabulary,) behind `node`."""
    row = log_softmax(logits)
    found = [(-(logprob + float(row[token])), next(order), child) for token, child in node.children.items()]
    heapq.heapify(found)
    return found


def _unfinished(queue: list[Entry], width: int) -> list[Entry]:
    """Take the most probable beginnings, as many as come before a whole item."""
    found: list[Entry] = []
    while queue and len(found) < width and queue[0][2].item is None:
        found.append(heapq.heappop(queue))
    return found


def _width(engine: Engine, longest: int) -> int:
    """Return how many beginnings of this many tokens the cache and a step have room for."""
    blocks = engine.blocks.count(longest) + 1
    return max(1, min(WIDTH, engine.blocks.free // blocks, engine.rows // longest))


def _read(engine: Engine, prompt: Ids) -> Floats:
    """Compute the prompt; return (vocabulary,) the logits behind it."""
    if not len(prompt):
        raise EdgekitError("the prompt is empty; expected at least one token")
    begun, chunk = engine.reuse(PROMPT, prompt), min(CHUNK, engine.rows)
    for start in range(begun, len(prompt), chunk):
        last: Floats = engine.step([Item(PROMPT, prompt[start : start + chunk])])[0][-1]
    return last


def _logits(engine: Engine, nodes: Sequence[Node]) -> list[Floats]:
    """Return (vocabulary,) the logits behind each beginning. A beginning is computed from its first token, because it
    is short and would take memory while it waits."""
    steps = []
    for number, node in enumerate(nodes):
        engine.fork(PROMPT, FIRST - number)
        steps.append(Item(FIRST - number, np.array(node.path, np.int64)))
    rows = engine.step(steps)
    for step in steps:
        engine.remove(step.sequence)
    return [found[-1] for found in rows]


def _check_end(node: Node, index: int) -> None:
    if node.item is not None:
        raise EdgekitError(
            f"item {node.item + 1} of the catalogue is item {index + 1} or its beginning; end each item with a line end"
        )
