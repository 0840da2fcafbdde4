"""Compare the policies of the key-value cache at the bytes that they take: quality on two texts, passkeys, and speed.

    python tools/bench_kv.py --part quality --part passkey --work kv-parts.json
    python tools/bench_kv.py --part speed --work kv-parts.json --json benchmarks/kv.json

All parts run SmolLM2-135M in the torch engine in float32 with one thread. It is the reference engine: its seconds say
which policies cost much to read, and not how fast a fused engine would be. Results of a part go to the file --work as
they come, and a part that was stopped goes on there. With --json the tool writes the summary of all parts.

quality: 1,024 tokens of a text are the prompt, which every policy gets with exact keys and values; the next 1,024 are
read under the policy. The tool compares its predictions with those of the exact cache in float32: perplexity, mean
Kullback-Leibler divergence (nats), and how often the most probable token is the same. Bytes are those of the cache's
buffers behind the last token, over all tokens. Eviction budgets are shares of the prompt.

passkey: five random digits stand at 12 depths of a repeated text. The text alone is the prompt, so a policy compresses
it before the question is known. The digits are right if each is the most probable token behind the right ones before.

speed: a step of one token behind 2,048, the policies in turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgekit.cost.timing import in_turns, timed
from edgekit.importers import downloads
from edgekit.importers.gguf import read_gguf
from edgekit.machine import describe
from runtimes.llm.answers import log_softmax
from runtimes.llm.architecture import Model
from runtimes.llm.blocks import blocks_for
from runtimes.llm.engine import Ids, Item
from runtimes.llm.kv.cache import NO_LIMIT, Policy
from runtimes.llm.kv.d2o import D2O
from runtimes.llm.kv.eviction import Eviction
from runtimes.llm.kv.full import Full
from runtimes.llm.kv.gear import Gear
from runtimes.llm.kv.h2o import H2O
from runtimes.llm.kv.hadamard import Hadamard
from runtimes.llm.kv.kivi import Kivi
from runtimes.llm.kv.per_token import PerToken
from runtimes.llm.kv.shadowkv import ShadowKV
from runtimes.llm.kv.snapkv import SnapKV
from runtimes.llm.kv.streaming import Streaming
from runtimes.llm.kv.window import Window
from runtimes.llm.source import of_gguf
from runtimes.llm.tokenizer import Tokenizer
from runtimes.llm.torch_engine import TorchEngine

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2"
TEXTS = ("LICENSE", "ARCHITECTURE.md")
PROMPT, READ, CHUNK = 1024, 1024, 256  # tokens
LENGTHS, DEPTHS = (512, 1024, 2048, 4096), 12
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEY = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "What is the pass key? The pass key is {key}"
SHARES = (0.5, 0.2)  # of a prompt, that eviction keeps
CONTEXT, ROUNDS = 2048, 7  # of the speed part
HOLDS = H2O()  # a policy that leaves prompts as they are until they end

STORED: dict[str, Policy] = {
    "f16": Full(),
    "int8 per token": PerToken(8),
    "int5 KIVI": Kivi(5),
    "int4 KIVI": Kivi(4),
    "int4 per token": PerToken(4),
    "int4 Hadamard": Hadamard(4),
    "int4 per token, last 64 exact": PerToken(4, 64),
    "int4 Hadamard, last 64 exact": Hadamard(4, 64),
    "int3 KIVI": Kivi(3),
    "int2 KIVI": Kivi(2),
    "int4 KCVT": Gear(rank=0, new_rank=0, outliers=0),
    "GEAR-L int4 KCVT": Gear(outliers=0),
    "GEAR int4 KCVT": Gear(),
    "GEAR int2 KIVI": Gear(bits=2, backbone="kivi"),
    "ShadowKV rank 30, 128 tokens": ShadowKV(rank=30, budget=128),
    "ShadowKV rank 64, 128 tokens": ShadowKV(rank=64, budget=128),
    "ShadowKV rank 64, 256 tokens": ShadowKV(rank=64, budget=256),
    "ShadowKV rank 192, 128 tokens": ShadowKV(rank=192, budget=128),
}
EVICTING: dict[str, Eviction | SnapKV] = {
    "H2O": H2O(),
    "H2O, a quarter recent": H2O(recent=0.25),  # as D2O divides its budget
    "H2O for the prompt alone": H2O(every=NO_LIMIT),  # as SnapKV
    "StreamingLLM": Streaming(),
    "window": Window(),
    "SnapKV": SnapKV(),
    "D2O budgets only": D2O(merge="none"),
    "D2O merging values only": D2O(layers="equal"),
    "D2O budgets, merging values": D2O(),
    "D2O budgets, merging keys and values": D2O(merge="kv"),
    "D2O the same, after RoPE": D2O(merge="kv", rope="after"),
}
BUFFERED, QUARTER = "int4 per token, last 64 exact", "H2O, a quarter recent"
FORGETS, MERGES, ROTATED = (
    "D2O budgets only",
    "D2O budgets, merging keys and values",
    "D2O the same, after RoPE",
)
# policies whose keys are not looked for, because others stand for them
WITHOUT_KEYS = {
    *("int4 per token", "int4 Hadamard", BUFFERED, "int3 KIVI", "int4 KCVT", "GEAR-L int4 KCVT"),
    *("H2O for the prompt alone", "window", "D2O merging values only", QUARTER, FORGETS, MERGES),
}
REPORTED = {  # what the papers report, on larger models and GPUs
    "GEAR": "near-lossless at 4 bits, 2.38 times the throughput of float16",
    "D2O": "over 3 times the throughput, better than H2O and StreamingLLM on LongBench with 20 to 50 % of the cache",
    "ShadowKV": "no loss on RULER, 6 times the batch and 3.04 times the throughput on an A100",
}
# the paper; its claim; the better policy and the worse one
CLAIMS = (
    ("KIVI, arXiv 2402.02750", "keys by channel beat keys by token at the same bits", "int4 KIVI", BUFFERED),
    ("QuaRot, arXiv 2404.00456", "rotation removes the harm of outliers", "int4 Hadamard, last 64 exact", BUFFERED),
    ("GEAR, arXiv 2403.05527", "it improves its backbone at 4 bits (near-lossless)", "GEAR int4 KCVT", "int4 KCVT"),
    ("GEAR, arXiv 2403.05527", "it improves its backbone at 2 bits", "GEAR int2 KIVI", "int2 KIVI"),
    ("GEAR, arXiv 2403.05527", "low rank alone improves the backbone", "GEAR-L int4 KCVT", "int4 KCVT"),
    ("ours", "5 bits beat GEAR's 4 bits, which take more bytes", "int5 KIVI", "GEAR int4 KCVT"),
    ("ours", "3 bits beat GEAR's 2 bits, which take more bytes", "int3 KIVI", "GEAR int2 KIVI"),
    ("H2O, arXiv 2306.14048", "attention scores beat the last tokens", "H2O", "StreamingLLM"),
    ("StreamingLLM, arXiv 2309.17453", "sinks beat a window without them", "StreamingLLM", "window"),
    ("SnapKV, arXiv 2404.14469", "the last queries choose better than all", "SnapKV", "H2O for the prompt alone"),
    ("D2O, arXiv 2406.13035", "it beats H2O that divides its budget alike", ROTATED, QUARTER),
    ("D2O, arXiv 2406.13035", "budgets by layer beat equal ones", FORGETS, QUARTER),
    ("D2O, arXiv 2406.13035", "merging beats forgetting", ROTATED, FORGETS),
    ("ours", "merging values alone beats forgetting", "D2O merging values only", QUARTER),
    ("ours", "merging keys before RoPE beats merging them after it", MERGES, ROTATED),
)
SHADOW = (
    "ShadowKV, arXiv 2410.21465",
    "no loss at a rank of 16 % (here 30 of 192)",
    "ShadowKV rank 30, 128 tokens",
)

Logits = npt.NDArray[Any]


def policies(prompt: int) -> Iterator[tuple[str, Policy]]:
    """Yield all policies by name. prompt: of which eviction keeps a share."""
    yield from STORED.items()
    for share in SHARES:
        for name, policy in EVICTING.items():
            yield f"{name} {share:.0%}", replace(policy, budget=round(share * prompt))


def base(name: str) -> str:
    """Return the name of a policy without its share."""
    return re.sub(r" \d+%$", "", name)


class Parts:
    """Results by name in a file that grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, name: str, result: Any) -> None:
        self.found[name] = result
        self._path.write_text(json.dumps(self.found))
        print(f"{name}: {json.dumps(result)}", flush=True)


