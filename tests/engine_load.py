"""Random load for an engine: all that may happen to it, in an order that a seed decides, and all books checked."""

import random
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine_adapters import make_tensors
from engine_models import VOCAB, make_model

from flagscale.errors import UserError
from flagscale.inference.engine import Delta, Engine, EngineConfig, OutputSum, SamplingParams

PAGE = 4
ADAPTERS = ("a", "b", "c")
LORA = {"r": 2, "lora_alpha": 2}


class Letters:
    """A tokenizer whose tokens are letters."""

    eos_token_id = None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        del skip_special_tokens
        return "".join(chr(token + 0x100) for token in token_ids)


def check_books(engine: Engine) -> None:
    """Each page has the owners that its samples say, and nobody owns a page while waiting."""
    pool, scheduler = engine._pool, engine._scheduler
    owners = Counter(page for sample in scheduler.running for page in sample.pages)
    assert all(pool.owners[page] == owners[page] for page in range(pool.num_pages + 1))
    assert all(not sample.pages for sample in scheduler.waiting)
    assert pool.num_available == pool.num_pages - len(owners)
    assert len(scheduler.running) <= engine.config.max_running
    assert scheduler.running == sorted(scheduler.running, key=lambda sample: sample.priority)


def resident_bytes() -> int:
    """What this process holds in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def load_adapter(engine: Engine, name: str, seed: int) -> None:
    """One of the adapters `name`, whose versions are its seeds."""
    shape = tuple(engine.model.get_submodule("model.layers.0.self_attn.o_proj").weight.shape)
    tensors = make_tensors(10 * ADAPTERS.index(name) + seed, 1.0, "o_proj", shape)
    engine.load_adapter(name, tensors, LORA, version=seed)


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    params: SamplingParams
    adapter: str | None
    total: OutputSum

    @property
    def is_steady(self) -> bool:
        """One version of everything made the whole answer."""
        return all(
            each.finish_reason != "abort" and len(each.versions) == 1 and len(each.adapter_versions) < 2
            for each in self.total.total().completions
        )


@dataclass
class Load:
    """One engine under random load.

    open: the requests that have not ended, by id
    ended: some of those that have
    counts: how often each kind of event came
    """

    family: str
    seed: int
    num_pages: int = 40
    engine: Engine = field(init=False)
    open: dict[str, Asked] = field(default_factory=dict)
    ended: deque[Asked] = field(default_factory=lambda: deque(maxlen=100))
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.weights = [make_model(self.family, seed).state_dict() for seed in (0, 1)]
        self.engine = make_engine(self.family, self.num_pages)
        for name in ADAPTERS:
            load_adapter(self.engine, name, 0)

    def run(self, num_requests: int) -> None:
        """Let so many further requests come, and wait until all have ended."""
        last = self.counts["request"] + num_requests
        while self.counts["request"] < last or self.engine.has_work:
            if self.counts["request"] < last:
                self._arrive()
            self._disturb()
            self._tell(self.engine.step())
            check_books(self.engine)

    def _tell(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            asked = self.open[delta.request_id]
            asked.total.add(delta)
            if asked.total.is_complete:
                self.ended.append(self.open.pop(delta.request_id))
                self.counts["end"] += 1

    def _arrive(self) -> None:
        rng = self.random
        for _ in range(rng.choice((0, 0, 1, 1, 3))):
            shared = list(range(rng.choice((0, 0, 9, 16))))
            prompt = [*shared, *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 24)))]
            adapter = rng.choice((None, None, *ADAPTERS))
            if adapter is not None and all(each.name != adapter for each in self.engine.adapters()):
                adapter = None
            params = self._draw_params()
            request = self.engine.add_request(prompt, params, adapter=adapter)
            total = OutputSum(request.request_id, prompt, params.n)
            self.open[request.request_id] = Asked(prompt, params, adapter, total)
            self.counts["request"] += 1

    def _draw_params(self) -> SamplingParams:
        rng = self.random
        return SamplingParams(
            max_tokens=rng.randint(1, 16),
            n=rng.choice((1, 1, 1, 1, 2, 4)),
            temperature=rng.choice((0.0, 0.0, 0.7, 1.0)),
            top_k=rng.choice((0, 5)),
            top_p=rng.choice((1.0, 0.9)),
            min_p=rng.choice((0.0, 0.05)),
            frequency_penalty=rng.choice((0.0, 0.3)),
            stop=rng.choice(((), (), (chr(0x100 + rng.randrange(VOCAB)),), (chr(0x110) + chr(0x120), "x"))),
            stop_token_ids=rng.choice(((), (rng.randrange(VOCAB),))),
            min_tokens=rng.choice((0, 0, 1)),
            logprobs=rng.choice((None, 0, 3)),
            prompt_logprobs=rng.choice((None, None, None, 1)),
            seed=rng.randrange(2**40),
        )

    def _disturb(self) -> None:
        events = {
            "abort": 0.05,
            "replace": 0.02,
            "drop": 0.01,
            "update": 0.01,
            "cut": 0.01,
            "sleep": 0.01,
            "wrong": 0.02,
        }
        for event, chance in events.items():
            if self.random.random() < chance:
                self.counts[event] += 1
                getattr(self, f"_{event}")()

    def _abort(self) -> None:
        if self.engine.unfinished:
            self._tell(self.engine.abort(self.random.choice(self.engine.unfinished)))

    def _replace(self) -> None:
        load_adapter(self.engine, self.random.choice(ADAPTERS), self.random.randrange(3))

    def _drop(self) -> None:
        users = {each.adapter for each in self.open.values()}
        for adapter in self.engine.adapters():
            if adapter.name not in users:
                self.engine.drop_adapter(adapter.name)
                return
            with suppress(UserError):
                self.engine.drop_adapter(adapter.name)
                raise AssertionError("an adapter in use was dropped")

    def _update(self) -> None:
        version = self.random.randrange(2)
        self.engine.update_weights(version, self.weights[version])

    def _cut(self) -> None:
        """The last tensor of an update has the wrong shape."""
        other = dict(self.weights[1 - int(self.engine.version)])
        other[next(reversed(other))] = torch.ones(1)
        with suppress(UserError):
            self.engine.update_weights("half", other)
            raise AssertionError("half an update was taken")

    def _sleep(self) -> None:
        self.engine.sleep()
        self.engine.wake()

    def _wrong(self) -> None:
        with suppress(UserError):
            self.engine.add_request([1, VOCAB])
            raise AssertionError("a token that does not exist was taken")

    def check_end(self, num_exact: int) -> None:
        """Nothing is left of what came, all was answered, and `num_exact` answers are what a fresh engine gives."""
        engine = self.engine
        assert (engine.unfinished, engine._texts, engine.metrics.num_pages_used) == ((), {}, 0)
        assert len(engine._scheduler.prefix) <= engine.metrics.num_pages
        assert (self.open, self.counts["end"]) == ({}, self.counts["request"])
        steady = [each for each in self.ended if each.is_steady]
        assert len(steady) >= num_exact
        fresh = make_engine(self.family, self.num_pages)
        for asked in self.random.sample(steady, num_exact):
            self._check_exact(fresh, asked)

    def _check_exact(self, fresh: Engine, asked: Asked) -> None:
        for each in asked.total.total().completions:
            ((_, version),) = each.versions
            fresh.update_weights(version, self.weights[int(version)])
            if asked.adapter is not None:
                load_adapter(fresh, asked.adapter, int(each.adapter_versions[0][1]))
            (alone,) = fresh.generate([asked.prompt], asked.params, asked.adapter)
            assert alone.completions[each.index].token_ids == each.token_ids
            assert alone.completions[each.index].text == each.text


def make_engine(family: str, num_pages: int) -> Engine:
    """With so many pages, and room for three adapters."""
    model: Any = make_model(family)
    sizes: dict[str, Any] = {
        "page_size": PAGE, "max_running": 6, "max_tokens_per_step": 40, "max_prompt_logit_rows": 9, "seed": 1,
        "adapter_bytes": 3 * 2 * (64 + 32) * 4,
    }  # fmt: skip
    layers = [each.num_elements for each in Engine(model, config=EngineConfig(**sizes))._runner.layers]
    page_bytes = PAGE * (sum(layers) + max(layers)) * 4
    return Engine(model, Letters(), EngineConfig(**sizes, kv_cache_bytes=(num_pages + 1) * page_bytes))
