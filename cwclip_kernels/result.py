"""What one clip found and did."""

from __future__ import annotations

from dataclasses import dataclass

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