def append(engine: TorchEngine, sequence: int, ids: Ids) -> None:
    """Take tokens in without logits; a prompt goes on."""
    for start in range(0, len(ids), CHUNK):
        engine.step([Item(sequence, ids[start : start + CHUNK], logits="none")])


def begin(engine: TorchEngine, policy: Policy, prompt: int = 0, sequence: int = 1) -> None:
    """Begin a sequence with a prompt that another one holds, compressed."""
    engine.kv = policy
    engine.fork(prompt, sequence)
    engine.end_prompt(sequence)


def predictions(engine: TorchEngine, sequence: int, ids: Ids) -> Logits:
    """Return (tokens, vocabulary) log probabilities behind each of these tokens, in float16."""
    parts = [
        log_softmax(engine.step([Item(sequence, ids[start : start + CHUNK], logits="all")])[0]).astype(np.float16)
        for start in range(0, len(ids), CHUNK)
    ]
    return np.concatenate(parts)


def compared(found: Logits, expected: Logits, following: Ids) -> dict[str, float]:
    """Return perplexity, divergence and agreement; following: the tokens that do follow."""
    divergence, agree = [], []
    for start in range(0, len(found), CHUNK):
        ours, exact = (part[start : start + CHUNK].astype(np.float64) for part in (found, expected))
        divergence.append((np.exp(exact) * (exact - ours)).sum(-1))
        agree.append(ours.argmax(-1) == exact.argmax(-1))
    chances = found[np.arange(len(following)), following].astype(np.float64)
    return {
        "perplexity": round(float(np.exp(-chances.mean())), 3),
        "divergence": round(float(np.concatenate(divergence).mean()), 5),
        "agreement": round(float(np.concatenate(agree).mean()), 4),
    }


