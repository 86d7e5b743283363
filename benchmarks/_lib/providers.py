"""The methods that are compared: torch's and ours.

``prepare`` does what a training script does once, and returns what it does at every step: that call alone is timed,
Python included.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from cwclip_kernels import ComponentClipper, fused_component_clip_

from .gradients import Cap

Named = Sequence[tuple[str, nn.Parameter]]
EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s

# Settings after a backend's name, and the variables that the library reads at each call (csrc/cuda/launch.cu): those
# with a number, and words that stand for a value.
SETTINGS = {"form": "CWCLIP_CUDA_FORM", "blocks": "CWCLIP_CUDA_BLOCKS_PER_SM"}
WORDS = {"hints": ("CWCLIP_CUDA_EVICT_HINTS", "1"), "nopdl": ("CWCLIP_CUDA_PDL", "0")}
VARIABLES = (*SETTINGS.values(), *(variable for variable, _ in WORDS.values()))
_AS_STARTED = {variable: os.environ.get(variable) for variable in VARIABLES}


@dataclass(frozen=True)
class Provider:
    """One way to clip.

    Attributes:
        key: short name, for ratios and figures.
        label: name in tables.
        prepare: (named parameters, cap) -> the call to time.
        componentwise: False for the global clip, which can't take a cap for each component.
        environment: environment variables while it runs; see ``set_environment``.
    """

    key: str
    label: str
    prepare: Callable[[Named, Cap], Callable[[], object]]
    componentwise: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


def set_environment(wanted: Mapping[str, str]) -> None:
    """Gives the library's variables the values of one provider; those it leaves out are as the script found them."""
    for variable, found in _AS_STARTED.items():
        value = wanted.get(variable, found)
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = value


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
    # On a GPU torch multiplies by 0-d tensors in one launch each, by Python numbers in one launch for many tensors.
    # This may be faster for those who accept a host sync, so it belongs in the comparison.
    Provider("tolist", "the same, coefs.tolist()", lambda n, c: _foreach(n, c, through_host=True)),
    Provider("global", "one global clip_grad_norm_", _global, componentwise=False),
)


def ours(spec: str = "best", calls: Sequence[str] = ("function", "clipper")) -> tuple[Provider, ...]:
    """The function and the clipper, on one backend.

    Args:
        spec: a backend's name, or "best" for what the package takes by itself; settings may follow, as in
            "cuda:form2", "cuda:form1:blocks2" or "cuda:form2:hints".
        calls: which of the two.

    Raises:
        ValueError: a setting that doesn't exist.
    """
    backend, environment = _parsed(spec)

    def function(named: Named, cap: Cap) -> Callable[[], object]:
        parameters = [p for _, p in named]
        max_norm = _as_max_norm(named, cap)
        return lambda: fused_component_clip_(parameters, max_norm, backend=backend)

    def clipper(named: Named, cap: Cap) -> Callable[[], object]:
        return ComponentClipper(named, _as_max_norm(named, cap), backend=backend).clip_

    known = (
        ("function", "fused_component_clip_", function),
        ("clipper", "ComponentClipper", clipper),
    )
    return tuple(
        Provider(f"{call}/{spec}", f"{label} ({spec})", prepare, environment=environment)
        for call, label, prepare in known
        if call in calls
    )


def explain(named: Named, spec: str) -> str:
    """Which backend serves these gradients, and why, in the package's words.

    Raises:
        RuntimeError, ValueError: the named backend can't serve here, or doesn't exist; the message says why.
    """
    return ComponentClipper(named, 1.0, backend=_parsed(spec)[0]).explain()


def _parsed(spec: str) -> tuple[str | None, dict[str, str]]:
    """Backend and environment that a spec stands for."""
    backend, *settings = spec.split(":")
    environment = {}
    for setting in settings:
        match = re.fullmatch(r"([a-z]+)(\d+)", setting)
        if setting in WORDS:
            variable, value = WORDS[setting]
            environment[variable] = value
        elif match is not None and match[1] in SETTINGS:
            environment[SETTINGS[match[1]]] = match[2]
        else:
            known = f"{', '.join(SETTINGS)} with a number, as in form2, or {', '.join(WORDS)}"
            raise ValueError(f"{spec!r}: {setting!r} is none of {known}")
    return (None if backend == "best" else backend), environment


def _as_max_norm(named: Named, cap: Cap) -> float | Tensor:
    return torch.tensor(cap, device=named[0][1].device) if isinstance(cap, list) else cap
