"""Replicas that fail, callers that misbehave: who loses what, what is told, and that nothing leaks."""

import asyncio
import json
import signal
import sys
import time
from typing import Any

import httpx
import openai
import pytest
from factories import ROOT
from fakes.openai_replica import Fault, Kind
from routers import Running, fakes, router, run, until

COMPLETIONS = "/v1/completions"


async def raw(it: Running, *pieces: bytes, timeout_s: float = 10) -> bytes:
    """Send bytes as they are, and read until the router closes."""
    host, _, port = it.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    try:
        return await asyncio.wait_for(reader.read(), timeout_s)
    finally:
        writer.close()


async def stream_of(it: Running, **more: Any) -> tuple[bool, bytes]:
    """A stream's bytes, and whether it came to its end."""
    got = b""
    try:
        body = {"model": "tiny", "stream": True, **more}
        async with it.client.stream("POST", COMPLETIONS, json=body) as answer:
            assert answer.status_code == 200
            async for piece in answer.aiter_raw():
                got += piece
    except httpx.RemoteProtocolError:
        return False, got
    return True, got


# --- before the first byte -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["disconnect", "status", "hang"])
def test_a_failure_before_the_first_byte_goes_on_at_another_replica(kind: Kind) -> None:
    async def work() -> None:
        async with fakes(2) as made, router(*made, policy="round_robin", first_byte_timeout_s=0.5) as it:
            made[0].faults.append(Fault(kind))
            answers = [await it.ask(stream=True) for _ in range(2)]
            assert made[0].faults == []
            assert all(answer.content.endswith(b"[DONE]\n\n") for answer in answers)
            assert it.pool.states()[0].failures == 1
            assert 'retries_total{model="tiny",replica="r0"} 1.0' in (await it.client.get("/metrics")).text

    run(work())


def test_a_replica_that_is_gone_takes_nobodys_request_with_it() -> None:
    async def work() -> None:
        async with fakes(2) as made, router(*made) as it:
            await made[0].stop()
            answers = await asyncio.gather(*(it.ask() for _ in range(20)))
            assert {(answer.status_code, answer.headers["x-flagscale-replica"]) for answer in answers} == {(200, "r1")}
            await until(lambda: it.pool.states()[0].phase == "failing")
            await made[0].start()
            await until(lambda: it.pool.states()[0].is_ready)

    run(work())


def test_a_single_replicas_own_words_are_passed_on() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake) as it:
            fake.faults.append(Fault("status", status=500))
            answer = await it.ask()
            assert (answer.status_code, answer.json()["error"]["message"]) == (500, "a fault on demand")

    run(work())


def test_a_request_that_fails_everywhere_is_an_error_with_the_cause() -> None:
    async def work() -> None:
        async with fakes(3) as made, router(*made, retries=1) as it:
            for fake in made:
                fake.faults.append(Fault("disconnect", times=5))
            answer = await it.ask()
            assert answer.status_code == 502
            assert "it closed the connection" in answer.json()["error"]["message"]
            assert sum(len(fake.requests) for fake in made) == 2

    run(work())


def test_a_first_byte_that_does_not_come() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake, first_byte_timeout_s=0.2) as it:
            fake.faults.append(Fault("hang"))
            answer = await it.ask()
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
            await until(lambda: fake.num_cancelled == 1)

    run(work())


def test_a_slow_replica_is_not_asked_twice_where_that_is_not_wanted() -> None:
    async def work() -> None:
        async with fakes(2) as made, router(*made, first_byte_timeout_s=0.2, retry_timeouts=False) as it:
            for fake in made:
                fake.faults.append(Fault("hang", times=3))
            assert (await it.ask()).status_code == 504
            assert sum(len(fake.requests) for fake in made) == 1

    run(work())


# --- while no replica is ready ---------------------------------------------------------------------------------------


def test_requests_wait_for_a_replica_that_restarts() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake, policy="round_robin") as it:
            await fake.stop()
            waiting = [asyncio.create_task(it.ask()) for _ in range(8)]
            await until(lambda: it.pool.held("tiny") == 8)
            assert 'router_held{model="tiny"} 8.0' in (await it.client.get("/metrics")).text
            assert (await it.client.get("/health")).status_code == 503
            await fake.start()
            assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}
            assert it.pool.held() == 0

    run(work())


