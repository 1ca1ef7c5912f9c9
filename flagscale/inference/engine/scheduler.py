"""What is computed in the next step, and who gets the pages for it.

The scheduler owns no memory and no tensor: it composes the pages, the prefix cache and two ordered lists, *running* and
*waiting*, into one step at a time. Its rules:

- Each running sample that only lacks its last token gets it in every step; what is left of the step's token budget goes
  to unfinished prompts, in chunks, in the order of arrival.
- Admission is in the order of arrival and takes all pages of a prompt at once; who does not fit is waited for, so none
  starves. One exception: a sample whose prefix another one is computing right now lets others pass until it is there.
- When a running sample needs a page and none is available, the youngest running one loses its pages and waits again in
  its old place. The oldest can therefore always go on, and every request fits alone, so every request ends.
- A page is published to the prefix cache when its last token is *scheduled*: a layer writes all keys and values of a
  step before it reads any, so samples admitted in the same step may already share it.
"""

from bisect import insort
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from flagscale.inference.engine.config import EngineConfig
from flagscale.inference.engine.pages import PagePool
from flagscale.inference.engine.prefix import PrefixCache
from flagscale.inference.engine.request import Request, Sample


@dataclass(frozen=True, slots=True)
class Chunk:
    """`sample.tokens[start:stop]`, to be computed in one step."""

    sample: Sample
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def is_last(self) -> bool:
        """Nothing is missing after it: a token can be sampled."""
        return self.stop == len(self.sample.tokens)


