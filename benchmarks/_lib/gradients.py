"""Gradients to clip: parameters without memory of their own, several sets in turn, caps for each case."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .shapes import ShapeSet

CASES = ("none", "half", "all")
Cap = float | list[float]
PIECE = 1 << 24  # elements that torch sums in float32 with a few correct digits


def clips(case: str, count: int) -> list[bool]:
    """Which of ``count`` components ``case`` clips: none, every other one, or all."""
    return [case == "all" or (case == "half" and i % 2 == 0) for i in range(count)]


def clipped_share(shape_set: ShapeSet, case: str) -> float:
    """Share of the bytes, 0 to 1, that belong to components which ``case`` clips."""
    sizes = [math.prod(shape) for _, shape in shape_set.shapes]
    return sum(size for size, clipped in zip(sizes, clips(case, len(sizes)), strict=True) if clipped) / sum(sizes)


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
        scales = torch.rand(len(shape_set.shapes), device=device, generator=generator).tolist()
        first = [
            torch.randn(shape, dtype=dtype, device=device, generator=generator).mul_(0.25 + 0.75 * scale)
            for (_, shape), scale in zip(shape_set.shapes, scales, strict=True)
        ]
        if shape_set.misaligned:
            first = _misaligned(first)
        self.named = [
            (name, nn.Parameter(torch.empty((), dtype=dtype, device=device).expand(shape)))
            for name, shape in shape_set.shapes
        ]
        copy = _misaligned if shape_set.misaligned else _clones
        self._sets = [first, *(copy(first) for _ in range(rotate - 1))]
        self._pristine = _clones(first) if restorable else None
        self.use(0)
        self.norms = self.current_norms()

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
        torch._foreach_copy_(self._current, self._pristine)

    def current_norms(self) -> list[float]:
        """Each gradient's norm as it is now, exact to some digits at any size."""
        pieces = [g.flatten().split(PIECE) for g in self._current]
        norms = torch.stack(torch._foreach_norm([p for own in pieces for p in own], 2, torch.float32)).tolist()
        following = iter(norms)
        return [math.hypot(*(next(following) for _ in own)) for own in pieces]

    def expected_norms(self, case: str, componentwise: bool = True) -> list[float]:
        """Each gradient's norm after a clip that does what ``case`` says."""
        cap = self.cap(case)
        if componentwise:
            caps = cap if isinstance(cap, list) else [cap] * len(self.norms)
            return [min(norm, limit) for norm, limit in zip(self.norms, caps, strict=True)]
        total = math.hypot(*self.norms)
        assert isinstance(cap, float)  # the global clip has no case "half"
        return [norm * min(1.0, cap / total) for norm in self.norms]

    def cap(self, case: str) -> Cap:
        """A cap that clips what ``case`` says: one number for none and all, as in use; a list for half.

        It is a factor of two away from every norm, so that no rounding of a norm changes who is clipped.
        """
        if case == "none":  # above the norm of everything together, so that a global clip leaves it alone too
            return 2.0 * math.hypot(*self.norms)
        if case == "all":
            return 0.5 * min(self.norms)
        return [
            norm * (0.5 if clipped else 2.0)
            for norm, clipped in zip(self.norms, clips("half", len(self.norms)), strict=True)
        ]


def _clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _misaligned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies as views into one buffer, their starts going round all places that no 16-byte load may begin at."""
    per_vector = 16 // tensors[0].itemsize
    starts: list[int] = []
    end = 0
    for index, tensor in enumerate(tensors):
        next_vector = -(-end // per_vector) * per_vector
        starts.append(next_vector + 1 + index % (per_vector - 1))
        end = starts[-1] + tensor.numel()
    buffer = tensors[0].new_empty(end)
    views = [buffer[start : start + t.numel()].view(t.shape) for start, t in zip(starts, tensors, strict=True)]
    torch._foreach_copy_(views, list(tensors))
    return views
