"""Caps that follow the norms of parameters or gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import checked_int, checked_number
from ..core.formula import root
from ..core.modes import is_recorded, is_traced
from .base import Threshold, as_wide, observed


class ParamRelative(Threshold):
    """Adaptive gradient clipping (AGC): a component's cap is a share of its parameters' own norm.

        cap_c = factor * max(||w_c||, eps)

    Unit-wise, as in the paper, with ``components=ComponentSpec().unitwise("*")``; per tensor without. It reads the
    trained parameters at every step, as many bytes as the gradients have, and no frozen ones. The paper leaves the
    last layer out.

    Args:
        factor: 0.01 in the authors' code.
        eps: what a norm counts at least, so that parameters that are zero can grow; 1e-3 there.

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

    ||g|| is the norm of all components whose norm is finite. In the warm-up gradients are clipped in two passes,
    after it in one. A component that first has a gradient after the warm-up starts from that gradient's norm. Steps
    are calls: where several optimizers clip what they own, each of them counts.

    A norm is clipped if it is above its cap, to the cap, and what is learnt is min(||g_c||, cap_c): the clipper's
    ``eps`` has no part in it. So nothing depends on the loss's scale but the warm-up's clipping, as ``warmup_norm``
    is a norm; with ``warmup_norm=math.inf`` nothing does.

    Args:
        ratio: lambda_rel. 1.05 as in ports of the algorithm; the authors' Megatron patch has 1.04.
        decay: beta. 0.98 likewise; 0.99 in the authors' patch.
        warmup_steps: 100 in the authors' patch.
        warmup_norm: lambda_abs, the global cap of the warm-up, 1.0 in the authors' patch; inf clips nothing then.

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
        2502.11034, algorithm 1. The authors' patch: github.com/lishuai-97/AdaGC, megatron-gpt2.patch; there a
        component without gradient in the warm-up keeps a cap of 0, here it is left out. Ports with 1.05 and 0.98:
        github.com/kozistr/pytorch_optimizer.
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
        # On the host, to know without asking the device. Steps of compiled functions and graphs are counted on the
        # device alone: this may lag behind, and then the device decides.
        self._steps = 0

    @property
    def needs_norms(self) -> bool:
        return is_traced() or self._steps < self._warmup_steps

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        gamma, steps = self._gamma(device), self._counter(device)
        later = gamma * self._ratio  # inf while there is none
        if norms is None:
            return later
        order = self.setting.norm_type
        wide = as_wide(norms)
        known = torch.where(observed(norms), wide, 0.0)
        together = known.amax() if order == math.inf else root((known**order).sum(), order)
        share = self._warmup_norm / together
        first = torch.where(share < 1.0, share * wide, math.inf)
        first = torch.where(observed(norms), first, self._warmup_norm)
        return torch.where(steps < self._warmup_steps, first, later)

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        gamma, steps = self._gamma(norms.device), self._counter(norms.device)
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

    def allocate(self, device: torch.device) -> None:
        self._gamma(device)
        self._counter(device)

    def _gamma(self, device: torch.device) -> Tensor:
        return self.state("gamma", device, len(self.setting.names), fill=math.inf)

    def _counter(self, device: torch.device) -> Tensor:
        # [1], because torch.compile (2.13) loses what is written to a float64 tensor of shape [] on the CPU.
        return self.state("steps", device, 1)


