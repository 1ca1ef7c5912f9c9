"""The server over a real process and OpenAI's own client: every answer is what the engine itself says."""

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
openai = pytest.importorskip("openai")

import httpx  # noqa: E402
from local_jobs import wait_for  # noqa: E402
from servers import ServerProcess, make_folder, serving  # noqa: E402

from flagscale.inference.engine import Engine, SamplingParams  # noqa: E402

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "héllo"}]
CHAT_TEXT = "system: Be brief.\nuser: héllo\nassistant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    log = folder.parent / "log"
    with serving(log, folder, "--served-model-name", "tiny", "other", "--page-size", "4") as server:
        yield server
    assert server.process.returncode == 0, server.printed
    assert "Traceback" not in server.printed


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.from_folder(folder)


def said(engine: Engine, prompt: Any, **params: Any) -> Any:
    (told,) = engine.generate([prompt], SamplingParams(**params))
    return told


def metric(server: ServerProcess, name: str) -> float:
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))


def test_a_completion_is_what_the_engine_says(client: Any, engine: Engine) -> None:
    answer = client.completions.create(model="tiny", prompt="Once", max_tokens=20, temperature=0)
    (choice,) = answer.choices
    assert choice.text == said(engine, "Once", max_tokens=20, temperature=0).completions[0].text
    assert (choice.finish_reason, answer.model, answer.object) == ("length", "tiny", "text_completion")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 20, 24)
    assert answer.id.startswith("cmpl-")
    assert answer._request_id.startswith("req-")
    assert client.completions.create(model="tiny", prompt="Once", temperature=0).usage.completion_tokens == 16


@pytest.mark.parametrize("prompt", ["ab", [97, 98], ["ab", "cde"], [[97, 98], [99, 100, 101]]])
def test_prompts_are_texts_or_tokens_one_or_many(client: Any, engine: Engine, prompt: Any) -> None:
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, temperature=0.7, n=2, seed=3)
    many = isinstance(prompt, list) and not isinstance(prompt[0], int)
    told = [
        each.text
        for one in (prompt if many else [prompt])
        for each in said(engine, one, max_tokens=5, temperature=0.7, n=2, seed=3).completions
    ]
    assert [choice.text for choice in answer.choices] == told
    assert [choice.index for choice in answer.choices] == list(range(len(told)))


def test_seeds_give_the_same_again_and_different_ones_differ(client: Any) -> None:
    def draw(seed: int) -> list[str]:
        answer = client.completions.create(model="tiny", prompt="x", max_tokens=12, n=3, seed=seed)
        return [choice.text for choice in answer.choices]

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: Any, engine: Engine, stream: bool) -> None:
    settings = {"max_tokens": 20, "temperature": 0, "stop_token_ids": ()}
    whole = said(engine, "Once", **settings).completions[0].text
    stop = next(piece for at in range(4, 10) if whole.find(piece := whole[at : at + 2]) == at)
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 20, "temperature": 0, "stop": ["never", stop]}
    if stream:
        chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
        text, reason = "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason
    else:
        (choice,) = client.completions.create(**asked).choices
        text, reason = choice.text, choice.finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_a_stream_adds_up_to_the_whole_and_tells_usage_last(client: Any) -> None:
    asked = {"model": "tiny", "prompt": ["ab", "c"], "max_tokens": 9, "n": 2, "seed": 5, "logprobs": 2, "echo": True}
    whole = client.completions.create(**asked)
    texts, tokens, last = [""] * 4, [[] for _ in range(4)], None
    for last in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in last.choices:
            assert last.usage is None
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 36)


def test_logprobs_of_a_completion_are_the_engines_the_prompts_too(client: Any, engine: Engine) -> None:
    asked = {"model": "tiny", "prompt": "aé", "max_tokens": 6, "temperature": 0, "logprobs": 2, "echo": True}
    (choice,) = client.completions.create(**asked).choices
    told = said(engine, "aé", max_tokens=6, temperature=0, logprobs=2, prompt_logprobs=2)
    found, (true,) = choice.logprobs, told.completions
    assert choice.text == "aé" + true.text
    assert found.tokens[:3] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert found.text_offset[:4] == [0, 1, 2, 2]
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    expected = [*told.prompt_logprobs, *true.logprobs]
    assert found.token_logprobs[1:] == pytest.approx([entry.logprob for entry in expected], abs=1e-4)
    for top, entry in zip(found.top_logprobs[1:], expected, strict=True):
        assert max(top.values()) == pytest.approx(entry.top[0][1], abs=1e-4)
        assert 2 <= len(top) <= 3


def test_only_the_prompts_logprobs_cost_no_output(client: Any) -> None:
    answer = client.completions.create(model="tiny", prompt="abcd", max_tokens=0, logprobs=1, echo=True)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, len(choice.logprobs.tokens)) == ("abcd", "length", 4)
    assert answer.usage.completion_tokens == 0


