"""Pairs of replicas behind a real router: each way of handing a cache over, its failures, and that nothing is left."""

import asyncio
import json
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fakes.openai_replica import FakeReplica, Fault
from routers import Running, pairs, replica_of, router, run, until

KINDS = ("p2p", "nixl", "store", "bootstrap")
IN_TURN = ("p2p", "nixl", "store")
CHAT = {"messages": [{"role": "user", "content": "hello"}]}


async def stream(front: Running, path: str = "/v1/completions", **body: Any) -> tuple[int, str]:
    asked = {"model": "tiny", "prompt": "hello", "stream": True, **body}
    async with front.client.stream("POST", path, json=asked) as answer:
        return answer.status_code, "".join([piece async for piece in answer.aiter_text()])


async def read_until_lost(front: Running) -> str:
    """What comes of a stream before its connection is lost."""
    text, asked = "", {"model": "tiny", "prompt": "x", "stream": True}
    with suppress(httpx.RemoteProtocolError):
        async with front.client.stream("POST", "/v1/completions", json=asked) as answer:
            async for piece in answer.aiter_text():
                text += piece
        raise AssertionError(f"the stream came to its end: {text}")
    return text


def received(fakes: list[FakeReplica]) -> int:
    return sum(fake.kv.num_received for fake in fakes if fake.kv)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_computed_by_one_and_answered_by_another(kind: Any) -> None:
    async def check() -> None:
        async with pairs(kind, api_key="own") as (prefills, decodes), router(*prefills, *decodes) as front:
            whole = await front.ask(max_tokens=5)
            assert (whole.status_code, whole.json()["choices"][0]["text"]) == (200, "w0 w1 w2 w3 w4")
            assert whole.headers["x-flagscale-replica"] == "d0"
            chat = await front.client.post("/v1/chat/completions", json={"model": "tiny", "max_tokens": 3, **CHAT})
            assert chat.json()["choices"][0]["message"]["content"] == "w0 w1 w2"
            status, text = await stream(front, max_tokens=3, stream_options={"include_usage": True})
            assert (status, text.count("data: "), text.endswith("data: [DONE]\n\n")) == (200, 5, True)
            assert prefills[0].violations == decodes[0].violations == []
            if kind != "store":
                assert received(decodes) == 3
            assert (len(prefills[0].requests), len(decodes[0].requests)) == (3, 3)
            if kind in IN_TURN:
                assert [body["max_tokens"] for body in prefills[0].requests] == [1, 1, 1]
            await front.settled()

    run(check())


@pytest.mark.parametrize("kind", ["p2p", "store"])
def test_the_second_half_gets_the_body_as_it_came(kind: Any) -> None:
    async def check() -> None:
        async with pairs(kind) as (prefills, decodes), router(*prefills, *decodes) as front:
            body = '{"model":  "tiny", "prompt": "\\u00e4", "max_tokens": 2, "seed": 12345678901234567890}'
            answer = await front.client.post("/v1/completions", content=body)
            assert answer.status_code == 200
            assert decodes[0].requests[0] == {**json.loads(body), "_path": "/v1/completions"}
            assert prefills[0].requests[0]["seed"] == 12345678901234567890

    run(check())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", ["prefill", "decode"])
@pytest.mark.parametrize("fault", ["disconnect", "status"])
def test_a_half_that_fails_is_replaced_by_another(kind: Any, half: str, fault: Any) -> None:
    """Before the first byte the caller sees nothing of it, and no half waits for one that will not come."""

    async def check() -> None:
        async with pairs(kind, 2, 2) as (prefills, decodes), router(*prefills, *decodes) as front:
            (prefills if half == "prefill" else decodes)[0].faults.append(Fault(fault, times=2))
            for _ in range(4):
                assert (await front.ask(max_tokens=2)).json()["choices"][0]["text"] == "w0 w1"
            await front.settled()
            await until(lambda: not any(fake.num_in_flight for fake in (*prefills, *decodes)))
            assert not any(fake.violations for fake in (*prefills, *decodes))

    run(check())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [400, 429, 500])
