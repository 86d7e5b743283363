"""What an optimizer clips by: its components, and a cap for each param group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..components.membership import Components, unclipped
from ..components.parameters import NamedTensors, named_tensors
from ..components.resolve import resolve
from ..components.spec import Grouping
from ..core.options import Options
from ..core.session import ClipSession
from ..distributed.shards import is_flat, originals_of
from ..distributed.units import each_by_itself
from ..result import ClipResult
from ..thresholds.by_pattern import settled
from ..thresholds.constant import MaxNorm

Names = nn.Module | Iterable[tuple[str, Tensor]] | None


@dataclass(eq=False)
class Unit:
    """Parameters that are clipped by one ``max_norm``; or by none."""

    tensors: tuple[Tensor, ...]
    groups: tuple[int, ...]  # the param group of each
    session: ClipSession
    clips: bool  # False for the parameters that no component has
    _known: tuple[list[Any], list[Any]] | None = None  # all states of an optimizer, and those of ``tensors``

    def states_in(self, states: Mapping[Tensor, Any]) -> list[Any]:
        """The state of each parameter in an optimizer's; None if it has none yet."""
        now = list(states.values())
        # A tensor is looked up in Python, which takes long; that nothing has changed is found out fast.
        known = self._known
        if known is None or len(known[0]) != len(now) or not all(map(is_, known[0], now)):
            known = self._known = now, [states.get(p) or None for p in self.tensors]
        return known[1]


@dataclass
class Clipping:
    """How an optimizer's gradients are clipped. Components are looked up again when param groups change.

    Attributes:
        options: norm, non-finite policy and backend.
        components: the grouping.
        names: of parameters, where the groups have none.
        last: the last step's result. Here, as Dynamo loses what is assigned to an optimizer's own attributes.
    """

    options: Options
    components: Grouping
    process_group: Any = None
    pp_mesh: Any = None
    names: dict[int, str] = field(default_factory=dict)  # by id of the parameter
    last: ClipResult | None = None
    _units: tuple[Unit, ...] = ()
    _given: set[tuple[int, ...]] = field(default_factory=set)  # shapes of the parameters that users gave
    _made_for: object = None
    _whole: tuple[tuple[Tensor, ...], Components] = ((), Components((), (), ()))

    def units_of(self, groups: Sequence[Mapping[str, Any]], *, are_given: bool = False) -> tuple[Unit, ...]:
        """The groups' parameters by ``max_norm``, those that no component has last.

        ``are_given`` where users have just given the groups; others may replace parameters later.

        Raises:
            TypeError, ValueError: names, components and groups that don't fit together.
        """
        if are_given:
            self._given.update(tuple(p.shape) for group in groups for p in group["params"])
        caps = [group["max_norm"] for group in groups]
        sharing = [next(j for j in range(i + 1) if are_equal(caps[j], caps[i])) for i in range(len(caps))]
        made_for = sharing, [group["params"] for group in groups]
        if self._made_for is None or not _is_same(self._made_for, made_for):
            self._units = self._make(groups, sharing)
            self._made_for = sharing, [list(group["params"]) for group in groups]
        return self._units

    def whole(self, groups: Sequence[Mapping[str, Any]]) -> tuple[tuple[Tensor, ...], Components]:
        """All parameters of the groups, which are those of the last ``units_of``, and their components.

        Raises:
            ValueError: groups have different ``max_norm``, so that one call can't serve them.
            RuntimeError: their parameters are others now.
        """
        if not all(are_equal(groups[0]["max_norm"], group["max_norm"]) for group in groups[1:]):
            raise ValueError("optimizer: its param groups have different max_norm; give them one, a mapping perhaps")
        tensors, components = self._whole
        now = [p for group in groups for p in group["params"]]
        if len(now) != len(tensors) or any(p is not known for p, known in zip(now, tensors, strict=True)):
            raise RuntimeError("optimizer: its param groups have other parameters than before; step once eagerly")
        return tensors, components

    @property
    def is_spread(self) -> bool:
        """Whether other ranks have parts of components, or of the model."""
        return any(unit.session.reductions is not None for unit in self._units)

    def _make(self, groups: Sequence[Mapping[str, Any]], sharing: list[int]) -> tuple[Unit, ...]:
        tensors = [p for group in groups for p in group["params"]]
        owner = [i for i, group in enumerate(groups) for _ in group["params"]]
        if len(set(map(id, tensors))) < len(tensors):
            raise ValueError("params: a parameter is given more than once, and would be stepped as often")
        if any(not isinstance(p, nn.Parameter) and tuple(p.shape) not in self._given for p in tensors):
            raise ValueError(
                "optimizer: its parameters have been replaced by tensors of other shapes, as DeepSpeed's ZeRO and "
                "other wrappers do that lay them flat, and a component isn't a part of these; use torch.optim.AdamW "
                "there, with cwclip_kernels.integrations.deepspeed.attach(engine, ...)"
            )
        named = self._named(groups, tensors)
        everything = resolve(named, self.components, is_all=self.pp_mesh is None or any(map(is_flat, tensors)))
        first: dict[int, int] = {}
        for position, component, _ in everything.members:
            before = first.setdefault(component, position)
            if sharing[owner[before]] != sharing[owner[position]]:
                raise ValueError(
                    f"max_norm: component {everything.names[component]!r} has parameters in param groups with "
                    f"different max_norm ({named.names[before]!r} and {named.names[position]!r}); give these groups "
                    "the same, or choose components that lie within one group"
                )
        _check_flat(named, everything)
        self._whole = tuple(tensors), everything
        clipped = everything.clipped
        units = []
        for cap in dict.fromkeys(sharing):
            inside = [i for i in range(len(tensors)) if i in clipped and sharing[owner[i]] == cap]
            if inside:
                units.append(self._unit(everything, inside, tensors, owner, clips=True))
        rest = [i for i in range(len(tensors)) if i not in clipped]
        if rest:
            units.append(self._unit(unclipped(named.names, rest), rest, tensors, owner, clips=False))
        return tuple(units)

    def _unit(
        self, components: Components, inside: list[int], tensors: list[Tensor], owner: list[int], *, clips: bool
    ) -> Unit:
        own = tuple(tensors[i] for i in inside)
        group, mesh = (self.process_group, self.pp_mesh) if clips else (each_by_itself(own), None)
        session = ClipSession(_compact(components.only(inside)), own, group, mesh, self.options.in_words())
        return Unit(own, tuple(owner[i] for i in inside), session, clips)

    def _named(self, groups: Sequence[Mapping[str, Any]], tensors: list[Tensor]) -> NamedTensors:
        given = [name for group in groups for name in group.get("param_names", [None] * len(group["params"]))]
        names = [self.names.get(id(p), name) for p, name in zip(tensors, given, strict=True)]
        missing = [i for i, name in enumerate(names) if name is None]
        if len(missing) == len(names) and not self.names:
            return named_tensors(tensors)
        if missing:
            raise ValueError(
                f"named_parameters: has no name for {len(missing)} of the {len(names)} parameters of this optimizer, "
                f"the first of shape {list(tensors[missing[0]].shape)}; give names for all, or for none"
            )
        return named_tensors([(str(name), p) for name, p in zip(names, tensors, strict=True)])


