"""What of a training's output reaches the screen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.runner.monitor.megatron_lines import LineFilter

NOISE = [
    "-" * 111,
    "------------------------ arguments ------------------------",
    "  adam_beta1 ...................................... 0.9",
    "  inference_dynamic_batching_cuda_graph_sizing_distribution  exponential",
    "INFO:megatron.core.timers:(min, max) time across ranks (ms):",
    "    train/valid/test-data-iterators-setup ..........: (56.60, 56.91)",
    "WARNING:megatron.core.rerun_state_machine:Setting RerunStateMachine mode RerunMode.DISABLED",
    "[Rank 1] (after 2 iterations) memory (MB) | allocated: 0.00 | max allocated: 0.00",
    "[after training is done] datetime: 2026-01-01 00:00:00.000000 ",
    "[2026-01-01 00:00:00.000000] saving checkpoint at iteration       3 to /exp/checkpoints in torch_dist format",
    "\toutput_layer.weight (param.main_grad.dtype=torch.float32)",
    "    will not load any checkpoints and will start from random",
    "",
]
SHORT = {
    "  [2026-01-01 00:00:00] successfully saved checkpoint from iteration      30 to /my exp/c [ t 1/2, p 1/1 ]": (
        "checkpoint saved: iteration 30 in /my exp/c"
    ),
    "  successfully saved checkpoint from iteration       3 to /exp/c": "checkpoint saved: iteration 3 in /exp/c",
    "  successfully loaded checkpoint from /exp/c [ t 1/2, p 1/1 ] at iteration 6": (
        "checkpoint loaded: iteration 6 of /exp/c"
    ),
    " validation loss at iteration 6 on validation set | lm loss value: 5.135653E+00 | lm loss PPL: 1.699752E+02 | ": (
        "validation loss 5.1357 at iteration 6 · perplexity 169.98"
    ),
    " test loss at iteration 50 | lm loss value: 2.105636E+00 | lm loss PPL: 8.212325E+00 | ": (
        "test loss 2.1056 at iteration 50 · perplexity 8.21"
    ),
}
KEPT = [
    "Traceback (most recent call last):",
    '  File "train_gpt.py", line 3, in <module>',
    "    raise ValueError('x')",
    "ValueError: x",
    "error: lr: expected a number",
    "WARNING: TensorBoard writing requested but is not available",
    "ERROR:megatron.core.something:this went wrong",
    "/home/me/train.py:3: UserWarning: my own code warns me",
    "  my_name is kept, 3 dots ... or not",
    "  loading ... done",
    "training is fun",
]


@pytest.mark.parametrize("line", NOISE)
def test_what_tells_nothing_is_left_out(line: str) -> None:
    assert LineFilter().choose(f"[default0]:{line}") is None


@pytest.mark.parametrize("line", SHORT)
def test_what_tells_something_is_said_shortly(line: str) -> None:
    assert LineFilter().choose(f"[default7]:{line}") == SHORT[line]


@pytest.mark.parametrize("line", KEPT)
@pytest.mark.parametrize("prefix", ["", "[default12]:"])
def test_errors_warnings_and_what_nobody_foresaw_are_kept(line: str, prefix: str) -> None:
    assert LineFilter().choose(prefix + line) == prefix + line


def test_a_library_s_warning_goes_with_the_line_of_code_below_it_and_rank_by_rank() -> None:
    warning = "/venv/site-packages/torch/x.py:83: FutureWarning: `a` is deprecated."
    lines = [f"[default0]:{warning}", "[default1]:  mine", "[default0]:  return a()", "[default0]:  return b()"]
    chosen = LineFilter()
    assert [chosen.choose(line) for line in lines] == [None, "[default1]:  mine", None, "[default0]:  return b()"]


@given(st.text(alphabet=st.characters(exclude_characters="\n"), max_size=60))
def test_any_line_is_shown_whole_shortened_or_not_at_all(line: str) -> None:
    shown = LineFilter().choose(line)
    assert shown in (None, line)
