"""The model: any causal language model of transformers, fed a flat list of tokens.

What a layer keeps of a token is not read from the configuration, whose names differ by architecture, but seen in one
tiny run of the model itself. A model whose layers do not all come by that way, recurrent ones for example, is refused
there.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flagscale.errors import UserError
from flagscale.inference.engine.adapters import AdapterSpan, AdapterTable
from flagscale.inference.engine.attention import (
    NAME,
    Attend,
    Span,
    find_costs,
    make_plan,
    probe_layers,
    register,
    sort_key,
)
from flagscale.inference.engine.config import EngineConfig
from flagscale.inference.engine.int8 import quantise_linears
from flagscale.inference.engine.kv_cache import KVCache, LayerShape, plan_num_pages
from flagscale.inference.engine.linear import put_weights_first
from flagscale.inference.engine.scheduler import Chunk
from flagscale.inference.engine.staging import stage

# These change the angles of all tokens with the longest text in the batch.
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


def load_model(folder: "str | Path", dtype: "torch.dtype | str" = "auto", device: str = "cpu") -> Any:
    """The model in a folder of configuration and safetensors files.

    On a CPU the weights are the mapped files themselves: nothing is copied until it is written to, and then only in
    this process. A file that is overwritten in place changes under the model; one that is replaced does not.

    Raises:
        UserError: there is no such model.
    """
    from transformers import AutoModelForCausalLM

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; expected a folder with a model in the format of transformers")
    register()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=NAME, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {error}") from error
    return model.to(device)


class ModelRunner:
    """Runs chunks through a model, and owns the cache that they read and write."""

    def __init__(self, model: Any, config: EngineConfig) -> None:
        register()
        self.model = model.eval()
        self.model.set_attn_implementation(NAME)
        put_weights_first(model)
        if config.quantization == "int8":
            quantise_linears(model)
        self.text_config = model.config.get_text_config()
        _check_rope(self.text_config)
        self.device: torch.device = model.device
        self.layers = _probe(model)
        self.adapters = AdapterTable(model, config.adapter_bytes)
        self._page_size = config.page_size
        self.num_pages = plan_num_pages(self.layers, config.page_size, model.dtype.itemsize, config.kv_cache_bytes)
        self.cache: KVCache | None = None
        self.allocate()

    def allocate(self) -> None:
        if self.cache is None:
            self.cache = KVCache(self.layers, self.num_pages, self._page_size, self.model.dtype, self.device)

    def free(self) -> None:
        """Give the memory of the cache back."""
        self.cache = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forward(self, chunks: Sequence[Chunk], wanted: Sequence[range]) -> list[torch.Tensor]:
        """For each chunk the float32 logits [positions, vocabulary] after those of its positions that are `wanted`."""
        assert self.cache is not None
        whole = [Span(0, each.start, each.count, tuple(each.sample.pages), each.sample.num_cached) for each in chunks]
        costs = find_costs(self.device)
        order = sorted(range(len(chunks)), key=lambda i: sort_key(whole[i], costs))
        spans: list[Span] = []
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        adapted: list[AdapterSpan] = []
        for i in order:
            chunk = chunks[i]
            adapted.append(
                AdapterSpan(chunk.sample.request.adapter, len(tokens), chunk.count, len(rows), len(wanted[i]))
            )
            rows.extend(at - chunk.start + len(tokens) for at in wanted[i])
            spans.append(replace(whole[i], row=len(tokens)))
            tokens.extend(chunk.sample.tokens[chunk.start : chunk.stop])
            positions.extend(range(chunk.start, chunk.stop))
        plan = make_plan(spans, self.cache, self.device)
        with self.adapters.step(adapted):
            logits = self._run(tokens, positions, rows or [0], plan)[: len(rows)]
        parts = dict(zip(order, logits.split([len(wanted[i]) for i in order]), strict=True))
        return [parts[i] for i in range(len(chunks))]

    def _run(self, tokens: list[int], positions: list[int], rows: list[int], plan: Attend) -> torch.Tensor:
        ids, at, kept = (stage(each, self.device) for each in (tokens, positions, rows))
        out = self.model(input_ids=ids[None], position_ids=at[None], use_cache=False, logits_to_keep=kept, paged=plan)
        logits: torch.Tensor = out.logits[0].float()
        return logits


def _check_rope(text_config: Any) -> None:
    parameters = getattr(text_config, "rope_parameters", None) or {}
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    for each in (parameters, *nested):
        if each.get("rope_type") in BATCH_DEPENDENT_ROPE:
            message = f"rope_type `{each['rope_type']}` changes with the longest text in a batch"
            raise UserError(f"{message}; expected one that depends on positions alone, as `yarn` or `llama3`")


def _probe(model: Any) -> tuple[LayerShape, ...]:
    """What each layer keeps of a token.

    Raises:
        UserError: not every layer keeps keys and values through the attention interface.
    """
    layers = probe_layers(model)
    num_layers = model.config.get_text_config().num_hidden_layers
    if sorted(layers) != list(range(num_layers)):
        message = (
            f"{type(model).__name__}: {len(layers)} of {num_layers} layers attend through transformers' attention "
            "interface"
        )
        raise UserError(f"{message}; the engine runs models whose layers all do")
    return tuple(layers[i] for i in range(num_layers))
