"""What an engine has done and is doing, as numbers: counters that only grow, and what holds at this moment."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flagscale.inference.engine.pages import PagePool
from flagscale.inference.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """One look at an engine.

    num_computed_tokens: that went through the model, prompts and computing again included
    busy_s: time within steps
    """

    num_waiting: int
    num_running: int
    num_pages: int
    num_pages_used: int
    num_pages_idle: int
    num_requests: int
    num_steps: int
    num_preemptions: int
    num_computed_tokens: int
    num_output_tokens: int
    num_prefix_hit_pages: int
    num_prefix_asked_pages: int
    busy_s: float

    @property
    def output_tokens_per_s(self) -> float:
        return self.num_output_tokens / self.busy_s if self.busy_s else 0.0

    @property
    def prefix_hit_share(self) -> float:
        """Of the pages that were looked for in the prefix cache, how many were there, from 0 to 1."""
        return self.num_prefix_hit_pages / self.num_prefix_asked_pages if self.num_prefix_asked_pages else 0.0


@dataclass(slots=True)
class Meter:
    """Counts for one engine."""

    num_requests: int = 0
    num_steps: int = 0
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    busy_s: float = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.num_steps += 1
            self.busy_s += time.perf_counter() - start

    def read(self, scheduler: Scheduler, pool: PagePool) -> EngineMetrics:
        return EngineMetrics(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_pages=pool.num_pages,
            num_pages_used=pool.num_pages - pool.num_available,
            num_pages_idle=pool.num_idle,
            num_requests=self.num_requests,
            num_steps=self.num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_computed_tokens=self.num_computed_tokens,
            num_output_tokens=self.num_output_tokens,
            num_prefix_hit_pages=scheduler.prefix.num_hit_pages,
            num_prefix_asked_pages=scheduler.prefix.num_asked_pages,
            busy_s=self.busy_s,
        )
