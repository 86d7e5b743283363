"""Calls the C++ operators with random arguments, most of them wrong: each call works or raises, and none crashes.

python tests/fuzz_operators.py SECONDS SEED    also under sanitizers, see test_native_operators.py
"""

import random
import sys
import time
from collections import Counter

import torch

from cwclip_kernels.backends import extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STRANGE = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


def gradient(rng):
    dtype = rng.choice(STRANGE) if rng.random() < 0.02 else rng.choice(DTYPES)
    shape = [rng.randrange(5) for _ in range(rng.randrange(4))]
    if rng.random() < 0.05:
        shape = [rng.randrange(40_000)]
    grad = torch.ones(shape, dtype=torch.float32).to(dtype)
    chance = rng.random()
    if chance < 0.15:
        grad = grad.permute(tuple(reversed(range(grad.ndim))))
    elif chance < 0.25 and grad.ndim:
        grad = grad[..., ::2]
    elif chance < 0.27 and grad.ndim:
        grad = grad.expand(3, *grad.shape)
    elif chance < 0.29:
        grad = grad.to("meta")
    elif chance < 0.31 and not dtype.is_complex and grad.ndim and dtype in DTYPES:
        grad = grad.to_sparse()
    return grad


def number(rng, low, high):
    if rng.random() < 0.03:
        return rng.choice([-1, 2**31, 2**62, -(2**62), high + 1])
    return rng.randrange(low, max(low + 1, high + 1))


def cuts(rng, grads, pieces):
    numbers = []
    for _ in range(pieces):
        i = number(rng, 0, len(grads) - 1)
        shape = grads[i].shape if 0 <= i < len(grads) else ()
        dims = [d for d in range(len(shape)) if rng.random() < 0.5]
        numbers += [i, len(dims) if rng.random() < 0.97 else number(rng, 0, 80)]
        for d in dims:
            start = number(rng, 0, shape[d])
            numbers += [
                d if rng.random() < 0.97 else number(rng, 0, 9),
                start,
                number(rng, 0, max(0, shape[d] - start)),
            ]
    if rng.random() < 0.03 and numbers:
        numbers.pop()
    return wrong(rng, torch.tensor(numbers, dtype=torch.int64))


def wrong(rng, tensor):
    """The tensor, now and then of another dtype, shape or place."""
    chance = rng.random()
    if chance < 0.02:
        return tensor.to(torch.int32 if tensor.dtype == torch.int64 else torch.float16)
    if chance < 0.03:
        return tensor.to("meta")
    if chance < 0.05:
        return tensor.unsqueeze(0)
    if chance < 0.06 and tensor.ndim:
        return tensor.repeat(2)[::2]
    return tensor


def one_call(rng):
    ops = torch.ops.cwclip_kernels
    grads = [gradient(rng) for _ in range(rng.randrange(5))]
    if grads and rng.random() < 0.03:
        grads.append(grads[0])
    count = number(rng, 0, 4)
    cut = rng.random() < 0.5
    pieces = rng.randrange(6) if cut else len(grads) + (rng.random() < 0.05)
    owners = wrong(
        rng, torch.tensor([number(rng, 0, min(max(count - 1, 0), 4)) for _ in range(pieces)], dtype=torch.int64)
    )
    places = cuts(rng, grads, pieces) if cut else None
    order = rng.choice([1.0, 2.0, float("inf"), 2.0, 3.0 if rng.random() < 0.1 else 2.0])
    shape = () if rng.random() < 0.5 else (max(0, min(count, 5)),)
    doubles = wrong(rng, torch.rand(shape, dtype=torch.float64))
    which = rng.randrange(3)
    if which == 0:
        ops.power_sums(grads, owners, places, count, order)
    elif which == 1:
        ops.scale_(grads, owners, places, doubles, rng.random() < 0.5)
    else:
        inverse = wrong(rng, torch.rand((), dtype=torch.float64)) if rng.random() < 0.4 else None
        found = wrong(rng, torch.zeros(())) if rng.random() < 0.4 else None
        ops.clip_(grads, owners, places, count, doubles, inverse, found, order, 1e-6, number(rng, 0, 2))


def main(seconds, seed):
    assert extension.unavailable() is None, extension.unavailable()
    rng = random.Random(seed)
    ends = time.monotonic() + seconds
    outcomes = Counter()
    while time.monotonic() < ends:
        try:
            one_call(rng)
            outcomes["worked"] += 1
        except (RuntimeError, NotImplementedError) as error:
            outcomes[type(error).__name__] += 1
    print(dict(outcomes))
    assert outcomes["worked"] > 50
    assert outcomes["RuntimeError"] > 50


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(float(sys.argv[1]), int(sys.argv[2]))
