"""Under torch.compile: a whole call as one custom operator.

Dynamo can't trace caches, locks and kernels, and functionalization has to know what is written. So the traced public
functions end here: the gradients, and all that is static about the call, go to one operator, whose schema says that
it writes the gradients. When the compiled function runs, the operator does what an eager call does, to the same bits.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..components.membership import Components
from ..thresholds import Threshold
from ..thresholds.base import StepCaps
from ..thresholds.by_pattern import Settled, settled
from ..thresholds.constant import MaxNorm, checked_cap, checked_caps
from . import run
from .caps import fixed_caps, trained_of
from .checks import check_gradients, norm_dtype_of
from .formula import ClipRule, wide_dtype
from .identity import ids_of
from .loss_scale import UNSCALED, LossScale
from .options import Options
from .plan import Plans, home_of


def clip_(
    tensors: Sequence[Tensor],
    components: Components,
    max_norm: MaxNorm,
    options: Options,
    scale: LossScale = UNSCALED,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clips the tensors' gradients in place: norms before and coefficients, [K] each, and caps.

    A number or mapping as ``max_norm`` becomes part of the compiled function; a tensor is read whenever that runs.
    Thresholds are traced as well; those that need the norms take one more pass over the gradients.

    Raises:
        TypeError, ValueError: a cap or a gradient that isn't what it should be.
    """
    return clip_present_(tensors, *present(tensors, components), components, max_norm, options, scale)


