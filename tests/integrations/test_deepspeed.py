"""``attach(engine, ...)`` under each of DeepSpeed's optimizers, beside a plain model and beside the definition."""

import math

import pytest
import torch
import torch.distributed as dist

from cwclip_kernels import ComponentClipper, ComponentSpec, thresholds
from helpers import NORM_TOLERANCE
from ranks import on_ranks

pytest.importorskip("deepspeed")

from collectives import counted
from cwclip_kernels.integrations.deepspeed import attach
from deepspeed_engines import (
    Model,
    backward,
    batch_of,
    engine_of,
    full_gradients,
    full_parameters,
    groups_of,
    loss_of,
    quiet,
    started,
    step_of,
    train,
    train_plain,
)

CAP = 0.1
CPU = {"offload_optimizer": {"device": "cpu"}}

# Stage, precision, more of ZeRO's configuration: each of DeepSpeed's optimizers, and ways to lay gradients out.
ENGINES = {
    "0": (0, "fp32", {}),
    "1": (1, "fp32", {}),
    "2": (2, "fp32", {}),
    "3": (3, "fp32", {}),
    "0-bf16": (0, "bf16", {}),
    "1-bf16": (1, "bf16", {}),
    "2-bf16": (2, "bf16", {}),
    "3-bf16": (3, "bf16", {}),
    "1-bf16-fp32": (1, "bf16-fp32", {}),
    "2-bf16-fp32": (2, "bf16-fp32", {}),
    "3-bf16-fp32": (3, "bf16-fp32", {}),
    "1-fp16": (1, "fp16", {}),
    "2-fp16": (2, "fp16", {}),
    "3-fp16": (3, "fp16", {}),
    "1-offload": (1, "fp32", CPU),
    "2-offload": (2, "bf16", CPU),
    "3-offload": (3, "bf16", CPU),
    "2-not-contiguous": (2, "fp32", {"contiguous_gradients": False}),
    "2-aligned": (2, "fp32", {"parameter_alignment": True}),
    "2-small-buckets": (2, "fp32", {"reduce_bucket_size": 40, "overlap_comm": True}),
    "2-all-reduce": (2, "bf16-fp32", {"reduce_scatter": False}),
    "3-sub-groups": (3, "fp32", {"sub_group_size": 40}),
}


def made(kind, lr=1.0, zero=None, **config):
    stage, precision, own = ENGINES[kind]
    torch.manual_seed(0)
    model = Model()
    return engine_of(model, torch.optim.SGD(groups_of(model), lr=lr), stage, precision, own | (zero or {}), **config)


@pytest.mark.parametrize("kind", ENGINES)
@on_ranks(1, 2)
def test_a_step_is_that_of_the_definition(kind):
    """Whatever the dtype: the optimizer sees coef * averaged gradient / loss scale, in float32."""
    check_steps(made(kind))


# Each stage, precision and layout once; CWCLIP_RANKS=4 has the others too.
@pytest.mark.parametrize(
    "kind",
    [
        *("0-bf16", "1", "1-bf16-fp32", "2", "2-fp16", "2-aligned", "2-small-buckets", "2-all-reduce"),
        *("3", "3-bf16", "3-offload", "3-sub-groups"),
    ],
)
@on_ranks(4)
def test_a_step_on_four_ranks(kind):
    """Some of which have no part of a parameter."""
    check_steps(made(kind))


# Ranks among which sequences are cut; and those that keep a second copy of ZeRO-3's parameters.
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("1", {"mesh_param": (2, 2)}),
        ("3", {"mesh_param": (2, 2)}),
        ("3", {"zero": {"zero_hpz_partition_size": 2}}),
    ],
)
@on_ranks(4)
def test_groups_within_all_ranks(kind, config):
    check_steps(made(kind, **config))


