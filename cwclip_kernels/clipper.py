"""Clipping with names and plan resolved once: what a training loop holds on to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.parameter import is_lazy

from . import compiled, dispatch, execute
from .caps import Caps, MaxNorm, as_float
from .components import Components, Grouping, Parameters, named_tensors, resolve, type_name
from .formula import POLICIES, ClipRule
from .plan import ClipPlan, Planner

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ClipResult:
    """What one clip found and did. Tensors stay on their device; nothing syncs until you look.

    Attributes:
        names: the K component names.
        norms: [K], float32 (float64 if any gradient is), norms before clipping.
        coefs: [K], same dtype, what each component was multiplied by; 1 means its bits are untouched.
    """

    names: tuple[str, ...]
    norms: Tensor
    coefs: Tensor

    @property
    def clipped(self) -> Tensor:
        """[K] bool: where the coefficient is not 1."""
        return self.coefs != 1

    def as_dict(self) -> dict[str, tuple[float, float]]:
        """{name: (norm, coefficient)} as Python floats; syncs with the device."""
        return dict(zip(self.names, zip(self.norms.tolist(), self.coefs.tolist(), strict=True), strict=True))


@dataclass(frozen=True)
class Options:
    """The scalar arguments of a call, checked.

    Attributes:
        rule: norm order, eps, non-finite policy.
        raise_nonfinite: whether a non-finite norm is an error.
        backend: the user's choice or None.
    """

    rule: ClipRule
    raise_nonfinite: bool
    backend: str | None


def check_options(
    norm_type: float, error_if_nonfinite: bool, eps: float, nonfinite: str, backend: str | None
) -> Options:
    """Checks the scalar arguments.

    Raises:
        TypeError, ValueError: names the argument and what it takes.
    """
    dispatch.check_backend(backend)
    if not isinstance(error_if_nonfinite, bool):
        raise TypeError(f"error_if_nonfinite: expected a bool, not {type_name(error_if_nonfinite)}")
    if not isinstance(nonfinite, str):
        raise TypeError(f"nonfinite: expected one of {', '.join(POLICIES)}, not {type_name(nonfinite)}")
    if nonfinite not in POLICIES:
        raise ValueError(f"nonfinite: expected one of {', '.join(POLICIES)}, not {nonfinite!r}")
    if error_if_nonfinite and nonfinite not in ("propagate", "error"):
        raise ValueError(f"error_if_nonfinite=True contradicts nonfinite={nonfinite!r}; give one of them")
    rule = ClipRule(_checked_order(norm_type), _checked_eps(eps), nonfinite)
    return Options(rule, error_if_nonfinite or nonfinite == "error", backend)


def _checked_order(norm_type: object) -> float:
    if isinstance(norm_type, str) and norm_type in ("inf", "-inf"):  # torch's own spelling
        return float(norm_type)
    if isinstance(norm_type, bool) or not isinstance(norm_type, Real):
        raise TypeError(f"norm_type: expected a number or 'inf', not {norm_type!r}")
    order = as_float(norm_type, "norm_type")
    if math.isnan(order):
        raise ValueError("norm_type: expected a number or 'inf', not nan")
    return order


def _checked_eps(eps: object) -> float:
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps: expected a number, not {type_name(eps)}")
    value = as_float(eps, "eps")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"eps: expected a finite number >= 0, not {value}")
    return value


class Engine:
    """Components with their plan: one step's work on tensors that the caller holds.

    It keeps no reference to the tensors themselves, so that a cache of engines keeps no model alive.
    """

    def __init__(self, components: Components) -> None:
        self.components = components
        self._planner = Planner(components)
        self._last_caps: tuple[object, Caps] | None = None

    def caps(self, max_norm: MaxNorm) -> Caps:
        """``max_norm``, checked, matched with the component names and brought to its device once while it stays."""
        if isinstance(max_norm, Tensor):
            return Caps(max_norm, self.components.names)
        # With types, compared first: True equals 1 but is no cap, and comparing with a tensor may raise.
        named = max_norm.items() if isinstance(max_norm, Mapping) else [(None, max_norm)]
        items = [(pattern, type(value), value) for pattern, value in named]
        if self._last_caps is None or self._last_caps[0] != items:
            self._last_caps = items, Caps(max_norm, self.components.names)
        return self._last_caps[1]

    def clip_(self, tensors: Sequence[Tensor], caps: Caps, options: Options) -> tuple[Tensor, Tensor]:
        """Clips the tensors' gradients in place: norms before and coefficients, [K] each."""
        rule, raise_nonfinite = options.rule, options.raise_nonfinite
        return self._carry_out(
            lambda plan, grads: execute.clip_(plan, grads, caps, rule, raise_nonfinite),
            tensors,
            rule.norm_type,
            options.backend,
            exact=raise_nonfinite,  # its RuntimeError may be about the norms
        )

    def norms(self, tensors: Sequence[Tensor], norm_type: float, backend: str | None) -> Tensor:
        """Norms [K] of the tensors' gradients, which stay as they are."""
        return self._carry_out(
            lambda plan, grads: execute.norms_of(plan, grads, norm_type), tensors, norm_type, backend, exact=False
        )

    @torch.no_grad()
    def _carry_out(
        self,
        work: Callable[[ClipPlan, list[Tensor | None]], _Result],
        tensors: Sequence[Tensor],
        norm_type: float,
        backend: str | None,
        *,
        exact: bool,
    ) -> _Result:
        grads = [t.grad for t in tensors]
        request = grads, _home(tensors), norm_type, backend
        plan = self._planner.plan(*request, exact=exact)
        try:
            return work(plan, grads)
        except RuntimeError:
            if exact or not plan.self_checking:
                raise
            # Refused, and nothing written. A look at every gradient says what is wrong, by name, or what changed.
            fresh = self._planner.remake(*request)
            if fresh.signature == plan.signature:
                raise
            return work(fresh, grads)

    @torch.no_grad()
    def explain(self, tensors: Sequence[Tensor], norm_type: float, backend: str | None) -> str:
        """Which backend serves what, and why; the tensors themselves stand in for gradients not there yet."""
        shown = [_stand_in(t) if t.grad is None else t.grad for t in tensors]
        plan = Planner(self.components).plan(shown, _home(tensors), norm_type, backend)
        return dispatch.explain(plan, shown)


