"""Which backend serves which gradients of a call, worked out once.

A plan depends on which gradients exist and on their type, dtype, device and layout, never on values or addresses.
``Plans`` keeps several, and compares them with a call's gradients in one native pass, which also reads the addresses.
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
    check_gradient,
    has_no_data,
    norm_dtype_of,
    overlaps,
    share_memory,
    values_of,
    was_frozen,
)


def home_of(tensors: Sequence[Tensor]) -> torch.device:
    """Where results go if there is no gradient: to the first parameter that is trained."""
    for tensor in tensors:
        if tensor.requires_grad:
            return tensor.device
    return tensors[0].device if tensors else torch.device("cpu")


@dataclass(frozen=True, eq=False)
class ClipPlan:
    """Everything about a call that its gradients' values do not decide.

    Attributes:
        components: names and members.
        buckets: disjoint; none where no gradient exists.
        device: of norms and coefficients.
        norm_dtype: their dtype.
        sparse: whether any gradient is sparse.
        is_native: whether the buckets' ``addresses`` compare everything but autograd's attributes.
        signature: what else is compared; None if nothing is.
    """

    components: Components
    buckets: tuple[Bucket, ...]
    device: torch.device
    norm_dtype: torch.dtype
    sparse: bool
    is_native: bool
    signature: object

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
        if len(self.buckets) > 1 or self.sparse:
            why = "sparse gradients" if self.sparse else "several devices or backends"
            lines.append(f"  in two passes, norms first, because of {why}")
        elif self.buckets:
            lines.append("  in one fused call")
        return "\n".join(lines)


_KINDS, _SETS = 8, 4  # plans kept: for orders of norm and backends; and for sets of gradients


class Plans:
    """The plans of one set of components; makes another one when gradients change.

    Args:
        components: what is measured together.
        what: how errors call what is measured, before the parameter's name.
    """

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
        """The plan for these gradients, and what each of its buckets finds.

        Args:
            grads: of each tensor of the components, None where there is none.
            parameters: these tensors.
            norm_type: order of the norm.
            backend: the user's choice or None.
            writes: whether gradients are to be clipped: then they may not share memory, or be parameters.

        Raises:
            TypeError, ValueError: a gradient that can't be clipped in place; names the parameter.
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
        self._check(present, writes)
        own: dict[tuple[torch.device, str, str], list[Member]] = {}  # by device, backend and reason
        served = {
            i: (grad.device, *registry.choose(grad.device, grad.dtype, norm_type, backend))
            for i, grad in present.items()
        }
        for member in components.members:
            if member[0] in served:
                own.setdefault(served[member[0]], []).append(member)
        norm_dtype = norm_dtype_of(present.values())
        buckets = tuple(
            _bucket(key, members, present, len(components.names), norm_dtype) for key, members in own.items()
        )
        is_native = bool(buckets) and all(bucket.plain for bucket in buckets) and native.unavailable() is None
        if is_native:
            for bucket in buckets:
                # Its own gradients, and that there are none where there were none.
                compared = {*bucket.positions, *(i for i in clipped if i not in present)}
                bucket.addresses = native.Addresses([g if i in compared else ... for i, g in enumerate(grads)])
        device = next(iter(present.values())).device if present else home_of(parameters)
        sparse = any(g.is_sparse for g in present.values())
        is_simple = is_native and not torch._C._any_requires_grad(*grads)
        signature = None if is_simple else _signature(grads, is_native)
        return ClipPlan(components, buckets, device, norm_dtype, sparse, is_native, signature)

    def _check(self, present: dict[int, Tensor], writes: bool) -> None:
        """Raises unless these gradients, or parameters, can be served; names the parameter."""
        if present and all(map(has_no_data, present.values())):
            raise WithoutData(list(present.values()))
        names, cut, problems = self.components.tensor_names, self.components.cut, dict(self.components.problems)
        for i, grad in present.items():
            if i in problems:
                raise was_frozen(names[i], problems[i])
            check_gradient(grad, f"{self._what} {names[i]!r}", cut=i in cut, writes=writes)
        shared = share_memory(list(present.values())) if writes else None
        if shared is not None:
            one, other = (names[list(present)[i]] for i in shared)
            raise ValueError(
                f"the gradients of {one!r} and {other!r} share memory, which would be scaled twice; give each its "
                "own, or pass one of them"
            )


def _bucket(
    key: tuple[torch.device, str, str],
    members: list[Member],
    grads: dict[int, Tensor],
    count: int,
    norm_dtype: torch.dtype,
) -> Bucket:
    positions = tuple(dict.fromkeys(position for position, _, _ in members))
    index = {position: i for i, position in enumerate(positions)}
    is_cut = any(place for _, _, place in members)
    return Bucket(
        *key,
        positions,
        components=torch.tensor([component for _, component, _ in members], dtype=torch.int64, device="cpu"),
        slices=tuple((index[position], place) for position, _, place in members) if is_cut else None,
        count=count,
        norm_dtype=norm_dtype,
        plain=not any(g.is_complex() or g.is_sparse or g.is_neg() for g in map(grads.__getitem__, positions)),
    )


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
