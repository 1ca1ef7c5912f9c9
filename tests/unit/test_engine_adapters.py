"""LoRA adapters: each gives what PEFT gives, whatever shares the batch, and nothing is loaded or dropped by half."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from engine_adapters import make_adapted, make_tensors, save_adapter  # noqa: E402
from engine_models import make_model, true_greedy, true_logprobs  # noqa: E402

from flagscale.errors import ConfigError, UserError  # noqa: E402
from flagscale.inference.engine import AsyncEngine, Engine, EngineConfig, OutputSum, SamplingParams  # noqa: E402

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [3, 1, 4, 1, 5, 9, 2, 7, 7]]
GREEDY = SamplingParams(temperature=0, max_tokens=6, logprobs=0)
CONFIG = {"r": 2, "lora_alpha": 4}
QUERY = "model.layers.0.self_attn.q_proj"


def tokens_of(engine: Engine, prompt: Any, adapter: str | None = None) -> tuple[int, ...]:
    (told,) = engine.generate([prompt], GREEDY, adapter)
    return told.completions[0].token_ids


def run_together(engine: Engine, asked: list[tuple[list[int], str | None]]) -> list[Any]:
    sums = {}
    for i, (prompt, adapter) in enumerate(asked):
        engine.add_request(prompt, GREEDY, str(i), adapter)
        sums[str(i)] = OutputSum(str(i), prompt, 1)
    while engine.has_work:
        for delta in engine.step():
            sums[delta.request_id].add(delta)
    return [each.total().completions[0] for each in sums.values()]


@pytest.mark.parametrize("family", ["qwen3", "llama", "mixtral", "qwen3_moe"])
def test_each_adapter_gives_what_peft_gives_alone_and_in_one_batch(family: str, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["v_proj"]}]
    models = {None: make_model(family)}
    engine = Engine(make_model(family), config=EngineConfig(page_size=4))
    for i, each in enumerate(settings):
        engine.load_adapter(f"a{i}", save_adapter(tmp_path / str(i), family, i, **each))
        models[f"a{i}"] = make_adapted(family, i, **each)
    asked = [(prompt, adapter) for prompt in PROMPTS for adapter in models]
    together = run_together(engine, asked)
    for (prompt, adapter), told in zip(asked, together, strict=True):
        assert list(told.token_ids) == true_greedy(models[adapter], prompt, 6)
        exact = true_logprobs(models[adapter], [*prompt, *told.token_ids])
        for at, (token, entry) in enumerate(zip(told.token_ids, told.logprobs, strict=True)):
            assert entry.logprob == pytest.approx(float(exact[len(prompt) - 1 + at, token]), abs=1e-4)
        assert tokens_of(engine, prompt, adapter) == told.token_ids
    assert len({told.token_ids for told in together[:3]}) == 3


def test_patterns_the_head_and_the_dense_layers_are_adapted_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "target_modules": ["q_proj", "up_proj", "down_proj", "lm_head"],
        "rank_pattern": {"up_proj": 2, "layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {r".*\.0\.mlp.up_proj": 3},
    }
    engine = Engine(make_model("llama"))
    engine.load_adapter("a", save_adapter(tmp_path, "llama", 5, **settings))
    model = make_adapted("llama", 5, **settings)
    together = run_together(engine, [(PROMPTS[0], None), (PROMPTS[1], "a"), (PROMPTS[2], None), (PROMPTS[0], "a")])
    assert list(together[1].token_ids) == true_greedy(model, PROMPTS[1], 6)
    assert list(together[3].token_ids) == true_greedy(model, PROMPTS[0], 6)
    assert list(together[2].token_ids) == true_greedy(make_model("llama"), PROMPTS[2], 6)


def test_a_request_without_an_adapter_gets_the_same_bits_as_if_there_were_none() -> None:
    def logprobs(with_adapter: str | None, loads: bool) -> list[float]:
        engine = Engine(make_model())
        if loads:
            engine.load_adapter("a", make_tensors(), CONFIG)
        told = run_together(engine, [(PROMPTS[0], None), (PROMPTS[1], with_adapter), (PROMPTS[2], None)])
        return [entry.logprob for i in (0, 2) for entry in told[i].logprobs]

    plain = logprobs(None, loads=False)
    assert logprobs(None, loads=True) == plain
    assert logprobs("a", loads=True) == plain


def test_pages_are_found_by_the_same_load_of_the_same_adapter_only() -> None:
    engine = Engine(make_model(), config=EngineConfig(page_size=4))
    prompt = PROMPTS[0] * 2

    def cached(adapter: str | None) -> int:
        (told,) = engine.generate([prompt], GREEDY, adapter)
        return told.num_cached_tokens

    engine.load_adapter("a", make_tensors(1), CONFIG, version="same")
    engine.load_adapter("b", make_tensors(1), CONFIG, version="same")
    assert [cached(each) for each in (None, "a", "b")] == [0, 0, 0]
    assert [cached(each) for each in (None, "a", "b")] == [16, 16, 16]
    engine.load_adapter("a", make_tensors(1), CONFIG, version="same")
    assert [cached(each) for each in (None, "a", "b")] == [16, 0, 16]


def test_a_replaced_adapter_takes_effect_between_steps_and_tells_its_version() -> None:
    engine, fresh = Engine(make_model(), config=EngineConfig(page_size=4)), Engine(make_model())
    old, new = make_tensors(1, size=1.0), make_tensors(2, size=1.0)
    engine.load_adapter("a", old, CONFIG, version="old")
    fresh.load_adapter("a", new, CONFIG)
    total = OutputSum("r", PROMPTS[0], 1)
    engine.add_request(PROMPTS[0], GREEDY, "r", "a")
    engine.add_request(PROMPTS[1], GREEDY, "base")
    for step in range(12):
        if step == 3:
            engine.load_adapter("a", new, CONFIG, version="new")
        for delta in engine.step():
            if delta.request_id == "r":
                total.add(delta)
    told = total.total().completions[0]
    assert told.adapter_versions == ((0, "old"), (3, "new"))
    assert told.versions == ((0, 0),)
    (rest,) = fresh.generate([[*PROMPTS[0], *told.token_ids[:3]]], GREEDY, "a")
    assert rest.completions[0].token_ids[:3] == told.token_ids[3:]
    assert engine.metrics.num_pages_used == 0
    (base,) = fresh.generate([PROMPTS[0]], GREEDY)
    assert base.completions[0].adapter_versions == ()


def test_weights_and_sleep_leave_adapters_as_they_are() -> None:
    engine, fresh = Engine(make_model(seed=0)), Engine(make_model(seed=1))
    for each in (engine, fresh):
        each.load_adapter("a", make_tensors(size=1.0), CONFIG)
    tokens_of(engine, PROMPTS[0], "a")
    engine.update_weights(1, make_model(seed=1).state_dict())
    engine.sleep()
    engine.wake()
    assert tokens_of(engine, PROMPTS[0], "a") == tokens_of(fresh, PROMPTS[0], "a") != tokens_of(fresh, PROMPTS[0])


def test_an_adapter_in_use_is_not_dropped_and_a_dropped_one_is_gone() -> None:
    engine = Engine(make_model())
    engine.load_adapter("a", make_tensors(), CONFIG)
    engine.add_request(PROMPTS[0], GREEDY, "mine", "a")
    with pytest.raises(UserError, match="adapter `a`: 1 unfinished requests use it: `mine`"):
        engine.drop_adapter("a")
    engine.abort("mine")
    engine.drop_adapter("a")
    assert engine.adapters() == ()
    assert not engine.model.get_submodule(QUERY)._forward_hooks
    for refused in (lambda: engine.drop_adapter("a"), lambda: engine.add_request(PROMPTS[0], adapter="a")):
        with pytest.raises(UserError, match="adapter `a`: no adapter of this name is loaded"):
            refused()
    assert not engine.has_work


def test_the_memory_of_adapters_is_a_hard_limit() -> None:
    size = (2 * 32 + 64 * 2) * 4
    engine = Engine(make_model(), config=EngineConfig(adapter_bytes=2 * size))
    engine.load_adapter("a", make_tensors(1), CONFIG)
    assert engine.load_adapter("b", make_tensors(2), CONFIG).num_bytes == size
    engine.load_adapter("b", make_tensors(3), CONFIG)
    with pytest.raises(UserError, match=rf"adapter `c`: {size} bytes do not fit beside the {2 * size} .* {2 * size} "):
        engine.load_adapter("c", make_tensors(4), CONFIG)
    with pytest.raises(UserError, match="did you mean `b`"):
        engine.drop_adapter("bb")
    assert [each.name for each in engine.adapters()] == ["a", "b"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"use_dora": True}, "adapter.use_dora: `True` is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"adapter.modules_to_save: `\['lm_head'\]` is not supported"),
        ({"bias": "all"}, "adapter.bias: `all`; expected none"),
        ({"peft_type": "IA3"}, "adapter.peft_type: `IA3`; expected LORA"),
        ({"init_lora_weights": "pissa"}, "`pissa` also changed the model's own weights"),
        ({"r": 0}, "adapter.r: 0; expected a whole number of at least 1"),
        ({"r": 3}, f"adapter.{QUERY}: rank 2; expected 3, as its configuration has"),
        ({"lora_alpha": "8"}, "adapter.lora_alpha: '8'; expected a number above 0"),
        ({"rank_pattern": {"(": 0}}, r"adapter.rank_pattern.\(: 0; expected a number above 0"),
        ({"alpha_pattern": {"(": 2}}, r"adapter.alpha_pattern.\(: is no regular expression"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(config: dict[str, Any], told: str) -> None:
    engine = Engine(make_model())
    with pytest.raises(ConfigError, match=told):
        engine.load_adapter("a", make_tensors(), {**CONFIG, **config})
    assert engine.adapters() == ()


def test_tensors_that_do_not_fit_are_all_named_and_the_old_adapter_stays() -> None:
    engine = Engine(make_model("mixtral"))
    good = {f"{QUERY}.lora_A.weight": torch.ones(2, 32), f"{QUERY}.lora_B.weight": torch.ones(32, 2)}
    engine.load_adapter("a", good, CONFIG, version="old")
    one = torch.ones(2, 32)
    tensors = {
        f"{QUERY.replace('q_', 'k_')}.lora_A.weight": one,
        f"{QUERY.replace('q_', 'v_')}.lora_A.weight": one[:, :5],
        f"{QUERY.replace('q_', 'v_')}.lora_B.weight": one.int(),
        "model.layers.0.self_attn.qproj.lora_A.weight": one,
        "model.layers.0.mlp.experts.lora_A.weight": one,
        "model.layers.0.mlp.gate.lora_A.weight": one,
        "model.embed_tokens.lora_embedding_A": one,
    }
    with pytest.raises(ConfigError) as caught:
        engine.load_adapter("a", tensors, CONFIG)
    assert [str(fault) for fault in caught.value.faults] == [
        "adapter.model.embed_tokens.lora_embedding_A: is no part of a LoRA layer; "
        "expected lora_A.weight and lora_B.weight",
        "adapter.model.layers.0.self_attn.k_proj: has no lora_B.weight",
        "adapter.model.layers.0.self_attn.v_proj.lora_A: shape [2, 5]; expected [2, 32]",
        "adapter.model.layers.0.self_attn.v_proj.lora_B: shape [2, 32]; expected [16, 2]",
        "adapter.model.layers.0.self_attn.qproj: the model has no such layer; "
        "did you mean `model.layers.0.self_attn.q_proj`?",
        "adapter.model.layers.0.mlp.experts: a MixtralExperts cannot be adapted; "
        "expected a linear layer that all tokens go through",
        "adapter.model.layers.0.mlp.gate: a MixtralTopKRouter cannot be adapted; "
        "expected a linear layer that all tokens go through",
    ]
    assert [each.version for each in engine.adapters()] == ["old"]
    whole = {f"{QUERY}.lora_A.weight": one.int(), f"{QUERY}.lora_B.weight": torch.ones(32, 2)}
    with pytest.raises(ConfigError, match=r"lora_A: type torch.int32; expected floating point"):
        engine.load_adapter("a", whole, CONFIG)
    other = {f"{QUERY}.base_layer.weight": torch.ones(32, 32)}
    with pytest.raises(ConfigError, match=r"q_proj.base_layer.weight: is not the weight that the model has"):
        engine.load_adapter("a", {**good, **other}, CONFIG)
    with pytest.raises(ConfigError, match="adapter: has no LoRA layers"):
        engine.load_adapter("a", {}, CONFIG)
    with pytest.raises(UserError, match="tensors without a configuration"):
        engine.load_adapter("a", good)


def test_folders_that_hold_no_adapter_say_what_is_missing(tmp_path: Path) -> None:
    engine = Engine(make_model())
    with pytest.raises(UserError, match=r"no adapter_config.json; expected a folder with an adapter in PEFT's format"):
        engine.load_adapter("a", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps([CONFIG]))
    with pytest.raises(UserError, match=r"no adapter_model.safetensors"):
        engine.load_adapter("a", tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        engine.load_adapter("a", tmp_path)
    from safetensors.torch import save_file

    save_file(make_tensors(), tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="expected a JSON object"):
        engine.load_adapter("a", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert engine.load_adapter("a", tmp_path).path == str(tmp_path)


def test_adapters_come_and_go_while_streams_run() -> None:
    async def run() -> list[int | str | None]:
        async with AsyncEngine(Engine(make_model())) as engine:
            await engine.load_adapter("a", make_tensors(1), CONFIG, "first")
            versions: list[int | str | None] = []
            params = SamplingParams(max_tokens=20, ignore_eos=True)
            async for delta in engine.generate(PROMPTS[0], params, adapter="a"):
                versions.append(delta.adapter_version)
                if len(versions) == 2:
                    await engine.load_adapter("a", make_tensors(2), CONFIG, "second")
            assert [each.version for each in await engine.adapters()] == ["second"]
            await engine.drop_adapter("a")
            assert await engine.adapters() == ()
            return versions

    versions = asyncio.run(run())
    assert (versions[0], versions[-1], len(versions)) == ("first", "second", 20)
