"""Routers for tests: a real server on a free port of loopback, on the test's own loop, in front of fake replicas."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from fakes.kv_exchange import Kind, KvExchange
from fakes.openai_replica import FakeReplica
from pydantic import SecretStr

from flagscale.serve.router.pool import Pool, Replica
from flagscale.serve.router.server import RouterServer, listen
from flagscale.serve.router.settings import RouterSettings

QUICK: dict[str, Any] = {
    "port": 0,
    "connect_timeout_s": 2,
    "first_byte_timeout_s": 5,
    "idle_timeout_s": 5,
    "hold_timeout_s": 5,
    "drain_timeout_s": 5,
    "breaker_open_s": 0.05,
    "breaker_open_max_s": 0.2,
    "probe_interval_s": 5,
    "probe_timeout_s": 2,
}
"""settings with which a test waits for nothing longer than it must"""


def run(work: Coroutine[Any, Any, None]) -> None:
    """One test on one loop; a task that is left over at the end is a leak."""

    async def checked() -> None:
        before = asyncio.all_tasks()
        await work
        await until(lambda: asyncio.all_tasks() <= before)

    asyncio.run(asyncio.wait_for(checked(), 200))


async def until(holds: Callable[[], object], timeout_s: float = 40) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.005)


def settings(**changes: Any) -> RouterSettings:
    return RouterSettings.model_validate({**QUICK, **changes})


def replica_of(fake: FakeReplica, **more: Any) -> Replica:
    key = SecretStr(fake.api_key) if fake.api_key else None
    if fake.kv is not None:
        more = {"role": fake.kv.role, "handover": fake.kv.kind, "kv_address": fake.kv.address, **more}
    return Replica(fake.name, fake.url, fake.model, key, **more)


@dataclass(slots=True)
class Running:
    """A router that listens at `url`."""

    url: str
    pool: Pool
    server: RouterServer
    client: httpx.AsyncClient

    async def ask(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return await self.client.post(path, json={"model": "tiny", "prompt": "hello", **body})

    async def settled(self) -> None:
        """Nothing is at any replica."""
        await until(lambda: self.pool.in_flight() == 0)


@asynccontextmanager
async def router(*fakes: FakeReplica, waits: bool = True, **changes: Any) -> AsyncIterator[Running]:
    """A router in front of `fakes`, which have started; with `waits` all of them are ready."""
    chosen = settings(**changes)
    pool = Pool(chosen)
    for fake in fakes:
        pool.add(replica_of(fake))
    server = RouterServer(pool, chosen)
    with listen(chosen) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                await until(lambda: server.started)
                if waits:
                    await until(lambda: all(state.is_ready for state in pool.states()))
                yield Running(url, pool, server, client)
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def pairs(
    kind: Kind, num_prefill: int = 1, num_decode: int = 1, **options: Any
) -> AsyncIterator[tuple[list[FakeReplica], list[FakeReplica]]]:
    """Halves p0, p1, .. and d0, d1, .. that have started."""
    prefills = [FakeReplica(name=f"p{n}", kv=KvExchange("prefill", kind), **options) for n in range(num_prefill)]
    decodes = [FakeReplica(name=f"d{n}", kv=KvExchange("decode", kind), **options) for n in range(num_decode)]
    for fake in (*prefills, *decodes):
        await fake.start()
    try:
        yield prefills, decodes
    finally:
        for fake in (*prefills, *decodes):
            await fake.stop()


@asynccontextmanager
async def fakes(count: int = 2, **options: Any) -> AsyncIterator[list[FakeReplica]]:
    """Fake replicas r0, r1, .. that have started."""
    made = [FakeReplica(name=f"r{number}", **options) for number in range(count)]
    for fake in made:
        await fake.start()
    try:
        yield made
    finally:
        for fake in made:
            await fake.stop()
