"""Backward passes that consist of several graph tasks, and those that can't be clipped in at all."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cwclip_kernels import clip_in_backward, fused_component_clip_, thresholds
from helpers import DEVICE, same_bits
from tied_model import CAP

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")


def segment(module, x, reentrant):
    return checkpoint(module, x, use_reentrant=reentrant)


def by_segments(model, x, reentrant):
    for block in model:
        x = segment(block, x, reentrant)
    return x


def first_outside(model, x, reentrant):
    """The first gradient arises in the outermost graph task."""
    return model[5](by_segments(model[:5], x, reentrant))


def nested(model, x, reentrant):
    def halves(part, x):
        if len(part) == 1:
            return part[0](x)
        middle = len(part) // 2
        return halves(part[middle:], segment(lambda x: halves(part[:middle], x), x, reentrant))

    return segment(lambda x: halves(model, x), x, reentrant)


def nested_alone(model, x, reentrant):
    """Graph tasks that have no gradient of their own, but those within them do."""
    for block in model:
        x = segment(lambda x, block=block: segment(block, x, reentrant) * 1.0, x, reentrant)
    return x


def whole(model, x, reentrant):
    return segment(model, x, reentrant)


def alternating(model, x, reentrant):
    for i, block in enumerate(model):
        x = segment(block, x, reentrant) if i % 2 else block(x)
    return x


WAYS = (by_segments, first_outside, nested, nested_alone, whole, alternating)


def blocks():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6))).to(DEVICE)
    return model, copy.deepcopy(model)


def inputs():
    return torch.randn(3, 4, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_one_pass_is_one_step(way, reentrant, stepped):
    model, twin = blocks()
    counter = thresholds.Schedule(lambda step: CAP / (1 + step))
    seen = []
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    handle = clip_in_backward(model, counter, optimizer=ours if stepped else None, on_clip=seen.append)
    for step in range(3):
        x = inputs()
        way(model, x, reentrant).square().sum().backward()
        by_segments(twin, x, False).square().sum().backward()
        norms = fused_component_clip_(twin, CAP / (1 + step))
        assert counter.host_state() == {"step": step + 1}
        assert len(seen) == step + 1
        assert handle.last is seen[-1]
        assert handle.last.caps.item() == CAP / (1 + step)
        assert same_bits(handle.last.norms, norms)
        assert (handle.last.norms > 0).all()
        if not stepped:
            assert all(same_bits(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
            ours.step()
        theirs.step()
        for m in (model, twin):
            m.zero_grad()
            assert all(p.grad is None for p in m.parameters())
        assert all(same_bits(p.data, q.data) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("way", [by_segments, nested])
def test_caps_of_parameters_are_those_before_they_are_stepped(way):
    model, _ = blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = clip_in_backward(model, thresholds.ParamRelative(0.1), optimizer=optimizer)
    for _ in range(2):
        before = [p.detach().norm().item() for p in model.parameters()]
        (way(model, inputs(), True) * 100).sum().backward()
        assert handle.last.caps.tolist() == pytest.approx([0.1 * norm for norm in before])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", [0, 3, 5])
def test_a_pass_that_fails_is_forgotten(way, where):
    model, twin = blocks()
    counter = thresholds.Schedule(lambda step: CAP)
    seen = []
    handle = clip_in_backward(model, counter, on_clip=seen.append)
    fails = True

    def fail(_):
        if fails:
            raise ZeroDivisionError

    model[where][0].weight.register_hook(fail)
    with pytest.raises(ZeroDivisionError) as kept:
        way(model, inputs(), True).square().sum().backward()
    assert (counter.host_state(), seen, handle.last) == ({"step": 0}, [], None)
    fails = False
    for _ in range(2):
        model.zero_grad()
        twin.zero_grad()
        x = inputs()
        way(model, x, True).square().sum().backward()
        by_segments(twin, x, False).square().sum().backward()
        norms = fused_component_clip_(twin, CAP)
        assert same_bits(handle.last.norms, norms)
    assert (counter.host_state(), len(seen)) == ({"step": 2}, 2)
    assert kept.type is ZeroDivisionError  # with its frames, it was alive all the time


def test_a_graph_that_is_kept_after_a_failure():
    """An inner graph task has ended, the outer node then fails, and the graph is used again."""
    fails = True

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, inner):
            ctx.inner = inner
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                ctx.inner().backward()
            if fails:
                raise ZeroDivisionError
            return grad, None

    a, b, outer = (nn.Parameter(torch.ones(n, device=DEVICE)) for n in (2, 4, 3))
    counter = thresholds.Schedule(lambda step: CAP)
    handle = clip_in_backward([a, b, outer], counter)
    inner = a
    y = Twice.apply(outer * 1.0, lambda: inner.sum()).sum()
    with pytest.raises(ZeroDivisionError):
        y.backward(retain_graph=True)
    fails, inner = False, b
    y.backward(retain_graph=True)
    assert counter.host_state() == {"step": 1}
    assert handle.last.norms.tolist() == pytest.approx([0.0, 2.0, 3**0.5])


@pytest.mark.parametrize("depth", [40, 70, 130])
def test_deep(depth):
    """Where 60 graph tasks lie within each other autograd takes another thread, and what is outside isn't known."""
    linear = nn.Linear(2, 2, bias=False).to(DEVICE)

    def deep(x, left):
        return segment(lambda x: deep(x, left - 1), x, True) * 1.0 if left else linear(x)

    counter = thresholds.Schedule(lambda step: CAP)
    handle = clip_in_backward(linear, counter)
    x = torch.randn(1, 2, device=DEVICE, requires_grad=True)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        if depth > 60:
            with pytest.raises(
                RuntimeError, match="a backward pass within another ended on a thread of its own.*attach"
            ):
                deep(x, depth).sum().backward()
        else:
            deep(x, depth).sum().backward()
    finally:
        sys.setrecursionlimit(limit)
    assert counter.host_state() == {"step": int(depth < 60)}
    assert (handle.last is not None) == (depth < 60)


