"""int8 linear layers: the error is bounded by the scales, answers stay near, weights are replaced as any others."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine_adapters import make_tensors  # noqa: E402
from engine_models import FAMILIES, make_model, true_logprobs  # noqa: E402

from flagscale.errors import ConfigError, UserError  # noqa: E402
from flagscale.inference.engine import Engine, EngineConfig, SamplingParams  # noqa: E402
from flagscale.inference.engine.int8 import Int8Linear, quantise, quantise_linears  # noqa: E402
from flagscale.inference.server.disk_weights import read_weights  # noqa: E402

INT8 = EngineConfig(quantization="int8")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
SEEN = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0)


def num_bytes(model: Any) -> int:
    return sum(each.nbytes for each in model.state_dict().values())


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 24), st.integers(-20, 20), st.integers(0, 10**6))
def test_the_error_is_bounded_by_the_scales(rows: int, inputs: int, outputs: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(inputs, outputs)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(outputs, inputs, generator=generator))
    x = torch.randn(rows, inputs, generator=generator) * 2.0**size
    x[0] = 0
    layer = Int8Linear(linear)
    with torch.no_grad():
        error = (layer(x) - linear(x)).abs()
    kept = layer.weight.float() * layer.weight_scale[:, None]
    _, token_scales = quantise(x)
    bound = x.abs().sum(-1, keepdim=True) * layer.weight_scale / 2 + token_scales / 2 * kept.abs().sum(-1)
    assert bool((error <= bound * 1.001 + linear.bias.detach().abs() * 1e-5).all())
    assert bool((kept - linear.weight).abs().le(layer.weight_scale[:, None] * 0.5001).all())


def test_a_layer_of_one_input_is_right_too() -> None:
    linear = torch.nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0], [-2.0], [4.0]]))
        torch.testing.assert_close(
            Int8Linear(linear)(torch.tensor([[3.0], [-1.0]])), linear(torch.tensor([[3.0], [-1.0]]))
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_near_and_the_model_is_smaller(family: str) -> None:
    model = make_model(family, initializer_range=0.1)
    before, exact = num_bytes(model), true_logprobs(model, PROMPT)
    engine = Engine(model, config=INT8)
    (told,) = engine.generate([PROMPT], SEEN)
    for at, entry in enumerate(told.prompt_logprobs):
        assert entry.logprob == pytest.approx(float(exact[at, PROMPT[at + 1]]), abs=0.1)
    small = [each for each in engine.model.modules() if isinstance(each, Int8Linear)]
    saved = sum(3 * each.weight.nbytes - each.weight_scale.nbytes for each in small)
    assert num_bytes(engine.model) == before - saved < before
    assert isinstance(engine.model.get_output_embeddings(), torch.nn.Linear)


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "deepseek_v3"])
def test_new_weights_give_what_a_fresh_engine_gives(family: str, tmp_path: Path) -> None:
    engine, fresh = Engine(make_model(family, 0), config=INT8), Engine(make_model(family, 1), config=INT8)
    make_model(family, 1).save_pretrained(tmp_path)
    places = {name: each.data_ptr() for name, each in engine.model.state_dict().items()}
    engine.update_weights(1, read_weights(tmp_path, engine.model))
    assert {name: each.data_ptr() for name, each in engine.model.state_dict().items()} == places
    assert engine.generate([PROMPT], SEEN)[0].prompt_logprobs == fresh.generate([PROMPT], SEEN)[0].prompt_logprobs


def test_an_update_that_does_not_fit_changes_nothing() -> None:
    engine = Engine(make_model(), config=INT8)
    before = {name: each.clone() for name, each in engine.model.state_dict().items()}
    update = {**make_model(seed=1).state_dict(), "model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}
    with pytest.raises(ConfigError, match=r"q_proj.weight: shape \[2, 2\]; expected \[64, 32\]"):
        engine.update_weights(1, update)
    assert all(torch.equal(each, before[name]) for name, each in engine.model.state_dict().items())


def test_adapters_run_over_int8() -> None:
    engine = Engine(make_model(initializer_range=0.1), config=INT8)
    exact = Engine(make_model(initializer_range=0.1))
    for each in (engine, exact):
        each.load_adapter("a", make_tensors(), {"r": 2, "lora_alpha": 8})
    (near,), (true,), (base,) = (
        engine.generate([PROMPT], SEEN, "a"),
        exact.generate([PROMPT], SEEN, "a"),
        exact.generate([PROMPT], SEEN),
    )
    told = [[entry.logprob for entry in each.prompt_logprobs] for each in (near, true, base)]
    assert told[0] == pytest.approx(told[1], abs=0.1)
    assert told[1] != pytest.approx(told[2], abs=0.01)


def test_int8_is_refused_where_it_does_not_run() -> None:
    with pytest.raises(ConfigError, match=r"engine.quantization: `int4`; expected int8"):
        EngineConfig(quantization="int4")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="int8 runs on a CPU, and the model is on `meta`"):
        quantise_linears(make_model().to("meta"))
