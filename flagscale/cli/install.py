"""`flagscale install`: a backend for a chip, fetched, patched, and installed or put on the path of jobs."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flagscale.patch.pins import Pin
    from flagscale.patch.series import Series

SUMMARY = "get a backend for a chip: fetch it, patch it, install it or put it on the path of jobs"


def install(pin: "Pin", chip: str, dry_run: bool, replace: bool, without_chip: bool = False) -> int:
    """Returns the exit code: 1 where the backend is there and something that it needs is not.

    without_chip: also where this machine does not have the chip that a wheel is for

    Raises:
        SourceError: it cannot be had here for this chip; nothing was downloaded.
    """
    from flagscale.chips.probe import probe_host
    from flagscale.cli.doctor import find_version
    from flagscale.cli.source import fetch
    from flagscale.env import root_dir, source_dir
    from flagscale.patch.chiptree import load_layers
    from flagscale.patch.installation import WHEELS, check_way, find_built, find_missing, list_commands, run_commands

    layers = load_layers(root_dir() / "hardware", pin.name, chip)
    tree = source_dir(pin.name, chip if layers else None)
    program = find_built(pin, chip, tree)
    installed = find_version(pin.project) if pin.on_path is None and not program else None
    commands: tuple[tuple[str, ...], ...] = ()
    if installed:
        check_version(pin, installed)
    else:
        check_way(pin, chip, chip if without_chip or pin.on_path is not None else probe_host().chip.name)
        commands = list_commands(pin, chip, tree)
    if dry_run:
        print(f"would fetch {pin.project} {pin.version} into {tree}" + f", patched for {chip}" * bool(layers))
        print("".join(f"would run: {' '.join(command)}\n" for command in commands), end="")
        return 0
    fetch(pin, source_dir(pin.name), (chip,) if layers else (), replace)
    run_commands(pin, chip, commands)
    if program:
        print(f"{pin.name}: built for {chip}; a service finds it by `--bin-dir {program.parent}`")
        return 0
    if pin.on_path is None:
        patch_package(pin, layers if installed or (pin.backend, chip) in WHEELS else ())
        return 0
    print(f"{pin.backend}: on the path of every job on {chip}, from {tree}")
    missing = find_missing(pin)
    if missing:
        print(f"not there yet: {', '.join(missing)}: {sys.executable} -m pip install {' '.join(missing)}")
    return 1 if missing else 0


def install_for_build(backend: str, device: str) -> None:
    """What of `install` can be done while this toolkit itself is being built, in an environment that ends with it.

    Raises:
        UserError: nothing, for this backend: it has to be installed into the environment that will run it.
    """
    from flagscale.cli.source import fetch, find_chips, name_chip
    from flagscale.env import root_dir, source_dir
    from flagscale.errors import UserError
    from flagscale.patch.pins import find_pin

    pin, chip = find_pin(backend, root_dir() / "third_party"), name_chip(device)
    if pin.on_path is None:
        raise UserError(
            f"{pin.backend} cannot be installed while this toolkit is built: leave `backend` and `device` out, and run "
            f"`flagscale install --backend {pin.backend} --device {chip}`"
        )
    fetch(pin, source_dir(pin.name), find_chips([chip], pin.name), False)


def check_version(pin: "Pin", installed: str) -> None:
    """
    Raises:
        UserError: another release is installed than the one that is pinned.
    """
    from flagscale.errors import UserError

    if installed.partition("+")[0] != pin.version:
        raise UserError(
            f"{pin.project} {installed} is installed, and this toolkit is made for {pin.version}: "
            f"`{sys.executable} -m pip uninstall {pin.project}`, and run this again"
        )


def patch_package(pin: "Pin", layers: "Sequence[Series]") -> None:
    """Apply the patch sets to the installed package."""
    from flagscale.patch.apply import apply_series
    from flagscale.patch.package import below_package, find_package

    if not layers:
        print(f"{pin.project}: installed, and there is nothing to patch")
        return
    folder = find_package(pin.name)
    apply_series(folder, [below_package(layer, pin.name) for layer in layers])
    print(f"{pin.project}: installed, and patched by {', '.join(layer.name for layer in layers)} in {folder}")


def main(argv: list[str]) -> int:
    from flagscale.cli.source import name_chip
    from flagscale.env import root_dir
    from flagscale.patch.pins import find_pin

    parser = argparse.ArgumentParser(
        prog="flagscale install",
        description="Fetch a backend, patch it for a chip, and install it or put it on the path of jobs. "
        "What is missing for that is said before anything is downloaded.",
    )
    parser.add_argument("--backend", required=True, help="megatron, vllm, sglang, llama_cpp or verl")
    parser.add_argument("--device", required=True, help="a chip, as hostfiles name it: cpu, A800, mlu")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--replace", action="store_true", help="discard a source that was changed")
    parser.add_argument(
        "--without-chip", action="store_true", help="take the chip's wheel though this machine has no such chip"
    )
    args = parser.parse_args(argv)
    pin = find_pin(args.backend, root_dir() / "third_party")
    return install(pin, name_chip(args.device), args.dry_run, args.replace, args.without_chip)
