"""The engine: requests in, deltas out, one step at a time.

It is synchronous and single-threaded, and does nothing between steps, so everything that changes it (a new request, a
cancellation, new weights) happens between two steps and needs no lock. One step is: schedule, run the model once, let
the samples of a prompt part, choose tokens, tell. `AsyncEngine` puts a thread around it.
"""

import itertools
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flagscale.errors import FlagScaleError, UserError
from flagscale.inference.engine.adapters import Adapter, AdapterSource
from flagscale.inference.engine.config import EngineConfig
from flagscale.inference.engine.int8 import quantise_update
from flagscale.inference.engine.metrics import EngineMetrics, Meter
from flagscale.inference.engine.model import ModelRunner, load_model
from flagscale.inference.engine.outputs import Delta, FinishReason, OutputSum, RequestOutput, TokenLogprob
from flagscale.inference.engine.pages import PagePool
from flagscale.inference.engine.prefix import ROOT
from flagscale.inference.engine.request import Request, RequestTable, Sample, Version
from flagscale.inference.engine.sampler import Choice, SampleRow, choose, prompt_logprobs
from flagscale.inference.engine.sampling import SamplingParams, check_tokens_exist
from flagscale.inference.engine.scheduler import Chunk, Scheduler
from flagscale.inference.engine.text import TextStream, find_end_tokens, load_tokenizer
from flagscale.inference.engine.weights import Tensors, apply_update, name_views, plan_update

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class _Told:
    """The end of a sample, found in its newest token."""

    text: str = ""
    reason: FinishReason | None = None
    match: str | int | None = None


