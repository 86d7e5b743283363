"""Clipping a fixed set of parameters: the base of ``ComponentClipper``, which optimizers' hooks use as well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..components.membership import Member
from ..result import ClipResult
from ..thresholds import Threshold
from ..thresholds.base import StepCaps
from ..thresholds.by_pattern import settled
from ..thresholds.constant import MaxNorm
from ..thresholds.learning import learnt, load_learnt
from . import traced
from .formula import total_norm
from .loss_scale import LossScale
from .modes import is_traced
from .options import Options
from .session import ClipSession

Self = TypeVar("Self", bound="ParameterClipper")


class ParameterClipper:
    """Parameters with their session, caps and options; ``names`` and ``max_norm`` are ``ComponentClipper``'s."""

    _watches = False  # whether ``_before_clip`` is called

    def __init__(
        self, tensors: tuple[Tensor, ...], session: ClipSession, max_norm: MaxNorm, options: Options
    ) -> None:
        self.names: tuple[str, ...] = session.components.names
        max_norm = settled(max_norm)
        # A mapping as it is now, like the caps.
        self._max_norm: MaxNorm = dict(max_norm) if isinstance(max_norm, Mapping) else max_norm
        self._session = session
        self._tensors = tensors
        self._options = options
        self._whole: ParameterClipper | None = None  # the clipper that this is a part of, whose caps it uses
        self._fixed: StepCaps | None = None
        caps = self._caps()  # checks max_norm, and binds a threshold
        if not isinstance(max_norm, Threshold):
            self._fixed = caps

    @property
    def max_norm(self) -> MaxNorm:
        """As given, a mapping with thresholds as a ``thresholds.ByPattern``."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: object) -> None:
        raise AttributeError(
            "max_norm: can't be assigned, since parts and hooks share it; give a tensor, and change that in place, "
            "or a thresholds.Schedule, or make another clipper"
        )

    def _caps(self) -> StepCaps:
        if self._whole is not None:
            return self._whole._caps()
        return self._fixed or self._session.caps_for(self.max_norm, self._all(), self._options.rule)

    def _all(self) -> tuple[Tensor, ...]:
        """All parameters, clipped or not."""
        return self._tensors

    def clip(self, scale: LossScale, *, learns: bool = True) -> ClipResult:
        """Clips the gradients that are there now, in place; unless it ``learns``, call ``learn`` later."""
        if is_traced():
            self.check_traced()
            outcome = traced.clip_(self._all(), self._session.components, self.max_norm, self._options, scale)
        else:
            if self._watches:
                self._before_clip()
            caps = self._fixed or self._caps()
            outcome = self._session.clip_(self._tensors, caps, self._options, scale, learns)
        return ClipResult(self.names, *outcome)

    def check_traced(self) -> None:
        """Raises for what a compiled function can't clip."""
        traced.refuse_ranks(self.is_spread)
        whole = self if self._whole is None else self._whole
        traced.check_bound(self.max_norm, whole._all(), whole._session.components)

    def _before_clip(self) -> None:
        """May replace the tensors."""

    @torch.no_grad()
    def learn(self, result: ClipResult) -> None:
        """Updates a threshold with a result of ``clip(learns=False)``."""
        if isinstance(self.max_norm, Threshold):
            self.max_norm.update_(result.norms, result.coefs)

    def part(self: Self, parameters: Iterable[Tensor]) -> Self:
        """A clipper for those of its parameters that are among ``parameters``, with the same components and caps.

        For gradients that are complete at different times, such as those of several optimizers. Its results have the
        same K; a component outside of this part has norm 0 and coefficient 1.

        Raises:
            ValueError: a component has trainable parameters inside and outside, so that its norm would not be whole.
        """
        wanted = set(map(id, parameters))
        tensors, components = self._all(), self._session.components
        inside = [i for i, tensor in enumerate(tensors) if id(tensor) in wanted]
        within = set(inside)
        owner = {component: position for position, component, _ in components.members if position in within}
        for position, component, _ in components.members:
            if component in owner and position not in within and tensors[position].requires_grad:
                here, there = components.tensor_names[owner[component]], components.tensor_names[position]
                raise ValueError(
                    f"component {components.names[component]!r} spans parameters inside and outside of this subset "
                    f"({here!r} and {there!r}), so its norm would not be whole; choose components that lie wholly "
                    "within it"
                )
        part = copy(self)
        part._tensors = tuple(tensors[i] for i in inside)
        part._session = ClipSession(components.only(inside), part._tensors, *self._session.ranks)
        part._whole = self._whole or self
        return part

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The parameters that are clipped, whole or in slices."""
        clipped = self._session.components.clipped
        return tuple(tensor for i, tensor in enumerate(self._all()) if i in clipped)

    @property
    def members(self) -> tuple[Member, ...]:
        """Which parameters, by position, or slices of them belong to which component."""
        return self._session.components.members

    @property
    def is_spread(self) -> bool:
        """Whether other ranks have parts of components, or of the model, so that all clip together."""
        return self._session.reductions is not None

    @property
    def raises_nonfinite(self) -> bool:
        """Whether a non-finite norm is an error."""
        return self._options.raise_nonfinite

    def total_norm(self, norms: Tensor) -> Tensor:
        """The norm of all components together, [], from the norms [K] of each: what ``clip_grad_norm_`` returns.

        With ``pp_mesh`` it is that of all its ranks, which make this call together. No host sync.
        """
        order = self._options.rule.norm_type
        if not is_traced():
            return self._session.total(norms, order)
        traced.refuse_ranks(self.is_spread)
        with torch.no_grad():
            return total_norm(norms, order)

    def explain(self) -> str:
        """Which backend serves which gradients, and why, for people to read."""
        return self._session.explain(self._all(), self._options.rule.norm_type, self._options.backend)

    def state_dict(self) -> dict[str, Any]:
        """What ``max_norm`` has learnt: {"max_norm": ``Threshold.state_dict()``}, or {} if it doesn't learn."""
        return learnt(self.max_norm)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads the ``state_dict()`` of a clipper with the same components and kind of ``max_norm``.

        Raises:
            TypeError, ValueError: of another threshold, or for other components. Nothing is changed.
        """
        load_learnt(self.max_norm, state_dict)

    def name_of(self, parameter: Tensor) -> str:
        """The name of one of the parameters."""
        names = self._session.components.tensor_names
        return next(name for name, tensor in zip(names, self._all(), strict=True) if tensor is parameter)

    def check_not_in_backward(self, parameters: Iterable[Tensor]) -> None:
        """Raises RuntimeError if one of these parameters' gradients is clipped by ``clip_in_backward`` as well."""
        for p in parameters:
            hooks = getattr(p, "_post_accumulate_grad_hooks", None)
            if hooks and any(getattr(type(hook), "clips_by_component", False) for hook in hooks.values()):
                raise RuntimeError(
                    f"the gradient of {self.name_of(p)!r} is clipped in the backward pass already "
                    "(clip_in_backward), and would be again at the step; remove() one of the two"
                )
