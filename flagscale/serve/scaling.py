"""How many replicas a model should have, by the requests that it has: one decision at a time, no clock of its own.

Requests in flight and waiting, divided by what one replica is meant to have, are the replicas wanted. A wish for more
must last `upscale_delay_s` and one for fewer `downscale_delay_s`, so that a burst starts nothing that is ended at once;
what is carried out is the smallest change that was wanted during all of that time. A single look at the requests tells
little, so the last few are averaged.
"""

from collections import deque
from dataclasses import dataclass, field
from math import ceil
from statistics import fmean

from flagscale.runner.plan.scaling import Scaling

NUM_LOOKS = 6


@dataclass(slots=True)
class Scaler:
    """The memory of one model's wishes. Times are seconds of any clock that does not go back."""

    scaling: Scaling
    wanted: int
    since: float | None = None
    mildest: int = 0
    looks: deque[int] = field(default_factory=lambda: deque(maxlen=NUM_LOOKS))

    def decide(self, now: float, num_requests: int) -> int:
        """The number of replicas from now on."""
        scaling = self.scaling
        self.looks.append(num_requests)
        wish = min(max(ceil(fmean(self.looks) / scaling.target), scaling.lowest), scaling.highest)
        if wish == self.wanted:
            self.since = None
            return self.wanted
        is_more = wish > self.wanted
        if self.since is None or is_more != (self.mildest > self.wanted):
            self.since, self.mildest = now, wish
        self.mildest = min(self.mildest, wish) if is_more else max(self.mildest, wish)
        delay_s = scaling.upscale_delay_s if is_more else scaling.downscale_delay_s
        if now - self.since >= delay_s:
            self.wanted, self.since = self.mildest, None
        return self.wanted
