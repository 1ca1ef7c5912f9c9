"""The scheduler by itself: no model, no tensor; a computed token is only a number that goes up."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.inference.engine.config import EngineConfig
from flagscale.inference.engine.pages import PagePool
from flagscale.inference.engine.request import Request, RequestTable, Sample
from flagscale.inference.engine.sampling import SamplingParams
from flagscale.inference.engine.scheduler import Chunk, Scheduler


class World:
    """A scheduler, its pool, and requests numbered in the order of arrival."""

    def __init__(self, num_pages: int = 100, **sizes: int) -> None:
        self.pool = PagePool(num_pages)
        self.scheduler = Scheduler(EngineConfig(**{"page_size": 4, **sizes}), self.pool)
        self.table = RequestTable()

    def add(self, prompt: range, max_tokens: int = 8, n: int = 1, prompt_logprobs: int | None = None) -> Sample:
        params = SamplingParams(n=n, max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        arrival = self.table.next_arrival()
        request = Request(str(arrival), tuple(prompt), params, arrival, seed=0, max_tokens=max_tokens)
        self.table.add(request)
        sample = request.add_sample()
        self.scheduler.add(sample)
        return sample

    def step(self) -> list[tuple[str, int, int, int]]:
        """Schedule, pretend to compute and sample; (request, sample, start, stop) of each chunk."""
        chunks = self.scheduler.schedule()
        ready = [chunk.sample for chunk in chunks if chunk.is_last]
        ready += [sample for sample, _, _ in self.scheduler.complete(chunks)]
        for sample in ready:
            sample.tokens.append(1000 + sample.index)
            if sample.num_output == sample.request.max_tokens:
                self.scheduler.finish(sample)
        return [self.tell(chunk) for chunk in chunks]

    def tell(self, chunk: Chunk) -> tuple[str, int, int, int]:
        return (chunk.sample.request.request_id, chunk.sample.index, chunk.start, chunk.stop)


def test_a_prompt_is_computed_then_one_token_a_step() -> None:
    world = World()
    world.add(range(10), max_tokens=3)
    assert [world.step() for _ in range(4)] == [[("0", 0, 0, 10)], [("0", 0, 10, 11)], [("0", 0, 11, 12)], []]
    assert world.pool.num_available == 100


def test_a_long_prompt_comes_in_chunks_beside_the_tokens_of_others() -> None:
    world = World(max_tokens_per_step=8, max_running=8)
    world.add(range(4), max_tokens=9)
    world.add(range(100, 118))
    assert world.step() == [("0", 0, 0, 4), ("1", 0, 0, 4)]
    assert world.step() == [("0", 0, 4, 5), ("1", 0, 4, 11)]
    assert world.step() == [("0", 0, 5, 6), ("1", 0, 11, 18)]
    assert world.step() == [("0", 0, 6, 7), ("1", 0, 18, 19)]


def test_no_more_run_than_may() -> None:
    world = World(max_running=2)
    for _ in range(3):
        world.add(range(3), max_tokens=2)
    assert [row[0] for row in world.step()] == ["0", "1"]
    assert [row[0] for row in world.step()] == ["0", "1"]
    assert [row[0] for row in world.step()] == ["2"]


def test_who_does_not_fit_is_waited_for_even_by_smaller_ones() -> None:
    world = World(num_pages=10)
    world.add(range(20), max_tokens=4)
    world.add(range(100, 124), max_tokens=4)
    world.add(range(200, 201), max_tokens=4)
    assert [row[0] for row in world.step()] == ["0"]
    for _ in range(3):
        assert [row[0] for row in world.step()] == ["0"]
    assert [row[0] for row in world.step()] == ["1", "2"]


def test_the_youngest_gives_way_and_keeps_its_place() -> None:
    world = World(num_pages=5, prefix_caching=False)
    old, young = world.add(range(6), max_tokens=12), world.add(range(100, 106), max_tokens=6)
    later = world.add(range(200, 201))
    while not world.scheduler.num_preemptions:
        world.step()
    assert world.scheduler.running == [old]
    assert world.scheduler.waiting == [young, later]
    assert (young.pages, young.num_computed) == ([], 0)
    assert len(young.tokens) > 6
    while world.scheduler.has_work:
        world.step()
    assert (young.num_output, old.num_output, later.num_output) == (6, 12, 8)


def test_the_same_prefix_is_shared_within_one_step() -> None:
    world = World()
    first, second = world.add(range(9)), world.add(range(10))
    assert world.step() == [("0", 0, 0, 9), ("1", 0, 8, 10)]
    assert first.pages[:2] == second.pages[:2]
    assert first.pages[2] != second.pages[2]


def test_who_would_compute_what_another_is_computing_lets_others_pass() -> None:
    world = World(max_tokens_per_step=8, max_running=8)
    world.add(range(16))
    world.add(range(17))
    world.add(range(100, 102))
    assert world.step() == [("0", 0, 0, 8)]
    assert world.step() == [("0", 0, 8, 16)]
    assert world.step() == [("0", 0, 16, 17), ("1", 0, 16, 17), ("2", 0, 0, 2)]


def test_a_prompt_that_is_all_there_still_sends_its_last_token() -> None:
    world = World()
    world.add(range(8))
    again = world.add(range(8))
    assert world.step() == [("0", 0, 0, 8), ("1", 0, 7, 8)]
    assert again.num_cached == 8
    assert world.step() == [("0", 0, 8, 9), ("1", 0, 8, 9)]
    assert len(set(again.pages)) == 3


def test_without_prefix_caching_nothing_is_shared() -> None:
    world = World(prefix_caching=False)
    first, second = world.add(range(9)), world.add(range(9))
    assert world.step() == [("0", 0, 0, 9), ("1", 0, 0, 9)]
    assert set(first.pages).isdisjoint(second.pages)
    assert len(world.scheduler.prefix) == 0


def test_a_prompt_whose_probabilities_are_asked_for_is_computed_whole_in_few_rows_a_step() -> None:
    world = World(max_prompt_logit_rows=6)
    world.add(range(9))
    world.step()
    world.add(range(9), prompt_logprobs=0)
    assert world.step() == [("0", 0, 9, 10), ("1", 0, 0, 6)]
    assert world.step() == [("0", 0, 10, 11), ("1", 0, 6, 9)]


def test_samples_part_after_the_prompt_with_a_copy_of_the_half_full_page() -> None:
    world = World()
    first = world.add(range(6), n=3)
    chunks = world.scheduler.schedule()
    forks = world.scheduler.complete(chunks)
    assert [(sample.index, sample.num_computed) for sample, _, _ in forks] == [(1, 6), (2, 6)]
    for sample, src, dst in forks:
        assert sample.pages == [first.pages[0], dst]
        assert src == first.pages[1]
        assert dst not in first.pages
    assert world.scheduler.complete(()) == []


def test_a_prompt_of_whole_pages_needs_no_copy() -> None:
    world = World()
    first = world.add(range(8), n=2)
    ((sample, src, dst),) = world.scheduler.complete(world.scheduler.schedule())
    assert src == dst
    assert sample.pages == first.pages


def test_samples_without_room_wait_as_any_other() -> None:
    world = World(max_running=2)
    first = world.add(range(6), n=4, max_tokens=2)
    world.step()
    assert [sample.index for sample in world.scheduler.running] == [0, 1]
    assert [sample.index for sample in world.scheduler.waiting] == [2, 3]
    while world.scheduler.has_work:
        world.step()
    assert [sample.num_output for sample in first.request.samples] == [2] * 4


def test_finishing_who_waits_or_is_gone_is_fine() -> None:
    world = World(max_running=1)
    first, second = world.add(range(4)), world.add(range(4))
    world.step()
    world.scheduler.finish(second)
    world.scheduler.finish(first)
    world.scheduler.finish(first)
    assert not world.scheduler.has_work
    assert world.pool.num_available == 100


def test_preempting_all_can_forget_what_was_computed() -> None:
    for forget, start in ((False, 8), (True, 0)):
        world = World()
        world.add(range(8), max_tokens=8)
        world.step()
        world.scheduler.preempt_all(forget)
        assert world.scheduler.running == []
        assert world.step() == [("0", 0, start, 9)]


@settings(deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 30), st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=12
    ),
    st.integers(13, 40),
    st.integers(1, 5),
    st.integers(5, 30),
)
def test_everyone_is_served_in_a_bounded_number_of_steps(
    asked: list[tuple[int, int, int, int]], num_pages: int, max_running: int, budget: int
) -> None:
    world = World(num_pages, max_running=max_running, max_tokens_per_step=budget)
    samples = [world.add(range(first, first + size), max_tokens, n) for first, size, max_tokens, n in asked]
    for _ in range(3000):
        if not world.scheduler.has_work:
            break
        rows = world.step()
        assert rows, "there is work and nothing is done"
        assert sum(stop - start for _, _, start, stop in rows) <= budget
        owners = Counter(page for sample in world.scheduler.running for page in sample.pages)
        assert all(world.pool.owners[page] == owners[page] for page in range(num_pages + 1))
    assert all(each.num_output == sample.request.max_tokens for sample in samples for each in sample.request.samples)
    assert all(len(sample.request.samples) == n for sample, (_, _, _, n) in zip(samples, asked, strict=True))
    assert world.pool.num_available == num_pages
