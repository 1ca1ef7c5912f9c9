"""Deltas become choices: pieces add up, offsets are right, and both formats are OpenAI's."""

from typing import Any

import pytest

pytest.importorskip("torch")

from flagscale.inference.engine import Delta, SamplingParams, TokenLogprob
from flagscale.inference.server.asking import Prompt
from flagscale.inference.server.pieces import LEAST_LOGPROB, Entry, Piece, PieceReader
from flagscale.inference.server.shapes import CHAT, COMPLETION
from flagscale.inference.server.token_text import TokenTable, TokenText


class Ascii:
    """A tokenizer whose tokens are characters, but for 0, which is special."""

    all_special_ids = (0,)

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(token)

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(token) for token in tokens if token or not skip_special_tokens)


TABLE = TokenTable(Ascii())


def delta(text: str, index: int = 0, **more: Any) -> Delta:
    tokens = tuple(map(ord, text))
    return Delta("r", index, tokens, text, 7, **more)


def logprob(letter: str, value: float = -1.0, *top: tuple[str, float]) -> TokenLogprob:
    return TokenLogprob(ord(letter), value, tuple((ord(other), each) for other, each in top))


def reader(*prompts: str, n: int = 1, **more: Any) -> PieceReader:
    settings = {"prompt_logprobs": 1} if more.pop("sees_prompt", False) else {}
    params = SamplingParams(n=n, **settings)
    return PieceReader([Prompt(tuple(map(ord, text)), params) for text in prompts], TABLE, **more)


def test_choices_are_numbered_prompt_by_prompt() -> None:
    found = reader("a", "b", n=3)
    assert [found.read(number, delta("x", index)).index for number in (0, 1) for index in (0, 1, 2)] == list(range(6))
    assert (found.num_prompt_tokens, found.num_output_tokens, found.fingerprint) == (2, 6, "weights-7")


def test_cached_tokens_count_once_for_each_prompt() -> None:
    found = reader("aaaa", "b", n=2)
    for number, index in ((0, 0), (0, 1), (0, 0), (1, 0)):
        found.read(number, delta("x", index, num_cached_tokens=3))
    assert found.num_cached_tokens == 6


def test_offsets_follow_the_text_with_and_without_the_prompt() -> None:
    plain = reader("ab")
    first = plain.read(0, delta("xy", logprobs=(logprob("x"), logprob("y"))))
    second = plain.read(0, delta("z", logprobs=(logprob("z"),)))
    assert [entry.offset for entry in (*first.entries, *second.entries)] == [0, 1, 2]
    echoed = reader("abc", echo=["abc"], sees_prompt=True, n=2)
    told = (logprob("b"), logprob("c"))
    first = echoed.read(0, delta("x", prompt_logprobs=told, logprobs=(logprob("x"),)))
    assert first.text == "abcx"
    assert [(entry.token.text, entry.logprob, entry.offset) for entry in first.entries] == [
        ("a", None, 0), ("b", -1.0, 1), ("c", -1.0, 2), ("x", -1.0, 3)
    ]  # fmt: skip
    other = echoed.read(0, delta("y", 1, logprobs=(logprob("y"),)))
    assert [entry.token.text for entry in other.entries] == ["a", "b", "c", "y"]
    assert echoed.read(0, delta("z", 1)).text == "z"


def test_a_prompt_whose_probabilities_were_not_asked_for_is_echoed_as_text_alone() -> None:
    piece = reader("abc", echo=["abc"]).read(0, delta("x"))
    assert (piece.text, piece.entries) == ("abcx", [])


def test_where_only_the_prompt_was_asked_for_the_output_is_dropped() -> None:
    found = reader("ab", echo=["ab"], drops_output=True, sees_prompt=True)
    piece = found.read(0, delta("x", prompt_logprobs=(logprob("b"),), finish_reason="stop", logprobs=(logprob("x"),)))
    assert (piece.text, piece.finish_reason, len(piece.entries), found.num_output_tokens) == ("ab", "length", 2, 0)


def test_tokens_are_told_where_they_were_asked_for() -> None:
    piece = reader("ab", tells_tokens=True).read(0, delta("xy"))
    assert (piece.prompt_token_ids, piece.token_ids) == ((97, 98), [120, 121])
    piece = reader("ab").read(0, delta("xy"))
    assert (piece.prompt_token_ids, piece.token_ids) == (None, [])


def test_pieces_add_up() -> None:
    total = Piece(3)
    for part in (
        Piece(3, "a", [], [1], (9,)),
        Piece(3, "b", [Entry(TokenText("b", b"b", 1), -1.0, (), 1)], [2]),
        Piece(3, "", [], [], None, "stop", "x"),
    ):
        total.add(part)
    assert (total.text, total.token_ids, total.prompt_token_ids) == ("ab", [1, 2], (9,))
    assert (total.finish_reason, total.stop_reason, len(total.entries)) == ("stop", "x", 1)
    assert total.says_something
    assert not Piece(0).says_something
    assert Piece(0, finish_reason="length").says_something


ENTRIES = [
    Entry(TokenText("a", b"a", 1), None, (), 0),
    Entry(TokenText("b", b"b", 1), -2.0, ((TokenText("c", b"c", 1), -0.5), (TokenText("b", b"b", 1), -2.0)), 1),
]


def test_a_completion_has_openais_fields() -> None:
    written = COMPLETION.write_whole(Piece(1, "ab", ENTRIES, finish_reason="stop", stop_reason=4), True)
    assert written == {
        "index": 1,
        "text": "ab",
        "logprobs": {
            "tokens": ["a", "b"],
            "token_logprobs": [None, -2.0],
            "top_logprobs": [None, {"b": -2.0, "c": -0.5}],
            "text_offset": [0, 1],
        },
        "finish_reason": "stop",
        "stop_reason": 4,
    }
    assert COMPLETION.write_chunk(Piece(0, "x"), False)["logprobs"] is None
    assert COMPLETION.opening is None


def test_a_chat_has_openais_fields() -> None:
    written = CHAT.write_whole(Piece(0, "b", ENTRIES[1:], [98], (1, 2), "length"), True)
    assert written["message"] == {"role": "assistant", "content": "b", "refusal": None}
    (entry,) = written["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("b", -2.0, [98])
    assert [top["token"] for top in entry["top_logprobs"]] == ["c", "b"]
    assert (written["token_ids"], written["prompt_token_ids"]) == ([98], [1, 2])
    assert CHAT.write_chunk(Piece(0, finish_reason="stop"), False)["delta"] == {}
    assert CHAT.write_chunk(Piece(0, "x"), False)["delta"] == {"content": "x"}
    assert CHAT.opening is not None
    assert CHAT.opening(2)["delta"] == {"role": "assistant", "content": ""}


def test_what_is_impossible_has_a_number_that_json_knows() -> None:
    entry = logprob("x", float("-inf"), ("y", float("-inf")))
    (found,) = reader("a").read(0, delta("x", logprobs=(entry,))).entries
    assert (found.logprob, found.top[0][1]) == (LEAST_LOGPROB, LEAST_LOGPROB)