def quality(model: Model, tokenizer: Tokenizer, parts: Parts) -> None:
    engine = TorchEngine(model, blocks=1024, kv=HOLDS)
    exact = TorchEngine(model, blocks=blocks_for(PROMPT + READ))
    for text in TEXTS:
        names = [name for name, _ in policies(PROMPT) if f"quality/{text}/{name}" not in parts.found]
        if not names:
            continue
        content = (ROOT / text).read_text()
        ids = tokenizer.encode(content, begin=False)[: PROMPT + READ + 1]
        assert len(ids) == PROMPT + READ + 1
        append(exact, 0, ids[:PROMPT])
        expected = predictions(exact, 0, ids[PROMPT:-1])
        exact.remove(0)
        reference = compared(expected, expected, ids[PROMPT + 1 :])
        digest = hashlib.sha256(content.encode()).hexdigest()
        parts.add(f"quality/{text}", {"sha256": digest, "perplexity": reference["perplexity"]})
        engine.kv = HOLDS
        append(engine, 0, ids[:PROMPT])
        for name, policy in policies(PROMPT):
            if name in names:
                begin(engine, policy)
                result: dict[str, float] = compared(predictions(engine, 1, ids[PROMPT:-1]), expected, ids[PROMPT + 1 :])
                memory = engine.memory(1)
                result["fast"], result["slow"] = memory.fast / (PROMPT + READ), memory.slow / (PROMPT + READ)
                engine.remove(1)
                parts.add(f"quality/{text}/{name}", result)
        engine.remove(0)


def haystack(tokenizer: Tokenizer, length: int, depth: int) -> tuple[Ids, Ids, Ids, str]:
    """Return the filler before the key and behind it, the key's sentence, and the key."""
    key = "".join(map(str, np.random.default_rng((length, depth)).integers(0, 10, 5)))
    needle = tokenizer.encode(KEY.format(key=key), begin=False)
    filler = np.resize(tokenizer.encode(FILLER, begin=False), length - len(needle))
    sentence = len(tokenizer.encode(FILLER, begin=False))
    at = round(len(filler) * depth / (DEPTHS - 1)) // sentence * sentence  # the end of a sentence
    return filler[:at], filler[at:], needle, key


