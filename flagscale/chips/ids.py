"""Which device a number means: on the card, on the host, and in a process that sees only some of them.

Three numberings meet in a job. A card is what is plugged in; a device is what a process computes on, and some cards
carry two; and within a process the visible devices are counted anew from 0. Runtimes forgive a number that names no
device: CUDA's stops reading there, Ascend's leaves it out, and the job fails later over a device that it never had.
So every function here refuses such a number, by name.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flagscale.errors import UserError

if TYPE_CHECKING:
    from flagscale.chips.records import Chip

HIDES_ALL = ("", "-1")


@dataclass(frozen=True, slots=True)
class Device:
    """One device, as a discovery tool tells of it; what it does not tell is None.

    index: the id that visible-devices variables know it by
    card: the number of the card that it is on
    bus: its PCI address, `0000:3b:00.0`
    health: the tool's own word, `OK`
    """

    index: int
    name: str | None = None
    memory_bytes: int | None = None
    bus: str | None = None
    uuid: str | None = None
    card: int | None = None
    health: str | None = None


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"


def _repeated(numbers: Sequence[int]) -> set[int]:
    return {number for number in numbers if numbers.count(number) > 1}


def check_ids(chip: "Chip", ids: Sequence[int], devices: Sequence[Device] | None = None) -> None:
    """Check that each id means a device of its own.

    devices: what the host has; None where that is not known, as when a job is planned on another machine.

    Raises:
        UserError: an id is negative, named twice, or of no device.
    """
    if negative := {number for number in ids if number < 0}:
        raise UserError(f"{chip.name} devices {_list(negative)}: an id is a whole number from 0")
    if twice := _repeated(ids):
        raise UserError(f"{chip.name} devices {_list(twice)} are named more than once")
    if devices is None:
        return
    present = {device.index for device in devices}
    if missing := set(ids) - present:
        raise UserError(f"{chip.name} devices {_list(missing)} are not on this host; it has {_list(present)}")


def logical_ids(chip: "Chip", physical: Sequence[int], devices: Sequence[Device] | None = None) -> tuple[int, ...]:
    """The ids of the devices on the cards `physical`, card by card, each card's in ascending order.

    devices: what the host has. None where that is not known: then cards are taken to be numbered from 0 without a
        gap, with `chip.devices_per_card` devices each, and no card can be found missing.

    Raises:
        UserError: a card is negative, named twice, or not there.
    """
    if negative := {card for card in physical if card < 0}:
        raise UserError(f"{chip.name} cards {_list(negative)}: a card's number is a whole number from 0")
    if twice := _repeated(physical):
        raise UserError(f"{chip.name} cards {_list(twice)} are named more than once")
    if devices is None:
        count = chip.devices_per_card
        return tuple(card * count + die for card in physical for die in range(count))
    by_card: dict[int, list[int]] = {}
    for device in devices:
        by_card.setdefault(card_of(chip, device), []).append(device.index)
    if missing := set(physical) - by_card.keys():
        raise UserError(f"{chip.name} cards {_list(missing)} are not on this host; it has {_list(by_card)}")
    return tuple(index for card in physical for index in sorted(by_card[card]))


def card_of(chip: "Chip", device: Device) -> int:
    """The card that `device` is on: what the tool said, else by the count of devices a card."""
    return device.index // chip.devices_per_card if device.card is None else device.card


def visible_ids(
    chip: "Chip", environ: Mapping[str, str], devices: Sequence[Device] | None = None
) -> tuple[int, ...] | None:
    """The devices that a process with the environment `environ` sees, in its own order; None where nothing limits it.

    The position in what is returned is the process's own number for the device.

    Raises:
        UserError: two variables of the chip disagree, a word is no device, or a device is named twice.
    """
    said = {name: environ[name].strip() for name in chip.visible_devices if name in environ}
    if not said:
        return None
    first, text = next(iter(said.items()))
    for name, other in said.items():
        if other != text:
            raise UserError(f"{first}={text} and {name}={other} disagree: {chip.name} heeds both, set them alike")
    if text in HIDES_ALL:
        return ()
    ids = tuple(_read_word(f"{first}={text}", word.strip(), devices) for word in text.split(","))
    check_ids(chip, ids, devices)
    return ids


def _read_word(where: str, word: str, devices: Sequence[Device] | None) -> int:
    if word.isascii() and word.isdecimal():
        return int(word)
    for device in devices or ():
        if word and device.uuid is not None and device.uuid.startswith(word):
            return device.index
    raise UserError(f"{where}: `{word}` names no device; expected ids from 0, joined by commas")
