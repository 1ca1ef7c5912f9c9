"""Text into the token files that Megatron trains on, and a check that such files are there.

The tokens are the bytes of the text: a vocabulary that needs no download and no training, that Megatron's NullTokenizer
describes with a size and an end-of-document id, and that a model of a few million parameters learns quickly. For a real
model use a real tokenizer; the files are the same.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from flagscale.errors import UserError

END_OF_DOCUMENT = 256
"""The token after each document: the first that no byte can be."""

VOCAB_SIZE = END_OF_DOCUMENT + 1

MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
UINT16_CODE = 8
"""The number by which an index says that its tokens are unsigned 16-bit integers."""


def split_documents(text: str, separator: str = "\n\n\n") -> Iterator[str]:
    """The documents of a text, without those that hold nothing but white space."""
    return (document.strip("\n") + "\n" for document in text.split(separator) if document.strip())


def encode_document(document: str) -> bytes:
    """A document as little-endian 16-bit tokens, ended by END_OF_DOCUMENT."""
    tokens = [*document.encode("utf-8"), END_OF_DOCUMENT]
    return struct.pack(f"<{len(tokens)}H", *tokens)


def encode_index(lengths: Sequence[int]) -> bytes:
    """The `.idx` file of documents of these token counts, each one sequence: all integers little-endian.

    Its parts: magic, version, token type, number of sequences and of document bounds, the lengths (int32), where each
    sequence begins in the `.bin` file (int64, bytes), and the document bounds (int64).
    """
    pointers, at = [], 0
    for length in lengths:
        pointers.append(at)
        at += 2 * length
    count = len(lengths)
    head = MAGIC + struct.pack("<QBQQ", INDEX_VERSION, UINT16_CODE, count, count + 1)
    bounds = range(count + 1)
    return head + struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *pointers, *bounds)


def _replace_file(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def prepare_text(paths: Iterable[Path], prefix: Path) -> bool:
    """Write `<prefix>.bin` and `<prefix>.idx` from UTF-8 text files, in the order given.

    Files that hold what they would be given are left alone. Each is replaced in one step, the index last, so a run that
    was cut off is simply done again.

    Returns:
        True if files were written, False if they were already prepared.

    Raises:
        UserError: a file cannot be read, is not UTF-8, or there is no text in any of them.
    """
    documents: list[str] = []
    for path in paths:
        try:
            documents += split_documents(path.read_bytes().decode("utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    if not documents:
        raise UserError("there is no text in any of the files")
    encoded = [encode_document(document) for document in documents]
    tokens, index = b"".join(encoded), encode_index([len(document) // 2 for document in encoded])
    files = {prefix.with_name(prefix.name + suffix): data for suffix, data in ((".bin", tokens), (".idx", index))}
    if all(_holds(path, data) for path, data in files.items()):
        return False
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        _replace_file(path, data)
    return True


def check_data_paths(words: Sequence[str]) -> None:
    """Check that every data prefix among `words` (prefixes, or weights and prefixes in turn) has both of its files.

    Raises:
        UserError: names each file that is not there.
    """
    prefixes = [word for word in words if not _is_number(word) and "://" not in word]
    missing = [name for prefix in prefixes for name in (prefix + ".bin", prefix + ".idx") if not Path(name).is_file()]
    if missing:
        raise UserError(
            f"data_path: no such file: {', '.join(missing)} (looked in {Path.cwd()}); "
            "make them from text with `python tools/datasets/prepare_text.py`"
        )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