def _check_flat(named: NamedTensors, components: Components) -> None:
    """Raises ValueError if a flat parameter lies in part outside of all components, and wouldn't be stepped there."""
    covered: dict[int, int] = {}
    for position, _, place in components.members:
        covered[position] = covered.get(position, 0) + sum(size for _, _, size in place)
    for position, count in covered.items():
        name, flat = named.names[position], named.tensors[position]
        if is_flat(flat) and count < sum(one.tensor.numel() for one in originals_of(name, flat, named.named)):
            raise ValueError(
                f"components: leave out a part of the flat parameter {name!r}; make FullyShardedDataParallel with "
                "use_orig_params=True, or choose components for all of it"
            )


def names_of(source: Names) -> dict[int, str]:
    """Names of parameters, by id, from a module or (name, parameter) pairs."""
    if source is None:
        return {}
    named = named_tensors(source if isinstance(source, nn.Module) else list(source))
    return dict(zip(map(id, named.tensors), named.names, strict=True)) if named.named else {}


def are_equal(a: MaxNorm, b: MaxNorm) -> bool:
    """Whether two ``max_norm`` are the same number, an equal mapping, or one object."""
    a, b = settled(a), settled(b)
    if a is b:
        return True
    if type(a) is not type(b) or not isinstance(a, int | float | Mapping):
        return False
    return bool(a == b)


def _is_same(a: Any, b: Any) -> bool:
    if a[0] != b[0] or len(a[1]) != len(b[1]):
        return False
    pairs = zip(a[1], b[1], strict=True)
    return all(len(x) == len(y) and all(map(is_, x, y)) for x, y in pairs)


def _compact(components: Components) -> Components:
    """Without the names of components that have no member here."""
    used = list(dict.fromkeys(component for _, component, _ in components.members))
    new = {component: i for i, component in enumerate(used)}
    names = tuple(components.names[i] for i in used)
    return replace(
        components,
        names=names,
        members=tuple((position, new[component], place) for position, component, place in components.members),
        aliases=tuple((other, name) for other, name in components.aliases if name in names),
        spellings=tuple(components.spellings[i] for i in used) if components.spellings else (),
    )


def is_known_to_hold(skip: Tensor | None, may_sync: bool) -> bool:
    """Whether this step is skipped, as far as the host can tell without a sync, or with one if it may."""
    return skip is not None and (may_sync or skip.device.type == "cpu") and bool(skip.item())


def joined(results: list[ClipResult]) -> ClipResult:
    """The results of several calls as one."""
    if len(results) == 1:
        return results[0]
    if not results:
        return ClipResult((), torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.float64))
    device = results[0].norms.device
    wait = device.type == "cpu"  # for a copy to the host, which is read at once
    parts = zip(*((r.norms, r.coefs, r.caps.expand(r.norms.shape)) for r in results), strict=True)
    norms, coefs, caps = (torch.cat([t.to(device, non_blocking=not wait) for t in each]) for each in parts)
    return ClipResult(tuple(name for r in results for name in r.names), norms, coefs, caps)
