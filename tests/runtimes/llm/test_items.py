"""Items of a catalogue: the best ones are those of brute force over the whole catalogue."""

import json
from contextlib import closing

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from runtimes.llm.answers import log_softmax
from runtimes.llm.engine import Item
from runtimes.llm.items import best_items, trie
from runtimes.llm.model import load
from runtimes.llm.native_engine import NativeEngine
from runtimes.llm.torch_engine import TorchEngine
from tests.gguf_files import toy_model
from tests.runtimes.llm.conftest import compiler


def catalogue(seed, number, length):
    """Return items that share many beginnings."""
    rng = np.random.default_rng(seed)
    return [list(item) for item in sorted({tuple(rng.integers(0, 4, length).tolist()) for _ in range(number)})]


def brute_force(engine, prompt, items):
    """Return the log probability of each item, computed alone."""
    found = []
    for item in items:
        logits = engine.step([Item(50, np.array([*prompt, *item], np.int64), logits="all")])[0]
        engine.remove(50)
        rows = log_softmax(logits)[len(prompt) - 1 : -1]
        found.append(sum(rows[at, token] for at, token in enumerate(item)))
    return np.array(found)


def check(engine, items, most, prompt):
    found = best_items(engine, prompt, items, most)
    scores = brute_force(engine, prompt, items)
    assert [index for index, _ in found] == np.argsort(-scores)[:most].tolist()
    assert [logprob for _, logprob in found] == pytest.approx(scores[[index for index, _ in found]], abs=1e-9)
    assert engine.blocks.free == engine.blocks.number


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("number", "length", "blocks"), [(1, 3, 40), (60, 4, 40), (200, 5, 7), (4, 1, 40)])
def test_the_best_items_are_those_of_brute_force(toy, seed, number, length, blocks):
    engine = TorchEngine(toy("qwen2", "Q8_0"), blocks=blocks, dtype="float64")
    items = catalogue(seed, number, length)
    prompt = np.random.default_rng(seed).integers(0, 300, 21 + seed)
    check(engine, items, min(5, len(items)), prompt)


def test_items_of_several_lengths_and_all_of_them(toy):
    engine = TorchEngine(toy("llama", "Q8_0"), blocks=40, dtype="float64")
    check(engine, [[1], [2, 1], [2, 2, 7, 9, 11, 3], [2, 2, 8], [3, 3]], 5, np.arange(10))


@compiler
def test_the_native_engine_finds_the_same_bits(toy):
    model, items, prompt = toy("llama", "Q4_1"), catalogue(1, 100, 4), np.arange(30)
    with closing(NativeEngine(model, blocks=40, threads=1)) as engine:
        check(engine, items, 10, prompt)
        expected = best_items(engine, prompt, items, 10)
    with closing(NativeEngine(model, blocks=6, threads=2, rows=8)) as engine:  # few at a time
        assert best_items(engine, prompt, items, 10) == expected


def test_a_greedy_choice_of_tokens_would_miss_the_best_item(toy):
    engine, prompt, missed = TorchEngine(toy("qwen2", "Q8_0"), blocks=40, dtype="float64"), np.arange(9), 0
    for seed in range(10):
        items = catalogue(seed, 40, 4)
        node, path = trie(items), []
        while node.item is None:
            logits = engine.step([Item(60, np.array([*prompt, *path]))])[0][-1]
            engine.remove(60)
            path.append(max(node.children, key=lambda token, row=logits: row[token]))
            node = node.children[path[-1]]
        missed += best_items(engine, prompt, items, 1)[0][0] != node.item
    assert missed > 0


@pytest.mark.parametrize(
    ("items", "most", "prompt", "problem"),
    [
        ([], 1, [1], "catalogue is empty"),
        ([[1], []], 1, [1], "item 2 of the catalogue is empty"),
        ([[1, 2], [1]], 1, [1], "item 2 is the beginning of another"),
        ([[1], [1, 2]], 1, [1], "item 1 of the catalogue is item 2 or its beginning"),
        ([[1, 2], [1, 2]], 1, [1], "item 1 of the catalogue is item 2 or its beginning"),
        ([[1], [2]], 3, [1], "best 3 items of 2"),
        ([[1], [2]], 0, [1], "best 0 items of 2"),
        ([[1], [2]], 1, [], "prompt is empty"),
        ([[1, 307, 3], [2]], 2, [1], "token id 307; expected 0 to 306"),
        ([[-1]], 1, [1], "token id -1"),
    ],
)
def test_a_catalogue_that_cannot_be_searched_is_one_line(toy, items, most, prompt, problem):
    engine = TorchEngine(toy("llama", "Q8_0"), blocks=4)
    with pytest.raises(EdgekitError, match=problem):
        best_items(engine, np.array(prompt, np.int64), items, most)
    assert engine.blocks.free == 4


def test_python_and_the_command_take_texts(edgekit, tmp_path):
    path, names = toy_model(tmp_path, "llama", "Q8_0"), ["then", "an", "in the", "rest"]
    texts = [f" {name}\n" for name in names]
    with load(path, engine="torch") as model:
        found = model.best_items("in the", texts, most=4)
        ids = [model.tokenizer.encode(text, begin=False).tolist() for text in texts]
        scores = brute_force(model.engine, model.tokenizer.encode("in the").tolist(), ids)
        assert [index for index, _ in found] == np.argsort(-scores).tolist()
        assert model.best_items("in the", ids, most=4) == found
    (tmp_path / "items.txt").write_text("\n".join(names) + "\n\n")
    arguments = ["llm", "choose", str(path), "in the", "--items", str(tmp_path / "items.txt"), "--engine", "torch"]
    written = json.loads(edgekit(*arguments, "--best", "2", "--json").out)
    assert [item["item"] for item in written["items"]] == [names[index] for index, _ in found[:2]]
    assert names[found[0][0]] in edgekit(*arguments).out
    assert edgekit(*arguments, "--best", "9").status == 1
