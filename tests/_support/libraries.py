"""Modules in place of timm 1.0.31 and torchtitan 0.3.0, whose functions have the signatures of the real ones.

Neither is installed where the tests run; test_timm.py and test_torchtitan.py compare ours with an installed one's.
"""

import sys
import types

import torch


def dispatch_clip_grad(parameters, value: float, mode: str = "norm", norm_type: float = 2.0):
    raise AssertionError("timm's own")


@torch.no_grad()
def clip_grad_norm_(
    parameters: "torch.Tensor | list",
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    pp_mesh: "object | None" = None,
    ep_enabled: bool = False,
) -> torch.Tensor:
    raise AssertionError("torchtitan's own")


# Of each its function, and the modules that have it.
LIBRARIES = {
    "timm": (dispatch_clip_grad, ("timm.utils", "timm.utils.cuda", "timm.utils.clip_grad")),
    "torchtitan": (clip_grad_norm_, ("torchtitan.distributed.utils",)),
}


def stand_in(name, monkeypatch):
    """Makes the library importable, and returns its modules that have the function."""
    function, holders = LIBRARIES[name]
    for module in {name, *(holder.rsplit(".", 1)[0] for holder in holders), *holders}:
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    sys.modules[name].__version__ = "9.8.7"
    for holder in holders:
        setattr(sys.modules[holder], function.__name__, function)
    return [sys.modules[holder] for holder in holders]
