"""Calls the native functions with random arguments, many of them wrong: each call works or raises, and none crashes.

Addresses are trusted, so those that are handed over are always such as a plan hands over.

python tests/_support/fuzz_native.py SECONDS SEED    also under sanitizers, see test_native_calls.py
"""

import random
import sys
import time
from collections import Counter

import torch

from cwclip_kernels.backends import native

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
    return native.packed(numbers)


def wrong(rng, packed):
    """The bytes, now and then cut short, too long, or no bytes at all."""
    chance = rng.random()
    if chance < 0.01:
        return packed[:-1]
    if chance < 0.02:
        return packed + bytes(8)
    if chance < 0.03:
        return rng.choice([None, 7, "bytes", []])
    return packed


def one_call(rng):
    extension = native._C
    grads = [gradient(rng) for _ in range(rng.randrange(5))]
    entries = [rng.choice([None, ..., g]) if rng.random() < 0.1 else g for g in grads]
    signature = extension.signature_of(entries)
    if signature is None:
        return "others"
    if grads and rng.random() < 0.03:
        entries.append(entries[0])
    if rng.random() < 0.05 and entries:
        entries[rng.randrange(len(entries))] = gradient(rng)
    addresses = extension.addresses_of(
        [None if e is ... else e for e in entries], wrong(rng, signature), None, rng.random() < 0.8
    )
    if addresses is None:
        return "others"
    own = [e for e in entries if isinstance(e, torch.Tensor)]
    count = number(rng, 0, 4)
    cut = rng.random() < 0.5
    pieces = rng.randrange(6) if cut else len(own) + (rng.random() < 0.05)
    owners = native.packed([number(rng, 0, min(max(count - 1, 0), 4)) for _ in range(pieces)])
    program = extension.cpu_program(
        wrong(rng, signature), wrong(rng, owners), cuts(rng, own, pieces) if cut else None, count, False
    )
    if rng.random() < 0.02:
        program = wrong(rng, rng.choice([None, b"", object()])) if rng.random() < 0.5 else object()
    places = wrong(rng, addresses)
    order = rng.choice([1.0, 2.0, float("inf"), 2.0, 3.0 if rng.random() < 0.1 else 2.0])
    doubles = torch.rand(max(count, 1), dtype=torch.float64)
    which = rng.randrange(6)
    if which == 5:
        return at_once(rng, entries, program, signature, addresses, doubles, count)
    if which > 2:
        return one_step(rng, own, program, signature, places, doubles, count, which == 3)
    if which == 0:
        extension.cpu_power_sums(program, places, order, doubles.data_ptr())
    elif which == 1:
        extension.cpu_scale(program, places, doubles.data_ptr(), rng.random() < 0.5)
    else:
        rule = extension.rule(order, 1e-6, number(rng, 0, 2))
        inverse, found = torch.rand((), dtype=torch.float64), torch.zeros(())
        norms, coefs = torch.empty(max(count, 1)), torch.empty(max(count, 1))
        extension.cpu_clip(
            program, places, rule, doubles.data_ptr(), int(rng.random() < 0.5),
            inverse.data_ptr() if rng.random() < 0.4 else 0, found.data_ptr() if rng.random() < 0.4 else 0,
            norms.data_ptr(), coefs.data_ptr(),
        )  # fmt: skip
    return "worked"


def at_once(rng, entries, program, signature, addresses, doubles, count):
    """Parameters with these gradients, or others, clipped in one call."""
    extension = native._C
    params = []
    for entry in entries:
        grad = entry if isinstance(entry, torch.Tensor) else None
        chance = rng.random()
        if chance < 0.03:
            params.append(rng.choice([None, 7, torch.zeros(3).to_sparse()]))
            continue
        if chance < 0.06:
            grad = None
        elif chance < 0.09:
            grad = gradient(rng)
        like = torch.zeros(3) if grad is None else grad.detach()
        param = like.clone() if like.is_sparse or not like.is_floating_point() else torch.nn.Parameter(like.clone())
        param.grad = grad
        params.append(param)
    if rng.random() < 0.05:
        extension.gradients_of(wrong(rng, tuple(params)) if rng.random() < 0.5 else tuple(params))
    rule, wide = extension.rule(2.0, 1e-6, number(rng, 0, 2)), max(count, 1)
    caps = doubles if rng.random() < 0.5 else doubles[0]
    inverse = torch.rand((), dtype=torch.float64) if rng.random() < 0.4 else None
    found_inf = torch.zeros(()) if rng.random() < 0.4 else None
    results = [torch.empty(wide), torch.empty(wide)]
    if rng.random() < 0.05:
        results[rng.randrange(2)] = rng.choice([None, 7, torch.empty(wide, device="meta"), "results"])
    last = None if rng.random() < 0.5 else wrong(rng, addresses)
    given = tuple(params) if rng.random() < 0.97 else rng.choice([params, None, tuple(params[1:])])
    found = extension.cpu_clip_at_once(
        program, given, wrong(rng, signature), last, rule, caps, inverse, found_inf, *results
    )
    return "others" if found is None else "worked at once"


def one_step(rng, own, program, signature, places, doubles, count, clips):
    """A step of random parameters and states, most like their gradients."""
    extension = native._C
    written = []
    for kind in range(5):
        for grad in own:
            other = torch.empty_like(grad, dtype=torch.float32 if rng.random() < 0.1 else None)
            other = torch.zeros(()) if kind == 4 else gradient(rng) if rng.random() < 0.01 else other
            written.append(None if kind == 3 and rng.random() < 0.5 else other)
    their = extension.signature_of(written)
    if their is None:
        return "others"
    rule_of = native.packed([number(rng, 0, 1) for _ in own])
    step = extension.cpu_step_program(program, wrong(rng, signature), wrong(rng, their), wrong(rng, rule_of))
    addresses = extension.addresses_of(written, their, None, True)
    if addresses is None:
        return "others"
    rules = wrong(rng, torch.rand(2, 7, dtype=torch.float64).numpy().tobytes())
    skip = torch.tensor(float(rng.random() < 0.1))
    begin = program, places, step, wrong(rng, addresses), rules, skip.data_ptr() if rng.random() < 0.5 else 0
    if clips:
        rule = extension.rule(2.0, 1e-6, number(rng, 0, 2))
        norms, coefs = torch.empty(max(count, 1)), torch.empty(max(count, 1))
        extension.cpu_clip_adamw(
            *begin, rule, doubles.data_ptr(), int(rng.random() < 0.5), 0, 0, norms.data_ptr(), coefs.data_ptr()
        )
    else:
        extension.cpu_adamw(*begin, doubles.data_ptr(), rng.random() < 0.5)
    return "stepped"


WANTED = ("worked", "worked at once", "stepped", "others", "RuntimeError", "TypeError", "ValueError")


def main(seconds, seed):
    """For so many seconds; for more where the machine has come to too few of each outcome."""
    assert native.unavailable() is None, native.unavailable()
    rng = random.Random(seed)
    begun = time.monotonic()
    outcomes = Counter()
    while (passed := time.monotonic() - begun) < seconds or (
        passed < 10 * seconds and min(outcomes[outcome] for outcome in WANTED) <= 20
    ):
        try:
            outcomes[one_call(rng)] += 1
        except (RuntimeError, TypeError, ValueError, AttributeError, OverflowError, BufferError) as error:
            outcomes[type(error).__name__] += 1
    print(dict(outcomes))
    for outcome in WANTED:
        assert outcomes[outcome] > 20, outcome


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(float(sys.argv[1]), int(sys.argv[2]))