def check_steps(engine):
    for group in engine.basic_optimizer.param_groups:
        group["weight_decay"] = 0.0
    clipping = attach(engine, CAP)
    for step in range(2):
        backward(engine, step)
        scale = getattr(engine.optimizer, "loss_scale", None) or 1.0
        gradients = {n: None if g is None else g.double() / scale for n, g in full_gradients(engine).items()}
        before = full_parameters(engine)
        step_of(engine)
        after = full_parameters(engine)
        found = clipping.last.as_dict()
        for name, gradient in gradients.items():
            norm = 0.0 if gradient is None else gradient.norm().item()
            coef = min(1.0, CAP / (norm + 1e-6))
            assert found[name][0] == pytest.approx(norm, rel=NORM_TOLERANCE[torch.float32]), name
            assert found[name][1] == pytest.approx(coef, rel=1e-6), name
            moved = (before[name] - after[name]).double()
            expected = torch.zeros_like(moved) if gradient is None else coef * gradient
            torch.testing.assert_close(moved, expected.reshape(moved.shape), rtol=1e-5, atol=3e-7, msg=name)
        total = math.sqrt(sum(g.square().sum().item() for g in gradients.values() if g is not None))
        assert float(engine.get_global_grad_norm()) == pytest.approx(total, rel=1e-5)
    assert found["frozen.weight"] == (0.0, 1.0)
    assert found["unused.weight"] == (0.0, 1.0)
    assert sum(coef < 1 for _, coef in found.values()) > 5


# DeepSpeed's own functions that put parameters together are wrong under this, so that only the model can be compared.
ROUND_ROBIN = (2, "fp32", {"round_robin_gradients": True, "parameter_alignment": True})


@pytest.mark.parametrize("kind", ["0", "1", "2", "3", "3-sub-groups", "1-offload", "round-robin"])
@on_ranks(1, 2, 4)
def test_ten_steps_are_those_of_the_plain_model(kind):
    stage, precision, zero = ENGINES.get(kind, ROUND_ROBIN)
    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(groups_of(model), lr=1e-2) for model in models]
    engine = engine_of(models[0], optimizers[0], stage, precision, zero)
    clipping, clipper = attach(engine, CAP), ComponentClipper(models[1], CAP, backend="reference")
    assert clipping.names == clipper.names
    for step in range(10):
        train(engine, step)
        result = train_plain(models[1], optimizers[1], clipper, step)
        torch.testing.assert_close(clipping.last.norms, result.norms, rtol=2e-4, atol=1e-5)
        assert float(engine.get_global_grad_norm()) == pytest.approx(
            clipper.total_norm(result.norms).item(), rel=1e-4
        )
    whole = dict(models[0].named_parameters()) if kind == "round-robin" else full_parameters(engine)
    for name, parameter in models[1].named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(whole[name], parameter.detach(), rtol=1e-3, atol=2e-5, msg=name)


def by_thirds(name, parameter):
    """Leaves biases alone."""
    return None if name.endswith("bias") else name.split(".")[0]


GROUPINGS = {
    "module": "module",
    "layer": "layer",
    "type": "type",
    "all": "all",
    "callable": by_thirds,
    "split": ComponentSpec("parameter").split("layers.*.weight", sizes=(2, 5), names=("q", "k"), dim=0),
    "rows": ComponentSpec("parameter").unitwise("first.weight", dim=0),
}


# Stages that cut parameters otherwise; the other orders of norm, of which DeepSpeed's global norm isn't one, with
# one half of the groupings each.
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("kind", ["2", "3", "1-bf16-fp32"])
@on_ranks(2)
def test_components_are_those_of_the_plain_model(kind, norm_type):
    every_other = {1.0: slice(0, None, 2), 2.0: slice(None), math.inf: slice(1, None, 2)}
    for grouping in list(GROUPINGS.values())[every_other[norm_type]]:
        check_components(kind, norm_type, grouping)


def check_components(kind, norm_type, components):
    engine = made(kind)
    clipping = attach(engine, CAP, norm_type, components=components)
    plain = Model()
    clipper = ComponentClipper(plain, CAP, norm_type, components=components, backend="reference")
    assert clipping.names == clipper.names
    backward(engine, 0)
    gradients, before = full_gradients(engine), full_parameters(engine)
    for name, parameter in plain.named_parameters():
        gradient = gradients.get(name)
        parameter.grad = None if gradient is None else gradient.float().reshape(parameter.shape).clone()
    step_of(engine)
    result, after = clipper.clip_(), full_parameters(engine)
    torch.testing.assert_close(clipping.last.norms, result.norms, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(clipping.last.coefs, result.coefs, rtol=1e-5, atol=0.0)
    total = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values() if g is not None))
    assert float(engine.get_global_grad_norm()) == pytest.approx(total, rel=1e-5)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            decay = 0.01 * before[name] if parameter.ndim > 1 else 0.0
            moved = before[name] - after[name] - decay
            torch.testing.assert_close(moved, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["0-bf16", "1-fp16", "2-fp16", "3-fp16"])
