"""Copies of static data to a device, and what captured CUDA graphs keep alive."""

from __future__ import annotations

import torch
from torch import Tensor

# Replays of a graph read these; nothing else may hold them any more. A few KB each.
_KEPT_FOR_GRAPHS: list[object] = []

BEFORE_CAPTURE = (
    "the first call with these gradients was made while a CUDA graph is being captured: make one before, so that "
    "kernels are loaded and tables are on the device"
)


def upload(table: Tensor, device: torch.device) -> Tensor:
    """Copies a table to the device, without waiting for it."""
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def keep_for_graphs(*used: object) -> None:
    """Keeps what a graph being captured reads for as long as the program runs."""
    _KEPT_FOR_GRAPHS.append(used)
