"""The fused kernel against attention group by group, on a GPU, or on a CPU by Triton's interpreter:

TRITON_INTERPRET=1 python -m pytest tests/gpu/test_fused_attention.py
"""

import os
import random
from collections.abc import Sequence

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is no GPU here, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from flagscale.inference.engine import attention  # noqa: E402
from flagscale.inference.engine.attention import Span, make_plan  # noqa: E402
from flagscale.inference.engine.fused_attention import FusedPlan, make_fused_plan  # noqa: E402
from flagscale.inference.engine.kv_cache import KVCache, LayerShape  # noqa: E402

DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
SHAPES = {
    "one prompt": [(0, 9)],
    "one token": [(9, 1)],
    "first token": [(0, 1)],
    "unequal tokens": [(3, 1), (140, 1), (7, 1), (64, 1), (63, 1)],
    "chunks": [(4, 5), (9, 3), (100, 70)],
    "everything": [(0, 200), (3, 1), (16, 4), (110, 1), (0, 1), (99, 30), (7, 2), (12, 1)],
}
HEADS = {"one for each": (4, 4, 16, 16), "shared": (8, 2, 64, 64), "odd": (6, 2, 24, 40), "latent": (2, 2, 192, 128)}
"""query heads, key heads, dimensions of key and value"""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def make_step(
    sizes: Sequence[tuple[int, int]], page_size: int, spare: Sequence[int]
) -> tuple[list[Span], "torch.Tensor"]:
    pool, spans, slots, row = list(spare), [], [], 0
    for before, now in sizes:
        pages = tuple(pool.pop() for _ in range(-(-(before + now) // page_size)))
        spans.append(Span(row, before, now, pages))
        slots += [pages[at // page_size] * page_size + at % page_size for at in range(before, before + now)]
        row += now
    return spans, torch.tensor(slots, device=DEVICE)


@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_it_gives_what_the_groups_give(
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[tuple[int, int]],
    heads: tuple[int, int, int, int],
    window: int | None,
    dtype: "torch.dtype",
) -> None:
    if dtype == torch.bfloat16 and not HAS_CUDA:
        pytest.skip("Triton's interpreter multiplies no bf16")
    monkeypatch.setattr(attention, "_has_fused_kernel", lambda _device: False)
    num_heads, num_kv_heads, key_dim, value_dim = heads
    page_size, num_pages = 16, 80
    torch.manual_seed(0)
    cache = KVCache([LayerShape(num_kv_heads, key_dim, value_dim)] * 2, num_pages, page_size, dtype, DEVICE)
    for pages in cache.pages_of(1):
        pages.normal_()
    spare = list(range(1, num_pages + 1))
    random.Random(0).shuffle(spare)
    spans, slots = make_step(sizes, page_size, spare)
    num_tokens = sum(now for _, now in sizes)
    query = torch.randn(num_heads, num_tokens, key_dim, device=DEVICE, dtype=dtype).transpose(0, 1)
    key = torch.randn(num_tokens, num_kv_heads, key_dim, device=DEVICE, dtype=dtype)
    value = torch.randn(num_tokens, num_kv_heads, value_dim, device=DEVICE, dtype=dtype)
    scale = key_dim**-0.5
    wanted = make_plan(spans, cache, DEVICE).attend(1, query, key, value, scale, window)
    for pages in cache.pages_of(1):
        pages.view(-1, *pages.shape[2:])[slots] = 0  # what this step writes must come from this step
    told = make_fused_plan(spans, slots, cache, DEVICE).attend(1, query, key, value, scale, window)
    torch.testing.assert_close(told, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.skipif(not HAS_CUDA, reason="there is no GPU here")
def test_a_gpu_gets_the_kernel() -> None:
    cache = KVCache([LayerShape(1, 16, 16)], 4, 16, torch.float32, DEVICE)
    assert isinstance(make_plan([Span(0, 0, 3, (1,))], cache, DEVICE), FusedPlan)
