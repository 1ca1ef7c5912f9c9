"""Reading torch's files without running what is in them.

A pickle may name any function of the machine. Here every name that torch does not know to be harmless becomes `Inert`:
an object that keeps what it was given and does nothing. So a checkpoint can be read without the package that wrote it,
and whoever wrote it.
"""

import io
import pickle
from pathlib import Path
from typing import Any

from flagscale.errors import UserError


class Inert:
    """Stands for an object of a class that is not looked for; its state is in its attributes."""

    def __new__(cls, *_args: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {"state": state})


def load_inert(data: bytes, where: str) -> Any:
    """What torch.save wrote, with `Inert` for all that is more than tensors, numbers, texts and collections.

    Raises:
        UserError: it is no file of torch's, or asks for more than making objects.
    """
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    try:
        # torch takes a class under any name, though its types say otherwise.
        names: list[Any] = [(Inert, name) for name in get_unsafe_globals_in_checkpoint(io.BytesIO(data))]
        with safe_globals(names):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{where}: cannot be read: it is damaged, or holds more than data") from error
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"{where}: cannot be read: {error}") from error


class _InertUnpickler(pickle.Unpickler):
    """Makes nothing but `Inert`, shapes and number formats: what else a pickle names, it does not get."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        found = getattr(torch, name, None) if module == "torch" else None
        return found if found is torch.Size or isinstance(found, torch.dtype) else Inert


def load_inert_pickle(path: Path) -> Any:
    """The same for a bare pickle, which torch's distributed checkpoints keep their index in.

    Raises:
        UserError: it cannot be read so.
    """
    try:
        with path.open("rb") as file:
            return _InertUnpickler(file).load()
    except Exception as error:  # as above
        raise UserError(f"{path}: cannot be read: {error}") from error
