"""A body becomes prompts of tokens and sampling parameters, or a refusal that names the field."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flagscale.errors import ConfigError, UserError
from flagscale.inference.engine import SamplingParams
from flagscale.inference.server.bodies import MAX_PROMPTS, ChatBody, CompletionBody, Message, SamplingBody
from flagscale.inference.server.faults import RequestError, refusal_of
from flagscale.inference.server.service import Service

DEFAULT_MAX_TOKENS = 16
"""of a completion, as OpenAI has it; a chat goes on as long as the model's length allows"""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to go on from, and how."""

    tokens: tuple[int, ...]
    params: SamplingParams


async def ask_completion(service: Service, body: CompletionBody) -> tuple[Prompt, ...]:
    """
    Raises:
        RequestError: the body cannot be answered.
    """
    if body.suffix:
        raise RequestError("this server does not fill in before a suffix", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of: expected the value of n; the best are not picked here", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens: 0 leaves nothing to say; expected at least 1, or echo", param="max_tokens")
    settings: dict[str, Any] = {"logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:
        settings["prompt_logprobs"] = body.logprobs
    engine = service.engine
    given = list_prompts(body.prompt)
    for text in given:
        if isinstance(text, str):
            check_text(service, text, "prompt")
    tokens = await service.call_encoder(lambda: [engine.encode(prompt) for prompt in given], "prompt")
    limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else None
    wanted = max(1, body.max_tokens) if body.max_tokens is not None else None
    return tuple(make_prompt(service, each, body, settings, wanted, limit, "prompt") for each in tokens)


def list_prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """
    Raises:
        RequestError: there is none, or too many.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt: the list is empty; expected at least one text or token", param="prompt")
    if isinstance(prompt[0], int):
        return [[each for each in prompt if isinstance(each, int)]]
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(f"prompt: {len(prompt)} prompts; expected at most {MAX_PROMPTS}", param="prompt")
    return [each for each in prompt if not isinstance(each, int)]


async def ask_chat(service: Service, body: ChatBody) -> tuple[Prompt, ...]:
    """
    Raises:
        RequestError: the body cannot be answered.
    """
    check_chat(body)
    tokenizer = service.engine.tokenizer
    template = tokenizer.get_chat_template() if tokenizer is not None and tokenizer.chat_template else None
    if template is None:
        raise RequestError("this model has no chat template; expected a request to /v1/completions", param="messages")
    tools = None if body.tool_choice == "none" else body.tools or None
    if tools and "tools" not in template:
        raise RequestError("tools: the chat template of this model takes no tools", param="tools")
    tokens = await service.call_encoder(lambda: encode_chat(service, body, tools), "messages")
    settings = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    wanted = body.max_completion_tokens or body.max_tokens
    return (make_prompt(service, tokens, body, settings, wanted, None, "messages"),)


def check_chat(body: ChatBody) -> None:
    """
    Raises:
        RequestError: a field asks for what this server does not do.
    """
    if body.max_tokens == 0:
        raise RequestError("max_tokens: 0 leaves nothing to say; expected at least 1", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs: expected logprobs: true beside it", param="top_logprobs")
    if body.tool_choice not in (None, "auto", "none"):
        raise RequestError("tool_choice: calls cannot be forced here; expected auto or none", param="tool_choice")
    if (body.response_format or {}).get("type", "text") != "text":
        raise RequestError("response_format: outputs are not constrained here; expected text", param="response_format")
    if body.continue_final_message and body.add_generation_prompt and "add_generation_prompt" in body.model_fields_set:
        message = "continue_final_message: excludes add_generation_prompt"
        raise RequestError(message, param="continue_final_message")


def encode_chat(service: Service, body: ChatBody, tools: list[dict[str, Any]] | None) -> tuple[int, ...]:
    """
    Raises:
        UserError: the model's template does not take these messages.
    """
    tokenizer = service.engine.tokenizer
    messages = [flatten_message(message, i) for i, message in enumerate(body.messages)]
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            **(body.chat_template_kwargs or {}),
        )
    except Exception as error:  # whatever a template raises is about what it was given
        raise UserError(f"messages: the chat template of this model refuses them: {error}") from error
    check_text(service, text, "messages")
    return service.engine.encode(tokenizer.encode(text, add_special_tokens=False))


def check_text(service: Service, text: str, param: str) -> None:
    """
    Raises:
        RequestError: the text cannot fit, or holds half a surrogate pair, which JSON can write and no tokenizer read.
    """
    if len(text) > service.max_text_len:
        message = f"{len(text)} characters do not fit: {service.engine.max_model_len} tokens are the most"
        raise RequestError(message, param=param, code="context_length_exceeded")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(f"{param}: holds half a character (a lone surrogate)", param=param) from None


def flatten_message(message: Message, index: int) -> dict[str, Any]:
    """What a template expects: content as one text, arguments of tool calls as objects.

    Raises:
        UserError: the content is no text.
    """
    flat = message.model_dump(exclude_unset=True)
    place = f"messages.{index}"
    if isinstance(message.content, list):
        kinds = [part.get("type") for part in message.content]
        wrong = next((kind for kind in kinds if kind != "text"), None)
        if wrong is not None or not all(isinstance(part.get("text"), str) for part in message.content):
            raise UserError(f"{place}.content: a part of type `{wrong}`; this model takes parts of type text")
        flat["content"] = "\n".join(part["text"] for part in message.content)
    else:
        flat["content"] = message.content or ""
    for call in flat.get("tool_calls") or []:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError:
                raise UserError(f"{place}.tool_calls: the arguments of a call are not JSON") from None
    return flat


def make_prompt(
    service: Service,
    tokens: Sequence[int],
    body: SamplingBody,
    settings: dict[str, Any],
    max_tokens: int | None,
    limit: int | None,
    param: str,
) -> Prompt:
    """
    max_tokens: what was asked for; limit: how much it is at most where nothing was asked for

    Raises:
        RequestError: parameters that mean nothing, or a prompt that is too long.
    """
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options: expected stream: true beside it", param="stream_options")
    longest = service.engine.max_model_len
    room = longest - len(tokens)
    if room < (max_tokens or 1):
        message = f"{len(tokens)} tokens of prompt and {max_tokens or 1} of output do not fit: {longest} is the most"
        raise RequestError(message, param=param if room < 1 else "max_tokens", code="context_length_exceeded")
    try:
        return Prompt(tuple(tokens), sampling_of(service, body, settings, max_tokens or min(limit or room, room)))
    except ConfigError as error:
        raise refusal_of(error) from error


def sampling_of(service: Service, body: SamplingBody, settings: dict[str, Any], max_tokens: int) -> SamplingParams:
    """
    Raises:
        ConfigError: values that mean nothing.
    """
    names = (
        "n", "seed", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "min_tokens", "ignore_eos", "stop_token_ids", "logprobs_of",
    )  # fmt: skip
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    given["stop_token_ids"] = tuple(given.get("stop_token_ids", ()))
    given["include_stop"] = bool(body.include_stop_str_in_output)
    if given.get("top_k") == -1:
        given["top_k"] = 0
    return SamplingParams(**{**service.defaults, **given, **settings, "max_tokens": max_tokens})
