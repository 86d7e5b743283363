"""What can be clipped: every gradient is looked at here when a plan is made, and refused by its parameter's name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..arguments import type_name
from ..backends.served import COMPLEX_DTYPES, DTYPES
from ..components.membership import Components

Gradients = Sequence[Tensor | None]

WIDE_DTYPES = (torch.float64, torch.complex128)  # whose norms are returned as float64

_DTYPES = (*DTYPES, *COMPLEX_DTYPES)


class WithoutData(Exception):
    """The gradients are fake tensors, or on the meta device: shapes and dtypes are all that can be computed.

    Attributes:
        device: of the first gradient.
        norm_dtype: of the norms.
    """

    def __init__(self, device: torch.device, norm_dtype: torch.dtype) -> None:
        super().__init__()
        self.device = device
        self.norm_dtype = norm_dtype


def values_of(grad: Tensor) -> Tensor:
    """What a gradient keeps in memory: itself, or a sparse one's values."""
    return grad._values() if grad.is_sparse else grad


def check_gradient(grad: Tensor, name: str, *, cut: bool = False, writes: bool = True) -> None:
    """Raises unless ``grad`` is something that can be clipped in place, or slice by slice if it is ``cut``.

    Raises:
        TypeError: dtype, layout or tensor subclass that isn't served.
        ValueError: a parameter set as gradient, if it ``writes``; elements on one memory place; a meta tensor.
    """
    where = f"the gradient of {name!r}"
    if writes:
        check_not_leaf(grad, where)
    check_tensor(grad, where, cut=cut)


def check_not_leaf(grad: Tensor, where: str) -> None:
    """Raises ValueError if what is to be written to is a parameter, or a leaf that requires grad."""
    if isinstance(grad, torch.nn.Parameter) or (grad.is_leaf and grad.requires_grad):
        raise ValueError(
            f"{where} is itself a parameter (or a leaf that requires grad): clipping would change the parameter's "
            "own data; set p.grad to its gradient, or detach it first"
        )


def was_frozen(name: str, problem: str) -> ValueError:
    """The error where a parameter has a gradient that could not be clipped when it was frozen; see ``Components``."""
    return ValueError(
        f"the gradient of {name!r}, which was frozen when components were looked up: {problem}. "
        "Make the clipper after parameters have been unfrozen"
    )


def check_tensor(grad: Tensor, where: str, *, cut: bool = False) -> None:
    """Raises unless backends can read ``grad``; ``where`` says what it is. Errors as for ``check_gradient``."""
    if type(grad) is not Tensor:
        raise TypeError(
            f"{where} is a {type_name(grad)}: of tensor subclasses only DTensor is served, where the parameter is "
            "one, outside of torch.compile; set p.grad to a plain tensor"
        )
    if grad.is_nested:
        raise TypeError(
            f"{where} is a nested tensor, which is not served; set p.grad to a dense or sparse_coo tensor"
        )
    if grad.dtype not in _DTYPES:
        raise TypeError(
            f"{where} is {grad.dtype}: only {', '.join(map(_short, _DTYPES))} are served; convert it first"
        )
    if grad.layout not in (torch.strided, torch.sparse_coo):
        raise TypeError(f"{where} has layout {grad.layout}: only strided and sparse_coo are served; use .to_dense()")
    if cut and grad.is_sparse:
        raise TypeError(
            f"{where} is sparse and can't be clipped slice by slice: leave it whole in the ComponentSpec, or make "
            "the layer with sparse=False"
        )
    if grad.device.type == "meta":
        raise ValueError(f"{where} is on the meta device: there is no data to clip")
    values = values_of(grad)
    if overlaps(values):
        raise ValueError(
            f"{where} has several elements on one place in memory (shape {list(values.shape)}, strides "
            f"{list(values.stride())}), which would be scaled more than once; use .contiguous()"
        )


def check_data(components: Components, grads: Gradients) -> None:
    """Raises WithoutData if no gradient has data; where only some have none, ``check_gradient`` names the first."""
    clipped = components.clipped
    own = [g for i, g in enumerate(grads) if g is not None and i in clipped]
    if own and all(map(has_no_data, own)):
        wide = any(g.dtype in WIDE_DTYPES for g in own)
        raise WithoutData(own[0].device, torch.float64 if wide else torch.float32)


def has_no_data(tensor: Tensor) -> bool:
    """Whether it is a fake tensor, or on the meta device."""
    fake = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", None)
    return tensor.is_meta or (fake is not None and isinstance(tensor, fake))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def overlaps(grad: Tensor) -> bool:
    """Whether two elements may share memory: each stride must step over all that the smaller ones span."""
    if grad.numel() < 2 or grad.is_contiguous():
        return False
    span = 0
    for stride, size in sorted((st, sz) for st, sz in zip(grad.stride(), grad.shape, strict=True) if sz > 1):
        if stride <= span:
            return True
        span += stride * (size - 1)
    return False


def check_distinct(components: Components, grads: Gradients) -> None:
    """Raises if two gradients share memory. Those with gaps may interleave, but not begin at the same place."""
    places = []
    clipped = components.clipped
    for position, grad in enumerate(grads):
        if grad is not None and position in clipped and (values := values_of(grad)).numel():
            start, gaps = values.data_ptr(), not values.is_contiguous()
            places.append((str(values.device), start, start + (1 if gaps else values.nbytes), position))
    places.sort()
    for (device, _, end, one), (other_device, start, _, other) in pairwise(places):
        if device == other_device and start < end:
            names = components.tensor_names[one], components.tensor_names[other]
            raise ValueError(
                f"the gradients of {names[0]!r} and {names[1]!r} share memory, which would be scaled twice; "
                "give each its own, or pass one of them"
            )
