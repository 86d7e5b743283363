"""Clipping a fixed set of parameters: what ``ComponentClipper`` is built on, and what clips at optimizers' steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..result import ClipResult
from ..thresholds import Threshold
from ..thresholds.base import StepCaps, learnt, load_learnt
from ..thresholds.constant import MaxNorm
from . import traced
from .loss_scale import LossScale
from .modes import is_traced
from .options import Options
from .session import ClipSession

Self = TypeVar("Self", bound="ParameterClipper")


class ParameterClipper:
    """Parameters with their session, caps and options.

    Attributes:
        names: the K component names, in the order of every [K] tensor.
        max_norm: as given.
    """

    _watches = False  # whether the parameters may have to be looked at before each clip

    def __init__(
        self, tensors: tuple[Tensor, ...], session: ClipSession, max_norm: MaxNorm, options: Options
    ) -> None:
        self.names: tuple[str, ...] = session.components.names
        # As given; a mapping as it is now, like the caps.
        self.max_norm: MaxNorm = dict(max_norm) if isinstance(max_norm, Mapping) else max_norm
        self._session = session
        self._tensors = tensors
        self._options = options
        self._whole: ParameterClipper | None = None  # that this is a part of, with its caps
        self._fixed: StepCaps | None = None
        caps = self._caps()  # checks max_norm, and gives a threshold the state that it needs
        if not isinstance(max_norm, Threshold):
            self._fixed = caps

    def _caps(self) -> StepCaps:
        if self._whole is not None:
            return self._whole._caps()
        return self._fixed or self._session.caps_for(self.max_norm, self._all(), self._options.rule)

    def _all(self) -> tuple[Tensor, ...]:
        """All parameters, clipped or not."""
        return self._tensors

    def clip(self, scale: LossScale, *, learns: bool = True) -> ClipResult:
        """Clips the gradients that are there now, in place.

        Args:
            scale: of the loss.
            learns: whether a threshold learns from this step now; otherwise ``learn`` is called if it is taken.
        """
        if is_traced():
            traced.refuse_ranks(self.is_spread)
            outcome = traced.clip_(self._all(), self._session.components, self.max_norm, self._options, scale)
        else:
            if self._watches:
                self._before_clip()
            caps = self._fixed or self._caps()
            outcome = self._session.clip_(self._tensors, caps, self._options, scale, learns)
        return ClipResult(self.names, *outcome)

    def _before_clip(self) -> None:
        """Called before each clip while ``_watches``; may replace the tensors."""

    @torch.no_grad()
    def learn(self, result: ClipResult) -> None:
        """Lets a threshold learn from a result of ``clip(learns=False)``."""
        if isinstance(self.max_norm, Threshold):
            self.max_norm.update_(result.norms, result.coefs)

    def part(self: Self, parameters: Iterable[Tensor]) -> Self:
        """A clipper for some of the parameters, with the same components, caps and state.

        For parameters that become ready at different times, such as those of several optimizers. Its results have the
        same K, with norm 0 and coefficient 1 where a component is not among them.

        Args:
            parameters: some of this clipper's; any others are ignored.

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
    def is_spread(self) -> bool:
        """Whether other ranks have parts of components, or of the model, so that all clip together."""
        return self._session.spread is not None

    @property
    def raises_nonfinite(self) -> bool:
        """Whether a non-finite norm is an error."""
        return self._options.raise_nonfinite

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on as if nothing had happened: what ``max_norm`` has learnt.

        Returns:
            {"max_norm": ``Threshold.state_dict()``}; {} where nothing is learnt, as by a number.
        """
        return learnt(self.max_norm)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict()``, of a clipper with the same components and kind of ``max_norm``.

        Raises:
            TypeError, ValueError: that of another threshold, or for other components. Nothing is changed.
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


@dataclass
class OptimizerPart:
    """What one optimizer owns.

    Attributes:
        ids: of its parameters.
        clipper: of those that are clipped; None if none is.
        clipped: these.
        others: the optimizer's other parameters.
    """

    ids: tuple[int, ...]
    clipper: ParameterClipper | None
    clipped: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    _turn: int = 0

    def check_not_in_backward(self) -> None:
        """Raises if a gradient is clipped by ``clip_in_backward`` as well: looks at all first, then at one each time.

        Looking at all at every step would cost more than the rest of the host's work.
        """
        if self.clipper is not None:
            turn, self._turn = self._turn, self._turn + 1
            some = self.clipped if turn == 0 else (self.clipped[turn % len(self.clipped)],)
            self.clipper.check_not_in_backward(some)


class OptimizerParts:
    """The parts of a clipper that optimizers own, found anew when their ``param_groups`` change."""

    def __init__(self, clipper: ParameterClipper) -> None:
        self.clipper = clipper
        self._parts: dict[int, OptimizerPart] = {}

    def of(self, optimizer: Optimizer) -> OptimizerPart:
        """What this optimizer owns now: the same object as long as that stays."""
        parameters = parameters_of(optimizer)
        ids = tuple(map(id, parameters))
        known = self._parts.get(id(optimizer))
        if known is None or known.ids != ids:
            part = self.clipper.part(parameters)
            clipped = part.parameters
            own = set(map(id, clipped))
            others = tuple(p for p in parameters if id(p) not in own)
            known = self._parts[id(optimizer)] = OptimizerPart(ids, part if clipped else None, clipped, others)
        return known


def parameters_of(optimizer: Optimizer) -> Sequence[Tensor]:
    """What an optimizer owns, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]
