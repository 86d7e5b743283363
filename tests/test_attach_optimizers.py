"""Which optimizers a clipper may be attached to: those whose every step it clips, and the others by name."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch.optim import SGD, Optimizer

from cwclip_kernels import ComponentClipper
from helpers import DEVICE, parameter
from stand_ins import Lookahead, accelerated

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own use of torch.jit.script
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
    from torch.distributed.optim.named_optimizer import _NamedOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

CAP = 0.5


@pytest.fixture
def one_rank():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sgd(params):
    return SGD(params, lr=1.0)


class WithSuper(SGD):
    """torch runs the hooks of its step, and again those of SGD's."""

    @torch.no_grad()
    def step(self, closure=None):
        return super().step(closure)


class OwnStep(Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad)
        return loss


class Wrapper(Optimizer):
    """One around another, made as an optimizer should be."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


class Several(Lookahead):
    """As containers of optimizers."""

    def __init__(self, base_optimizer):
        super().__init__(base_optimizer)
        self.optimizers = [self.__dict__.pop("_base_optimizer")]

    def step(self, closure=None):
        return self.optimizers[0].step(closure)


class NotOne:
    """As Lightning's, which isn't an Optimizer itself."""

    def __init__(self, optimizer):
        self._optimizer = optimizer

    @property
    def optimizer(self):
        return self._optimizer


def scheduled(params):
    optimizer = sgd(params)
    # Each puts a step of its own on the instance, or finds that there is one.
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    optimizer._opt_called = True
    return optimizer


def compiled(params):
    optimizer = sgd(params)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    return optimizer


def wrapped(params):
    optimizer = sgd(params)
    original = optimizer.step

    @functools.wraps(original)
    def step(*args, **kwargs):
        return original(*args, **kwargs)

    optimizer.step = step
    return optimizer


def put_back(params):
    """As Accelerate leaves an optimizer's step when its scaler has stepped."""
    optimizer = sgd(params)
    optimizer.step = optimizer.step
    return optimizer


def unpickled(params):
    optimizer = pickle.loads(pickle.dumps(sgd(params)))
    optimizer.param_groups[0]["params"] = list(params)
    return optimizer


def replaced(params):
    optimizer = sgd(params)
    original = optimizer.step
    optimizer.step = lambda closure=None: original(closure)
    return optimizer


def another_step(params):
    optimizer = sgd(params)
    optimizer.step = sgd(params).step
    return optimizer


CLIPS_EACH_STEP = {
    "sgd": sgd,
    "scheduled": scheduled,
    "compiled": compiled,
    "wrapped": wrapped,
    "put back": put_back,
    "unpickled": unpickled,
    "with super": lambda params: WithSuper(params, lr=1.0),
    "own step": OwnStep,
    "wrapper": lambda params: Wrapper(sgd(params)),
    "wrapper of one with super": lambda params: Wrapper(WithSuper(params, lr=1.0)),
    "zero": lambda params: ZeroRedundancyOptimizer(params, SGD, lr=1.0),
    "accelerate's inner one": lambda params: accelerated(params).optimizer,
}

REFUSED = {
    "accelerate": (accelerated, TypeError, r"AcceleratedOptimizer doesn't run .*: its .optimizer \(SGD\)"),
    "lookahead": (lambda ps: Lookahead(sgd(ps)), TypeError, r"Lookahead doesn't .*: its ._base_optimizer \(SGD\)"),
    "two deep": (
        lambda ps: Lookahead(Lookahead(sgd(ps))),
        TypeError,
        r"Lookahead doesn't .*: its ._base_optimizer._base_optimizer \(SGD\)",
    ),
    "several": (lambda ps: Several(sgd(ps)), TypeError, r"its .optimizers\[0\] \(SGD\)"),
    "nothing inside": (lambda ps: Lookahead(NotOne(sgd(ps))), TypeError, "or call Optimizer.__init__ in its own"),
    "local sgd": (lambda ps: PostLocalSGDOptimizer(sgd(ps), None), TypeError, r"doesn't .*: its .optim \(SGD\)"),
    "named": (
        lambda ps: _NamedOptimizer({"p": ps[0]}, SGD, lr=1.0),
        TypeError,
        r"_NamedOptimizer doesn't .*: its ._optimizer \(SGD\)",
    ),
    "replaced": (replaced, TypeError, r"step\(\) of this SGD has been replaced .*functools.wraps"),
    "another's step": (another_step, TypeError, r"step\(\) of this SGD has been replaced"),
    "not one": (lambda ps: NotOne(sgd(ps)), TypeError, r"not NotOne; .* inside: its .optimizer \(SGD\)"),
    "in backward": (
        lambda ps: ZeroRedundancyOptimizer(ps, SGD, lr=1.0, overlap_with_ddp=True),
        ValueError,
        "overlap_with_ddp=True steps in the backward pass",
    ),
}


def give_gradients(params, size=10.0):
    for p in params:
        p.grad = torch.full_like(p, size)


def make(kind, params, request):
    if "zero" in kind or kind == "in backward":
        request.getfixturevalue("one_rank")
    return (CLIPS_EACH_STEP[kind] if kind in CLIPS_EACH_STEP else REFUSED[kind][0])(params)


