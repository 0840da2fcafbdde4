"""Load the daemon as many clients do, well-behaved and not, and check that nothing is lost and nothing leaks.

    python tools/bench_serve.py smollm2 --clients 200 --requests 10000
    python tools/bench_serve.py model.gguf --clients 20 --requests 300 --seed 7

The tool starts `edgekit serve MODEL` in a process of its own. Each client sends one request after another: streams that
it reads to their end, whole answers, streams that it leaves in the middle, bodies that are no request, and streams that
it reads slowly. Every request must end in an answer or in an error that a program can read; at the end the model's
cache must be free again, and the process must have the descriptors that it had before. Exit status 1 says that it is
not so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SHARES = {"stream": 0.6, "whole": 0.15, "cancelled": 0.1, "malformed": 0.1, "slow": 0.05}
BODIES = (  # that are no request, and the beginning of the status that each must get
    (b"", b"4"),
    (b"{", b"4"),
    (b"\xff" * 100, b"4"),
    (b"[" * 50_000, b"4"),
    (b'{"model": NaN}', b"4"),
    (b'{"temperature": 1e999}', b"4"),
    (b'{"model": "none", "messages": [{"role": "user", "content": "x"}]}', b"4"),
    (b'{"messages": 5}', b"4"),
    (b"9" * 100_000, b"4"),
)
SECONDS = 300.0  # for one request; longer means that the daemon has lost it
SLOW_SECONDS = 0.02  # between two reads of a slow reader


@dataclass(slots=True)
class Outcome:
    """ends: requests by kind and how they ended; lost: those that did not end as they must; first: seconds to the first
    event of each stream; tokens: of all answers."""

    ends: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: int = 0


async def load(port: int, model: str, *, clients: int, requests: int, seed: int = 0, tokens: int = 24) -> Outcome:
    """Send so many requests from so many clients; return how they ended. tokens: the most of an answer."""
    outcome, rng = Outcome(), random.Random(seed)
    kinds = rng.choices(list(SHARES), list(SHARES.values()), k=requests)
    left = iter(list(enumerate(kinds)))

    async def client() -> None:
        for number, kind in left:
            try:
                async with asyncio.timeout(SECONDS):
                    await _request(port, model, kind, number, tokens, random.Random(seed * 1_000_003 + number), outcome)
            except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
                outcome.lost.append(f"request {number} ({kind}): {type(error).__name__} {error}")

    await asyncio.gather(*(client() for _ in range(clients)))
    return outcome


async def _request(
    port: int, model: str, kind: str, number: int, tokens: int, rng: random.Random, outcome: Outcome
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if kind == "malformed":
            body, wanted = rng.choice(BODIES)
            status, answer = await _sent(reader, writer, body)
            good = status.startswith(wanted) and b"error" in answer
            outcome.ends[f"malformed: {status.decode()}"] += 1
            if not good:
                outcome.lost.append(f"request {number} (malformed): {status!r} {answer[:100]!r}")
            return
        body = json.dumps(
            {
                "model": model,
                "messages": [{"role": "user", "content": f"Write about star {rng.randrange(50)}."}],
                "max_tokens": rng.randint(1, tokens),
                "stream": kind != "whole",
                "stream_options": {"include_usage": True} if kind != "whole" else None,
                "seed": number,
                "priority": rng.choice(("interactive", "interactive", "batch")),
            }
        ).encode()
        if kind == "whole":
            status, answer = await _sent(reader, writer, body)
            _note_whole(kind, number, status, answer, outcome)
        else:
            await _stream(reader, writer, body, kind, number, rng, outcome)
    finally:
        writer.close()


def _note_whole(kind: str, number: int, status: bytes, answer: bytes, outcome: Outcome) -> None:
    outcome.ends[f"{kind}: {status.decode()}"] += 1
    found = json.loads(answer)
    if status == b"200":
        outcome.tokens += found["usage"]["completion_tokens"]
    elif "error" not in found or status == b"500":
        outcome.lost.append(f"request {number} ({kind}): {status!r} {answer[:100]!r}")


async def _stream(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes, kind: str, number: int,
    rng: random.Random, outcome: Outcome,
) -> None:  # fmt: skip
    started, leave_after = time.monotonic(), rng.randint(1, 5)
    status, head = await _head(reader, writer, body)
    if status != b"200":
        _note_whole(kind, number, status, await _body(reader, head), outcome)
        return
    events, last = 0, b""
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        if not events:
            outcome.first.append(time.monotonic() - started)
        events, last = events + 1, line[6:].strip()
        if b'"usage"' in last:
            outcome.tokens += json.loads(last)["usage"]["completion_tokens"]
        if kind == "cancelled" and events == leave_after:
            outcome.ends["cancelled: left"] += 1
            return
        if kind == "slow":
            await asyncio.sleep(SLOW_SECONDS)
        if last == b"[DONE]":
            break
    end = "done" if last == b"[DONE]" else "error event" if b'"error"' in last else "cut"
    outcome.ends[f"{kind}: {end}"] += 1
    if end == "cut":
        outcome.lost.append(f"request {number} ({kind}): the stream ended after {last[:100]!r}")


async def _sent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> tuple[bytes, bytes]:
    status, head = await _head(reader, writer, body)
    return status, await _body(reader, head)


async def _head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> tuple[bytes, bytes]:
    """Send a request; return the status and the headers."""
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    return head.split(b" ", 2)[1], head


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    length = re.search(rb"content-length: (\d+)", head, re.I)
    return await reader.readexactly(int(length[1])) if length else await reader.read()


async def settled(port: int, model: str, seconds: float = 20.0) -> str:
    """Return what a model still holds when nobody uses it any more; "" if nothing."""
    until, held = time.monotonic() + seconds, "no answer"
    while time.monotonic() < until:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /stats HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        found = json.loads(await _body(reader, head))["models"][model]
        writer.close()
        used = found.get("blocks", {}).get("used", 0)
        held = f"{used} blocks and {found['queue']} answers are held" if used or found["queue"] else ""
        if not held:
            break
        await asyncio.sleep(0.1)
    return held


@contextmanager
def started(model: str, arguments: list[str]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start the daemon; give its process and its port."""
    command = [sys.executable, "-c", "from edgekit.cli import main; main()", "serve", model, "--listen", "127.0.0.1:0"]
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            if (found := re.search(r"at http://[\d.]+:(\d+)", line)) is None:
                raise SystemExit(f"the daemon did not start: {line}")
            yield process, int(found[1])
        finally:
            process.terminate()
            process.wait(60)


