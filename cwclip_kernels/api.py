"""The functions: component clipping in one call, and measuring without touching."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import is_not
from typing import Any

from torch import Tensor, nn

from .caps import Caps, MaxNorm
from .clipper import Engine, check_options
from .components import Grouping, Parameters, as_items, named_tensors, resolve


def fused_component_clip_(
    parameters: Parameters,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    components: Grouping = None,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    backend: str | None = None,
) -> Tensor:
    """Clips each component's gradient to its own norm, in place.

        norm_c = (sum over component c of |g|^p)^(1/p)
        coef_c = min(1, max_norm_c / (norm_c + eps));  g <- coef_c * g

    The first four arguments are those of ``torch.nn.utils.clip_grad_norm_``, in its order. Where coef_c is 1
    nothing is written. No host sync, except to raise for a non-finite norm when that is asked for.

    Args:
        parameters: a Module, a Tensor, or an iterable of Tensors or of (name, Tensor) pairs, whose ``.grad`` is
            clipped: float32, bfloat16, float16, float64 or complex, dense or sparse COO, on any mix of
            devices. A tensor that comes twice, tied weights included, counts once.
        max_norm: the cap. A number; a floating-point Tensor of shape [] or [K], used where it lies, without a
            sync; or a mapping of ``fnmatch`` patterns on component names to numbers: the first that matches
            counts, a component that none matches is not clipped. ``inf`` measures only, 0 zeroes.
        norm_type: order p of the norm: any real number, or inf ("inf"). 1, 2 and inf have kernels.
        error_if_nonfinite: same as ``nonfinite="error"``.
        components: what is clipped together. None or "parameter": each tensor alone. "module": all that one
            module owns. "layer": all under the name up to its last number (``encoder.layer.3``). "type": the
            same place in every layer (``encoder.layer.*.output.dense.weight``). "all": everything, as
            ``clip_grad_norm_``. Or a callable (name, tensor) -> hashable key, None to leave the tensor alone.
        eps: added to the norm before dividing.
        nonfinite: what becomes of a component whose norm is inf or NaN. "propagate": as torch, inf scales by
            0 and NaN spreads, inside that component alone. "zero": zeroes it. "skip": leaves it as it is.
            "error": RuntimeError that names the components, no gradient changed; syncs with the host. A
            component whose cap is inf is only measured, whatever its norm.
        backend: None for the best available, or "cpu", "triton", "foreach", "reference": used or refused.

    Returns:
        [K] norms before clipping, float32 (float64 if any gradient is), on the gradients' device. K and the
        order depend on ``parameters`` alone: without gradient, a component's norm is 0.

    Raises:
        TypeError, ValueError: an argument or gradient that isn't what it should be; nothing is changed.
        RuntimeError: a non-finite norm under "error", or a named backend that can't serve; nothing is changed.

    Example:
        >>> import torch
        >>> from cwclip_kernels import fused_component_clip_
        >>> model = torch.nn.Linear(2, 1)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> model.bias.grad = torch.tensor([0.5])
        >>> fused_component_clip_(model, max_norm=1.0)
        tensor([5.0000, 0.5000])
        >>> model.weight.grad, model.bias.grad
        (tensor([[0.6000, 0.8000]]), tensor([0.5000]))

    References:
        Yang & Ma, "Improving Stability of Fine-Tuning Pretrained Language Models via Component-Wise Gradient
        Norm Clipping", EMNLP 2022, arXiv 2210.10325. eps: ``torch.nn.utils.clip_grad_norm_``.
    """
    options = check_options(norm_type, error_if_nonfinite, eps, nonfinite, backend)
    tensors, engine = _engine_for(parameters, components)
    return engine.clip_(tensors, Caps(max_norm, engine.components.names), options)[0]


def component_norms(
    parameters: Parameters,
    norm_type: float = 2.0,
    *,
    components: Grouping = None,
    backend: str | None = None,
) -> Tensor:
    """Norm of each component's gradient; nothing is changed.

    Args:
        parameters: as for :func:`fused_component_clip_`.
        norm_type: likewise.
        components: likewise.
        backend: likewise.

    Returns:
        [K] norms, float32 (float64 if any gradient is), on the gradients' device; no host sync.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fused_component_clip_`.

    Example:
        >>> import torch
        >>> from cwclip_kernels import component_norms
        >>> model = torch.nn.Linear(2, 1)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> component_norms(model)
        tensor([5., 0.])
        >>> component_norms(model, norm_type=1.0, components="all")
        tensor([7.])
    """
    options = check_options(norm_type, False, 0.0, "propagate", backend)
    tensors, engine = _engine_for(parameters, components)
    return engine.norms(tensors, options.rule.norm_type, backend)


@dataclass(frozen=True)
class _Entry:
    """An engine for parameters seen before; weak, so that the cache keeps no model alive."""

    sources: tuple[weakref.ref[Any], ...]
    tensors: tuple[weakref.ref[Tensor], ...]
    engine: Engine

    def alive(self) -> list[Tensor] | None:
        """The tensors, or None where anything is gone (whose id another object may have by now)."""
        if any(ref() is None for ref in self.sources):
            return None
        tensors = [ref() for ref in self.tensors]
        return tensors if all(map(is_not, tensors, repeat(None))) else None  # type: ignore[return-value]


_KEPT = 16
_engines: OrderedDict[Hashable, _Entry] = OrderedDict()
_lock = threading.Lock()


def _engine_for(parameters: Parameters, grouping: Grouping) -> tuple[Sequence[Tensor], Engine]:
    """Resolving names costs milliseconds and a plan more, so both are kept for the last few sets of parameters."""
    source = parameters if isinstance(parameters, nn.Module) else as_items(parameters)
    key = _key(source, grouping)
    with _lock:
        entry = _engines.get(key)
        tensors = None if entry is None else entry.alive()
        if entry is not None and tensors is not None:
            _engines.move_to_end(key)
            return tensors, entry.engine
    named = named_tensors(source)
    engine = Engine(resolve(named, grouping))
    watched = [s for s in (source, grouping) if not isinstance(s, str | list | None)]
    try:
        refs = tuple(map(weakref.ref, watched))
    except TypeError:  # a callable that can't be watched might be another one at the same address next time
        return named.tensors, engine
    with _lock:
        _engines[key] = _Entry(refs, tuple(map(weakref.ref, named.tensors)), engine)
        while len(_engines) > _KEPT:
            _engines.popitem(last=False)
    return named.tensors, engine


def _key(source: nn.Module | list[Any], grouping: Grouping) -> Hashable:
    how = grouping if isinstance(grouping, str) else id(grouping)
    if isinstance(source, nn.Module):
        return how, id(source), tuple(map(id, _walk(source, [])))
    if source and isinstance(source[0], Tensor):
        return how, tuple(map(id, source))
    # Whatever isn't a pair of a name and a tensor gets a key that is never found, and is refused then.
    return how, tuple((i[0], id(i[1])) if _is_pair(i) else id(i) for i in source)


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)


def _walk(module: nn.Module, found: list[Tensor | None]) -> list[Tensor | None]:
    # named_parameters() builds every name anew: five times the cost of the walk.
    found.extend(module._parameters.values())
    for child in module._modules.values():
        if child is not None:
            _walk(child, found)
    return found
