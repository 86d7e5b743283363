"""Gradients to clip: parameters that weigh nothing, several sets in turn, caps that clip what a case says."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from shapes import ShapeSet

CASES = ("none", "half", "all")
Cap = float | list[float]


class Gradients:
    """Parameters of a shape set, with ``rotate`` sets of equal gradients at different places in memory.

    The parameters are one element each, expanded to their shape: clipping looks at gradients only, and memory
    for the parameters themselves would be wasted.

    Args:
        shape_set: names and shapes.
        dtype: of the gradients.
        device: where they live.
        rotate: how many sets take turns.
        seed: of the random values; the same seed gives the same gradients.
        restorable: keep the pristine copy that ``restore`` needs. Without, only "none" can be measured.

    Attributes:
        named: (name, parameter) of the whole set; the parameters' ``.grad`` is the set chosen last.
        norms: each gradient's norm, as Python floats.
    """

    def __init__(
        self,
        shape_set: ShapeSet,
        dtype: torch.dtype,
        device: torch.device,
        rotate: int = 1,
        seed: int = 0,
        restorable: bool = True,
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        # A scale of its own for each, so that equal shapes have different norms; at most 1, so that even the
        # norm of a large model fits float16.
        first = [
            torch.randn(shape, dtype=dtype, device=device, generator=generator)
            * (0.25 + 0.75 * float(torch.rand((), device=device, generator=generator)))
            for _, shape in shape_set.shapes
        ]
        self.named = [
            (name, nn.Parameter(torch.empty((), dtype=dtype, device=device).expand(shape)))
            for name, shape in shape_set.shapes
        ]
        self.norms = [float(torch.linalg.vector_norm(g, dtype=torch.float32)) for g in first]
        self._sets = [first, *([g.clone() for g in first] for _ in range(rotate - 1))]
        self._pristine = [g.clone() for g in first] if restorable else None
        self.use(0)

    @property
    def current(self) -> list[Tensor]:
        """The gradients that the parameters have now."""
        return self._current

    def use(self, turn: int) -> None:
        """Makes set ``turn`` modulo the number of sets the parameters' gradients."""
        self._current = self._sets[turn % len(self._sets)]
        for (_, parameter), grad in zip(self.named, self._current, strict=True):
            parameter.grad = grad

    def restore(self) -> None:
        """Undoes what clipping did to the current set."""
        if self._pristine is None:
            raise ValueError("these gradients were made with restorable=False: they can't be clipped")
        for grad, pristine in zip(self._current, self._pristine, strict=True):
            grad.copy_(pristine)

    def clips(self, case: str) -> list[bool]:
        """Which components ``case`` clips: none, every other one, or all."""
        return [case == "all" or (case == "half" and i % 2 == 0) for i in range(len(self.norms))]

    def cap(self, case: str) -> Cap:
        """A cap that clips what ``case`` says: one number for none and all, as in use; a list for half.

        It is a factor of two away from every norm, so that no rounding of a norm changes who is clipped.
        """
        if case == "none":  # above the norm of everything together, so that a global clip leaves it alone too
            return 2.0 * math.hypot(*self.norms)
        if case == "all":
            return 0.5 * min(self.norms)
        return [
            norm * (0.5 if clipped else 2.0) for norm, clipped in zip(self.norms, self.clips("half"), strict=True)
        ]

    def clipped_share(self, case: str) -> float:
        """Share of the bytes, 0 to 1, that belong to clipped components."""
        sizes = [g.numel() for g in self._current]
        return sum(s for s, clipped in zip(sizes, self.clips(case), strict=True) if clipped) / sum(sizes)