def test_beyond_the_bounds_of_waiting_callers_are_told_to_come_again() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake, hold_requests=2, hold_timeout_s=0.5) as it:
            await fake.stop()
            answers = await asyncio.gather(*(it.ask() for _ in range(4)))
            assert {answer.status_code for answer in answers} == {503}
            assert (
                sorted(answer.json()["error"]["code"] for answer in answers)
                == ["no_replica_ready"] * 2 + ["overloaded"] * 2
            )
            assert all(answer.headers["retry-after"] == "5" for answer in answers)

    run(work())


def test_who_waits_may_leave() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake) as it:
            await fake.stop()
            waiting = asyncio.create_task(it.ask())
            await until(lambda: it.pool.held() == 1)
            waiting.cancel()
            await until(lambda: it.pool.held() == 0)

    run(work())


# --- after the first byte --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cut", "half_event", "stall"])
def test_a_stream_that_is_lost_ends_with_an_error_that_clients_raise(kind: Kind) -> None:
    async def work() -> None:
        async with (
            fakes(2) as made,
            router(*made, idle_timeout_s=0.3) as it,
            openai.AsyncOpenAI(base_url=f"{it.url}/v1", api_key="x", max_retries=0) as client,
        ):
            for fake in made:
                fake.faults.append(Fault(kind, after=3))
            words: list[str] = []

            async def read() -> None:
                async for piece in await client.completions.create(model="tiny", prompt="x", stream=True):
                    words.append(piece.choices[0].text)

            with pytest.raises(openai.APIError, match="the answer broke off"):
                await read()
            assert words == ["w0 ", "w1 ", "w2 "]
            assert sum(len(fake.requests) for fake in made) == 1
            await it.settled()
            assert sum(state.failures for state in it.pool.states()) == 1
            assert 'code="599"' in (await it.client.get("/metrics")).text

    run(work())


def test_a_lost_stream_has_whole_events_only_and_its_connection_is_closed() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake) as it:
            fake.faults.append(Fault("half_event", after=2))
            is_whole, got = await stream_of(it)
            assert not is_whole
            events = [json.loads(event.removeprefix(b"data: ")) for event in got.split(b"\n\n") if event]
            assert [bool(event.get("choices")) for event in events] == [True, True, False]
            assert events[-1]["error"]["code"] == "replica_lost"

    run(work())


def test_a_whole_answer_that_is_lost_cannot_be_taken_for_one() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake) as it:
            fake.faults.append(Fault("cut"))
            with pytest.raises(httpx.RemoteProtocolError):
                await it.ask()
            assert (await it.ask()).status_code == 200

    run(work())


def test_a_replica_killed_under_load_loses_only_what_had_begun() -> None:
    """32 streams over two replicas; one dies. Streams that had begun end with the error event, all others complete."""

    async def work() -> None:
        async with fakes(2, token_s=0.01, first_token_s=0.02) as made, router(*made) as it:
            first = [asyncio.create_task(stream_of(it, max_tokens=30)) for _ in range(24)]
            await until(lambda: made[0].num_in_flight >= 6)
            await asyncio.sleep(0.1)
            second = [asyncio.create_task(stream_of(it, max_tokens=30)) for _ in range(8)]
            await made[0].stop()
            results = await asyncio.gather(*first, *second)
            lost = [got for is_whole, got in results if not is_whole]
            assert all(got.endswith(b"[DONE]\n\n") for is_whole, got in results if is_whole)
            assert 0 < len(lost) < 24
            assert all(b"w0" in got and b"replica_lost" in got.split(b"\n\n")[-2] for got in lost)

    run(work())


# --- a replica, or the router, leaves --------------------------------------------------------------------------------


