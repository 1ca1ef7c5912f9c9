"""LoRA adapters in PEFT's format: what is in the files becomes low-rank layers, or every reason why it cannot.

The tensors say which layers an adapter changes, the configuration only how strongly. What would change an answer and is
not done here (whole layers saved beside, other kinds of adapters) is refused by name: an adapter that is applied in
part is a wrong model.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flagscale.errors import ConfigError, Fault, UserError, find_nearest
from flagscale.inference.engine.weights import Tensors

REFUSED = (
    "use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config",
    "fan_in_fan_out",
)  # fmt: skip
"""settings of PEFT that change what is computed"""
HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")
"""of `init_lora_weights`: all other names rewrite the model's own weights before training"""
BASE = ".base_layer.weight"
PREFIX = "base_model.model."
TENSOR = re.compile(r"(?P<layer>.+)\.lora_(?P<half>[AB])(\.default)?\.weight")


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to one layer: `x @ down @ up`; down is [inputs, rank], up is [rank, outputs] and scaled."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What an adapter's folder holds."""

    path: str
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]


def read_adapter(folder: "str | Path") -> AdapterFiles:
    """The mapped tensors and the configuration in an adapter's folder.

    Raises:
        UserError: there is no adapter, or one of its files cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, weights = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise UserError(f"{folder}: no {file.name}; expected a folder with an adapter in PEFT's format")
    try:
        settings, tensors = json.loads(config.read_text(encoding="utf-8")), load_file(weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{config}: expected a JSON object")
    return AdapterFiles(str(folder), tensors, settings)


def plan_layers(
    model: Any, linears: Mapping[str, Any], tensors: Tensors, config: Mapping[str, Any]
) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """(A [rank, inputs], B [outputs, rank], scale) for each layer that an adapter changes.

    `linears` are the layers of `model` that an adapter may change.

    Raises:
        ConfigError: settings, names or shapes that cannot be applied; all of them at once.
    """
    faults = list(_find_config_faults(config))
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        name = name.removeprefix(PREFIX)
        match = TENSOR.fullmatch(name)
        if name.endswith(BASE) and (layer := name.removesuffix(BASE)) in linears:
            # PEFT saves the output head itself beside what it adapts of it.
            if not torch.equal(linears[layer].weight, tensor.to(linears[layer].weight)):
                faults.append(Fault(f"adapter.{name}", "is not the weight that the model has"))
        elif match is None:
            faults.append(Fault(f"adapter.{name}", "is no part of a LoRA layer", "lora_A.weight and lora_B.weight"))
        else:
            halves.setdefault(match["layer"], {})[match["half"]] = tensor
    if not halves:
        faults.append(Fault("adapter", "has no LoRA layers"))
    planned = {}
    for layer, pair in halves.items():
        found = list(_find_layer_faults(model, linears, layer, pair))
        faults.extend(found)
        if not found and not faults:
            rank, scale = _strength(config, layer)
            planned[layer] = (pair["A"], pair["B"], scale)
            if len(pair["A"]) != rank:
                faults.append(Fault(f"adapter.{layer}", f"rank {len(pair['A'])}", f"{rank}, as its configuration has"))
    if faults:
        raise ConfigError(faults)
    return planned


def _find_config_faults(config: Mapping[str, Any]) -> Iterator[Fault]:
    if config.get("peft_type", "LORA") != "LORA":
        yield Fault("adapter.peft_type", f"`{config['peft_type']}`", "LORA")
    for name in REFUSED:
        if config.get(name):
            yield Fault(f"adapter.{name}", f"`{config[name]}` is not supported", "an adapter without it")
    if config.get("bias", "none") != "none":
        yield Fault("adapter.bias", f"`{config['bias']}`", "none")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in HARMLESS_STARTS:
        message = f"`{start}` also changed the model's own weights"
        yield Fault("adapter.init_lora_weights", message, "an adapter that was converted to plain LoRA")
    if not _is_positive(config.get("r"), int):
        yield Fault("adapter.r", f"{config.get('r')!r}", "a whole number of at least 1")
    if not _is_positive(config.get("lora_alpha", 8), (int, float)):
        yield Fault("adapter.lora_alpha", f"{config['lora_alpha']!r}", "a number above 0")
    for name, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        for pattern, value in (config.get(name) or {}).items():
            if not _is_positive(value, kind):
                yield Fault(f"adapter.{name}.{pattern}", f"{value!r}", "a number above 0")
            try:
                re.compile(pattern)
            except re.error as error:
                yield Fault(f"adapter.{name}.{pattern}", f"is no regular expression: {error}")


def _is_positive(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


def _find_layer_faults(
    model: Any, linears: Mapping[str, Any], layer: str, pair: Mapping[str, torch.Tensor]
) -> Iterator[Fault]:
    place = f"adapter.{layer}"
    linear = linears.get(layer)
    if linear is None:
        found = dict(model.named_modules()).get(layer)
        if found is None:
            yield Fault(place, "the model has no such layer", suggestion=find_nearest(layer, linears))
        else:
            expected = "a linear layer that all tokens go through"
            yield Fault(place, f"a {type(found).__name__} cannot be adapted", expected)
        return
    if missing := {"A", "B"} - pair.keys():
        yield Fault(place, f"has no lora_{missing.pop()}.weight")
        return
    down, up = pair["A"], pair["B"]
    rank = down.shape[0] if down.ndim == 2 else "rank"
    for half, tensor, shape in (
        ("A", down, [rank, linear.in_features]),
        ("B", up, [linear.out_features, rank]),
    ):
        if list(tensor.shape) != shape:
            yield Fault(f"{place}.lora_{half}", f"shape {list(tensor.shape)}", f"{shape}")
        elif not tensor.is_floating_point():
            yield Fault(f"{place}.lora_{half}", f"type {tensor.dtype}", "floating point")


def _strength(config: Mapping[str, Any], layer: str) -> tuple[int, float]:
    """(rank, scale) of a layer, by PEFT's rules: the first pattern that the end of its name matches decides."""

    def find(name: str, default: Any) -> Any:
        patterns = config.get(name) or {}
        return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), default)

    rank = find("rank_pattern", config["r"])
    alpha = find("alpha_pattern", config.get("lora_alpha", 8))
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)
