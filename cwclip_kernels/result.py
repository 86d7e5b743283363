"""What one clip found and did, and the statistics of many that trainers log."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClipResult:
    """What one clip found and did. Tensors stay on their device; nothing syncs until you look.

    Attributes:
        names: the K component names.
        norms: [K], float32 (float64 if any gradient is), norms before clipping.
        coefs: [K], same dtype, what each component was multiplied by; 1 means its bits are untouched (but for the
            loss's scale, where that was taken out too).
        caps: [] or [K], float64, the caps of this step.
    """

    names: tuple[str, ...]
    norms: Tensor
    coefs: Tensor
    caps: Tensor

    @property
    def clipped(self) -> Tensor:
        """[K] bool: where the coefficient is not 1."""
        return self.coefs != 1

    def as_dict(self) -> dict[str, tuple[float, float]]:
        """{name: (norm, coefficient)} as Python floats; syncs with the device."""
        return dict(zip(self.names, zip(self.norms.tolist(), self.coefs.tolist(), strict=True), strict=True))


class ClipStatistics:
    """Statistics of the clips in a logging window. They stay on their device; nothing syncs until you look.

    The clip rate is a ratio of sums: the components clipped, counted over all steps of the window, divided by the
    components with a gradient, counted likewise. It isn't the mean of the steps' rates.

    Example:
        >>> import torch
        >>> from cwclip_kernels import ClipResult
        >>> from cwclip_kernels.result import ClipStatistics
        >>> statistics, cap = ClipStatistics(), torch.tensor(1.0)
        >>> statistics.add(ClipResult(("a", "b"), torch.tensor([4.0, 0.5]), torch.tensor([0.25, 1.0]), cap))
        >>> statistics.add(ClipResult(("a", "b"), torch.tensor([2.0, 0.0]), torch.tensor([0.5, 1.0]), cap))
        >>> statistics.clip_rate, statistics.clip_rates
        (tensor(0.6667), tensor([1., 0.]))
    """

    def __init__(self) -> None:
        self._latest: dict[object, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Begins a new window."""
        self._counts: Tensor | None = None  # [3, K]: clipped, with a gradient, non-finite
        self._largest: Tensor | None = None  # [2, K]: finite norm, and that over its cap

    @torch.no_grad()
    def add(self, result: ClipResult, source: object = None) -> None:
        """Adds a step's result, without a host sync.

        Args:
            result: with norm 0 for components that another source clips.
            source: tells apart several that clip some of the components each, such as an optimizer's id.
        """
        norms = result.norms
        finite, has_gradient = norms.nan_to_num(0.0, 0.0, 0.0), norms != 0
        counts = torch.stack([result.clipped & has_gradient, has_gradient, finite != norms])
        ratios = (finite / result.caps.to(norms.dtype)).nan_to_num_(0.0, torch.inf)  # 0 / 0: no gradient, no cap
        largest = torch.stack([finite, ratios])
        if self._counts is None or self._largest is None:
            self._counts, self._largest = counts.long(), largest
        else:
            self._counts, self._largest = self._counts + counts, torch.maximum(self._largest, largest)
        self._latest.pop(source, None)  # so that the order is that of the last steps
        self._latest[source] = norms

    @property
    def norms(self) -> Tensor:
        """[K] norms before clipping, of each source's last step, in this window or before."""
        first, *later = self._latest.values()
        for norms in later:
            first = torch.where(norms != 0, norms, first)
        return first

    @property
    def clip_rates(self) -> Tensor:
        """[K] share of the steps with a gradient in which each component was clipped."""
        return _ratio(*self._counted()[:2])

    @property
    def clip_rate(self) -> Tensor:
        """[] share of the components with a gradient that were clipped, over all steps of the window."""
        return _ratio(*self._counted()[:2].sum(1))

    @property
    def nonfinite(self) -> Tensor:
        """[] how many norms were inf or NaN, over all steps of the window."""
        return self._counted()[2].sum()

    def as_dict(self) -> dict[str, float]:
        """The window as Python floats, {} if it is empty; syncs with the device.

        ``clip_rate``; ``clip_ratio_max``: largest finite norm over its cap, above 1 where something was clipped;
        ``component_norm_max``: largest finite norm; ``component_norm_nonfinite``: how many norms were inf or NaN.
        """
        if self._counts is None or self._largest is None or not self._counts.numel():
            return {}
        largest = self._largest.amax(1)
        numbers = torch.stack([self.clip_rate.to(largest.dtype), *largest, self.nonfinite]).tolist()
        names = "clip_rate", "component_norm_max", "clip_ratio_max", "component_norm_nonfinite"
        return dict(zip(names, numbers, strict=True))

    def _counted(self) -> Tensor:
        if self._counts is None:
            raise RuntimeError("no clip has been added to these statistics")
        return self._counts


def _ratio(clipped: Tensor, has_gradient: Tensor) -> Tensor:
    return clipped / has_gradient.clamp(min=1)
