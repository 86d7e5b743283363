"""Numbers on their way from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class ToHost:
    """A copy of a tensor to the host that nothing waits for until it is read."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=values.is_cuda)  # to pinned memory, where non-blocking
        self._arrived = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def has_arrived(self) -> bool:
        """Whether reading won't wait."""
        return self._arrived is None or bool(self._arrived.query())

    def read(self) -> Tensor:
        """The values, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values
