"""The last minutes of each replica, for the status page: a few numbers every few seconds, in memory only.

Who wants more has Prometheus; this is what one wants to see when the page is opened after something happened.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

from flagscale.serve.router.pool import Pool

EVERY_S = 5.0
_SAMPLES = 120


@dataclass(frozen=True, slots=True)
class Sample:
    """One replica at one moment; `requests` is since the sample before."""

    is_ready: bool
    in_flight: int
    requests: int
    first_byte_s: float | None


class History:
    """Samples of each replica that is in the pool, oldest first."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._samples: dict[str, deque[Sample]] = {}
        self._requests: dict[str, int] = {}

    def samples(self, replica_id: str) -> tuple[Sample, ...]:
        return tuple(self._samples.get(replica_id, ()))

    def sample(self) -> None:
        """Look once; forget who is gone."""
        before, self._requests = self._requests, {}
        kept, self._samples = self._samples, {}
        for it in self._pool.states():
            self._requests[it.id] = it.requests
            samples = self._samples[it.id] = kept.get(it.id, deque(maxlen=_SAMPLES))
            requests = it.requests - before.get(it.id, 0)
            samples.append(Sample(it.is_ready, it.in_flight, requests, it.first_byte_s if requests else None))

    async def keep(self) -> None:
        """Look every few seconds, for ever."""
        while True:
            self.sample()
            await asyncio.sleep(EVERY_S)
