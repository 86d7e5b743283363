"""What only a GPU can show: streams, graphs, syncs, launches, memory, several devices; and sizes, on real hardware.

Where there is none, tests of sizes run the CUDA backend's kernels on the CPU, and the others are skipped. The rest of
the suite runs on a GPU too, with every backend that serves it.
"""

import math
import os

import pytest
import torch

from cwclip_kernels import ComponentClipper, component_norms, fused_component_clip_
from cwclip_kernels.backends import cuda
from helpers import (
    DEVICE,
    DTYPES,
    assert_grads,
    assert_norms,
    copy_of,
    float64_norm,
    grads_of,
    parameter,
    parameters,
    random_grad,
    same_bits,
)
from no_sync import no_sync

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")

NVIDIA = torch.version.hip is None
SIZES = [(0,), (1,), (31,), (33,), (300, 100), (8191,), (8192,), (8193,), (1000, 1000)]


def check(params, backend, max_norm=0.7, norm_type=2.0, **more):
    expected = copy_of(params)
    norms = fused_component_clip_(params, max_norm, norm_type, backend=backend, **more)
    reference = fused_component_clip_(expected, max_norm, norm_type, backend="reference", **more)
    dtypes = {p.grad.dtype for p in params if p.grad is not None}
    exact = torch.float64 if dtypes == {torch.float64} else torch.float32
    assert_norms(norms, reference, exact)
    assert_grads(params, expected, exact)


@pytest.mark.sanitized
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_sizes(dtype, norm_type, backend):
    check(parameters(SIZES, dtype), backend, norm_type=norm_type)


@needs_gpu
def test_what_none_names_is_the_cuda_backend():
    if reason := cuda.unavailable(torch.device("cuda", 0)):
        (pytest.fail if os.environ.get("CWCLIP_REQUIRE_GPU") else pytest.skip)(f"the CUDA backend {reason}")
    assert "'cuda' (first choice on cuda)" in ComponentClipper(parameters([(3,)]), 1.0).explain()


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_views(dtype, backend):
    flat = random_grad((400_000,), dtype)
    starts = range(1, 390_000, 30_011)
    params = [parameter(flat[start : start + 29_000 + start % 7]) for start in starts]
    before = flat.clone()
    inside = torch.zeros(len(flat), dtype=torch.bool, device=DEVICE)
    for p, start in zip(params, starts, strict=True):
        inside[start : start + p.numel()] = True
    check(params, backend)
    assert same_bits(flat[~inside], before[~inside])


@needs_gpu
def test_twenty_thousand_tiny_tensors(backend):
    """Beside arithmetic on all at once: the reference would go through 20,000 tensors 20,000 times."""
    flat = random_grad((20_000, 3))
    before = flat.double()
    norms = fused_component_clip_([parameter(grad) for grad in flat.unbind()], 0.7, backend=backend)
    expected = torch.linalg.vector_norm(before, dim=1)
    assert_norms(norms, expected, torch.float32)
    coefs = (0.7 / (expected + 1e-6)).clamp(max=1.0)
    clipped = parameter((before * coefs[:, None]).float())
    assert 0 < (coefs < 1).sum() < 20_000
    assert_grads([parameter(flat)], [clipped], torch.float32)


@pytest.mark.sanitized
def test_gaps_sparse_and_complex(backend):
    indices = torch.tensor([[0, 3, 3]], device=DEVICE)
    sparse = torch.sparse_coo_tensor(indices, random_grad((3, 5)), (9, 5), check_invariants=True)
    params = [
        parameter(random_grad((60, 50))[:, ::2]),
        parameter(random_grad((50, 40)).t()),
        parameter(random_grad((30,), torch.complex64)),
        parameter(sparse),
    ]
    check(params, backend)


@needs_gpu
def test_same_bits_a_hundred_times(backend):
    params = parameters([(1000, 999), (7,), (33, 1000), (100_003,)])
    clipper = ComponentClipper(params, 0.3, backend=backend)
    before = grads_of(params)
    first: list[torch.Tensor] = []
    for _ in range(100):
        for p, grad in zip(params, before, strict=True):
            p.grad.copy_(grad)
        result = clipper.clip_()
        now = [result.norms, result.coefs, *grads_of(params)]
        first = first or now
        assert all(same_bits(a, b) for a, b in zip(first, now, strict=True))


@needs_gpu
def test_nothing_waits_for_the_device(backend):
    """Not even the first call, which brings tables to the device."""
    caps = torch.full((2,), 0.1, device=DEVICE)
    params = parameters([(100, 50), (33,)])
    with no_sync():
        clipper = ComponentClipper(params, caps, backend=backend)
        for _ in range(3):
            clipper.clip_()
            clipper.norms()
            fused_component_clip_(params, 0.01, backend=backend)
            fused_component_clip_(params, 0.01, nonfinite="zero", backend=backend)
            for p in params:
                p.grad = torch.randn_like(p)


@needs_gpu
def test_on_a_side_stream(backend):
    params = parameters([(1000, 1000), (77,)])
    clipper = ComponentClipper(params, 0.1, backend=backend)
    clipper.clip_()
    for _ in range(5):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)  # what comes before on this stream takes its time
            for p in params:
                p.grad = torch.ones_like(p)
            norms = clipper.clip_().norms
        torch.cuda.current_stream().wait_stream(stream)
        assert norms.tolist() == pytest.approx([1000.0, math.sqrt(77.0)])
        assert (clipper.norms() <= 0.1 * (1 + 1e-6)).all()