def test_a_drain_cuts_what_does_not_end_and_what_had_not_begun_goes_on_elsewhere() -> None:
    async def work() -> None:
        async with fakes(2) as (slow, other), router(slow, other, policy="round_robin") as it:
            slow.faults += [Fault("stall", after=2), Fault("hang")]
            other.faults += [Fault("stall", after=10**9, times=2)]
            asking = [asyncio.create_task(it.ask(stream=True)) for _ in range(4)]
            await until(lambda: slow.num_in_flight == 2)
            assert await it.pool.drain(slow.name, 0.2) == 2
            results = await asyncio.gather(*asking, return_exceptions=True)
            lost = [result for result in results if isinstance(result, httpx.RemoteProtocolError)]
            whole = [result for result in results if isinstance(result, httpx.Response)]
            assert (len(lost), len(whole)) == (1, 3)
            assert {answer.headers["x-flagscale-replica"] for answer in whole} == {"r1"}
            assert it.pool.states()[0].failures == 0

    run(work())


def test_the_router_ends_after_its_requests_and_tells_how_many(capfd: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        async with fakes(1, token_s=0.05) as (fake,), router(fake) as it:
            asking = [asyncio.create_task(it.ask(stream=True, max_tokens=20)) for _ in range(3)]
            await until(lambda: fake.num_in_flight == 3)
            it.server.should_exit = True
            answers = await asyncio.gather(*asking)
            assert all(answer.content.endswith(b"[DONE]\n\n") for answer in answers)

    run(work())
    assert "router ends; requests in flight: 3, they have 5 s" in capfd.readouterr().err


def test_the_router_cuts_what_does_not_end(capfd: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        async with fakes(2) as (stalls, dead), router(stalls, dead, drain_timeout_s=0.3, waits=True) as it:
            for fake in (stalls, dead):
                fake.faults.append(Fault("stall", after=1, times=2))
            asking = [asyncio.create_task(it.ask(stream=True)) for _ in range(2)]
            await until(lambda: stalls.num_in_flight + dead.num_in_flight == 2)
            it.server.should_exit = True
            results = await asyncio.gather(*asking, return_exceptions=True)
            assert all(isinstance(result, httpx.RemoteProtocolError) for result in results)

    run(work())
    assert "router cuts what has not finished; requests: 2" in capfd.readouterr().err


def test_sigterm_lets_streams_finish() -> None:
    """The router as a process: SIGTERM while a stream runs."""

    async def work() -> None:
        async with fakes(1, token_s=0.03) as (fake,):
            words = (sys.executable, "-m", "flagscale.serve.router", "-")
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(*words, stdin=pipe, stderr=pipe, cwd=ROOT)
            assert process.stdin is not None
            assert process.stderr is not None
            entry = {"id": "r0", "url": fake.url, "model": "tiny"}
            process.stdin.write(json.dumps({"settings": {"port": 0}, "replicas": [entry]}).encode())
            process.stdin.close()
            while b"listens on" not in (line := await process.stderr.readline()):
                assert line
            async with httpx.AsyncClient(base_url=line.split()[-1].decode(), timeout=30) as client:
                body = {"model": "tiny", "stream": True, "max_tokens": 20}
                asking = asyncio.create_task(client.post(COMPLETIONS, json=body))
                await until(lambda: fake.requests)
                process.send_signal(signal.SIGTERM)
                assert (await asking).content.endswith(b"data: [DONE]\n\n")
                told = (await process.stderr.read()).decode()
            assert "router ends; requests in flight: 1, they have 30 s" in told
            assert await process.wait() == -signal.SIGTERM

    run(work())


# --- callers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_token_s", [0.0, 60.0])
def test_a_caller_who_leaves_ends_the_work_at_the_replica(first_token_s: float) -> None:
    async def work() -> None:
        async with fakes(1, token_s=0.02) as (fake,), router(fake) as it:
            fake.first_token_s = first_token_s
            asking = [asyncio.create_task(it.ask(stream=True, max_tokens=10_000)) for _ in range(5)]
            await until(lambda: fake.num_in_flight == 5)
            for task in asking:
                task.cancel()
            await until(lambda: fake.num_cancelled == 5)
            await it.settled()
            assert 'code="499",model="tiny",replica="r0"} 5.0' in (await it.client.get("/metrics")).text
            assert it.pool.states()[0].failures == 0

    run(work())


def test_a_caller_who_reads_nothing_is_cut_and_no_replica_is_blamed() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake, idle_timeout_s=0.3) as it:
            host, _, port = it.url.removeprefix("http://").partition(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
            fake.pad_chars = 50_000
            body = json.dumps({"model": "tiny", "stream": True, "max_tokens": 100_000}).encode()
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await until(lambda: fake.num_cancelled == 1)
            await it.settled()
            await until(lambda: not it.server.server_state.connections)
            assert it.pool.states()[0].failures == 0
            writer.close()
            del reader

    run(work())


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/compl", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ", b"\r\n"]
)
def test_headers_that_never_end(sent: bytes) -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake, header_timeout_s=0.2) as it:
            assert (await raw(it, sent)).startswith(b"HTTP/1.1 408")
            await until(lambda: not it.server.server_state.connections)

    run(work())


