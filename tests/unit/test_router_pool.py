"""The pool with probes that the test answers: who is ready, who is tried again, who is cut."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from routers import run, settings, until

from flagscale.errors import UserError
from flagscale.serve.router.pool import Pool, Replica, UnknownModelError
from flagscale.serve.router.probe import ProbeResult
from flagscale.serve.router.request import Request
from flagscale.serve.router.settings import RouterSettings

NEVER = float("inf")


class Probes:
    """What each replica's probes find; `asked` has the ids in order."""

    def __init__(self) -> None:
        self.results: dict[str, ProbeResult] = {}
        self.asked: list[str] = []

    async def __call__(self, replica: Replica, _: RouterSettings) -> ProbeResult:
        self.asked.append(replica.id)
        await asyncio.sleep(0)
        return self.results.get(replica.id, ProbeResult(True, 0.0))


ANY = Request("/v1/completions", (), b'{"model": "m", "prompt": "abc", "max_tokens": 7}', "m", None)


def made(*ids: str, **changes: Any) -> tuple[Pool, Probes]:
    probes = Probes()
    pool = Pool(settings(**changes), probes)
    for name in ids:
        pool.add(Replica(name, f"http://127.0.0.1:1/{name}", "m"))
    return pool, probes


def phase(pool: Pool, number: int = 0) -> Callable[[], str]:
    return lambda: pool.states()[number].phase


def test_nobody_is_ready_before_a_probe_has_passed() -> None:
    async def work() -> None:
        pool, probes = made("a")
        probes.results["a"] = ProbeResult(False, 0.1, "connection refused")
        assert pool.find_lease("m", None) is None
        pool.start()
        await until(lambda: pool.states()[0].reason)
        assert (pool.states()[0].phase, pool.states()[0].reason) == ("starting", "connection refused")
        assert pool.find_lease("m", None) is None
        probes.results["a"] = ProbeResult(True, 0.1)
        await until(lambda: pool.states()[0].is_ready)
        assert pool.find_lease("m", None) is not None
        await pool.close()

    run(work())


def test_failures_in_a_row_open_and_a_probe_closes() -> None:
    async def work() -> None:
        pool, probes = made("a", breaker_failures=2)
        pool.start()
        await until(lambda: pool.states()[0].is_ready)
        probes.results["a"] = ProbeResult(False, 0, "dead")
        for _ in range(2):
            lease = pool.find_lease("m", None)
            assert lease is not None
            lease.failed("connection refused")
            lease.release()
        assert pool.states()[0].phase == "failing"
        assert pool.states()[0].failures == 2
        probes.results["a"] = ProbeResult(True, 0)
        await until(lambda: pool.states()[0].is_ready)
        assert pool.states()[0].reason == ""
        await pool.close()

    run(work())


def test_one_failure_calls_for_a_probe_at_once_and_the_probe_decides() -> None:
    async def work() -> None:
        pool, probes = made("a", probe_interval_s=3600)
        pool.start()
        await until(lambda: pool.states()[0].is_ready)
        lease = pool.find_lease("m", None)
        assert lease is not None
        lease.failed("connection reset")
        await until(lambda: probes.asked == ["a", "a"])
        assert pool.states()[0].is_ready
        probes.results["a"] = ProbeResult(False, 0, "dead")
        lease.failed("connection reset")
        await until(lambda: phase(pool)() == "failing")
        lease.release()
        await pool.close()

    run(work())


LOST = ProbeResult(False, 0, "no route to host", is_reached=False)


