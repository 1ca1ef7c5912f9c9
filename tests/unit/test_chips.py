"""Chip records: found by any name a hostfile uses, and telling nothing that contradicts itself."""

import dataclasses
import re
from itertools import chain

import pytest
from factories import run_python
from hypothesis import given
from hypothesis import strategies as st

from flagscale.chips import CHIPS, Chip, Device, find_chip, logical_ids, visible_ids
from flagscale.chips.ids import card_of, check_ids
from flagscale.errors import UserError

ACCELERATORS = [chip for chip in CHIPS if chip.device != "cpu"]
GENERIC, ASCEND, NVIDIA, ILUVATAR = (chip for name in ("cpu", "npu", "gpu", "BI_V150") if (chip := find_chip(name)))
NAMES = [(name, chip) for chip in CHIPS for name in (chip.name, *chip.aliases)]


@given(st.sampled_from(NAMES), st.sampled_from([str, str.upper, str.lower, str.title]))
def test_every_name_finds_its_record_in_any_letter_case(named: tuple[str, Chip], case: "type[str]") -> None:
    name, chip = named
    assert find_chip(case(name)) is chip


def test_no_name_belongs_to_two_records() -> None:
    names = [name.casefold() for name, _chip in NAMES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["", "MLU999", "cpu0", "H100 "])
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


