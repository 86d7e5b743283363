"""Which power sums are added up over which ranks: worked out once from the parameters, asked for at every call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import some_of
from ..backends.memory import upload
from ..components.membership import Components
from ..core import formula
from ..core.checks import WIDE_DTYPES
from . import local
from .consistency import Stages, compare_stages
from .groups import Group, along, group_over
from .reduction import Measured, Reduction


class Spread:
    """One set of components over several ranks.

    Attributes:
        local: what is held here, as components of its own: one for each component and group that it is added up
            over, so that one pass over the gradients yields what each all-reduce needs.
        member_numels: elements of each member of the components, over all ranks that were asked.
        has_stages: whether other ranks have other components.
        all_names: of components, other ranks' too.
        all_parameters: names of parameters, other ranks' too.
    """

    def __init__(
        self,
        components: Components,
        tensors: Sequence[Tensor],
        layouts: local.Layouts,
        group: Group | None,
        stages: Group | None,
    ) -> None:
        self._names = components.names
        self._layouts = layouts
        self._share = local.Share(layouts, components.tensor_names)
        self.has_stages = stages is not None
        groups = _groups(layouts, tensors, group)
        self.local, owners = local.local_components(components, layouts, groups)
        self._owners = [component for component, _ in owners]
        self._is_same = self._owners == list(range(len(self._names)))
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._counted_on: dict[torch.device, Tensor] = {}

        used = {g.ranks: g for g in (*groups, group) if g is not None}
        self._reductions = []
        for shared in used.values():
            sums = [i for i, (_, g) in enumerate(owners) if g is not None and g.ranks == shared.ranks]
            if sums:
                self._reductions.append(Reduction.of(shared, sums, list(range(len(sums))), len(sums), len(owners)))
        self.member_numels = local.member_numels(components, tensors, layouts)
        if group is not None:
            everywhere = [sum(each) for each in zip(*group.gather(self.member_numels), strict=True)]
            places = [position for position, _, _ in components.members]
            self.member_numels = [
                summed if layouts[position] is None else here
                for position, here, summed in zip(places, self.member_numels, everywhere, strict=True)
            ]

        self._stages = self._over_stages = None
        if stages is not None:
            self._stages, self._over_stages = self._compare_stages(components, stages, _is_wide(tensors))
        self.all_names = self._names if self._stages is None else self._stages.names
        self.all_parameters = components.tensor_names if self._stages is None else self._stages.parameters
        self._asked = _widest([*used.values(), *neighbours_of(group, layouts)])
        if stages is not None:
            self._asked.append(stages)
        elif self._is_same and [(r.group.ranks, r.is_all) for r in self._reductions] == [
            (asked.ranks, True) for asked in self._asked
        ]:
            self._asked = []  # all norms are the same everywhere

    def _compare_stages(self, components: Components, group: Group, is_wide: bool) -> tuple[Stages, Reduction | None]:
        members: dict[str, list[str]] = {}
        for position, component, _ in components.members:
            own = members.setdefault(components.names[component], [])
            if components.tensor_names[position] not in own:
                own.append(components.tensor_names[position])
        stages = compare_stages(group, members, components.tensor_names, is_wide)
        if not stages.spanning:
            return stages, None
        place = {name: i for i, name in enumerate(self._names)}
        here = [(place[name], lane) for lane, name in enumerate(stages.spanning) if name in members]
        places, lanes = [i for i, _ in here], [lane for _, lane in here]
        return stages, Reduction.of(group, places, lanes, len(stages.spanning), len(self._names))

    # -------------------------------------------------------------------------------------------------------
    # Local tensors
    # -------------------------------------------------------------------------------------------------------

    def gradients(self, tensors: Sequence[Tensor]) -> local.Held:
        """What is held here of each tensor's gradient.

        Raises:
            TypeError, ValueError: a gradient that isn't held as its parameter is; names the parameter.
        """
        return self._share.gradients(tensors)

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """What is held here of the tensors themselves; None of those that are frozen."""
        return [local.local_value(t).detach() if t.requires_grad else None for t in tensors]

    def norm_dtype(self, tensors: Sequence[Tensor]) -> torch.dtype:
        """Of norms, the same on all ranks: by all trained parameters, since a rank may lack a gradient."""
        is_wide = _is_wide(tensors) if self._stages is None else self._stages.is_wide
        return torch.float64 if is_wide else torch.float32

    # -------------------------------------------------------------------------------------------------------
    # Sums and coefficients
    # -------------------------------------------------------------------------------------------------------

    @property
    def is_local(self) -> bool:
        """Whether what is here is all that norms need."""
        return self._is_same and not self._reductions and self._over_stages is None

    @property
    def asks(self) -> bool:
        """Whether it takes others to know that no norm anywhere is inf or NaN."""
        return bool(self._asked)

    def whole(self, sums: Tensor, measured: Measured, norm_type: float) -> Tensor:
        """Power sums [K] of all components, everywhere, from those of ``local``. All ranks call this together.

        All collectives are under way before the first is waited for; those between stages come after.

        Args:
            sums: of what is here.
            measured: bool, of the same length, where there are elements; wanted for negative orders only.
            norm_type: order of the norm.
        """
        under_way = [(r, r.start(sums, measured, norm_type)) for r in self._reductions]
        for reduction, pending in under_way:
            sums, measured = reduction.finish(pending, sums, measured, norm_type)
        if not self._is_same:
            index, _ = self._indices(sums.device)
            rows = torch.cat((sums, sums.new_full((1,), formula.neutral(norm_type))))[index]
            sums = formula.merged(rows, norm_type)
            if measured is not None:
                measured = torch.cat((measured, measured.new_zeros(1)))[index].any(1)
        if self._over_stages is not None:
            pending = self._over_stages.start(sums, measured, norm_type)
            sums, measured = self._over_stages.finish(pending, sums, measured, norm_type)
        if measured is not None:  # whose root is 0
            sums = torch.where(measured, sums, 0.0 if norm_type == -math.inf else math.inf)
        return sums

    def local_factors(self, factors: Tensor) -> Tensor:
        """What the components of ``local`` are multiplied by, from [K]."""
        return factors if self._is_same else factors[self._indices(factors.device)[1]]

    def total(self, norms: Tensor, norm_type: float) -> Tensor:
        """The norm of all components everywhere together, []; ``stages`` come together for it."""
        if self._stages is None:
            return formula.root(formula.total(norms, norm_type), norm_type).to(norms.dtype)
        if self._stages.counted_elsewhere:
            norms = norms[self._counted(norms.device)]
        total = formula.total(norms, norm_type).reshape(1)
        together = Reduction.of(self._stages.group, [0], [0], 1, 1)
        # A negative order's sums are sent with whether there is anything; here they count even where that is nothing.
        measured = torch.ones_like(total, dtype=torch.bool) if norm_type < 0 else None
        total, _ = together.finish(together.start(total, measured, norm_type), total, measured, norm_type)
        return formula.root(total[0], norm_type).to(norms.dtype)

    def _counted(self, device: torch.device) -> Tensor:
        """Which components no earlier stage counts."""
        if device not in self._counted_on:
            elsewhere = self._stages.counted_elsewhere if self._stages is not None else ()
            here = [i for i, name in enumerate(self._names) if name not in elsewhere]
            self._counted_on[device] = upload(torch.tensor(here, dtype=torch.int64, device="cpu"), device)
        return self._counted_on[device]

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The sums of each component, [K, most], and the component of each sum."""
        if device not in self._on:
            members: list[list[int]] = [[] for _ in self._names]
            for i, component in enumerate(self._owners):
                members[component].append(i)
            most, nothing = max(1, *map(len, members)), len(self._owners)
            rows = [own + [nothing] * (most - len(own)) for own in members]
            index = torch.tensor(rows, dtype=torch.int64, device="cpu")
            owners = torch.tensor(self._owners, dtype=torch.int64, device="cpu")
            self._on[device] = upload(index, device), upload(owners, device)
        return self._on[device]

    # -------------------------------------------------------------------------------------------------------
    # Non-finite norms
    # -------------------------------------------------------------------------------------------------------

    def any_anywhere(self, found: Tensor) -> Tensor:
        """Whether it is true of anybody: float32 [1], 0 or more, from a bool; no host sync."""
        flag = found.reshape(1).float()
        for group in self._asked:
            flag = group.reduce(flag, dist.ReduceOp.MAX).result()
        return flag

    def nonfinite(self, norms: Tensor) -> tuple[list[str], int]:
        """Names of the components, here or elsewhere, whose norm is inf or NaN, and the number of all. Syncs."""
        finite = norms.isfinite()
        bad: set[str] = set()
        if bool(self.any_anywhere(~finite.all())):
            bad = {name for name, ok in zip(self._names, finite.tolist(), strict=True) if not ok}
            for group in self._asked:
                bad.update(*group.gather(bad))
        return [name for name in self.all_names if name in bad], len(self.all_names)

    def explain(self) -> str:
        """What is asked of whom, for people to read."""
        lines = [
            f"  one all-reduce of {r.width} sums over {_shown(r.group.ranks)}"
            for r in (*self._reductions, *([self._over_stages] if self._over_stages else []))
        ]
        return "\n".join(lines or ["  no traffic between ranks"])