@pytest.mark.parametrize("stepped", [False, True])
def test_a_parameter_of_two_segments_is_refused(stepped):
    """Its gradient comes in two parts, of which neither is what is to be clipped."""
    block = nn.Linear(4, 4, bias=False).to(DEVICE)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    seen = []
    clip_in_backward(block, CAP, optimizer=optimizer if stepped else None, on_clip=seen.append)
    with pytest.raises(RuntimeError, match=r"'weight' got a second gradient in one backward pass.*reentrant=False"):
        by_segments([block, block], inputs(), True).sum().backward()
    assert seen == []
    block.zero_grad()
    by_segments([block, block], inputs(), False).sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's tracing
def test_compiled_autograd_is_refused(stepped):
    from torch._dynamo import compiled_autograd

    model, twin = blocks()
    x = inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = clip_in_backward(model, CAP, optimizer=optimizer if stepped else None)
    with (
        compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(RuntimeError, match="under compiled autograd the end of the backward pass isn't known"),
    ):
        (model(x) * 1e3).square().sum().backward()
    assert handle.last is None
    assert all(same_bits(p.data, q.data) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    (twin(x) * 1e3).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.grad is not None:  # those that were there when the first hook said no
            torch.testing.assert_close(p.grad, q.grad)
    model.zero_grad()
    model(x).square().sum().backward()  # and without it all is well
    assert (handle.last.norms > 0).all()


def test_a_compiled_model_is_served():
    model, twin = blocks()
    x = inputs()
    seen = []
    clip_in_backward(model, CAP, on_clip=seen.append)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        compiled(x).square().sum().backward()
    twin(x).square().sum().backward()
    norms = fused_component_clip_(twin, CAP)
    assert len(seen) == 2
    torch.testing.assert_close(seen[-1].norms, norms)
    assert all(p.grad.norm() <= CAP * 1.001 for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_create_graph_is_refused_where_gradients_stay():
    """It adds to new tensors, so a second pass would add to a clipped gradient unnoticed."""
    model, twin = blocks()
    x = inputs()
    handle = clip_in_backward(model, CAP)
    with pytest.raises(RuntimeError, match=r"create_graph=True\) adds gradients to new tensors"):
        model(x).square().sum().backward(create_graph=True)
    assert handle.last is None
    twin(x).square().sum().backward()
    assert all(
        p.grad is None or same_bits(p.grad.detach(), q.grad)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


# ------------------------------------------------------------------------------------------------------------
# backward() in a hook
# ------------------------------------------------------------------------------------------------------------


def of_module(net, hook):
    net.register_full_backward_hook(hook)
    return net(inputs())


def before_module(net, hook):
    net.register_full_backward_pre_hook(hook)
    return net(inputs())


def of_node(net, hook):
    y = net(inputs())
    y.grad_fn.register_hook(hook)
    return y


def before_node(net, hook):
    y = net(inputs())
    y.grad_fn.register_prehook(hook)
    return y


def of_tensor(net, hook):
    y = net(inputs())
    y.register_hook(hook)
    return y


def of_parameter(net, hook):
    net[-1].weight.register_post_accumulate_grad_hook(hook)
    return net(inputs())


def of_checkpointed_module(net, hook):
    net.register_full_backward_hook(hook)
    return checkpoint(net, inputs(), use_reentrant=True)


HOOKS = (of_module, before_module, of_node, before_node, of_tensor, of_parameter, of_checkpointed_module)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("put", HOOKS)
def test_a_pass_in_a_hook_is_one_of_its_own(put, checkpointed, stepped):
    model = nn.Linear(4, 4).to(DEVICE)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).to(DEVICE)
    counter = thresholds.Schedule(lambda _: CAP)
    seen, called = [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = clip_in_backward(model, counter, optimizer=optimizer if stepped else None, on_clip=seen.append)

    def hook(*_):
        called.append(1)
        with torch.enable_grad():
            x = inputs()
            y = checkpoint(model, x, use_reentrant=True) if checkpointed else model(x)
            (y * 100).sum().backward()
        assert handle.last is seen[-1]
        model.zero_grad()

    loss = put(net, hook).sum()
    for i in range(3):
        loss.backward(retain_graph=True)
        assert len(called) == len(seen) == i + 1
        assert counter.state_dict()["host"] == {"step": i + 1}
        assert all(result.clipped.all() for result in seen)


@pytest.mark.parametrize("where", [(), (0,), (2,), (0, 2)])
def test_a_pass_in_a_hook_of_one_that_clips_too(where):
    """Both count, each with what it has found."""
    inner = nn.Linear(4, 4).to(DEVICE)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).to(DEVICE)
    outer = [net[i] for i in where]
    seen = []
    clip_in_backward(nn.ModuleList([inner, *outer]), CAP, on_clip=seen.append)

    def hook(*_):
        with torch.enable_grad():
            (inner(inputs()) * 100).sum().backward()

    net[1].register_full_backward_hook(hook)
    (net(inputs()) * 100).sum().backward()
    found = [(result.norms > 0).tolist() for result in seen]
    rest = [True, True] * len(outer)
    assert found == [[True, True, *[False] * len(rest)]] + ([[False, False, *rest]] if outer else [])


@pytest.mark.parametrize(
    "path", ["_C._current_graph_task_id", "_C._current_autograd_node", "autograd.graph._engine_run_backward"]
)
def test_another_torch_is_refused_by_name(path, monkeypatch):
    monkeypatch.delattr(f"torch.{path}")
    with pytest.raises(RuntimeError, match=f"isn't made for torch .* no torch.{path}.*attach"):
        clip_in_backward(nn.Linear(2, 2), CAP)
