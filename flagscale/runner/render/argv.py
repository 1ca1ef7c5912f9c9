"""A process's whole command line: its fixed words, then its arguments as their backend spells them."""

from collections.abc import Mapping
from string import Template

from flagscale.runner.plan.job import AtLaunch, LaunchName, ProcessSpec, Word
from flagscale.runner.render.options import Renderer, catalogue_renderer, render_plain
from flagscale.runner.render.verl import render_verl

RENDERERS: dict[str, Renderer] = {
    "megatron": catalogue_renderer("megatron"),
    "vllm": catalogue_renderer("vllm"),
    "sglang": catalogue_renderer("sglang"),
    "llama_cpp": catalogue_renderer("llama_cpp"),
    "native": catalogue_renderer("native"),
    "verl": render_verl,
}


def bind_word(word: Word, values: Mapping[LaunchName, str] | None) -> str:
    """The word with what was chosen at launch put in; without `values`, with its name in place."""
    if not isinstance(word, AtLaunch):
        return word
    return str(word) if values is None else word.bind(dict(values))


def render_argv(process: ProcessSpec, values: Mapping[LaunchName, str] | None = None) -> tuple[str, ...]:
    """The words of a process's command line, unquoted."""
    fixed = tuple(bind_word(word, values) for word in process.argv)
    words = RENDERERS.get(process.backend, render_plain)(process.arguments)
    return fixed + (tuple(map(_keep_from_torchrun, words)) if process.num_ranks else words)


def _keep_from_torchrun(word: str) -> str:
    """torchrun puts the local rank in place of `$local_rank` in the words of its ranks, and makes `$$` a `$`."""
    is_changed = "$" in word and Template(word).safe_substitute(local_rank="") != word
    return word.replace("$", "$$") if is_changed else word
