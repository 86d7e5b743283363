"""What goes wrong on one rank: the others decide alike, say the same, and never wait in vain."""

import json
import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from collectives import counted, everywhere
from cwclip_kernels import (
    ComponentClipGradScaler,
    ComponentClipper,
    component_norms,
    fused_component_clip_,
    thresholds,
)
from cwclip_kernels.telemetry import write_status_json
from helpers import random_grad, same_bits
from ranks import on_ranks
from sharded_tensors import full, model_with_gradients, plain, sharded
from side_by_side import wrap_fsdp2
from small_transformer import Model


@on_ranks(2, 4)
@pytest.mark.parametrize("components", ["parameter", "all"])
def test_a_rank_without_any_gradient_still_joins(components):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ours, wholes = model_with_gradients(mesh)
    clipper = ComponentClipper(ours, 0.1, components=components)
    last = dist.get_world_size() - 1
    kept = [full(p.grad) for _, p in ours]
    parts = [p.grad.to_local().clone() for _, p in ours]
    if dist.get_rank() == last:
        for _, p in ours:
            p.grad = None
    with counted() as counts:
        norms = clipper.clip_().norms
    assert counts == {"allreduce_": 1}
    held = everywhere([part.double().square().sum().item() for part in parts])
    squares = torch.tensor(held[:last]).sum(0)
    expected = squares.sqrt() if components == "parameter" else squares.sum().sqrt()[None]
    torch.testing.assert_close(norms.double(), expected.double(), rtol=1e-6, atol=0.0)
    assert all(n == norms.tolist() for n in everywhere(norms.tolist()))
    del kept, wholes


@on_ranks(2, 4)
def test_each_rank_without_another_gradient():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ours, _ = model_with_gradients(mesh)
    clipper = ComponentClipper(ours, 0.1)
    for step in range(4):
        for i, (_, p) in enumerate(ours):
            p.grad = None if (i + step + dist.get_rank()) % 3 == 0 else torch.ones_like(p)
        norms = clipper.clip_().norms
        assert all(n == norms.tolist() for n in everywhere(norms.tolist()))


@on_ranks(2, 4)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf"), float("-inf"), -1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_number_on_one_rank(norm_type, value):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ours, _ = model_with_gradients(mesh)
    last = dist.get_world_size() - 1
    before = [p.grad.to_local().clone() for _, p in ours]
    if dist.get_rank() == last:
        ours[2][1].grad.to_local()[0, 0] = value
        before[2][0, 0] = value
    shown = norm_type > 0 or value != value  # an inf is lost in a norm of negative order, and of the smallest
    for policy in ("error", "skip", "zero", "propagate"):
        for (_, p), b in zip(ours, before, strict=True):
            p.grad.to_local().copy_(b)
        clipper = ComponentClipper(ours, 0.1, norm_type, nonfinite=policy)
        if policy == "error":
            if shown:
                with pytest.raises(RuntimeError, match="non-finite for 1 of 3 components: 'c'") as caught:
                    clipper.clip_()
                assert len(set(everywhere(str(caught.value)))) == 1
                for (_, p), b in zip(ours, before, strict=True):
                    assert same_bits(p.grad.to_local(), b)
            continue
        norms = clipper.clip_().norms
        assert norms.isfinite().tolist() == [True, True, not shown]
        if not shown:
            continue
        part = ours[2][1].grad.to_local()
        if policy == "skip":
            assert same_bits(part, before[2])
        elif policy == "zero":
            assert (part == 0).all()
        elif value != value:
            assert part.isnan().all()


@on_ranks(4)
def test_a_bad_number_in_one_group_stops_all_ranks_alike():
    """Experts of two groups, replicas of two: those who don't hold the bad component hear of it, by name."""
    dense = init_device_mesh("cpu", (4,))
    experts = init_device_mesh("cpu", (2, 2))
    wholes = [random_grad((8, 3)), random_grad((8, 3))]
    parameters = [
        ("dense", sharded(wholes[0], dense, [Shard(0)])),
        ("experts", sharded(wholes[1], experts, [Replicate(), Shard(0)])),
    ]
    if dist.get_rank() == 3:
        parameters[1][1].grad.to_local()[0, 0] = float("nan")
    before = [p.grad.to_local().clone() for _, p in parameters]
    with pytest.raises(RuntimeError, match="non-finite for 1 of 2 components: 'experts'") as caught:
        fused_component_clip_(parameters, 0.1, error_if_nonfinite=True)
    assert len(set(everywhere(str(caught.value)))) == 1
    for (_, p), b in zip(parameters, before, strict=True):
        assert same_bits(p.grad.to_local(), b)
    found = torch.zeros(())
    with counted() as counts:
        fused_component_clip_(parameters, 0.1, inv_scale=0.5, found_inf=found)
    assert found == 1
    assert counts == {"allreduce_": 3}  # two for the sums; all ranks are asked at once


@on_ranks(2)
def test_a_bad_number_in_one_stage_stops_all_stages():
    name = f"layers.{dist.get_rank()}.weight"
    grad = torch.full((3,), float("nan") if dist.get_rank() == 1 else 1.0)
    with pytest.raises(RuntimeError, match=r"non-finite for 1 of 2 components: 'layers.1.weight'") as caught:
        fused_component_clip_([(name, plain(grad))], 0.1, error_if_nonfinite=True, pp_mesh=dist.group.WORLD)
    assert len(set(everywhere(str(caught.value)))) == 1
    found = torch.zeros(())
    fused_component_clip_([(name, plain(grad))], 0.1, found_inf=found, pp_mesh=dist.group.WORLD)
    assert found == 1


