"""Caps that follow the norms of parameters or gradients.

The clipper's ``eps`` isn't used, so that nothing here depends on the loss's scale but ``EMA``'s ``warmup_norm``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import check_type, check_word, checked_int, checked_number
from ..core.formula import total_norm
from ..core.modes import is_recorded, is_traced
from .base import Threshold, as_wide, observed
from .constant import checked_cap


class ParamRelative(Threshold):
    """Adaptive gradient clipping (AGC): a component's cap is a share of its parameters' own norm.

        cap_c = factor * max(||w_c||, eps)

    It reads the trained parameters at every step. For the paper's unit-wise form use
    ``components=ComponentSpec().unitwise("*")``; the paper doesn't clip the last layer.

    Args:
        factor: 0.01 in the authors' code.
        eps: lower bound of the norm, so that parameters that are zero can grow; 1e-3 in the authors' code.

    Example:
        >>> from cwclip_kernels import ComponentClipper, ComponentSpec, thresholds
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> clipper = ComponentClipper(model, thresholds.ParamRelative(), components=ComponentSpec().unitwise("*"))
        >>> clipper.clip_().caps
        tensor([5.0000e-02, 1.0000e-05], dtype=torch.float64)

    References:
        Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", 2021, arXiv 2102.06171,
        equation 3. The defaults are those of the authors' code, google-deepmind/deepmind-research, and of timm.
    """

    reads_parameters = True
    untraceable = "ParamRelative measures the parameters by itself; clip outside of the compiled function"

    def __init__(self, factor: float = 0.01, eps: float = 1e-3) -> None:
        super().__init__()
        self._factor = checked_number(factor, "factor")
        self._eps = checked_number(eps, "eps")

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        own = as_wide(self.setting.parameter_norms()).to(device)
        return own.clamp(min=self._eps) * self._factor


class EMA(Threshold):
    """AdaGC: each component's cap is a little above a running mean of its clipped norms.

        warm-up   h = min(1, warmup_norm / ||g||), the same for all;  gamma_c = min(gamma_c, h ||g_c||)
        after     cap_c = ratio * gamma_c;  gamma_c = decay * gamma_c + (1 - decay) * ||clipped g_c||

    ||g|| is the norm of all components whose norm is finite. Gradients are clipped in two passes in the warm-up, in
    one after it. A component that first has a gradient after the warm-up starts from that gradient's norm. A step is
    a call: if several optimizers each clip what they own, each call counts.

    Args:
        ratio: lambda_rel; 1.05 in ports of the algorithm, 1.04 in the authors' Megatron patch.
        decay: beta; 0.98 in ports, 0.99 in the authors' patch.
        warmup_steps: 100 in the authors' patch.
        warmup_norm: lambda_abs, the global cap of the warm-up; 1.0 in the authors' patch, inf for no clipping then.

    Example:
        >>> from cwclip_kernels import ComponentClipper, thresholds
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> clipper = ComponentClipper([w], thresholds.EMA(warmup_steps=1, warmup_norm=4.0))
        >>> for grad in (8.0, 2.0, 8.0):
        ...     w.grad = torch.tensor([grad])
        ...     print(round(clipper.clip_().caps.item(), 3), round(w.grad.item(), 3))
        4.0 4.0
        4.2 2.0
        4.158 4.158

    References:
        Wang et al., "AdaGC: Improving Training Stability for Large Language Model Pretraining", 2025, arXiv
        2502.11034, algorithm 1. The authors' patch: github.com/lishuai-97/AdaGC, megatron-gpt2.patch, whose cap of 0
        for components without gradient in the warm-up is left out. A port: github.com/kozistr/pytorch_optimizer.
    """

    needs_all_components = True
    reads_numels = False

    def __init__(
        self, ratio: float = 1.05, decay: float = 0.98, warmup_steps: int = 100, warmup_norm: float = 1.0
    ) -> None:
        super().__init__()
        self._ratio = checked_number(ratio, "ratio", above_low=True)
        self._decay = checked_number(decay, "decay", high=1.0)
        self._warmup_steps = checked_int(warmup_steps, "warmup_steps", 0)
        self._warmup_norm = checked_number(warmup_norm, "warmup_norm", above_low=True, finite=False)
        # On the host, for needs_norms. It lags behind where compiled functions and CUDA graphs count on the device.
        self._steps = 0

    @property
    def needs_norms(self) -> bool:
        return is_traced() or self._steps < self._warmup_steps

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        gamma, steps = self.allocate(device)
        later = gamma * self._ratio  # inf before the first norm
        if norms is None:
            return later
        order, wide, is_known = self.setting.norm_type, as_wide(norms), observed(norms)
        known = torch.where(is_known, wide, 0.0)
        share = self._warmup_norm / total_norm(known, order)
        first = torch.where(share < 1.0, share * wide, math.inf)
        return torch.where(steps < self._warmup_steps, torch.where(is_known, first, self._warmup_norm), later)

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        gamma, steps = self.allocate(norms.device)
        clipped = as_wide(norms) * as_wide(coefs)
        smaller = torch.minimum(gamma, clipped)
        mean = torch.where(gamma == math.inf, clipped, self._decay * gamma + (1 - self._decay) * clipped)
        new = torch.where(steps < self._warmup_steps, smaller, mean)
        gamma.copy_(torch.where(observed(norms), new, gamma))
        steps.add_(1.0)
        if not is_recorded():
            self._steps += 1

    def host_state(self) -> dict[str, int | float]:
        return {"steps": self._steps}

    def load_host_state(self, state: dict[str, int | float]) -> None:
        self._steps = int(state["steps"])

    def allocate(self, device: torch.device) -> tuple[Tensor, Tensor]:
        gamma = self.state("gamma", device, len(self.setting.names), fill=math.inf)
        # [1], because torch.compile (2.13) loses what is written to a float64 tensor of shape [] on the CPU.
        return gamma, self.state("steps", device, 1)


class ZScore(Threshold):
    """ZClip: a norm far above its running mean is clipped, and the farther, the harder.

        z = (||g_c|| - mu_c) / (sigma_c + 1e-6 mu_c);  if z > threshold: cap_c = mu_c + threshold^2 / z * sigma_c
        mu_c = decay * mu_c + (1 - decay) * n;  sigma_c^2 = decay * sigma_c^2 + (1 - decay) * (n - mu_c)^2

    with n = min(||g_c||, cap_c), and the new mu_c in the last term. A component isn't clipped in its first
    ``warmup_steps`` steps; mu_c and sigma_c^2 start as the mean and variance of these norms. The authors' code has
    1e-6 in place of 1e-6 mu_c. Gradients are clipped in two passes, in one under ``mode="percentile"``.

    The other arguments are those of the authors' code, except for ``clip_option="skip"``. As there, ``max_grad_norm``
    has no part in mu_c and sigma_c: n is the norm before, clipped to the adaptive cap alone.

    Args:
        decay: alpha; 0.97 in the paper and in the authors' code.
        threshold: z_thresh; 2.5 in both.
        warmup_steps: 25 in the authors' code.
        max_grad_norm: a ceiling of all caps, in force in the warm-up too; 1.0 in the authors' code. None for none.
        mode: "zscore", the rule above; or "percentile": cap_c = mu_c + threshold * sigma_c at every step, which is
            no percentile, but is called so in the authors' code.
        clip_option: the cap of a spike, that is where z > threshold. "adaptive_scaling": the one above. "mean":
            mu_c. "skip": 0, so that this step gets nothing from the component's gradient (caps and coefs of the
            result are 0 there; the optimizer's momentum and weight decay go on). mu_c and sigma_c learn the largest
            norm that is no spike, so that norms that stay high aren't skipped for ever. Under "percentile" a spike
            is a norm above the cap, "adaptive_scaling" changes nothing, and "mean" can't be given.
        clip_factor: times the whole cap of "adaptive_scaling" in mode "zscore"; 0.5 to 0.9 clip harder.
        skip_update_on_spike: mu_c and sigma_c learn nothing from a spike. The gradient is clipped all the same.

    Example:
        >>> from cwclip_kernels import ComponentClipper, thresholds
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> clipper = ComponentClipper([w], thresholds.ZScore(warmup_steps=2))
        >>> for grad in (1.0, 3.0, 12.0):
        ...     w.grad = torch.tensor([grad])
        ...     print(round(clipper.clip_().caps.item(), 3))
        inf
        inf
        2.625

    References:
        Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025, arXiv 2504.02507: reciprocal
        clipping. The authors' code, github.com/bluorion-com/ZClip (zclip 1.0.0), clips one global norm.
    """

    def __init__(
        self,
        decay: float = 0.97,
        threshold: float = 2.5,
        warmup_steps: int = 25,
        *,
        max_grad_norm: float | None = None,
        mode: str = "zscore",
        clip_option: str = "adaptive_scaling",
        clip_factor: float = 1.0,
        skip_update_on_spike: bool = False,
    ) -> None:
        super().__init__()
        self._decay = checked_number(decay, "decay", high=1.0)
        self._threshold = checked_number(threshold, "threshold", above_low=True)
        self._warmup_steps = checked_int(warmup_steps, "warmup_steps", 1)
        self._ceiling = math.inf if max_grad_norm is None else checked_cap(max_grad_norm, "max_grad_norm")
        self._by_z = check_word(mode, "mode", "zscore", "percentile") == "zscore"
        self._option = check_word(clip_option, "clip_option", "adaptive_scaling", "mean", "skip")
        self._factor = checked_number(clip_factor, "clip_factor", above_low=True)
        check_type(skip_update_on_spike, "skip_update_on_spike", bool, "a bool")
        self._learns_spikes = not skip_update_on_spike
        if not self._by_z and clip_option == "mean":
            raise ValueError(
                "clip_option: 'mean' is for mode='zscore'; under 'percentile' the cap is set by threshold"
            )
        if self._factor != 1.0 and not (self._by_z and clip_option == "adaptive_scaling"):
            raise ValueError("clip_factor: is for mode='zscore' with clip_option='adaptive_scaling'")

    @property
    def needs_norms(self) -> bool:
        return self._by_z or self._option == "skip"

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        mean, variance, seen = self.allocate(device)
        if norms is None:  # where it makes no difference whether a norm is above the cap
            caps = torch.where(seen >= self._warmup_steps, mean + self._threshold * variance.sqrt(), math.inf)
        else:
            is_spike, spike_cap = self._spikes(norms, mean, variance, seen)
            if self._option == "skip":
                spike_cap = torch.zeros_like(mean)
            caps = torch.where(is_spike, spike_cap, math.inf)
        return caps if self._ceiling == math.inf else caps.clamp(max=self._ceiling)

    def _spikes(self, norms: Tensor, mean: Tensor, variance: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Where norms are spikes, and what is learnt from these, which they are clipped to if they aren't skipped."""
        wide, deviation = as_wide(norms), variance.sqrt()
        if self._by_z:
            z = (wide - mean) / (deviation + 1e-6 * mean)
            is_spike = z > self._threshold
            # A norm of inf or NaN counts as infinitely far above the mean.
            cap = (mean + torch.where(z.isfinite(), self._threshold**2 / z, 0.0) * deviation) * self._factor
            if self._option == "mean":
                cap = mean
        else:
            cap = mean + self._threshold * deviation
            is_spike = wide > cap
        if self._option == "skip":
            cap = mean + self._threshold * (deviation + 1e-6 * mean)
        return (is_spike | ~norms.isfinite()) & (seen >= self._warmup_steps), cap

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        mean, variance, seen = self.allocate(norms.device)
        is_spike, cap = self._spikes(norms, mean, variance, seen)
        # Not by ``coefs``, which a ceiling or a skipped spike has made smaller.
        wide = as_wide(norms)
        clipped = torch.where(is_spike, torch.minimum(cap, wide), wide)
        # In the warm-up the mean of all norms and of their squared distances from it (Welford's method).
        count = seen + 1.0
        first_mean = mean + (clipped - mean) / count
        first_variance = variance + ((clipped - mean) * (clipped - first_mean) - variance) / count
        later_mean = self._decay * mean + (1 - self._decay) * clipped
        later_variance = self._decay * variance + (1 - self._decay) * (clipped - later_mean) ** 2
        is_known, is_warm = observed(norms), seen >= self._warmup_steps
        if not self._learns_spikes:
            is_known = is_known & ~is_spike
        mean.copy_(torch.where(is_known, torch.where(is_warm, later_mean, first_mean), mean))
        variance.copy_(torch.where(is_known, torch.where(is_warm, later_variance, first_variance), variance))
        seen.copy_(torch.where(is_known, count, seen))

    def allocate(self, device: torch.device) -> list[Tensor]:
        return [self.state(name, device, len(self.setting.names)) for name in ("mean", "variance", "seen")]


