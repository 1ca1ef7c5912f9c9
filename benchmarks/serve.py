"""What the router costs: the same streams straight to an engine and through the router, in turn, in one run.

    python benchmarks/serve.py [--streams 64] [--rounds 5] [--tokens 60] [--tokens-per-s 30]
    python benchmarks/serve.py --url http://127.0.0.1:8001 --model tiny [--api-key KEY]      # before a real engine

Without `--url` the engine is the fake of tests/fakes, at an engine's pace. Engine, router and callers are processes of
their own. In a round so many callers stream all the time, one stream after another, each beginning at a time of its
own, so that first tokens meet a router under load. Rounds alternate (A B A B ..). Quoted, with what is promised, are
the median of the pairs' ratios of throughput and the difference of the medians of all first-token times; and the
router's processor time. A few milliseconds mean something only where no other work waits for the processors: on a
machine that is shared, put `chrt -r 1` before the command.

    throughput       through the router / straight      promised: at least 0.95
    first token      through the router - straight      promised: at most 3 ms
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
FAKE = ROOT / "tests" / "fakes" / "openai_replica.py"
LEAST_THROUGHPUT = 0.95
MOST_FIRST_TOKEN_S = 0.003
FIRST_TOKEN_S = 0.2
STREAMS_EACH = 2
EVENT = b"data: {"


@dataclass(frozen=True)
class Target:
    """Where to send streams."""

    url: str
    model: str
    api_key: str | None


@dataclass(frozen=True)
class Round:
    """What one round of streams took; `first_token_s` has one entry a stream."""

    tokens_per_s: float
    first_token_s: list[float]
    router_cpu_s: float
    wall_s: float
    num_tokens: int


@contextmanager
def process(*words: str, given: str = "") -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process, its first lines up to the one that says that it is ready, and its end."""
    started = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    assert started.stdin is not None
    assert started.stdout is not None
    try:
        started.stdin.write(given)
        started.stdin.close()
        lines: list[str] = []
        while not lines or not ("is ready" in lines[-1] or lines[-1].startswith("http")):
            lines.append(started.stdout.readline())
            if not lines[-1]:
                raise SystemExit("".join(lines) or f"{words} ended at once")
        yield started, lines
    finally:
        started.terminate()
        started.wait()
        started.stdout.close()


def cpu_s(pid: int) -> float:
    """Processor time of a process until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Caller(asyncio.Protocol):
    """One caller and its connection. It looks for events and parses nothing: it takes little of what it measures."""

    def __init__(self, to: Target) -> None:
        self.to = to
        self.first_s: float | None = None
        self.count = 0
        self.started = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.first_s is None and EVENT in data:
            self.first_s = time.perf_counter() - self.started
        self.count += data.count(EVENT)
        if data.endswith(b"0\r\n\r\n"):
            self.ended.set_result(None)
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200 "):
            self.ended.set_exception(SystemExit(f"{self.to.url}: {data.decode(errors='replace')}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(SystemExit(f"{self.to.url}: the connection was lost ({exc})"))

    async def stream(self, num_tokens: int) -> tuple[float, int]:
        """One stream: seconds to its first event, and how many events it had."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        body = {"model": self.to.model, "prompt": "Once upon a time", "stream": True, "max_tokens": num_tokens}
        content = json.dumps(body).encode()
        key = f"Authorization: Bearer {self.to.api_key}\r\n" if self.to.api_key else ""
        self.first_s, self.count, self.started = None, 0, time.perf_counter()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n{key}"
        self.transport.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await self.ended
        assert self.first_s is not None
        return self.first_s, self.count


async def call(to: Target, num_tokens: int, first_tokens: int) -> list[tuple[float | None, int]]:
    """One caller: a first stream of its own length, which sets callers apart and whose beginning does not count (all
    connect at once), then whole ones."""
    parts = urlsplit(to.url)
    _, caller = await asyncio.get_running_loop().create_connection(lambda: Caller(to), parts.hostname, parts.port)
    try:
        alone = (await caller.stream(first_tokens))[1] if first_tokens else 0
        return [(None, alone), *[await caller.stream(num_tokens) for _ in range(STREAMS_EACH)]]
    finally:
        caller.transport.close()


async def run_round(to: Target, num_callers: int, num_tokens: int, router_pid: int) -> Round:
    """So many callers at once."""
    before, started = cpu_s(router_pid), time.perf_counter()
    calls = [call(to, num_tokens, number * num_tokens // num_callers) for number in range(num_callers)]
    done = [it for caller in await asyncio.gather(*calls) for it in caller]
    wall_s, used = time.perf_counter() - started, cpu_s(router_pid) - before
    count = sum(number for _, number in done)
    return Round(count / wall_s, [first for first, _ in done if first is not None], used, wall_s, count)


def compare(straight: list[Round], through: list[Round]) -> bool:
    """Print the ratios; whether both promises are kept."""
    ratio = statistics.median(b.tokens_per_s / a.tokens_per_s for a, b in zip(straight, through, strict=True))
    firsts = [statistics.median(first for it in side for first in it.first_token_s) for side in (straight, through)]
    added_s = firsts[1] - firsts[0]
    used, wall = sum(it.router_cpu_s for it in through), sum(it.wall_s for it in through)
    tokens = sum(it.num_tokens for it in through)
    rate = statistics.median(it.tokens_per_s for it in through)
    verdicts = [ratio >= LEAST_THROUGHPUT, added_s <= MOST_FIRST_TOKEN_S]
    words = ["kept" if is_kept else "BROKEN" for is_kept in verdicts]
    print(
        f"throughput   {ratio:.3f} of straight ({rate:.0f} tokens/s); promised at least {LEAST_THROUGHPUT}: {words[0]}"
    )
    print(
        f"first token  {added_s * 1e3:+.2f} ms ({firsts[0] * 1e3:.1f} -> {firsts[1] * 1e3:.1f} ms); "
        f"promised at most {MOST_FIRST_TOKEN_S * 1e3:g} ms: {words[1]}"
    )
    print(f"router       {used / wall:.0%} of one processor, {used / max(tokens, 1) * 1e6:.0f} µs a token")
    return all(verdicts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=60, help="of each stream")
    parser.add_argument("--tokens-per-s", type=float, default=30, help="pace of the fake engine's streams")
    parser.add_argument("--url", help="a real engine's root, without /v1")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--api-key")
    args = parser.parse_args()
    with ExitStack() as stack:
        url = args.url
        if url is None:
            pace = ("--tokens-per-s", str(args.tokens_per_s), "--first-token-s", str(FIRST_TOKEN_S))
            url = stack.enter_context(process(sys.executable, str(FAKE), "--model", args.model, *pace))[1][-1].strip()
        entry = {"id": "r0", "url": url, "model": args.model, "api_key": args.api_key}
        given = json.dumps({"settings": {"port": 0}, "replicas": [entry]})
        router, lines = stack.enter_context(process(sys.executable, "-m", "flagscale.serve.router", "-", given=given))
        address = next(line for line in lines if "listens" in line).split()[-1]
        straight, through = Target(url, args.model, args.api_key), Target(address, args.model, None)
        rounds: tuple[list[Round], list[Round]] = ([], [])
        for number in range(-1, args.rounds):  # the first pair warms both up
            for side, to in zip(rounds, (straight, through), strict=True):
                done = asyncio.run(run_round(to, args.streams, args.tokens, router.pid))
                side.extend([done] * (number >= 0))
    return 0 if compare(*rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
