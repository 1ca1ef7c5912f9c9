"""Token files: what goes in comes out, twice the same, and what is missing is named."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.errors import UserError
from flagscale.train.token_files import (
    END_OF_DOCUMENT,
    MAGIC,
    check_data_paths,
    encode_document,
    encode_index,
    prepare_text,
    split_documents,
)

TOOL = Path(__file__).resolve().parents[2] / "tools" / "datasets" / "prepare_text.py"
DOCUMENTS = st.lists(st.text(min_size=1).filter(lambda text: text.strip() and "\n" not in text), min_size=1, max_size=5)


def read_index(index: bytes) -> tuple[list[int], list[int], list[int]]:
    """(lengths, pointers, document bounds) by a reader of our own."""
    assert index.startswith(MAGIC)
    version, code, count, bounds = struct.unpack_from("<QBQQ", index, len(MAGIC))
    assert (version, code, bounds) == (1, 8, count + 1)
    at = len(MAGIC) + struct.calcsize("<QBQQ")
    values = struct.unpack_from(f"<{count}i{count}q{count + 1}q", index, at)
    assert len(index) == at + struct.calcsize(f"<{count}i{count}q{count + 1}q")
    return list(values[:count]), list(values[count : 2 * count]), list(values[2 * count :])


@given(st.text())
def test_a_document_is_its_bytes_and_an_end(document: str) -> None:
    encoded = encode_document(document)
    *tokens, end = struct.unpack(f"<{len(encoded) // 2}H", encoded)
    assert end == END_OF_DOCUMENT
    assert bytes(tokens).decode("utf-8") == document


@given(st.lists(st.integers(1, 10_000), max_size=20))
def test_an_index_points_at_the_beginning_of_each_document(lengths: list[int]) -> None:
    read, pointers, bounds = read_index(encode_index(lengths))
    assert read == lengths
    assert pointers == [2 * sum(lengths[:number]) for number in range(len(lengths))]
    assert bounds == list(range(len(lengths) + 1))


@given(DOCUMENTS)
def test_documents_come_back_from_the_text_they_were_joined_to(documents: list[str]) -> None:
    assert list(split_documents("\n\n\n".join(documents))) == [document + "\n" for document in documents]


def test_files_are_the_same_each_time_and_written_once(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one\n\nstill one\n\n\ntwo\n")
    prefix = tmp_path / "out" / "tokens"
    assert prepare_text([text], prefix)
    first = [(path.name, path.read_bytes()) for path in sorted(prefix.parent.iterdir())]
    assert [name for name, _content in first] == ["tokens.bin", "tokens.idx"]
    assert read_index(first[1][1])[0] == [len("one\n\nstill one\n") + 1, len("two\n") + 1]
    before = Path(f"{prefix}.bin").stat().st_mtime_ns
    assert not prepare_text([text], prefix)
    assert Path(f"{prefix}.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", [b"", b"xx"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: bytes) -> None:
    text, prefix = tmp_path / "text.txt", tmp_path / "tokens"
    text.write_text("a tale\n")
    prepare_text([text], prefix)
    good = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(damage + good[len(damage) :] if damage else damage)
    assert prepare_text([text], prefix)
    assert Path(f"{prefix}.bin").read_bytes() == good


def test_another_text_replaces_the_files(tmp_path: Path) -> None:
    text, prefix = tmp_path / "text.txt", tmp_path / "tokens"
    text.write_text("one")
    prepare_text([text], prefix)
    text.write_text("another")
    assert prepare_text([text], prefix)


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe", "not UTF-8 at byte 0"), (b" \n\n\n \n", "no text"), (None, "No such file")]
)
def test_what_cannot_be_prepared_is_said(tmp_path: Path, content: bytes | None, message: str) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare_text([text], tmp_path / "tokens")
    assert not (tmp_path / "tokens.bin").exists()


def test_missing_data_is_named_and_weights_are_not_taken_for_paths(tmp_path: Path) -> None:
    text, prefix = tmp_path / "text.txt", str(tmp_path / "tokens")
    text.write_text("a tale\n")
    prepare_text([text], Path(prefix))
    check_data_paths(["0.3", prefix, "0.7", prefix])
    check_data_paths(["s3://bucket/tokens"])
    with pytest.raises(UserError, match=r"other\.bin, .*other\.idx .*prepare_text"):
        check_data_paths([prefix, str(tmp_path / "other")])


def test_the_tool_says_what_it_did(tmp_path: Path) -> None:
    text = tmp_path / "a text.txt"
    text.write_text("a tale\n")
    words = [sys.executable, str(TOOL), "--output", str(tmp_path / "tokens"), str(text)]
    said = [subprocess.run(words, capture_output=True, text=True, check=True).stdout.split(": ")[1] for _ in range(2)]
    assert said == ["prepared\n", "already prepared\n"]
    ran = subprocess.run([*words, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == f"error: {tmp_path / 'none'}: No such file or directory\n"
