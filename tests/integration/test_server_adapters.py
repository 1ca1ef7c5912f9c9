"""LoRA adapters over a real server: loaded, asked for by name, replaced and unloaded while it serves."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
openai = pytest.importorskip("openai")

import httpx  # noqa: E402
from engine_adapters import make_tensors  # noqa: E402
from local_jobs import wait_for  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from servers import ServerProcess, make_folder, serving  # noqa: E402

from flagscale.inference.engine import Engine, SamplingParams  # noqa: E402


def make_adapter(folder: Path, seed: int) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    save_file(make_tensors(seed, size=1.0), folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("model") / "tiny")
    for seed in (1, 2):
        make_adapter(folder.parent / f"adapter{seed}", seed)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[ServerProcess]:
    log = folder.parent / "log"
    with serving(log, folder, "--served-model-name", "tiny", "--adapter-bytes", "1500") as server:
        yield server
    assert "Traceback" not in server.printed


def said(folder: Path, adapter: Path | None) -> str:
    engine = Engine.from_folder(folder)
    if adapter is not None:
        engine.load_adapter("mine", adapter)
    (told,) = engine.generate(["Once"], SamplingParams(max_tokens=12, temperature=0), adapter and "mine")
    return told.completions[0].text


def test_adapters_are_models_that_come_and_go(server: ServerProcess, folder: Path) -> None:
    first, second = folder.parent / "adapter1", folder.parent / "adapter2"

    def post(path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)

    def refusal(path: str, **body: Any) -> tuple[int, str, str]:
        answer = post(path, **body)
        error = answer.json()["error"]
        return answer.status_code, error["param"], error["message"]

    assert post("load_lora_adapter", lora_name="a", lora_path=str(first)).json()["parent"] == "tiny"
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:

        def ask(model: str) -> Any:
            return client.completions.create(model=model, prompt="Once", max_tokens=12, temperature=0)

        answers = {model: ask(model) for model in ("tiny", "a")}
        assert answers["tiny"].choices[0].text == said(folder, None)
        assert answers["a"].choices[0].text == said(folder, first) != said(folder, None)
        assert (answers["a"].model, answers["a"].system_fingerprint) == ("a", "weights-0-adapter-1")
        assert answers["tiny"].system_fingerprint == "weights-0"
        listed = [(each.id, each.parent, each.root) for each in client.models.list()]
        assert listed == [("tiny", None, "tiny"), ("a", "tiny", str(first))]
        assert client.models.retrieve("a").version == 1

        again = {"lora_name": "a", "lora_path": str(second)}
        told = refusal("load_lora_adapter", **again)
        assert told == (
            400,
            "lora_name",
            "lora_name: an adapter `a` is loaded; expected load_inplace: true to replace it",
        )
        assert post("load_lora_adapter", **again, load_inplace=True).json()["version"] == 2
        stream = client.completions.create(model="a", prompt="Once", max_tokens=12, temperature=0, stream=True)
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks) == said(folder, second)
        assert {chunk.model for chunk in chunks} == {"a"}
        chat = client.chat.completions.create(model="a", messages=[{"role": "user", "content": "x"}], max_tokens=2)
        assert re.fullmatch("weights-0-adapter-2", chat.system_fingerprint)

        assert refusal("load_lora_adapter", lora_name="tiny", lora_path=str(first))[:2] == (400, "lora_name")
        status, param, message = refusal("load_lora_adapter", lora_name="b", lora_path=str(folder))
        assert (status, param) == (400, "lora_path")
        assert "no adapter_config.json; expected a folder with an adapter in PEFT's format" in message
        assert "do not fit beside" in refusal("load_lora_adapter", lora_name="b", lora_path=str(first))[2]
        assert refusal("load_lora_adapter", lora_name="b")[:2] == (400, "lora_path")
        assert refusal("unload_lora_adapter", lora_name="b")[:2] == (400, "lora_name")

        running = client.completions.create(
            model="a", prompt="Once", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(running))
        assert "unfinished requests use it" in refusal("unload_lora_adapter", lora_name="a")[2]
        running.close()
        wait_for(lambda: post("unload_lora_adapter", lora_name="a").status_code == 200)
        with pytest.raises(openai.NotFoundError, match="there is no model `a` here; there is `tiny`"):
            ask("a")
