"""Chip records: found by any name a hostfile uses, and telling nothing that contradicts itself."""

import dataclasses
import importlib
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.chips import CHIPS, Chip, find_chip

NAMES = [(name, chip) for chip in CHIPS for name in (chip.name, *chip.aliases)]


@given(st.sampled_from(NAMES), st.sampled_from([str, str.upper, str.lower, str.title]))
def test_every_name_finds_its_record_in_any_letter_case(named: tuple[str, Chip], case: "type[str]") -> None:
    name, chip = named
    assert find_chip(case(name)) is chip


def test_no_name_belongs_to_two_records() -> None:
    names = [name.casefold() for name, _chip in NAMES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["", "MLU590", "cpu0", "H100 "])
def test_an_unknown_name_finds_nothing(name: str) -> None:
    assert find_chip(name) is None


def test_the_cpu_computes_with_gloo_and_needs_nothing_visible() -> None:
    chip = find_chip("cpu")
    assert chip is not None
    assert (chip.name, chip.device, chip.collectives, chip.visible_devices) == ("Generic_CPU", "cpu", "gloo", ())
    assert chip.backend_args["megatron"]["distributed_backend"] == "gloo"
    assert chip.env["OMP_WAIT_POLICY"] == "PASSIVE"


def test_an_nvidia_card_is_chosen_by_cuda_visible_devices() -> None:
    chip = find_chip("A800")
    assert chip is not None
    assert (chip.name, chip.collectives, chip.visible_devices[0]) == ("NVIDIA", "nccl", "CUDA_VISIBLE_DEVICES")
    assert not chip.backend_args


def test_arguments_are_spelled_as_in_yaml() -> None:
    names = chain.from_iterable(arguments for chip in CHIPS for arguments in chip.backend_args.values())
    assert all(name == name.lower() and "-" not in name for name in names)


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHIPS[0].name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        CHIPS[0].env["X"] = "1"  # type: ignore[index]


def test_the_hook_sets_that_records_name_are_there() -> None:
    for chip in CHIPS:
        if chip.hooks:
            assert importlib.import_module(f"flagscale.hooks.{chip.hooks}").HOOKS
