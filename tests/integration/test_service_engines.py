"""Services of real engines on a CPU: started by the same command, asked by OpenAI's client, stopped cleanly.

The native engine is always there. Others are the user's, so their tests say where they look:

    FLAGSCALE_TEST_VLLM        the folder of programs of an environment with vLLM for CPUs
    FLAGSCALE_TEST_NIXL        a folder with the package `nixl`, for vLLM's connector of that name
    FLAGSCALE_TEST_SGLANG      the same with SGLang for CPUs
    FLAGSCALE_TEST_LLAMA_CPP   the folder with a built `llama-server`
    FLAGSCALE_TEST_GGUF        a model that it loads
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from conftest import SERVICES
from factories import ROOT
from services import Bench, wait_for

from flagscale.cli.jobs import compose, plan
from flagscale.runner.plan.job import LaunchName
from flagscale.runner.plan.service import decode_service, list_first_jobs
from flagscale.runner.render.argv import render_argv
from flagscale.serve.folder import find_control

pytest.importorskip("torch")
pytest.importorskip("transformers")

CONTEXT = 512
PATIENCE_S = 600.0
NO_TEXT = "\ufffd"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights whose tokens are bytes."""
    from engine_models import make_model

    from flagscale.inference.byte_tokenizer import write_byte_tokenizer
    from flagscale.train.token_files import VOCAB_SIZE

    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    made = make_model("qwen3", vocab_size=VOCAB_SIZE, head_dim=32, hidden_size=64)
    made.save_pretrained(folder)
    write_byte_tokenizer(folder, CONTEXT)
    return folder


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench.make(tmp_path)
    yield made
    made.serve("stop", str(made.exp_dir), "--force")
    assert made.list_left() == []


def folder_of(variable: str) -> str:
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"${variable} names no folder with this engine")
    return found


def ask_everything(url: str, model: str) -> None:
    """What clients use: whole and streamed answers, chat, a stop word, a seed, log-probabilities."""
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        assert [row.id for row in client.models.list()] == [model]
        whole = client.completions.create(model=model, prompt="Hello", max_tokens=6, temperature=0, seed=1)
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 6
        stream = client.completions.create(
            model=model, prompt="Hello", max_tokens=6, temperature=0, seed=1, stream=True
        )
        streamed = "".join(piece.choices[0].text for piece in stream if piece.choices)
        # llama-server leaves what is no text out of a stream, as a model of random weights writes it
        assert streamed.partition(NO_TEXT)[0] == whole.choices[0].text.partition(NO_TEXT)[0]
        chat = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=4, logprobs=True
        )
        assert chat.choices[0].message is not None