@on_ranks(2)
def test_what_belongs_to_no_component_is_unscaled_all_the_same(kind):
    engine = made(kind)
    for group in engine.basic_optimizer.param_groups:
        group["weight_decay"] = 0.0
    attach(engine, CAP, components=by_thirds)
    if kind == "0-bf16":  # as fp16 there would be, which is refused
        engine.optimizer.loss_scale_config.cur_scale = 16.0
    backward(engine, 0)
    gradients, before = full_gradients(engine), full_parameters(engine)
    scale = engine.optimizer.loss_scale_config.cur_scale if kind == "0-bf16" else engine.optimizer.loss_scale
    assert scale > 1
    step_of(engine)
    after = full_parameters(engine)
    for name in ("first.bias", "norm.bias", "layers.1.bias", "head.bias"):
        moved = before[name] - after[name]
        torch.testing.assert_close(
            moved, (gradients[name].float() / scale).reshape(moved.shape), rtol=1e-5, atol=1e-6
        )
    if kind == "0-bf16":  # the norm is DeepSpeed's own
        return
    total = math.sqrt(sum((g.double() / scale).square().sum().item() for g in gradients.values() if g is not None))
    assert float(engine.get_global_grad_norm()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", ["0", "0-bf16"])
@on_ranks(1)
def test_the_global_norm_is_not_that_of_some_parameters(kind):
    """Where DeepSpeed measures none there is none."""
    engine = made(kind)
    attach(engine, CAP, components=by_thirds)
    backward(engine, 0)
    gradients = full_gradients(engine)
    step_of(engine)
    total = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values() if g is not None))
    assert engine.get_global_grad_norm() == (None if kind == "0" else pytest.approx(total, rel=1e-2))


@pytest.mark.parametrize("kind", ["1", "2", "3"])
@on_ranks(2, 4)
def test_one_all_reduce_of_k_numbers(kind):
    """And nothing gathered: what a step sends with clipping, beside what it sends with DeepSpeed's own norm."""
    engine = made(kind)
    sent = []
    for max_norm in (None, CAP, 1e9):
        clipping = None if max_norm is None else attach(engine, max_norm)
        train(engine, 0)
        backward(engine, 1)
        with counted() as counts:
            step_of(engine)
        sent.append(dict(counts))
        if clipping is not None:
            clipping.remove()
    assert "one all-reduce of 14 sums over" in clipping.explain()
    own = sent[0].pop("allreduce_", 0)
    for with_clipping in sent[1:]:
        reduced = with_clipping.pop("allreduce_")
        assert with_clipping == sent[0]
        assert reduced <= own  # DeepSpeed sends one number for each param group or sub-group


@pytest.mark.parametrize("kind", ["1", "2", "3", "1-bf16-fp32", "0"])
@on_ranks(2)
def test_accumulated_gradients_are_clipped_once(kind):
    engine = made(kind, gradient_accumulation_steps=2)
    results = []
    clipping = attach(engine, CAP, on_clip=results.append)
    for step in range(4):
        backward(engine, step)
        if step % 2:
            gradients = full_gradients(engine)
        step_of(engine)
        assert len(results) == (step + 1) // 2
    for name, gradient in gradients.items():
        norm = 0.0 if gradient is None else gradient.double().norm().item()
        assert clipping.last.as_dict()[name][0] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("kind", ["0", "0-bf16"])
