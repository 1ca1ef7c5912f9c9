"""Text out of tokens, piece by piece, and the stop texts in it.

A token may hold half a character, and what a token looks like may depend on its neighbours. So a piece is what decoding
a short window of tokens gives beyond what it gave before, and only once it ends in a whole character. The pieces of an
output add up to the text of decoding it at once, for every tokenizer whose decoding depends on near neighbours only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """What is asked of a tokenizer; those of transformers have it."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str: ...


@dataclass(slots=True)
class TextStream:
    """The text of one sample as it grows; `stop_match` is set once a stop text has come."""

    decoder: Decoder | None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_match: str | None = None
    _tokens: list[int] = field(default_factory=list)
    _known_from: int = 0
    _known_to: int = 0
    _held: str = ""

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is certain after these tokens and was not before."""
        self._tokens.extend(tokens)
        piece = self._decode_piece(is_last=False)
        return self._pass(piece) if piece else ""

    def flush(self) -> str:
        """What was held back, at the end."""
        if self.stop_match is not None:
            return ""
        text = self._pass(self._decode_piece(is_last=True))
        if self.stop_match is not None:
            return text
        held, self._held = self._held, ""
        return text + held

    def _decode_piece(self, is_last: bool) -> str:
        if self.decoder is None:
            return ""
        window = self._tokens[self._known_from :]
        known = self.decoder.decode(window[: self._known_to - self._known_from], skip_special_tokens=True)
        whole = self.decoder.decode(window, skip_special_tokens=True)
        if not is_last and (len(whole) <= len(known) or whole.endswith(UNFINISHED)):
            return ""
        self._known_from, self._known_to = self._known_to, len(self._tokens)
        return whole[len(known) :]

    def _pass(self, piece: str) -> str:
        if not self.stop:
            return piece
        text = self._held + piece
        found = [(at, -len(stop), stop) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            at, _, stop = min(found)
            self.stop_match, self._held = stop, ""
            return text[: at + len(stop)] if self.include_stop else text[:at]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` is the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a folder, or None where there is none."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if not any((Path(folder) / name).is_file() for name in names):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def find_end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """What ends a text, by everyone who has a say in it."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer):
        value = getattr(source, "eos_token_id", None)
        found.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return frozenset(found)
