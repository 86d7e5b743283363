"""The public call against the reference, on whatever hypothesis comes up with.

CWCLIP_FUZZ=20 make test ARGS=tests/test_fuzz.py    twenty times as many cases
"""

import math
from fnmatch import fnmatchcase
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from cwclip_kernels import ComponentClipper, ComponentSpec, clip_gradients, clip_gradients_
from helpers import BACKENDS, DEVICE, DTYPES, assert_grads, assert_norms, copy_of, parameter, same_bits
from seed import LONGER, SEED

# As many as take a few seconds; Triton's interpreter takes milliseconds for each program of a kernel.
CASES = {"cpu": 700, None: 300, "foreach": 250, "cuda": 150, "triton": 20}
BY_WORD = ("parameter", "module", "layer", "type", "all")
NAMES = (
    "embed.weight",
    "h.0.attn.weight",
    "h.0.attn.bias",
    "h.1.attn.weight",
    "h.1.attn.bias",
    "head.weight",
    "scale",
)


@st.composite
def gradients(draw):
    """Values of any dtype, size and memory layout, or none; some of them huge, tiny, zero or not finite."""
    if draw(st.integers(0, 9)) == 0:
        return None
    dtype = draw(st.sampled_from([*DTYPES, torch.float32, torch.complex64]))
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    layout = draw(st.sampled_from(["plain", "plain", "transposed", "strided", "shifted", "sparse"]))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(shape, dtype=wide, generator=generator) * 10.0 ** draw(st.integers(-3, 3))
    oddity = draw(st.sampled_from([None] * 6 + [0.0, 1e-30, 3e30, math.inf, -math.inf, math.nan]))
    if oddity is not None and values.numel():
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = oddity
    grad = values.to(DEVICE, dtype)
    if layout == "transposed":
        backwards = tuple(reversed(range(grad.ndim)))
        return grad.permute(backwards).contiguous().permute(backwards)
    if layout == "strided" and grad.ndim:
        room = torch.zeros(*shape[:-1], 2 * shape[-1] + 1, dtype=dtype, device=DEVICE)
        room[..., 1::2] = grad
        return room[..., 1::2]
    if layout == "shifted":
        room = torch.zeros(grad.numel() + 3, dtype=dtype, device=DEVICE)
        room[3:] = grad.reshape(-1)
        return room[3:].view(shape)
    if layout == "sparse" and grad.ndim and shape[0]:
        rows = torch.randint(0, shape[0] + 2, (1, shape[0]), generator=generator)  # with duplicates
        return torch.sparse_coo_tensor(rows, grad.cpu(), (shape[0] + 2, *shape[1:]), check_invariants=True).to(DEVICE)
    return grad


