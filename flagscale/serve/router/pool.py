"""The replicas behind one router: which are ready, who takes the next request, and how one leaves without a loss.

A request holds a `Lease` on a replica from before its connection until its last byte. So what is in flight is known
exactly, a drain waits for just these, and a replica that goes away can cut them, each with its own error.

A failed connection is no verdict: it calls for a probe at once, and the probe decides (see `breaker`). A probe that
finds no answer in time does not count while the replica answers others: it is busy, not dead.

Everything runs on one event loop and nothing here waits while it changes something, so there are no locks.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flagscale.errors import FlagScaleError, UserError, find_nearest
from flagscale.serve.router.breaker import Breaker
from flagscale.serve.router.handover import probe_replica
from flagscale.serve.router.hold import HoldQueue
from flagscale.serve.router.policies import PAIR_POLICIES, Load, Policy, choose_pair, make_policy
from flagscale.serve.router.probe import ProbeResult
from flagscale.serve.router.replica import Phase, Replica, ReplicaState
from flagscale.serve.router.request import Request
from flagscale.serve.router.settings import Role, RouterSettings

__all__ = ["Lease", "Pool", "Replica", "ReplicaState", "UnknownModelError"]

log = logging.getLogger(__name__)

_SMOOTHING = 0.2
_CUT_GRACE_S = 2.0

Tried = frozenset[tuple[str, int]]
Prober = Callable[[Replica, RouterSettings], Coroutine[Any, Any, ProbeResult]]


class UnknownModelError(FlagScaleError):
    """No replica has this model."""


@dataclass(slots=True, eq=False)
class _Member:
    replica: Replica
    breaker: Breaker
    leases: "set[Lease]" = field(default_factory=set)
    tokens: int = 0
    """of its leases"""
    is_draining: bool = False
    was_ready: bool = False
    epoch: int = 0
    """how many probes have passed: a request that failed here in an earlier epoch may be tried here again"""
    reason: str = ""
    requests: int = 0
    failures: int = 0
    first_byte_s: float | None = None
    failing_since: float | None = None
    """when the first of the probes was that have failed in a row, on the loop's clock"""
    alive_at: float = 0.0
    """when it last sent a byte that was no error, on the loop's clock"""
    is_suspect: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """a lease ended"""
    watch: asyncio.Task[None] | None = None

    @property
    def phase(self) -> Phase:
        if self.is_draining:
            return "draining"
        if self.breaker.state == "closed":
            return "ready"
        return "failing" if self.was_ready else "starting"

    def state(self) -> ReplicaState:
        it = self.replica
        return ReplicaState(
            id=it.id,
            url=it.url,
            model=it.model,
            version=it.version,
            weight=it.weight,
            phase=self.phase,
            breaker=self.breaker.state,
            reason=self.reason,
            in_flight=len(self.leases),
            requests=self.requests,
            failures=self.failures,
            first_byte_s=self.first_byte_s,
            role=it.role,
            kv_address=it.kv_address,
            is_registered=it.is_registered,
        )

    def load(self) -> Load:
        return Load(self.replica.id, len(self.leases), self.replica.weight, self.tokens)

    def lend(self, tokens: int = 0) -> "Lease":
        lease = Lease(self.replica, self.epoch, self, tokens)
        self.leases.add(lease)
        self.tokens += tokens
        self.requests += 1
        return lease


@dataclass(slots=True, eq=False)
class Lease:
    """One request's hold on one replica. Whoever has it tells how it went, and then releases it."""

    replica: Replica
    epoch: int
    _member: _Member
    tokens: int = 0
    on_cut: Callable[[], None] | None = None
    """called when the request has to end now, because its replica leaves"""
    is_cut: bool = False
    has_answered: bool = False

    def answered(self, first_byte_s: float) -> None:
        """The first byte of an answer that is no server error came after this many seconds."""
        self.has_answered = True
        member = self._member
        member.breaker.succeed()
        if member.breaker.state == "closed":
            member.reason = ""
        old = member.first_byte_s
        member.first_byte_s = first_byte_s if old is None else old + _SMOOTHING * (first_byte_s - old)

    def alive(self, now: float) -> None:
        """Bytes of an answer came; `now` is the loop's clock."""
        self._member.alive_at = now

    def failed(self, reason: str) -> None:
        """The replica, and not the caller, is to blame; it is probed at once."""
        member = self._member
        member.failures += 1
        member.reason = reason
        member.breaker.fail(asyncio.get_running_loop().time())
        member.is_suspect.set()

    def computed(self) -> None:
        """Its tokens are no load any more; what was computed of them may still be fetched."""
        self._member.tokens -= self.tokens
        self.tokens = 0

    def cut(self) -> None:
        self.is_cut = True
        if self.on_cut is not None:
            self.on_cut()

    def release(self) -> None:
        if self in self._member.leases:
            self._member.leases.remove(self)
            self._member.tokens -= self.tokens
        self._member.changed.set()