def test_a_chat_goes_through_the_models_template(client: Any, engine: Engine) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=12, temperature=0)
    (choice,) = answer.choices
    true = said(engine, CHAT_TEXT, max_tokens=12, temperature=0)
    assert (choice.message.role, choice.message.content) == ("assistant", true.completions[0].text)
    assert answer.usage.prompt_tokens == len(CHAT_TEXT.encode())
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, MESSAGES[1]]
    again = client.chat.completions.create(model="tiny", messages=parts, max_tokens=12, temperature=0)
    assert again.choices[0].message.content == choice.message.content
    assert again.usage.prompt_tokens_details.cached_tokens >= 36


def test_a_chat_may_go_on_from_the_beginning_of_an_answer(client: Any, engine: Engine) -> None:
    messages = [MESSAGES[1], {"role": "assistant", "content": "Well,"}]
    more = {"continue_final_message": True}
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=5, temperature=0, extra_body=more
    )
    true = said(engine, "user: héllo\nassistant: Well,", max_tokens=5, temperature=0)
    assert answer.choices[0].message.content == true.completions[0].text


def test_a_chat_streams_roles_content_and_logprobs(client: Any, engine: Engine) -> None:
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 10, "temperature": 0, "logprobs": True}
    chunks = list(client.chat.completions.create(**asked, top_logprobs=3, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    entries = [entry for chunk in chunks if (found := chunk.choices[0].logprobs) for entry in found.content]
    (true,) = said(engine, CHAT_TEXT, max_tokens=10, temperature=0, logprobs=3).completions
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == true.text
    assert bytes(byte for entry in entries for byte in entry.bytes) == bytes(true.token_ids)
    assert [entry.logprob for entry in entries] == pytest.approx([each.logprob for each in true.logprobs], abs=1e-4)
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_many_clients_at_once_get_what_each_gets_alone(server: ServerProcess, engine: Engine) -> None:
    async def ask(client: Any, number: int) -> str:
        stream = await client.completions.create(
            model="other", prompt=f"number {number}", max_tokens=3 + number, seed=number, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(16)))

    for number, text in enumerate(asyncio.run(ask_all())):
        assert text == said(engine, f"number {number}", max_tokens=3 + number, seed=number).completions[0].text


def test_fields_beyond_openais_reach_the_engine(client: Any, engine: Engine) -> None:
    more = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2, "return_token_ids": True, "logprobs_of": "sampled"}
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 8, "seed": 9, "temperature": 0.8, "top_p": 0.9}
    body |= {"logit_bias": {"100": -100, "65": 1.5}, "presence_penalty": 0.5, "frequency_penalty": 0.25, "logprobs": 0}
    (choice,) = client.completions.create(**body, extra_body=more | {"unknown_field": 1}).choices
    (true,) = said(
        engine, "ab", max_tokens=8, seed=9, temperature=0.8, top_p=0.9, top_k=5, min_p=0.01, repetition_penalty=1.2,
        logit_bias={100: -100, 65: 1.5}, presence_penalty=0.5, frequency_penalty=0.25, logprobs=0,
        logprobs_of="sampled",
    ).completions  # fmt: skip
    assert choice.token_ids == list(true.token_ids)
    assert choice.prompt_token_ids == [97, 98]
    assert choice.logprobs.token_logprobs == pytest.approx([each.logprob for each in true.logprobs], abs=1e-4)
    first = true.token_ids[0]
    ended = client.completions.create(
        **body | {"logprobs": None}, extra_body=more | {"stop_token_ids": [first], "ignore_eos": True, "top_k": -1}
    )
    assert ended.choices[0].finish_reason in ("stop", "length")
    minimal = client.completions.create(
        model="tiny", prompt="ab", max_tokens=8, seed=9, extra_body={"stop_token_ids": [first], "min_tokens": 4}
    )
    assert minimal.usage.completion_tokens >= 4


def test_models_are_listed_by_all_their_names(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="there is no model `tini` here") as caught:
        client.models.retrieve("tini")
    assert caught.value.code == "model_not_found"


