"""Laws of the router's parts that decide: policies, breaker, hold queue, the cutting of streams into events."""

import asyncio
import math
from collections.abc import Hashable
from hashlib import blake2b
from typing import get_args

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from routers import until

from flagscale.serve.router.breaker import Breaker
from flagscale.serve.router.forward import split_events
from flagscale.serve.router.hold import HoldQueue, HoldRefusedError
from flagscale.serve.router.policies import PAIR_POLICIES, ByKey, Load, RoundRobin, choose_pair, make_policy, score
from flagscale.serve.router.settings import PairPolicyName, PolicyName, RouterSettings

IDS = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=8, unique=True)
WEIGHTS = st.floats(0.1, 10)
KEYS = st.none() | st.text(max_size=20)


@st.composite
def loads(draw: st.DrawFn) -> tuple[Load, ...]:
    return tuple(Load(name, draw(st.integers(0, 50)), draw(WEIGHTS), draw(st.integers(0, 999))) for name in draw(IDS))


@given(st.sampled_from(get_args(PolicyName)), st.lists(st.tuples(loads(), KEYS), min_size=1, max_size=5))
def test_every_request_goes_to_a_ready_replica(name: PolicyName, requests: list[tuple[tuple[Load, ...], str]]) -> None:
    policy = make_policy(RouterSettings(policy=name))
    for ready, key in requests:
        assert policy.choose(ready, key) in {load.id for load in ready}


@given(loads(), st.text(), st.floats(1.01, 3))
def test_no_replica_is_loaded_beyond_its_bound(ready: tuple[Load, ...], key: str, bound: float) -> None:
    chosen = ByKey(bound).choose(ready, key)
    load = next(it for it in ready if it.id == chosen)
    fair = (sum(it.in_flight for it in ready) + 1) * load.weight / sum(it.weight for it in ready)
    assert load.in_flight + 1 <= math.ceil(bound * fair)


@given(IDS, st.integers(2, 6), st.integers(1, 60))
def test_bounded_load_keeps_its_bound_from_request_to_request(ids: list[str], bound: int, num_requests: int) -> None:
    """All prompts alike, the worst case: the bound holds at each step although nothing leaves."""
    policy, counts = ByKey(bound), dict.fromkeys(ids, 0)
    for number in range(1, num_requests + 1):
        counts[policy.choose([Load(name, count) for name, count in counts.items()], "same")] += 1
        assert max(counts.values()) <= math.ceil(bound * number / len(ids))


@given(IDS, st.lists(st.text(max_size=12), max_size=30), st.data())
def test_who_leaves_moves_only_its_own_keys(ids: list[str], keys: list[str], data: st.DataObject) -> None:
    """And read backwards: who joins takes keys to itself and moves no other."""
    assume(len(ids) > 1)
    gone = data.draw(st.sampled_from(ids))
    policy = ByKey(None)
    for key in keys:
        before = policy.choose([Load(name, 0) for name in ids], key)
        after = policy.choose([Load(name, 0) for name in ids if name != gone], key)
        assert after == before or before == gone


def test_a_replica_has_its_share_of_keys() -> None:
    """By weight, within a fifth: 20,000 keys over weights 1, 1 and 2."""
    ready = [Load("a", 0, 1), Load("b", 0, 1), Load("c", 0, 2)]
    counts = dict.fromkeys("abc", 0)
    for number in range(20_000):
        digest = blake2b(str(number).encode(), digest_size=16).digest()
        counts[max(ready, key=lambda load: score(digest, load)).id] += 1
    assert all(abs(counts[load.id] / (5000 * load.weight) - 1) < 0.2 for load in ready)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 4))
def test_round_robin_gives_each_its_weight_in_every_round(weights: list[int], rounds: int) -> None:
    policy, ready = RoundRobin(), [Load(str(n), 0, weight) for n, weight in enumerate(weights)]
    for _ in range(rounds):
        turn = [policy.choose(ready, None) for _ in range(sum(weights))]
        assert [turn.count(load.id) for load in ready] == weights


@st.composite
def sides(draw: st.DrawFn) -> dict[Hashable, list[Load]]:
    """Ready halves by their group, each with requests and tokens in flight."""
    made: dict[Hashable, list[Load]] = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=4), max_size=6, unique=True)):
        load = Load(name, draw(st.integers(0, 20)), draw(WEIGHTS), draw(st.integers(0, 5000)))
        made.setdefault(draw(st.sampled_from(["v1", "v2", "v3"])), []).append(load)
    return made


@given(st.sampled_from(get_args(PairPolicyName)), sides(), sides())
def test_a_pair_is_of_one_group_and_found_whenever_there_is_one(
    name: PairPolicyName, prefills: dict[Hashable, list[Load]], decodes: dict[Hashable, list[Load]]
) -> None:
    pair = choose_pair(PAIR_POLICIES[name](), prefills, decodes)
    if pair is None:
        assert not prefills.keys() & decodes.keys()
        return
    of = [
        next(group for group, loads in side.items() if chosen in {load.id for load in loads})
        for side, chosen in zip((prefills, decodes), pair, strict=True)
    ]
    assert of[0] == of[1]


