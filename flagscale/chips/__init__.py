"""One record for each kind of chip: what is true of every job on it, said once; and what a host has of them.

Records and ids are pure and quick, for they are asked for every host of every plan. Looking at the machine is
`flagscale.chips.probe`, which is imported where a host is looked at.
"""

from flagscale.chips.ids import Device, logical_ids, visible_ids
from flagscale.chips.records import CHIPS, Chip, find_chip

__all__ = ["CHIPS", "Chip", "Device", "find_chip", "logical_ids", "visible_ids"]
