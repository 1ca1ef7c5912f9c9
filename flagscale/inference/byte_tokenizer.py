"""A tokenizer whose tokens are the bytes of a text, in the format of transformers.

It belongs to models trained on the token files of `flagscale.train.token_files`: 256 bytes and the end of a document.
Nothing is downloaded or learned: a byte-level vocabulary without merges is a table. The chat template is plain text,
since the vocabulary has no tokens to mark turns with.
"""

import json
from pathlib import Path
from typing import Any

from flagscale.train.token_files import END_OF_DOCUMENT

END_TEXT = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_alphabet() -> tuple[str, ...]:
    """The printable character that byte-level tokenizers write for each byte: itself where it is printable, else one
    from U+0100 on, in order. Source: the byte table of GPT-2's tokenizer."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def _tokenizer_json() -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {
        "id": END_OF_DOCUMENT, "content": END_TEXT, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip
    vocabulary = {letter: byte for byte, letter in enumerate(byte_alphabet())}
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": vocabulary, "merges": [],
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model,
    }  # fmt: skip


def write_byte_tokenizer(folder: Path, max_len: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` into a model's folder."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_TEXT, "pad_token": END_TEXT,
        "model_max_length": max_len, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer_json(), ensure_ascii=False, indent=1) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