@given(loads(), st.sampled_from(["slo", "robin"]))
def test_no_half_has_less_to_do_than_the_one_that_is_chosen(ready: tuple[Load, ...], name: PairPolicyName) -> None:
    measure = {
        "slo": lambda it: it.tokens / it.weight,
        "robin": lambda it: (it.in_flight + 1) / it.weight,
    }[name]
    prefill, decode = choose_pair(PAIR_POLICIES[name](), {1: ready}, {1: ready}) or ("", "")
    least = min(map(measure, ready))
    assert all(measure(next(it for it in ready if it.id == chosen)) == least for chosen in (prefill, decode))


@given(st.lists(st.integers(1, 2000), min_size=4, max_size=40))
def test_tokens_are_spread_within_the_largest_request(sizes: list[int]) -> None:
    """`slo` over halves that nothing leaves: no two differ by more than one request."""
    tokens = dict.fromkeys("abc", 0)
    for size in sizes:
        ready = [Load(name, 0, tokens=count) for name, count in tokens.items()]
        tokens[PAIR_POLICIES["slo"]().choose(ready, None)] += size
    assert max(tokens.values()) - min(tokens.values()) <= max(sizes)


class BreakerMachine(RuleBasedStateMachine):
    """Any order of answers, failures and probes, and time that passes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(max_failures=3, open_s=1, open_max_s=4)
        self.now = 100.0
        self.in_a_row = 0
        self.wait_s = 1.0

    @rule(seconds=st.floats(0, 5))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def answer(self) -> None:
        before = self.breaker.state
        self.breaker.succeed()
        assert self.breaker.state == before
        self.in_a_row = 0

    @rule()
    def fail(self) -> None:
        before = self.breaker.state
        self.breaker.fail(self.now)
        if before != "closed":
            assert self.breaker.state == before
            return
        self.in_a_row += 1
        assert (self.breaker.state == "open") == (self.in_a_row == 3)
        self._note_opening()

    @precondition(lambda self: self.breaker.state != "half_open")
    @rule(is_ok=st.booleans())
    def probe(self, is_ok: bool) -> None:
        was_open, due = self.breaker.state == "open", self.breaker.due
        may = self.breaker.begin_probe(self.now)
        assert may == (not was_open or self.now >= due)
        assert self.breaker.state == ("half_open" if may and was_open else "open" if was_open else "closed")
        self.breaker.end_probe(is_ok, self.now)
        if may:
            assert self.breaker.state == ("closed" if is_ok else "open")
            self._note_opening()
            if is_ok:
                self.in_a_row, self.wait_s = 0, 1.0

    def _note_opening(self) -> None:
        """It has just opened, or is closed."""
        if self.breaker.state == "open":
            assert self.breaker.due == self.now + self.wait_s
            self.in_a_row, self.wait_s = 0, min(4.0, 2 * self.wait_s)

    @invariant()
    def is_never_left_for_longer_than_the_longest(self) -> None:
        assert self.breaker.due <= self.now + 4
        assert 0 <= self.breaker.failures < 3


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(max_examples=50, stateful_step_count=30)


@settings(max_examples=40, deadline=None)
@given(
    limit=st.integers(0, 5),
    steps=st.lists(st.sampled_from(("wait a", "wait b", "wake a", "wake b", "leave", "expire")), max_size=30),
    is_closed=st.booleans(),
)
def test_the_hold_queue_keeps_its_bound_and_every_wait_ends(limit: int, steps: list[str], is_closed: bool) -> None:
    async def work() -> None:
        queue, loop = HoldQueue(limit), asyncio.get_running_loop()
        waiting: list[asyncio.Task[None]] = []
        for step in steps:
            verb, _, model = step.partition(" ")
            if verb in ("wait", "expire"):
                until = loop.time() + (3600 if verb == "wait" else -1)
                waiting.append(asyncio.create_task(queue.wait(model or "a", until)))
            elif verb == "wake":
                queue.wake(model)
            elif waiting:
                waiting.pop().cancel()
            await asyncio.sleep(0)
            assert len(queue) <= limit
        if is_closed:
            queue.close()
        else:
            queue.wake("a")
            queue.wake("b")
        for ended in await asyncio.gather(*waiting, return_exceptions=True):
            assert ended is None or isinstance(ended, HoldRefusedError | TimeoutError | asyncio.CancelledError)
        await until_empty(queue)

    asyncio.run(work())


async def until_empty(queue: HoldQueue) -> None:
    await until(lambda: len(queue) == 0)


PIECES = st.lists(st.sampled_from([b"data: x", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n", b"{", b""]), max_size=12)


@given(PIECES)
def test_a_stream_is_cut_only_between_events_and_nothing_is_lost(pieces: list[bytes]) -> None:
    sent, rest = b"", b""
    for piece in pieces:
        whole, rest = split_events(rest + piece)
        sent += whole
        assert not whole or whole.endswith((b"\n\n", b"\r\n\r\n"))
        assert b"\n\n" not in rest
    assert sent + rest == b"".join(pieces)
