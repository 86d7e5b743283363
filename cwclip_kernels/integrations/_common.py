"""What integrations share: calls that clip, optimizers, skipped steps, who else clips."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import type_name, warn_caller
from ..clipper import ComponentClipper
from ..components.parameters import Parameters, named_tensors
from ..core.cache import session_for
from ..core.optimizers import OptimizerParts, attached_clippers, clipping_optimizer, parameters_of
from ..core.options import ClipOptions, Options, check_options
from ..core.parameter_clipper import ParameterClipper
from ..distributed.units import known_group
from ..grad_scaler import ComponentClipGradScaler
from ..thresholds import Threshold
from ..thresholds.base import StepCaps
from ..thresholds.by_pattern import settled
from ..thresholds.constant import MaxNorm

_OPTIONS = frozenset(ClipOptions.__annotations__)


def checked(norm_type: float, error_if_nonfinite: bool, options: ClipOptions) -> Options:
    """The scalar options, checked; TypeError or ValueError names the one that is wrong or unknown."""
    if not options.keys() <= _OPTIONS:
        unknown, known = min(options.keys() - _OPTIONS), ", ".join(ClipOptions.__annotations__)
        raise TypeError(f"unexpected keyword argument {unknown!r}; the options are {known}")
    eps, nonfinite = options.get("eps", 1e-6), options.get("nonfinite", "propagate")
    return check_options(norm_type, error_if_nonfinite, eps, nonfinite, options.get("backend"))


def clipper_arguments(norm_type: float, error_if_nonfinite: bool, options: ClipOptions) -> dict[str, Any]:
    """The same, checked, as keyword arguments of ``ComponentClipper``."""
    checked(norm_type, error_if_nonfinite, options)
    return {"norm_type": norm_type, "error_if_nonfinite": error_if_nonfinite, **options}


class ClipCall:
    """One call that clips, its arguments checked. Nothing else in this folder uses sessions."""

    def __init__(
        self,
        parameters: Parameters,
        max_norm: MaxNorm,
        norm_type: float,
        error_if_nonfinite: bool,
        options: ClipOptions,
        pp_mesh: object = None,
    ) -> None:
        self._options = checked(norm_type, error_if_nonfinite, options)
        settings = partial(self._options.in_words, max_norm, pp_mesh)
        self.tensors, self.session = session_for(
            parameters, options.get("components"), settings, options.get("process_group"), pp_mesh
        )
        self.max_norm = max_norm

    def caps(self) -> StepCaps:
        """The caps that ``max_norm`` stands for; TypeError or ValueError if it is wrong."""
        return self.session.caps_for(self.max_norm, self.tensors, self._options.rule)

    def clip_(self) -> Tensor:
        """Clips, and returns the norms before: [K]."""
        return self.session.clip_(self.tensors, self.caps(), self._options)[0]

    def total_norm(self, norms: Tensor) -> Tensor:
        """The norm of all components together: []."""
        return self.session.total(norms, self._options.rule.norm_type)


class Given:
    """Arguments that clipping was set up with, to tell whether others are the same."""

    def __init__(self, max_norm: MaxNorm, arguments: Mapping[str, Any]) -> None:
        self.max_norm, self._arguments = _as_given(max_norm), {**_DEFAULTS, **arguments}

    def other_than(self, max_norm: MaxNorm, arguments: Mapping[str, Any]) -> str | None:
        """The name of the first argument that is another one; None if all are the same."""
        known = self.max_norm
        if isinstance(known, Tensor | Threshold):
            is_same = max_norm is known
        else:
            max_norm = _as_given(max_norm)
            is_same = _in_order(max_norm) == _in_order(known)
        if not is_same:
            return "max_norm"
        ours, others = self._arguments, {**_DEFAULTS, **arguments}
        return next((name for name in {**ours, **others} if others.get(name) != ours.get(name)), None)


def _in_order(max_norm: MaxNorm) -> object:
    """With types, and of a mapping the order, since the first pattern that matches counts."""
    if isinstance(max_norm, Mapping):
        return [(pattern, type(cap), cap) for pattern, cap in max_norm.items()]
    return type(max_norm), max_norm


_DEFAULTS: dict[str, Any] = {"error_if_nonfinite": False, "eps": 1e-6, "nonfinite": "propagate"}


class ModelClipping:
    """A clipper of a trainer's model, for as long as the arguments stay the same."""

    def __init__(
        self, model: nn.Module, max_norm: MaxNorm, arguments: dict[str, Any], wrapped: nn.Module, is_scaled: bool
    ) -> None:
        self._given = Given(max_norm, arguments)
        group = known_group(wrapped, arguments.get("process_group"))
        self.clipper = ComponentClipper(model, max_norm, **{**arguments, "process_group": group})
        self.clipped = self.clipper.parameters
        self.clipper.check_not_in_backward(self.clipped)
        if is_scaled and self.clipper.raises_nonfinite:
            raise ValueError(
                "nonfinite: 'error' (error_if_nonfinite=True) can't be used with a scaled loss, whose norms are inf "
                "now and then, when the step is skipped; use 'propagate', 'zero' or 'skip'"
            )

    def is_for(self, max_norm: MaxNorm, arguments: dict[str, Any]) -> bool:
        """Whether it serves these arguments."""
        return self._given.other_than(max_norm, arguments) is None