class Scheduler:
    """Decides, step by step; `schedule`, compute, `complete`, sample, and again."""

    def __init__(self, config: EngineConfig, pool: PagePool) -> None:
        self._config = config
        self._pool = pool
        self.prefix = PrefixCache(pool)
        self.running: list[Sample] = []
        self.waiting: list[Sample] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.page_size)

    def add(self, sample: Sample) -> None:
        insort(self.waiting, sample, key=_priority)

    def schedule(self) -> tuple[Chunk, ...]:
        """The chunks of the next step, those of a single token first; empty only where nothing has work."""
        budget = self._config.max_tokens_per_step
        chunks = []
        for sample in tuple(self.running):
            if sample.num_missing == 1 and sample.pages and self._grow(sample):
                chunks.append(self._chunk(sample, 1))
        budget -= len(chunks)
        logit_rows = self._config.max_prompt_logit_rows
        for sample in self.running:
            if sample.num_missing > 1 and (count := self._chunk_size(sample, budget, logit_rows)):
                chunks.append(self._chunk(sample, count))
                budget -= count
                logit_rows -= count if sample.request.must_see_prompt else 0
        chunks.extend(self._admit(budget, logit_rows))
        return tuple(chunks)

    def complete(self, chunks: Iterable[Chunk]) -> list[tuple[Sample, int, int]]:
        """The chunks are computed: samples of the same prompt may share it now.

        Returns (new sample, source page, destination page) for each copy of a prompt's last, half-full page; the pages
        hold nothing in common where the source is the destination.
        """
        forks = []
        for chunk in chunks:
            chunk.sample.num_computed = chunk.stop
            request = chunk.sample.request
            if chunk.is_last and not request.is_forked:
                request.is_forked = True
                forks.extend(self._fork(chunk.sample))
        return forks

    def finish(self, sample: Sample) -> None:
        """The sample needs nothing any more, wherever it is."""
        if sample in self.running:
            self.running.remove(sample)
        elif sample in self.waiting:
            self.waiting.remove(sample)
        self._release(sample)

    def preempt(self, requests: Collection[Request]) -> None:
        """What was computed of these requests is wrong now: they wait again, and look for other pages."""
        for sample in reversed(tuple(self.running)):
            if sample.request in requests:
                self._preempt(sample)

    def preempt_all(self, forget: bool) -> None:
        """All running samples wait again; with `forget` nothing that was computed is used again."""
        for sample in reversed(self.running):
            self._release(sample)
            self.add(sample)
        self.running.clear()
        if forget:
            self.prefix.clear()

    def _chunk(self, sample: Sample, count: int) -> Chunk:
        chunk = Chunk(sample, sample.num_computed, sample.num_computed + count)
        if self._config.prefix_caching:
            size = self._config.page_size
            sample.update_keys(size)
            for i in range(chunk.start // size, chunk.stop // size):
                self.prefix.publish(sample.keys[i], sample.pages[i])
        return chunk

    def _chunk_size(self, sample: Sample, budget: int, logit_rows: int) -> int:
        return min(sample.num_missing, budget, logit_rows if sample.request.must_see_prompt else budget)

    def _grow(self, sample: Sample) -> bool:
        """Make room for one more token; False where the sample itself had to give way."""
        if len(sample.pages) * self._config.page_size > sample.num_computed:
            return True
        while not self._pool.num_available:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sample:
                return False
        self._pool.extend(sample.pages)
        return True

    def _preempt(self, sample: Sample) -> None:
        self.running.remove(sample)
        self._release(sample)
        self.add(sample)
        self.num_preemptions += 1

    def _release(self, sample: Sample) -> None:
        self._pool.release(reversed(sample.pages))
        sample.pages.clear()
        sample.num_computed = 0

    def _admit(self, budget: int, logit_rows: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        promised = self._promised()
        at = 0
        while at < len(self.waiting) and budget > 0 and len(self.running) < self._config.max_running:
            sample = self.waiting[at]
            if sample.request.must_see_prompt and logit_rows <= 0:
                break
            if self._is_promised(sample, promised):
                at += 1
                continue
            if not self._reserve(sample):
                break
            del self.waiting[at]
            insort(self.running, sample, key=_priority)
            count = self._chunk_size(sample, budget, logit_rows)
            chunks.append(self._chunk(sample, count))
            budget -= count
            logit_rows -= count if sample.request.must_see_prompt else 0
            promised.update(sample.keys[chunks[-1].stop // self._config.page_size :])
        return chunks

    def _promised(self) -> set[bytes]:
        """Prefixes that running samples are going to compute."""
        size = self._config.page_size
        return {key for sample in self.running for key in sample.keys[sample.num_computed // size :]}

    def _is_promised(self, sample: Sample, promised: set[bytes]) -> bool:
        """Whether the next page that the sample would compute is being computed by another one."""
        if not self._config.prefix_caching:
            return False
        sample.update_keys(self._config.page_size)
        if not promised or sample.request.must_see_prompt:
            return False
        first = next((key for key in sample.keys if key not in self.prefix), None)
        return first in promised

    def _reserve(self, sample: Sample) -> bool:
        """Give the sample its pages, shared ones first; False where there are too few."""
        use_cache = self._config.prefix_caching and not sample.request.must_see_prompt
        found = self.prefix.find(sample.keys) if use_cache else []
        needed = self.num_pages_for(len(sample.tokens)) - len(found)
        # Each running sample may ask for a page soon: to admit into the last ones would preempt at once.
        if needed + len(self.running) > self._pool.num_available and (
            self.running or needed > self._pool.num_available
        ):
            self._pool.release(reversed(found))
            return False
        if use_cache:
            self.prefix.num_hit_pages += len(found)
            self.prefix.num_asked_pages += len(sample.keys)
        room = self.num_pages_for(sample.request.num_prompt + sample.request.max_tokens) - len(found)
        sample.pages = found + self._pool.take(needed, room)
        sample.num_cached = len(found) * self._config.page_size
        # Where everything is there already, the last token still goes through: there is nothing else to sample from.
        sample.num_computed = min(sample.num_cached, len(sample.tokens) - 1)
        return True

    def _fork(self, first: Sample) -> list[tuple[Sample, int, int]]:
        """The other samples of a request: they run at once where there is room, else they wait as any other."""
        forks = []
        request: Request = first.request
        num_full, rest = divmod(first.num_computed, self._config.page_size)
        for _ in range(request.params.n - 1):
            sample = request.add_sample()
            if len(self.running) >= self._config.max_running or self._pool.num_available < len(self.running) + 1:
                self.add(sample)
                continue
            for page in first.pages[:num_full]:
                self._pool.retain(page)
            room = self.num_pages_for(request.num_prompt + request.max_tokens) - num_full
            copied = self._pool.take(1, room) if rest else []
            sample.pages = first.pages[:num_full] + copied
            sample.keys = first.keys[:num_full]
            sample.num_computed = sample.num_cached = first.num_computed
            insort(self.running, sample, key=_priority)
            forks.append((sample, first.pages[num_full], copied[0]) if rest else (sample, 0, 0))
        return forks


def _priority(sample: Sample) -> tuple[int, int]:
    return sample.priority
