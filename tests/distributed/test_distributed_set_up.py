"""What ranks find out before the first step: whether they mean the same, and what can't be clipped so."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from collectives import everywhere
from cwclip_kernels import ComponentClipper, clip_in_backward, component_norms, fused_component_clip_
from helpers import random_grad
from ranks import on_ranks
from sharded_tensors import model_with_gradients, sharded
from side_by_side import wrap_fsdp2
from small_transformer import Model


@on_ranks(2, 4)
@pytest.mark.parametrize("difference", ["component", "parameter", "order", "shape"])
def test_ranks_that_mean_different_components_are_told_at_set_up(difference):
    """By name, all of them the same, and not by waiting for each other."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    odd = dist.get_rank() == dist.get_world_size() - 1
    ours, _ = model_with_gradients(mesh)
    components = "parameter"
    if odd and difference == "component":
        components = lambda name, _: "head" if name == "c" else name  # noqa: E731
    if odd and difference == "parameter":
        ours = ours[:2]
    if odd and difference == "order":
        ours = ours[::-1]
    if odd and difference == "shape":
        ours[1] = "b", sharded(random_grad((6, 3)), mesh, [Shard(0)])
    last = dist.get_world_size() - 1
    message = {
        "component": rf"only rank 0 has 'c', only rank {last} has 'head'",
        "parameter": r"only rank 0 has 'c'",
        "order": r"another order \('a' and 'c' at place 0\)",
        "shape": rf"'b' is \(b \[5, 3\] S\(0\)\) on rank 0, but \(b \[6, 3\] S\(0\)\) on rank {last}",
    }[difference]
    for attempt in (
        lambda: ComponentClipper(ours, 0.1, components=components),
        lambda: fused_component_clip_(ours, 0.1, components=components),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            attempt()
        assert len(set(everywhere(str(caught.value)))) == 1


@on_ranks(2, 4)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"norm_type": 1.0}),
        ({}, {"nonfinite": "skip"}),
        ({}, {"max_norm": 0.2}),
        ({}, {"max_norm": {"a": 0.1}}),
    ],
)
def test_ranks_that_choose_otherwise_are_told_at_set_up(one, other):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ours, _ = model_with_gradients(mesh)
    chosen = {"max_norm": 0.1, **(other if dist.get_rank() == 1 else one)}
    for attempt in (ComponentClipper, fused_component_clip_):
        with pytest.raises(
            ValueError, match="arguments differ between ranks: .* on rank 0, but .* on rank 1"
        ) as caught:
            attempt(ours, **chosen)
        assert len(set(everywhere(str(caught.value)))) == 1


@on_ranks(4)
@pytest.mark.parametrize("placements", [[Replicate(), Shard(0)], [Replicate(), Replicate()]])
def test_replicas_that_mean_different_components_are_told_too(placements):
    """They share no sum with the odd one; rank 3 is two groups away from rank 0."""
    mesh = init_device_mesh("cpu", (2, 2))
    ours, _ = model_with_gradients(mesh, [placements] * 3)
    components = "all" if dist.get_rank() == 3 else "parameter"
    with pytest.raises(
        ValueError, match="ranks 0 and 3 .*only rank 0 has 'a', 'b', 'c', only rank 3 has 'all'"
    ) as caught:
        ComponentClipper(ours, 0.1, components=components)
    assert len(set(everywhere(str(caught.value)))) == 1


@on_ranks(4)
@pytest.mark.parametrize("odd", [(3,), (1, 2), (0, 1)])
def test_an_order_that_differs_on_a_mesh_of_two_dimensions_is_told(odd):
    """Whichever groups come first in it, all ranks compare along the same dimension first."""
    mesh = init_device_mesh("cpu", (2, 2))
    ours, _ = model_with_gradients(mesh, [[Shard(0), Replicate()], [Replicate(), Shard(0)], [Shard(0), Shard(0)]])
    if dist.get_rank() in odd:
        ours = ours[::-1]
    with pytest.raises(ValueError, match="another order") as caught:
        ComponentClipper(ours, 0.1)
    assert len(set(everywhere(str(caught.value)))) == 1


@on_ranks(4)
def test_other_stages_hear_of_a_stage_that_disagrees():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = mesh["pp"].get_local_rank()
    parameters = [(f"{stage}.{n}", sharded(random_grad((4,)), mesh["dp"], [Shard(0)])) for n in "ab"]
    if dist.get_rank() == 3:
        parameters.pop()
    with pytest.raises(ValueError, match=r"ranks 2 and 3 don't have the same: only rank 2 has '1.b'"):
        ComponentClipper(parameters, 0.1, pp_mesh=mesh["pp"])


@on_ranks(4)
def test_what_one_rank_finds_wrong_all_ranks_hear():
    """Cut unevenly by hand: what the first rank has is as it should be."""
    mesh = init_device_mesh("cpu", (4,))
    local = torch.ones(3 if dist.get_rank() == 0 else 2, 2)
    whole = DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size((9, 2)), stride=(2, 1))
    where = "^on rank 1: " if dist.get_rank() == 0 else "^"
    with pytest.raises(ValueError, match=where + r"parameters: this rank should hold .* sharded unevenly by hand"):
        ComponentClipper([("w", nn.Parameter(whole))], 0.1)


@on_ranks(2)
def test_a_model_that_is_not_resharded_is_refused():
    """After a forward pass without a backward pass the root has parameters that never get a gradient."""
    model = Model()
    wrap_fsdp2(model, init_device_mesh("cpu", (2,)))
    with torch.no_grad():
        model(torch.arange(7)[None])
    with pytest.raises(ValueError, match=r"module '' still has the whole parameters .* call reshard\(\) on it first"):
        ComponentClipper(model, 0.1)
    model.reshard()
    clipper = ComponentClipper(model, 1e-3)
    model(torch.arange(7)[None]).square().sum().backward()
    assert (clipper.clip_().norms > 0).all()
    assert (component_norms(model) <= 1e-3).all()


@on_ranks(2)
def test_clipping_in_backward_is_refused_where_parameters_are_sharded():
    model = Model()
    wrap_fsdp2(model, init_device_mesh("cpu", (2,)))
    for parameters in (model, list(model.parameters()), model.named_parameters()):
        with pytest.raises(ValueError, match=r"is a DTensor.* ComponentClipper.attach\(optimizer\)"):
            clip_in_backward(parameters, 0.1)


@on_ranks(2)
def test_compiled_functions_leave_ranks_alone():
    mesh = init_device_mesh("cpu", (2,))
    parameters = [("w", sharded(random_grad((4,)), mesh, [Shard(0)]))]
    clipper = ComponentClipper(parameters, 0.1)
    with pytest.raises(Exception, match="sharded over ranks can't be clipped in a compiled function"):
        torch.compile(lambda: clipper.clip_(), fullgraph=True, backend="eager")()


def test_nobody_is_asked_in_a_single_process():
    model = nn.Linear(2, 2)
    assert ComponentClipper(model, 0.1)._session.reductions is None
    with pytest.raises(TypeError, match=re.escape("process_group: expected a ProcessGroup")):
        ComponentClipper(model, 0.1, process_group="world")
