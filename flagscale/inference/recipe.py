"""A model folder out of nothing, for machines where nothing was trained yet.

A Llama over bytes, smaller than the example `tiny`, trained for some seconds on the example's text or left random:
enough to serve, to stream and to measure with, and small enough to be made where it is needed. The same arguments make
the same weights on the same machine with the same number of threads.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from flagscale.env import root_dir
from flagscale.errors import UserError
from flagscale.inference.byte_tokenizer import write_byte_tokenizer
from flagscale.train.token_files import END_OF_DOCUMENT, VOCAB_SIZE, split_documents

MAX_LEN = 1024
TEXT = "examples/tiny/data/text.txt"
BATCH, PIECE = 8, 128
"""pieces in a step of training, and bytes in a piece"""


def make_tiny_model(dst: Path, *, steps: int = 80, seed: int = 1234) -> Path:
    """Write a tiny Llama over bytes, its tokenizer and chat template into `dst`, and return it.

    steps: of training; 0 leaves the model random

    Raises:
        UserError: `dst` exists and is not an empty folder.
    """
    import torch

    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise UserError(f"{dst}: is not empty; expected a folder that does not exist yet")
    dst.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _make_model()
        if steps:
            _train(model, steps)
    part = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.parent))
    try:
        model.save_pretrained(part)
        write_byte_tokenizer(part, MAX_LEN)
        part.chmod(0o755)
        part.rename(dst)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return dst


def _make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LEN,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END_OF_DOCUMENT,
        pad_token_id=END_OF_DOCUMENT,
    )
    return LlamaForCausalLM(config)


def _train(model: Any, steps: int) -> None:
    """AdamW with a rate that falls to nothing, on pieces drawn anywhere from the documents laid end to end."""
    import torch

    text = (root_dir() / TEXT).read_text(encoding="utf-8")
    tokens = torch.tensor([token for each in split_documents(text) for token in (*each.encode(), END_OF_DOCUMENT)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps + 1)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(tokens) - PIECE, (BATCH,))
        batch = torch.stack([tokens[at : at + PIECE] for at in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