def _resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what edgekit serve takes")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=24, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    options, others = parser.parse_known_args()
    name = Path(options.model).name.removesuffix(Path(options.model).suffix)

    def run(clients: int, requests: int) -> Outcome:
        return asyncio.run(
            load(port, name, clients=clients, requests=requests, seed=options.seed, tokens=options.tokens)
        )

    with started(options.model, others) as (process, port):
        run(8, 64)  # loads the model, and makes the pools of threads
        before, memory = _descriptors(process.pid), _resident(process.pid)
        began = time.monotonic()
        outcome = run(options.clients, options.requests)
        seconds = time.monotonic() - began
        held = asyncio.run(settled(port, name))
        time.sleep(1)
        after, grown = _descriptors(process.pid), _resident(process.pid) - memory
    return report(outcome, seconds, held, before, after, grown)


def report(outcome: Outcome, seconds: float, held: str, before: int, after: int, grown: int) -> int:
    """Print the numbers; return the exit status."""
    total = sum(outcome.ends.values())
    print(f"{total} requests in {seconds:.1f} s, {outcome.tokens / seconds:.0f} tokens/s")
    for end, number in sorted(outcome.ends.items()):
        print(f"  {end:24} {number:6}")
    first = sorted(outcome.first)
    if first:
        p50, p99 = first[len(first) // 2], first[int(len(first) * 0.99)]
        print(f"first event: p50 {p50:.2f} s, p99 {p99:.2f} s, max {first[-1]:.2f} s")
    print(f"descriptors: {before} before, {after} after; resident memory grew by {grown / 1e6:.0f} MB")
    problems = [*outcome.lost[:20], *filter(None, [held])]
    if after > before:
        problems.append(f"{after - before} descriptors leaked")
    for problem in problems:
        print(f"NOT AS IT MUST BE: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
