"""Megatron's distributed checkpoints (`torch_dist`): one tensor for all layers and ranks, in pieces, with an index.

What ranks wrote it does not matter: the index says which part of which tensor lies where. It is read here without
Megatron and without torch.distributed, piece by piece, since both would unpickle whatever the files contain. Writing
is torch's own, in one process.
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flagscale.errors import UserError
from flagscale.sync.inert import load_inert, load_inert_pickle

COMMON = "common_state/shard_0_1"
"""the name of what belongs to no tensor: arguments, iteration"""


@dataclass(frozen=True, slots=True)
class Piece:
    """Where some bytes lie, and which part of a tensor they are; offset and size are empty for what is no tensor."""

    file: Path
    start: int
    count: int
    offset: tuple[int, ...] = ()
    size: tuple[int, ...] = ()

    def holds(self, index: tuple[int, ...]) -> bool:
        """Whether the entry at `index` of a stacked tensor is at least partly in it."""
        return all(at <= i < at + n for i, at, n in zip(index, self.offset, self.size, strict=False))


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor's shape and type, and its pieces."""

    size: tuple[int, ...]
    dtype: Any
    pieces: tuple[Piece, ...]


class TorchDistReader:
    """The tensors of the model in one folder of an iteration; the optimizer's are passed over.

    Raises:
        UserError: the folder's index cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = load_inert_pickle(folder / ".metadata")
        self._places: dict[tuple[str, tuple[int, ...]], Piece] = {}
        for key, place in index.storage_data.items():
            if getattr(place, "transform_descriptors", None):
                raise UserError(f"{folder}: `{key.fqn}` is stored transformed; expected plain tensors")
            piece = Piece(folder / Path(place.relative_path).name, place.offset, place.length)
            self._places[key.fqn, tuple(getattr(key, "offset", None) or ())] = piece
        self.tensors = {
            name: Stored(tuple(entry.size), _dtype(entry.properties), self._find_pieces(name, entry.chunks))
            for name, entry in index.state_dict_metadata.items()
            if hasattr(entry, "properties") and not name.startswith("optimizer.")
        }

    def _find_pieces(self, name: str, chunks: Iterable[Any]) -> tuple[Piece, ...]:
        pieces = []
        for chunk in chunks:
            offset, size = tuple(chunk.offsets), tuple(chunk.sizes)
            pieces.append(replace(self._places[name, offset], offset=offset, size=size))
        return tuple(pieces)

    def load_common(self) -> Mapping[str, Any]:
        """Arguments and what else belongs to no tensor.

        Raises:
            UserError: the checkpoint has none.
        """
        file = self.folder / "common.pt"
        if file.is_file():
            common = load_inert(file.read_bytes(), str(file))
        elif (COMMON, ()) in self._places:
            (common,) = self._load(self._places[COMMON, ()], COMMON)
        else:
            raise UserError(f"{self.folder}: has no common state; expected a checkpoint of Megatron")
        if not isinstance(common, Mapping):
            raise UserError(f"{self.folder}: the common state is no mapping; expected a checkpoint of Megatron")
        return common

    def load(self, name: str, index: tuple[int, ...] = ()) -> Any:
        """A tensor, or one entry of a stacked one; only the pieces that it needs are read.

        Raises:
            UserError: a piece cannot be read, or the pieces do not fill the tensor.
        """
        import torch

        stored = self.tensors[name]
        whole = torch.empty(stored.size[len(index) :], dtype=stored.dtype)
        num_filled = 0
        for piece in stored.pieces:
            if piece.holds(index):
                entry = tuple(i - at for i, at in zip(index, piece.offset, strict=False))
                part = self._load(piece, name)[entry]
                rest = piece.offset[len(index) :]
                whole[tuple(slice(at, at + n) for at, n in zip(rest, part.shape, strict=True))] = part
                num_filled += part.numel()
        if num_filled != whole.numel():
            raise UserError(f"{self.folder}: the pieces of `{name}` do not fill it")
        return whole

    def _load(self, piece: Piece, name: str) -> Any:
        try:
            with piece.file.open("rb") as file:
                file.seek(piece.start)
                data = file.read(piece.count)
        except OSError as error:
            raise UserError(f"{piece.file}: cannot be read: {error.strerror}") from error
        return load_inert(data, f"{piece.file}: `{name}`")


def _dtype(properties: Any) -> Any:
    """torch keeps these properties as a tuple that begins with the number format."""
    return properties.state[0] if hasattr(properties, "state") else properties.dtype


def write_torch_dist(folder: Path, tensors: Iterable[tuple[str, Any]], states: Iterable[str], common: Any) -> None:
    """Write whole tensors by their names in the checkpoint, and empty extra states, which Megatron's layers expect.

    What is no tensor Megatron keeps in a list of one.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save

    content = {**dict(tensors), **{state: [None] for state in states}, COMMON: [common]}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    with warnings.catch_warnings():
        # torch says that it writes in one process, as it was asked to.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(content, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
    text = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    (folder / "metadata.json").write_text(text, encoding="utf-8")