def serve(bench: Bench, *words: str) -> None:
    done = bench.call("serve", str(bench.base / "conf" / "serve.yaml"), *words, timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stderr + bench.read_log()


@pytest.mark.engine
def test_the_native_engine(bench: Bench, tiny_model: Path) -> None:
    bench.write("native", None, PATIENCE_S)
    serve(bench, "--model-path", str(tiny_model), "--replicas", "2", "--bin-dir", str(Path(sys.executable).parent))
    ask_everything(bench.url, "m")
    os.kill(bench.find_pid("m-0"), signal.SIGKILL)
    for _ in range(4):
        bench.complete()
    wait_for(lambda: bench.look()["state"] == "ready", 120)
    assert bench.serve("stop").stdout.endswith("stopped\n")


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_vllm_two_replicas_survive_a_death_and_an_update(bench: Bench, tiny_model: Path) -> None:
    folder = folder_of("FLAGSCALE_TEST_VLLM")
    envs = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    bench.write("vllm", {"num_replicas": 2}, PATIENCE_S, experiment__envs=envs)
    args = '{"dtype": "bfloat16", "max_model_len": 256, "max_num_seqs": 8, "enforce_eager": true}'
    serve(bench, "--model-path", str(tiny_model), "--bin-dir", folder, "--engine-args", args)
    ask_everything(bench.url, "m")
    with bench.load(num_callers=2, patience_s=PATIENCE_S) as load:
        wait_for(lambda: load.num_good > 3, PATIENCE_S)
        os.kill(bench.find_pid("m-0"), signal.SIGKILL)
        wait_for(lambda: "m-0: ended" in bench.read_log())
        wait_for(lambda: bench.look()["state"] == "ready", PATIENCE_S)
    assert len(load.faults) == load.num_begun <= 2, load.faults
    with bench.load(num_callers=2, patience_s=PATIENCE_S) as load:
        changed = args.replace("256", "200")
        done = bench.call("serve", "update", "--engine-args", changed, timeout_s=2 * PATIENCE_S)
        assert done.returncode == 0, done.stderr
    assert load.faults == []
    assert bench.serve("stop").stdout.endswith("stopped\n")


PARSERS = {
    "vllm": """
import json, sys
from vllm.entrypoints.cli.serve import cmd_init
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
commands = parser.add_subparsers()
(serve,) = cmd_init()
serve.subparser_init(commands)
for argv in json.load(sys.stdin):
    serve.validate(parser.parse_args(argv[argv.index("serve"):]))
""",
    "sglang": """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
for argv in json.load(sys.stdin):
    parser.parse_args(argv[argv.index("sglang.launch_server") + 1:])
""",
}
"""engine -> a program that has the engine's own parser read command lines, an array of arrays"""


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("engine", PARSERS)
def test_the_engines_own_parser_takes_every_example(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(f"FLAGSCALE_TEST_{engine.upper()}")
    monkeypatch.chdir(ROOT)
    values = dict.fromkeys(get_args(LaunchName), "4000")
    services = [service for path in SERVICES if (service := plan(compose(str(path), "serve", [])).plan.service)]
    jobs = [job for service in services for job in list_first_jobs(decode_service(service))]
    processes = [process for job in jobs for host in job.hosts for process in host.processes]
    lines = [render_argv(process, values) for process in processes if process.backend == engine]
    assert len(lines) > 3
    done = subprocess.run(
        [str(Path(folder, "python")), "-c", PARSERS[engine]], input=json.dumps(lines), capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_vllm_answers_from_a_cache_that_another_instance_computed(bench: Bench, tiny_model: Path) -> None:
    """By vLLM's connector through a folder, which needs nothing beside."""
    folder, store = folder_of("FLAGSCALE_TEST_VLLM"), bench.base / "caches"
    store.mkdir()
    envs = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    deploy = {"experiment__runner__deploy__prefill_decode_disaggregation": True}
    bench.write("vllm", None, PATIENCE_S, experiment__envs=envs, **deploy)
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_connector_extra_config": {"shared_storage_path": str(store)},
    }
    args = {
        "dtype": "bfloat16", "max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True, "block_size": 32,
        "enable_prefix_caching": False, "kv_transfer_config": connector,
    }  # fmt: skip
    serve(bench, "--model-path", str(tiny_model), "--bin-dir", folder, "--engine-args", json.dumps(args))
    urls = {row["role"]: row["url"] for row in bench.look()["replicas"]}
    _wipe(store)
    alone = _ask_engine(bench, urls["prefill"])
    _wipe(store)
    paired = _ask_engine(bench, bench.url)
    assert paired["tokens"] == alone["tokens"]
    assert paired["token_logprobs"] == pytest.approx(alone["token_logprobs"], abs=0.02)
    decode_log = (bench.exp_dir / "serve/m-decode-0/serve_logs/host_0_localhost.output").read_text()
    prefill_log = (bench.exp_dir / "serve/m-prefill-0/serve_logs/host_0_localhost.output").read_text()
    assert "Inject KV cache of 64 tokens" in decode_log
    assert "Inject KV cache of 64 tokens" not in prefill_log
    # with another cache in its place the answer is another: what the store holds is really what is computed with
    _spoil(store)
    spoilt = _ask_engine(bench, urls["decode"])
    assert spoilt["token_logprobs"][0] != pytest.approx(alone["token_logprobs"][0], abs=0.02)
    ask_everything(bench.url, "m")
    assert bench.serve("stop").stdout.endswith("stopped\n")


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_vllm_pulls_a_cache_over_nixl(bench: Bench, tiny_model: Path) -> None:
    folder, package = folder_of("FLAGSCALE_TEST_VLLM"), folder_of("FLAGSCALE_TEST_NIXL")
    envs = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": package,
    }  # fmt: skip
    words = {"prefill_decode_disaggregation": True, "prefill_decode_connector": "NixlConnector"}
    deploy = {f"experiment__runner__deploy__{name}": value for name, value in words.items()}
    bench.write("vllm", None, PATIENCE_S, experiment__envs=envs, **deploy)
    args = {
        "dtype": "bfloat16", "max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True, "block_size": 32,
        "enable_prefix_caching": False,
    }  # fmt: skip
    serve(bench, "--model-path", str(tiny_model), "--bin-dir", folder, "--engine-args", json.dumps(args))
    urls = {row["role"]: row["url"] for row in bench.look()["replicas"]}
    alone = _ask_engine(bench, urls["prefill"])
    before = _count_pulls(urls["decode"])
    paired = _ask_engine(bench, bench.url)
    assert _count_pulls(urls["decode"]) == before + 1
    assert paired["tokens"] == alone["tokens"]
    assert paired["token_logprobs"] == pytest.approx(alone["token_logprobs"], abs=0.02)
    ask_everything(bench.url, "m")
    assert _count_pulls(urls["decode"]) > before + 1
    assert bench.serve("stop").stdout.endswith("stopped\n")


def _count_pulls(url: str) -> int:
    """How many caches a vLLM has pulled over NIXL."""
    rows = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text.splitlines()
    values = [row.rpartition(" ")[2] for row in rows if row.startswith("vllm:nixl_xfer_time_seconds_count")]
    return int(sum(map(float, values)))


def _ask_engine(bench: Bench, url: str) -> dict[str, Any]:
    """Greedy tokens and their log-probabilities, of a service or of one of its engines."""
    control = find_control(bench.exp_dir)
    assert control is not None
    prompt = "Prompts that are longer than two blocks of the cache are handed over by whole blocks."
    body = {"model": "m", "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 1}
    headers = {"Authorization": f"Bearer {control.engine_key}"}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["choices"][0]["logprobs"]
    return found


def _wipe(store: Path) -> None:
    for entry in store.iterdir():
        shutil.rmtree(entry)


def _spoil(store: Path) -> None:
    """Another cache under the same names."""
    from safetensors.torch import load_file, save_file

    for path in store.glob("*/*.safetensors"):
        save_file({name: tensor.flip(0).contiguous() for name, tensor in load_file(path).items()}, path)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_sglang(bench: Bench, tiny_model: Path) -> None:
    folder = folder_of("FLAGSCALE_TEST_SGLANG")
    bench.write("sglang", None, PATIENCE_S, experiment__envs={"SGLANG_USE_CPU_ENGINE": "1"})
    args = (
        '{"device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch", '
        '"disable_overlap_schedule": true, "disable_radix_cache": true, "mem_fraction_static": 0.05, '
        '"max_total_tokens": 4096, "context_length": 512, "skip_server_warmup": true}'
    )
    serve(bench, "--model-path", str(tiny_model), "--bin-dir", folder, "--engine-args", args)
    ask_everything(bench.url, "m")
    assert bench.serve("stop").stdout.endswith("stopped\n")


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_llama_cpp(bench: Bench) -> None:
    folder, model = folder_of("FLAGSCALE_TEST_LLAMA_CPP"), folder_of("FLAGSCALE_TEST_GGUF")
    bench.write("llama_cpp", None, PATIENCE_S)
    serve(bench, "--model-path", model, "--bin-dir", folder)
    ask_everything(bench.url, "m")
    assert bench.serve("stop").stdout.endswith("stopped\n")
