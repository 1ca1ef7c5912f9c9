"""Deltas of the engine, read into pieces of choices; a finished choice is the sum of its pieces.

So a stream and a whole answer cannot differ. A piece does not know yet which endpoint it is written for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from flagscale.inference.engine import Delta, TokenLogprob
from flagscale.inference.server.asking import Prompt
from flagscale.inference.server.token_text import TokenTable, TokenText

LEAST_LOGPROB = -9999.0
"""JSON has no infinity"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One token in a list of log-probabilities; logprob None: the first token of a prompt, which nothing predicts."""

    token: TokenText
    logprob: float | None
    top: tuple[tuple[TokenText, float], ...]
    offset: int
    """of the token's first character in the choice's text"""


@dataclass(slots=True)
class Piece:
    """A part of one choice."""

    index: int
    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, other: "Piece") -> None:
        self.text += other.text
        self.entries += other.entries
        self.token_ids += other.token_ids
        self.prompt_token_ids = self.prompt_token_ids or other.prompt_token_ids
        self.finish_reason = self.finish_reason or other.finish_reason
        self.stop_reason = self.stop_reason if other.stop_reason is None else other.stop_reason

    @property
    def says_something(self) -> bool:
        return bool(self.text or self.entries or self.finish_reason)


@dataclass(slots=True)
class PieceReader:
    """Reads the deltas of one HTTP request.

    echo: the texts of the prompts, where answers begin with them
    drops_output: only the prompt was asked for; the one token that the engine makes is not told
    """

    prompts: Sequence[Prompt]
    table: TokenTable
    echo: Sequence[str] | None = None
    drops_output: bool = False
    tells_tokens: bool = False
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    fingerprint: str = "weights-0"
    """the versions of weights and adapter that the newest token came from"""
    _offsets: dict[int, int] = field(default_factory=dict)
    _prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.prompts)

    def read(self, number: int, delta: Delta) -> Piece:
        """The piece that a delta of prompt `number` adds."""
        prompt = self.prompts[number]
        piece = Piece(number * prompt.params.n + delta.index)
        self.fingerprint = f"weights-{delta.version}"
        if delta.adapter_version is not None:
            self.fingerprint += f"-adapter-{delta.adapter_version}"
        if piece.index not in self._offsets:
            self._begin(piece, number, delta)
        if not self.drops_output:
            self.num_output_tokens += len(delta.token_ids)
            piece.text += delta.text
            piece.token_ids += delta.token_ids if self.tells_tokens else ()
            piece.entries += self._entries(piece.index, delta.logprobs)
        piece.finish_reason = "length" if delta.finish_reason and self.drops_output else delta.finish_reason
        piece.stop_reason = delta.stop_match
        return piece

    def _begin(self, piece: Piece, number: int, delta: Delta) -> None:
        prompt = self.prompts[number]
        self._offsets[piece.index] = 0
        if delta.index == 0:
            self.num_cached_tokens += delta.num_cached_tokens
            self._prompt_logprobs[number] = delta.prompt_logprobs
        if self.tells_tokens:
            piece.prompt_token_ids = prompt.tokens
        if self.echo is None:
            return
        piece.text = self.echo[number]
        if prompt.params.prompt_logprobs is not None:
            first = self.table.find(prompt.tokens[0])
            piece.entries.append(Entry(first, None, (), 0))
            self._offsets[piece.index] = first.num_characters
            piece.entries += self._entries(piece.index, self._prompt_logprobs.get(number, ()))

    def _entries(self, index: int, logprobs: Sequence[TokenLogprob]) -> Iterator[Entry]:
        for each in logprobs:
            token = self.table.find(each.token)
            top = tuple((self.table.find(other), max(value, LEAST_LOGPROB)) for other, value in each.top)
            yield Entry(token, max(each.logprob, LEAST_LOGPROB), top, self._offsets[index])
            self._offsets[index] += token.num_characters
