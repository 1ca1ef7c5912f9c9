"""Numbers of the host as tensors of the device, without waiting for it.

A plain copy to a GPU waits until everything queued there is done; from pinned memory it is queued behind it instead.
"""

from collections.abc import Sequence

import torch


def stage(
    values: "Sequence[int] | Sequence[float]", device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The values as a tensor [len(values)] on the device."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
