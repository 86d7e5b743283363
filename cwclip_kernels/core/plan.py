"""From components and gradients to device buckets: what one call has to do, worked out once.

A plan depends on which gradients exist and on their type, dtype, device and layout, never on their values or
addresses. Plans are kept for as many sets of gradients as come in turn, and compared with the gradients in one native
pass, which also yields their addresses: that is the only look that a call takes at them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from types import EllipsisType
from typing import Any

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
        device: where norms and coefficients are returned.
        norm_dtype: their dtype.
        sparse: whether any gradient is sparse.
        leaves: of each gradient whether it is a leaf that requires grad; None if none requires grad.
        signature: what the gradients looked like in every respect that matters; None where the buckets' addresses
            tell.
    """

    components: Components
    buckets: tuple[Bucket, ...]
    device: torch.device
    norm_dtype: torch.dtype
    sparse: bool
    leaves: object
    signature: object

    def look(self, grads: list[Tensor | None], parameters: Sequence[Tensor], writes: bool) -> list[Found] | None:
        """What each bucket finds among these gradients; None if the plan is for others, or they share memory."""
        if (_any_requires_grad(*grads) or self.leaves is not None) and self.leaves != _leaves(grads):
            return None
        if self.signature is not None and self.signature != _signature(grads):
            return None
        if not self.buckets and self.device != home_of(parameters):
            return None
        found = []
        for bucket in self.buckets:
            addresses = None
            if bucket.addresses is not None:
                addresses = bucket.addresses.of(grads, writes=writes)
                if addresses is None:
                    return None
            positions = bucket.positions
            own: Any = grads if len(positions) == len(grads) else [grads[i] for i in positions]
            found.append(Found(own, addresses))
        return found

    def explain(self, grads: Sequence[Tensor | None]) -> str:
        """In words: one line for each bucket, with the reason for its backend."""
        lines = [f"{len(self.components.names)} components over {len(self.components.tensor_names)} tensors"]
        for bucket in self.buckets:
            own = bucket.pick(grads)
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


_KINDS, _SETS = 8, 4  # plans kept: for orders and backends; and for sets of gradients in turn


class Plans:
    """Keeps the plans of one set of components; makes another one when gradients change.

    Args:
        components: what belongs together.
        kind: what is measured, for error messages: "gradient" or "parameter".

    Attributes:
        made: how many plans so far.
    """

    def __init__(self, components: Components, kind: str = "gradient") -> None:
        self.components = components
        self.made = 0
        self._kind = kind
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
        """The plan for these gradients, and where they lie.

        Args:
            grads: one for each tensor of the components, None where there is none.
            parameters: whose they are.
            norm_type: order of the norm.
            backend: the user's choice or None.
            writes: whether they are to be clipped: then they may not share memory, or be parameters.

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
        """The same for gradients that are only measured: with the plan that writes, if that serves.

        It doesn't serve gradients that share memory, or that are parameters or leaves; an expanded one is measured as
        a copy.
        """
        if (norm_type, backend, False) not in self._kept:
            try:
                return self.get(grads, parameters, norm_type, backend)
            except (TypeError, ValueError):
                pass
        readable = [None if g is None else _readable(g) for g in grads]
        return self.get(readable, parameters, norm_type, backend, writes=False)

    def _build(
        self,
        grads: Gradients,
        parameters: Sequence[Tensor],
        norm_type: float,
        backend: str | None,
        writes: bool,
    ) -> ClipPlan:
        components = self.components
        check_data(components, grads)
        served: dict[int, tuple[torch.device, str, str]] = {}
        present: list[Tensor] = []
        clipped = components.clipped
        for position, grad in enumerate(grads):
            if grad is not None and position in clipped:
                self._check(position, grad, writes)
                present.append(grad)
                served[position] = grad.device, *registry.choose(grad.device, grad.dtype, norm_type, backend)
        if writes:
            check_distinct(components, grads)
        members: dict[tuple[torch.device, str, str], list[tuple[int, int, Slice]]] = {}
        for member in components.members:
            if member[0] in served:
                members.setdefault(served[member[0]], []).append(member)
        norm_dtype = torch.float64 if any(g.dtype in WIDE_DTYPES for g in present) else torch.float32
        buckets = []
        for (device, served_by, reason), own in members.items():
            positions = tuple(dict.fromkeys(position for position, _, _ in own))
            index = {position: i for i, position in enumerate(positions)}
            is_cut = any(place for _, _, place in own)
            buckets.append(
                Bucket(
                    device=device,
                    backend=served_by,
                    reason=reason,
                    positions=positions,
                    components=torch.tensor([component for _, component, _ in own], dtype=torch.int64, device="cpu"),
                    boxes=tuple((index[position], place) for position, _, place in own) if is_cut else None,
                    count=len(components.names),
                    norm_dtype=norm_dtype,
                    plain=not any(_is_special(grads[i]) for i in positions),
                )
            )
        signature = None
        if buckets and all(bucket.plain for bucket in buckets) and native.unavailable() is None:
            for bucket in buckets:
                bucket.addresses = native.Addresses(_entries(bucket, clipped, grads))
        else:
            signature = _signature(grads)
        device = present[0].device if present else home_of(parameters)
        sparse = any(g.is_sparse for g in present)
        return ClipPlan(components, tuple(buckets), device, norm_dtype, sparse, _leaves(grads), signature)

    def _check(self, position: int, grad: Tensor, writes: bool) -> None:
        """Raises unless this gradient, or parameter, can be served; names the parameter."""
        components = self.components
        name, cut = components.tensor_names[position], position in components.cut
        problem = dict(components.problems).get(position)
        if problem is not None:
            raise was_frozen(name, problem)
        if self._kind != "gradient":
            check_tensor(grad, f"the {self._kind} {name!r}", cut=cut)
            return
        check_gradient(grad, name, cut=cut, writes=writes)
        if writes and grad.is_inference():  # not asked under torch.compile, which can't trace it
            raise ValueError(
                f"the gradient of {name!r} was made in inference mode, and can't be written to outside of it; "
                "clone() it"
            )


def _python_any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


_any_requires_grad = getattr(torch._C, "_any_requires_grad", _python_any_requires_grad)  # six times as fast


def _leaves(grads: Gradients) -> object:
    # What requires grad is either a gradient with a graph of its own (create_graph=True), or a parameter by mistake.
    if not _any_requires_grad(*grads):
        return None
    return [g is not None and g.requires_grad and g.is_leaf for g in grads]


_METADATA = tuple(map(attrgetter, ("dtype", "device", "layout", "shape")))


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


def _entries(bucket: Bucket, clipped: set[int], grads: Gradients) -> list[Tensor | EllipsisType | None]:
    """The gradients that a bucket looks at: its own, and that there are none where there were none."""
    own = set(bucket.positions)
    return [
        grad if position in own or (grad is None and position in clipped) else ...
        for position, grad in enumerate(grads)
    ]


def _readable(grad: Tensor) -> Tensor:
    """Of a gradient that could not be written to, something with the same norm."""
    if isinstance(grad, torch.nn.Parameter):
        grad = grad.detach()
    has_strides = type(grad) is Tensor and not grad.is_nested and grad.layout == torch.strided
    return grad.contiguous() if has_strides and overlaps(grad) else grad


def _is_special(grad: Tensor | None) -> bool:
    return grad is not None and (grad.is_complex() or grad.is_sparse or grad.is_neg())
