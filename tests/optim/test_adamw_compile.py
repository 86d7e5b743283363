"""``ComponentClipAdamW.step()`` under torch.compile(fullgraph=True): the eager step's bits, compiled once."""

import math

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend

from cwclip_kernels import thresholds
from cwclip_kernels.optim import ComponentClipAdamW
from helpers import DEVICE, same_bits
from stepping import give_gradients, named, run, states_of, twins

pytestmark = [pytest.mark.builds, pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")]

COMPILERS = ("aot_eager", "inductor")
SHAPES = [(30, 20), (30,), (5, 6), (1000,)]


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):  # leaves no processes behind
        yield
    torch._dynamo.reset()


def both(arguments=lambda: {}, shapes=SHAPES, compiler="aot_eager"):
    """Twins with optimizers of equal arguments, the compiled step of the first, and what counts its graphs."""
    params = twins(shapes)
    optimizers = [ComponentClipAdamW(named(own), **{"max_norm": 0.5, "lr": 2.0**-6, **arguments()}) for own in params]
    counter = CompileCounterWithBackend(compiler)

    def step():
        optimizers[0].step()

    return params, optimizers, torch.compile(step, fullgraph=True, backend=counter), counter


def assert_same(params, optimizers):
    assert all(map(same_bits, *params))
    assert all(map(same_bits, *(states_of(o, p) for o, p in zip(optimizers, params, strict=True))))
    first, second = (o.last for o in optimizers)
    assert first.names == second.names
    assert same_bits(first.norms, second.norms)
    assert same_bits(first.coefs, second.coefs)


ARGUMENTS = {
    "plain": lambda: {},
    "amsgrad": lambda: {"amsgrad": True, "maximize": True, "correct_bias": False, "weight_decay": 0.1},
    "layers": lambda: {"components": "layer", "max_norm": {"layers.0": 0.1, "layers.1": math.inf}},
    "some alone": lambda: {"components": lambda name, p: None if p.ndim == 1 else name},
    "a threshold, some alone": lambda: {
        "components": lambda name, p: None if p.ndim == 1 else name,
        "max_norm": thresholds.EMA(warmup_steps=1),
    },
    "none alone": lambda: {"components": lambda name, p: None},
    "patterns": lambda: {"max_norm": {"layers.0.*": thresholds.EMA(warmup_steps=0), "*": 0.3}, "clip_eps": 0.25},
    "foreach": lambda: {"backend": "foreach"},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=list(ARGUMENTS))
@pytest.mark.parametrize("compiler", COMPILERS)
def test_step_after_step(compiler, arguments):
    params, optimizers, step, counter = both(arguments, compiler=compiler)
    run(3, (params[0], step), (params[1], optimizers[1].step))
    assert_same(params, optimizers)
    assert counter.frame_count == 1


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_learning_rate_that_is_a_tensor_can_change(compiler):
    rates = []

    def arguments():
        rates.append(torch.tensor(2.0**-6, device=DEVICE))
        return {"lr": rates[-1]}

    params, optimizers, step, counter = both(arguments, compiler=compiler)
    for turn in range(4):
        for rate in rates:
            rate.fill_(2.0 ** -(turn + 2))
        run(1, (params[0], step), (params[1], optimizers[1].step))
    assert_same(params, optimizers)
    assert counter.frame_count == 1


def test_groups():
    params = twins(SHAPES)
    optimizers = [
        ComponentClipAdamW(
            [{"params": own[:1], "amsgrad": True}, {"params": own[1:], "lr": 2.0**-3, "weight_decay": 0.0}],
            lr=2.0**-6,
            max_norm=0.5,
        )
        for own in params
    ]
    step = torch.compile(optimizers[0].step, fullgraph=True, backend="aot_eager")
    run(3, (params[0], step), (params[1], optimizers[1].step))
    assert_same(params, optimizers)


def test_groups_with_several_caps_are_refused():
    params, _ = twins(SHAPES)
    groups = [{"params": params[:1], "max_norm": 1.0}, {"params": params[1:]}]
    optimizer = ComponentClipAdamW(groups, max_norm=0.5)
    give_gradients(params)
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="different max_norm"):
        step()


def test_an_error_leaves_every_bit():
    (params, before), (optimizer, _), step, _ = both(lambda: {"nonfinite": "error"})
    give_gradients(params)
    params[1].grad[0] = math.nan
    with pytest.raises(RuntimeError, match="non-finite for 1 of"):
        step()
    assert all(map(same_bits, params, before))
    assert all(state["step"] == 0 for state in optimizer.state.values())


def test_the_operator_is_what_it_says():
    params, _ = twins([(4, 3), (5,)])
    optimizer = ComponentClipAdamW(params, max_norm=0.5, amsgrad=True)
    give_gradients(params)
    optimizer.step()
    columns = [[optimizer.state[p][n] for p in params] for n in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")]
    members = "(('0', '1'), ('0', '1'), ((0, 0, ()), (1, 1, ())), (), (), ())"
    numbers = [0.9, 0.999, 1e-8, 0.01, 1.0, 0.0, 1.0]
    arguments = (
        *([p.grad for p in params], members, None, "", [0.5], [p.detach() for p in params], *columns),
        *([torch.tensor(1e-3)], numbers, [0, 0], None, None, 2.0, 1e-6, [], "propagate", None),
    )
    torch.library.opcheck(torch.ops.cwclip_kernels.component_clip_adamw_, arguments)