@pytest.mark.parametrize(
    ("name", "record", "device", "collectives", "variables"),
    [
        ("BI-V150", "BI_V150", "cuda", "nccl", "CUDA ILUVATAR"),
        ("MLU590", "Cambricon_MLU", "mlu", "cncl", "MLU"),
        ("Ascend910B", "Huawei_Atlas800TA3", "npu", "hccl", "ASCEND_RT NPU"),
        ("BW1000", "Hygon_BW1000", "cuda", "nccl", "HIP ROCR CUDA"),
        ("P800", "Kunlunxin_R310p", "cuda", "nccl", "XPU CUDA"),
        ("C550", "Metax_C550", "cuda", "nccl", "CUDA MACA"),
        ("S5000", "MUSA_S5000", "musa", "mccl", "MUSA MTHREADS"),
        ("TX81", "Tsing_micro", "txda", "tccl", "TXDA"),
        ("ppu", "THead_PPU", "cuda", "nccl", "CUDA"),
    ],
)
def test_a_vendor_s_record(name: str, record: str, device: str, collectives: str, variables: str) -> None:
    chip = find_chip(name)
    assert chip is not None
    assert (chip.name, chip.device, chip.collectives) == (record, device, collectives)
    assert chip.visible_devices == tuple(f"{word}_VISIBLE_DEVICES" for word in variables.split())


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_a_record_is_whole(chip: Chip) -> None:
    assert bool(chip.visible_devices) == bool(chip.discovery) == (chip in ACCELERATORS)
    assert "GLOO_SOCKET_IFNAME" in chip.interfaces
    assert chip.env["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    names = (*chip.visible_devices, *chip.interfaces, *filter(None, [chip.container_devices]))
    assert all(name == name.upper() and name.isidentifier() for name in names)
    assert chip.devices_per_card >= 1
    if chip.device_nodes:
        assert re.compile(chip.device_nodes).groups == 1


def test_no_two_records_share_a_vendor_id_or_a_tool() -> None:
    for values in ([chip.pci_vendor for chip in CHIPS if chip.pci_vendor], [chip.discovery for chip in ACCELERATORS]):
        assert len(values) == len(set(values))


def test_an_interface_is_told_to_every_library_of_the_chip() -> None:
    assert ASCEND.interface_env("eth1") == {"GLOO_SOCKET_IFNAME": "eth1", "HCCL_SOCKET_IFNAME": "eth1"}
    assert GENERIC.interface_env("eth1") == {"GLOO_SOCKET_IFNAME": "eth1"}


IDS = st.lists(st.integers(0, 63), unique=True, max_size=16)


@given(st.sampled_from(ACCELERATORS), IDS)
def test_what_is_made_visible_is_what_is_seen(chip: Chip, ids: list[int]) -> None:
    env = chip.visible_env(ids)
    assert tuple(env) == chip.visible_devices
    assert visible_ids(chip, env) == tuple(ids)
    assert visible_ids(chip, env, [Device(index) for index in range(64)]) == tuple(ids)


@given(st.sampled_from(ACCELERATORS), IDS.filter(bool), st.data())
def test_a_device_that_is_not_there_is_named_and_never_dropped(chip: Chip, ids: list[int], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(ids))
    present = [Device(index) for index in range(64) if index != gone]
    for attempt in (
        lambda: visible_ids(chip, chip.visible_env(ids), present),
        lambda: check_ids(chip, ids, present),
    ):
        with pytest.raises(UserError, match=rf"devices {gone} are not on this host; it has 0, |devices 0 are not"):
            attempt()


@given(st.sampled_from(ACCELERATORS), st.lists(st.integers(0, 15), unique=True))
def test_cards_and_devices_are_counted_alike_with_and_without_a_probe(chip: Chip, cards: list[int]) -> None:
    devices = [Device(index) for index in range(16 * chip.devices_per_card)]
    ids = logical_ids(chip, cards)
    assert ids == logical_ids(chip, cards, devices)
    assert len(ids) == len(set(ids)) == len(cards) * chip.devices_per_card
    assert [card_of(chip, devices[index]) for index in ids[:: chip.devices_per_card]] == cards


def test_a_card_with_two_dies_is_two_devices() -> None:
    assert logical_ids(ILUVATAR, [3, 0]) == (6, 7, 0, 1)


def test_the_tool_s_word_on_cards_beats_the_record_s() -> None:
    """Atlas A3: two chips an NPU, of which NPU 1 is not there."""
    devices = [Device(5, card=2), Device(4, card=2), Device(0, card=0), Device(1, card=0)]
    assert logical_ids(ASCEND, [2, 0], devices) == (4, 5, 0, 1)
    with pytest.raises(UserError, match="cards 1 are not on this host; it has 0, 2"):
        logical_ids(ASCEND, [0, 1], devices)


@pytest.mark.parametrize(
    ("ids", "message"), [([0, -1], "devices -1: an id is a whole"), ([2, 1, 2], "devices 2 are named more than once")]
)
def test_ids_that_cannot_be_are_refused(ids: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NVIDIA.visible_env(ids)
    with pytest.raises(UserError, match=message.replace("devices", "cards").replace("an id", "a card's number")):
        logical_ids(NVIDIA, ids)


@pytest.mark.parametrize(
    ("text", "seen"), [("", ()), ("-1", ()), (" 3, 1 ", (3, 1)), ("GPU-ab,1", (0, 1)), ("GPU-cd", (1,))]
)
def test_visible_devices_as_shells_write_them(text: str, seen: tuple[int, ...]) -> None:
    devices = [Device(index, uuid=uuid) for index, uuid in enumerate(("GPU-abc", "GPU-cde", None, None))]
    assert visible_ids(NVIDIA, {"CUDA_VISIBLE_DEVICES": text}, devices) == seen


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,x"}, "CUDA_VISIBLE_DEVICES=0,x: `x` names no device"),
        ({"CUDA_VISIBLE_DEVICES": "0,,1"}, "`` names no device"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-abc"}, "`GPU-abc` names no device"),
        ({"CUDA_VISIBLE_DEVICES": "1,1"}, "devices 1 are named more than once"),
        ({"CUDA_VISIBLE_DEVICES": "0", "ILUVATAR_VISIBLE_DEVICES": "1"}, "disagree: BI_V150 heeds both"),
    ],
)
def test_visible_devices_that_runtimes_would_forgive(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        visible_ids(ILUVATAR, environ)


def test_nothing_limits_a_process_that_has_no_such_variable() -> None:
    assert visible_ids(NVIDIA, {"HIP_VISIBLE_DEVICES": "0"}) is None


def test_looking_up_a_chip_imports_nothing_that_looks_at_the_machine() -> None:
    done = run_python("-c", "import sys, flagscale.chips as c; c.find_chip('H100'); print('subprocess' in sys.modules)")
    assert done.stdout == "False\n"


def test_arguments_are_spelled_as_in_yaml() -> None:
    names = chain.from_iterable(arguments for chip in CHIPS for arguments in chip.backend_args.values())
    assert all(name == name.lower() and "-" not in name for name in names)


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHIPS[0].name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        CHIPS[0].env["X"] = "1"  # type: ignore[index]
