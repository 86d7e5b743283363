"""From components and gradients to device buckets: what one call has to do, worked out once.

A plan depends on which gradients exist and on their type, dtype, device and layout, never on their values or
addresses, so a training loop builds one plan and reuses it at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import dispatch
from .backends import extension
from .components import CUT, LEFT_ALONE, Box, Components, type_name

Gradients = Sequence[Tensor | None]
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Bucket:
    """The gradients of one device that one backend serves, in any mix of dtypes.

    Attributes:
        device: where the gradients live.
        backend: name of the backend that serves them.
        reason: why that backend, for ``explain()``.
        positions: index of each gradient in the call's list of parameters.
        components: component of each piece, int64 [m] on the CPU, values in [0, count). Pieces are the gradients,
            unless there are ``boxes``.
        boxes: gradient (its place in the bucket) and place of each of the m pieces; None if none is cut.
        count: number of components K of the whole call; every [K] tensor has this length.
        norm_dtype: float32, or float64 if any gradient of the call is float64.
        plain: all are real and strided, so that they can be handed over as they are.
        scratch: static data a backend derives from the bucket once (tile tables and the like).
    """

    device: torch.device
    backend: str
    reason: str
    positions: tuple[int, ...]
    components: Tensor
    boxes: tuple[tuple[int, Box], ...] | None
    count: int
    norm_dtype: torch.dtype
    plain: bool
    scratch: dict[str, Any] = field(default_factory=dict)

    def pick(self, grads: Gradients) -> list[Tensor]:
        """This bucket's own out of the call's gradients; the list itself where that is all of them."""
        if len(self.positions) == len(grads) and isinstance(grads, list):
            return grads
        return [grads[i] for i in self.positions]  # type: ignore[misc]  # none of these is None

    def pieces(self, grads: list[Tensor]) -> list[Tensor]:
        """The m pieces of this bucket's own gradients, as views on them."""
        if self.boxes is None:
            return grads
        return [narrowed(grads[i], box) for i, box in self.boxes]

    def cuts(self) -> Tensor | None:
        """``boxes`` for the compiled extension, int64: of each piece its gradient, how many dims are cut, and of each
        of these dim, start and size. None if no gradient is cut.
        """
        if self.boxes is None:
            return None
        if "cuts" not in self.scratch:
            flat = [n for i, box in self.boxes for n in (i, len(box), *(n for part in box for n in part))]
            self.scratch["cuts"] = torch.tensor(flat, dtype=torch.int64, device="cpu")
        cuts: Tensor = self.scratch["cuts"]
        return cuts


def narrowed(tensor: Tensor, box: Box) -> Tensor:
    """The slice of a tensor, as a view."""
    for dim, start, size in box:
        tensor = tensor.narrow(dim, start, size)
    return tensor


@dataclass(frozen=True, eq=False)
class ClipPlan:
    """Everything about a call that its gradients' values do not decide.

    Attributes:
        components: names and members.
        buckets: disjoint; none where no gradient exists.
        device: where norms and coefficients are returned.
        norm_dtype: their dtype.
        sparse: whether any gradient is sparse.
        outline: which gradients there were when the plan was made, and of what Python type.
        signature: what they looked like in every respect that matters.
    """

    components: Components
    buckets: tuple[Bucket, ...]
    device: torch.device
    norm_dtype: torch.dtype
    sparse: bool
    outline: object
    signature: object

    @property
    def self_checking(self) -> bool:
        """Whether every backend looks at its gradients by itself, through the compiled extension and at little cost,
        and refuses others than planned before it writes.
        """
        return all(bucket.plain and bucket.backend in extension.users() for bucket in self.buckets)


class Planner:
    """Keeps the plans of one set of components, one for each kind of call; remakes them when gradients change."""

    def __init__(self, components: Components) -> None:
        self.components = components
        self._plans: dict[tuple[float, str | None], ClipPlan] = {}

    def plan(
        self, grads: Gradients, home: torch.device, norm_type: float, backend: str | None, *, exact: bool = True
    ) -> ClipPlan:
        """The plan for these gradients.

        Args:
            grads: one for each tensor of the components, None where there is none.
            home: device of the results where no gradient exists.
            norm_type: order of the norm.
            backend: the user's choice or None.
            exact: False if a self-checking plan may come without its signature being compared, which takes
                most of a call's time on the host. If that is refused, the caller remakes it.

        Raises:
            TypeError, ValueError: a gradient that can't be clipped in place; names the parameter.
            RuntimeError: the named backend refuses.
        """
        plan = self._plans.get((norm_type, backend))
        if (
            plan is not None
            and plan.outline == _outline(grads)
            and ((plan.self_checking and not exact) or plan.signature == _signature(grads))
        ):
            return plan
        return self.remake(grads, home, norm_type, backend)

    def carry_out(
        self,
        work: Callable[[ClipPlan, Gradients], Result],
        grads: Gradients,
        home: torch.device,
        norm_type: float,
        backend: str | None,
        *,
        exact: bool,
    ) -> Result:
        """Does the work with a plan for these gradients; arguments and errors as for ``plan``.

        The work raises RuntimeError, with nothing written, where the plan turns out to be for others; ``exact`` says
        that a RuntimeError may be about something else.
        """
        plan = self.plan(grads, home, norm_type, backend, exact=exact)
        try:
            return work(plan, grads)
        except RuntimeError:
            if exact or not plan.self_checking:
                raise
            # A look at every gradient says what is wrong, by name, or what changed.
            fresh = self.remake(grads, home, norm_type, backend)
            if fresh.signature == plan.signature:
                raise
            return work(fresh, grads)

    def remake(self, grads: Gradients, home: torch.device, norm_type: float, backend: str | None) -> ClipPlan:
        """A plan from scratch, every gradient looked at; arguments and errors as for ``plan``."""
        plan = _build(self.components, grads, home, norm_type, backend)
        if len(self._plans) >= 8:  # a program that goes through orders of norm
            self._plans.clear()
        self._plans[norm_type, backend] = plan
        return plan


