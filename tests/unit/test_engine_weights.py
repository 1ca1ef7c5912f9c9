"""Names of weights as they stand on disk, and updates that are whole or nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine_models import FAMILIES, make_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from flagscale.errors import ConfigError, UserError  # noqa: E402
from flagscale.inference.engine import Engine, EngineConfig, SamplingParams  # noqa: E402
from flagscale.inference.engine.model import load_model  # noqa: E402
from flagscale.inference.engine.weights import name_views, plan_update  # noqa: E402

PARAMS = SamplingParams(temperature=0, max_tokens=8)
PROMPTS = [[5, 6, 7, 8, 9] * 4, [1, 2, 3]]


def on_disk(model: Any, folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder)
    return dict(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_goes_in_by_its_names_and_gives_a_fresh_engines_answers(family: str, tmp_path: Path) -> None:
    engine, fresh = Engine(make_model(family, 0)), Engine(make_model(family, 1))
    before = {name: tensor.data_ptr() for name, tensor in engine._runner.model.state_dict().items()}
    engine.generate(PROMPTS, PARAMS)
    engine.update_weights("new", on_disk(make_model(family, 1), tmp_path))
    assert {name: tensor.data_ptr() for name, tensor in engine._runner.model.state_dict().items()} == before
    told = engine.generate(PROMPTS, PARAMS)
    assert [one.completions[0].token_ids for one in told] == [
        one.completions[0].token_ids for one in fresh.generate(PROMPTS, PARAMS)
    ]
    assert told[0].completions[0].versions == ((0, "new"),)
    assert told[0].num_cached_tokens == 0


def test_the_models_own_names_and_part_of_the_weights_do_too() -> None:
    model = make_model("mixtral")
    engine = Engine(model)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    engine.update_weights(1, {name: torch.zeros_like(model.state_dict()[name])})
    views = name_views(model)
    assert not views["model.layers.0.block_sparse_moe.experts.2.w3.weight"].any()
    assert views["model.layers.0.block_sparse_moe.experts.2.w2.weight"].any()


def test_the_halves_of_fused_experts_are_slices_of_them() -> None:
    model = make_model("qwen3_moe")
    views = name_views(model)
    views["model.layers.1.mlp.experts.3.up_proj.weight"].fill_(7.0)
    fused = model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    assert bool((fused[3, 24:] == 7).all())
    assert not bool((fused[3, :24] == 7).any())


def test_all_faults_of_an_update_are_told_and_nothing_is_changed() -> None:
    model = make_model()
    engine = Engine(model, version=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    update = {
        "model.norm.weight": torch.zeros(32),
        "model.norm.wieght": torch.zeros(32),
        "lm_head.weight": torch.zeros(3, 4),
        "model.layers.0.input_layernorm.weight": torch.zeros(32, dtype=torch.bfloat16),
    }
    with pytest.raises(ConfigError) as caught:
        engine.update_weights(6, update)
    assert [str(fault) for fault in caught.value.faults] == [
        "weights.model.norm.wieght: the model has no such tensor; did you mean `model.norm.weight`?",
        "weights.lm_head.weight: shape [3, 4]; expected [128, 32]",
        "weights.model.layers.0.input_layernorm.weight: type torch.bfloat16; expected torch.float32",
    ]
    assert engine.version == 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_update_that_is_cut_off_leaves_the_old_weights() -> None:
    model = make_model()
    engine = Engine(model)
    before = model.state_dict()["model.norm.weight"].clone()

    def half() -> Iterator[tuple[str, Any]]:
        yield "model.norm.weight", torch.zeros(32)
        raise ConnectionError("the trainer has gone")

    with pytest.raises(ConnectionError):
        engine.update_weights(1, half())
    assert torch.equal(model.state_dict()["model.norm.weight"], before)
    assert engine.version == 0


def test_two_names_of_one_memory_must_agree() -> None:
    model = make_model(tie_word_embeddings=True)
    views = name_views(model)
    embedding = torch.randn(128, 32)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    assert len(plan_update(views, dict.fromkeys(names, embedding))) == 2
    assert len(plan_update(views, {names[0]: embedding, names[1]: embedding.clone()})) == 2
    with pytest.raises(ConfigError, match=r"is the same memory as `model.embed_tokens.weight`, and the two differ"):
        plan_update(views, {names[0]: embedding, names[1]: embedding + 1})


def test_running_requests_go_on_under_the_new_weights() -> None:
    engine, fresh = Engine(make_model(seed=0)), Engine(make_model(seed=1))
    prompt = [3, 1, 4, 1, 5]
    engine.add_request(prompt, PARAMS, "a")
    first = [delta for _ in range(3) for delta in engine.step()]
    engine.update_weights("late", make_model(seed=1).state_dict())
    second = [delta for _ in range(5) for delta in engine.step()]
    assert [delta.version for delta in (*first, *second)] == [0] * 3 + ["late"] * 5
    so_far = [token for delta in first for token in delta.token_ids]
    (rest,) = fresh.generate([prompt + so_far], SamplingParams(temperature=0, max_tokens=5))
    assert tuple(token for delta in second for token in delta.token_ids) == rest.completions[0].token_ids


def test_weights_come_from_a_folder_without_a_second_copy(tmp_path: Path) -> None:
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(tmp_path / "model.safetensors") in mapped.read_text()
    before = (tmp_path / "model.safetensors").read_bytes()
    engine = Engine(model, config=EngineConfig(page_size=4))
    engine.update_weights(1, {name: torch.zeros_like(each) for name, each in model.state_dict().items()})
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json; expected a folder with a model"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(UserError, match=str(tmp_path)):
        load_model(tmp_path)
