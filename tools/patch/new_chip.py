#!/usr/bin/env python3
"""Start the patch set of a new chip from one that works: its patches, and a platform module for your torch plugin.

    python tools/patch/new_chip.py --device-type Vendor_Chip --device mlu --collectives cncl

docs/patches.md, "Bring up a new chip", tells what comes next.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flagscale.env import root_dir
from flagscale.errors import FlagScaleError
from flagscale.patch.new_chip import start_chip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device-type", required=True, metavar="VENDOR_CHIP", help="the new folder below hardware/")
    parser.add_argument("--device", required=True, help="how torch names the chip: mlu, musa, npu")
    parser.add_argument("--collectives", required=True, help="its backend of torch.distributed: cncl, mccl, hccl")
    parser.add_argument("--backend", default="Megatron-LM", help="the backend to patch (default: Megatron-LM)")
    parser.add_argument("--template", default="Generic_CPU", help="the chip whose patches to start from")
    parser.add_argument("--contact", default="", help="whom to ask about the patches")
    args = parser.parse_args()
    hardware = root_dir() / "hardware"
    try:
        made = start_chip(
            hardware, args.template, args.device_type, args.backend, args.device, args.collectives, args.contact
        )
    except FlagScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{made}: {args.device_type} starts with the patches of {args.template}; next:")
    print("  a record for it in flagscale/chips/records.py (docs/chips.md)")
    print(f"  flagscale install --backend megatron --device {args.device_type}")
    print('  docs/patches.md, "Bring up a new chip"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