def _is_wide(tensors: Sequence[Tensor]) -> bool:
    return any(t.dtype in WIDE_DTYPES and t.requires_grad for t in tensors)


def _groups(layouts: local.Layouts, tensors: Sequence[Tensor], group: Group | None) -> list[Group | None]:
    """For each tensor the ranks that hold the rest of it."""
    made: dict[tuple[int, tuple[int, ...]], Group | None] = {}
    found = []
    for layout in layouts:
        if layout is None or layout.mesh is None:
            found.append(group)
            continue
        key = id(layout.mesh), layout.cut_by
        if key not in made:
            made[key] = group_over(layout.mesh, layout.cut_by) if layout.cut_by else None
        found.append(made[key])
    return found


def neighbours_of(group: Group | None, layouts: local.Layouts) -> list[Group]:
    """All groups that this rank shares parameters with, replicas too."""
    found = [] if group is None else [group]
    for mesh in {id(layout.mesh): layout.mesh for layout in layouts if layout is not None}.values():
        if mesh is not None:
            found += along(mesh).values()
    # Of those of the same ranks the same one everywhere, in whichever order they come here.
    by_ranks = {group.ranks: group for group in sorted(found, key=lambda group: str(group.handle.group_name))}
    return sorted(by_ranks.values(), key=lambda group: group.order)


def _widest(groups: Sequence[Group]) -> list[Group]:
    """Those that don't lie within another one of these."""
    by_ranks = {group.ranks: group for group in groups}
    sets = [set(ranks) for ranks in by_ranks]
    found = [group for ranks, group in by_ranks.items() if not any(set(ranks) < other for other in sets)]
    return sorted(found, key=lambda group: group.order)


def _shown(ranks: Sequence[int]) -> str:
    return f"{len(ranks)} ranks ({some_of(ranks, 8)})"
