"""What can be clipped: a plan checks every gradient when it is made, and names the parameter of one that can't be."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import type_name
from ..backends.served import COMPLEX_DTYPES, DTYPES
from ..components.membership import Components
from .modes import is_traced

Gradients = Sequence[Tensor | None]

WIDE_DTYPES = (torch.float64, torch.complex128)  # their norms are float64
_DTYPES = (*DTYPES, *COMPLEX_DTYPES)


class WithoutData(Exception):
    """All gradients are fake or meta tensors, so that only device and dtype of the norms are known."""

    def __init__(self, grads: Sequence[Tensor]) -> None:
        super().__init__()
        self.device, self.norm_dtype = grads[0].device, norm_dtype_of(grads)


def norm_dtype_of(grads: Iterable[Tensor]) -> torch.dtype:
    """Dtype of a call's norms: float64 if any gradient is, or else float32."""
    return torch.float64 if any(g.dtype in WIDE_DTYPES for g in grads) else torch.float32


def values_of(grad: Tensor) -> Tensor:
    """A gradient's tensor in memory: itself, or the values of a sparse one."""
    return grad._values() if grad.is_sparse else grad


def has_no_data(tensor: Tensor) -> bool:
    """Whether it is a fake tensor, or on the meta device."""
    fake = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", None)
    return tensor.is_meta or (fake is not None and isinstance(tensor, fake))


def check_gradients(
    components: Components, grads: Mapping[int, Tensor], what: str = "the gradient of", *, writes: bool = True
) -> None:
    """Raises unless gradients, by position, can be measured and, if it ``writes``, scaled in place.

    Raises:
        TypeError: dtype, layout or tensor subclass that isn't served.
        ValueError: several elements in one place, no data; or if it ``writes``, a parameter or an inference tensor.
    """
    names, cut, problems = components.tensor_names, components.cut, dict(components.problems)
    for position, grad in grads.items():
        where = f"{what} {names[position]!r}"
        if position in problems:
            raise ValueError(
                f"{where}, which was frozen when components were looked up: {problems[position]}. "
                "Make the clipper after parameters have been unfrozen"
            )
        if writes:
            check_not_leaf(grad, where)
        _check_type(grad, where, cut=position in cut)
        values = values_of(grad)
        if grad.is_meta:
            raise ValueError(f"{where} is on the meta device: there is no data to clip")
        if overlaps(values):
            raise ValueError(
                f"{where} has several elements on one place in memory (shape {list(values.shape)}, strides "
                f"{list(values.stride())}), which would be scaled more than once; use .contiguous()"
            )
        if writes and not is_traced() and grad.is_inference():
            raise ValueError(f"{where} was made in inference mode, and can't be written to outside of it; clone() it")


def _check_type(grad: Tensor, where: str, *, cut: bool) -> None:
    problem = None
    if type(grad) is not Tensor:
        problem = (
            f"is a {type_name(grad)}: of tensor subclasses only DTensor is served, where the parameter is one, "
            "outside of torch.compile; set p.grad to a plain tensor"
        )
    elif grad.is_nested:
        problem = "is a nested tensor, which is not served; set p.grad to a dense or sparse_coo tensor"
    elif grad.dtype not in _DTYPES:
        served = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        problem = f"is {grad.dtype}: only {served} are served; convert it first"
    elif grad.layout not in (torch.strided, torch.sparse_coo):
        problem = f"has layout {grad.layout}: only strided and sparse_coo are served; use .to_dense()"
    elif cut and grad.is_sparse:
        problem = (
            "is sparse and can't be clipped slice by slice: leave it whole in the ComponentSpec, or make the layer "
            "with sparse=False"
        )
    if problem is not None:
        raise TypeError(f"{where} {problem}")


def check_not_leaf(grad: Tensor, where: str) -> None:
    """Raises ValueError if what is to be written to is a parameter, or a leaf that requires grad."""
    if isinstance(grad, torch.nn.Parameter) or (grad.is_leaf and grad.requires_grad):
        raise ValueError(
            f"{where} is itself a parameter (or a leaf that requires grad): clipping would change the parameter's "
            "own data; set p.grad to its gradient, or detach it first"
        )


def overlaps(grad: Tensor) -> bool:
    """Whether two elements may share memory: each stride must step over all that the smaller ones span."""
    if grad.numel() < 2 or grad.is_contiguous():
        return False
    # Dynamo may take strides for variables: it can't sort them then, nor, in torch 2.13, read them from .grad itself.
    grad = torch.ops.aten.alias(grad) if is_traced() else grad
    steps = [(grad.stride(dim), size) for dim, size in enumerate(grad.shape) if size > 1]
    for i, (stride, _) in enumerate(steps):
        smaller = (step for j, step in enumerate(steps) if step[0] < stride or (step[0] == stride and j < i))
        if stride <= sum(other * (size - 1) for other, size in smaller):
            return True
    return False


class _Extent(NamedTuple):
    device: str
    start: int  # in bytes
    end: int
    place: int  # among the gradients
    values: Tensor


def sharing(grads: Gradients) -> tuple[int, int] | None:
    """Indices of two gradients that have an element in common, or None; exact, also where elements interleave."""
    found = share_memory(grads)  # which needs no table, as below
    if found is not None:
        return found
    extents = []
    for i, grad in enumerate(grads):
        if grad is not None and not grad.is_meta and (values := values_of(grad)).numel():
            last = sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
            start = values.data_ptr()
            end = start + (last + 1) * values.element_size()
            extents.append(_Extent(str(values.device), start, end, i, values))
    groups: list[list[_Extent]] = []  # whose extents meet, one after the other
    reach = 0
    for extent in sorted(extents, key=lambda extent: extent[:4]):
        if groups and extent.device == groups[-1][0].device and extent.start < reach:
            groups[-1].append(extent)
            reach = max(reach, extent.end)
        else:
            groups.append([extent])
            reach = extent.end
    return next((pair for group in groups if len(group) > 1 and (pair := _meeting(group)) is not None), None)


def _meeting(group: Sequence[_Extent]) -> tuple[int, int] | None:
    """Indices of the first two that have an element in common.

    All are drawn into one table of the memory that they span, with a flag for each unit by which they may be shifted.
    """
    base = group[0].start
    unit = math.gcd(*(n for extent in group for n in (extent.values.element_size(), extent.start - base)))
    table = torch.zeros((max(extent.end for extent in group) - base) // unit, dtype=torch.bool, device="cpu")
    for i, (_, start, _, place, values) in enumerate(group):
        width = values.element_size() // unit
        strides = *(stride * width for stride in values.stride()), 1
        drawn = table.as_strided((*values.shape, width), strides, (start - base) // unit)
        if bool(drawn.any()):
            others = group[:i]
            other = others[0] if i == 1 else next(one for one in others if _meeting([one, group[i]]) is not None)
            return other.place, place
        drawn.fill_(True)
    return None


def share_memory(grads: Gradients) -> tuple[int, int] | None:
    """As ``sharing``, for every call: those with gaps may interleave, but not begin together."""
    places = []
    for i, grad in enumerate(grads):
        if grad is not None and not grad.is_meta and (values := values_of(grad)).numel():
            start = values.data_ptr()
            places.append((str(values.device), start, start + (values.nbytes if values.is_contiguous() else 1), i))
    for (device, _, end, one), (other_device, start, _, other) in pairwise(sorted(places)):
        if device == other_device and start < end:
            return one, other
    return None
