"""Who clips: torch's ways and ours, behind one small protocol.

``prepare`` does what a training script does once; what it returns is what the script does at every step, and
that call alone is timed, Python included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from cwclip_kernels import ComponentClipper, fused_component_clip_
from gradients import Cap

Named = Sequence[tuple[str, nn.Parameter]]
EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


@dataclass(frozen=True)
class Provider:
    """One way to clip.

    Attributes:
        key: short name, for ratios and figures.
        label: name in tables.
        prepare: (named parameters, cap) -> the call to time.
        componentwise: False for the global clip, which can't take a cap for each component.
    """

    key: str
    label: str
    prepare: Callable[[Named, Cap], Callable[[], object]]
    componentwise: bool = True


def _loop(named: Named, cap: Cap) -> Callable[[], object]:
    parameters = [p for _, p in named]
    caps = cap if isinstance(cap, list) else [cap] * len(parameters)

    def clip() -> None:
        for parameter, max_norm in zip(parameters, caps, strict=True):
            clip_grad_norm_(parameter, max_norm)

    return clip


def _foreach(named: Named, cap: Cap, through_host: bool) -> Callable[[], object]:
    parameters = [p for _, p in named]
    caps = torch.tensor(cap, dtype=parameters[0].dtype, device=parameters[0].device)

    @torch.no_grad()
    def clip() -> None:
        grads = [p.grad for p in parameters]
        norms = torch.stack(torch._foreach_norm(grads))
        coefs = torch.clamp(caps / (norms + EPS), max=1.0)
        torch._foreach_mul_(grads, coefs.tolist() if through_host else list(coefs.unbind()))

    return clip


def _global(named: Named, cap: Cap) -> Callable[[], object]:
    parameters = [p for _, p in named]
    return lambda: clip_grad_norm_(parameters, cap, foreach=True)


TORCH = (
    Provider("loop", "loop of clip_grad_norm_", _loop),
    Provider("foreach", "_foreach_norm + _foreach_mul_", lambda n, c: _foreach(n, c, through_host=False)),
    # On a GPU torch multiplies by 0-d tensors in one launch each, by Python numbers many tensors a launch:
    # whoever accepts a host sync may have a faster torch way, so it belongs in the comparison.
    Provider("tolist", "the same, coefs.tolist()", lambda n, c: _foreach(n, c, through_host=True)),
    Provider("global", "one global clip_grad_norm_", _global, componentwise=False),
)


def ours(backend: str | None) -> tuple[Provider, ...]:
    """The function and the clipper, on one backend; None for the best available."""

    def function(named: Named, cap: Cap) -> Callable[[], object]:
        parameters = [p for _, p in named]
        max_norm = _as_max_norm(named, cap)
        return lambda: fused_component_clip_(parameters, max_norm, backend=backend)

    def clipper(named: Named, cap: Cap) -> Callable[[], object]:
        return ComponentClipper(named, _as_max_norm(named, cap), backend=backend).clip_

    shown = backend or "best"
    return (
        Provider(f"function/{shown}", f"fused_component_clip_ ({shown})", function),
        Provider(f"clipper/{shown}", f"ComponentClipper ({shown})", clipper),
    )


def explain(named: Named, backend: str | None) -> str:
    """Which backend serves these gradients, and why, in the package's words.

    Raises:
        RuntimeError, ValueError: the named backend can't serve here, or doesn't exist; the message says why.
    """
    return ComponentClipper(named, 1.0, backend=backend).explain()


def _as_max_norm(named: Named, cap: Cap) -> float | Tensor:
    return torch.tensor(cap, device=named[0][1].device) if isinstance(cap, list) else cap