_REQUIRES_GRAD = attrgetter("requires_grad")
_METADATA = tuple(map(attrgetter, ("dtype", "device", "layout", "shape")))


def _outline(grads: Gradients) -> object:
    # An attribute of a tensor costs Python 50 ns and more, and there may be thousands of tensors.
    types: object = set(map(type, grads))
    present = grads
    if types != {Tensor}:
        types = list(map(type, grads))  # None's among them
        present = [g for g in grads if g is not None]
    # What requires grad is either a gradient with a graph of its own (create_graph=True), or a parameter by mistake.
    leaves = [g.requires_grad and g.is_leaf for g in present] if _any_requires_grad(present) else None  # type: ignore[union-attr]
    return types, leaves


def _any_requires_grad(tensors: Gradients) -> bool:
    fast = getattr(torch._C, "_any_requires_grad", None)  # a sixth of the time, where this torch has it
    return fast(*tensors) if fast is not None else any(map(_REQUIRES_GRAD, tensors))


def _signature(grads: Gradients) -> object:
    present = [g for g in grads if g is not None]
    dense = [values_of(g) for g in present if g.layout in (torch.strided, torch.sparse_coo)]
    strides = [g.stride() for g in dense]
    distinct = len({g.data_ptr() for g in dense if g.device.type != "meta"})
    return [*(list(map(get, present)) for get in _METADATA), strides, [g.is_neg() for g in dense], distinct]


def values_of(grad: Tensor) -> Tensor:
    """What a gradient keeps in memory: itself, or a sparse one's values."""
    return grad._values() if grad.is_sparse else grad


def _build(
    components: Components,
    grads: Gradients,
    home: torch.device,
    norm_type: float,
    backend: str | None,
) -> ClipPlan:
    served: dict[int, tuple[torch.device, str, str]] = {}
    sparse = False
    norm_dtype = torch.float32
    device = home
    for position, (grad, component) in enumerate(zip(grads, components.index, strict=True)):
        if grad is None or component == LEFT_ALONE:
            continue
        check_gradient(grad, components.tensor_names[position], cut=component == CUT)
        if not served:
            device = grad.device
        if grad.dtype in (torch.float64, torch.complex128):
            norm_dtype = torch.float64
        sparse = sparse or grad.is_sparse
        served[position] = (grad.device, *dispatch.choose(grad.device, grad.dtype, norm_type, backend))
    _check_distinct(components, grads)
    members: dict[tuple[torch.device, str, str], list[tuple[int, int, Box]]] = {}
    for member in components.members():
        if member[0] in served:
            members.setdefault(served[member[0]], []).append(member)
    buckets = []
    for (place, served_by, reason), own in members.items():
        positions = tuple(dict.fromkeys(position for position, _, _ in own))
        index = {position: i for i, position in enumerate(positions)}
        cut = any(box for _, _, box in own)
        buckets.append(
            Bucket(
                device=place,
                backend=served_by,
                reason=reason,
                positions=positions,
                components=torch.tensor([component for _, component, _ in own], dtype=torch.int64, device="cpu"),
                boxes=tuple((index[position], box) for position, _, box in own) if cut else None,
                count=len(components.names),
                norm_dtype=norm_dtype,
                plain=not any(_is_special(grads[i]) for i in positions),
            )
        )
    return ClipPlan(components, tuple(buckets), device, norm_dtype, sparse, _outline(grads), _signature(grads))


def _is_special(grad: Tensor | None) -> bool:
    return grad is not None and (grad.is_complex() or grad.is_sparse or grad.is_neg())


_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


def check_gradient(grad: Tensor, name: str, *, cut: bool = False) -> None:
    """Raises unless ``grad`` is something that can be clipped in place, or slice by slice if it is ``cut``.

    Raises:
        TypeError: dtype, layout or tensor subclass that isn't served.
        ValueError: a parameter set as gradient, several elements on one memory place, a meta tensor.
    """
    where = f"the gradient of {name!r}"
    if isinstance(grad, torch.nn.Parameter) or (grad.is_leaf and grad.requires_grad):
        raise ValueError(
            f"{where} is itself a parameter (or a leaf that requires grad): clipping would change the parameter's "
            "own data; set p.grad to its gradient, or detach it first"
        )
    if type(grad) is not Tensor:
        raise TypeError(
            f"{where} is a {type_name(grad)}, of a parameter that is none: wrapped gradients are served as DTensors "
            "of DTensor parameters only, outside of torch.compile"
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
    if _overlaps(values):
        raise ValueError(
            f"{where} has several elements on one place in memory (shape {list(values.shape)}, strides "
            f"{list(values.stride())}), which would be scaled more than once; use .contiguous()"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _overlaps(grad: Tensor) -> bool:
    """Whether two elements may share memory: each stride must step over all that the smaller ones span."""
    if grad.numel() < 2 or grad.is_contiguous():
        return False
    span = 0
    for stride, size in sorted((st, sz) for st, sz in zip(grad.stride(), grad.shape, strict=True) if sz > 1):
        if stride <= span:
            return True
        span += stride * (size - 1)
    return False


def _check_distinct(components: Components, grads: Gradients) -> None:
    """Raises if two gradients share memory. Those with gaps may interleave, but not begin at the same place."""
    places = []
    for position, (grad, component) in enumerate(zip(grads, components.index, strict=True)):
        if grad is not None and component != LEFT_ALONE and (values := values_of(grad)).numel():
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