@needs_gpu
def test_streams_side_by_side(backend):
    """Calls on several streams at once share tables, and nothing that they write."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    params = parameters([(500, 1000), (77,), (1000, 999)])
    clipper = ComponentClipper(params, math.inf, backend=backend)
    expected = clipper.norms()
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(clipper.norms())
    torch.cuda.synchronize()
    assert all(same_bits(result, expected) for result in results)


@needs_gpu
def test_a_graph_replays_with_new_gradients_and_caps(backend):
    params = parameters([(300, 200), (33,), (5,), (9000,)])
    caps = torch.full((4,), 0.5, device=DEVICE)
    clipper = ComponentClipper(params, caps, backend=backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        clipper.clip_()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = clipper.clip_()
    for step in range(4):
        caps.copy_(torch.rand(4) * 2.0)
        for p in params:
            p.grad.copy_(random_grad(p.shape, scale=10.0 ** (step - 2)))
        expected = copy_of(params)
        graph.replay()
        reference = fused_component_clip_(expected, caps, backend="reference")
        assert_norms(result.norms, reference, torch.float32)
        assert_grads(params, expected, torch.float32)
        if step == 1:  # a call outside, on the same clipper, changes nothing for the graph
            assert_norms(clipper.norms(), component_norms(params, backend="reference"), torch.float32)


@needs_gpu
def test_a_graph_outlives_its_clipper(backend):
    params = parameters([(300, 200), (9000,)])
    clipper = ComponentClipper(params, 0.5, backend=backend)
    clipper.clip_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clipper.clip_()
    del clipper
    torch.cuda.empty_cache()
    junk = [
        torch.full((n,), 255, dtype=torch.uint8, device=DEVICE) for n in (64, 512, 4096, 1 << 20) for _ in range(50)
    ]
    for p in params:
        p.grad.fill_(1.0)
    graph.replay()
    assert component_norms(params).tolist() == pytest.approx([0.5, 0.5], rel=1e-5)
    del junk


@needs_gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capturing_a_graph_first_is_refused_with_the_way_out(backend):
    clipper = ComponentClipper(parameters([(30,)]), 0.5, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="make one before"), torch.cuda.graph(graph):
        clipper.clip_()
    torch.cuda.synchronize()
    clipper.clip_()


@needs_gpu
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch says so of every profile after the first
def test_launches_and_copies(backend):
    """Components of one tile need one; nothing is copied to the device once the first call has been made."""
    alone = [(300, 20), (33,), (700,)]
    launches = {"triton": 3, "cuda": 1 if os.environ.get("CWCLIP_CUDA_FORM") == "2" else 2}[backend]
    assert_launches([(300, 200), *alone], launches, backend)
    assert_launches(alone, 1, backend)


def assert_launches(shapes, count, backend):
    params = parameters(shapes)
    clipper = ComponentClipper(params, 0.1, backend=backend)
    clipper.clip_()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        clipper.clip_()
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not on_device:
        pytest.skip("this machine's profiler sees no kernels")
    assert not [name for name in on_device if "emcpy" in name or "emset" in name]
    assert len(on_device) == count, on_device


@needs_gpu
def test_memory_of_a_call(backend):
    """Results, and no more than partial sums beside them."""
    params = parameters([(4000, 1000), (33,)])
    clipper = ComponentClipper(params, 0.1, backend=backend)
    clipper.clip_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = clipper.clip_()
    assert torch.cuda.max_memory_allocated() - before <= 16 * 1024
    assert torch.cuda.memory_allocated() - before <= 4 * 512
    del result


@needs_gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_component_over_two_devices_has_one_norm(backend):
    params = [torch.nn.Parameter(torch.zeros(1000, 10, device=torch.device("cuda", index % 2))) for index in range(4)]
    for p in params:
        p.grad = torch.randn_like(p)
    expected = float64_norm([p.grad for p in params])
    assert torch.cuda.current_device() == 0
    norms = fused_component_clip_(params, 0.5, components="all", backend=backend)
    assert norms.tolist() == pytest.approx([expected.item()])
    assert float64_norm([p.grad for p in params]).item() == pytest.approx(0.5, rel=1e-5)
    check_second = params[1::2]
    fused_component_clip_(check_second, 0.1, backend=backend)
    assert all(p.grad.norm().item() == pytest.approx(0.1, rel=1e-4) for p in check_second)
    assert torch.cuda.current_device() == 0
    assert torch.zeros(1, device="cuda").device.index == 0
    with torch.cuda.device(1):
        fused_component_clip_(params, 0.01, backend=backend)
        fused_component_clip_(params[::2], 0.001, backend=backend)
        assert torch.cuda.current_device() == 1
        assert torch.zeros(1, device="cuda").device.index == 1


@needs_gpu
def test_a_compiled_step(backend):
    params = parameters([(300, 200), (33,)])
    expected = copy_of(params)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step():
        return fused_component_clip_(params, 0.1, backend=backend)

    norms = step()
    reference = fused_component_clip_(expected, 0.1, backend="reference")
    assert_norms(norms, reference, torch.float32)
    assert_grads(params, expected, torch.float32)
