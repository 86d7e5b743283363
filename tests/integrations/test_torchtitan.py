"""torchtitan's call: its signature, the total norm that it returns, pipeline stages, meshes side by side."""

import ast
import importlib.util
import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from collectives import counted
from cwclip_kernels import fused_component_clip_
from cwclip_kernels.integrations.torchtitan import clip_grad_norm_
from helpers import assert_grads, copy_of, grads_of, parameters, same_bits
from ranks import on_ranks

SHAPES = [(3, 4), (7,), (), (2, 5, 2)]


def test_signature_is_the_one_of_torchtitan():
    shown = [p for p in inspect.signature(clip_grad_norm_).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in shown] == [
        ("parameters", inspect.Parameter.empty),
        ("max_norm", inspect.Parameter.empty),
        ("norm_type", 2.0),
        ("error_if_nonfinite", False),
        ("foreach", None),
        ("pp_mesh", None),
        ("ep_enabled", False),
    ]


def test_signature_is_the_one_of_an_installed_torchtitan():
    found = importlib.util.find_spec("torchtitan")
    if found is None:
        pytest.skip("no torchtitan")
    source = Path(found.submodule_search_locations[0]) / "distributed" / "utils.py"  # imports much: read, not run
    (theirs,) = (
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "clip_grad_norm_"
    )
    names = [argument.arg for argument in theirs.args.args]
    defaults = [ast.literal_eval(default) for default in theirs.args.defaults]
    ours = inspect.signature(clip_grad_norm_).parameters.values()
    positional = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert not theirs.args.kwonlyargs
    assert [p.name for p in positional] == names
    assert [p.default for p in positional if p.default is not p.empty] == defaults


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf, "inf"])
def test_each_parameter_is_clipped_and_the_total_returned(norm_type):
    ours = parameters(SHAPES)
    ours.append(nn.Parameter(torch.zeros(3)))  # without gradient
    theirs = copy_of(ours)
    norm = clip_grad_norm_(iter(ours), 0.5, norm_type, foreach=True)
    expected = torch.nn.utils.get_total_norm([p.grad for p in theirs if p.grad is not None], norm_type)
    for p in theirs:
        torch.nn.utils.clip_grad_norm_(p, 0.5, norm_type)
    assert norm.shape == ()
    torch.testing.assert_close(norm, expected)
    assert_grads(ours, theirs, torch.float32)


def test_a_single_tensor_and_none_at_all():
    (p,) = parameters([(3, 4)])
    expected = p.grad.norm()
    torch.testing.assert_close(clip_grad_norm_(p, 0.5), expected)
    assert clip_grad_norm_([], 0.5).item() == 0.0


# What torchtitan decides by them changes nothing here.
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("ep_enabled", [True, False])
def test_what_has_nothing_to_decide(foreach, ep_enabled):
    ours = parameters(SHAPES)
    theirs = copy_of(ours)
    norm = clip_grad_norm_(ours, 0.5, foreach=foreach, pp_mesh=None, ep_enabled=ep_enabled)
    assert torch.equal(norm, clip_grad_norm_(theirs, 0.5))
    assert all(map(same_bits, grads_of(ours), grads_of(theirs)))


def test_nothing_is_taken_for_something_else():
    with pytest.raises(TypeError, match="foreach: expected a bool or None, not str"):
        clip_grad_norm_(parameters(SHAPES), 0.5, foreach="no")
    with pytest.raises(TypeError, match="ep_enabled: expected a bool, not NoneType"):
        clip_grad_norm_(parameters(SHAPES), 0.5, ep_enabled=None)
    with pytest.raises(TypeError, match="pp_mesh: expected a ProcessGroup or a DeviceMesh"):
        clip_grad_norm_(parameters(SHAPES), 0.5, pp_mesh="pp")
    with pytest.raises(TypeError, match="unexpected keyword argument 'component'; the options are components"):
        clip_grad_norm_(parameters(SHAPES), 0.5, component="all")


