"""Make the model that `flagscale serve tiny` serves: the newest checkpoint of `flagscale train tiny`, converted; where
nobody has trained one yet, a model of the same shape that has learned nothing.

    python tools/tiny_model.py --checkpoints outputs/tiny/checkpoints outputs/tiny_serve/model

What is there and up to date is left as it is, so that every replica may run this before it starts.
"""

import argparse
import fcntl
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flagscale.errors import FlagScaleError, UserError
from flagscale.inference.byte_tokenizer import write_byte_tokenizer
from flagscale.sync.checkpoint import TRACKER, convert
from flagscale.train.token_files import END_OF_DOCUMENT, VOCAB_SIZE

ORIGIN = "origin.txt"
"""what a folder was made from; one without it was not made here"""
UNTRAINED = "untrained"
MAX_LEN = 1024
"""tokens of one text; the positions are rotary, and a model may be used beyond what it was trained on"""
SHAPE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": MAX_LEN, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": END_OF_DOCUMENT,
}  # fmt: skip
"""that of examples/tiny/conf/train/tiny.yaml"""


def find_origin(checkpoints: Path) -> str:
    """The newest checkpoint's name, or `untrained`."""
    try:
        return f"iteration {(checkpoints / TRACKER).read_text().strip()}"
    except OSError:
        return UNTRAINED


def make_untrained(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(folder)
    write_byte_tokenizer(folder, MAX_LEN)


def make_model(checkpoints: Path, folder: Path) -> str:
    """Make the folder if it is not there or not of the newest checkpoint; returns what it was made from.

    Raises:
        UserError: the folder holds something else, or the checkpoint cannot be converted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        origin = find_origin(checkpoints)
        if folder.exists():
            if not (folder / ORIGIN).is_file():
                raise UserError(f"{folder}: was not made by this tool; expected a folder that does not exist yet")
            if (folder / ORIGIN).read_text() == origin:
                return origin
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        if origin == UNTRAINED:
            make_untrained(part)
        else:
            convert(checkpoints, part, to="hf")
        (part / ORIGIN).write_text(origin)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        return origin


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the model that `flagscale serve tiny` serves.")
    parser.add_argument("--checkpoints", type=Path, required=True, help="where `flagscale train tiny` leaves its own")
    parser.add_argument("folder", type=Path, help="the model's folder")
    args = parser.parse_args()
    try:
        print(f"{args.folder}: {make_model(args.checkpoints, args.folder)}")
    except FlagScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
