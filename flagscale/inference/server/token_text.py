"""What one token looks like in a list of log-probabilities: its bytes, and a text for them.

A token may be half a character. Its bytes are then still exact, and its text is written `bytes:\\xe2\\x82`, as OpenAI
does, so that two halves are never mistaken for each other.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flagscale.inference.byte_tokenizer import byte_alphabet

WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
"""how SentencePiece writes a space, which decoding a single token would drop"""

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class TokenText:
    """data: its bytes; num_characters: how many characters begin in it, of those that the output's text has"""

    text: str
    data: bytes
    num_characters: int


class TokenTable:
    """The texts of single tokens, for one tokenizer or for none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        is_byte_level = backend is not None and "ByteLevel" in str(backend.decoder)
        self._bytes = {letter: byte for byte, letter in enumerate(byte_alphabet())} if is_byte_level else {}
        self.find = lru_cache(2**16)(self._find)

    def _find(self, token: int) -> TokenText:
        data = self._data(token)
        starts = 0 if token in self._special else sum(byte & 0xC0 != 0x80 for byte in data)
        try:
            return TokenText(data.decode("utf-8"), data, starts)
        except UnicodeDecodeError:
            return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data, starts)

    def _data(self, token: int) -> bytes:
        if self._tokenizer is None:
            return str(token).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is not None and token not in self._special:
            if match := BYTE_TOKEN.fullmatch(piece):
                return bytes([int(match[1], 16)])
            if self._bytes and all(letter in self._bytes for letter in piece):
                return bytes(self._bytes[letter] for letter in piece)
            if WORD_START in piece:
                return str(piece).replace(WORD_START, " ").encode()
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text.encode("utf-8", "replace")
