"""Readiness by a real token: what counts as ready, and what is said about a server that is not."""

import asyncio
from typing import Any

import pytest
from fakes.openai_replica import FakeReplica, Fault
from pydantic import SecretStr
from routers import run

from flagscale.serve.router.history import History
from flagscale.serve.router.pool import Pool, Replica
from flagscale.serve.router.probe import ProbeResult, probe_completion


@pytest.mark.parametrize("refused", [(), ("/v1/completions",), ("/v1/completions", "/v1/chat/completions")])
def test_a_model_of_any_kind_answers(refused: tuple[str, ...]) -> None:
    """A model that has no completions is asked for a chat, then for an embedding."""

    async def work() -> None:
        async with FakeReplica(refused_paths=refused) as fake:
            result = await probe_completion(fake.url + "/", "tiny")
            assert (result.is_ok, result.reason, result.has_timed_out) == (True, "", False)
            assert result.seconds > 0

    run(work())


@pytest.mark.parametrize(
    ("key", "model", "reason"),
    [
        (None, "tiny", '401 of /v1/completions: {"error": {"message": "wrong key"'),
        ("other", "tiny", "401 of /v1/completions"),
        ("own", "another", '404 of /v1/completions: {"error": {"message": "no model another"'),
    ],
)
def test_a_server_that_answers_something_else_is_not_ready(key: str | None, model: str, reason: str) -> None:
    async def work() -> None:
        async with FakeReplica(api_key="own") as fake:
            result = await probe_completion(fake.url, model, SecretStr(key) if key else None)
            assert not result.is_ok
            assert result.reason.startswith(reason)
            assert (await probe_completion(fake.url, "tiny", SecretStr("own"))).is_ok

    run(work())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("hang", times=9, spares_probes=False), "no token within 0.3 s"),
        (Fault("disconnect", times=9, spares_probes=False), "it closed the connection"),
        (Fault("status", times=9, spares_probes=False), "500 of /v1/completions"),
    ],
)
def test_a_server_that_fails(fault: Fault, reason: str) -> None:
    async def work() -> None:
        async with FakeReplica(faults=[fault]) as fake:
            result = await probe_completion(fake.url, "tiny", timeout_s=0.3 if fault.kind == "hang" else 30)
            assert not result.is_ok
            assert result.reason.startswith(reason)
            assert result.has_timed_out == (fault.kind == "hang")

    run(work())


@pytest.mark.parametrize(
    ("url", "reason"),
    [("http://127.0.0.1:1", "connection refused"), ("http://no-such-host.invalid:1", "its host name is unknown")],
)
def test_a_server_that_is_not_there(url: str, reason: str) -> None:
    async def work() -> None:
        assert (await probe_completion(url, "tiny")).reason == reason

    run(work())


def test_a_server_that_speaks_no_http() -> None:
    async def work() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            result = await probe_completion(f"http://127.0.0.1:{port}", "tiny")
            assert not result.is_ok
            assert result.reason

    run(work())


def test_history_has_a_sample_for_each_look_and_forgets_who_is_gone() -> None:
    async def work() -> None:
        async def passes(*_: Any) -> ProbeResult:
            return ProbeResult(True, 0.0)

        pool = Pool(prober=passes)
        pool.add(Replica("a", "http://h1:1", "m"))
        history = History(pool)
        history.sample()
        pool.start()
        await asyncio.sleep(0.01)
        lease = pool.find_lease("m", None)
        assert lease is not None
        lease.answered(0.5)
        history.sample()
        lease.release()
        history.sample()
        assert [(it.is_ready, it.in_flight, it.requests, it.first_byte_s) for it in history.samples("a")] == [
            (False, 0, 0, None), (True, 1, 1, 0.5), (True, 0, 0, None),
        ]  # fmt: skip
        pool.remove("a")
        history.sample()
        assert history.samples("a") == ()
        await pool.close()

    run(work())