def clip_gradients_(
    grads: Sequence[Tensor | None],
    components: Components,
    max_norm: MaxNorm,
    options: Options,
    scale: LossScale,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for gradients that hang on no parameter; ``max_norm`` is not a threshold."""
    given = {i: g for i, g in enumerate(grads) if g is not None}
    own = {i: g for i, g in given.items() if i in components.clipped}
    arguments = in_words_of(own, components), components, max_norm, options, scale
    return clip_present_(list(given.values()), list(own.values()), *arguments)


def clip_present_(
    tensors: Sequence[Tensor],
    grads: list[Tensor],
    text: str,
    components: Components,
    max_norm: MaxNorm,
    options: Options,
    scale: LossScale,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for these gradients, whose components ``text`` tells."""
    rule, backend = options.rule, options.backend
    cap = settled(max_norm)
    device = grads[0].device if grads else home_of(tensors)
    threshold = cap if isinstance(cap, Threshold) else None
    with torch.no_grad():
        caps = caps_for(tensors, components, cap, options, scale, device)
        added = rule.norm_type, *eps_of(cap, rule)
        if grads:
            scaled = inverse_of(scale, device), scale.found_inf
            norms, coefs, used = torch.ops.cwclip_kernels.component_clip_(
                grads, text, *caps, *scaled, *added, options.nonfinite, backend
            )
        else:
            norms = without_gradients(components, device)
            coefs, used = torch.ops.cwclip_kernels.component_coefficients(
                text, norms, *caps, *added, options.nonfinite
            )
        if threshold is not None:
            threshold.update_(norms, coefs)
    return norms, coefs, used


def caps_for(
    tensors: Sequence[Tensor],
    components: Components,
    max_norm: Settled,
    options: Options,
    scale: LossScale,
    device: torch.device,
    norms: Tensor | None = None,
) -> tuple[Tensor | None, str, list[float]]:
    """The caps of a call as operators take them; a threshold is asked for them here, with these norms if known."""
    if isinstance(max_norm, Threshold):
        if not max_norm.needs_norms:
            norms = None
        elif norms is None:
            order = options.rule.norm_type
            norms = scale.unscaled(norms_of(tensors, components, order, options.backend), order)
        max_norm = max_norm.caps(device, norms)
    return _split(max_norm)


def eps_of(max_norm: Settled, rule: ClipRule) -> tuple[float, list[int]]:
    """What is added to norms, and the components to whose norms it isn't, where these differ."""
    if not isinstance(max_norm, Threshold):
        return rule.eps, []
    adds = max_norm.adds_eps_to() if rule.eps > 0.0 else None
    exempt = [] if adds is None else [i for i, one in enumerate(adds) if not one]
    return rule.eps if max_norm.adds_eps else 0.0, exempt


def norms_of(
    tensors: Sequence[Tensor],
    components: Components,
    norm_type: float,
    backend: str | None,
    scale: LossScale = UNSCALED,
) -> Tensor:
    """Norms [K] of the tensors' unscaled gradients."""
    grads, text = present(tensors, components)
    if not grads:
        return without_gradients(components, home_of(tensors))
    with torch.no_grad():
        inverse = inverse_of(scale, grads[0].device)
        arguments = grads, text, norm_type, inverse, backend
        norms: Tensor
        if scale.found_inf is None:
            norms = torch.ops.cwclip_kernels.component_norms(*arguments)
        else:
            norms = torch.ops.cwclip_kernels.component_norms_and_inf(*arguments, scale.found_inf)
    return norms


def inverse_of(scale: LossScale, device: torch.device) -> Tensor | None:
    """The inverse of the loss's scale as operators take it."""
    inverse = scale.inverse
    if inverse is None or isinstance(inverse, Tensor):
        return inverse
    return torch.full((), inverse, dtype=wide_dtype(device), device=device)


def refuse_ranks(is_distributed: bool) -> None:
    """Raises RuntimeError for communication between ranks, whose order the compiler might change."""
    if is_distributed:
        raise RuntimeError(
            "parameters: components that are sharded over ranks can't be clipped in a compiled function; compile the "
            "model, and clip outside"
        )


def check_bound(max_norm: MaxNorm, tensors: Sequence[Tensor], components: Components) -> None:
    """Raises for a threshold that can't be traced, or is bound to other parameters than these, or as they were once.

    Binding it can't be traced, and eager calls do it when it is necessary.
    """
    threshold = settled(max_norm)
    if not isinstance(threshold, Threshold):
        return
    if threshold.untraceable is not None:
        raise RuntimeError(f"max_norm: {threshold.untraceable}")
    if not threshold.serves(ids_of([tensors[i] for i in sorted(components.clipped)])):
        raise RuntimeError(
            "max_norm: the threshold has been used for other parameters since; make one for each, or clip once "
            "outside of the compiled function, and then call it again"
        )
    if threshold.setting.trained != trained_of(tensors):
        raise RuntimeError(
            "max_norm: parameters have been frozen or unfrozen since the threshold was bound to them; clip once "
            "outside of the compiled function, and then call it again"
        )


def _split(max_norm: Settled) -> tuple[Tensor | None, str, list[float]]:
    """The caps as operators take them: a tensor, or patterns as text and a number for each, or "" and one number."""
    if isinstance(max_norm, Tensor):
        return max_norm.detach(), "", []
    if not isinstance(max_norm, Mapping):
        return None, "", [checked_cap(max_norm, "max_norm")]
    caps = checked_caps(max_norm)
    return None, repr(list(caps)), list(caps.values())


def present(tensors: Sequence[Tensor], components: Components) -> tuple[list[Tensor], str]:
    """The gradients that are clipped, and their components as text. Dynamo guards on which gradients there are."""
    clipped = components.clipped
    grads = {i: t.grad for i, t in enumerate(tensors) if t.grad is not None and i in clipped}
    return list(grads.values()), in_words_of(grads, components)


def in_words_of(grads: Mapping[int, Tensor], components: Components) -> str:
    """The components of these gradients, by position, as text; raises if one can't be clipped."""
    # Here, because the operator may get a copy, which no longer shows what is wrong with the original.
    check_gradients(components, grads)
    # Text, because an operator takes no objects, and 400 strings cost it three times as much as a long one.
    return in_words(components.only(list(grads)))


def in_words(own: Components) -> str:
    """Components as an operator takes them."""
    return repr((own.names, own.tensor_names, own.members, (), own.aliases, own.spellings))


def without_gradients(components: Components, device: torch.device) -> Tensor:
    """Norms where there is no gradient, [K]."""
    return torch.zeros(len(components.names), device=device, dtype=torch.float32)


# The operators themselves, which Dynamo doesn't look into.


def _component_clip_(
    grads: list[Tensor],
    components: str,
    caps: Tensor | None,
    patterns: str,
    values: list[float],
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    norm_type: float,
    eps: float,
    exempt: list[int],
    nonfinite: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    plan, found = plans_for(grads, components).get(list(grads), grads, norm_type, backend)
    policy = policy_of(components, caps, patterns, values, eps, exempt)
    scale = LossScale.of(inv_scale, found_inf)
    scale_here = scale.on(plan.device)
    rule = ClipRule(norm_type, eps, nonfinite)
    norms, coefs, used = run.clip_(plan, found, policy, rule, nonfinite == "error", scale_here)
    scale.deliver(scale_here)
    return norms, coefs, used.clone()  # an operator may not return what is kept


def policy_of(
    components: str,
    caps: Tensor | None,
    patterns: str,
    values: Sequence[float],
    eps: float,
    exempt: Sequence[int],
) -> StepCaps:
    """The caps that an operator got from ``caps_for`` and ``eps_of``."""
    policy = _policy(components, patterns, tuple(values)) if caps is None else fixed_caps(caps, read(components))
    if not exempt:
        return policy
    without = set(exempt)
    added = [0.0 if i in without else eps for i in range(len(read(components).names))]
    return policy._replace(eps=lambda device: torch.tensor(added, dtype=wide_dtype(device), device=device))


def _fake_component_clip_(
    grads: list[Tensor], components: str, caps: Tensor | None, patterns: str, values: list[float], *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_outcome(grads, components, caps, patterns)


def fake_outcome(
    grads: list[Tensor], components: str, caps: Tensor | None, patterns: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Norms, coefficients and caps without values."""
    norms = _fake_component_norms(grads, components)
    return norms, torch.empty_like(norms), fake_caps(norms, caps, patterns)


def fake_caps(norms: Tensor, caps: Tensor | None, patterns: str) -> Tensor:
    """Caps without values."""
    shape = (norms.shape if patterns else ()) if caps is None else caps.shape
    return norms.new_empty(shape, dtype=wide_dtype(norms.device))


def _component_norms(
    grads: list[Tensor], components: str, norm_type: float, inv_scale: Tensor | None, backend: str | None
) -> Tensor:
    return _measured(grads, components, norm_type, backend, LossScale.of(inv_scale, None))


# Apart, since inductor can't do without the one argument that an operator writes.
def _component_norms_and_inf(
    grads: list[Tensor],
    components: str,
    norm_type: float,
    inv_scale: Tensor | None,
    backend: str | None,
    found_inf: Tensor,
) -> Tensor:
    return _measured(grads, components, norm_type, backend, LossScale.of(inv_scale, found_inf))


def _measured(
    grads: list[Tensor], components: str, norm_type: float, backend: str | None, scale: LossScale
) -> Tensor:
    plan, found = plans_for(grads, components).measured(list(grads), grads, norm_type, backend)
    scale_here = scale.on(plan.device)
    norms = run.measure(plan, found, norm_type, scale_here)
    scale.deliver(scale_here)
    return norms


def _fake_component_norms(grads: list[Tensor], components: str, *_: object) -> Tensor:
    return grads[0].new_empty(len(read(components).names), dtype=norm_dtype_of(grads))


def component_coefficients(
    components: str,
    norms: Tensor,
    caps: Tensor | None,
    patterns: str,
    values: list[float],
    norm_type: float,
    eps: float,
    exempt: list[int],
    nonfinite: str,
) -> tuple[Tensor, Tensor]:
    """Coefficients and caps from norms that are known; an operator by itself where there is no gradient."""
    policy = policy_of(components, caps, patterns, values, eps, exempt)
    rule, names = ClipRule(norm_type, eps, nonfinite), read(components).names
    coefs, used = run.coefficients_of(norms, names, policy, rule, nonfinite == "error")
    return coefs, used.clone()  # an operator may not return what is kept


def _fake_component_coefficients(
    components: str, norms: Tensor, caps: Tensor | None, patterns: str, *others: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(norms), fake_caps(norms, caps, patterns)


def plans_for(grads: list[Tensor], components: str) -> Plans:
    """The plans of an operator's gradients, kept from call to call."""
    # The first gradient tells apart models whose parameters came without names, that is numbered alike.
    first = grads[0]
    return _plans(components, first.device, first.dtype, first.shape)


@lru_cache(maxsize=64)
def _plans(components: str, device: torch.device, dtype: torch.dtype, shape: torch.Size) -> Plans:
    return Plans(read(components))


@lru_cache(maxsize=64)
def _policy(components: str, patterns: str, values: tuple[float, ...]) -> StepCaps:
    """The caps that ``caps_for`` has split, where they aren't a tensor."""
    max_norm = dict(zip(literal_eval(patterns), values, strict=True)) if patterns else values[0]
    return fixed_caps(max_norm, read(components))


@lru_cache(maxsize=64)
def read(components: str) -> Components:
    """What ``in_words`` has written."""
    return Components(*literal_eval(components))


# Not in CUDA graphs that inductor captures: plans and caps stay on the device from call to call, and would lie in the
# memory of the graph that happened to be captured first.
_TAGS = torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe


def define(
    name: str, function: Callable[..., object], fake: Callable[..., object], mutated: Sequence[str] = ()
) -> None:
    """Makes a function an operator."""
    # Not by torch.library.custom_op, whose wrappers around a call take longer than the call itself.
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=mutated), tags=_TAGS)
    torch.library.impl(name, "default", function)
    torch.library.register_fake(name, fake)


define("cwclip_kernels::component_clip_", _component_clip_, _fake_component_clip_, ("grads", "found_inf"))
define("cwclip_kernels::component_norms", _component_norms, _fake_component_norms)
define("cwclip_kernels::component_norms_and_inf", _component_norms_and_inf, _fake_component_norms, ("found_inf",))
define("cwclip_kernels::component_coefficients", component_coefficients, _fake_component_coefficients)
