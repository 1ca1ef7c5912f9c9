"""Requests and their samples, and the table that knows them all.

A *request* is a prompt and what is asked of it; a *sample* is one of its `n` answers and the unit of all scheduling. A
sample's state is its tokens and how many of them are computed: being preempted only sets the latter back to zero.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from flagscale.errors import UserError
from flagscale.inference.engine.outputs import FinishReason, TokenLogprob
from flagscale.inference.engine.prefix import ROOT, page_keys
from flagscale.inference.engine.sampling import SamplingParams

Version: TypeAlias = int | str
"""whose weights these are: a label that the owner of the weights chooses"""


@dataclass(slots=True, eq=False)
class Sample:
    """One answer to one request: `tokens[:num_computed]` have their keys and values in `pages`."""

    request: "Request"
    index: int
    tokens: list[int]
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_cached: int = 0
    """tokens whose pages were there when it was last admitted: they are others' too, and never written again"""
    finish_reason: FinishReason | None = None

    @property
    def priority(self) -> tuple[int, int]:
        """Smaller is served first: the order of arrival, which preemption does not change."""
        return (self.request.arrival, self.index)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.request.num_prompt

    @property
    def num_missing(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    def update_keys(self, page_size: int) -> None:
        """Bring `keys` up to all full pages of `tokens`."""
        if len(self.tokens) // page_size > len(self.keys):
            self.keys = page_keys(self.tokens, page_size, self.keys, self.request.root)


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and what is asked of it."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: int
    seed: int
    max_tokens: int
    adapter: str | None = None
    root: bytes = ROOT
    samples: list[Sample] = field(default_factory=list)
    is_forked: bool = False
    """the samples after the first exist, with or without pages of their own"""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    @property
    def must_see_prompt(self) -> bool:
        """Every position of the prompt has to go through the model, cached or not."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt - 1

    def restart(self, root: bytes) -> None:
        """Nothing that was computed of it is right any more; its pages are found under `root` from here on."""
        self.root = root
        for sample in self.samples:
            sample.keys.clear()

    def add_sample(self) -> Sample:
        sample = Sample(self, len(self.samples), list(self.prompt))
        self.samples.append(sample)
        return sample


class RequestTable:
    """The requests that are not finished, by id."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def next_arrival(self) -> int:
        self._num_arrived += 1
        return self._num_arrived - 1

    def add(self, request: Request) -> None:
        """
        Raises:
            UserError: the id belongs to a request that is not finished.
        """
        if request.request_id in self._requests:
            raise UserError(f"request id `{request.request_id}`: a request with this id is not finished yet")
        self._requests[request.request_id] = request

    def find(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def users_of(self, adapter: str) -> tuple[Request, ...]:
        """The unfinished requests that use an adapter."""
        return tuple(request for request in self._requests.values() if request.adapter == adapter)

    def remove(self, request: Request) -> None:
        del self._requests[request.request_id]

    def values(self) -> Iterable[Request]:
        return tuple(self._requests.values())
