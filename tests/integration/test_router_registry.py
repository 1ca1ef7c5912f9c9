"""Replicas that are added to a running router from outside, and taken out again: by token only, and by health."""

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx
from fakes.openai_replica import FakeReplica, Fault
from routers import Running, fakes, pairs, replica_of, router, run, until

TOKEN = {"Authorization": "Bearer for-admins"}
ADMIN = {"admin_token": "for-admins"}


async def put(
    front: Running, fake: FakeReplica, headers: Mapping[str, str] = TOKEN, name: str = "", **more: Any
) -> httpx.Response:
    words: dict[str, Any] = {"url": fake.url, "model": fake.model, "api_key": fake.api_key}
    if fake.kv is not None:
        words |= {"role": fake.kv.role, "handover": fake.kv.kind, "kv_address": fake.kv.address}
    return await front.client.put(f"/replicas/{name or fake.name}", json={**words, **more}, headers=headers)


async def delete(front: Running, name: str, headers: Mapping[str, str] = TOKEN) -> httpx.Response:
    return await front.client.delete(f"/replicas/{name}", headers=headers)


def test_a_pair_joins_and_leaves_a_running_router() -> None:
    async def check() -> None:
        async with pairs("p2p", api_key="own") as ((prefill,), (decode,)), router(**ADMIN) as front:
            assert (await front.ask()).status_code == 404
            assert [(await put(front, fake)).status_code for fake in (prefill, decode)] == [201, 201]
            assert (await put(front, prefill)).status_code == 200
            assert (await front.ask(max_tokens=2)).json()["choices"][0]["text"] == "w0 w1"
            rows = (await front.client.get("/status")).json()["replicas"]
            told = [(row["id"], row["role"], row["kv_address"], row["is_registered"]) for row in rows]
            assert prefill.kv is not None
            assert told[0] == ("p0", "prefill", prefill.kv.address, True)
            assert "own" not in str(rows)
            gone = await delete(front, "p0")
            assert (gone.status_code, gone.json()) == (200, {"id": "p0", "cut": 0})
            assert [state.id for state in front.pool.states()] == ["d0"]
            assert (await delete(front, "p0")).status_code == 404

    run(check())


def test_only_the_token_opens_the_door() -> None:
    async def check() -> None:
        async with fakes(2) as (fake, other):
            async with router(fake, api_keys=["for-callers"], **ADMIN) as front:
                for headers in ({}, {"Authorization": "Bearer for-callers"}, {"Authorization": "Basic for-admins"}):
                    assert (await put(front, other, headers)).status_code == 401
                    assert (await delete(front, fake.name, headers)).status_code == 401
                assert (await front.client.get("/status", headers=TOKEN)).status_code == 401
                assert len(front.pool.states()) == 1
            async with router(fake) as front:
                refused = await put(front, other)
                assert (refused.status_code, refused.json()["error"]["code"]) == (403, "no_registration")

    run(check())


def test_what_cannot_be_right_is_refused_with_its_field() -> None:
    async def check() -> None:
        async with pairs("p2p") as ((prefill,), (decode,)), fakes(1) as (whole,):
            async with router(whole, **ADMIN) as front:
                wrong: list[tuple[dict[str, Any], int, str]] = [
                    ({"url": "h1:8000"}, 400, "url 'h1:8000'"),
                    ({"url": "http://[x"}, 400, ""),
                    ({"role": "prefil"}, 400, "`role`"),
                    ({"kv_address": ""}, 400, "no kv_address"),
                    ({"kv_addres": "h:1"}, 400, "`kv_addres`"),
                    ({"weight": 0}, 400, "`weight`"),
                    ({}, 409, "the others are whole"),
                ]
                for changes, status, told in wrong:
                    answer = await put(front, prefill, name="new", **changes)
                    assert (answer.status_code, told in answer.text) == (status, True), answer.text
                for body in (b"[]", b"{", b'{"url": 1}'):
                    answer = await front.client.put("/replicas/new", content=body, headers=TOKEN)
                    assert answer.status_code == 400
                assert (await put(front, prefill, name="a b")).status_code == 400
                assert (await put(front, whole, url="http://127.0.0.1:1")).status_code == 409
                kept = await delete(front, whole.name)
                assert (kept.status_code, "was not registered" in kept.text) == (409, True)
                assert len(front.pool.states()) == 1
            assert decode.requests == []

    run(check())


def test_a_registered_half_joins_the_version_that_serves() -> None:
    async def check() -> None:
        async with pairs("nixl", 2, 1) as (prefills, decodes), router(**ADMIN) as front:
            for fake in (prefills[0], decodes[0]):
                front.pool.add(replica_of(fake, version="7"))
            answer = await put(front, prefills[1])
            assert answer.json() == {"id": "p1", "version": "7"}
            await until(lambda: all(state.is_ready for state in front.pool.states()))
            front.pool.remove("p0")
            assert (await front.ask(max_tokens=1)).status_code == 200
            assert len(prefills[1].requests) == 1

    run(check())


def test_one_that_fails_for_long_is_removed_and_one_that_recovers_stays() -> None:
    async def check() -> None:
        changes = {"registered_timeout_s": 0.6, "probe_interval_s": 0.1}
        async with fakes(2) as (short, long), router(**ADMIN, **changes) as front:
            for fake in (short, long):
                assert (await put(front, fake)).status_code == 201
            await until(lambda: all(state.is_ready for state in front.pool.states()))
            short.faults.append(Fault("status", times=2, spares_probes=False))
            await long.stop()
            await until(lambda: [state.id for state in front.pool.states()] == [short.name])
            await until(lambda: front.pool.states()[0].is_ready)
            assert (await front.ask()).status_code == 200
            await long.start()
            assert (await put(front, long)).status_code == 201

    run(check())


def test_a_replica_that_leaves_finishes_its_requests() -> None:
    async def check() -> None:
        async with fakes(2, token_s=0.05) as (fake, other), router(other, **ADMIN) as front:
            await put(front, fake)
            await until(lambda: all(state.is_ready for state in front.pool.states()))
            asking = [asyncio.create_task(front.ask(max_tokens=6)) for _ in range(4)]
            await until(lambda: fake.num_in_flight == 2)
            assert (await delete(front, fake.name)).json()["cut"] == 0
            assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200] * 4

    run(check())