def test_an_error_of_the_first_half_is_the_answer(kind: Any, status: int) -> None:
    """With its status and body, also to who asked for a stream; the other half is not left waiting."""

    async def check() -> None:
        async with pairs(kind) as (prefills, decodes), router(*prefills, *decodes, retries=0) as front:
            prefills[0].faults.append(Fault("status", status=status))
            got, text = await stream(front)
            assert (got, json.loads(text)["error"]["message"]) == (status, "a fault on demand")
            await until(lambda: decodes[0].num_in_flight == 0)
            assert len(decodes[0].requests) == (kind == "bootstrap")
            await front.settled()
            states = {state.id: state.failures for state in front.pool.states()}
            assert states == {"p0": status == 500, "d0": 0}

    run(check())


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_the_second_half_is_the_answer(kind: Any) -> None:
    async def check() -> None:
        async with pairs(kind) as (prefills, decodes), router(*prefills, *decodes, retries=0) as front:
            decodes[0].faults.append(Fault("status", status=422))
            got, text = await stream(front)
            assert (got, json.loads(text)["error"]["message"]) == (422, "a fault on demand")
            await until(lambda: prefills[0].num_in_flight == 0)
            await front.settled()

    run(check())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hanging", ["prefill", "decode"])
def test_a_caller_who_leaves_cancels_both_halves(kind: Any, hanging: str) -> None:
    async def check() -> None:
        async with pairs(kind) as (prefills, decodes), router(*prefills, *decodes) as front:
            slow = prefills[0] if hanging == "prefill" else decodes[0]
            slow.faults.append(Fault("hang"))
            asking = asyncio.create_task(front.ask())
            await until(lambda: slow.num_in_flight == 1)
            await asyncio.sleep(0.05)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: prefills[0].num_in_flight == decodes[0].num_in_flight == 0)
            await front.settled()
            assert slow.num_cancelled == 1
            metrics = (await front.client.get("/metrics")).text
            assert 'code="499"' in metrics

    run(check())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_breaks_off_ends_with_an_error(kind: Any) -> None:
    async def check() -> None:
        async with pairs(kind) as (prefills, decodes), router(*prefills, *decodes) as front:
            decodes[0].faults.append(Fault("cut", after=2))
            text = await read_until_lost(front)
            assert '"replica_lost"' in text
            assert len(decodes[0].requests) == 1
            await front.settled()

    run(check())


def test_a_first_half_that_says_nothing_is_given_up_in_time() -> None:
    async def check() -> None:
        changes = {"first_byte_timeout_s": 0.3, "retries": 0, "probe_interval_s": 60}
        for kind in KINDS:
            async with pairs(kind) as (prefills, decodes), router(*prefills, *decodes, **changes) as front:
                prefills[0].faults.append(Fault("hang", spares_probes=False))
                answer = await front.ask()
                assert answer.status_code == 504
                await front.settled()
                await until(lambda: decodes[0].num_in_flight == 0)

    run(check())


def test_requests_wait_until_both_halves_are_there() -> None:
    async def check() -> None:
        async with pairs("p2p") as (prefills, decodes), router(*prefills) as front:
            asking = asyncio.create_task(front.ask(max_tokens=1))
            await until(lambda: front.pool.held("tiny") == 1)
            front.pool.add(replica_of(decodes[0]))
            assert (await asking).status_code == 200

    run(check())


def test_a_first_half_that_is_taken_away_takes_its_request_to_another() -> None:
    """Until the second half has begun to answer the cache may still be fetched from it."""

    async def check() -> None:
        async with pairs("nixl", 2, 1) as (prefills, decodes), router(*prefills, *decodes) as front:
            decodes[0].faults.append(Fault("hang"))
            asking = asyncio.create_task(front.ask(max_tokens=2))
            await until(lambda: decodes[0].num_in_flight == 1)
            (used,) = [state.id for state in front.pool.states() if state.role == "prefill" and state.in_flight]
            front.pool.remove(used)
            answer = await asking
            assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, "w0 w1")
            await front.settled()

    run(check())