# torch compiles no step with a closure.
@pytest.mark.parametrize(
    ("kind", "with_closure"),
    [(kind, yes) for kind in CLIPS_EACH_STEP for yes in (False, True) if kind != "compiled" or not yes],
)
def test_every_step_is_clipped_once(kind, with_closure, request):
    sgd([parameter(None)])  # torch puts the hooks around a class's step where one is made
    params = [parameter(None, (3,)), parameter(None, (2, 2))]
    optimizer, seen = make(kind, params, request), []
    ComponentClipper(params, CAP).attach(optimizer, on_clip=lambda result: seen.append(result))
    for step in range(1, 4):
        before = [p.detach().clone() for p in params]
        if with_closure:
            optimizer.step(lambda: give_gradients(params))
        else:
            give_gradients(params)
            optimizer.step()
        assert len(seen) == step
        for p, b in zip(params, before, strict=True):
            assert (p.detach() - b).norm().item() == pytest.approx(CAP, rel=1e-4)
        for p in params:
            p.grad = None


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_certain_to_clip_is_refused(kind, request):
    params = [parameter(None, (3,))]
    optimizer = make(kind, params, request)
    _, error, message = REFUSED[kind]
    with pytest.raises(error, match=message):
        ComponentClipper(params, CAP).attach(optimizer)
    assert not getattr(optimizer, "_optimizer_step_pre_hooks", None)


def test_a_step_that_failed_leaves_no_trace():
    """Whether a step runs within another is seen even after one that raised an error halfway."""
    p, seen = parameter(None, (3,)), []
    optimizer = WithSuper([p], lr=1.0)
    ComponentClipper([p], CAP).attach(optimizer, on_clip=seen.append)

    def fails():
        raise KeyError("data")

    for number in range(1, 3):
        with pytest.raises(KeyError, match="data"):
            optimizer.step(fails)
        give_gradients([p])
        optimizer.step()
        assert len(seen) == number
        assert p.grad.norm() < CAP * 1.001


class SAM(Optimizer):
    """As the usual one: two passes, the first of them to a point nearby."""

    def __init__(self, params):
        super().__init__(params, {})
        self.base_optimizer = sgd(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["at"] = p.clone()
            p.add_(p.grad, alpha=0.05 / p.grad.norm())

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["at"])
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


@pytest.mark.parametrize("whose", ["sam", "base_optimizer"])
def test_sam_in_one_call_and_in_two(whose):
    p, seen = parameter(None, (4,)), []
    optimizer = SAM([p])
    ComponentClipper([p], CAP).attach(optimizer if whose == "sam" else optimizer.base_optimizer, on_clip=seen.append)
    give_gradients([p])
    optimizer.step(lambda: give_gradients([p]))
    assert p.detach().norm().item() == pytest.approx(CAP, rel=1e-4)
    assert len(seen) == 1
    give_gradients([p])
    optimizer.first_step()
    give_gradients([p])
    optimizer.second_step()
    # The hook of the outer one is reached by step() alone, as the docs say.
    moved = CAP if whose == "base_optimizer" else 20.0
    assert p.detach().norm().item() == pytest.approx(CAP + moved, rel=1e-4)


@pytest.mark.parametrize("first", ["outer", "inner"])
def test_two_clippers_on_an_optimizer_and_on_the_one_inside(first):
    p = parameter(None, (4,))
    inner = sgd([p])
    outer = Wrapper(inner)
    clippers = [ComponentClipper([("w", p)], CAP) for _ in range(2)]
    if first == "inner":
        handle = clippers[0].attach(inner)
        with pytest.raises(ValueError, match=r"optimizer: .* attached to it before clips 'w' as well.*remove\(\)"):
            clippers[1].attach(outer)
        clippers[1].attach(outer, replace=True)
    else:
        clippers[0].attach(outer)
        handle = clippers[1].attach(inner)
        give_gradients([p])
        with pytest.raises(RuntimeError, match=r"this SGD steps inside of a Wrapper, .* both clip 'w'; remove\(\)"):
            outer.step()
        assert not p.detach().any()
        handle.remove()
    give_gradients([p])
    outer.step()
    assert p.detach().norm().item() == pytest.approx(CAP, rel=1e-4)
    assert handle.last is None


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle"])
def test_a_copied_optimizer_has_lost_its_hooks_and_can_be_attached_to(how):
    """Which is torch's doing, and in the docs."""
    p = parameter(None, (4,)).to(DEVICE)
    optimizer = sgd([p])
    clipper = ComponentClipper([p], CAP)
    clipper.attach(optimizer)
    copied = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda o: pickle.loads(pickle.dumps(o))}[how](
        optimizer
    )
    assert not copied._optimizer_step_pre_hooks
    copied.param_groups[0]["params"] = [p]
    clipper.attach(copied)  # no ValueError: the first is attached to another optimizer
    give_gradients([p])
    copied.step()
    assert p.detach().norm().item() == pytest.approx(CAP, rel=1e-4)