@st.composite
def groupings(draw, shapes):
    """A word, a function, or a spec that cuts tensors where they can be cut."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(st.sampled_from((None, *BY_WORD)))
    if kind == 1:
        modulus = draw(st.integers(1, 4))
        return lambda name, p: None if len(name) % 5 == 0 else len(name) % modulus
    spec = ComponentSpec(draw(st.sampled_from((None, *BY_WORD))))
    if draw(st.booleans()) and any(name.endswith(".weight") for name in shapes):
        spec = spec.group("*.weight", draw(st.sampled_from(BY_WORD)))
    for name, (shape, can_cut) in shapes.items():
        for dim, length in enumerate(shape):
            if can_cut and length and draw(st.integers(0, 3)) == 0:
                parts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=2))})
                sizes = [b - a for a, b in pairwise(parts)]
                spec = spec.split(name, draw(st.sampled_from([sizes, 1])), dim=dim)
    return spec


@st.composite
def caps(draw, names):
    kind = draw(st.integers(0, 3))
    numbers = st.sampled_from([0.0, 1e-6, 0.1, 1.0, 3.0, 100.0, math.inf]) | st.floats(0.0, 10.0)
    if kind == 0:
        return draw(numbers)
    if kind == 1:
        dtype = draw(st.sampled_from([torch.float64, torch.float32]))
        shape = draw(st.sampled_from([(), (len(names),)]))
        values = [draw(numbers) for _ in range(math.prod(shape))]
        return torch.tensor(values, dtype=dtype, device=DEVICE).reshape(shape)
    patterns = [
        p for p in ("h.*", "*.bias*", "*weight*", "all*", *names[:1]) if any(fnmatchcase(n, p) for n in names)
    ]
    return {pattern: draw(numbers) for pattern in patterns} if patterns else draw(numbers)


def clipper_of(params, max_norm, norm_type, **more):
    try:
        return ComponentClipper(params, max_norm, norm_type, **more)
    except ValueError as error:  # names that collide, such as "all" by two rules
        if "both written" in str(error):
            return None
        raise


@st.composite
def calls(draw, orders):
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True))
    params = [(name, parameter(draw(gradients()), (3,))) for name in names]
    shapes = {n: (tuple(p.shape), p.grad is None or not p.grad.is_sparse) for n, p in params}
    norm_type = draw(st.sampled_from(orders))
    components = draw(groupings(shapes))
    unlimited = clipper_of(params, math.inf, norm_type, components=components)
    max_norm = draw(caps(unlimited.names)) if unlimited is not None else 1.0
    options = {
        "components": components,
        "nonfinite": draw(st.sampled_from(["propagate", "zero", "skip", "error"])),
        "eps": draw(st.sampled_from([1e-6, 0.0, 0.5])),
    }
    inv_scale = draw(st.sampled_from([None, None, 0.5, 2.0**-16, 3.0]))
    return params, max_norm, norm_type, options, inv_scale, draw(st.sampled_from(["whole", "whole", *WAYS]))


# Instead of a clipper's clip_(): norms first, then by these; gradients without parameters, in place and copied, with
# a graph and without.
WAYS = ("halves", "gradients", "copies", "graph")


def outcome_of(params, max_norm, norm_type, options, inv_scale, backend, way="whole"):
    """What a call returns, or the error that it raises; and found_inf."""
    clipper = clipper_of(params, max_norm, norm_type, **options, backend=backend)
    if clipper is None:
        return None, 0.0
    found = torch.zeros((), device=DEVICE)
    grads = {name: p.grad for name, p in params}
    arguments = max_norm, norm_type
    options = {**options, "inv_scale": inv_scale, "found_inf": found, "backend": backend}
    try:
        if way == "whole":
            return clipper.clip_(inv_scale=inv_scale, found_inf=found), found.item()
        if way == "halves":
            norms = clipper.norms(inv_scale=inv_scale, found_inf=found)
            return clipper.clip_with_norms_(norms, inv_scale=inv_scale), found.item()
        if way == "gradients":
            return clip_gradients_(grads, *arguments, **options), found.item()
        if way == "graph":
            grads = {name: None if g is None else g.requires_grad_().clone() for name, g in grads.items()}
        new, norms = clip_gradients(grads, *arguments, **options)
        for name, p in params:
            if p.grad is not None:
                p.grad.requires_grad_(False).copy_(new[name].detach())
        return norms, found.item()
    except RuntimeError as error:
        if "non-finite" not in str(error):
            raise
        return str(error), found.item()


def serves(backend, params, norm_type):
    kernels = backend in ("cpu", "cuda", "triton")
    return not (kernels and norm_type != 2.0 and any(p.grad is not None and p.grad.is_complex() for _, p in params))


@pytest.mark.slow
@pytest.mark.parametrize("backend", [b for b in (*BACKENDS, None) if b != "reference"])
def test_any_call(backend):
    orders = (2.0, 2.0, 1.0, math.inf) if backend in ("cpu", "cuda", "triton") else (2.0, 1.0, math.inf, 3.0, 0.0)
    count = CASES[backend] if DEVICE == "cpu" else 300

    @settings(
        max_examples=max(1, int(count * LONGER)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @seed(SEED)
    @given(calls(orders))
    def check(call):
        params, max_norm, norm_type, options, inv_scale, way = call
        grads = [p.grad for _, p in params]
        if way == "graph" and (backend is not None or any(g is not None and g.is_sparse for g in grads)):
            way = "copies"
        if way not in ("whole", "halves") and None in grads and isinstance(options["components"], ComponentSpec):
            way = "whole"  # what is missing has no shape, which may not fit the spec
        if not serves(backend, params, norm_type):
            return
        before = copy_of([p for _, p in params])
        twins = [(name, twin) for (name, _), twin in zip(params, copy_of(before), strict=True)]
        ours, found = outcome_of(params, max_norm, norm_type, options, inv_scale, backend, way)
        theirs, wanted = outcome_of(twins, max_norm, norm_type, options, inv_scale, "reference")
        assert found == wanted or (isinstance(ours, str) and way != "whole")  # found before it was an error
        assert all(p.grad is g for (_, p), g in zip(params, grads, strict=True)), "a gradient was replaced"
        if isinstance(ours, str) or isinstance(theirs, str) or ours is None:
            assert ours == theirs
            for (_, p), b in zip(params, before, strict=True):
                assert p.grad is None or same_bits(_dense(p.grad), _dense(b.grad)), "an error, and a gradient changed"
            return
        doubles = [p.grad.dtype in (torch.float64, torch.complex128) for _, p in params if p.grad is not None]
        exact = torch.float64 if doubles and all(doubles) else torch.float32
        norms = ours if isinstance(ours, torch.Tensor) else ours.norms
        assert norms.dtype == theirs.norms.dtype
        assert_norms(norms, theirs.norms, exact)
        if not isinstance(ours, torch.Tensor):
            assert ours.names == theirs.names
            torch.testing.assert_close(ours.caps, theirs.caps)
        for (_, p), (_, t) in zip(params, twins, strict=True):
            if p.grad is not None:
                assert_grads([parameter(_dense(p.grad))], [parameter(_dense(t.grad))], exact)

    check()


def _dense(grad):
    return grad._values() if grad.is_sparse else grad
