"""Which power sums are added up over which ranks: worked out once from the parameters, used at every call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import some_of
from ..components.membership import Components, Member
from ..core import formula
from .groups import RankGroup, group_over, in_order
from .local import LocalGradients, Shards, gradients_of, is_trained, is_wide, local_value, member_numels
from .partitions import Partitions
from .reduction import Indices, Reduction, decode, encode


class Stages(NamedTuple):
    """The components of ranks with different parameters, such as the stages of a pipeline."""

    group: RankGroup
    names: tuple[str, ...]  # of the components of all ranks
    parameters: tuple[str, ...]  # names of the parameters of all ranks
    shared: tuple[str, ...]  # components with parameters on several ranks, in the same order everywhere
    counted_elsewhere: frozenset[str]  # those of them that count in the total norm of an earlier rank
    is_wide: bool  # whether any parameter of any rank is float64
    problem: str | None


def compare_stages(group: RankGroup, components: Components, is_wide: bool) -> Stages:
    """Finds out which components have parameters on several ranks; the others need no communication.

    A component that is the same single parameter on several ranks is not one of them: either it is tied, and each
    has all of its gradient, or they are different ones of one name (``pipelining`` numbers each stage from 0).
    """
    members: dict[str, dict[str, None]] = {}
    for position, component, _ in components.members:
        members.setdefault(components.names[component], {})[components.tensor_names[position]] = None
    found = group.gather((members, components.tensor_names, is_wide))
    holders: dict[str, list[tuple[int, dict[str, None]]]] = {}
    for rank, (theirs, _, _) in zip(group.ranks, found, strict=True):
        for name, parameters in theirs.items():
            holders.setdefault(name, []).append((rank, parameters))
    shared, problem = [], None
    for name, parts in holders.items():
        if len(parts) == 1 or all(part == parts[0][1] and len(part) == 1 for _, part in parts):
            continue
        shared.append(name)
        first: dict[str, int] = {}
        for rank, parameter in [(rank, parameter) for rank, part in parts for parameter in part]:
            if first.setdefault(parameter, rank) != rank and problem is None:
                problem = (
                    f"pp_mesh: ranks {first[parameter]} and {rank} both have a parameter {parameter!r} in component "
                    f"{name!r}, which would count twice; pass (name, parameter) pairs with the names of the whole "
                    "model, a tied parameter on one rank only, or clip what all ranks have in a call of its own"
                )
    return Stages(
        group,
        tuple(holders),
        tuple(dict.fromkeys(name for _, names, _ in found for name in names)),
        tuple(shared),
        frozenset(name for name in shared if dist.get_rank() in dict(holders[name][1:])),
        any(wide for _, _, wide in found),
        problem,
    )


class ReductionPlan:
    """How several ranks compute the norms of K components together.

    Attributes:
        local: what this rank holds, as components of its own: one for each of the K components and each group of
            ranks that holds parts of it, so that one pass over the gradients yields all sums that are sent.
        member_numels: number of elements of each member of the components, over all ranks.
        has_stages: whether other ranks have other components.
        spanning: components of which several stages have parts, by name, the same on all ranks.
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
        partitions: Partitions | None = None,
    ) -> None:
        self._names, self._shards, self._stages = components.names, shards, stages
        self._partitions = partitions
        self.has_stages = stages is not None
        self.spanning = () if stages is None else stages.shared
        self.all_names = components.names if stages is None else stages.names
        self.all_parameters = components.tensor_names if stages is None else stages.parameters

        # One row for each component and set of ranks that holds parts of it; rows of one set are sent together.
        over = cache(group_over)
        groups = [group if s is None else s.group if s.mesh is None else over(s.mesh, s.mesh_dims) for s in shards]
        by_ranks = {each.ranks: each for each in (*groups, group) if each is not None}
        rows: dict[tuple[int, tuple[int, ...] | None], int] = {}
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
        self.rows = Reduction([(each, own) for each, own in sent if own], owners, len(self._names))

        # Sums of components that span stages are sent in a second step.
        everything, shared = range(len(self._names)), () if stages is None else stages.shared
        place = dict(zip(self._names, everything, strict=True))
        lanes = [place.get(name, len(place)) for name in shared]
        self._spanning = Reduction([(stages.group, lanes)] if stages and lanes else [], everything, len(place))
        self._total = Reduction([(stages.group, [0])] if stages else [], [0], 1)
        # Each component counts once in the total norm.
        elsewhere = stages.counted_elsewhere if stages else ()
        self._counted = Indices([i for i in everything if self._names[i] not in elsewhere])

        self.member_numels = member_numels(components, tensors, shards)
        if group is not None:
            sums = map(sum, zip(*group.gather(self.member_numels), strict=True))
            self.member_numels = [
                summed if shards[position] is None else own
                for (position, _, _), own, summed in zip(components.members, self.member_numels, sums, strict=True)
            ]

        # Who takes part in the non-finite check: all groups that aren't part of another one.
        all_groups = in_order((*by_ranks.values(), *neighbours))
        self._asked = [one for one in all_groups if not any(set(one.ranks) < set(g.ranks) for g in all_groups)]
        if stages is not None:
            self._asked.append(stages.group)
        elif self.rows.single is not None and [self.rows.single.ranks] == [each.ranks for each in self._asked]:
            self._asked = []  # all ranks have all norms

    @property
    def is_partitioned(self) -> bool:
        """Whether an optimizer keeps gradients in flat partitions."""
        return self._partitions is not None

    def gradients(self, tensors: Sequence[Tensor]) -> LocalGradients:
        """What this rank holds of the tensors' gradients; see ``gradients_of``."""
        if self._partitions is not None:
            return LocalGradients(self._partitions.gradients(), ())
        return gradients_of(tensors, self._shards)

    def values(self, tensors: Sequence[Tensor]) -> LocalGradients:
        """What this rank holds of the tensors themselves, in place of gradients; None of those that are frozen."""
        if self._partitions is not None:
            return LocalGradients(self._partitions.values(), ())
        return LocalGradients([local_value(t).detach() if is_trained(t) else None for t in tensors], ())

    def norm_dtype(self, tensors: Sequence[Tensor]) -> torch.dtype:
        """Of norms, the same on all ranks: by all trained parameters, since a rank may lack a gradient."""
        wide = is_wide(tensors) if self._stages is None else self._stages.is_wide
        return torch.float64 if wide else torch.float32

    @property
    def is_local(self) -> bool:
        """Whether norms need no communication."""
        return self.rows.is_local and self._spanning.is_local

    def sum_over_ranks(self, sums: Tensor, has_elements: Tensor | None, norm_type: float) -> Tensor:
        """Power sums [K] of the components over all ranks, which call this together, from those of ``local``.

        ``has_elements`` says which of ``local`` have elements; it is needed for negative orders only.
        """
        encoded = self.rows.over_ranks(encode(sums, has_elements, norm_type), norm_type)
        return decode(self._spanning.over_ranks(encoded, norm_type), sums.dtype, norm_type)

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
        lines = []
        for group, rows in self.rows.groups + self._spanning.groups:
            shown = f"{len(group.ranks)} ranks ({some_of(group.ranks, 8)})"
            lines.append(f"  one all-reduce of {len(rows.host)} sums over {shown}")
        return "\n".join(lines) or "  no communication between ranks"