class Engine:
    """Runs many requests at once through one model.

    `model` becomes the engine's: its attention is replaced. `version` names the weights that it has now.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, config: EngineConfig | None = None, version: Version = 0
    ) -> None:
        self.config = config or EngineConfig()
        self.version = version
        self.tokenizer = tokenizer
        self._runner = ModelRunner(model, self.config)
        self.max_model_len = _find_max_len(self._runner, self.config)
        self._pool = PagePool(self._runner.num_pages)
        self._scheduler = Scheduler(self.config, self._pool)
        self._table = RequestTable()
        self._texts: dict[Sample, TextStream] = {}
        self._meter = Meter()
        self._names = itertools.count()
        self._seeds = secrets.randbits(63) if self.config.seed is None else self.config.seed
        self._vocab_size = int(self._runner.text_config.vocab_size)
        self._eos = find_end_tokens(model, tokenizer)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        config: EngineConfig | None = None,
        dtype: torch.dtype | str = "auto",
        device: str = "cpu",
        version: Version = 0,
    ) -> "Engine":
        """An engine for the model, and the tokenizer if there is one, in a local folder.

        Raises:
            UserError: there is no model that the engine can run.
        """
        return cls(load_model(folder, dtype, device), load_tokenizer(folder), config, version)

    @property
    def model(self) -> Any:
        """The model of transformers that it runs."""
        return self._runner.model

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def unfinished(self) -> tuple[str, ...]:
        """The ids of the requests that are not finished, in the order of arrival."""
        return tuple(request.request_id for request in self._table.values())

    @property
    def is_asleep(self) -> bool:
        return self._runner.cache is None

    @property
    def metrics(self) -> EngineMetrics:
        return self._meter.read(self._scheduler, self._pool)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt.

        Raises:
            UserError: the prompt is empty, has unknown tokens, or is text where there is no tokenizer.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError("the prompt is text, and this engine has no tokenizer; expected token ids")
            prompt = self.tokenizer.encode(prompt)
        tokens = tuple(int(token) for token in prompt)
        if not tokens:
            raise UserError("the prompt has no tokens; expected at least one")
        wrong = next((token for token in tokens if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise UserError(f"the prompt has token {wrong}; expected tokens from 0 to {self._vocab_size - 1}")
        return tokens

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        adapter: str | None = None,
    ) -> Request:
        """Queue a request, of the adapter with this name or of the model itself; its tokens come from `step`.

        Raises:
            UserError: the prompt, the parameters or the adapter cannot be right; nothing was queued.
        """
        params = params or SamplingParams()
        tokens = self.encode(prompt)
        check_tokens_exist(params, self._vocab_size)
        if params.stop and self.tokenizer is None:
            raise UserError("sampling.stop: this engine has no tokenizer; expected stop_token_ids")
        room = self.max_model_len - len(tokens)
        if room < (params.max_tokens or 1):
            asked = f"{len(tokens)} tokens of prompt and {params.max_tokens or 1} of output"
            raise UserError(f"{asked} do not fit: the engine holds {self.max_model_len} tokens of one sample")
        request = Request(
            request_id=f"request-{next(self._names)}" if request_id is None else request_id,
            prompt=tokens,
            params=params,
            arrival=self._table.next_arrival(),
            seed=self._next_seed() if params.seed is None else params.seed,
            max_tokens=params.max_tokens or room,
            adapter=adapter,
            root=ROOT if adapter is None else self._runner.adapters.get(adapter).root,
        )
        self._table.add(request)
        self._scheduler.add(request.add_sample())
        self._meter.num_requests += 1
        return request

    def step(self) -> list[Delta]:
        """Run the model once and tell what came of it; nothing where there is nothing to do.

        Raises:
            FlagScaleError: the engine is asleep. Any other exception: the step had no effect, and may be tried again.
        """
        if self.is_asleep:
            raise FlagScaleError("the engine is asleep; wake it before its next step")
        with self._meter.step(), torch.inference_mode():
            chunks = self._scheduler.schedule()
            if not chunks:
                return []
            try:
                logits = self._runner.forward(chunks, [_wanted(chunk) for chunk in chunks])
                ready = self._complete(chunks, logits)
                choices = (
                    choose(torch.stack([row for _, row in ready]), [self._row(s) for s, _ in ready]) if ready else []
                )
            except BaseException:
                self._scheduler.preempt_all(forget=True)
                raise
            self._meter.num_computed_tokens += sum(chunk.count for chunk in chunks)
            return [self._take(sample, choice) for (sample, _), choice in zip(ready, choices, strict=True)]

    def abort(self, request_id: str) -> list[Delta]:
        """End a request now; the last deltas of its unfinished samples, or nothing where there is no such request."""
        request = self._table.find(request_id)
        if request is None:
            return []
        deltas = []
        while len(request.samples) < request.params.n:
            request.add_sample()
        for sample in request.samples:
            if sample.finish_reason is None:
                deltas.append(self._tell(sample, (), _Told(self._text(sample).flush(), "abort")))
        return deltas

    def generate(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts and return when the last is done; other requests go on meanwhile, untold.

        Raises:
            UserError: one of the prompts cannot be answered; none was.
        """
        prompts = list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(
                f"{len(each)} sampling parameters for {len(prompts)} prompts; expected one for each, or one"
            )
        sums: dict[str, OutputSum] = {}
        try:
            for prompt, one in zip(prompts, each, strict=True):
                request = self.add_request(prompt, one, adapter=adapter)
                sums[request.request_id] = OutputSum(request.request_id, request.prompt, request.params.n)
            while any(not total.is_complete for total in sums.values()):
                for delta in self.step():
                    if delta.request_id in sums:
                        sums[delta.request_id].add(delta)
        except BaseException:
            for request_id in sums:
                self.abort(request_id)
            raise
        return [total.total() for total in sums.values()]

    def update_weights(self, version: Version, tensors: Tensors) -> None:
        """Replace weights in place, all of the given ones or none; others stay.

        Running samples go on from the tokens that they have, all of which are computed again under the new weights.

        Raises:
            ConfigError: a name, shape or type does not fit; nothing was changed.
        """
        views = name_views(self._runner.model)
        apply_update(plan_update(views, quantise_update(views, tensors)))
        self._scheduler.preempt_all(forget=True)
        self.version = version

    def load_adapter(
        self,
        name: str,
        source: AdapterSource,
        config: Mapping[str, Any] | None = None,
        version: Version | None = None,
    ) -> Adapter:
        """Load a LoRA adapter from a folder in PEFT's format, or from tensors and a configuration as PEFT names them.

        It takes the place of the one that has its name: the running samples of that one go on from the tokens that they
        have, computed again under the new one. `version` labels it; None: the number of the load.

        Raises:
            UserError: it cannot be read, or does not fit the model or the memory; nothing was changed.
        """
        adapter = self._runner.adapters.load(name, source, config, version)
        users = self._table.users_of(name)
        self._scheduler.preempt(users)
        for request in users:
            request.restart(adapter.root)
        return adapter

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter that no unfinished request uses.

        Raises:
            UserError: there is no such adapter, or it is in use; nothing was changed.
        """
        if users := self._table.users_of(name):
            told = ", ".join(f"`{each.request_id}`" for each in users[:3]) + (", .." if len(users) > 3 else "")
            raise UserError(f"adapter `{name}`: {len(users)} unfinished requests use it: {told}")
        self._runner.adapters.drop(name)

    def adapters(self) -> tuple[Adapter, ...]:
        """The loaded adapters, in the order in which their names came."""
        return self._runner.adapters.values()

    def sleep(self) -> None:
        """Give back the memory of keys and values; requests wait, and are computed again after `wake`."""
        self._scheduler.preempt_all(forget=True)
        self._runner.free()

    def wake(self) -> None:
        self._runner.allocate()

    def _next_seed(self) -> int:
        self._seeds = (self._seeds + 0x9E3779B97F4A7C15) % 2**63
        return self._seeds

    def _text(self, sample: Sample) -> TextStream:
        if sample not in self._texts:
            params = sample.request.params
            self._texts[sample] = TextStream(self.tokenizer, params.stop, params.include_stop)
        return self._texts[sample]

    def _complete(self, chunks: Sequence[Chunk], logits: Sequence[torch.Tensor]) -> list[tuple[Sample, torch.Tensor]]:
        """Who can have a token now, and by which logits: samples of one prompt draw their first from the same row."""
        forks = self._scheduler.complete(chunks)
        assert self._runner.cache is not None
        self._runner.cache.copy_pages((src, dst) for _, src, dst in forks if src != dst)
        ready: list[tuple[Sample, torch.Tensor]] = []
        for chunk, rows in zip(chunks, logits, strict=True):
            self._read_prompt(chunk, rows)
            if chunk.is_last:
                ready.append((chunk.sample, rows[-1]))
                ready.extend((fork, rows[-1]) for fork, _, _ in forks if fork.request is chunk.sample.request)
        return ready

    def _row(self, sample: Sample) -> SampleRow:
        request = sample.request
        forbidden = self._ending_tokens(request.params) if sample.num_output < request.params.min_tokens else ()
        output = sample.tokens[request.num_prompt :]
        return SampleRow(request.params, request.seed, sample.index, request.prompt, output, tuple(forbidden))

    def _ending_tokens(self, params: SamplingParams) -> set[int]:
        return {*params.stop_token_ids, *(() if params.ignore_eos else self._eos)}

    def _read_prompt(self, chunk: Chunk, rows: torch.Tensor) -> None:
        request = chunk.sample.request
        if not request.must_see_prompt:
            return
        told = range(chunk.start + 1, min(chunk.stop + 1, request.num_prompt))
        del request.prompt_logprobs[chunk.start :]
        if told:
            tokens = [request.prompt[at] for at in told]
            found = prompt_logprobs(rows[: len(told)], tokens, request.params.prompt_logprobs or 0)
            request.prompt_logprobs.extend(found)

    def _take(self, sample: Sample, choice: Choice) -> Delta:
        if choice.token is None:
            return self._tell(sample, (), _Told(self._text(sample).flush(), "error"))
        sample.tokens.append(choice.token)
        self._meter.num_output_tokens += 1
        logprobs = () if choice.logprob is None else (choice.logprob,)
        return self._tell(sample, (choice.token,), self._find_end(sample, choice.token), logprobs)

    def _find_end(self, sample: Sample, token: int) -> _Told:
        params, stream = sample.request.params, self._text(sample)
        ends = token in self._ending_tokens(params)
        if ends and not params.include_stop:
            return _Told(stream.flush(), "stop", stream.stop_match or token)
        text = stream.add((token,))
        if ends or sample.num_output >= sample.request.max_tokens:
            text += stream.flush()
        if stream.stop_match is not None:
            return _Told(text, "stop", stream.stop_match)
        if ends:
            return _Told(text, "stop", token)
        return _Told(text, "length" if sample.num_output >= sample.request.max_tokens else None)

    def _tell(
        self, sample: Sample, tokens: tuple[int, ...], told: _Told, logprobs: tuple[TokenLogprob, ...] = ()
    ) -> Delta:
        request = sample.request
        is_first = sample.num_output == len(tokens)
        delta = Delta(
            request_id=request.request_id,
            index=sample.index,
            token_ids=tokens,
            text=told.text,
            version=self.version,
            logprobs=logprobs,
            finish_reason=told.reason,
            stop_match=told.match,
            num_cached_tokens=sample.num_cached,
            prompt_logprobs=tuple(request.prompt_logprobs) if is_first and sample.index == 0 else (),
            adapter_version=None if request.adapter is None else self._runner.adapters.get(request.adapter).version,
        )
        if told.reason is not None:
            self._end(sample, told.reason)
        return delta

    def _end(self, sample: Sample, reason: FinishReason) -> None:
        sample.finish_reason = reason
        self._scheduler.finish(sample)
        self._texts.pop(sample, None)
        request = sample.request
        if len(request.samples) == request.params.n and all(each.finish_reason for each in request.samples):
            self._table.remove(request)


def _wanted(chunk: Chunk) -> range:
    """The positions whose logits are needed."""
    if chunk.sample.request.must_see_prompt:
        return range(chunk.start, chunk.stop)
    return range(chunk.stop - 1, chunk.stop) if chunk.is_last else range(0)


def _find_max_len(runner: ModelRunner, config: EngineConfig) -> int:
    """Tokens of one sample that both the model and the pages hold."""
    model = getattr(runner.text_config, "max_position_embeddings", None)
    limits = (config.max_model_len, model, runner.num_pages * config.page_size)
    return min(int(limit) for limit in limits if limit is not None)
