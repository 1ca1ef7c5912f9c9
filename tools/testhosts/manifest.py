"""The manifest of a set: its layout as JSON, written before anything is made and deleted after all else.

A set whose making broke off in the middle is taken down by the same file. `namespaces` is added once they are made: a
name that by then belongs to a namespace of another number is not ours any more.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from testhosts.layout import Layout, plan_layout
from testhosts.machine import HostsError

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """layout, and what else has to be undone.

    namespaces: name -> the kernel's number of it; empty until all of them are made
    made_etc_netns: the machine had no /etc/netns before
    """

    layout: Layout
    namespaces: dict[str, int]
    made_etc_netns: bool = False


def write_manifest(manifest: Manifest) -> None:
    layout = manifest.layout
    content = {
        "version": VERSION,
        "name": layout.name,
        "network": layout.network,
        "num_hosts": len(layout.hosts),
        "private_dirs": [str(folder) for folder in layout.private_dirs],
        "namespaces": manifest.namespaces,
        "made_etc_netns": manifest.made_etc_netns,
    }
    path = layout.folder / MANIFEST
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of the set in `folder`, None where there is none.

    Raises:
        HostsError: the file is not one.
    """
    path = folder / MANIFEST
    try:
        row = json.loads(path.read_text())
        private_dirs = tuple(map(Path, row["private_dirs"]))
        layout = plan_layout(row["name"], folder, int(row["network"]), int(row["num_hosts"]), private_dirs)
        return Manifest(layout, {str(k): int(v) for k, v in row["namespaces"].items()}, bool(row["made_etc_netns"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HostsError(f"{path} is no manifest of test hosts: {error!r}") from error


def used_networks(root: Path) -> set[int]:
    manifests = (read_manifest(path.parent) for path in sorted(root.glob(f"*/{MANIFEST}")))
    return {manifest.layout.network for manifest in manifests if manifest is not None}