def _stand_in(tensor: Tensor) -> Tensor | None:
    # None for what has no data yet, or is frozen and never has a gradient.
    return tensor.detach() if tensor.requires_grad and not is_lazy(tensor) and not tensor.is_meta else None


def _home(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


class ComponentClipper:
    """Clips each component's gradient to its own norm, with everything that can be known ahead done once.

        norm_c = (sum over component c of |g|^p)^(1/p)
        coef_c = min(1, max_norm_c / (norm_c + eps));  g <- coef_c * g, in place

    Hold on to one for a training run and call ``clip_()`` between ``backward()`` and ``optimizer.step()``.
    The parameters are read once, here: make another one when parameters are added or replaced. Which of them
    have gradients may change from step to step.

    Args:
        parameters: as for :func:`fused_component_clip_`.
        max_norm: likewise. A tensor is read at every call, so changing it in place changes the caps.
        norm_type: likewise.
        error_if_nonfinite: likewise.
        components: likewise.
        eps: likewise.
        nonfinite: likewise.
        backend: likewise.

    Attributes:
        names: the K component names, in the order of every [K] tensor.

    Raises:
        TypeError, ValueError: an argument that isn't what it should be; named in the message.

    Example:
        >>> import torch
        >>> from cwclip_kernels import ComponentClipper
        >>> model = torch.nn.Linear(2, 1)
        >>> clipper = ComponentClipper(model, max_norm=1.0)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> model.bias.grad = torch.tensor([0.5])
        >>> result = clipper.clip_()
        >>> result.names, result.norms
        (('weight', 'bias'), tensor([5.0000, 0.5000]))
        >>> result.coefs, result.clipped
        (tensor([0.2000, 1.0000]), tensor([ True, False]))

    References:
        Yang & Ma, "Improving Stability of Fine-Tuning Pretrained Language Models via Component-Wise Gradient
        Norm Clipping", EMNLP 2022, arXiv 2210.10325.
    """

    def __init__(
        self,
        parameters: Parameters,
        max_norm: MaxNorm,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        components: Grouping = None,
        eps: float = 1e-6,
        nonfinite: str = "propagate",
        backend: str | None = None,
    ) -> None:
        self._options = check_options(norm_type, error_if_nonfinite, eps, nonfinite, backend)
        named = named_tensors(parameters)
        self._tensors = named.tensors
        self._engine = Engine(resolve(named, components))
        self.names: tuple[str, ...] = self._engine.components.names
        self._caps = Caps(max_norm, self.names)
        # As given, for torch.compile; a mapping as it is now, like the caps.
        self._max_norm = dict(max_norm) if isinstance(max_norm, Mapping) else max_norm

    def clip_(self) -> ClipResult:
        """Clips the gradients that are there now, in place.

        Returns:
            Norms before clipping and coefficients. A component without any gradient has norm 0, coefficient 1.

        Raises:
            RuntimeError: a norm is non-finite and that was to be an error (nothing is changed then), or the
                named backend can't serve a gradient.
            TypeError, ValueError: a gradient that can't be clipped in place; nothing is changed.
        """
        if is_dynamo_compiling():
            options = self._options
            norms, coefs = compiled.clip_(
                self._tensors,
                self._engine.components,
                self._max_norm,
                options.rule,
                options.raise_nonfinite,
                options.backend,
            )
            return ClipResult(self.names, norms, coefs)
        return ClipResult(self.names, *self._engine.clip_(self._tensors, self._caps, self._options))

    def norms(self) -> Tensor:
        """The K norms of the gradients that are there now, which stay as they are: [K], no host sync."""
        norm_type, backend = self._options.rule.norm_type, self._options.backend
        if is_dynamo_compiling():
            return compiled.norms_of(self._tensors, self._engine.components, norm_type, backend)
        return self._engine.norms(self._tensors, norm_type, backend)

    def explain(self) -> str:
        """Which backend serves which gradients, and why, for people to read."""
        return self._engine.explain(self._tensors, self._options.rule.norm_type, self._options.backend)
