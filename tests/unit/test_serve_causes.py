"""Causes: what real engines print when they die, and the one line that is told of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.serve.causes import FINAL, LONGEST_LINE, explain_end, find_cause, find_progress

VLLM_OOM = """\
(EngineCore_DP0 pid=71) ERROR 11-20 23:06:01 [core.py:708] EngineCore failed to start.
(EngineCore_DP0 pid=71) ERROR 11-20 23:06:01 [core.py:708] \
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate \
1.50 GiB. GPU 0 has a total capacity of 79.10 GiB
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""

SAID = [
    ("argument", "usage: vllm [-h]\nvllm: error: unrecognized arguments: --max-modle-len 5", "--max-modle-len 5"),
    ("argument", "launch_server.py: error: argument --tp-size: invalid int value: 'x'", "argument --tp-size"),
    ("argument", "error: invalid argument: --nope\n", "--nope"),
    ("argument", 'error while handling argument "--port": stoi\n\nusage:', "argument --port: stoi"),
    ("module", "ModuleNotFoundError: No module named 'sglang'", "`sglang` is not installed"),
    ("module", "/usr/bin/python: No module named sglang", "`sglang` is not installed"),
    ("module", "run.sh: line 9: exec: vllm: not found", "program `vllm` is not on the PATH"),
    ("module", "ImportError: libcudart.so.12: cannot open shared object file", "libcudart.so.12 is missing"),
    ("port", "ERROR: [Errno 98] error while attempting to bind on address ('0.0.0.0', 8000): address already in use",
     "port is taken"),
    ("port", "srv  start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080", "port 8080 is taken"),
    ("model", "OSError: /nope is not a local folder and is not a valid model identifier listed", "no model at /nope"),
    ("model", "  Value error, Invalid repository ID or local directory specified: '/m/x'. [type=value_error]",
     "no model at /m/x"),
    ("model", "gguf_init_from_file: failed to open GGUF file '/m.gguf' (No such file or directory)", "/m.gguf"),
    ("model", "srv    load_model: failed to load model, '/m.gguf'", "the model /m.gguf cannot be loaded"),
    ("model", "OSError: /m does not appear to have a file named config.json. Checkout", "named config.json"),
    ("chips", "ValueError: World size (8) is larger than the number of available GPUs (2) in this node.",
     "needs 8 chips and sees 2"),
    ("chips", "RuntimeError: Failed to infer device type, please set", "sees no chip"),
    ("chips", "torch.AcceleratorError: CUDA error: invalid device ordinal", "does not have"),
    ("chips", "RuntimeError: No CUDA GPUs are available", "sees no chip"),
    ("memory", VLLM_OOM, "out of memory: 1.50 GiB more asked for"),
    ("memory", "ValueError: Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired GPU memory",
     "Free memory on device cuda:0 (3.1/79.1 GiB) on startup"),
    ("memory", "ValueError: No available memory for the cache blocks. Try increasing", "gpu_memory_utilization"),
    ("memory", "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", "mem_fraction_static"),
    ("memory", "llama_model_load: error loading model: unable to allocate CPU buffer", "out of memory"),
    ("memory", "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "out of memory"),
    ("other", "Traceback\nKeyError: 'layers.0'\nRuntimeError: it broke", "RuntimeError: it broke"),
    ("other", "error: models/x: not a model folder", "models/x: not a model folder"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "told"), SAID, ids=[f"{row[0]}-{index}" for index, row in enumerate(SAID)])
def test_each_known_cause_is_told_in_one_line(kind: str, text: str, told: str) -> None:
    cause = find_cause(text)
    assert cause is not None
    assert cause.kind == kind
    assert told in cause.line
    assert "\n" not in cause.line


def test_what_came_last_is_the_cause_and_not_an_early_warning() -> None:
    text = "WARNING Failed to import: ImportError: no flash_attn\n" + VLLM_OOM
    cause = find_cause(text)
    assert cause is not None
    assert cause.kind == "memory"


def test_colours_and_columns_are_no_part_of_it() -> None:
    cause = find_cause("\x1b[1;31mModuleNotFoundError\x1b[0m: No module named 'x'")
    assert cause is not None
    assert cause.line == "the Python module `x` is not installed"


def test_without_an_error_the_end_itself_is_told() -> None:
    assert find_cause("all is well") is None
    assert str(find_cause("error: the sky fell")) == "the sky fell"
    assert str(explain_end("all is well", "m ended with exit code 3")) == "m ended with exit code 3"
    assert explain_end("", None).line == "it ended without a word"
    killed = explain_end("RuntimeError: a word", "m died of SIGKILL")
    assert (killed.kind, "lack of memory" in killed.line) == ("killed", True)


def test_a_wait_for_ray_is_only_told_where_it_is_asked_for() -> None:
    text = "WARNING: Waiting for creating a placement group of specs for 130 seconds. specs=[{'GPU': 8.0}]"
    assert find_cause(text) is None
    cause = find_cause(text, ("ray",))
    assert cause is not None
    assert cause.line == "waits for Ray workers since 130 s"


@given(st.text(max_size=400))
def test_any_text_gives_a_short_line_or_nothing(text: str) -> None:
    cause = find_cause(text)
    assert cause is None or (len(cause.line) <= LONGEST_LINE and cause.line.strip())
    assert "\n" not in find_progress(text)
    assert explain_end(text, None).line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("(EngineCore pid=7) INFO 11-20 23:06:01 [gpu_model_runner.py:1] Loading weights\n", "Loading weights"),
        ("[2026-11-21 02:00:00 TP0] Load weight begin. avail mem=70 GB\n\n", "Load weight begin. avail mem=70 GB"),
        ("Loading shards:  50%|#####     | 2/4\rLoading shards:  75%|#### | 3/4", "Loading shards:  75%|#### | 3/4"),
        ("serving tiny\n....\n", "serving tiny"),
        ("", ""),
    ],
)
def test_progress_is_the_last_line_that_says_something(text: str, told: str) -> None:
    assert find_progress(text) == told


def test_what_another_start_cannot_mend_is_final() -> None:
    assert "argument" in FINAL
    assert FINAL.isdisjoint({"port", "killed", "memory", "other"})
