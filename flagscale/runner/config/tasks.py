"""The task-level YAML: one model for each task type.

What we compute with is a field. What we only pass on to a backend stays a dict here and is checked against the
backend's argument catalogue by `arguments.py`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from flagscale.runner.config.section import Section

EngineName = Literal["vllm", "sglang", "llama_cpp", "native"]
Arguments = dict[str, Any]


def _check_file_name(name: str) -> str:
    """A model's name stands in the names of its script and its log."""
    if not re.fullmatch(r"\w[\w.@+-]*", name):
        raise ValueError("a name without spaces and slashes")
    return name


def _as_list(value: Any) -> Any:
    """One name, as good as a list of it."""
    return [value] if isinstance(value, str) else value


class Train(Section):
    """`train`: three sections of backend arguments, nested as their author likes; nesting has no meaning."""

    system: Arguments = Field(default_factory=dict)
    model: Arguments = Field(default_factory=dict)
    data: Arguments = Field(default_factory=dict)


class Generate(Section):
    """What to generate: prompts for a language model, or what the pipeline of another loader takes."""

    model_config = ConfigDict(extra="allow")

    prompts: list[str] | None = None
    sampling: Arguments = Field(default_factory=dict)


class Inference(Section):
    """`inference`: `llm` for a vLLM model, `engine` for a pipeline of another library."""

    llm: Arguments | None = None
    """keyword arguments of `vllm.LLM`"""
    engine: Arguments | None = None
    """model, loader, device, torch_dtype, pipeline, .."""
    generate: Generate = Field(default_factory=Generate)


class Resources(Section):
    """What one model of a service is given."""

    num_replicas: int | None = Field(default=None, ge=1)
    """how many there are from the start; default `min_replicas`, else 1"""
    num_gpus: float | None = Field(default=None, ge=0)
    """chips of one replica; default what its parallel sizes multiply to"""
    num_cpus: float | None = Field(default=None, ge=0)
    """threads of one replica on a CPU; default an equal part of the host's"""
    min_replicas: int | None = Field(default=None, ge=0)
    max_replicas: int | None = Field(default=None, ge=1)
    downscale_delay_s: float | None = Field(default=None, ge=0)
    upscale_delay_s: float | None = Field(default=None, ge=0)
    target_ongoing_requests: float | None = Field(default=None, gt=0)
    """requests in flight and waiting that one replica is meant to have"""


class Profile(Section):
    """The load that a benchmark of a service uses."""

    prefix_len: int = 0
    input_len: int = 1024
    output_len: int = 1024
    num_prompts: int = 200
    range_ratio: float = 0.5


class ServeModel(Section):
    """One model of a service, or one node of a graph of models."""

    serve_id: Annotated[str, AfterValidator(_check_file_name)]
    engine: EngineName | None = None
    engine_args: Arguments = Field(default_factory=dict)
    """the common vocabulary, spelled as vLLM spells it"""
    engine_args_specific: dict[EngineName, Arguments] = Field(default_factory=dict)
    """the engine's own arguments; they win over `engine_args`"""
    resources: Resources = Field(default_factory=Resources)
    profile: Profile | None = None
    module: str | None = None
    """of a node of a graph: the file of its class, relative to the folder in which the command is typed"""
    name: str | None = None
    """its class, which has a method `forward`"""
    depends: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list)
    """the nodes whose results `forward` is given, in this order; none: it is given the request's fields by name"""


class CustomServe(Section):
    """`serve` as a mapping: a service with an entry point of its own, which reads these as they are."""

    engine: Arguments = Field(default_factory=dict)
    generate: Arguments = Field(default_factory=dict)


class Compress(Section):
    """`compress`: what the compressor reads."""

    system: Arguments = Field(default_factory=dict)
    model: Arguments = Field(default_factory=dict)
    data: Arguments = Field(default_factory=dict)
    compress_args: dict[str, list[Arguments]] = Field(default_factory=dict)
    """method -> recipes: algo, targets, ignore, scheme"""


class Rl(Section):
    """`rl`: the name of verl's base configuration, and the tree of overrides laid over it."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    config_path: str | None = Field(default=None, alias="config-path")
    config_name: str | None = Field(default=None, alias="config-name")
    append_kargs: Arguments = Field(default_factory=dict)
    """overrides for keys that the base configuration lacks (Hydra's `+`)"""

    @property
    def overrides(self) -> Arguments:
        return dict(self.model_extra or {})
