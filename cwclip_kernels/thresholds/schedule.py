"""Caps that follow the step, or the sizes of components."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import checked_int, checked_number, type_name
from ..core.formula import wide_dtype
from ..core.modes import is_recorded
from .base import Setting, Threshold
from .constant import checked_cap


class Schedule(Threshold):
    """One cap for all components, from a function of the step.

    The function runs on the host, once a call: where several optimizers or clippers share a step, go to it by ``at``
    before each. A captured CUDA graph reads the cap that ``at`` has written instead.

    Args:
        fn: gets the step, counted from 0, and returns the cap, a number >= 0.

    Example:
        >>> from cwclip_kernels import ComponentClipper, thresholds
        >>> model = torch.nn.Linear(2, 1)
        >>> clipper = ComponentClipper(model, thresholds.Schedule(lambda step: 1.0 / (1 + step)))
        >>> [clipper.clip_().caps.item() for _ in range(3)]
        [1.0, 0.5, 0.3333333333333333]
    """

    adds_eps = True
    untraceable = (
        "a Schedule runs on the host at every step, which a compiled function can't; pass a tensor as max_norm and "
        "change it in place, or clip outside of the compiled function"
    )

    def __init__(self, fn: Callable[[int], float]) -> None:
        super().__init__()
        if not callable(fn):
            raise TypeError(f"fn: expected a function of the step, not {type_name(fn)}")
        self._fn = fn
        self._step = 0
        self._cap = math.nan

    def at(self, step: int) -> None:
        """Goes to a step; what captured graphs read is set to its cap."""
        self._step = checked_int(step, "step", 0)
        self._evaluate()

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        if not is_recorded():
            self._evaluate()
        if device not in self._on:
            self._on[device] = torch.full((), self._cap, dtype=wide_dtype(device), device=device)
        cap = self._on[device]  # which captured graphs read, and later steps overwrite
        return cap if is_recorded() else cap.clone()

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        if not is_recorded():
            self._step += 1

    def host_state(self) -> dict[str, int | float]:
        return {"step": self._step}

    def load_host_state(self, state: dict[str, int | float]) -> None:
        self._step = int(state["step"])

    def _evaluate(self) -> None:
        cap = checked_cap(self._fn(self._step), f"max_norm: fn({self._step})")
        if cap != self._cap:
            self._cap = cap
            for tensor in self._on.values():
                tensor.fill_(cap)


class RMS(Threshold):
    """Caps the root mean square of each component's gradient, so that large and small components are clipped alike.

        cap_c = max_rms * n_c^(1/p)     max_rms * sqrt(n_c) for p = 2

    with n_c the number of elements of the whole component, however many ranks hold it; what is frozen doesn't count.
    For p = inf it caps the largest element. ``eps`` is added to norms, as for a number. Gradients are clipped in one
    pass.

    Args:
        max_rms: t, the largest root mean square, a number >= 0.

    Example:
        >>> from cwclip_kernels import ComponentClipper, thresholds
        >>> model = torch.nn.Linear(8, 2)
        >>> ComponentClipper(model, thresholds.RMS(0.5)).clip_().caps
        tensor([2.0000, 0.7071], dtype=torch.float64)

    References:
        ``optax.clip_by_block_rms`` (google-deepmind/optax), which has no eps; each leaf is a block there, as each
        parameter is a component here.
    """

    adds_eps = True

    def __init__(self, max_rms: float) -> None:
        super().__init__()
        self._max_rms = checked_cap(max_rms, "max_rms")

    def bind(self, setting: Setting) -> None:
        if not setting.norm_type > 0:
            raise ValueError(f"max_norm: RMS needs norm_type > 0, not {setting.norm_type:g}")
        super().bind(setting)
        self._on.clear()

    def check_sizes(self, spanning: tuple[str, ...]) -> None:
        if spanning:
            raise ValueError(
                f"max_norm: RMS needs the size of each component, but several ranks of pp_mesh have parts of "
                f"{spanning[0]!r}; choose components that lie within one stage"
            )

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        if device not in self._on:
            setting = self.setting
            # A frozen component's own size, for when it is trained: in the backward pass nothing is bound again.
            sizes = zip(setting.numels, setting.sizes or setting.numels, strict=True)
            caps = [self._max_rms * _power(max(n or size, 1), 1 / setting.norm_type) for n, size in sizes]
            self._on[device] = torch.tensor(caps, dtype=wide_dtype(device), device="cpu").to(device)
        return self._on[device]


class FromGlobal(Threshold):
    """A budget for the norm of all components together, shared out so that they can't exceed it.

        "uniform"   cap_c = C / K^(1/p)             each component alike
        "numel"     cap_c = C * (n_c / n)^(1/p)     by its number of elements

    with K, n_c and n counted over trained parameters: what is frozen gets no share, and shares follow when
    parameters are frozen or unfrozen. The p-th powers of the caps add up to C^p (for p = inf each cap is C), so
    clipped gradients have a global norm of at most C, as ``clip_grad_norm_`` would leave them, without one
    component's outlier shrinking the others.

    Args:
        total: C, the budget, a number >= 0.
        split: "uniform" or "numel".

    Example:
        >>> from cwclip_kernels import ComponentClipper, thresholds
        >>> model = torch.nn.Linear(3, 1)
        >>> ComponentClipper(model, thresholds.FromGlobal(1.0, "numel")).clip_().caps
        tensor([0.8660, 0.5000], dtype=torch.float64)
    """

    adds_eps = True
    needs_all_components = True

    def __init__(self, total: float, split: str = "uniform") -> None:
        super().__init__()
        self._total = checked_number(total, "total")
        if split not in ("uniform", "numel"):
            raise ValueError(f"split: expected 'uniform' or 'numel', not {split!r}")
        self._split = split

    def bind(self, setting: Setting) -> None:
        if not setting.norm_type > 0:
            raise ValueError(f"max_norm: FromGlobal needs norm_type > 0, not {setting.norm_type:g}")
        super().bind(setting)
        self._on.clear()

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        if device not in self._on:
            setting = self.setting
            weights = [int(n > 0) for n in setting.numels] if self._split == "uniform" else setting.numels
            whole = max(1, sum(weights))
            caps = [self._total * ((weight / whole) ** (1 / setting.norm_type)) for weight in weights]
            self._on[device] = torch.tensor(caps, dtype=wide_dtype(device), device="cpu").to(device)
        return self._on[device]


def _power(base: float, exponent: float) -> float:
    try:
        return float(base**exponent)
    except OverflowError:  # an order near 0
        return math.inf
