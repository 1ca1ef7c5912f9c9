"""verl's overrides: spelled so that Hydra's grammar reads them back."""

from typing import Any

import pytest

from flagscale.runner.render.verl import render_hydra_value, render_verl


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"), (True, "True"), (1, "1"), (1e-6, "1e-06"), ("gsm8k/main", "gsm8k/main"), ("a b", "'a b'"),
        ("null", "'null'"), ("True", "'True'"), ("1", "'1'"), ("", "''"), ("it's", r"'it\'s'"), ("a,b", "'a,b'"),
        (["console", "wandb"], "[console,wandb]"), ([], "[]"), ({}, "{}"),
        ([{"a": 1, "b": [None]}], "[{a:1,b:[null]}]"),
        ("é", "'é'"), ("a=b", "'a=b'"),
    ],
)  # fmt: skip
def test_values(value: Any, text: str) -> None:
    assert render_hydra_value(value) == text


def test_trees_become_dotted_paths() -> None:
    arguments = (("data", {"a": {"b": 1}, "c": None}), ("+new", {"x": {"y": True}}), ("flat", "v"), ("none", {}))
    assert render_verl(arguments) == ("data.a.b=1", "data.c=null", "+new.x.y=True", "flat=v", "none={}")
