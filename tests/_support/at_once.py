"""Clipping in a steady loop, which one native call serves, beside the reference."""

import torch

from cwclip_kernels import ComponentClipper, fused_component_clip_
from helpers import assert_grads, copy_of, parameters, random_grad

CAP = 0.1


def clip_and_compare(clipper, params):
    """Clips as the reference does, and bumps each version once."""
    expected, versions = copy_of(params), [p.grad._version for p in params if p.grad is not None]
    result = clipper.clip_()
    norms = fused_component_clip_(expected, CAP, backend="reference")
    assert torch.allclose(result.norms, norms.to(result.norms.dtype), rtol=1e-6)
    assert_grads(params, expected)
    assert [p.grad._version for p in params if p.grad is not None] == [v + 1 for v in versions]
    return result


def steady(backend, shapes=((30,), (4, 4), (5,)), **options):
    """A clipper that has been called, and its parameters."""
    params = parameters(shapes)
    clipper = ComponentClipper(params, CAP, backend=backend, **options)
    clipper.clip_()
    for p in params:
        p.grad = random_grad(p.shape)
    return clipper, params
