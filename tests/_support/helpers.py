"""Making models with gradients, comparing results: one tolerance table for the whole suite."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Every backend that can serve the tests' device; where there is no GPU, the triton kernels run interpreted and the
# CUDA kernels compiled for the CPU.
FUSED = ("cpu", "cuda", "triton") if DEVICE == "cpu" else ("cuda", "triton")
BACKENDS = (*FUSED, "foreach", "reference")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Largest relative error of a norm against float64 arithmetic on the same inputs, at any size.
NORM_TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
    torch.float64: 1e-14,
    torch.complex64: 1e-6,
    torch.complex128: 1e-14,
}

# Relative and absolute difference of two clipped gradients: one rounding of the dtype, since coefficients that
# differ in their last places may round a product either way; absolute for subnormals.
GRAD_TOLERANCE = {
    torch.float32: (5e-7, 1e-44),
    torch.bfloat16: (8e-3, 1e-40),
    torch.float16: (1e-3, 6e-8),
    torch.float64: (1e-14, 1e-322),
    torch.complex64: (1e-6, 1e-38),
    torch.complex128: (1e-14, 0.0),
}

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def parameter(grad: Tensor | None, shape: Sequence[int] = (1,)) -> nn.Parameter:
    """A parameter with this gradient."""
    if grad is None:
        return nn.Parameter(torch.zeros(shape, device=DEVICE))
    result = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device))
    result.grad = grad
    return result


def parameters(
    shapes: Iterable[Sequence[int]], dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> list[nn.Parameter]:
    """Parameters with random gradients of various sizes around ``scale``."""
    return [parameter(random_grad(shape, dtype, scale)) for shape in shapes]


def random_grad(shape: Sequence[int], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal values, of another spread each time."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return (torch.randn(shape, dtype=wide) * scale * (0.5 + torch.rand(()))).to(DEVICE, dtype)


def copy_of(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The same gradients, in the same memory layout, on other parameters."""
    copies = []
    for p in params:
        grad = p.grad
        if grad is None:
            copies.append(parameter(None, p.shape))
        elif grad.layout != torch.strided or grad.is_contiguous():
            copies.append(parameter(grad.clone()))
        else:
            base = torch.zeros(1 + sum((n - 1) * s for n, s in zip(grad.shape, grad.stride(), strict=True)))
            copy = base.to(grad.device, grad.dtype).as_strided(grad.shape, grad.stride())
            copies.append(parameter(copy.copy_(grad)))
    return copies


def grads_of(params: Iterable[nn.Parameter]) -> list[Tensor]:
    """Copies of the gradients."""
    return [p.grad.clone() for p in params if p.grad is not None]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit: signs of zeros and payloads of NaN too."""
    kind = _BITS[a.element_size() // (2 if a.is_complex() else 1)]
    a, b = (torch.view_as_real(t.contiguous()) if t.is_complex() else t.contiguous() for t in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def assert_norms(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the table; non-finite values alike."""
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=max(NORM_TOLERANCE[dtype], 1e-15), atol=0.0, equal_nan=True
    )


def assert_grads(
    actual: Iterable[nn.Parameter], expected: Iterable[nn.Parameter], norm_dtype: torch.dtype = torch.float64
) -> None:
    """Within the table, gradient by gradient, for norms as exact as ``norm_dtype``'s."""
    for a, e in zip(actual, expected, strict=True):
        assert (a.grad is None) == (e.grad is None)
        if a.grad is None or e.grad is None:
            continue
        rtol, atol = GRAD_TOLERANCE[e.grad.dtype]
        rtol = max(rtol, NORM_TOLERANCE[norm_dtype])
        torch.testing.assert_close(a.grad, e.grad, rtol=rtol, atol=atol, equal_nan=True)


def float64_norm(grads: Sequence[Tensor], p: float = 2.0) -> Tensor:
    """The norm of all of them together, by another road than the package's reference."""
    # With one zero more, because torch has no norm of nothing.
    flat = torch.cat([torch.zeros(1).double(), *(g.detach().cpu().abs().double().reshape(-1) for g in grads)])
    return torch.linalg.vector_norm(flat, p)


Clip = Callable[..., Tensor]