class ZScore(Threshold):
    """ZClip: a norm that lies far above its running mean is clipped, the harder the farther it lies.

        z = (||g_c|| - mu_c) / (sigma_c + 1e-6 mu_c);  if z > threshold: cap_c = mu_c + threshold^2 / z * sigma_c
        mu_c = decay * mu_c + (1 - decay) * n;  sigma_c^2 = decay * sigma_c^2 + (1 - decay) * (n - mu_c)^2

    with n = min(||g_c||, cap_c) and, in the second line, the new mu_c. In its first ``warmup_steps`` steps a
    component isn't clipped; mu_c and sigma_c^2 begin as the mean and variance of those norms. Gradients are clipped
    in two passes. Nothing depends on the loss's scale, and the clipper's ``eps`` has no part in it: the 1e-6 is
    relative to the mean, where the authors' code adds 1e-6 as it is.

    Args:
        decay: alpha, 0.97 in the paper and in the authors' code.
        threshold: z_thresh, 2.5 likewise.
        warmup_steps: 25 in the authors' code.

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
        clipping. The authors' code, github.com/bluorion-com/ZClip (zclip 1.0.0), clips one norm for all, and also to
        ``max_grad_norm`` = 1.0 at every step, those of the warm-up included; here there is no such ceiling.
    """

    _EPS = 1e-6

    def __init__(self, decay: float = 0.97, threshold: float = 2.5, warmup_steps: int = 25) -> None:
        super().__init__()
        self._decay = checked_number(decay, "decay", high=1.0)
        self._threshold = checked_number(threshold, "threshold", above_low=True)
        self._warmup_steps = checked_int(warmup_steps, "warmup_steps", 1)

    @property
    def needs_norms(self) -> bool:
        return True

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        assert norms is not None
        mean, variance, seen = self._statistics(device)
        deviation = variance.sqrt()
        z = (as_wide(norms) - mean) / (deviation + self._EPS * mean)
        is_outlier = (z > self._threshold) & (seen >= self._warmup_steps)
        # A norm of inf, or NaN, lies infinitely far above.
        capped = mean + torch.where(z.isfinite(), self._threshold**2 / z, 0.0) * deviation
        is_outlier |= ~norms.isfinite() & (seen >= self._warmup_steps)
        return torch.where(is_outlier, capped, math.inf)

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        mean, variance, seen = self._statistics(norms.device)
        clipped = as_wide(norms) * as_wide(coefs)
        is_warm = seen >= self._warmup_steps
        # Of the warm-up: running mean, and mean of squared distances from it (Welford's method).
        count = seen + 1.0
        first_mean = mean + (clipped - mean) / count
        first_variance = variance + ((clipped - mean) * (clipped - first_mean) - variance) / count
        later_mean = self._decay * mean + (1 - self._decay) * clipped
        later_variance = self._decay * variance + (1 - self._decay) * (clipped - later_mean) ** 2
        tells = observed(norms)
        mean.copy_(torch.where(tells, torch.where(is_warm, later_mean, first_mean), mean))
        variance.copy_(torch.where(tells, torch.where(is_warm, later_variance, first_variance), variance))
        seen.copy_(torch.where(tells, count, seen))

    def allocate(self, device: torch.device) -> None:
        self._statistics(device)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        count = len(self.setting.names)
        return (
            self.state("mean", device, count),
            self.state("variance", device, count),
            self.state("seen", device, count),
        )


class Percentile(Threshold):
    """AutoClip: a component's cap is a percentile of all its norms so far, this step's included, before clipping.

        cap_c = percentile({||g_c|| of step 1, ..., ||g_c|| of this step}, p)

    Linear interpolation between neighbours, as ``numpy.percentile``. The history is a ring of ``window`` steps on the
    device ([window, K] float64; the source keeps all of them). Gradients are clipped in two passes.

    Nothing depends on the loss's scale, and the clipper's ``eps`` has no part in it.

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

    def __init__(self, percentile: float = 10.0, window: int = 1000) -> None:
        super().__init__()
        self._percentile = checked_number(percentile, "percentile", high=100.0)
        self._window = checked_int(window, "window", 1)

    @property
    def needs_norms(self) -> bool:
        return True

    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        assert norms is not None
        history, seen = self._ring(device)
        with_this, count = self._with(history, seen, norms)
        ordered = with_this.sort(0).values  # what isn't filled yet is inf, and comes last
        kept = count.clamp(max=self._window)
        rank = (kept - 1.0).clamp(min=0.0) * (self._percentile / 100.0)
        below = rank.floor()
        lower = ordered.gather(0, below.long().unsqueeze(0)).squeeze(0)
        upper = ordered.gather(0, rank.ceil().long().unsqueeze(0)).squeeze(0)
        weight = rank - below
        return torch.where(weight == 0.0, lower, lower + weight * (upper - lower))

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        history, seen = self._ring(norms.device)
        with_this, count = self._with(history, seen, norms)
        history.copy_(with_this)
        seen.copy_(count)

    def _with(self, history: Tensor, seen: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """History and counts with this step's norms, where these tell something."""
        tells = observed(norms)
        place = (seen % self._window).long().unsqueeze(0)
        old = history.gather(0, place).squeeze(0)
        new = torch.where(tells, as_wide(norms), old)
        return history.scatter(0, place, new.unsqueeze(0)), seen + tells

    def allocate(self, device: torch.device) -> None:
        self._ring(device)

    def _ring(self, device: torch.device) -> tuple[Tensor, Tensor]:
        count = len(self.setting.names)
        return self.state("history", device, self._window, count, fill=math.inf), self.state("seen", device, count)
