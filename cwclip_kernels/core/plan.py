"""Which backend serves which gradients of a call, worked out once.

A plan depends on which gradients exist, their types, dtypes, devices and layouts, never on values or addresses.
``Plans`` compares several with a call's gradients, in one native pass, which also reads the addresses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..backends import native, registry
from ..components.membership import Components, Member
from .bucket import Bucket, Found
from .checks import (
    Gradients,
    WithoutData,
    check_gradients,
    has_no_data,
    norm_dtype_of,
    overlaps,
    share_memory,
    sharing,
    values_of,
)
from .modes import check_not_recorded


def home_of(tensors: Sequence[Tensor]) -> torch.device:
    """Where results go if there is no gradient: to the first parameter that is trained."""
    first = tensors[0].device if tensors else torch.device("cpu")
    return next((tensor.device for tensor in tensors if tensor.requires_grad), first)


@dataclass(frozen=True, eq=False)
class ClipPlan:
    """Everything about a call that its gradients' values do not decide."""

    components: Components
    buckets: tuple[Bucket, ...]  # disjoint; none where no gradient exists
    device: torch.device  # of norms and coefficients
    norm_dtype: torch.dtype
    sparse: bool  # whether any gradient is
    is_native: bool  # whether the buckets' ``addresses`` compare everything but autograd's attributes
    signature: object  # what else is compared; None if nothing is
    at_once: Bucket | None  # the only one, if its backend can compare and clip its gradients in one native call

    def look(self, grads: list[Tensor | None], parameters: Sequence[Tensor], writes: bool) -> list[Found] | None:
        """What each bucket finds among these gradients; None if the plan is for others, or they share memory."""
        is_simple = self.signature is None and not torch._C._any_requires_grad(*grads)
        if not is_simple and self.signature != _signature(grads, self.is_native):
            return None
        if not self.buckets and self.device != home_of(parameters):
            return None
        found = []
        for bucket in self.buckets:
            positions = bucket.positions
            own: Any = grads if len(positions) == len(grads) else [grads[i] for i in positions]
            addresses = None
            if bucket.addresses is not None:
                addresses = bucket.addresses.of(grads, writes=writes)
                if addresses is None:
                    return None
            found.append(Found(own, addresses))
        return found

    def explain(self, grads: Gradients) -> str:
        """One line for each bucket, with the reason for its backend."""
        lines = [f"{len(self.components.names)} components over {len(self.components.tensor_names)} tensors"]
        for bucket in self.buckets:
            own = [g for g in map(grads.__getitem__, bucket.positions) if g is not None]
            dtypes = Counter(str(g.dtype).removeprefix("torch.") for g in own)
            what = ", ".join(f"{n} {dtype}" for dtype, n in sorted(dtypes.items()))
            size = sum(g.nbytes for g in own if not g.is_sparse)
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


_KINDS, _SETS = 8, 4  # plans kept: for orders of norm and backends; and for sets of gradients


