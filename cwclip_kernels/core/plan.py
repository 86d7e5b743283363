"""From components and gradients to device buckets: what one call has to do, worked out once.

A plan depends on which gradients exist and on their type, dtype, device and layout, never on their values or
addresses. Plans are kept for as many sets of gradients as come in turn, and compared with the gradients in one native
pass, which also yields their addresses: that is the only look that a call takes at them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from types import EllipsisType

import torch
from torch import Tensor

from ..backends import native, registry
from ..components.membership import Components, Slice
from .bucket import Bucket, Found
from .checks import (
    WIDE_DTYPES,
    Gradients,
    check_data,
    check_distinct,
    check_gradient,
    check_tensor,
    overlaps,
    values_of,
    was_frozen,
)


@dataclass(frozen=True, eq=False)
class ClipPlan:
    """Everything about a call that its gradients' values do not decide.

    Attributes:
        components: names and members.
        buckets: disjoint; none where no gradient exists.
        device: where norms and coefficients are returned.
        norm_dtype: their dtype.
        sparse: whether any gradient is sparse.
        leaves: of each gradient whether it is a leaf that requires grad; None if none requires grad.
        signature: what the gradients looked like in every respect that matters; None where buckets notice by
            themselves.
    """

    components: Components
    buckets: tuple[Bucket, ...]
    device: torch.device
    norm_dtype: torch.dtype
    sparse: bool
    leaves: object
    signature: object

    def look(self, grads: list[Tensor | None], *, writes: bool) -> list[Found] | None:
        """What each bucket finds among these gradients; None if the plan is for others.

        Args:
            grads: one for each tensor of the components, None where there is none.
            writes: whether they are to be written to; then they may not share memory.
        """
        if self.leaves != _leaves(grads) or (self.signature is not None and self.signature != _signature(grads)):
            return None
        found = []
        for bucket in self.buckets:
            own = bucket.look(grads, writes=writes)
            if own is None:
                return None
            found.append(own)
        return found

    def explain(self, grads: Gradients) -> str:
        """One line for each bucket, with the reason for its backend."""
        lines = [f"{len(self.components.names)} components over {len(self.components.tensor_names)} tensors"]
        for bucket in self.buckets:
            own = bucket.pick(grads)
            dtypes = Counter(str(g.dtype).removeprefix("torch.") for g in own)
            what = ", ".join(f"{n} {dtype}" for dtype, n in sorted(dtypes.items()))
            size = sum(g.numel() * g.element_size() for g in own if not g.is_sparse)
            lines.append(f"  {bucket.device}: {what}, {size / 1e6:.1f} MB -> {bucket.backend!r} ({bucket.reason})")
        why = None
        if self.sparse:
            why = "sparse gradients"
        elif len(self.buckets) > 1:
            why = "several devices or backends"
        elif self.buckets and self.buckets[0].backend not in registry.FUSED:
            why = "a backend without a fused kernel"
        if why is not None:
            lines.append(f"  in two passes, norms first, because of {why}")
        elif self.buckets:
            lines.append("  in one fused call")
        return "\n".join(lines)


_KINDS, _SETS = 8, 4  # plans kept: for orders, backends; and for sets of gradients in turn


class Planner:
    """Keeps the plans of one set of components; remakes them when gradients change.

    Args:
        components: what belongs together.
        kind: what the tensors are, for error messages: "gradient", or "parameter" where these are measured.

    Attributes:
        made: how many plans so far.
    """

    def __init__(self, components: Components, kind: str = "gradient") -> None:
        self.components = components
        self.made = 0
        self._kind = kind
        self._plans: dict[tuple[object, ...], list[ClipPlan]] = {}

    def get(
        self, grads: list[Tensor | None], home: torch.device, norm_type: float, backend: str | None
    ) -> tuple[ClipPlan, list[Found]]:
        """The plan for these gradients, which are to be clipped, and where they lie.

        Args:
            grads: one for each tensor of the components, None where there is none.
            home: device of the results where no gradient exists.
            norm_type: order of the norm.
            backend: the user's choice or None.

        Raises:
            TypeError, ValueError: a gradient that can't be clipped in place; names the parameter.
            RuntimeError: the named backend refuses.
            WithoutData: no gradient has any.
        """
        return self._get(grads, home, norm_type, backend, writes=True)

    def measured(
        self, grads: list[Tensor | None], home: torch.device, norm_type: float, backend: str | None
    ) -> tuple[ClipPlan, list[Found]]:
        """The same for gradients that are only measured: with the plan that writes, if that serves.

        It doesn't serve gradients that share memory, or that are parameters or leaves; an expanded one is measured as
        a copy.
        """
        if (norm_type, backend, "measured") not in self._plans:
            try:
                return self._get(grads, home, norm_type, backend, writes=True)
            except (TypeError, ValueError):
                pass
        readable = [None if g is None else _readable(g) for g in grads]
        return self._get(readable, home, norm_type, backend, writes=False)

    def _get(
        self,
        grads: list[Tensor | None],
        home: torch.device,
        norm_type: float,
        backend: str | None,
        *,
        writes: bool,
    ) -> tuple[ClipPlan, list[Found]]:
        key = (norm_type, backend) if writes else (norm_type, backend, "measured")
        kept = self._plans.get(key, [])
        for i, plan in enumerate(kept):
            found = plan.look(grads, writes=writes)
            if found is not None:
                if i:
                    kept.insert(0, kept.pop(i))
                return plan, found
        self.made += 1
        plan = _build(self.components, grads, home, norm_type, backend, writes, self._kind)
        found = plan.look(grads, writes=writes)
        if found is None:
            raise RuntimeError("gradients changed while they were looked at: is another thread at work on them?")
        if len(self._plans) >= _KINDS and key not in self._plans:  # a program that goes through orders of norm
            self._plans.clear()
        self._plans[key] = [plan, *kept[: _SETS - 1]]
        return plan, found


_METADATA = tuple(map(attrgetter, ("dtype", "device", "layout", "shape")))


def _leaves(grads: Gradients) -> object:
    # What requires grad is either a gradient with a graph of its own (create_graph=True), or a parameter by mistake.
    if not _any_requires_grad(grads):
        return None
    return [g is not None and g.requires_grad and g.is_leaf for g in grads]


def _any_requires_grad(tensors: Gradients) -> bool:
    fast = getattr(torch._C, "_any_requires_grad", None)  # a sixth of the time, where this torch has it
    return fast(*tensors) if fast is not None else any(t is not None and t.requires_grad for t in tensors)


def _signature(grads: Gradients) -> object:
    # An attribute of a tensor costs Python 50 ns and more, and there may be thousands of tensors.
    types = list(map(type, grads))  # None's among them
    present = [g for g in grads if g is not None]
    if any(g.is_nested for g in present):  # which have no shape to compare, and aren't served
        return object()
    dense = [values_of(g) for g in present if g.layout in (torch.strided, torch.sparse_coo)]
    strides = [g.stride() for g in dense]
    shared = _share_memory(dense)
    return [types, *(list(map(get, present)) for get in _METADATA), strides, [g.is_neg() for g in dense], shared]


def _share_memory(tensors: list[Tensor]) -> bool:
    places = sorted((str(t.device), t.data_ptr(), t.nbytes) for t in tensors if t.numel() and not t.is_meta)
    return any(one[0] == two[0] and one[1] + one[2] > two[1] for one, two in pairwise(places))


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
    clipped, cut = components.clipped, components.cut
    for position, grad in enumerate(grads):
        if grad is None or position not in clipped:
            continue
        name = components.tensor_names[position]
        if position in problems:
            raise was_frozen(name, problems[position])
        if kind == "gradient":
            check_gradient(grad, name, cut=position in cut, writes=writes)
            if writes and grad.is_inference():  # not asked under torch.compile, which can't trace it
                raise ValueError(
                    f"the gradient of {name!r} was made in inference mode, and can't be written to outside of it; "
                    "clone() it"
                )
        else:
            check_tensor(grad, f"the {kind} {name!r}", cut=position in cut)
        if not served:
            device = grad.device
        if grad.dtype in WIDE_DTYPES:
            norm_dtype = torch.float64
        sparse = sparse or grad.is_sparse
        served[position] = (grad.device, *registry.choose(grad.device, grad.dtype, norm_type, backend))
    if writes:
        check_distinct(components, grads)
    members: dict[tuple[torch.device, str, str], list[tuple[int, int, Slice]]] = {}
    for member in components.members:
        if member[0] in served:
            members.setdefault(served[member[0]], []).append(member)
    buckets = []
    for (place, served_by, reason), own in members.items():
        positions = tuple(dict.fromkeys(position for position, _, _ in own))
        index = {position: i for i, position in enumerate(positions)}
        is_cut = any(box for _, _, box in own)
        buckets.append(
            Bucket(
                device=place,
                backend=served_by,
                reason=reason,
                positions=positions,
                components=torch.tensor([component for _, component, _ in own], dtype=torch.int64, device="cpu"),
                boxes=tuple((index[position], box) for position, _, box in own) if is_cut else None,
                count=len(components.names),
                norm_dtype=norm_dtype,
                plain=not any(_is_special(grads[i]) for i in positions),
            )
        )
    notices = bool(buckets) and all(bucket.plain for bucket in buckets) and native.unavailable() is None
    if notices:
        for bucket in buckets:
            bucket.addresses = native.Addresses(_entries(bucket, components, grads))
    signature = None if notices else _signature(grads)
    return ClipPlan(components, tuple(buckets), device, norm_dtype, sparse, _leaves(grads), signature)


def _entries(bucket: Bucket, components: Components, grads: Gradients) -> list[Tensor | EllipsisType | None]:
    """The gradients that a bucket is to look at: its own, and that there are none where there were none."""
    own, clipped = set(bucket.positions), components.clipped
    found: list[Tensor | EllipsisType | None] = []
    for position, grad in enumerate(grads):
        is_of_interest = position in own or (grad is None and position in clipped)
        found.append(grad if is_of_interest else ...)
    return found


def _readable(grad: Tensor) -> Tensor:
    """Of what would be refused if it were written to, something with the same norm."""
    if isinstance(grad, torch.nn.Parameter):
        grad = grad.detach()
    has_strides = type(grad) is Tensor and not grad.is_nested and grad.layout == torch.strided
    return grad.contiguous() if has_strides and overlaps(grad) else grad


def _is_special(grad: Tensor | None) -> bool:
    return grad is not None and (grad.is_complex() or grad.is_sparse or grad.is_neg())
