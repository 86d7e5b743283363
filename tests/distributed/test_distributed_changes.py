"""What happens to a sharded model between two steps: moved, converted, partly frozen."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cwclip_kernels import ComponentClipper, ComponentSpec, component_norms, fused_component_clip_, thresholds
from ranks import on_ranks


def made(*, frozen=()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    for name, p in model.named_parameters():
        p.requires_grad_(name.partition(".")[0] not in frozen)
    return model


def sharded(**options):
    model = made(**options)
    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def set_gradients(model):
    torch.manual_seed(1)
    for p in model.parameters():
        full = torch.randn(p.shape, dtype=p.dtype)
        p.grad = distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full


def backward(model):
    model.zero_grad()
    torch.manual_seed(1)
    dtype = next(model.parameters()).dtype
    model(torch.randn(4, 6, dtype=dtype)).square().sum().backward()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same(model, plain):
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-4, atol=1e-7)


CAPS = {
    "number": lambda: 0.05,
    "ParamRelative": thresholds.ParamRelative,
    "FromGlobal": lambda: thresholds.FromGlobal(0.5, "numel"),
    "EMA": lambda: thresholds.EMA(warmup_steps=0),
}


@on_ranks(2)
def test_a_sharded_model_can_still_be_moved_and_converted():
    """pytorch #187008, #186796: DTensors are swapped, which those with a weak reference can't be."""
    for kind, cap in CAPS.items():
        model, plain = sharded(), made()
        clippers = [ComponentClipper(m, cap()) for m in (model, plain)]
        functions = [cap() for _ in range(2)]
        backward(model)  # from here on FSDP itself can't run the model in another dtype
        for dtype in (torch.float32, torch.float64, torch.float32):
            for i, m in enumerate((model, plain)):
                m.zero_grad()
                m.to(dtype)
                set_gradients(m)
                norms = component_norms(m)
                assert norms.dtype == dtype, kind
                fused_component_clip_(m, functions[i])
                set_gradients(m)
                assert clippers[i].clip_().norms.dtype == dtype, kind
            assert_same(model, plain)
        model.cpu()
        model.to_empty(device="cpu")


@on_ranks(2)
def test_frozen_parameters_of_a_sharded_model():
    for cap in CAPS.values():
        model, plain = sharded(frozen=("1",)), made(frozen=("1",))
        clippers = [ComponentClipper(m, cap()) for m in (model, plain)]
        for frozen in ("1", "0", None, "2"):
            for i, m in enumerate((model, plain)):
                for name, p in m.named_parameters():
                    p.requires_grad_(name.partition(".")[0] != frozen)
                backward(m)
                clippers[i].clip_()
            assert_same(model, plain)


@on_ranks(2)
def test_what_is_frozen_and_unsharded_is_nobody_elses_business():
    """Each rank with frozen parameters of its own, of a kind that is refused where it is trained."""
    model = sharded()
    rank = dist.get_rank()
    pairs = list(model.named_parameters())
    pairs += [
        (f"base.{rank}.{i}", nn.Parameter(torch.zeros(7, 1, dtype=torch.uint8), False)) for i in range(rank + 1)
    ]
    pairs += [(f"wide.{rank}", nn.Parameter(torch.zeros(3, dtype=torch.float64), False))]
    for cap in CAPS.values():
        backward(model)
        plain = made()
        backward(plain)
        norms = fused_component_clip_(pairs, cap())
        assert norms.dtype == torch.float32
        fused_component_clip_(plain, cap())
        assert_same(model, plain)


@on_ranks(2)
def test_a_frozen_placement_that_cant_be_clipped():
    """Refused as soon as it has a gradient, on all ranks; not before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    trained = nn.Parameter(DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)]))
    odd = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]), requires_grad=False)
    pairs = [("trained", trained), ("odd", odd)]
    clipper = ComponentClipper(pairs, 1.0, components=ComponentSpec().unitwise("trained"))
    trained.grad = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)])
    torch.testing.assert_close(clipper.clip_().norms[:4], torch.full((4,), 3**0.5))
    odd.requires_grad_(True)
    odd.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    before = trained.grad.to_local().clone()
    with pytest.raises(ValueError, match="'odd', which was frozen"):
        clipper.clip_()
    assert torch.equal(trained.grad.to_local(), before)


@on_ranks(2)
def test_what_is_frozen_beside_parts():
    """FullyShardedDataParallel, told to ignore what is frozen: refused where it has a gradient, not before."""
    for kind, cap in CAPS.items():
        model, plain = made(frozen=("1",)), made(frozen=("1",))
        model = FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            use_orig_params=True,
            ignored_states=[p for p in model.parameters() if not p.requires_grad],
        )
        clipper = ComponentClipper(model, cap(), process_group=model.process_group)
        expected = ComponentClipper(plain, cap())
        for _ in range(3):
            for m in (model, plain):
                backward(m)
            ours, theirs = clipper.clip_(), expected.clip_()
            theirs = dict(zip(theirs.names, zip(theirs.norms, theirs.coefs, strict=True), strict=True))
            for name, norm, coef in zip(ours.names, ours.norms, ours.coefs, strict=True):
                torch.testing.assert_close((norm, coef), theirs[name], rtol=1e-4, atol=1e-6, msg=f"{kind} {name}")
        ignored = next(p for n, p in model.named_parameters() if "1." in n)
        ignored.requires_grad_(True)
        ignored.grad = torch.ones_like(ignored)
        with pytest.raises(ValueError, match="which was frozen when components were looked up: .* ignore"):
            clipper.clip_()


@on_ranks(2)
def test_ids_that_are_reused_on_one_rank_alone():
    """The function's cache goes by ids; what one rank finds in it by chance, the other doesn't."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    kept = []
    for _ in range(6):
        parameter = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
        if dist.get_rank() == 1:
            kept.append(parameter)
        parameter.grad = distribute_tensor(torch.ones(8), mesh, [Shard(0)])
        for _ in range(2):
            norms = fused_component_clip_([parameter], 100.0)
        torch.testing.assert_close(norms, torch.full((1,), 8.0**0.5))
        del parameter


@on_ranks(2)
def test_a_dtensor_gradient_that_is_a_parameter():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for make in (nn.Parameter, lambda tensor: tensor.requires_grad_()):
        parameter = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
        parameter.grad = make(distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
        before = parameter.grad.to_local().detach().clone()
        with pytest.raises(ValueError, match="is itself a parameter"):
            fused_component_clip_([parameter], 0.1)
        assert torch.equal(parameter.grad.to_local(), before)
        torch.testing.assert_close(component_norms([parameter]), torch.full((1,), 8.0**0.5))