def test_a_second_half_that_is_taken_away_in_the_meantime_is_not_asked() -> None:
    async def check() -> None:
        async with pairs("nixl", 1, 2, first_token_s=0.2) as (prefills, decodes), router(*prefills, *decodes) as front:
            asking = asyncio.create_task(front.ask(max_tokens=2))
            await until(lambda: prefills[0].num_in_flight == 1)
            (meant,) = [state.id for state in front.pool.states() if state.role == "decode" and state.in_flight]
            front.pool.remove(meant)
            assert (await asking).status_code == 200
            assert [len(fake.requests) for fake in decodes if fake.name == meant] == [0]
            await front.settled()

    run(check())


def test_a_drain_waits_for_the_requests_of_a_first_half() -> None:
    async def check() -> None:
        async with pairs("nixl", first_token_s=0.1) as (prefills, decodes), router(*prefills, *decodes) as front:
            asking = asyncio.create_task(front.ask(max_tokens=2))
            await until(lambda: prefills[0].num_in_flight == 1)
            assert await front.pool.drain("p0", 5) == 0
            assert (await asking).status_code == 200

    run(check())


def test_only_halves_of_one_version_work_together() -> None:
    async def check() -> None:
        async with pairs("nixl", 2, 2) as (prefills, decodes), router() as front:
            for version, (prefill, decode) in enumerate(zip(prefills, decodes, strict=True)):
                front.pool.add(replica_of(prefill, version=str(version)))
                front.pool.add(replica_of(decode, version=str(version)))
            await until(lambda: all(state.is_ready for state in front.pool.states()))
            await asyncio.gather(*(front.ask(max_tokens=1) for _ in range(12)))
            for prefill, decode in zip(prefills, decodes, strict=True):
                assert prefill.kv is not None
                assert len(prefill.requests) == len(decode.requests) == received([decode])
                assert prefill.kv.caches == set()

    run(check())


def test_what_no_pair_can_do_is_refused_or_done_by_one() -> None:
    async def check() -> None:
        async with pairs("nixl") as (prefills, decodes), router(*prefills, *decodes) as front:
            refused = await front.client.post("/v1/embeddings", json={"model": "tiny", "input": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_path")
            for body in ({"prompt": ["one", "two"]}, {"prompt": [[1, 2], [3]]}, {"n": 2}):
                assert (await front.ask(max_tokens=2, **body)).status_code == 200
            assert prefills[0].requests == []
            assert decodes[0].kv is not None
            assert decodes[0].kv.num_alone == 3 + 1  # the probe
            assert (await front.ask(prompt=["one"], n=1)).status_code == 200
            assert (await front.ask(prompt=[1, 2, 3])).status_code == 200
            assert received(decodes) == 2
            await front.settled()

    run(check())


def test_each_half_is_probed_as_it_can_answer() -> None:
    async def check() -> None:
        for kind in KINDS:
            async with pairs(kind, api_key="own") as (prefills, decodes), router(*prefills, *decodes) as front:
                assert not any(fake.violations or fake.requests for fake in (*prefills, *decodes))
                assert all(state.is_ready for state in front.pool.states())

    run(check())


def test_a_half_whose_engine_is_dead_is_not_ready() -> None:
    """vLLM's server outlives its engine, and says 503 of its health then."""

    async def check() -> None:
        async with pairs("p2p") as (prefills, decodes):
            prefills[0].is_healthy = False
            async with router(*prefills, *decodes, waits=False) as front:
                await until(lambda: any("503 of /health" in state.reason for state in front.pool.states()))
                prefills[0].is_healthy = True
                await until(lambda: all(state.is_ready for state in front.pool.states()))

    run(check())


def test_load_is_spread_over_halves_by_tokens_in_flight() -> None:
    async def check() -> None:
        async with pairs("nixl", 2, 2, first_token_s=0.2) as (prefills, decodes), router(*prefills, *decodes) as front:
            long = asyncio.create_task(front.ask(prompt="long " * 400, max_tokens=2))
            await until(lambda: front.pool.in_flight() == 2)
            busy = {state.id for state in front.pool.states() if state.in_flight}
            short = [asyncio.create_task(front.ask(prompt="x", max_tokens=2)) for _ in range(3)]
            await until(lambda: front.pool.in_flight() == 8)
            counts = {state.id: state.in_flight for state in front.pool.states()}
            assert {name: count for name, count in counts.items() if name in busy} == dict.fromkeys(busy, 1)
            await asyncio.gather(long, *short)
            await front.settled()

    run(check())
