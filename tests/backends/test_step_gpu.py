"""What only a GPU can show of an optimizer's step that clips: no waiting, graphs, no memory beyond the states.

The rest of its tests runs there too. Where there is no GPU, the CUDA backend's step of odd sizes runs on the CPU.
"""

import math

import pytest
import torch
from torch.amp import GradScaler

from cwclip_kernels.optim import ComponentClipAdamW
from helpers import DEVICE, same_bits
from no_sync import no_sync
from stepping import assert_stepped_alike, give_gradients, run, states_of, twins

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")

SHAPES = [(15, 700), (300, 200), (33,)]
CAP, LR = 0.5, 1e-2


@needs_gpu
def test_nothing_waits(backend):
    params, _ = twins(SHAPES)
    optimizer = ComponentClipAdamW(params, lr=torch.tensor(LR, device=DEVICE), max_norm=CAP, backend=backend)
    run(1, (params, optimizer.step))
    with no_sync():
        for _ in range(5):
            optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 6


@needs_gpu
def test_inside_a_graph(backend):
    """Every replay does what a step outside of a graph does; the learning rate is read at each."""
    inside, outside = twins(SHAPES)
    rates = [torch.tensor(LR, device=DEVICE) for _ in range(2)]
    first, second = (
        ComponentClipAdamW(params, lr=lr, max_norm=CAP, capturable=True, backend=backend)
        for params, lr in zip((inside, outside), rates, strict=True)
    )
    run(1, (inside, first.step), (outside, second.step))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first.step()
    for turn in range(5):
        for lr in rates:
            lr.fill_(LR / (turn + 1))
        for p, q in zip(inside, outside, strict=True):
            p.grad.copy_(torch.randn_like(p))
            q.grad.copy_(p.grad)
        graph.replay()
        second.step()
    assert all(map(same_bits, inside, outside))
    assert all(map(same_bits, states_of(first, inside), states_of(second, outside)))


@needs_gpu
def test_under_a_scaler_without_a_sync(backend):
    params, _ = twins(SHAPES)
    optimizer = ComponentClipAdamW(params, lr=LR, max_norm=CAP, backend=backend)
    scaler = GradScaler(DEVICE, init_scale=2.0**8)
    for bad in (False, True, False):
        give_gradients(params, scale=2.0**8)
        scaler.scale(torch.ones((), device=DEVICE))
        if bad:
            params[1].grad[7, 9] = math.inf
        before = [p.detach().clone() for p in params]
        with no_sync():
            scaler.step(optimizer)
        scaler.update()
        assert all(map(same_bits, params, before)) == bad
    assert {state["step"].item() for state in optimizer.state.values()} == {2}


@needs_gpu
def test_needs_no_memory_beyond_the_states(backend):
    params, _ = twins([(1024, 1024)] * 8)
    optimizer = ComponentClipAdamW(params, lr=LR, max_norm=CAP, backend=backend)
    run(2, (params, optimizer.step))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


@needs_gpu
def test_large_tensors_equal_the_definition(backend):
    ours, theirs = twins([(1 << 22,), (4099, 1023), (7,)])
    optimizer = ComponentClipAdamW(ours, lr=LR, max_norm=CAP, backend=backend)
    definition = ComponentClipAdamW(theirs, lr=LR, max_norm=CAP, backend="reference")
    run(3, (ours, optimizer.step), (theirs, definition.step))
    assert_stepped_alike(ours, theirs, 3, LR)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes_and_transposed_memory_equal_the_definition(dtype, backend):
    ours, theirs = twins([(0,), (1,), (31,), (8193,), (129, 70)], dtype)
    for params in (ours, theirs):
        params.append(torch.nn.Parameter(torch.ones(50, 64, dtype=dtype, device=DEVICE).t()))
    optimizer = ComponentClipAdamW(ours, lr=LR, max_norm=CAP, backend=backend)
    definition = ComponentClipAdamW(theirs, lr=LR, max_norm=CAP, backend="reference")
    run(3, (ours, optimizer.step), (theirs, definition.step))
    assert_stepped_alike(ours, theirs, 3, LR)
