"""Which power sums are added up over which ranks: worked out once from the parameters, used at every call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import some_of
from ..components.membership import Components, Member
from ..core import formula
from .consistency import Stages
from .groups import RankGroup, group_over
from .local import LocalGradients, Shards, gradients_of, is_wide, local_value, member_numels
from .reduction import Indices, Reduction, decode, encode


class ReductionPlan:
    """How several ranks compute the norms of K components together.

    Attributes:
        local: what this rank holds, as components of its own: one for each of the K components and each group of
            ranks that holds parts of it, so that one pass over the gradients yields all sums that are sent.
        member_numels: number of elements of each member of the components, over all ranks.
        has_stages: whether other ranks have other components.
        all_names: of the components of all ranks.
        all_parameters: names of the parameters of all ranks.
    """

    def __init__(
        self,
        components: Components,
        tensors: Sequence[Tensor],
        shards: Shards,
        group: RankGroup | None,
        neighbours: Sequence[RankGroup],
        stages: Stages | None,
    ) -> None:
        self._names, self._shards, self._stages = components.names, shards, stages
        self.has_stages = stages is not None
        self.all_names = components.names if stages is None else stages.names
        self.all_parameters = components.tensor_names if stages is None else stages.parameters

        over = cache(group_over)
        groups = [group if s is None or s.mesh is None else over(s.mesh, s.mesh_dims) for s in shards]
        by_ranks = {each.ranks: each for each in (*groups, group) if each is not None}
        rows: dict[tuple[int, tuple[int, ...] | None], int] = {}  # by component and ranks
        members: list[Member] = []
        for position, component, part in components.members:
            shard, holders = shards[position], groups[position]
            row = rows.setdefault((component, None if holders is None else holders.ranks), len(rows))
            parts = [part] if shard is None or not part else shard.local_slices(part)
            members += [(position, row, each) for each in parts]
        owners = [component for component, _ in rows]
        names = tuple(components.names[component] for component in owners)
        self.local = Components(names, components.tensor_names, tuple(members), components.problems)
        sent = [(by_ranks[ranks], [row for (_, r), row in rows.items() if r == ranks]) for ranks in by_ranks]
        self._rows = Reduction([(each, own) for each, own in sent if own], owners, len(self._names))

        everything, shared = range(len(self._names)), () if stages is None else stages.shared
        place = dict(zip(self._names, everything, strict=True))
        lanes = [place.get(name, len(place)) for name in shared]
        self._spanning = Reduction([(stages.group, lanes)] if stages and lanes else [], everything, len(place))
        self._total = Reduction([(stages.group, [0])] if stages else [], [0], 1)
        elsewhere = stages.counted_elsewhere if stages else ()
        self._counted = Indices([i for i in everything if self._names[i] not in elsewhere])

        self.member_numels = member_numels(components, tensors, shards)
        if group is not None:
            sums = map(sum, zip(*group.gather(self.member_numels), strict=True))
            self.member_numels = [
                summed if shards[position] is None else own
                for (position, _, _), own, summed in zip(components.members, self.member_numels, sums, strict=True)
            ]

        self._asked = _widest([*by_ranks.values(), *neighbours])
        if stages is not None:
            self._asked.append(stages.group)
        elif self._rows.single is not None and [self._rows.single.ranks] == [each.ranks for each in self._asked]:
            self._asked = []  # all ranks have all norms

    def gradients(self, tensors: Sequence[Tensor]) -> LocalGradients:
        """See ``gradients_of``."""
        return gradients_of(tensors, self._shards)

    def values(self, tensors: Sequence[Tensor]) -> LocalGradients:
        """What this rank holds of the tensors themselves, in place of gradients; None of those that are frozen."""
        return LocalGradients([local_value(t).detach() if t.requires_grad else None for t in tensors], ())

    def norm_dtype(self, tensors: Sequence[Tensor]) -> torch.dtype:
        """Of norms, the same on all ranks: by all trained parameters, since a rank may lack a gradient."""
        wide = is_wide(tensors) if self._stages is None else self._stages.is_wide
        return torch.float64 if wide else torch.float32

    @property
    def is_local(self) -> bool:
        """Whether norms need no communication."""
        return self._rows.is_local and self._spanning.is_local

    def sum_over_ranks(self, sums: Tensor, has_elements: Tensor | None, norm_type: float) -> Tensor:
        """Power sums [K] of the components over all ranks, which call this together.

        Args:
            sums: power sums of ``local``.
            has_elements: bool, which of ``local`` have elements; needed for negative orders only.
            norm_type: order of the norm.
        """
        encoded = self._rows.over_ranks(encode(sums, has_elements, norm_type), norm_type)
        return decode(self._spanning.over_ranks(encoded, norm_type), sums.dtype, norm_type)

    def local_factors(self, factors: Tensor) -> Tensor:
        """What the components of ``local`` are multiplied by, from [K]."""
        return self._rows.to_rows(factors)

    def total(self, norms: Tensor, norm_type: float) -> Tensor:
        """The norm of all components of all ranks together, []; all stages call this together."""
        total = formula.total(norms[self._counted.on(norms.device)], norm_type).reshape(1)
        has_elements = torch.ones_like(total, dtype=torch.bool) if norm_type < 0 else None
        encoded = self._total.over_ranks(encode(total, has_elements, norm_type), norm_type)
        return formula.root(decode(encoded, total.dtype, norm_type)[0], norm_type).to(norms.dtype)

    @property
    def nonfinite_needs_ranks(self) -> bool:
        """Whether the non-finite check needs communication beside that for norms."""
        return bool(self._asked)

    def is_true_anywhere(self, found: Tensor) -> Tensor:
        """Whether a bool holds on any rank: float32 [1], 0 or more; no host sync."""
        flag = found.reshape(1).float()
        for group in self._asked:
            flag = group.reduce(flag, dist.ReduceOp.MAX)()
        return flag

    def nonfinite(self, norms: Tensor) -> tuple[list[str], int]:
        """Names of the components of any rank whose norm is inf or NaN, and the number of all. Syncs."""
        finite = norms.isfinite()
        bad: set[str] = set()
        if bool(self.is_true_anywhere(~finite.all())):
            bad = {name for name, ok in zip(self._names, finite.tolist(), strict=True) if not ok}
            for group in self._asked:
                bad.update(*group.gather(bad))
        return [name for name in self.all_names if name in bad], len(self.all_names)

    def explain(self) -> str:
        """The all-reduces of a call, for people to read."""
        return (
            "\n".join(
                f"  one all-reduce of {len(rows.host)} sums over {_shown(group.ranks)}"
                for group, rows in self._rows.groups + self._spanning.groups
            )
            or "  no communication between ranks"
        )


def _widest(groups: Sequence[RankGroup]) -> list[RankGroup]:
    """The groups that aren't part of another one of these."""
    by_ranks = {group.ranks: group for group in groups}
    sets = [set(ranks) for ranks in by_ranks]
    found = [group for ranks, group in by_ranks.items() if not any(set(ranks) < other for other in sets)]
    return sorted(found, key=lambda group: group.order)


def _shown(ranks: Sequence[int]) -> str:
    return f"{len(ranks)} ranks ({some_of(ranks, 8)})"
