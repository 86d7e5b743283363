"""What ``attach`` refuses, by name and before anything is changed; and what others refuse under DeepSpeed."""

import pytest
import torch
import torch.distributed as dist

from cwclip_kernels import ComponentClipper, ComponentSpec, component_norms, fused_component_clip_
from cwclip_kernels.optim import ComponentClipAdamW
from ranks import on_ranks

pytest.importorskip("deepspeed")

from cwclip_kernels.integrations.deepspeed import EngineClipping, attach
from cwclip_kernels.integrations.deepspeed.internals import base
from deepspeed_engines import Model, backward, engine_of, groups_of, made, step_of, train


@on_ranks(2)
def test_what_an_engine_can_not_be_clipped_with():
    compute_norm = {"compute_grad_norm": False}
    for engine, message in [
        (made(2, gradient_clipping=1.0), r'engine: its configuration has "gradient_clipping": 1.0, .* set .* 0'),
        (made(0, gradient_clipping=0.5), r'"gradient_clipping": 0.5'),
        (made(2, zero=compute_norm), '"compute_grad_norm": false'),
        (made(0, "fp16"), "fp16 without ZeRO"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            attach(engine, 1.0)
        assert not any("cwclip" in name for name in vars(engine))
    # DeepSpeed's default, in versions where it isn't 0.
    default = made(1, gradient_clipping=None)
    if default.gradient_clipping():
        with pytest.raises(RuntimeError, match=r'set "gradient_clipping": 0'):
            attach(default, 1.0)


class Mpu:
    """Two ranks of model parallelism."""

    def get_model_parallel_world_size(self):
        return 2


def as_parallel(engine):
    engine.mpu = Mpu()


def as_muon(engine):
    engine.basic_optimizer.param_groups[0]["use_muon"] = True


def as_other_kind(engine):
    engine.optimizer.__class__ = type("ZenFlowZeroOptimizer", (type(engine.optimizer),), {})


def as_onebit(engine):
    engine.basic_optimizer = type("OnebitAdam", (), {"__module__": "deepspeed.runtime.fp16.onebit.adam"})()


def as_swapping(engine):
    engine.optimizer.swap_optimizer = True


def as_partly_offloaded(engine):
    engine.optimizer.partial_offload = 0.5


def as_autocast(engine):
    engine.optimizer.torch_autocast_gradscaler = object()


def as_compiled(engine):
    engine._config.compile_config.deepcompile = True


def without_optimizer(engine):
    engine.optimizer = None


def with_moved_step(engine):
    """A version of DeepSpeed that does it otherwise."""
    kind = type(engine.optimizer)
    engine.optimizer.__class__ = type(kind.__name__, (kind,), {"step": lambda self: None})
    type(engine.optimizer).__module__, type(engine.optimizer).__qualname__ = kind.__module__, kind.__qualname__


def without_attribute(engine):
    del engine.optimizer.real_dp_process_group


def with_another_patch(engine):
    engine.optimizer.scaled_global_norm = lambda norm_type=2: 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_parallel, "model parallelism isn't served"),
        (as_muon, "Muon isn't served"),
        (as_other_kind, "its ZenFlowZeroOptimizer isn't served, only DeepSpeedZeroOptimizer,"),
        (as_onebit, "OnebitAdam averages gradients in its own step"),
        (as_swapping, "NVMe"),
        (as_partly_offloaded, '"ratio" below 1'),
        (as_autocast, "torch_autocast"),
        (as_compiled, "DeepCompile"),
        (without_optimizer, "it has no optimizer"),
        (
            with_moved_step,
            r"deepspeed .*: DeepSpeedZeroOptimizer isn't as in .* its step\(\) doesn't call scaled_global_norm",
        ),
        (without_attribute, "it has no 'real_dp_process_group'"),
        (with_another_patch, "scaled_global_norm of its DeepSpeedZeroOptimizer is replaced already"),
    ],
)
@on_ranks(1)
def test_what_is_refused_by_name(change, message):
    engine = made(2)
    change(engine)
    before = set(vars(engine)), set(vars(engine.optimizer) if engine.optimizer is not None else ())
    with pytest.raises(RuntimeError, match=message):
        attach(engine, 1.0)
    assert before == (set(vars(engine)), set(vars(engine.optimizer) if engine.optimizer is not None else ()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@on_ranks(1)
def test_a_parameter_that_the_module_does_not_have(precision):
    """With ZeRO DeepSpeed doesn't take it."""
    model = Model()
    groups = groups_of(model)
    groups[1]["params"].append(torch.nn.Parameter(torch.ones(3)))
    engine = engine_of(model, torch.optim.SGD(groups, lr=0.1), 0, precision)
    with pytest.raises(ValueError, match="engine: its optimizer has a parameter that its module doesn't have"):
        attach(engine, 1.0)


@on_ranks(1)
def test_wrong_arguments():
    engine = made(2)
    for arguments, options, error, message in [
        ((-1.0,), {}, ValueError, "max_norm"),
        ((1.0,), {"components": "nothing"}, ValueError, "components"),
        ((1.0,), {"process_group": dist.group.WORLD}, ValueError, "process_group: DeepSpeed knows"),
        ((1.0,), {"backend": "none"}, ValueError, "backend"),
        ((1.0,), {"wrong": 1}, TypeError, "unexpected keyword argument 'wrong'"),
        (({"nothing": 1.0},), {}, ValueError, "nothing"),
    ]:
        with pytest.raises(error, match=message):
            attach(engine, *arguments, **options)
    with pytest.raises(TypeError, match=r"expected what deepspeed.initialize\(\) returns, not Model"):
        attach(Model(), 1.0)
    columns = ComponentSpec("parameter").unitwise("first.weight", dim=1)
    with pytest.raises(ValueError, match=r"'first.weight' lies flat in DeepSpeed's .* dim 0 only"):
        attach(engine, 1.0, components=columns)
    assert isinstance(attach(engine, 1.0), EngineClipping)


@on_ranks(2)
def test_nothing_else_clips_what_deepspeed_has_taken_over():
    """There its gradients never are, so that the call would do nothing."""
    for stage, precision in ((1, "fp32"), (2, "bf16"), (3, "fp32"), (1, "bf16-fp32")):
        engine = made(stage, precision)
        backward(engine, 0)
        for call in (
            lambda e: fused_component_clip_(e.module, 1.0),
            lambda e: fused_component_clip_(e.module.parameters(), 1.0),
            lambda e: component_norms(e.module),
            lambda e: ComponentClipper(e.module, 1.0),
        ):
            with pytest.raises(ValueError, match=r"belongs to DeepSpeed.*attach\(engine"):
                call(engine)
        step_of(engine)


@on_ranks(2)
def test_the_optimizer_that_clips_by_itself():
    """Under ZeRO it would clip flat partitions. Without it clips, and attach() would do it twice."""

    def optimizer(groups, lr):
        return ComponentClipAdamW(groups, lr=lr, max_norm=0.1)

    engine = made(0, optimizer=optimizer)
    train(engine, 0)
    assert "ComponentClipAdamW" in type(engine.optimizer).__name__
    with pytest.raises(RuntimeError, match="ComponentClipAdamW clips in its own step"):
        attach(engine, 1.0)
    for stage in (1, 2, 3):
        with pytest.raises(ValueError, match="replaced by tensors of other shapes, as DeepSpeed's ZeRO"):
            train(made(stage, optimizer=optimizer), 0)


def test_the_versions_that_were_tried_are_said():
    assert base.TRIED in base.unknown(object(), "x")


@on_ranks(1)
def test_bf16_without_zero_in_older_versions():
    """Until 0.18.5 the optimizer kept the loss scale itself."""
    engine = made(0, "bf16")
    del engine.optimizer.loss_scale_config
    engine.optimizer.cur_scale = 1.0  # and every loss is scaled, as nothing says otherwise
    with pytest.raises(RuntimeError, match=r"^engine: bf16 without ZeRO isn't served: engine.backward\(\)"):
        attach(engine, 1.0)
    engine.optimizer.use_grad_scaling = False
    with pytest.raises(RuntimeError, match="bf16 without ZeRO isn't served: .* leaves gradients in place"):
        attach(engine, 1.0)
