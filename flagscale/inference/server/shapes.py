"""How each endpoint writes a piece of a choice: OpenAI's two formats, as pure functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flagscale.inference.server.pieces import Entry, Piece
from flagscale.inference.server.token_text import TokenText


@dataclass(frozen=True, slots=True)
class Shape:
    """The words of one endpoint.

    opening: the choice of a stream's first chunk, before anything is said; None: there is no such chunk
    """

    prefix: str
    whole_object: str
    chunk_object: str
    write_whole: Callable[[Piece, bool], dict[str, Any]]
    write_chunk: Callable[[Piece, bool], dict[str, Any]]
    opening: Callable[[int], dict[str, Any]] | None = None


def _ending(piece: Piece) -> dict[str, Any]:
    ending: dict[str, Any] = {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
    if piece.prompt_token_ids is not None:
        ending["prompt_token_ids"] = list(piece.prompt_token_ids)
    if piece.token_ids:
        ending["token_ids"] = piece.token_ids
    return ending


def _completion_logprobs(entries: Sequence[Entry]) -> dict[str, Any]:
    def top(entry: Entry) -> dict[str, float] | None:
        if entry.logprob is None:
            return None
        # The chosen token comes first, and stays where another one is written like it.
        found = {entry.token.text: entry.logprob}
        for token, value in entry.top:
            found.setdefault(token.text, value)
        return found

    return {
        "tokens": [entry.token.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [top(entry) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def _completion(piece: Piece, wants_logprobs: bool) -> dict[str, Any]:
    logprobs = _completion_logprobs(piece.entries) if wants_logprobs else None
    return {"index": piece.index, "text": piece.text, "logprobs": logprobs, **_ending(piece)}


def _chat_logprobs(entries: Sequence[Entry]) -> dict[str, Any]:
    def one(token: TokenText, logprob: float | None) -> dict[str, Any]:
        return {"token": token.text, "logprob": logprob, "bytes": list(token.data)}

    content = [
        {**one(entry.token, entry.logprob), "top_logprobs": [one(*pair) for pair in entry.top]} for entry in entries
    ]
    return {"content": content, "refusal": None}


def _chat(piece: Piece, key: str, message: dict[str, Any], wants_logprobs: bool) -> dict[str, Any]:
    logprobs = _chat_logprobs(piece.entries) if wants_logprobs else None
    return {"index": piece.index, key: message, "logprobs": logprobs, **_ending(piece)}


def _chat_whole(piece: Piece, wants_logprobs: bool) -> dict[str, Any]:
    message = {"role": "assistant", "content": piece.text, "refusal": None}
    return _chat(piece, "message", message, wants_logprobs)


def _chat_chunk(piece: Piece, wants_logprobs: bool) -> dict[str, Any]:
    return _chat(piece, "delta", {"content": piece.text} if piece.text else {}, wants_logprobs)


def _chat_opening(index: int) -> dict[str, Any]:
    return _chat(Piece(index), "delta", {"role": "assistant", "content": ""}, False)


COMPLETION = Shape("cmpl", "text_completion", "text_completion", _completion, _completion)
CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", _chat_whole, _chat_chunk, _chat_opening)
