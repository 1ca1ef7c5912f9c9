"""Linear layers weight first: the same products, by the model's own weights."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine_models import make_model  # noqa: E402

from flagscale.inference.engine import linear  # noqa: E402
from flagscale.inference.engine.linear import FEWEST_ROWS, MOST_ROWS, WeightFirstLinear, put_weights_first  # noqa: E402


class Model(torch.nn.Module):  # type: ignore[misc]
    """As little of a model as has linear layers and a device."""

    device = torch.device("cpu")

    def __init__(self, bias: bool, dtype: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(12, 20, bias=bias, dtype=dtype)
        self.other = torch.nn.Bilinear(2, 2, 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_tiles", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 33, MOST_ROWS, MOST_ROWS + 1])
def test_any_number_of_rows_gives_what_the_plain_layer_gives(
    count: int, has_tiles: bool, dtype: Any, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "HAS_TILES", has_tiles)
    torch.manual_seed(count)
    model = Model(bias, dtype)
    plain = model.layer
    put_weights_first(model)
    rows = torch.randn(1, count, 12).to(dtype)
    with torch.inference_mode():
        out = model.layer(rows)
        torch.testing.assert_close(out, plain(rows))
        assert out.shape == (1, count, 20)
        is_turned = FEWEST_ROWS[dtype] <= count <= MOST_ROWS
        assert (out.stride(-1) != 1) == is_turned
        # What adapters add goes into the result, in place.
        out.view(count, 20).add_(1)
        torch.testing.assert_close(out, plain(rows) + 1)


def test_weights_and_names_stay_the_models_own() -> None:
    model = make_model("qwen3", tie_word_embeddings=True)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    put_weights_first(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert isinstance(model.get_output_embeddings(), WeightFirstLinear)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    replaced = [each for each in model.modules() if isinstance(each, WeightFirstLinear)]
    assert len(replaced) == 2 * 7 + 1
    put_weights_first(model)
    assert [each for each in model.modules() if isinstance(each, WeightFirstLinear)] == replaced


def test_layers_of_another_kind_and_of_another_device_stay() -> None:
    model = Model(True, torch.float32)
    put_weights_first(model)
    assert type(model.other) is torch.nn.Bilinear
    elsewhere = Model(True, torch.float32)
    elsewhere.device = torch.device("meta")
    put_weights_first(elsewhere)
    assert type(elsewhere.layer) is torch.nn.Linear
