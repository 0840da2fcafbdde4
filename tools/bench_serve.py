"""Load the daemon as many clients do, well-behaved and not, and check that nothing is lost and nothing leaks.

    python tools/bench_serve.py smollm2 --clients 200 --requests 10000
    python tools/bench_serve.py model.gguf --clients 20 --requests 300 --seed 7 --kills 3

The tool runs `edgekit serve MODEL` as systemd does with deploy/edgekit-serve.socket: it holds the listening socket, and
starts the process again some seconds after its end. --kills ends it by SIGKILL so many times during the load; only
requests that were on their way at such a moment may end without an answer.

Each client sends one request after another: streams that it reads to their end, whole answers, streams that it leaves
in the middle, bodies that are no request, and streams that it reads slowly. Every request must end in an answer or in
an error that a program can read; at the end the model's cache must be free again, and the process must have the
descriptors that it had before. Exit status 1 says that it is not so. Without MODEL it makes a small random one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from edgekit import machine
from tests.gguf_files import toy_model

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
RESTART_SECONDS = 2.0  # from the end of the process to its next start, as in deploy/edgekit-serve.service
ACTIVATED = """
import os, sys
os.dup2(int(sys.argv.pop(1)), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
from edgekit.cli import main
main()
"""


@dataclass(slots=True)
class Outcome:
    """ends: requests by kind and how they ended; lost: those that did not end as they must; first: seconds to the first
    event of each stream; tokens: of all answers."""

    ends: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: int = 0


class Service:
    """The daemon, and what systemd does for it. kills: when it was killed, in monotonic seconds."""

    def __init__(self, model: str, arguments: Sequence[str]) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._command = [sys.executable, "-c", ACTIVATED, str(self._socket.fileno()), "serve", model, *arguments]
        self.port: int = self._socket.getsockname()[1]
        self.kills: list[float] = []
        self.process = self._start()

    async def kill(self) -> None:
        """End the process by SIGKILL, and start it again. Clients that connect meanwhile wait."""
        if self.process.poll() is not None:
            raise SystemExit(f"the daemon ended by itself with status {self.process.returncode}")
        self.kills.append(time.monotonic())
        self.process.kill()
        self.process.wait()
        await asyncio.sleep(RESTART_SECONDS)
        self.process = self._start()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self._socket.close()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, pass_fds=[self._socket.fileno()])


async def load(
    port: int, model: str, *, clients: int, requests: int, seed: int = 0, tokens: int = 24,
    service: Service | None = None, kills: int = 0,
) -> Outcome:  # fmt: skip
    """Send so many requests from so many clients; return how they ended. tokens: the most of an answer; kills: how
    often the service is killed, at equal numbers of requests."""
    outcome, rng = Outcome(), random.Random(seed)
    kinds = rng.choices(list(SHARES), list(SHARES.values()), k=requests)
    left = iter(list(enumerate(kinds)))

    async def client() -> None:
        for number, kind in left:
            began = time.monotonic()
            try:
                async with asyncio.timeout(SECONDS):
                    await _request(port, model, kind, number, tokens, random.Random(seed * 1_000_003 + number), outcome)
            except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
                killed = service is not None and any(began <= at for at in service.kills)
                if killed and not isinstance(error, TimeoutError | ValueError):
                    outcome.ends[f"{kind}: killed"] += 1
                else:
                    outcome.lost.append(f"request {number} ({kind}): {type(error).__name__} {error}")

    async def killer() -> None:
        for number in range(1, kills + 1):
            while sum(outcome.ends.values()) + len(outcome.lost) < number * requests // (kills + 1):
                await asyncio.sleep(0.02)
            assert service is not None
            await service.kill()

    await asyncio.gather(killer(), *(client() for _ in range(clients)))
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
    if last != b"[DONE]" and b'"error"' not in last:
        raise ConnectionError(f"the stream ended after {last[:100]!r}")
    outcome.ends[f"{kind}: {'done' if last == b'[DONE]' else 'error event'}"] += 1


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


def _resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="what edgekit serve takes; without it, a small random model")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=24, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0, help="times that the daemon is killed during the load")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        return measure(options, options.model or str(toy_model(Path(folder))), others)


def measure(options: argparse.Namespace, model: str, others: Sequence[str]) -> int:
    name = Path(model).name.removesuffix(Path(model).suffix)
    service = Service(model, others)
    try:

        def run(clients: int, requests: int, kills: int = 0) -> Outcome:
            return asyncio.run(
                load(
                    service.port, name, clients=clients, requests=requests, seed=options.seed, tokens=options.tokens,
                    service=service, kills=kills,
                )
            )  # fmt: skip

        run(8, 64)  # loads the model, and makes the pools of threads
        before, memory = _descriptors(service.process.pid), _resident(service.process.pid)
        began = time.monotonic()
        outcome = run(options.clients, options.requests, options.kills)
        seconds = time.monotonic() - began
        held = asyncio.run(settled(service.port, name))
        time.sleep(1)
        after, grown = _descriptors(service.process.pid), _resident(service.process.pid) - memory
    finally:
        service.close()
    status = report(outcome, seconds, held, before, after, grown)
    if options.json:
        found: dict[str, Any] = {
            "machine": machine.describe(),
            "model": name,
            "clients": options.clients,
            "kills": options.kills,
            "seconds": round(seconds, 1),
            "ends": dict(sorted(outcome.ends.items())),
            "lost": outcome.lost,
            "held": held,
            "descriptors": {"before": before, "after": after},
            "resident_growth_mb": round(grown / 1e6, 1),
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return status


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