def passkey(model: Model, tokenizer: Tokenizer, parts: Parts, lengths: list[int], only: str) -> None:
    """Find keys. Sequence 0 holds the filler before the key, from depth to depth; sequence 2 the whole text."""
    engine = TorchEngine(model, blocks=3 * blocks_for(max(LENGTHS)), kv=HOLDS)
    for length in lengths:
        for depth in range(DEPTHS):
            before, behind, needle, key = haystack(tokenizer, length, depth)
            engine.kv = HOLDS
            if len(before) > engine.length(0):
                append(engine, 0, before[engine.length(0) :])
            keyed = [name for name, _ in policies(length) if base(name) not in WITHOUT_KEYS and re.search(only, name)]
            missing = [name for name in keyed if f"passkey/{length}/{depth}/{name}" not in parts.found]
            if not missing:
                continue
            if engine.length(0):
                engine.fork(0, 2)
            append(engine, 2, np.concatenate([needle, behind]))
            for name, policy in policies(length):
                if name in missing:
                    begin(engine, policy, prompt=2)
                    parts.add(f"passkey/{length}/{depth}/{name}", digits_right(engine, tokenizer, key))
                    engine.remove(1)
            engine.remove(2)
        if engine.length(0):
            engine.remove(0)


def digits_right(engine: TorchEngine, tokenizer: Tokenizer, key: str) -> int:
    """Return how many digits of the key are the most probable tokens, behind a question and the digits before."""
    ids = tokenizer.encode(QUESTION.format(key=key), begin=False)
    assert [tokenizer.decode([token]) for token in ids[-len(key) :].tolist()] == list(key)
    rows = engine.step([Item(1, ids[:-1], logits="all")])[0]
    return int((rows[-len(key) :].argmax(-1) == ids[-len(key) :]).sum())


def speed(model: Model, parts: Parts) -> None:
    """Time steps of one token, each policy in turns."""
    engine = TorchEngine(model, blocks=1 << 14, kv=HOLDS)
    ids: Ids = np.random.default_rng(0).integers(0, model.architecture.vocabulary, CONTEXT + 1)
    append(engine, 0, ids[:CONTEXT])
    chosen = dict(policies(CONTEXT))
    for number, policy in enumerate(chosen.values(), 1):
        begin(engine, policy, sequence=number)

    def one(sequence: int) -> None:
        engine.step([Item(sequence, ids[CONTEXT:])])
        engine.truncate(sequence, CONTEXT)

    calls = [timed(lambda number=number: one(number), time.process_time) for number in range(1, len(chosen) + 1)]
    seconds = np.median(in_turns(calls, least=ROUNDS, most=ROUNDS, warmup=1)[..., 0], axis=0)
    for name, value in zip(chosen, seconds.tolist(), strict=True):
        parts.add(f"speed/{name}", round(1 / value, 2))


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return all results by policy, and whether the papers' claims hold in direction."""
    rows: dict[str, dict[str, Any]] = {}
    for name, _ in policies(PROMPT):
        row: dict[str, Any] = {text: found[f"quality/{text}/{name}"] for text in TEXTS}
        first = row[TEXTS[0]]
        row |= {"fast_bytes": round(first["fast"]), "slow_bytes": round(first["slow"])}
        row[TEXTS[0]], row[TEXTS[1]] = (
            {key: row[text][key] for key in ("perplexity", "divergence", "agreement")} for text in TEXTS
        )
        digits = {
            length: [found[f"passkey/{length}/{depth}/{name}"] for depth in range(DEPTHS)]
            for length in LENGTHS
            if f"passkey/{length}/{DEPTHS - 1}/{name}" in found
        }
        row["passkey"] = {str(length): sum(value == 5 for value in values) for length, values in digits.items()}
        row["digits"] = {str(length): round(sum(values) / 5 / DEPTHS, 2) for length, values in digits.items()}
        row["tokens_per_second"] = found.get(f"speed/{name}")
        rows[name] = row
    claims = [
        {"paper": paper, "claim": claim, "better": better, "worse": worse, "found": verdict(rows, better, worse)}
        for paper, claim, better, worse in CLAIMS
    ]
    keys = rows[SHADOW[2]]["passkey"]
    full = rows["f16"]["passkey"]
    lost = [f"{count} of {full[length]} keys at {length}" for length, count in keys.items()]
    agree = [f"{rows[SHADOW[2]][text]['agreement']:.3f} agreement" for text in TEXTS]
    word = "keys confirmed" if all(keys[length] >= full[length] for length in keys) else "denied"
    shadow = {"paper": SHADOW[0], "claim": SHADOW[1], "better": SHADOW[2], "worse": "f16"}
    claims.append(shadow | {"found": f"{word}: {', '.join([*lost, *agree])}"})
    return {
        "model": MODEL,
        "machine": describe() | {"torch": torch.__version__, "threads": 1},
        "texts": {text: found[f"quality/{text}"] for text in TEXTS},
        "prompt": PROMPT,
        "read": READ,
        "speed_context": CONTEXT,
        "claims": claims,
        "rows": rows,
    }


