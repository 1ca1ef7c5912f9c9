"""Folders of transformers: `config.json`, safetensors files with their index, tokenizer and generation settings."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flagscale.errors import UserError

MAX_FILE_BYTES = 5 * 10**9
"""of tensors in one file of a large model"""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def load_config(folder: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: there is none, or it is no JSON object.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: expected a JSON object")
    return config


class HfReader:
    """The tensors in the safetensors files of a folder.

    Raises:
        UserError: there are none, or one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder}: no *.safetensors file; expected a model in the format of transformers")
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                opened: Any = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: cannot be read: {error}") from error
            self._files.update(dict.fromkeys(opened.keys(), opened))

    @property
    def sizes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def load(self, name: str) -> Any:
        return self._files[name].get_tensor(name)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Any]]) -> None:
    """Write tensors as they come, in one file, or in several with an index where they are large."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    batch: dict[str, Any] = {}
    num_bytes = total = 0

    def flush() -> None:
        save_file(batch, folder / f"part-{len(shards)}", {"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    for name, tensor in tensors:
        if batch and num_bytes + tensor.nbytes > MAX_FILE_BYTES:
            flush()
            num_bytes = 0
        batch[name] = tensor
        num_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (folder / f"part-{i}").rename(folder / name)
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(src: Path, dst: Path) -> int:
    """Copy what belongs to a tokenizer, and return how many files that were."""
    found = [src / name for name in TOKENIZER_FILES if (src / name).is_file()]
    for file in found:
        shutil.copy2(file, dst / file.name)
    return len(found)
