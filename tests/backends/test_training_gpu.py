"""What only a GPU can show of slices, loss scales, cap policies, recording: no waiting, graphs, fewer bytes.

The rest of their tests runs there too. Where there is no GPU, the CUDA backend clips on the CPU in the backward pass;
the other tests are skipped.
"""

import math

import pytest
import torch
from torch import nn

from cwclip_kernels import ComponentClipGradScaler, ComponentClipper, ComponentSpec, clip_in_backward
from cwclip_kernels.telemetry import ClipRecorder, read_run
from cwclip_kernels.thresholds import EMA, FromGlobal, ParamRelative, Percentile, ZScore
from helpers import DEVICE, assert_grads, copy_of, parameters, random_grad, same_bits
from no_sync import no_sync

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")

POLICIES = {
    "EMA": lambda: EMA(warmup_steps=3),
    "EMA after its warm-up": lambda: EMA(warmup_steps=0),
    "ZScore": lambda: ZScore(warmup_steps=3),
    "Percentile": lambda: Percentile(40.0, window=8),
    "FromGlobal": lambda: FromGlobal(0.5),
    "ParamRelative": lambda: ParamRelative(0.1),
}
SPEC = ComponentSpec().split("0", 3, names=tuple("abcde")).split("1", (50, 150), dim=1)
SHAPES = [(15, 700), (300, 200), (33,)]


@needs_gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_waits(policy, backend, tmp_path):
    params = parameters(SHAPES)
    inverse, found = torch.tensor(0.5, device=DEVICE), torch.zeros((), device=DEVICE)
    recorder = ClipRecorder(tmp_path / "run", every=50)
    clipper = ComponentClipper(params, POLICIES[policy](), components=SPEC, backend=backend)
    recorder.record(clipper.clip_(inv_scale=inverse, found_inf=found))  # pinned memory is made once
    with no_sync():
        for _ in range(8):
            recorder.record(clipper.clip_(inv_scale=inverse, found_inf=found))
    recorder.close()
    assert read_run(tmp_path / "run.jsonl").norms.shape == (9, 8)


@needs_gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_learn_inside_a_graph(policy, backend):
    """Every replay does what a call outside of a graph does, state included."""
    params = parameters(SHAPES)
    twins = copy_of(params)
    inside = ComponentClipper(params, POLICIES[policy](), backend=backend)
    outside = ComponentClipper(twins, POLICIES[policy](), backend=backend)
    for clipper in (inside, outside):
        clipper.clip_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = inside.clip_()
    for _ in range(8):
        for p, t in zip(params, twins, strict=True):
            p.grad.copy_(random_grad(p.shape))
            t.grad.copy_(p.grad)
        graph.replay()
        wanted = outside.clip_()
        torch.testing.assert_close(result.caps, wanted.caps)
        assert_grads(params, twins, torch.float32)


@needs_gpu
def test_a_loss_scale_inside_a_graph(backend):
    params = parameters(SHAPES)
    inverse, found = torch.ones((), device=DEVICE), torch.zeros((), device=DEVICE)
    clipper = ComponentClipper(params, 0.5, backend=backend)
    clipper.clip_(inv_scale=inverse, found_inf=found)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = clipper.clip_(inv_scale=inverse, found_inf=found)
    for scale, bad in ((64.0, False), (256.0, False), (2.0, True)):
        inverse.fill_(1 / scale)
        found.zero_()
        for p in params:
            p.grad.copy_(random_grad(p.shape, scale=scale))
        if bad:
            params[1].grad[7, 9] = math.inf
        twins = copy_of(params)
        graph.replay()
        wanted = ComponentClipper(twins, 0.5, backend="reference").clip_(inv_scale=1 / scale)
        torch.testing.assert_close(result.norms, wanted.norms)
        assert_grads(params, twins, torch.float32)
        assert found == float(bad)


@needs_gpu
def test_a_fused_optimizer_under_the_scaler():
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = ComponentClipGradScaler(ComponentClipper(model, 0.05), init_scale=2.0**12)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = model(torch.randn(8, 64, device=DEVICE)).square().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(p.grad.norm() <= 0.05 * 1.001 for p in model.parameters())


@needs_gpu
def test_gradients_are_freed_in_the_backward_pass():
    def peak(in_backward):
        torch.cuda.empty_cache()
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16))).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        if in_backward:
            clip_in_backward(model, 0.05, optimizer=optimizer)
        x = torch.randn(4, 1024, device=DEVICE)
        for _ in range(2):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(x).sum().backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    gradients = 16 * 4 * 1024 * 1024
    assert peak(False) >= gradients
    assert peak(True) <= gradients / 4


def test_in_the_backward_pass_the_same_bits(backend):
    model = nn.Sequential(nn.Linear(33, 64), nn.Tanh(), nn.Linear(64, 7)).to(DEVICE)
    twin = nn.Sequential(nn.Linear(33, 64), nn.Tanh(), nn.Linear(64, 7)).to(DEVICE)
    twin.load_state_dict(model.state_dict())
    clip_in_backward(model, 0.05, backend=backend)
    x = torch.randn(5, 33, device=DEVICE)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    ComponentClipper(twin, 0.05, backend=backend).clip_()
    assert all(same_bits(p.grad, t.grad) for p, t in zip(model.parameters(), twin.parameters(), strict=True))