@pytest.mark.parametrize(
    ("found", "is_other_ready", "is_cut"),
    [
        (LOST, True, True),
        (LOST, False, False),
        (ProbeResult(False, 30, "no token within 30 s", has_timed_out=True), True, False),
        (ProbeResult(False, 1, "503 of /v1/completions"), True, False),
    ],
)
def test_who_waits_at_a_lost_replica_goes_elsewhere_if_there_is_one(
    found: ProbeResult, is_other_ready: bool, is_cut: bool
) -> None:
    async def work() -> None:
        pool, probes = made("a", "b", probe_interval_s=3600)
        if not is_other_ready:
            probes.results["b"] = ProbeResult(False, 0, "still loading")
        pool.start()
        await until(lambda: pool.states()[0].is_ready and pool.states()[1].is_ready is is_other_ready)
        leases = [lease for _ in range(6) if (lease := pool.find_lease("m", None)) is not None]
        waiting, answered, *_ = (lease for lease in leases if lease.replica.id == "a")
        answered.answered(0.1)
        probes.results["a"] = found
        waiting.failed("no route to host")
        await until(lambda: phase(pool)() == "failing")
        assert (waiting.is_cut, answered.is_cut) == (is_cut, False)
        assert not any(lease.is_cut for lease in leases if lease.replica.id == "b")
        await pool.close()

    run(work())


def test_a_busy_replica_is_not_taken_for_a_dead_one() -> None:
    """Its probe is late, but bytes of other answers came in the meantime."""

    async def work() -> None:
        pool, probes = made("a")
        pool.start()
        await until(lambda: pool.states()[0].is_ready)
        lease = pool.find_lease("m", None)
        assert lease is not None
        probes.results["a"] = ProbeResult(False, 30, "no token within 30 s", has_timed_out=True)
        asked = len(probes.asked)
        lease.alive(asyncio.get_running_loop().time() + 3600)
        lease.failed("a single fault")
        await until(lambda: len(probes.asked) > asked)
        await asyncio.sleep(0.01)
        assert pool.states()[0].is_ready
        lease.release()
        await pool.close()

    run(work())


def test_silence_is_probed_and_traffic_is_proof_enough() -> None:
    async def work() -> None:
        pool, probes = made("a", "b", probe_interval_s=0.1)
        pool.start()
        await until(lambda: all(state.is_ready for state in pool.states()))
        leases = [pool.find_lease("m", None) for _ in range(2)]
        lease = next(it for it in leases if it and it.replica.id == "a")
        probes.asked.clear()
        for _ in range(25):
            lease.alive(asyncio.get_running_loop().time())
            await asyncio.sleep(0.01)
        assert "b" in probes.asked
        assert probes.asked.count("a") <= 1
        for it in leases:
            assert it is not None
            it.release()
        await pool.close()

    run(work())


def test_what_has_failed_a_request_is_tried_again_only_after_a_probe() -> None:
    async def work() -> None:
        pool, probes = made("a")
        pool.start()
        await until(lambda: pool.states()[0].is_ready)
        lease = pool.find_lease("m", None)
        assert lease is not None
        tried = frozenset({("a", lease.epoch)})
        assert pool.find_lease("m", None, tried) is None
        loop = asyncio.get_running_loop()
        waiting = asyncio.create_task(pool.acquire(ANY, tried, loop.time() + 10))
        await asyncio.sleep(0)
        assert pool.held("m") == pool.held() == 1
        lease.failed("connection reset")
        lease.release()
        (await waiting)[0].release()
        assert probes.asked == ["a", "a"]
        assert pool.held() == 0
        await pool.close()

    run(work())


def test_drain_waits_and_then_cuts() -> None:
    async def work() -> None:
        pool, _ = made("a", "b")
        pool.start()
        await until(lambda: all(state.is_ready for state in pool.states()))
        leases = [pool.find_lease("m", None) for _ in range(4)]
        on_a = [lease for lease in leases if lease and lease.replica.id == "a"]
        assert len(on_a) == 2
        draining = asyncio.create_task(pool.drain("a", 0.05))
        await until(lambda: phase(pool)() == "draining")
        assert {lease.replica.id for _ in range(5) if (lease := pool.find_lease("m", None))} == {"b"}
        on_a[0].release()
        on_a[1].on_cut = on_a[1].release
        assert await draining == 1
        assert (on_a[0].is_cut, on_a[1].is_cut) == (False, True)
        assert await pool.drain("a", 0) == 0
        pool.remove("a")
        assert [state.id for state in pool.states()] == ["b"]
        await pool.close()

    run(work())