WRONG_COMPLETIONS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"prompt": []}, "prompt: the list is empty", "prompt"),
    ({"prompt": ""}, "the prompt has no tokens", "prompt"),
    ({"prompt": [1, 300]}, "the prompt has token 300; expected tokens from 0 to 256", "prompt"),
    ({"prompt": ["a", [1]]}, "prompt: expected a text, a list of texts, a list of token ids, or a list of", "prompt"),
    ({"prompt": "\ud800"}, "prompt: holds half a character", "prompt"),
    ({"prompt": "a" * 512}, "512 tokens of prompt and 1 of output do not fit: 512 is the most", "prompt"),
    ({"prompt": "a", "max_tokens": 512}, "1 tokens of prompt and 512 of output do not fit", "max_tokens"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens: 0 leaves nothing to say", "max_tokens"),
    ({"prompt": "a", "max_tokens": "many"}, "max_tokens: Input should be a valid integer", "max_tokens"),
    (
        {"prompt": "a", "temperature": -1, "top_p": 2},
        "temperature: -1.0 is out of range; expected from 0",
        "temperature",
    ),
    ({"prompt": "a", "n": 1000}, "n: Input should be less than or equal to 128", "n"),
    ({"prompt": "a", "logprobs": 21}, "logprobs: Input should be less than or equal to 20", "logprobs"),
    ({"prompt": "a", "stop": [""]}, "stop: an empty text stops nothing", "stop"),
    ({"prompt": "a", "stop": 3}, "stop: expected a text or a list of texts", "stop"),
    ({"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias: the model has no token 999", "logit_bias"),
    ({"prompt": "a", "suffix": "b"}, "this server does not fill in", "suffix"),
    ({"prompt": "a", "best_of": 3}, "best_of: expected the value of n", "best_of"),
    ({"prompt": "a", "stream_options": {}}, "stream_options: expected stream: true", "stream_options"),
    ({}, "prompt: Field required", "prompt"),
]
WRONG_CHATS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"messages": []}, "messages: List should have at least 1 item", "messages"),
    ({"messages": [{"content": "a"}]}, "messages.0.role: Field required", "messages"),
    ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs: expected logprobs: true", "top_logprobs"),
    ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "the chat template of this model takes no", "tools"),
    ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice: calls cannot be forced", "tool_choice"),
    ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "outputs are not", "response_format"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type `image_url`", "messages"),
    ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens: 0 leaves nothing", "max_tokens"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages: holds half a character", "messages"),
    (
        {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message: excludes",
        "continue_final_message",
    ),
]


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [("/v1/completions", *case) for case in WRONG_COMPLETIONS]
    + [("/v1/chat/completions", *case) for case in WRONG_CHATS],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_right_is_400_and_names_the_field(
    server: ServerProcess, path: str, body: dict[str, Any], message: str, param: str | None, stream: bool
) -> None:
    if stream and "stream_options" in body:
        return
    content = json.dumps({**body, "stream": stream})
    answer = httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "content", "kind", "status"),
    [
        ("POST", "/v1/completions", b'{"prompt', "application/json", 400),
        ("POST", "/v1/completions", b'"prompt"', "application/json", 400),
        ("POST", "/v1/completions", b"\xff\xfe", "application/json", 400),
        ("POST", "/v1/completions", b'{"prompt": "a"}', "text/plain", 400),
        ("POST", "/v1/completions", b" " * (33 * 2**20), "application/json", 413),
        ("POST", "/v1/completions", b'{"prompt":"a","temperature":NaN}', "application/json", 400),
        ("POST", "/v1/completions", b'{"prompt":"a","model":"\\ud800"}', "application/json", 404),
        ("POST", "/v1/completions", b'{"prompt":"a","model":"tini"}', "application/json", 404),
        ("GET", "/v1/completions", b"", "application/json", 405),
        ("POST", "/v1/embeddings", b"{}", "application/json", 404),
    ],
)
def test_every_refusal_has_openais_shape(
    server: ServerProcess, method: str, path: str, content: bytes, kind: str, status: int
) -> None:
    answer = httpx.request(method, server.url + path, content=content, headers={"Content-Type": kind}, timeout=30)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_long_prompt_in_a_large_body_is_refused_politely(server: ServerProcess) -> None:
    answer = httpx.post(server.url + "/v1/completions", json={"prompt": "a" * 10**7})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_leaves_nothing_behind(server: ServerProcess, stream: bool) -> None:
    async def leave() -> None:
        body = {"prompt": ["a", "b", "c"], "max_tokens": 500, "n": 4, "ignore_eos": True, "stream": stream}
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            for _ in range(4):
                if stream:
                    async with client.stream("POST", "/v1/completions", json=body) as answer:
                        assert answer.status_code == 200
                        await anext(answer.aiter_lines())
                else:
                    with pytest.raises(httpx.ReadTimeout):
                        await client.post("/v1/completions", json=body, timeout=0.3)

    before = metric(server, "flagscale_output_tokens_total")
    asyncio.run(leave())
    wait_for(lambda: metric(server, "flagscale_requests_running") == 0)
    assert metric(server, "flagscale_requests_waiting") == 0
    assert metric(server, "flagscale_cache_pages_used") == 0
    # Ended, not finished: four times three prompts with four samples each would be 24000 tokens.
    assert metric(server, "flagscale_output_tokens_total") - before < 12000


def test_metrics_count_requests_and_time_them(server: ServerProcess, client: Any) -> None:
    before = metric(server, "flagscale_output_tokens_total")
    client.completions.create(model="tiny", prompt="a", max_tokens=7, extra_body={"ignore_eos": True})
    assert metric(server, "flagscale_output_tokens_total") == before + 7
    route = '{path="/v1/completions"}'
    assert metric(server, f"flagscale_request_seconds_count{route}") >= 1
    assert metric(server, f"flagscale_first_token_seconds_count{route}") >= 1
    assert metric(server, 'flagscale_http_requests_total{path="/v1/completions",status="200"}') >= 1


def test_no_logprob_is_infinite_since_json_has_no_infinity(client: Any) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 4, "logprobs": 20, "top_p": 0.01}
    answer = client.completions.create(**body, extra_body={"logprobs_of": "sampled"})
    values = [value for top in answer.choices[0].logprobs.top_logprobs for value in top.values()]
    assert all(math.isfinite(value) for value in values)
    assert min(values) == -9999
