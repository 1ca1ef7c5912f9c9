"""Which of the ready replicas takes a request: pure but for a policy's own counters.

Consistent hashing is by the highest score (rendezvous): each replica scores each key, the highest has it. That needs no
ring to be kept: when a replica leaves, only its keys move, and when one joins, only to it. It costs one short hash a
replica and request, which is nothing for the tens of replicas that a router has. With a load bound the key goes to the
highest score that still has room (Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2018).
"""

import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from flagscale.serve.router.settings import PairPolicyName, RouterSettings


@dataclass(frozen=True, slots=True)
class Load:
    """A ready replica as a policy sees it: `weight` is its capacity relative to others', `tokens` is of what is in
    flight, where that is counted."""

    id: str
    in_flight: int
    weight: float = 1.0
    tokens: int = 0


class Policy(Protocol):
    """Chooses one of `ready` (never empty) for a request that has `key`, the beginning of its prompt or its session."""

    def choose(self, ready: Sequence[Load], key: str | None) -> str: ...


class RoundRobin:
    """Each replica in turn, in proportion to its weight and as evenly spread as can be (nginx's smooth round robin)."""

    def __init__(self) -> None:
        self._credit: dict[str, float] = {}

    def choose(self, ready: Sequence[Load], key: str | None) -> str:  # noqa: ARG002
        credit = {load.id: self._credit.get(load.id, 0.0) + load.weight for load in ready}
        chosen = max(credit, key=credit.__getitem__)
        credit[chosen] -= sum(load.weight for load in ready)
        self._credit = credit
        return chosen


class LeastLoad:
    """The replica with the fewest requests in flight for its weight; among equals, any."""

    def choose(self, ready: Sequence[Load], key: str | None) -> str:  # noqa: ARG002
        least = min(map(_pressure, ready))
        return random.choice([load.id for load in ready if _pressure(load) == least])


class FewestTokens:
    """The replica with the fewest tokens in flight for its weight; among equals, the fewest requests."""

    def choose(self, ready: Sequence[Load], key: str | None) -> str:
        least = min(load.tokens / load.weight for load in ready)
        return LeastLoad().choose([load for load in ready if load.tokens / load.weight == least], key)


class Random:
    """Any replica, in proportion to its weight."""

    def choose(self, ready: Sequence[Load], key: str | None) -> str:  # noqa: ARG002
        return random.choices([load.id for load in ready], [load.weight for load in ready])[0]


class PowerOfTwo:
    """The less loaded of two drawn at random: nearly as even as `LeastLoad`, and several routers make no herd."""

    def choose(self, ready: Sequence[Load], key: str | None) -> str:  # noqa: ARG002
        if len(ready) == 1:
            return ready[0].id
        return min(random.sample(ready, 2), key=_pressure).id


class ByKey:
    """The replica that scores highest for the key and, with a `bound`, has room; without a key the least loaded."""

    def __init__(self, bound: float | None) -> None:
        self._bound = bound
        self._without_key = LeastLoad()

    def choose(self, ready: Sequence[Load], key: str | None) -> str:
        if key is None:
            return self._without_key.choose(ready, None)
        digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if self._bound is None:
            return max(ready, key=lambda load: score(digest, load)).id
        # The rooms add up to more than all requests with this one, so at least one replica has some.
        wanted = self._bound * (sum(load.in_flight for load in ready) + 1) / sum(load.weight for load in ready)
        with_room = [load for load in ready if load.in_flight < math.ceil(wanted * load.weight)]
        return max(with_room, key=lambda load: score(digest, load)).id


def score(digest: bytes, load: Load) -> float:
    """A number that depends on key and replica alone; a replica of twice the weight is highest for twice the keys."""
    drawn = int.from_bytes(blake2b(load.id.encode(), key=digest, digest_size=8).digest()) >> 12
    return -load.weight / math.log((drawn + 0.5) / 2**52)


def make_policy(settings: RouterSettings) -> Policy:
    """A policy with fresh counters: each model has its own."""
    match settings.policy:
        case "round_robin":
            return RoundRobin()
        case "least_load":
            return LeastLoad()
        case "power_of_two":
            return PowerOfTwo()
        case "prefix_aware":
            return ByKey(settings.load_bound)
        case "session":
            return ByKey(None)


PAIR_POLICIES: Mapping[PairPolicyName, type[Policy]] = {"slo": FewestTokens, "robin": LeastLoad, "random": Random}


def choose_pair(
    policy: Policy, prefills: Mapping[Hashable, Sequence[Load]], decodes: Mapping[Hashable, Sequence[Load]]
) -> tuple[str, str] | None:
    """A prefill and a decode replica that understand each other: of the same group. None where no group has both."""
    ready = [load for group, loads in prefills.items() if group in decodes for load in loads]
    if not ready:
        return None
    prefill = policy.choose(ready, None)
    group = next(group for group, loads in prefills.items() if any(load.id == prefill for load in loads))
    return prefill, policy.choose(decodes[group], None)


def _pressure(load: Load) -> float:
    return (load.in_flight + 1) / load.weight
