"""The router over real connections: what is passed on, how, and what it says itself."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from fakes.openai_replica import FakeReplica, Fault
from routers import Running, fakes, replica_of, router, run, until

COMPLETIONS = "/v1/completions"


def test_bytes_pass_as_they_are() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake) as it, httpx.AsyncClient() as direct:
            more: dict[str, Any]
            for path, more in (
                (COMPLETIONS, {}),
                (COMPLETIONS, {"stream": True, "stream_options": {"include_usage": True}}),
                ("/v1/chat/completions", {"stream": True}),
                ("/v1/embeddings", {"input": "x"}),
            ):
                through = await it.ask(path, **more)
                straight = await direct.post(fake.url + path, json={"model": "tiny", "prompt": "hello", **more})
                assert through.status_code == 200
                assert through.content == straight.content
                assert through.headers["content-type"] == straight.headers["content-type"]
                assert through.headers["x-flagscale-replica"] == "r0"

    run(work())


def test_pieces_of_a_stream_come_one_by_one() -> None:
    """The third word is here while the replica still works on the rest."""

    async def work() -> None:
        async with fakes(1, token_s=0.05) as (fake,), router(fake) as it:
            body = {"model": "tiny", "stream": True, "max_tokens": 50}
            async with it.client.stream("POST", COMPLETIONS, json=body) as answer:
                lines = answer.aiter_lines()
                while "w2" not in await anext(lines):
                    assert fake.num_in_flight == 1
                assert fake.num_in_flight == 1
            await it.settled()

    run(work())


def test_the_openai_client_works() -> None:
    async def work() -> None:
        async with (
            fakes(2) as made,
            router(*made, api_keys=["secret"]) as it,
            openai.AsyncOpenAI(base_url=f"{it.url}/v1", api_key="secret", max_retries=0) as client,
        ):
            assert [model.id async for model in client.models.list()] == ["tiny"]
            assert (await client.models.retrieve("tiny")).id == "tiny"
            whole = await client.completions.create(model="tiny", prompt="x", max_tokens=3)
            assert whole.choices[0].text == "w0 w1 w2"
            pieces = [
                piece.choices[0].delta.content
                async for piece in await client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": "x"}], stream=True, max_tokens=3
                )
            ]
            assert "".join(filter(None, pieces)) == "w0 w1 w2 "
            with pytest.raises(openai.NotFoundError, match="did you mean `tiny`"):
                await client.completions.create(model="tinny", prompt="x")
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key="other").models.list()

    run(work())


def test_each_replica_gets_its_own_key_and_never_the_callers() -> None:
    async def work() -> None:
        async with (
            FakeReplica(name="locked", api_key="own") as locked,
            FakeReplica(name="other", model="other") as open_one,
            router(locked, open_one, api_keys=["callers"]) as it,
        ):
            it.client.headers["Authorization"] = "Bearer callers"
            assert (await it.ask()).status_code == 200
            assert (await it.ask(model="other")).status_code == 200
            assert locked.headers[0]["authorization"] == "Bearer own"
            assert "authorization" not in open_one.headers[0]

    run(work())


def test_without_keys_the_callers_goes_on() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake) as it:
            it.client.headers["Authorization"] = "Bearer theirs"
            await it.ask()
            assert fake.headers[0]["authorization"] == "Bearer theirs"

    run(work())


def test_models_go_to_their_replicas_and_the_list_has_all() -> None:
    async def work() -> None:
        async with (
            FakeReplica(name="a", model="one") as a,
            FakeReplica(name="b", model="org/two") as b,
            router(a, b) as it,
        ):
            for model, name in (("one", "a"), ("org/two", "b"), ("one", "a")):
                assert (await it.ask(model=model)).headers["x-flagscale-replica"] == name
            listed = (await it.client.get("/v1/models")).json()
            assert [model["id"] for model in listed["data"]] == ["one", "org/two"]
            assert (await it.client.get("/v1/models/org/two")).json()["id"] == "org/two"
            assert (await it.client.get("/v1/models/three")).status_code == 404

    run(work())


@pytest.mark.parametrize(("policy", "body"), [("session", {"user": "anna"}), ("prefix_aware", {"prompt": "once upon"})])
def test_requests_that_belong_together_meet_the_same_replica(policy: str, body: dict[str, str]) -> None:
    async def work() -> None:
        async with fakes(3) as made, router(*made, policy=policy) as it:
            names = {(await it.ask(**body)).headers["x-flagscale-replica"] for _ in range(6)}
            assert len(names) == 1

    run(work())


def test_round_robin_takes_turns() -> None:
    async def work() -> None:
        async with fakes(3) as made, router(*made, policy="round_robin") as it:
            names = [(await it.ask()).headers["x-flagscale-replica"] for _ in range(6)]
            assert sorted(names) == ["r0", "r0", "r1", "r1", "r2", "r2"]

    run(work())


def test_what_the_router_says_itself() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake) as it:
            for path, method, content, status, code in (
                (COMPLETIONS, "POST", "{", 400, "invalid_json"),
                (COMPLETIONS, "POST", "[]", 400, "invalid_json"),
                (COMPLETIONS, "POST", "{}", 400, "invalid_model"),
                (COMPLETIONS, "POST", '{"model": "x"}', 404, "model_not_found"),
                (COMPLETIONS, "GET", "", 405, "invalid_request"),
                ("/v1/unknown", "POST", "{}", 404, "unknown_path"),
                ("/v1/models", "DELETE", "", 405, "invalid_request"),
            ):
                answer = await it.client.request(method, path, content=content)
                assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}
            assert fake.requests == []

    run(work())


def test_keys_guard_all_but_health_and_the_empty_page() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake, api_keys=["k1", "k2"]) as it:
            for path in ("/v1/models", "/v1/models/tiny", "/status", "/metrics", "/openapi.json"):
                assert (await it.client.get(path)).status_code == 401
                for key in ("k1", "k2"):
                    answer = await it.client.get(path, headers={"Authorization": f"Bearer {key}"})
                    assert answer.status_code == 200
            assert (await it.ask()).status_code == 401
            assert (await it.client.get("/health")).json() == {"status": "ok", "ready": 1, "replicas": 1}
            assert "tiny" not in (await it.client.get("/")).text

    run(work())


def test_metrics_and_status_tell_what_happened() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake) as it:
            await it.ask(max_tokens=4)
            await it.ask(stream=True, stream_options={"include_usage": True}, max_tokens=6)
            await it.client.post(COMPLETIONS, content="{")
            metrics = (await it.client.get("/metrics")).text
            for line in (
                'flagscale_router_requests_total{code="200",model="tiny",replica="r0"} 2.0',
                'flagscale_router_requests_total{code="400",model="",replica=""} 1.0',
                'flagscale_router_tokens_total{kind="completion",model="tiny",replica="r0"} 10.0',
                'flagscale_router_tokens_total{kind="prompt",model="tiny",replica="r0"} 10.0',
                'flagscale_router_first_byte_seconds_count{model="tiny",replica="r0"} 2.0',
                'flagscale_router_in_flight{model="tiny",replica="r0"} 0.0',
                'flagscale_router_breaker_state{model="tiny",replica="r0",state="closed"} 1.0',
                'flagscale_router_ready{model="tiny",replica="r0"} 1.0',
                'flagscale_router_held{model="tiny"} 0.0',
            ):
                assert line in metrics.splitlines(), line
            status = (await it.client.get("/status")).json()
            (replica,) = status["replicas"]
            assert (replica["phase"], replica["requests"], replica["failures"]) == ("ready", 2, 0)
            assert replica["first_byte_s"] > 0
            assert status["held"] == {"tiny": 0}
            assert "api_key" not in replica
            it.pool.remove("r0")
            assert 'replica="r0"' not in (await it.client.get("/metrics")).text

    run(work())


def test_large_bodies_pass_and_larger_ones_are_refused() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake, max_body_bytes=11 * 1024**2) as it:
            prompt = "x" * (10 * 1024**2)
            assert (await it.ask(prompt=prompt)).status_code == 200
            assert len(fake.requests[0]["prompt"]) == len(prompt)
            refused = await it.ask(prompt=prompt + "y" * 1024**2)
            assert refused.status_code == 413
            assert refused.json()["error"]["code"] == "request_too_large"
            assert (await it.ask()).status_code == 200

    run(work())


def test_refusals_of_a_replica_pass_and_never_count_against_it() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake, breaker_failures=1) as it:
            fake.faults += [Fault("status", status=status) for status in (400, 404, 422, 429, 501)]
            for status in (400, 404, 422, 429, 501):
                answer = await it.ask()
                assert (answer.status_code, answer.json()["error"]["message"]) == (status, "a fault on demand")
            (state,) = it.pool.states()
            assert (state.failures, state.is_ready) == (0, True)

    run(work())


def test_an_update_loses_no_request() -> None:
    """New replicas join, the old ones are drained and leave, while requests keep coming."""

    async def work() -> None:
        async with fakes(2, token_s=0.002) as old, router(*old) as it:
            stop = asyncio.Event()
            codes: list[int] = []
            callers = [asyncio.create_task(_keep_asking(it, stop, codes)) for _ in range(8)]
            await until(lambda: len(codes) > 20)
            async with FakeReplica(name="new0", token_s=0.002) as n0, FakeReplica(name="new1", token_s=0.002) as n1:
                for fake in (n0, n1):
                    it.pool.add(replica_of(fake, version="2"))
                await until(lambda: all(state.is_ready for state in it.pool.states()))
                for fake in old:
                    assert await it.pool.drain(fake.name, 10) == 0
                    it.pool.remove(fake.name)
                    await fake.stop()
                count = len(codes)
                await until(lambda: len(codes) > count + 20)
                stop.set()
                await asyncio.gather(*callers)
            assert set(codes) == {200}
            assert {state.version for state in it.pool.states()} == {"2"}

    run(work())


async def _keep_asking(it: Running, stop: asyncio.Event, codes: list[int]) -> None:
    while not stop.is_set():
        answer = await it.ask(stream=True)
        assert answer.content.endswith(b"data: [DONE]\n\n")
        codes.append(answer.status_code)


def test_the_description_of_the_api_is_json() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake) as it:
            document = json.loads((await it.client.get("/openapi.json")).content)
            assert set(document["paths"]) >= {COMPLETIONS, "/v1/chat/completions", "/v1/embeddings", "/v1/models"}

    run(work())