class OptimizersClipping(ModelClipping):
    """The same with a part for each optimizer, which have all of their parameters in the model; ``hint`` says how."""

    def __init__(
        self,
        model: nn.Module,
        max_norm: MaxNorm,
        arguments: dict[str, Any],
        wrapped: nn.Module,
        is_scaled: bool,
        hint: str,
    ) -> None:
        super().__init__(model, max_norm, arguments, wrapped, is_scaled)
        known = {id(p) for p in named_tensors(model).tensors}
        self._parts = OptimizerParts(self.clipper, partial(_check_known, known, hint))

    def part_of(self, optimizer: Optimizer) -> ParameterClipper:
        """A clipper of what the optimizer owns. ValueError if it owns what the model doesn't have."""
        return self._parts.of(optimizer).clipper


def _check_known(known: set[int], hint: str, optimizer: Optimizer) -> None:
    """Raises ValueError unless the ids of all parameters of the optimizer are known."""
    for p in parameters_of(optimizer):
        if id(p) not in known:
            raise ValueError(
                f"optimizer: {type_name(optimizer)} owns a parameter of shape {list(p.shape)} that the module "
                f"doesn't have, or didn't when clipping began, and that would go unclipped; {hint}"
            )


def _as_given(max_norm: MaxNorm) -> MaxNorm:
    if isinstance(max_norm, Mapping):
        return dict(max_norm)  # which may change
    return float(max_norm) if type(max_norm) is int else max_norm


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside a trainer's wrappers, which is the one that a ``GradScaler`` knows."""
    while any(
        kind.__name__ in ("AcceleratedOptimizer", "LightningOptimizer", "_FabricOptimizer")
        for kind in type(optimizer).__mro__
    ):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def is_deepspeed(accelerator: Any) -> bool:
    """Whether an ``Accelerator``, or its ``state``, is DeepSpeed's, whose engine steps within ``backward``."""
    return bool(accelerator.distributed_type.value == "DEEPSPEED")


def refuse_lightning_strategy(strategy: object, ours: str) -> None:
    """Raises RuntimeError if gradients aren't complete where Lightning clips, or only the strategy knows them."""
    for kind in type(strategy).__mro__:
        if kind.__name__ in _ELSEWHERE:
            raise RuntimeError(f"{ours}(strategy=...): {_ELSEWHERE[kind.__name__]}")


_ELSEWHERE = {
    "XLAFSDPStrategy": "XLA's FSDP keeps a part of each gradient on each device, and only XLA knows their norms: "
    "leave clipping to Lightning",
    "XLAStrategy": "XLA sums gradients over devices in the optimizer's step, after they would be clipped: use one "
    "device, or another strategy",
}


def learner(max_norm: MaxNorm | None) -> Threshold | None:
    """The threshold whose caps change with the steps, so that checkpoints need its state; None for other caps."""
    policy = None if max_norm is None else settled(max_norm)
    return policy if isinstance(policy, Threshold) and policy.learns else None


@contextmanager
def learning_unless_skipped(max_norm: MaxNorm, scaler: object, optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Clip within it: caps learn nothing if the scaler will skip one of these steps because of inf.

    Where caps learn it waits for the device, as the scaler's ``step`` does right after.
    """
    policy = learner(max_norm)
    if policy is None or scaler is None or not any(_is_skipped(scaler, o) for o in optimizers):
        yield
        return
    before = policy.state_dict()
    try:
        yield
    finally:
        policy.load_state_dict(before)


def _is_skipped(scaler: Any, optimizer: Optimizer) -> bool:
    state = getattr(scaler, "_per_optimizer_states", {}).get(id(innermost(optimizer)))
    if state is None or state["stage"].name != "UNSCALED":
        return False
    return any(found.item() for found in state["found_inf_per_device"].values())


_warned: set[str] = set()


def warn_already_clipped(setting: str, value: object, effect: str) -> None:
    """Warns, once for each message, of a trainer's setting that clips as well; None, 0 and inf clip nothing."""
    message = f"{setting} {effect}"
    is_off = value is None or (isinstance(value, Real) and not 0 < float(value) < math.inf)
    if not is_off and message not in _warned:
        _warned.add(message)
        warn_caller(message)


def refuse_double_clipping(
    optimizers: Iterable[Optimizer], scaler: object, parameters: Sequence[Tensor], ours: str
) -> None:
    """Raises RuntimeError if this package's scaler, attachment or optimizer clips the same gradients as ``ours``."""
    if isinstance(scaler, ComponentClipGradScaler):
        raise RuntimeError(
            f"scaler: a ComponentClipGradScaler clips when it unscales, and {ours} would clip the same gradients "
            f"again; use torch.amp.GradScaler, or leave out {ours}"
        )
    for optimizer in optimizers:
        clipping = clipping_optimizer(innermost(optimizer), parameters)
        if clipping is not None:
            raise RuntimeError(
                f"optimizer: {type_name(clipping)} clips in its own step, and {ours} would clip the same gradients "
                f"before; leave out {ours}, or use torch.optim.AdamW"
            )
        shared = attached_clippers(optimizer, parameters)
        if shared:
            raise RuntimeError(
                f"optimizer: a clipper is attached to {type_name(optimizer)}, and would clip the gradient of "
                f"{shared[0][1]!r} again after {ours}; call remove() on what attach() returned, or leave out {ours}"
            )