@on_ranks(2, 4)
@pytest.mark.parametrize("norm_type", [2.0, 3.0])
def test_a_scaled_loss_is_skipped_on_all_ranks(norm_type):
    """An inf on one rank: every rank's scaler skips the step and backs off alike."""
    model = Model()
    wrap_fsdp2(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = ComponentClipGradScaler(ComponentClipper(model, 0.1, norm_type), device="cpu", init_scale=256.0)
    before = [p.to_local().clone() for p in model.parameters()]
    scaler.scale(model(torch.arange(7)[None]).square().sum()).backward()
    if dist.get_rank() == 0:
        model.head.weight.grad.to_local()[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(same_bits(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True))
    assert everywhere(scaler.get_scale()) == [128.0] * dist.get_world_size()
    optimizer.zero_grad()
    scaler.scale(model(torch.arange(7)[None]).square().sum()).backward()
    if dist.get_rank() == 0:
        optimizer.zero_grad()  # a rank without any gradient joins all the same
    scaler.step(optimizer)
    assert dist.get_rank() == 0 or not all(
        same_bits(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True)
    )


@on_ranks(2, 4)
@pytest.mark.parametrize("policy", ["propagate", "error"])
def test_a_rank_whose_gradient_cannot_be_clipped_keeps_nobody_waiting(policy):
    """It says what is wrong; the others see NaN, in time."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ours, _ = model_with_gradients(mesh)
    clipper = ComponentClipper(ours, 0.1, nonfinite=policy)
    before = [p.grad.to_local().clone() for _, p in ours]
    if dist.get_rank() == 0:
        ours[1][1].grad._local_tensor = torch.ones(1, 1).expand(before[1].shape)
        with pytest.raises(ValueError, match=r"gradient of 'b' has several elements on one place"):
            clipper.clip_()
        assert same_bits(ours[0][1].grad.to_local(), before[0])
    elif policy == "error":
        with pytest.raises(RuntimeError, match=r"non-finite for 3 of 3 components"):
            clipper.clip_()
        assert all(same_bits(p.grad.to_local(), b) for (_, p), b in zip(ours, before, strict=True))
    else:
        assert clipper.clip_().norms.isnan().all()


@on_ranks(2)
def test_at_the_step_sharded_parameters_of_several_optimizers():
    model = Model()
    wrap_fsdp2(model, init_device_mesh("cpu", (2,)))
    clipper = ComponentClipper(model, 0.1)
    heads = [p for n, p in model.named_parameters() if n.startswith("head")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("head")]
    optimizers = [torch.optim.SGD(heads, lr=0.1), torch.optim.SGD(rest, lr=0.1)]
    handles = [clipper.attach(optimizer) for optimizer in optimizers]
    model(torch.arange(7)[None]).square().sum().backward()
    expected = component_norms(model)
    with counted() as counts:
        for optimizer in optimizers:
            optimizer.step()
    assert counts == {"allreduce_": 2}
    torch.testing.assert_close(sum(h.last.norms for h in handles), expected, rtol=1e-6, atol=0.0)
    assert (component_norms(model) <= 0.1).all()


@on_ranks(2)
def test_a_status_file_of_sharded_parameters(tmp_path):
    whole, model = Model(), Model()
    model.load_state_dict(whole.state_dict())
    wrap_fsdp2(model, init_device_mesh("cpu", (2,)))
    found = []
    for m, folder in ((whole, tmp_path / f"whole{dist.get_rank()}"), (model, tmp_path / "sharded")):
        m(torch.arange(7)[None]).square().sum().backward()
        found.append(write_status_json(folder, 20, m, ComponentClipper(m, 0.1).clip_()))
    dist.barrier()
    one, two = (json.loads(file.read_text()) for file in found)
    assert one.keys() == two.keys()
    for name in one.keys() - {"step"}:
        assert one[name].pop("shape") == two[name].pop("shape")
        assert one[name] == pytest.approx(two[name], rel=1e-6, abs=1e-12), name


@on_ranks(2, 4)
@pytest.mark.parametrize("argument", ["process_group", "pp_mesh"])
def test_a_rank_without_any_gradient_joins_without_dtensors_too(argument):
    rank, size = dist.get_rank(), dist.get_world_size()
    name = "w" if argument == "process_group" else f"layers.{rank}.w"
    parameter = plain(torch.full((3,), float(rank)))
    if rank == 0:
        parameter.grad = None
    clipper = ComponentClipper([(name, parameter)], 1e9, components="type", **{argument: dist.group.WORLD})
    with counted() as counts:
        result = clipper.clip_()
    assert counts == {"allreduce_": 1}
    assert len(result.names) == 1
    expected = math.sqrt(3 * sum(r * r for r in range(1, size)))
    assert everywhere(result.norms.item()) == pytest.approx([expected] * size, rel=1e-6)
    assert everywhere(clipper.total_norm(result.norms).item()) == pytest.approx([expected] * size, rel=1e-6)


@on_ranks(4)
def test_policies_over_stages_stay_equal_where_they_share_components():
    """Two stages of two replicas: the state of what spans them is the same on all four."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh["pp"].get_local_rank()
    whole = random_grad((8, 3))
    parameter = sharded(whole, mesh["dp"], [Shard(0)])
    policy = thresholds.ZScore(warmup_steps=2)
    clipper = ComponentClipper([(f"layers.{stage}.w", parameter)], policy, components="type", pp_mesh=mesh["pp"])
    for step in range(5):
        parameter.grad = sharded(whole * (1 + step) * (1 + stage), mesh["dp"], [Shard(0)]).grad
        clipper.clip_()
    states = everywhere({name: tensor.tolist() for name, tensor in policy.state_dict()["tensors"].items()})
    assert all(state == states[0] for state in states)
