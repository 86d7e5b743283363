"""Under torch.compile: a whole call as one operator.

Caches, locks and kernels are nothing Dynamo can trace, and functionalization has to be told what is written. So
while a function is being traced, the public functions come here: the gradients that are there, and all that is static
about the call, go to one operator whose schema says that it writes those gradients. When the compiled function runs,
that operator goes the way of any other call, through plan and backends, to the same bits.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import execute
from .caps import Caps, MaxNorm, checked_cap
from .components import LEFT_ALONE, Components, type_name
from .formula import ClipRule
from .plan import Planner, check_gradient

# ------------------------------------------------------------------------------------------------------------
# What Dynamo traces
# ------------------------------------------------------------------------------------------------------------


def clip_(
    tensors: Sequence[Tensor],
    components: Components,
    max_norm: MaxNorm,
    rule: ClipRule,
    raise_nonfinite: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Clips the tensors' gradients in place, while being traced: norms before and coefficients, [K] each.

    A number or mapping as ``max_norm`` becomes part of the compiled function; a tensor is read whenever that runs.

    Raises:
        TypeError, ValueError: a cap or a gradient that isn't what it should be.
    """
    caps, patterns, values = _split(max_norm)
    grads, text = _present(tensors, components)
    if not grads:
        norms = _no_norms(tensors, components)
        return norms, torch.ones_like(norms)
    policy = "error" if raise_nonfinite else rule.nonfinite
    with torch.no_grad():
        norms, coefs = torch.ops.cwclip_kernels.component_clip_(
            grads, text, caps, patterns, values, rule.norm_type, rule.eps, policy, backend
        )
    return norms, coefs


def norms_of(tensors: Sequence[Tensor], components: Components, norm_type: float, backend: str | None) -> Tensor:
    """Norms [K] of the tensors' gradients, while being traced."""
    grads, text = _present(tensors, components)
    if not grads:
        return _no_norms(tensors, components)
    with torch.no_grad():
        norms: Tensor = torch.ops.cwclip_kernels.component_norms(grads, text, norm_type, backend)
    return norms


def _split(max_norm: MaxNorm) -> tuple[Tensor | None, list[str], list[float]]:
    """The cap as operators take it: a tensor, or one number for each pattern, or one number and no pattern."""
    if isinstance(max_norm, Tensor):
        return max_norm.detach(), [], []
    if not isinstance(max_norm, Mapping):
        return None, [], [checked_cap(max_norm, "max_norm")]
    for pattern in max_norm:
        if not isinstance(pattern, str):
            raise TypeError(f"max_norm: patterns are strings, not {type_name(pattern)}")
    return None, list(max_norm), [checked_cap(value, f"max_norm[{pattern!r}]") for pattern, value in max_norm.items()]


def _present(tensors: Sequence[Tensor], components: Components) -> tuple[list[Tensor], str]:
    """The gradients that count, and their components as text: Dynamo guards on which there are.

    Text, because an operator takes no objects, and 400 strings cost it three times what one long string does.
    """
    grads: list[Tensor] = []
    index: list[int] = []
    names: list[str] = []
    for tensor, component, name in zip(tensors, components.index, components.tensor_names, strict=True):
        grad = tensor.grad
        if grad is None or component == LEFT_ALONE:
            continue
        # Here, because the operator may get a copy, which shows no longer what is wrong with the original.
        check_gradient(grad, name)
        grads.append(grad)
        index.append(component)
        names.append(name)
    return grads, repr((components.names, tuple(index), tuple(names)))


def _no_norms(tensors: Sequence[Tensor], components: Components) -> Tensor:
    return torch.zeros(len(components.names), device=tensors[0].device if tensors else "cpu", dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------------
# The operators
# ------------------------------------------------------------------------------------------------------------


def _component_clip_(
    grads: list[Tensor],
    components: str,
    caps: Tensor | None,
    patterns: list[str],
    values: list[float],
    norm_type: float,
    eps: float,
    nonfinite: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    planner = _planner_for(grads, components)
    plan = planner.plan(grads, grads[0].device, norm_type, backend)
    if caps is None:
        checked = _fixed_caps(components, tuple(patterns), tuple(values))
    else:
        checked = Caps(caps, planner.components.names)
    return execute.clip_(plan, grads, checked, ClipRule(norm_type, eps, nonfinite), nonfinite == "error")


def _component_norms(grads: list[Tensor], components: str, norm_type: float, backend: str | None) -> Tensor:
    plan = _planner_for(grads, components).plan(grads, grads[0].device, norm_type, backend)
    return execute.norms_of(plan, grads, norm_type)


def _planner_for(grads: list[Tensor], components: str) -> Planner:
    # The first gradient tells apart models whose parameters came without names, that is numbered alike.
    first = grads[0]
    return _planner(components, first.device, first.dtype, first.shape)


@lru_cache(maxsize=64)
def _planner(components: str, device: torch.device, dtype: torch.dtype, shape: torch.Size) -> Planner:
    return Planner(_read(components))


@lru_cache(maxsize=64)
def _fixed_caps(components: str, patterns: tuple[str, ...], values: tuple[float, ...]) -> Caps:
    names = _read(components).names
    return Caps(dict(zip(patterns, values, strict=True)) if patterns or not values else values[0], names)


@lru_cache(maxsize=64)
def _read(components: str) -> Components:
    return Components(*literal_eval(components))


def _fake_component_clip_(
    grads: list[Tensor],
    components: str,
    caps: Tensor | None,
    patterns: list[str],
    values: list[float],
    norm_type: float,
    eps: float,
    nonfinite: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    norms = _fake_component_norms(grads, components, norm_type, backend)
    return norms, torch.empty_like(norms)


def _fake_component_norms(grads: list[Tensor], components: str, norm_type: float, backend: str | None) -> Tensor:
    wide = any(g.dtype in (torch.float64, torch.complex128) for g in grads)
    return grads[0].new_empty(len(_read(components).names), dtype=torch.float64 if wide else torch.float32)


# Not in CUDA graphs that inductor captures: plans and caps stay on the device from call to call, and would lie in the
# memory of the graph that happened to be captured first.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)

# Its registrations live as long as this does.
_library = torch.library.Library("cwclip_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]

for _signature, _operator, _fake in (
    (
        "component_clip_(Tensor(a!)[] grads, str components, Tensor? caps, str[] patterns, float[] values, "
        "float norm_type, float eps, str nonfinite, str? backend) -> (Tensor norms, Tensor coefs)",
        _component_clip_,
        _fake_component_clip_,
    ),
    (
        "component_norms(Tensor[] grads, str components, float norm_type, str? backend) -> Tensor",
        _component_norms,
        _fake_component_norms,
    ),
):
    _name = _library.define(_signature, tags=_TAGS)  # type: ignore[no-untyped-call]
    _library.impl(_name, _operator, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"cwclip_kernels::{_name}", _fake, lib=_library)