def test_eps():
    ours = parameters(SHAPES)
    theirs = copy_of(ours)
    clip_grad_norm_(ours, 0.5, eps=0.1)
    fused_component_clip_(theirs, 0.5, eps=0.1)
    assert all(map(same_bits, grads_of(ours), grads_of(theirs)))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nonfinite_norms(bad):
    ours = parameters(SHAPES)
    ours[1].grad[2] = bad
    before = copy_of(ours)
    with pytest.raises(RuntimeError, match="'1'"):
        clip_grad_norm_(ours, 0.5, error_if_nonfinite=True)
    assert all(map(same_bits, grads_of(ours), grads_of(before)))
    norm = clip_grad_norm_(ours, 0.5)
    assert norm.isinf() if math.isinf(bad) else norm.isnan()
    for i in (0, 2, 3):
        assert ours[i].grad.isfinite().all()


def test_components_of_the_callers_choice():
    ours = parameters(SHAPES)
    theirs = copy_of(ours)
    norm = clip_grad_norm_(ours, 0.5, components="all")
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 0.5))
    assert_grads(ours, theirs, torch.float32)


# ------------------------------------------------------------------------------------------------------------
# Several ranks
# ------------------------------------------------------------------------------------------------------------


def on_cpu(shapes):
    """Parameters with gradients, where the ranks of the tests are."""
    made = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape)
    return made


class Stage(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(width, width + 3)
        self.second = nn.Linear(width + 3, width)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@on_ranks(4)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_total_over_stages_of_sharded_parameters(norm_type):
    """Two stages of other widths, each over two ranks: no stage knows the other's parameters."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    plain = [Stage(5), Stage(6)]
    for stage in plain:
        stage(torch.randn(4, stage.first.in_features)).square().sum().backward()
    expected = torch.nn.utils.get_total_norm([p.grad for stage in plain for p in stage.parameters()], norm_type)
    mine = plain[mesh["pp"].get_local_rank()]
    sharded = Stage(mine.first.in_features)
    sharded.load_state_dict(mine.state_dict())
    fully_shard(sharded, mesh=mesh["dp"])
    for step in range(2):
        for p, q in zip(sharded.parameters(), mine.parameters(), strict=True):
            p.grad = distribute_tensor(q.grad, mesh["dp"], p.placements)
        with counted() as counts:  # a mesh that was asked for anew is none to be set up anew
            norm = clip_grad_norm_(list(sharded.parameters()), 0.1, norm_type, foreach=True, pp_mesh=mesh["pp"])
        if step:
            assert counts == {"allreduce_": 2}, counts  # of the norms over shards, and of the total over stages
        assert type(norm) is torch.Tensor
        torch.testing.assert_close(norm, expected)
    fused_component_clip_(mine, 0.1, norm_type)
    for p, q in zip(sharded.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(full(p.grad), q.grad)


@on_ranks(4)
def test_experts_on_a_mesh_of_their_own():
    """As torchtitan lays them out: experts over expert and data parallelism, the rest over data parallelism alone."""
    dense = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    sparse = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    layouts = [(dense, [Shard(0)]), (sparse, [Shard(1), Shard(0)]), (dense, [Replicate()]), (sparse, [Shard(0)] * 2)]
    plain = on_cpu([(6, 3), (4, 5, 3), (3,), (8, 2)])
    sharded = []
    for p, (mesh, placements) in zip(plain, layouts, strict=True):
        q = nn.Parameter(distribute_tensor(p.detach(), mesh, placements))
        q.grad = distribute_tensor(p.grad.clone(), mesh, placements)
        sharded.append(q)
    norm = clip_grad_norm_(sharded, 0.5, foreach=True, ep_enabled=True)
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm([p.grad for p in plain]))
    fused_component_clip_(plain, 0.5)
    for p, q in zip(sharded, plain, strict=True):
        torch.testing.assert_close(full(p.grad), q.grad)


@on_ranks(2)
def test_error_on_all_stages():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    stage = on_cpu([(3, 4), (5,)])
    if dist.get_rank() == 1:
        stage[0].grad[0, 0] = math.nan
    before = [p.grad.clone() for p in stage]
    with pytest.raises(RuntimeError, match="'0'"):
        clip_grad_norm_(stage, 0.5, error_if_nonfinite=True, pp_mesh=mesh)
    assert all(same_bits(p.grad, grad) for p, grad in zip(stage, before, strict=True))