def test_who_waits_for_a_model_that_leaves_is_told() -> None:
    async def work() -> None:
        pool, _ = made("a")
        loop = asyncio.get_running_loop()
        waiting = asyncio.create_task(pool.acquire(ANY, frozenset(), loop.time() + 10))
        await asyncio.sleep(0)
        pool.remove("a")
        with pytest.raises(UnknownModelError, match="there are: none"):
            await waiting

    run(work())


def test_an_expected_model_is_known_before_and_between_its_replicas() -> None:
    async def work() -> None:
        pool, _ = made()
        pool.expect(["m"])
        assert pool.models() == ("m",)
        pool.start()
        loop = asyncio.get_running_loop()
        waiting = asyncio.create_task(pool.acquire(ANY, frozenset(), loop.time() + 10))
        await until(lambda: pool.held("m") == 1)
        pool.add(Replica("a", "http://127.0.0.1:1", "m"))
        (await waiting)[0].release()
        pool.remove("a")
        waiting = asyncio.create_task(pool.acquire(ANY, frozenset(), loop.time() + 10))
        await until(lambda: pool.held("m") == 1)
        pool.expect(["other"])
        with pytest.raises(UnknownModelError, match="there are: other"):
            await waiting
        await pool.close()

    run(work())


def test_tokens_are_a_load_until_they_are_computed() -> None:
    async def work() -> None:
        pool, _ = made()
        for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode")):
            pool.add(Replica(name, "http://127.0.0.1:1", "m", role=role, handover="nixl"))  # type: ignore[arg-type]
        pool.start()
        await until(lambda: all(state.is_ready for state in pool.states()))
        long = replace(ANY, body=b'{"model": "m", "prompt": "%s", "max_tokens": 7}' % (b"x" * 4000))
        first, first_decode = pool.find_route(long)
        assert (first.tokens, first_decode.tokens) == (1001, 1008)
        others = [pool.find_route(ANY) for _ in range(3)]
        assert {prefill.replica.id for prefill, _ in others} == {"p0", "p1"} - {first.replica.id}
        first.computed()
        after, _ = pool.find_route(ANY)
        assert after.replica.id == first.replica.id
        with pytest.raises(UserError, match="the others are prefill or decode"):
            pool.add(Replica("whole", "http://127.0.0.1:1", "m"))
        await pool.close()

    run(work())


def test_a_replica_that_joins_takes_those_who_wait() -> None:
    async def work() -> None:
        pool, probes = made("a")
        probes.results["a"] = ProbeResult(False, 0, "dead")
        pool.start()
        loop = asyncio.get_running_loop()
        waiting = asyncio.create_task(pool.acquire(ANY, frozenset(), loop.time() + 10))
        await asyncio.sleep(0)
        pool.add(Replica("b", "http://127.0.0.1:2", "m", version="2"))
        assert (await waiting)[0].replica.version == "2"
        await pool.close()

    run(work())


def test_models_have_replicas_of_their_own() -> None:
    async def work() -> None:
        pool, _ = made("a")
        pool.add(Replica("b", "http://127.0.0.1:2", "qwen3"))
        pool.start()
        await until(lambda: all(state.is_ready for state in pool.states()))
        assert pool.models() == ("m", "qwen3")
        found = [pool.find_lease("qwen3", None) for _ in range(5)]
        assert {lease.replica.id for lease in found if lease} == {"b"}
        with pytest.raises(UnknownModelError, match="did you mean `qwen3`"):
            pool.find_lease("qwen33", None)
        await pool.close()

    run(work())


def test_what_is_typed_wrongly() -> None:
    pool, _ = made("first", "second")
    with pytest.raises(UserError, match="did you mean `second`"):
        pool.remove("secnd")
    with pytest.raises(UserError, match="there already"):
        pool.add(Replica("first", "http://127.0.0.1:1", "m"))