def test_headers_that_trickle_get_no_more_time() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake, header_timeout_s=0.3) as it:
            host, _, port = it.url.removeprefix("http://").partition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
            count = 0
            while not reader.at_eof() and count < 1000:
                writer.write(b"G" if not count else b"E")
                count += 1
                with_answer = asyncio.create_task(reader.read(1000))
                done, _ = await asyncio.wait({with_answer}, timeout=0.02)
                if done:
                    assert (await with_answer).startswith(b"HTTP/1.1 4")
                    break
                with_answer.cancel()
            assert count < 1000
            writer.close()

    run(work())


def test_headers_without_end_are_refused_by_size() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake, max_header_bytes=2048) as it:
            got = await raw(it, b"GET / HTTP/1.1\r\nX-A: ", b"x" * 4096)
            assert got.startswith(b"HTTP/1.1 431")

    run(work())


def test_a_body_that_never_ends() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake, body_timeout_s=0.2) as it:
            got = await raw(it, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert got.startswith(b"HTTP/1.1 408")
            assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
            assert b"connection: close" in got.lower()
            assert fake.requests == []

    run(work())


@pytest.mark.parametrize("sent", [b"\x00\x01\x02\r\n\r\n", b"GET nonsense\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n"])
def test_bytes_that_are_no_http(sent: bytes) -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake) as it:
            assert (await raw(it, sent)).startswith(b"HTTP/1.1 400")
            assert (await it.ask()).status_code == 200

    run(work())


def test_many_slow_callers_leave_room_for_others() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake, header_timeout_s=1) as it:
            slow = [asyncio.create_task(raw(it, b"POST /v1/comp")) for _ in range(100)]
            await until(lambda: len(it.server.server_state.connections) >= 100)
            assert (await it.ask()).status_code == 200
            await asyncio.gather(*slow)

    run(work())


def test_a_storm_of_everything_leaks_nothing() -> None:
    """Streams that are left, lost, refused and served, at once: then nothing is at a replica, and no task is left."""

    async def work() -> None:
        async with fakes(3, token_s=0.002) as made, router(*made, idle_timeout_s=0.5) as it:
            for fake in made:
                fake.faults += [Fault(kind, times=3, after=1) for kind in ("cut", "status", "disconnect", "half_event")]

            async def ask(number: int) -> None:
                body: dict[str, Any] = {"stream": number % 2 == 0, "max_tokens": 10}
                try:
                    async with asyncio.timeout(0.02 if number % 5 == 0 else 60):
                        await it.ask(**body)
                except (TimeoutError, httpx.HTTPError):
                    pass

            await asyncio.gather(*(ask(number) for number in range(60)))
            await it.settled()
            await it.client.aclose()
            await until(lambda: all(fake.num_in_flight == 0 for fake in made))
            await until(lambda: not it.server.server_state.connections)

    run(work())


def test_probes_come_at_once_after_a_failure() -> None:
    async def work() -> None:
        async with fakes(1) as (fake,), router(fake, probe_interval_s=3600) as it:
            probes, began = fake.num_probes, time.monotonic()
            fake.faults.append(Fault("disconnect"))
            assert (await it.ask()).status_code == 200
            assert fake.num_probes == probes + 1
            assert time.monotonic() - began < 3600

    run(work())