@on_ranks(2)
def test_a_parameter_that_one_rank_does_not_use(kind):
    """Without ZeRO DeepSpeed takes the missing gradient for zeros; with it, ranks wait for each other, or lose it."""
    engine = made(kind)
    clipping = attach(engine, CAP)
    tokens = batch_of(0)[2 * dist.get_rank() :][:2]
    with quiet():
        loss = loss_of(engine, tokens)
        if dist.get_rank() == 1:
            dtype = engine.module.unused.weight.dtype
            loss = loss + 10 * engine.module.unused(torch.ones(3, dtype=dtype)).float().sum()
        engine.backward(loss)
    before = full_parameters(engine)
    step_of(engine)
    norm, coef = clipping.last.as_dict()["unused.weight"]
    assert norm == pytest.approx(5 * math.sqrt(3), rel=1e-3)  # half of what rank 1 has
    moved = before["unused.weight"] - full_parameters(engine)["unused.weight"]
    decayed = 0.01 * before["unused.weight"]
    torch.testing.assert_close(moved - decayed, torch.full_like(moved, coef * 5.0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("threshold", ["EMA", "ZScore", "Percentile", "ParamRelative", "FromGlobal", "mapping"])
@pytest.mark.parametrize("kind", ["1", "3", "2-offload"])
@on_ranks(2)
def test_caps_are_those_of_the_plain_model(kind, threshold):
    """Those that learn, and those that look at the parameters, which are the optimizer's own here."""
    make = {
        "EMA": lambda: thresholds.EMA(1.1, warmup_steps=2),
        "ZScore": lambda: thresholds.ZScore(0.5, warmup_steps=2),
        "Percentile": lambda: thresholds.Percentile(50, window=3),
        "ParamRelative": lambda: thresholds.ParamRelative(0.02),
        "FromGlobal": lambda: thresholds.FromGlobal(0.5),
        "mapping": lambda: {"*.bias": 0.05, "fi*": thresholds.RMS(0.01), "*": thresholds.EMA(1.1, warmup_steps=2)},
    }[threshold]
    engine = made(kind, lr=1e-2)
    clipping = attach(engine, make())
    plain = Model()
    clipper = ComponentClipper(plain, make(), backend="reference")
    for step in range(5):
        backward(engine, step)
        gradients, before = full_gradients(engine), full_parameters(engine)
        step_of(engine)
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(before[name])
                gradient = gradients[name]
                parameter.grad = None if gradient is None else gradient.float().reshape(parameter.shape).clone()
        result = clipper.clip_()
        torch.testing.assert_close(clipping.last.coefs, result.coefs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(clipping.last.caps, result.caps, rtol=1e-4, atol=1e-7)


@on_ranks(2)
def test_experts():
    """Each rank has another one; its norm is over the ranks that share it."""
    started()
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    class WithExperts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(6, 6)
            self.moe = MoE(6, torch.nn.Linear(6, 6), num_experts=2, ep_size=2, k=1, min_capacity=4)
            self.last = torch.nn.Linear(6, 2)

        def forward(self, x):
            return self.last(self.moe(self.first(x))[0])

    for stage, precision in ((1, "fp32"), (2, "fp32"), (1, "bf16-fp32"), (0, "bf16")):
        torch.manual_seed(dist.get_rank())
        with quiet():
            model = WithExperts()
            groups = split_params_into_different_moe_groups_for_optimizer(
                {"params": list(model.parameters()), "name": "all"}
            )
        engine = engine_of(model, torch.optim.SGD(groups, lr=1.0), stage, precision)
        own_norm = attach(engine, 1e-3)
        expert = "moe.deepspeed_moe.experts.deepspeed_experts.0.weight"
        with quiet():
            output = engine(torch.randn(8, 6, dtype=next(model.parameters()).dtype))
            engine.backward(output.float().square().mean())
        gradients, before = full_gradients(engine), full_parameters(engine)
        step_of(engine)
        after, found = full_parameters(engine), own_norm.last.as_dict()
        for name, gradient in gradients.items():
            norm = gradient.double().norm().item()
            assert found[name][0] == pytest.approx(norm, rel=1e-5), name
            moved = (before[name] - after[name]).norm().item()
            assert moved == pytest.approx(min(norm, 1e-3), rel=2e-2, abs=1e-6), name  # beside a parameter of 1
        norms = [torch.zeros(()) for _ in range(2)]
        dist.all_gather(norms, torch.tensor(found[expert][0]))
        assert norms[0] != norms[1]
        assert math.isfinite(engine.get_global_grad_norm())
        own_norm.remove()
        for components in ("all", "type"):
            with pytest.raises(ValueError, match=r"components: .* of an expert"):
                attach(engine, 1.0, components=components)
        with pytest.raises(ValueError, match="max_norm: caps that learn"):
            attach(engine, thresholds.EMA(1.1))
        attach(engine, 1.0, components="module").remove()