class Plans:
    """The plans of one set of components, for gradients of several looks; errors begin with ``what`` and a name."""

    def __init__(self, components: Components, what: str = "the gradient of") -> None:
        self.components = components
        self.made = 0  # how many plans so far
        self._what = what
        self._kept: dict[tuple[float, str | None, bool], list[ClipPlan]] = {}

    def get(
        self,
        grads: list[Tensor | None],
        parameters: Sequence[Tensor],
        norm_type: float,
        backend: str | None,
        *,
        writes: bool = True,
    ) -> tuple[ClipPlan, list[Found]]:
        """The plan for the gradients of these parameters, and what each of its buckets finds.

        Raises:
            TypeError, ValueError: a gradient that can't be measured or, if it ``writes``, clipped in place.
            RuntimeError: the named backend refuses.
            WithoutData: no gradient has any.
        """
        key = norm_type, backend, writes
        kept = self._kept.get(key, [])
        for i, plan in enumerate(kept):
            found = plan.look(grads, parameters, writes)
            if found is not None:
                if i:
                    kept.insert(0, kept.pop(i))
                return plan, found
        self.made += 1
        plan = self._build(grads, parameters, norm_type, backend, writes)
        found = plan.look(grads, parameters, writes)
        if found is None:
            raise RuntimeError("gradients changed while they were looked at: is another thread at work on them?")
        if len(self._kept) >= _KINDS and key not in self._kept:  # a program that goes through orders of norm
            self._kept.clear()
        self._kept[key] = [plan, *kept[: _SETS - 1]]
        return plan, found

    def clipped_before(self, norm_type: float, backend: str | None) -> Sequence[ClipPlan]:
        """The plans of earlier calls that clipped, the last one first."""
        return self._kept.get((norm_type, backend, True), ())

    def prefer(self, plan: ClipPlan, norm_type: float, backend: str | None) -> None:
        """Puts one of ``clipped_before`` first."""
        kept = self._kept[norm_type, backend, True]
        kept.insert(0, kept.pop(kept.index(plan)))

    def measured(
        self, grads: list[Tensor | None], parameters: Sequence[Tensor], norm_type: float, backend: str | None
    ) -> tuple[ClipPlan, list[Found]]:
        """The same for gradients that are only measured: by the plan that clips, if these could be clipped."""
        if (norm_type, backend, False) not in self._kept:
            try:
                return self.get(grads, parameters, norm_type, backend)
            except (TypeError, ValueError):
                pass
        readable = [None if g is None else _readable(g) for g in grads]
        return self.get(readable, parameters, norm_type, backend, writes=False)

    def _build(
        self, grads: Gradients, parameters: Sequence[Tensor], norm_type: float, backend: str | None, writes: bool
    ) -> ClipPlan:
        components, clipped = self.components, self.components.clipped
        present = {i: grad for i, grad in enumerate(grads) if grad is not None and i in clipped}
        values = list(present.values())
        check_not_recorded()
        if values and all(map(has_no_data, values)):
            raise WithoutData(values)
        check_gradients(components, present, self._what, writes=writes)
        shared = sharing(values) if writes else None
        if shared is not None:
            one, other = (components.tensor_names[list(present)[i]] for i in shared)
            raise ValueError(
                f"the gradients of {one!r} and {other!r} share memory, which would be scaled twice; give each its "
                "own, or pass one of them"
            )
        chosen = {i: (g.device, *registry.choose(g.device, g.dtype, norm_type, backend)) for i, g in present.items()}
        members: dict[tuple[torch.device, str, str], list[Member]] = {}  # by device, backend and reason
        for member in components.members:
            if member[0] in chosen:
                members.setdefault(chosen[member[0]], []).append(member)
        norm_dtype = norm_dtype_of(values)
        buckets = []
        for key, own in members.items():
            positions = tuple(dict.fromkeys(position for position, _, _ in own))
            index = {position: i for i, position in enumerate(positions)}
            slices = tuple((index[position], place) for position, _, place in own)
            buckets.append(
                Bucket(
                    *key,
                    positions,
                    components=torch.tensor([component for _, component, _ in own], dtype=torch.int64, device="cpu"),
                    slices=slices if any(place for _, place in slices) else None,
                    count=len(components.names),
                    norm_dtype=norm_dtype,
                    plain=not any(_is_special(present[i]) for i in positions),
                )
            )
        is_native = bool(buckets) and all(bucket.plain for bucket in buckets) and native.unavailable() is None
        if is_native:
            for bucket in buckets:
                # Its own gradients, and that there are none where there were none.
                compared = {*bucket.positions, *(i for i in clipped if i not in present)}
                bucket.addresses = native.Addresses([g if i in compared else ... for i, g in enumerate(grads)])
        is_simple = is_native and not torch._C._any_requires_grad(*grads)
        can_at_once = len(buckets) == 1 and buckets[0].backend in registry.AT_ONCE
        return ClipPlan(
            components,
            tuple(buckets),
            device=values[0].device if values else home_of(parameters),
            norm_dtype=norm_dtype,
            sparse=any(g.is_sparse for g in values),
            is_native=is_native,
            signature=None if is_simple else _signature(grads, is_native),
            at_once=buckets[0] if is_simple and can_at_once else None,
        )


def _is_special(grad: Tensor) -> bool:
    return grad.is_complex() or grad.is_sparse or grad.is_neg()


_METADATA = tuple(map(attrgetter, ("dtype", "device", "layout", "shape")))


def _signature(grads: Gradients, is_native: bool) -> object:
    """What a plan compares in Python: of autograd's attributes, and of all others where no native code does.

    A gradient that requires grad has a graph of its own (create_graph=True), or is a parameter by mistake.
    """
    leaves = torch._C._any_requires_grad(*grads) and [g is not None and g.requires_grad and g.is_leaf for g in grads]
    if is_native:
        return leaves
    # By attribute, since reading one in Python takes 50 ns or more, and there may be thousands of gradients.
    present = [g for g in grads if g is not None]
    if any(g.is_nested for g in present):  # have no shape to compare, and aren't served
        return object()
    dense = [values_of(g) for g in present if g.layout in (torch.strided, torch.sparse_coo)]
    metadata = [list(map(get, present)) for get in _METADATA]
    signs = [g.is_neg() for g in dense]
    return [leaves, list(map(type, grads)), metadata, [g.stride() for g in dense], signs, share_memory(dense)]


def _readable(grad: Tensor) -> Tensor:
    """A tensor with the same norm as a gradient that can't be written to: detached, an expanded one as a copy."""
    if isinstance(grad, torch.nn.Parameter):
        grad = grad.detach()
    has_strides = type(grad) is Tensor and not grad.is_nested and grad.layout == torch.strided
    return grad.contiguous() if has_strides and overlaps(grad) else grad
