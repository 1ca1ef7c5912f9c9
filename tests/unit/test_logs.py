"""Reading files that grow."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.runner.launch.journal import read_tail
from flagscale.runner.monitor.logs import Tail, follow_lines


@settings(max_examples=50)
@given(st.lists(st.text(alphabet="ab\n€", max_size=8), max_size=8))
def test_lines_are_the_same_however_they_arrive(chunks: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "output")
        tail, seen = Tail(path), []
        for chunk in chunks:
            with path.open("ab") as file:
                file.write(chunk.encode())
            seen += tail.read_lines()
        seen += tail.read_rest()
    text = "".join(chunks)
    assert seen == [line for number, line in enumerate(text.split("\n")) if line or number < text.count("\n")]


def test_a_part_of_a_file_is_read_from_its_start_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "output"
    path.write_bytes(b"old\nmine\nmine too\nlater\n")
    assert list(Tail(path, 4, 18).read_lines()) == ["mine", "mine too"]
    assert list(Tail(tmp_path / "missing").read_lines()) == []


def test_following_ends_with_what_was_left_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "output"
    path.write_text("one\ntw")
    answers = iter([False, True])

    def has_ended() -> bool:
        is_last = next(answers)
        if is_last:
            with path.open("a") as file:
                file.write("o\nthree")
        return is_last

    tail = Tail(path)
    assert [line for _, line in follow_lines([tail], has_ended)] == ["one", "two", "three"]


def test_the_tail_of_a_part(tmp_path: Path) -> None:
    path = tmp_path / "output"
    path.write_text("a\nb\nc\n")
    assert read_tail(path) == "a\nb\nc\n"
    assert read_tail(path, start=4) == "c\n"
    assert read_tail(path, end=4, window=2) == "b\n"
    assert (read_tail(path, start=9), read_tail(path, 4, 2), read_tail(path, end=99)) == ("", "", "a\nb\nc\n")
    assert read_tail(tmp_path / "missing") == ""
