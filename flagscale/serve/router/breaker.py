"""Whether one replica gets requests: a circuit breaker whose half-open state is a real probe, never a user's request.

    closed     requests flow; a failure counts, an answer clears the count
    open       none flow; after a while, which doubles with each failed probe, it is time to probe
    half_open  the probe is on its way; its result closes or opens

A replica begins open and due at once: nobody is sent to one that has not answered. Pure: the clock is an argument.
"""

from dataclasses import dataclass, field
from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]


@dataclass(slots=True)
class Breaker:
    """The state of one replica; `now` is any clock that does not go back, in seconds."""

    max_failures: int
    open_s: float
    open_max_s: float
    state: BreakerState = field(default="open", init=False)
    failures: int = field(default=0, init=False)
    """failures in a row while closed"""
    due: float = field(default=0.0, init=False)
    """while open: when to probe"""
    _wait_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._wait_s = self.open_s

    def succeed(self) -> None:
        """A replica answered. One that is open stays so: only a probe closes it."""
        if self.state == "closed":
            self.failures = 0

    def fail(self, now: float) -> None:
        """A replica failed a request; echoes that come after it was opened change nothing."""
        if self.state != "closed":
            return
        self.failures += 1
        if self.failures >= self.max_failures:
            self._open(now)

    def begin_probe(self, now: float) -> bool:
        """Whether a probe may go now. An open breaker that is due is half-open from then on."""
        if self.state == "open" and now >= self.due:
            self.state = "half_open"
        return self.state != "open"

    def end_probe(self, is_ok: bool, now: float) -> None:
        """What the probe found; it decides in every state but open."""
        if self.state == "open":
            return
        if is_ok:
            self.state, self.failures, self._wait_s = "closed", 0, self.open_s
        else:
            self._open(now)

    def _open(self, now: float) -> None:
        self.state, self.failures, self.due = "open", 0, now + self._wait_s
        self._wait_s = min(2 * self._wait_s, self.open_max_s)
