"""A replacement for ``timm.utils.dispatch_clip_grad`` whose mode "norm" clips by component.

``apply()`` before training makes timm use it, in ``train.py`` and in its loss scalers, which unscale first.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch
from typing_extensions import Unpack

from ..components.parameters import Parameters
from ..components.spec import ComponentSpec
from ..core.options import ClipOptions
from ..thresholds import ParamRelative
from ..thresholds.constant import MaxNorm
from ._common import ClipCall, checked
from ._patch import Patch

MODES = ("norm", "value", "agc")


def dispatch_clip_grad(
    parameters: Parameters,
    value: MaxNorm,
    mode: str = "norm",
    norm_type: float = 2.0,
    **options: Unpack[ClipOptions],
) -> None:
    """Clips gradients in place, as timm's ``--clip-grad`` and ``--clip-mode`` say: "norm" by component.

    Args:
        parameters: as for ``fused_component_clip_``. timm passes them without names.
        value: "norm": the cap of each component, not of all together. "value": the largest absolute value of an
            element. "agc": a unit's cap, as a share of its parameters' norm.
        mode: "norm"; "value", which is torch's ``clip_grad_value_``; or "agc", adaptive gradient clipping by output
            unit, timm's rule in one pass over the gradients.
        norm_type: order of the norms.
        options: ``components``, ``eps``, ``nonfinite``, ``process_group`` and ``backend`` of
            ``fused_component_clip_``. ``components="all"`` is timm's own rule. "agc" has components of its own and no
            ``eps``; "value" uses none of these options.

    Raises:
        TypeError, ValueError, RuntimeError: as ``fused_component_clip_``; nothing is changed.

    Example:
        >>> import torch
        >>> from cwclip_kernels.integrations.timm import dispatch_clip_grad
        >>> model = torch.nn.Linear(2, 1)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> model.bias.grad = torch.tensor([0.5])
        >>> dispatch_clip_grad(model.parameters(), 1.0)
        >>> model.weight.grad, model.bias.grad
        (tensor([[0.6000, 0.8000]]), tensor([0.5000]))

    References:
        https://github.com/huggingface/pytorch-image-models, ``timm/utils/clip_grad.py`` and ``agc.py`` (1.0.31).
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, not {mode!r}")
    if mode == "value":
        checked(norm_type, False, options)
        torch.nn.utils.clip_grad_value_(parameters, value)  # type: ignore[arg-type]
    elif mode == "norm":
        ClipCall(parameters, value, norm_type, False, options).clip_()
    else:
        for name, why in (("components", "has its own, output units"), ("eps", "adds nothing to a norm, as timm's")):
            if options.get(name) is not None:
                raise ValueError(f"{name}: 'agc' {why}; leave it out")
        # With an eps small gradients would be clipped to less than their cap.
        call = ClipCall(parameters, math.inf, norm_type, False, {**options, "components": _UNITS, "eps": 0.0})
        known = _factors.get(call.session)
        if known is None or known[0] != value:
            known = _factors[call.session] = value, ParamRelative(value)  # type: ignore[arg-type]
        call.max_norm = known[1]
        call.clip_()


def apply(**options: Unpack[ClipOptions]) -> Patch:
    """Makes timm call ``dispatch_clip_grad`` of this module, with these options.

    Returns:
        A handle: ``remove()``, or the end of a ``with`` block, puts timm's function back.

    Raises:
        TypeError, ValueError: a wrong option.
        RuntimeError: this version's function has another signature than timm 1.0.31's, or is replaced already.

    Example:
        >>> from cwclip_kernels.integrations import timm
        >>> handle = timm.apply(nonfinite="zero")  # doctest: +SKIP
    """
    checked(2.0, False, options)
    return Patch("timm.utils", "dispatch_clip_grad", dispatch_clip_grad, options)


_UNITS = ComponentSpec().unitwise("*")
_factors: WeakKeyDictionary[object, tuple[object, ParamRelative]] = WeakKeyDictionary()
