"""The first patch set of a new chip, made of one that works.

Most of a port of Megatron-LM is the same for every chip: its modules ask a platform module in place of `torch.cuda`.
What differs is that module, so it is the one patch that is written anew: for a chip whose torch plugin mirrors
`torch.cuda` it is a dozen lines.
"""

import re
from dataclasses import replace
from pathlib import Path

from flagscale.errors import UserError, find_nearest
from flagscale.patch.export import make_patches, write_series
from flagscale.patch.series import SERIES_FILE, Header, Patch, load_series
from flagscale.patch.tree import REGULAR, Content

PLATFORM = "megatron/core/platform.py"
NAME = re.compile(r"[A-Z][A-Za-z0-9]*_[A-Za-z0-9]+")

MODULE = '''"""The chip that Megatron runs on, in place of `torch.cuda`: {device}, with {collectives} between ranks.

torch's plugin for the chip mirrors `torch.cuda`, so its names are taken from there; what it lacks or does otherwise is
said below.
"""

import torch
import torch_{device}
from torch.{device} import *

device_type = "{device}"
"""how torch names the device"""
collectives = "{collectives}"
"""the backend of torch.distributed"""
has_fused_kernels = False
"""whether there are fused kernels that want to be compiled before the first step"""


def get_device_capability(device=None):
    """What to answer where Megatron asks for a generation of NVIDIA's: one without what Hopper brought."""
    return (8, 0)


def __getattr__(name):
    return getattr(torch.{device}, name)
'''


def make_platform_patch(chip: str, device: str, collectives: str) -> Patch:
    """The patch that adds the platform module of a chip."""
    header = Header(
        why=f"Megatron asks torch.cuda for devices, streams, random state and memory; on {chip} torch.{device} does.",
        how="A module with the names of torch.cuda, taken from the chip's torch plugin. The other patches ask it.",
        upstream="not offered: upstream supports CUDA alone and has no module for other chips to go into.",
        remove_when="no other patch of the series imports it.",
    )
    text = MODULE.format(device=device, collectives=collectives)
    (patch,) = make_patches({}, {PLATFORM: Content(REGULAR, text.encode())}, {}, header)
    return patch


def start_chip(
    hardware: Path, template: str, chip: str, backend: str, device: str, collectives: str, contact: str = ""
) -> Path:
    """Write `hardware/<chip>/<backend>` from the template's patches and a platform module of its own.

    device, collectives: as torch and torch.distributed name them
    Returns the folder.

    Raises:
        UserError: a name cannot be right, the template is not there, or the folder is there already.
    """
    if not NAME.fullmatch(chip):
        raise UserError(f"--device-type {chip}: expected <Vendor>_<Chip>, the vendor with a capital: Metax_C550")
    for word, value in (("--device", device), ("--collectives", collectives)):
        if not value.isidentifier():
            raise UserError(f"{word} {value}: expected a word as torch uses it: mlu, cncl")
    source, folder = hardware / template / backend, hardware / chip / backend
    if not (source / SERIES_FILE).is_file():
        known = sorted(path.parent.parent.name for path in hardware.glob(f"*/{backend}/{SERIES_FILE}"))
        near = find_nearest(template, known)
        hint = f"; did you mean `{near}`?" if near else ""
        raise UserError(f"{source}: no patch set to start from; there are: {', '.join(known) or 'none'}{hint}")
    if folder.exists():
        raise UserError(f"{folder} is there already, and nothing of it is overwritten")
    series = load_series(source)
    own = make_platform_patch(chip, device, collectives)
    patches = tuple(own if patch.name == own.name else patch for patch in series.patches)
    write_series(folder, replace(series, name=f"{chip}/{backend}", contact=contact, models=(), patches=patches))
    return folder