class Pool:
    """All replicas of a router. Replicas may be added before its loop runs; probing begins with `start`."""

    def __init__(self, settings: RouterSettings | None = None, prober: Prober = probe_replica) -> None:
        self.settings = settings or RouterSettings()
        self._prober = prober
        self._members: dict[str, _Member] = {}
        self._policies: dict[str, Policy] = {}
        self._pair_policy = PAIR_POLICIES[self.settings.pair_policy]()
        self._expected: tuple[str, ...] = ()
        self._hold = HoldQueue(self.settings.hold_requests)
        self._is_started = False

    def add(self, replica: Replica) -> None:
        """Let a replica in; it gets requests once a probe has passed. Raises UserError where its id is taken."""
        if replica.id in self._members:
            raise UserError(f"replica {replica.id} is there already; remove it first, or give the new one another id")
        roles = {member.replica.role for member in self._members.values() if member.replica.model == replica.model}
        if roles and ("whole" in roles) != (replica.role == "whole"):
            expected = "whole" if "whole" in roles else "prefill or decode"
            raise UserError(f"replica {replica.id}: a {replica.role} one of {replica.model}; the others are {expected}")
        breaker = Breaker(
            self.settings.breaker_failures, self.settings.breaker_open_s, self.settings.breaker_open_max_s
        )
        self._members[replica.id] = member = _Member(replica, breaker)
        if self._is_started:
            member.watch = asyncio.create_task(self._watch(member))

    def expect(self, models: Iterable[str]) -> None:
        """These models are served even while they have no replica: requests for them wait instead of being unknown.

        Each call replaces what was expected before.
        """
        before, self._expected = self._expected, tuple(models)
        for model in before:
            self._forget_unless_known(model)

    async def drain(self, replica_id: str, timeout_s: float) -> int:
        """Give a replica no new requests and wait until it has none; cut those left after `timeout_s`, tell how many.

        A cut request whose first byte is not out goes on at another replica. Raises UserError for an unknown id.
        """
        member = self._get(replica_id)
        member.is_draining = True
        await _wait_until_idle(member, timeout_s)
        left = tuple(member.leases)
        for lease in left:
            lease.cut()
        await _wait_until_idle(member, _CUT_GRACE_S)
        return len(left)

    def remove(self, replica_id: str) -> None:
        """Forget a replica; requests that it still has are cut. Raises UserError for an unknown id."""
        member = self._get(replica_id)
        del self._members[replica_id]
        if member.watch is not None:
            member.watch.cancel()
        for lease in tuple(member.leases):
            lease.cut()
        self._forget_unless_known(member.replica.model)

    def states(self) -> tuple[ReplicaState, ...]:
        """All replicas in the order in which they were added."""
        return tuple(member.state() for member in self._members.values())

    def find_replicas(self, model: str) -> list[Replica]:
        return [member.replica for member in self._members.values() if member.replica.model == model]

    def find_replica(self, replica_id: str) -> Replica | None:
        member = self._members.get(replica_id)
        return member.replica if member else None

    def models(self) -> tuple[str, ...]:
        """Every model that is expected or has a replica, ready or not, once."""
        had = (member.replica.model for member in self._members.values())
        return tuple(dict.fromkeys((*self._expected, *had)))

    def held(self, model: str | None = None) -> int:
        """How many requests wait for a ready replica: of `model`, or in all."""
        return len(self._hold) if model is None else self._hold.count(model)

    def in_flight(self) -> int:
        """How many requests are at replicas."""
        return sum(len(member.leases) for member in self._members.values())

    def start(self) -> None:
        """Begin to probe, on the running loop."""
        self._is_started = True
        for member in self._members.values():
            if member.watch is None:
                member.watch = asyncio.create_task(self._watch(member))

    async def close(self) -> None:
        """End all probing."""
        self._is_started = False
        watches = [member.watch for member in self._members.values() if member.watch is not None]
        for member in self._members.values():
            member.watch = None
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)

    def cut_all(self) -> int:
        """End every request that is at a replica or waits for one, each with an error; tell how many. Nothing may wait
        from then on."""
        count = self.held() + self.in_flight()
        self._hold.close()
        for member in self._members.values():
            for lease in tuple(member.leases):
                lease.cut()
        return count

    def find_lease(self, model: str, key: str | None, tried: Tried = frozenset()) -> Lease | None:
        """A lease on a ready replica of `model`, by the policy; None where there is none but in `tried`.

        `tried` has (id, epoch) of what has failed this request: such a replica counts again once a probe has passed
        since. Raises UnknownModelError.
        """
        ready = [member.load() for member in self._find_ready(model, tried)]
        if not ready:
            return None
        policy = self._policies.get(model) or self._policies.setdefault(model, make_policy(self.settings))
        return self._members[policy.choose(ready, key)].lend()

    def find_route(self, wanted: Request, tried: Tried = frozenset()) -> tuple[Lease, ...]:
        """The leases that a request needs: one, or where its model is served by pairs that of a prefill and that of a
        decode replica. None where they cannot all be had. Raises as `find_lease`."""
        if not self.is_paired(wanted.model):
            lease = self.find_lease(wanted.model, wanted.key, tried)
            return () if lease is None else (lease,)
        sides: dict[Role, dict[Hashable, list[Load]]] = {"prefill": {}, "decode": {}}
        for member in self._find_ready(wanted.model, tried):
            group = (member.replica.version, member.replica.handover)
            sides[member.replica.role].setdefault(group, []).append(member.load())
        pair = choose_pair(self._pair_policy, sides["prefill"], sides["decode"])
        if pair is None:
            return ()
        size = wanted.size
        prefill, decode = (self._members[name] for name in pair)
        return prefill.lend(size.prompt), decode.lend(size.prompt + size.output)

    def is_paired(self, model: str) -> bool:
        """Whether the replicas of a model work in pairs."""
        roles = (member.replica.role for member in self._members.values() if member.replica.model == model)
        return next((role != "whole" for role in roles), False)

    def _find_ready(self, model: str, tried: Tried) -> list[_Member]:
        mine = [member for member in self._members.values() if member.replica.model == model]
        if not mine and model not in self._expected:
            raise UnknownModelError(self._tell_models(model))
        return [it for it in mine if it.phase == "ready" and (it.replica.id, it.epoch) not in tried]

    async def acquire(self, wanted: Request, tried: Tried, until: float) -> tuple[Lease, ...]:
        """As `find_route`, but wait for ready replicas until the loop's clock says `until`.

        Raises UnknownModelError, HoldRefusedError, and TimeoutError when the time is over.
        """
        while not (route := self.find_route(wanted, tried)):
            await self._hold.wait(wanted.model, until)
        return route

    async def _watch(self, member: _Member) -> None:
        """Probe one replica whenever that is due, for as long as it is in the pool."""
        loop = asyncio.get_running_loop()
        while True:
            begun = loop.time()
            if member.breaker.begin_probe(begun):
                result = await self._prober(member.replica, self.settings)
                self._note(member, result, is_busy=member.alive_at > begun)
            await self._wait_for_cause(member)

    async def _wait_for_cause(self, member: _Member) -> None:
        """Until a probe is due: a failure in traffic, the end of the breaker's pause, or silence for an interval."""
        loop = asyncio.get_running_loop()
        while True:
            is_open = member.breaker.state == "open"
            seen = member.alive_at
            until = member.breaker.due if is_open else loop.time() + self.settings.probe_interval_s
            try:
                async with asyncio.timeout_at(until):
                    await member.is_suspect.wait()
            except TimeoutError:
                if is_open or member.alive_at == seen:
                    return
                continue
            member.is_suspect.clear()
            if not is_open and member.breaker.state != "open":
                return

    def _note(self, member: _Member, result: ProbeResult, is_busy: bool) -> None:
        before = member.phase
        if result.has_timed_out and is_busy and before == "ready":
            return
        now = asyncio.get_running_loop().time()
        member.breaker.end_probe(result.is_ok, now)
        member.reason = result.reason
        member.failing_since = None if result.is_ok else (member.failing_since or now)
        if result.is_ok:
            member.was_ready = True
            member.epoch += 1
            self._hold.wake(member.replica.model)
        if member.phase != before:
            log.info("replica %s is %s%s", member.replica.id, member.phase, f": {member.reason}" * bool(member.reason))
        if not result.is_reached and self._find_ready(member.replica.model, frozenset()):
            self._move(member)
        limit_s = self.settings.registered_timeout_s
        if member.replica.is_registered and member.failing_since is not None and now - member.failing_since >= limit_s:
            log.warning("replica %s is removed: it failed every probe for %g s", member.replica.id, limit_s)
            self.remove(member.replica.id)

    def _move(self, member: _Member) -> None:
        """Send requests elsewhere that wait for a first byte here: of a host that is lost, not even an error comes."""
        for lease in [each for each in member.leases if not each.has_answered]:
            lease.cut()

    def _get(self, replica_id: str) -> _Member:
        if member := self._members.get(replica_id):
            return member
        nearest = find_nearest(replica_id, self._members)
        raise UserError(f"no replica {replica_id}" + (f"; did you mean `{nearest}`?" if nearest else ""))

    def _forget_unless_known(self, model: str) -> None:
        if model not in self.models():
            self._policies.pop(model, None)
            self._hold.wake(model)

    def _tell_models(self, model: str) -> str:
        known = self.models()
        nearest = find_nearest(model[:100], known)
        return f"the model `{model[:100]}` is not served here; " + (
            f"did you mean `{nearest}`?" if nearest else f"there are: {', '.join(known) or 'none'}"
        )


async def _wait_until_idle(member: _Member, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while member.leases:
                member.changed.clear()
                await member.changed.wait()
    except TimeoutError:
        return
