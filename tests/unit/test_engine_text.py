"""Text streams over a toy decoder whose tokens are bytes: half characters are the rule."""

import pytest

from flagscale.inference.engine.text import TextStream


class Bytes:
    """Token = byte; what is not yet a character shows as U+FFFD."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        assert skip_special_tokens
        return bytes(token_ids).decode(errors="replace")


def pieces(text: str | bytes, stop: tuple[str, ...] = (), include_stop: bool = False) -> list[str]:
    stream = TextStream(Bytes(), stop, include_stop)
    found = []
    for token in text if isinstance(text, bytes) else text.encode():
        found.append(stream.add([token]))
        if stream.stop_match is not None:
            break
    return [*found, stream.flush()]


def test_half_characters_wait_for_their_other_half() -> None:
    assert pieces("a€b") == ["a", "", "", "€", "b", ""]


def test_what_never_becomes_a_character_comes_at_the_end() -> None:
    assert "".join(pieces(b"ok" + b"\xe2\x82")) == "ok\N{REPLACEMENT CHARACTER}"


def test_the_pieces_are_the_text() -> None:
    text = "Grüße, 世界 🌍!"
    assert "".join(pieces(text)) == text


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("aaab", ("aab",), "a"),
        ("abcabd", ("abd",), "abc"),
        ("nothing", ("else",), "nothing"),
        ("almost el", ("else",), "almost el"),
        ("both", ("bo", "both"), ""),
    ],
)
def test_a_stop_text_ends_the_text_before_itself(text: str, stop: tuple[str, ...], kept: str) -> None:
    assert "".join(pieces(text, stop)) == kept


def test_a_stop_text_can_be_kept() -> None:
    assert "".join(pieces("one two three", ("two",), include_stop=True)) == "one two"


def test_what_may_become_a_stop_text_is_held_back() -> None:
    assert pieces("xabyabc", ("abc",)) == ["x", "", "", "aby", "", "", "", ""]


def test_nothing_comes_after_a_stop() -> None:
    stream = TextStream(Bytes(), ("b",))
    assert stream.add(list(b"abc")) == "a"
    assert stream.stop_match == "b"
    assert stream.flush() == ""


def test_without_a_decoder_there_is_no_text() -> None:
    stream = TextStream(None)
    assert stream.add([1, 2]) == ""
    assert stream.flush() == ""