def verdict(rows: Mapping[str, Any], better: str, worse: str) -> str:
    """Say whether one policy diverges less than another on each text (and at each budget), and both divergences."""
    pairs = (
        [(better, worse)] if better in rows else [(f"{better} {share:.0%}", f"{worse} {share:.0%}") for share in SHARES]
    )
    each = [
        (rows[first][text]["divergence"], rows[second][text]["divergence"]) for first, second in pairs for text in TEXTS
    ]
    wins = sum(first < second for first, second in each)
    word = "confirmed" if wins == len(each) else "denied" if not wins else f"in {wins} of {len(each)} cases"
    return f"{word}: {', '.join(f'{first:.4f}/{second:.4f}' for first, second in each)}"


def markdown(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tables of a summary."""
    first, second = TEXTS
    lengths = list(summary["rows"]["f16"]["passkey"])
    yield (
        f"| policy | bytes per token | `{first}`: perplexity, divergence, agreement | `{second}` | "
        f"passkeys of {DEPTHS} at {', '.join(f'{int(length):,}' for length in lengths)} | tokens/s |"
    )
    yield "|---|---|---|---|---|---|"
    for name, row in sorted(summary["rows"].items(), key=lambda item: -item[1]["fast_bytes"] - item[1]["slow_bytes"]):
        memory = f"{row['fast_bytes']:,.0f}" + (f" + {row['slow_bytes']:,.0f} slow" if row["slow_bytes"] else "")
        texts = (
            f"{row[text]['perplexity']:.2f}, {row[text]['divergence']:.4f}, {row[text]['agreement']:.3f}"
            for text in TEXTS
        )
        keys = ", ".join(str(row["passkey"].get(length, "-")) for length in lengths)
        yield f"| {name} | {memory} | {' | '.join(texts)} | {keys} | {row['tokens_per_second'] or '-'} |"
    yield ""
    yield "| paper | claim | the paper's numbers | here |"
    yield "|---|---|---|---|"
    for claim in summary["claims"]:
        reported = REPORTED.get(claim["paper"].partition(",")[0], "")
        yield f"| {claim['paper']} | {claim['claim']} | {reported} | {claim['found']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", default=[], choices=("quality", "passkey", "speed"))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="of the passkey part")
    parser.add_argument("--only", default="", help="of the passkey part: a regular expression of the policies' names")
    parser.add_argument("--work", type=Path, required=True, help="the file of results so far")
    parser.add_argument("--json", type=Path, help="the file of the summary")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = Parts(arguments.work)
    if arguments.part:
        file = read_gguf(downloads.find(MODEL))
        source = of_gguf(file)
        model, tokenizer = source.model, source.tokenizer
        if "quality" in arguments.part:
            quality(model, tokenizer, parts)
        if "passkey" in arguments.part:
            passkey(model, tokenizer, parts, [int(length) for length in arguments.lengths.split(",")], arguments.only)
        if "speed" in arguments.part:
            speed(model, parts)
    if arguments.json:
        found = summary(parts.found)
        arguments.json.write_text(json.dumps(found).replace('}, "', '},\n"') + "\n")
        print("\n".join(markdown(found)))


if __name__ == "__main__":
    main()
