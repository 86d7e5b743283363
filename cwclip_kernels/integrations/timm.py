"""timm's call, by component.

In ``train.py``, this import in place of ``utils.dispatch_clip_grad``; or, with timm left as it is, before training:

    from cwclip_kernels.integrations.timm import dispatch_clip_grad
    from timm import utils
    utils.dispatch_clip_grad = utils.cuda.dispatch_clip_grad = dispatch_clip_grad

``utils.cuda`` has timm's loss scalers, which unscale first.
"""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

import torch

from ..components.parameters import Parameters
from ..components.spec import ComponentSpec, Grouping
from ..core.cache import session_for
from ..core.options import check_options
from ..core.session import ClipSession
from ..thresholds import ParamRelative
from ..thresholds.constant import MaxNorm

MODES = ("norm", "value", "agc")


def dispatch_clip_grad(
    parameters: Parameters,
    value: MaxNorm,
    mode: str = "norm",
    norm_type: float = 2.0,
    *,
    components: Grouping = None,
    nonfinite: str = "propagate",
    backend: str | None = None,
) -> None:
    """Clips gradients in place, as timm's ``--clip-grad`` and ``--clip-mode`` say: "norm" by component.

    The arguments up to ``norm_type`` are those of ``timm.utils.dispatch_clip_grad``; give it others with
    ``functools.partial``.

    Args:
        parameters: as for ``fused_component_clip_``. timm passes them without names.
        value: "norm": the cap of each component, not of all together. "value": the largest absolute value of an
            element. "agc": a unit's cap, as a share of its parameters' norm.
        mode: "norm"; "value", which is torch's ``clip_grad_value_``; or "agc", adaptive gradient clipping by output
            unit, timm's rule in one pass over the gradients.
        norm_type: order of the norms.
        components: what is clipped together under "norm"; each parameter by itself if None. "all" is timm's own rule.
        nonfinite: as for ``fused_component_clip_``; not under "value".
        backend: likewise.

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
        torch.nn.utils.clip_grad_value_(parameters, value)  # type: ignore[arg-type]
        return
    # timm's AGC adds nothing to a norm: small gradients would be clipped to less than their cap.
    options = check_options(norm_type, False, 0.0 if mode == "agc" else 1e-6, nonfinite, backend)
    if mode == "agc":
        if components is not None:
            raise ValueError("components: 'agc' has its own, output units; leave it out")
        tensors, session = session_for(parameters, _UNITS, settings=options.in_words)
        known = _factors.get(session)
        if known is None or known[0] != value:
            known = _factors[session] = value, ParamRelative(value)  # type: ignore[arg-type]
        value = known[1]
    else:
        tensors, session = session_for(parameters, components, settings=partial(options.in_words, value))
    session.clip_(tensors, session.caps_for(value, tensors, options.rule), options)


_UNITS = ComponentSpec().unitwise("*")
_factors: WeakKeyDictionary[ClipSession, tuple[object, ParamRelative]] = WeakKeyDictionary()
