"""What is rendered is read back as it was: by argparse for options, by Hydra's own parser for overrides."""

import argparse
import json
from dataclasses import replace
from string import Template
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.runner.config.catalogue import Argument
from flagscale.runner.plan.job import ProcessSpec, freeze
from flagscale.runner.render.argv import render_argv
from flagscale.runner.render.options import render_option
from flagscale.runner.render.verl import render_hydra_value, render_verl

quick = settings(max_examples=150, deadline=None)
slow = settings(max_examples=60, deadline=None)
letters = st.characters(exclude_characters="\0", exclude_categories=("Cs",))
text = st.one_of(
    st.text(letters, max_size=10), st.sampled_from(["-", "-1", "-x", "-1e-5", "--value", "---", "", "a b", "null"])
)
words_of_argparse = text.filter(lambda word: word != "--")
"""argparse takes `--` out of what it reads, wherever it stands, also behind `=`"""
floats = st.floats(allow_nan=False, allow_infinity=False)
scalars: st.SearchStrategy[Any] = st.one_of(text, st.integers(-(2**63), 2**63), floats, st.booleans())
json_values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(scalars, st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=6,
)


def parsed(words: tuple[str, ...], **option: Any) -> Any:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--value", **option)
    parser.add_argument("--other")
    return parser.parse_args([*words, "--other", "x"]).value


@quick
@given(words_of_argparse)
def test_a_string(value: str) -> None:
    for argument in (None, Argument("value", ("--value",))):
        assert parsed(render_option("value", value, argument)) == value


@quick
@given(st.one_of(st.integers(), floats))
def test_a_number(value: float) -> None:
    assert (
        parsed(render_option("value", value, Argument("value", ("--value",), type="float")), type=type(value)) == value
    )


@quick
@given(st.lists(st.one_of(st.integers(), floats), min_size=1, max_size=4))
def test_a_list_of_numbers(values: list[float]) -> None:
    words = render_option("value", tuple(values), Argument("value", ("--value",), type="float", nargs="+"))
    assert parsed(words, type=float, nargs="+") == [float(value) for value in values]


@quick
@given(st.lists(text.filter(lambda word: not word.startswith("-")), max_size=4))
def test_a_list_of_strings(values: list[str]) -> None:
    assert (
        parsed(render_option("value", tuple(values), Argument("value", ("--value",), nargs="*")), nargs="*") == values
    )


@quick
@given(st.lists(words_of_argparse, max_size=4))
def test_an_appended_list(values: list[str]) -> None:
    words = render_option("value", tuple(values), Argument("value", ("--value",), kind="append"))
    assert parsed(words, action="append", default=[]) == values


@quick
@given(st.one_of(st.lists(json_values, max_size=3), st.dictionaries(text, json_values, max_size=3)))
def test_a_structure_is_one_word_of_json(value: Any) -> None:
    words = render_option("value", freeze(value), Argument("value", ("--value",), type="json"))
    assert parsed(words, type=json.loads) == value


@given(st.booleans(), st.sampled_from(["store_true", "store_false", "optional_bool"]))
def test_a_switch(value: bool, kind: Any) -> None:
    negative = "--no-value" if kind == "optional_bool" else None
    words = render_option("value", value, Argument("value", ("--value",), kind=kind, negative_flag=negative))
    actions: dict[str, dict[str, Any]] = {
        "store_true": {"action": "store_true"},
        "store_false": {"action": "store_true"},  # the YAML's true means that the flag stands there
        "optional_bool": {"action": argparse.BooleanOptionalAction, "default": not value},
    }
    assert parsed(words, **actions[kind]) is value


# --- verl ------------------------------------------------------------------------------------------------------------

PARSER = OverridesParser.create()
keys = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,6}", fullmatch=True)
TRICKY = (
    "True",
    "null",
    "NaN",
    "1e-5",
    "a\\",
    "\\'",
    "it's",
    "x\\\\'",
    "[a]",
    "~x",
    "v1.0",
    "a:b",
    "x\ny",
    "${a}",
    " a",
)
hydra_values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        scalars,
        st.none(),
        st.sampled_from(["True", "null", "NaN", "1e-5", "a\\", "\\'", "it's", "x\\\\'", "[a]", "~x"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=6,
)


def same(left: Any, right: Any) -> bool:
    """Equal in value and in type: 1 is neither true nor 1.0."""
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and bool(left == right)


@quick
@given(hydra_values)
def test_hydra_reads_back_exactly_the_value(value: Any) -> None:
    override = PARSER.parse_override(f"key={render_hydra_value(value)}")
    assert same(override.value(), value)


@slow
@given(st.dictionaries(keys, st.one_of(hydra_values, st.dictionaries(keys, scalars, max_size=2)), max_size=3))
def test_hydra_reads_back_a_whole_tree(tree: dict[str, Any]) -> None:
    read: dict[str, Any] = {}
    for word in render_verl((("root", freeze(tree)),)):
        override = PARSER.parse_override(word)
        path = override.key_or_group.split(".")
        node = read
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = override.value()
    assert same(read, {"root": tree})


@quick
@given(st.lists(st.sampled_from(["$", "$$", "local_rank", "{", "}", "a"])).map("".join) | text)
def test_torchrun_gives_a_rank_the_words_that_were_meant(value: str) -> None:
    """What torchrun does to each word of its ranks is Python's template substitution."""
    process = ProcessSpec("torchrun", ("torchrun", "x.py"), "/", "pi0", (("a_key", value),), num_ranks=2)
    words = render_argv(process)
    plain = render_argv(replace(process, num_ranks=0))
    assert tuple(Template(word).safe_substitute(local_rank="1") for word in words) == plain
    assert value in plain[2:] or plain[2].endswith(f"={value}")
