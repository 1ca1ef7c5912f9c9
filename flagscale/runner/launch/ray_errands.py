"""What a launcher asks of the hosts of a Ray cluster, answered there as errands are.

versions                 -> python, ray, None where it is not installed
ports     num head       -> ports, address, head, or fault
ray       act ..         -> as of `ray_place.py`, or fault
"""

import platform
import socket
from importlib import metadata
from typing import Any

from flagscale.runner.launch.errands import ERRANDS, answer_errands
from flagscale.runner.launch.ports import find_free_port


def versions(_request: dict[str, Any]) -> dict[str, Any]:
    """Of Python and of Ray."""
    try:
        ray: str | None = metadata.version("ray")
    except metadata.PackageNotFoundError:
        ray = None
    return {"python": platform.python_version(), "ray": ray}


def ports(request: dict[str, Any]) -> dict[str, Any]:
    """Free ports, the address by which this host reaches `head`, and the one that it knows for it."""
    try:
        known = socket.gethostbyname(request["head"])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((known, 9))  # nothing is sent
            own = probe.getsockname()[0]
    except OSError as error:
        return {"fault": f"does not know the head host `{request['head']}`: {error.strerror or error}"}
    free = [port for _ in range(request["num"]) if (port := find_free_port())]
    return {"ports": free, "address": own, "head": known}


def main() -> None:
    from flagscale.runner.launch.ray_place import act

    answer_errands({**ERRANDS, "versions": versions, "ports": ports, "ray": lambda request: act(request)})
