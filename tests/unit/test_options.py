"""One argument in words: the table of kinds, and what stands in the way of argparse."""

from types import MappingProxyType
from typing import Any

import pytest

from flagscale.runner.config.catalogue import Argument, load_catalogue
from flagscale.runner.render.options import catalogue_renderer, render_option, render_plain, render_value


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (True, "true"), (False, "false"), (1, "1"), (1e-5, "1e-05"), (0.1, "0.1"), ("", ""), ("é", "é"),
        ((1, 2), "[1, 2]"), ({"a": (1, None)}, '{"a": [1, null]}'), (MappingProxyType({"é": True}), '{"é": true}'),
        ((MappingProxyType({"a": 1}),), '[{"a": 1}]'),
    ],
)  # fmt: skip
def test_one_word(value: Any, word: str) -> None:
    assert render_value(value) == word


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, ()), (True, ("--a-b",)), (False, ()), (3, ("--a-b", "3")), ("x y", ("--a-b", "x y")),
        ("", ("--a-b", "")), ((), ("--a-b",)), ((1, "b"), ("--a-b", "1", "b")), (((1, 2), 3), ("--a-b", "[1, 2]", "3")),
        (-1, ("--a-b", "-1")), (-0.5, ("--a-b", "-0.5")), (-1e-5, ("--a-b=-1e-05",)), ("-x", ("--a-b=-x",)),
        ("--", ("--a-b=--",)), ({"k": 1}, ("--a-b", '{"k": 1}')), ((-1e-5, 2.0), ("--a-b", "-0.00001", "2.0")),
    ],
)  # fmt: skip
def test_an_argument_that_no_catalogue_knows(value: Any, words: tuple[str, ...]) -> None:
    assert render_option("a_b", value, None) == words
    assert render_plain((("a_b", value),)) == words


KINDS = {
    "switch": Argument("s", ("--s",), kind="store_true"),
    "off": Argument("no_s", ("--no-s",), kind="store_false"),
    "optional": Argument("o", ("--o",), kind="optional_bool", negative_flag="--no-o"),
    "one": Argument("v", ("--v", "-v")),
    "word": Argument("b", ("--b",), type="bool"),
    "list": Argument("l", ("--l",), nargs="+"),
    "json": Argument("j", ("--j",), type="json"),
    "append": Argument("m", ("--m",), kind="append"),
    "maybe": Argument("q", ("--q",), nargs="?"),
}


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("switch", True, ("--s",)), ("switch", False, ()), ("off", True, ("--no-s",)), ("off", False, ()),
        ("optional", True, ("--o",)), ("optional", False, ("--no-o",)), ("one", "x", ("--v", "x")),
        ("word", False, ("--b", "false")), ("list", (1, 2), ("--l", "1", "2")), ("list", 1, ("--l", "1")),
        ("json", {"a": (1,)}, ("--j", '{"a": [1]}')), ("json", (1,), ("--j", "[1]")), ("json", "{}", ("--j", "{}")),
        ("append", ("a", "b"), ("--m", "a", "--m", "b")), ("append", "a", ("--m", "a")), ("append", (), ()),
        ("append", ("-x",), ("--m=-x",)), ("maybe", True, ("--q",)), ("maybe", "x", ("--q", "x")),
        *((kind, None, ()) for kind in KINDS),
    ],
)  # fmt: skip
def test_every_kind(kind: str, value: Any, words: tuple[str, ...]) -> None:
    assert render_option(KINDS[kind].name, value, KINDS[kind]) == words


def test_an_alias_is_rendered_by_the_flag_that_comes_first() -> None:
    assert catalogue_renderer("sglang")((("tp", 2),)) == (load_catalogue("sglang").rows["tp_size"]["flags"][0], "2")


def test_a_default_that_is_on_is_switched_off_by_its_own_flag() -> None:
    assert catalogue_renderer("vllm")((("enable_prefix_caching", False),)) == ("--no-enable-prefix-caching",)
    assert catalogue_renderer("megatron")((("no_position_embedding", True), ("use_flash_attn", False)))[:1] == (
        "--no-position-embedding",
    )


@pytest.mark.parametrize(("value", "word"), [(1e6, "1000000"), (500000.0, "500000"), ("1000000", "1000000")])
def test_a_whole_number_that_yaml_reads_as_a_float_reaches_a_parser_of_ints(value: Any, word: str) -> None:
    argument = load_catalogue("megatron").find("rotary_base")
    assert argument is not None
    assert argument.find_expected(value) is None
    assert render_option("rotary_base", value, argument) == ("--rotary-base", word)


def test_a_broken_number_is_no_whole_number() -> None:
    argument = load_catalogue("megatron").find("rotary_base")
    assert argument is not None
    assert argument.find_expected(1.5) == "a whole number"
