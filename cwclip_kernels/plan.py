"""From components and gradients to device buckets: what one call has to do, worked out once.

A plan depends on which gradients exist and on their type, dtype, device and layout, never on their values or
addresses, so a training loop builds one plan and reuses it at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import dispatch
from .backends import extension
from .components import CUT, LEFT_ALONE, Box, Components
from .gradients import (
    WIDE_DTYPES,
    Gradients,
    check_data,
    check_distinct,
    check_gradient,
    check_tensor,
    overlaps,
    values_of,
)

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
    """Keeps the plans of one set of components, one for each kind of call; remakes them when gradients change.

    Args:
        components: what belongs together.
        kind: what the tensors are, for error messages: "gradient", or "parameter" where these are measured.

    Attributes:
        made: how many plans so far.
    """

    def __init__(self, components: Components, kind: str = "gradient") -> None:
        self.components = components
        self._kind = kind
        self.made = 0
        self._plans: dict[tuple[object, ...], ClipPlan] = {}

    def plan(
        self,
        grads: Gradients,
        home: torch.device,
        norm_type: float,
        backend: str | None,
        *,
        exact: bool = True,
        writes: bool = True,
    ) -> ClipPlan:
        """The plan for these gradients.

        Args:
            grads: one for each tensor of the components, None where there is none.
            home: device of the results where no gradient exists.
            norm_type: order of the norm.
            backend: the user's choice or None.
            exact: False if a self-checking plan may come without its signature being compared, which takes
                most of a call's time on the host. If that is refused, the caller remakes it.
            writes: whether gradients are scaled; those that are only measured may share memory.

        Raises:
            TypeError, ValueError: a gradient that can't be clipped in place; names the parameter.
            RuntimeError: the named backend refuses.
            WithoutData: no gradient has any.
        """
        plan = self._plans.get(_kind_of_call(norm_type, backend, writes))
        if (
            plan is not None
            and plan.outline == _outline(grads)
            and ((plan.self_checking and not exact) or plan.signature == _signature(grads))
        ):
            return plan
        return self.remake(grads, home, norm_type, backend, writes)

    def carry_out(
        self,
        work: Callable[[ClipPlan, Gradients], Result],
        grads: Gradients,
        home: torch.device,
        norm_type: float,
        backend: str | None,
        *,
        exact: bool,
        writes: bool = True,
    ) -> Result:
        """Does the work with a plan for these gradients; arguments and errors as for ``plan``.

        The work raises RuntimeError, with nothing written, where the plan turns out to be for others; ``exact`` says
        that a RuntimeError may be about something else.
        """
        plan = self.plan(grads, home, norm_type, backend, exact=exact, writes=writes)
        try:
            return work(plan, grads)
        except RuntimeError:
            if exact or not plan.self_checking:
                raise
            # A look at every gradient says what is wrong, by name, or what changed.
            fresh = self.remake(grads, home, norm_type, backend, writes)
            if fresh.signature == plan.signature:
                raise
            return work(fresh, grads)

    def measure(
        self,
        work: Callable[[ClipPlan, Gradients], Result],
        grads: Gradients,
        home: torch.device,
        norm_type: float,
        backend: str | None,
    ) -> Result:
        """As ``carry_out``, for work that writes nothing, with the plan that writes if that serves.

        It doesn't serve gradients that share memory, or that are parameters or leaves; an expanded one is measured as
        a copy.
        """
        if _kind_of_call(norm_type, backend, writes=False) not in self._plans:
            try:
                return self.carry_out(work, grads, home, norm_type, backend, exact=False)
            except (TypeError, ValueError):
                pass
        readable = [None if g is None else _readable(g) for g in grads]
        return self.carry_out(work, readable, home, norm_type, backend, exact=False, writes=False)

    def remake(
        self, grads: Gradients, home: torch.device, norm_type: float, backend: str | None, writes: bool = True
    ) -> ClipPlan:
        """A plan from scratch, every gradient looked at; arguments and errors as for ``plan``."""
        self.made += 1
        plan = _build(self.components, grads, home, norm_type, backend, writes, self._kind)
        if len(self._plans) >= 8:  # a program that goes through orders of norm
            self._plans.clear()
        self._plans[_kind_of_call(norm_type, backend, writes)] = plan
        return plan


def _kind_of_call(norm_type: float, backend: str | None, writes: bool) -> tuple[object, ...]:
    return (norm_type, backend) if writes else (norm_type, backend, "measured")


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
    if any(g.is_nested for g in present):  # which have no shape to compare, and aren't served
        return object()
    dense = [values_of(g) for g in present if g.layout in (torch.strided, torch.sparse_coo)]
    strides = [g.stride() for g in dense]
    distinct = len({g.data_ptr() for g in dense if g.device.type != "meta"})
    return [*(list(map(get, present)) for get in _METADATA), strides, [g.is_neg() for g in dense], distinct]


def _build(
    components: Components,
    grads: Gradients,
    home: torch.device,
    norm_type: float,
    backend: str | None,
    writes: bool,
    kind: str,
) -> ClipPlan:
    check_data(components, grads)
    problems = dict(components.problems)
    served: dict[int, tuple[torch.device, str, str]] = {}
    sparse = False
    norm_dtype = torch.float32
    device = home
    for position, (grad, component) in enumerate(zip(grads, components.index, strict=True)):
        if grad is None or component == LEFT_ALONE:
            continue
        name = components.tensor_names[position]
        if position in problems:
            raise ValueError(
                f"the gradient of {name!r}, which was frozen when components were looked up: {problems[position]}. "
                "Make the clipper after parameters have been unfrozen"
            )
        if kind == "gradient":
            check_gradient(grad, name, cut=component == CUT, writes=writes)
        else:
            check_tensor(grad, f"the {kind} {name!r}", cut=component == CUT)
        if not served:
            device = grad.device
        if grad.dtype in WIDE_DTYPES:
            norm_dtype = torch.float64
        sparse = sparse or grad.is_sparse
        served[position] = (grad.device, *dispatch.choose(grad.device, grad.dtype, norm_type, backend))
    if writes:
        check_distinct(components, grads)
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


def _readable(grad: Tensor) -> Tensor:
    """Of what would be refused if it were written to, something with the same norm."""
    if isinstance(grad, torch.nn.Parameter):
        grad = grad.detach()
    has_strides = type(grad) is Tensor and not grad.is_nested and grad.layout == torch.strided
    return grad.contiguous() if has_strides and overlaps(grad) else grad


def _is_special(grad: Tensor | None) -> bool:
    return grad is not None and (grad.is_complex() or grad.is_sparse or grad.is_neg())
