"""Finding what waits for the device, on the CPU and on a GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoSync(TorchDispatchMode):
    """Raises where a GPU would have to be waited for."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_to_copy.cpu", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, name
        assert name != "index" or all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as an index"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_sync() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            # Once a process torch warns that the check doesn't find every wait. As an error that would leave it on.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