class Percentile(Threshold):
    """AutoClip: a component's cap is a percentile of all its norms so far, this step's included, before clipping.

        cap_c = percentile({||g_c|| of step 1, ..., ||g_c|| of this step}, p)

    Interpolated linearly, as ``numpy.percentile``. The last ``window`` norms are kept on the device ([window, K]
    float64; the authors' code keeps all). Gradients are clipped in two passes.

    Args:
        percentile: 10 in the authors' TensorFlow example; their PyTorch code has no default.
        window: how many norms of each component are kept.

    Example:
        >>> from cwclip_kernels import ComponentClipper, thresholds
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> clipper = ComponentClipper([w], thresholds.Percentile(50.0))
        >>> for grad in (1.0, 3.0, 8.0):
        ...     w.grad = torch.tensor([grad])
        ...     print(clipper.clip_().caps.item())
        1.0
        2.0
        3.0

    References:
        Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation Networks", 2020, arXiv
        2007.14469; github.com/pseeth/autoclip.
    """

    needs_norms = True

    def __init__(self, percentile: float = 10.0, window: int = 1000) -> None:
        super().__init__()
        self._percentile = checked_number(percentile, "percentile", high=100.0)
        self._window = checked_int(window, "window", 1)

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        assert norms is not None
        history, count = self._with(norms, device)
        ordered = history.sort(0).values  # rows that aren't filled yet hold inf, and come last
        rank = (count.clamp(max=self._window) - 1.0).clamp(min=0.0) * (self._percentile / 100.0)
        below = rank.floor()
        lower = ordered.gather(0, below.long().unsqueeze(0)).squeeze(0)
        upper = ordered.gather(0, rank.ceil().long().unsqueeze(0)).squeeze(0)
        weight = rank - below
        return torch.where(weight == 0.0, lower, lower + weight * (upper - lower))

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        new = self._with(norms, norms.device)
        for tensor, value in zip(self.allocate(norms.device), new, strict=True):
            tensor.copy_(value)

    def _with(self, norms: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """History and counts with this step's norms, where these tell something."""
        history, seen = self.allocate(device)
        is_known = observed(norms)
        row = (seen % self._window).long().unsqueeze(0)
        new = torch.where(is_known, as_wide(norms), history.gather(0, row).squeeze(0))
        return history.scatter(0, row, new.unsqueeze(0)), seen + is_known

    def allocate(self, device: torch.device) -> tuple[Tensor, Tensor]:
        count = len(self.setting.names)
        return self.state("history", device, self._window, count, fill=math.inf), self.state("seen", device, count)
