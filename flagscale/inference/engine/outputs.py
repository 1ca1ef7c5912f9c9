"""What an engine tells: deltas while a request runs, and the whole of it afterwards.

Only deltas are made by the engine; the whole is their sum, so a stream and a finished answer cannot differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural logarithm of a token's probability, and the most probable tokens in its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one sample.

    text may lag behind the tokens: half a character, or what may yet become a stop text, is held back
    logprobs: one for each token, empty where none were asked for
    version: of the weights that these tokens were sampled from
    adapter_version: of the adapter, for a request that has one
    stop_match: the text or token that ended it, for finish reason `stop`
    prompt_logprobs: in the first delta of sample 0, for each token of the prompt after its first
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    version: int | str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    adapter_version: int | str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sample; `versions` says from which output token on which weights were used.

    adapter_versions: the same of its adapter; empty where it has none
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    stop_match: str | int | None
    versions: tuple[tuple[int, int | str], ...]
    adapter_versions: tuple[tuple[int, int | str], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    num_cached_tokens: int
    """prompt tokens of the first sample that were found in the prefix cache"""


@dataclass(slots=True)
class _Sum:
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    versions: list[tuple[int, int | str]] = field(default_factory=list)
    adapter_versions: list[tuple[int, int | str]] = field(default_factory=list)
    last: Delta | None = None

    def add(self, delta: Delta) -> None:
        told = ((self.versions, delta.version), (self.adapter_versions, delta.adapter_version))
        for versions, version in told:
            if version is not None and delta.token_ids and (not versions or versions[-1][1] != version):
                versions.append((len(self.tokens), version))
        self.tokens.extend(delta.token_ids)
        self.text.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.last = delta

    def completion(self, index: int) -> Completion:
        assert self.last is not None
        assert self.last.finish_reason is not None
        return Completion(
            index=index,
            token_ids=tuple(self.tokens),
            text="".join(self.text),
            logprobs=tuple(self.logprobs),
            finish_reason=self.last.finish_reason,
            stop_match=self.last.stop_match,
            versions=tuple(self.versions),
            adapter_versions=tuple(self.adapter_versions),
        )


class OutputSum:
    """Adds up the deltas of one request."""

    def __init__(self, request_id: str, prompt: Sequence[int], num_samples: int) -> None:
        self._request_id = request_id
        self._prompt = tuple(prompt)
        self._sums = [_Sum() for _ in range(num_samples)]
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._num_cached = 0

    def add(self, delta: Delta) -> None:
        if delta.index == 0 and self._sums[0].last is None:
            self._prompt_logprobs = delta.prompt_logprobs
            self._num_cached = delta.num_cached_tokens
        self._sums[delta.index].add(delta)

    @property
    def is_complete(self) -> bool:
        return all(each.last is not None and each.last.finish_reason is not None for each in self._sums)

    def total(self) -> RequestOutput:
        """The finished request; every sample must have had its last delta."""
        completions = tuple(each.completion(index) for index, each in enumerate(self._sums))
        return RequestOutput(self._request_id, self._prompt, completions, self._prompt_logprobs, self._num_cached)
