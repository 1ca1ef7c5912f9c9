"""The bodies of requests, as OpenAI's clients send them and with the further fields that vLLM made common.

A field that is not known is ignored: clients are often newer than servers. One that is known and cannot be honoured
(images, forced tool calls, JSON schemas) is refused, since ignoring it would answer another question.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

MAX_SAMPLES = 128
MAX_PROMPTS = 2048
MAX_TOP_LOGPROBS = 20


class StreamOptions(BaseModel):
    include_usage: bool = False
    """send the token counts in a last chunk, which has no choices"""


class SamplingBody(BaseModel):
    """What completions and chats have in common; None: the model's own recommendation, else OpenAI's default."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(1, ge=1, le=MAX_SAMPLES)
    max_tokens: int | None = Field(None, ge=0)
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """-1 or 0: all tokens"""
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[StrictInt] | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    """tell the tokens of prompts and outputs, too"""
    logprobs_of: Literal["raw", "sampled"] | None = None
    """log-probabilities of the model's own distribution (raw), or of the one that was sampled from"""


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: str | list[StrictInt] | list[str] | list[list[StrictInt]]
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = None
    suffix: str | None = None


class Message(BaseModel):
    """One turn; what the model's template knows of further fields, it gets."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """the last message is the beginning of the answer"""
    chat_template_kwargs: dict[str, Any] | None = None
    """further variables of the model's template, as `enable_thinking`"""


class LoadAdapterBody(BaseModel):
    """POST /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1)
    lora_path: str
    load_inplace: bool = False
    """replace the adapter that has this name"""


class UnloadAdapterBody(BaseModel):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


class UpdateBody(BaseModel):
    """POST /update_weights_from_disk."""

    model_path: str
    version: StrictInt | str
