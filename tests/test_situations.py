"""Every way into the loop x every kind of cap x what happens to a model between two steps.

Each gradient is what the test says: the loss is sum(parameter * gradient). A way's step() returns what is left of the
gradients, so that all are held to the same numbers.
"""

import copy
import gc
import io
import math
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

from cwclip_kernels import (
    ComponentClipGradScaler,
    ComponentClipper,
    clip_in_backward,
    component_norms,
    fused_component_clip_,
    thresholds,
)
from helpers import DEVICE, same_bits

CAP = 0.05
CAPS = {
    "number": lambda: CAP,
    "mapping": lambda: {"*weight": CAP, "*": 2 * CAP},
    "tensor": lambda: torch.tensor(CAP, device=DEVICE),
    "Fixed": lambda: thresholds.Fixed(CAP),
    "Schedule": lambda: thresholds.Schedule(lambda step: CAP / (1 + step)),
    "FromGlobal": lambda: thresholds.FromGlobal(CAP, "numel"),
    "ParamRelative": thresholds.ParamRelative,
    "EMA": lambda: thresholds.EMA(warmup_steps=3),
    "ZScore": lambda: thresholds.ZScore(warmup_steps=3),
    "Percentile": lambda: thresholds.Percentile(40.0, window=8),
}
FOLLOW_NORMS = {
    "EMA": lambda: thresholds.EMA(warmup_steps=3, warmup_norm=math.inf),
    "EMA at once": lambda: thresholds.EMA(warmup_steps=0),
    "ZScore": lambda: thresholds.ZScore(warmup_steps=3),
    "Percentile": lambda: thresholds.Percentile(40.0, window=8),
}
LEARN = ("Schedule", "EMA", "ZScore", "Percentile")


class Model(nn.Module):
    """Two trained layers around a frozen one."""

    def __init__(self):
        super().__init__()
        self.first, self.base, self.last = nn.Linear(5, 4), nn.Linear(4, 40), nn.Linear(4, 3)
        self.base.requires_grad_(False)
        self.to(DEVICE)


def backward(model, gradients, scale=None):
    loss = sum((p * g.to(p)).sum() for p, g in zip(trained(model), gradients, strict=True))
    (loss if scale is None else scale(loss)).backward()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients_of(model, size=1.0):
    return [torch.randn(p.shape, device=DEVICE) * size for p in trained(model)]


class Way:
    """A way into the loop; ``max_norm`` is kept, for its state."""

    refused = ()  # kinds of caps

    def __init__(self, model, max_norm):
        self.model, self.max_norm = model, max_norm
        self.optimizer = torch.optim.SGD(trained(model), lr=0.0)
        self.begin()

    def step(self, gradients):
        self.model.zero_grad()
        self.take(gradients)
        return [p.grad.clone() for p in trained(self.model)]


class Function(Way):
    def begin(self):
        pass

    def take(self, gradients):
        backward(self.model, gradients)
        fused_component_clip_(self.model, self.max_norm)


class Clipper(Way):
    def begin(self):
        self.clipper = ComponentClipper(self.model, self.max_norm)

    def take(self, gradients):
        backward(self.model, gradients)
        self.clipper.clip_()


class Attached(Way):
    def begin(self):
        self.clipper = ComponentClipper(self.model, self.max_norm)
        self.handle = self.clipper.attach(self.optimizer)

    def take(self, gradients):
        backward(self.model, gradients)
        self.optimizer.step()


class Scaler(Way):
    def begin(self):
        self.clipper = ComponentClipper(self.model, self.max_norm)
        self.scaler = ComponentClipGradScaler(self.clipper, device=DEVICE, init_scale=2.0**10)

    def take(self, gradients):
        backward(self.model, gradients, self.scaler.scale)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class InBackward(Way):
    refused = ("EMA", "ZScore", "Percentile")  # but EMA after its warm-up

    def begin(self):
        self.handle = clip_in_backward(self.model, self.max_norm)

    def take(self, gradients):
        backward(self.model, gradients)


WAYS = [Function, Clipper, Attached, Scaler, InBackward]
every_way = pytest.mark.parametrize("way", WAYS)
every_cap = pytest.mark.parametrize("kind", CAPS)


def skip_refused(way, kind):
    if kind in way.refused:
        with pytest.raises(ValueError, match="max_norm: .* depends on all norms of a step"):
            way(Model(), (CAPS | FOLLOW_NORMS)[kind]())
        pytest.skip("refused, as it has to be")


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Scale
# ------------------------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("kind", FOLLOW_NORMS)
@pytest.mark.parametrize("exponent", [-20, 12])
def test_nothing_that_follows_norms_depends_on_the_losss_scale(way, kind, exponent):
    skip_refused(way, kind)
    model = Model()
    loops = [way(copy.deepcopy(model), FOLLOW_NORMS[kind]()) for _ in range(2)]
    clipped = 0
    for step in range(30):
        gradients = gradients_of(model, size=0.01 * (20 if step % 7 == 6 else 1))
        small = [g * 2.0**exponent for g in gradients]
        left, left_of_small = loops[0].step(gradients), loops[1].step(small)
        assert_close([g * 2.0**-exponent for g in left_of_small], left)
        clipped += sum(not same_bits(a, b) for a, b in zip(left, gradients, strict=True))
    assert clipped > 0


@every_way
@pytest.mark.parametrize("kind", FOLLOW_NORMS)
@pytest.mark.parametrize("norm", [1e-3, 1e-6, 1e-12])
def test_small_gradients_of_constant_norm_stay(way, kind, norm):
    skip_refused(way, kind)
    model = Model()
    loop = way(model, FOLLOW_NORMS[kind]())
    gradients = [g * (norm / g.norm()) for g in gradients_of(model)]
    for _ in range(40):
        left = loop.step(gradients)
    assert_close(left, gradients)


def test_a_model_trains_as_well_under_a_small_loss():
    """Adam doesn't care about the loss's scale, and neither may the caps."""
    losses = []
    for scale in (1.0, 1e-5):
        torch.manual_seed(0)
        x = torch.randn(64, 4, device=DEVICE)
        y = (x @ torch.randn(4, 1, device=DEVICE)).tanh()
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).to(DEVICE)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02, eps=1e-30)
        clipper = ComponentClipper(model, thresholds.EMA(warmup_steps=5, warmup_norm=math.inf))
        for _ in range(300):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            (loss * scale).backward()
            clipper.clip_()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.01
    assert losses[1] < 3 * losses[0]


def test_a_cap_learns_the_clipped_norm_itself():
    """min(norm, cap), as the authors' code: not cap / (norm + 1e-6) * norm."""
    p = nn.Parameter(torch.zeros(1, device=DEVICE))
    threshold = thresholds.EMA(ratio=1.04, decay=0.99, warmup_steps=0)
    clipper = ComponentClipper([p], threshold)
    gamma = None
    for norm in (3e-6, 9e-6, 1e-6, 2e-6, 9e-6):
        p.grad = torch.full((1,), norm, device=DEVICE)
        clipper.clip_()
        kept = norm if gamma is None else min(norm, 1.04 * gamma)
        gamma = kept if gamma is None else 0.99 * gamma + 0.01 * kept
        assert threshold.state_dict()["tensors"]["gamma"].item() == pytest.approx(gamma, rel=1e-6)
        assert p.grad.item() == pytest.approx(kept, rel=1e-6)


def test_eps_is_for_numbers():
    for cap, expected in ((1e-6, 0.5), (thresholds.Fixed(1e-6), 0.5), (thresholds.ParamRelative(1e-3, 1e-3), 1.0)):
        p = nn.Parameter(torch.zeros(1, device=DEVICE))
        p.grad = torch.full((1,), 1e-6, device=DEVICE)
        assert ComponentClipper([p], cap).clip_().coefs.item() == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------
# Conversions and moves
# ------------------------------------------------------------------------------------------------------------


@every_way
@every_cap
def test_converted_between_two_steps(way, kind):
    """Another dtype under the same Parameter objects: results are those of a loop that never had the first."""
    skip_refused(way, kind)
    model = Model()
    loop = way(model, CAPS[kind]())
    loop.step(gradients_of(model))
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.zero_grad()
        model.to(dtype)
        gradients = [g.to(dtype) for g in gradients_of(model)]
        left = loop.step(gradients)
        assert {g.dtype for g in left} == {dtype}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert component_norms(model).dtype == wide
        if hasattr(loop, "clipper"):
            assert loop.clipper.norms().dtype == wide
        if kind == "number":
            for g, before in zip(left, gradients, strict=True):
                assert g.norm().item() == pytest.approx(min(CAP, before.norm().item()), rel=1e-2)


@pytest.mark.parametrize("backend", [None, "foreach", "reference"])
@pytest.mark.parametrize("call", ["norms", "function", "clipper", "Percentile"])
def test_a_plan_notices_each_change(backend, call):
    model = nn.Linear(6, 4).to(DEVICE)

    def set_gradients(make):
        for p in model.parameters():
            p.grad = make(p)

    set_gradients(torch.randn_like)
    clipper = ComponentClipper(model, thresholds.Percentile() if call == "Percentile" else 0.1, backend=backend)
    clip = {
        "norms": lambda: component_norms(model, backend=backend),
        "function": lambda: fused_component_clip_(model, 0.1, backend=backend),
    }.get(call, lambda: clipper.clip_().norms)

    def check():
        expected = torch.stack([p.grad.to_dense().double().norm() for p in model.parameters()])
        found = clip()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
        return found.dtype

    assert check() == torch.float32
    model.double()
    set_gradients(torch.randn_like)
    assert check() == torch.float64
    model.bfloat16()
    set_gradients(torch.randn_like)
    assert check() == torch.float32
    model.float()
    set_gradients(lambda p: torch.randn(p.shape[::-1], device=DEVICE).t() if p.ndim == 2 else torch.randn_like(p))
    check()
    set_gradients(lambda p: torch.randn_like(p).to_sparse())
    check()
    set_gradients(torch.randn_like)
    check()
    set_gradients(lambda p: torch.randn_like(p).requires_grad_())
    if call == "norms":
        check()
    else:
        with pytest.raises(ValueError, match="leaf that requires grad"):
            clip()
    model.weight = nn.Parameter(torch.zeros(9, 2, device=DEVICE))
    set_gradients(torch.randn_like)
    if call in ("norms", "function"):
        check()


@pytest.fixture
def _swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@every_way
@every_cap
@pytest.mark.usefixtures("_swapping")
def test_a_model_can_still_be_moved(way, kind):
    """pytorch #187008: parameters that somebody has a weak reference to can't be swapped."""
    if kind in way.refused:
        pytest.skip("refused")
    model = Model()
    loop = way(model, CAPS[kind]())
    loop.step(gradients_of(model))
    fused_component_clip_(list(model.named_parameters()), loop.max_norm)
    component_norms(model)
    before = [id(p) for p in model.parameters()]
    model.double()
    loop.step(gradients_of(model))
    model.to_empty(device=DEVICE)
    model.float()
    assert [id(p) for p in model.parameters()] == before
    for p in model.parameters():
        assert not weakref.getweakrefs(p)
    loop.step(gradients_of(model))


def test_an_address_that_another_tensor_has_now():
    """The function's cache goes by ids, which are reused; what is told apart is what the tensors look like."""
    for size in (3, 50, 7, 50, 3):
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(size, device=DEVICE))
        model.weight.grad = torch.ones(size, device=DEVICE)
        spec = {"weight": thresholds.FromGlobal(1.0, "numel")}["weight"]
        assert fused_component_clip_([("weight", model.weight)], spec).item() == pytest.approx(math.sqrt(size))
        del model
        gc.collect()


# ------------------------------------------------------------------------------------------------------------
# Frozen
# ------------------------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("split", ["uniform", "numel"])
def test_a_budget_is_for_what_is_trained(way, split):
    model = Model()
    loop = way(model, thresholds.FromGlobal(1.0, split))

    def norm_of_all():
        left = loop.step(gradients_of(model, size=100.0))
        return torch.stack([g.norm() for g in left]).norm().item()

    assert norm_of_all() == pytest.approx(1.0, rel=1e-4)
    if way is InBackward:  # whose hooks are on what was trained when it was set up
        return
    model.first.requires_grad_(False)
    assert norm_of_all() == pytest.approx(1.0, rel=1e-4)
    model.first.requires_grad_(True)
    assert norm_of_all() == pytest.approx(1.0, rel=1e-4)


class Packed(torch.Tensor):
    """As a quantized tensor: whatever is asked of its data is an error."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=DEVICE)

    def __init__(self, shape):
        pass

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise AssertionError(f"the data of a frozen parameter was asked for: {function}")


@every_way
@every_cap
@pytest.mark.parametrize("frozen", ["uint8", "subclass", "meta", "csr"])
def test_what_is_frozen_is_neither_measured_nor_refused(way, kind, frozen):
    skip_refused(way, kind)
    csr = None
    if frozen == "csr":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sparse CSR, once a process
            csr = nn.Parameter(torch.eye(4, device=DEVICE).to_sparse_csr(), requires_grad=False)
    made = {
        "uint8": lambda: nn.Parameter(torch.zeros(80, 1, dtype=torch.uint8, device=DEVICE), requires_grad=False),
        "subclass": lambda: nn.Parameter(Packed((4, 40)), requires_grad=False),
        "meta": lambda: nn.Parameter(torch.zeros(4, 40, device="meta"), requires_grad=False),
        "csr": lambda: csr,
    }
    plain = Model()
    plain.base = nn.Module()
    model = copy.deepcopy(plain)
    model.base.weight = made[frozen]()
    loops = [way(plain, CAPS[kind]()), way(model, CAPS[kind]())]
    for _ in range(4):
        gradients = gradients_of(plain)
        left, expected = loops[1].step(gradients), loops[0].step(gradients)
        assert all(same_bits(a, b) for a, b in zip(left, expected, strict=True))


def test_a_frozen_parameter_is_not_read():
    """A float base of a LoRA model: as many bytes as all the rest a hundred times over."""
    model = Model()
    model.base.weight.data.fill_(math.nan)
    threshold = thresholds.ParamRelative()
    clipper = ComponentClipper(model, threshold, components="all")
    model.zero_grad()
    backward(model, gradients_of(model))
    expected = 0.01 * torch.cat([p.detach().flatten() for p in trained(model)]).double().norm().item()
    assert clipper.clip_().caps.item() == pytest.approx(expected, rel=1e-5)


def test_what_is_only_measured_may_share_memory():
    storage = torch.randn(12, device=DEVICE)
    params = [nn.Parameter(storage.view(3, 4)), nn.Parameter(storage.view(12))]
    for p in params:
        p.grad = torch.randn_like(p)
    caps = ComponentClipper(params, thresholds.ParamRelative(1.0)).clip_().caps
    assert caps.tolist() == pytest.approx([storage.norm().item()] * 2, rel=1e-5)
    params[0].grad, params[1].grad = storage.view(3, 4), storage
    assert component_norms(params).tolist() == pytest.approx([storage.norm().item()] * 2, rel=1e-5)
    with pytest.raises(ValueError, match="share memory"):
        fused_component_clip_(params, 0.1)
    params[1].grad = torch.ones(1, device=DEVICE).expand(12)
    assert component_norms(params)[1].item() == pytest.approx(math.sqrt(12))


# ------------------------------------------------------------------------------------------------------------
# Copies, pickles, checkpoints
# ------------------------------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "save": lambda value: _saved_and_loaded(value),
}


def _saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def cap_of_step(step):
    return CAP / (1 + step)


@every_cap
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("order", ["model holds it", "model first", "clipper first"])
def test_a_clipper_copied_with_its_model(kind, how, order):
    model = Model()
    cap = thresholds.Schedule(cap_of_step) if kind == "Schedule" else CAPS[kind]()
    clipper = ComponentClipper(model, cap)
    for _ in range(4):
        model.zero_grad()
        backward(model, gradients_of(model))
        clipper.clip_()
    if order == "model holds it":
        model.clipper = clipper
        twin = COPIES[how](model)
        copied = twin.clipper
    elif order == "model first":
        twin, copied = COPIES[how]((model, clipper))
    else:
        copied, twin = COPIES[how]((clipper, model))
    own = {id(p) for p in twin.parameters()}
    assert {id(p) for p in copied.parameters} <= own
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(10.0)
    results = []
    gradients = gradients_of(model, size=100.0)
    for one, its in ((model, clipper), (twin, copied)):
        one.zero_grad()
        backward(one, gradients)
        results.append(its.clip_())
    assert same_bits(results[0].norms, results[1].norms)
    factor = 10.0 if kind == "ParamRelative" else 1.0
    clipped = (results[0].norms > 0).expand(results[0].caps.shape) if results[0].caps.ndim else ...
    torch.testing.assert_close(results[1].caps[clipped], results[0].caps[clipped] * factor, rtol=1e-5, atol=0)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained(twin))
    # And by itself, when the first is gone.
    watch = weakref.ref(model)
    del model, clipper, one, its, results
    gc.collect()
    assert watch() is None
    twin.zero_grad()
    backward(twin, gradients)
    copied.clip_()


@every_cap
def test_a_deep_copy_by_itself_clips_the_same_parameters(kind):
    model = Model()
    clipper = ComponentClipper(model, CAPS[kind]())
    copied = copy.deepcopy(clipper)
    assert all(a is b for a, b in zip(copied.parameters, clipper.parameters, strict=True))
    for _ in range(3):
        model.zero_grad()
        backward(model, gradients_of(model))
        clipper.clip_()
    if kind in ("EMA", "ZScore", "Percentile", "Schedule"):  # each learns for itself
        fresh, learnt = copied.state_dict()["max_norm"], clipper.state_dict()["max_norm"]
        assert repr((fresh["tensors"], fresh["host"])) != repr((learnt["tensors"], learnt["host"]))


def test_a_threshold_before_and_after_it_is_bound():
    for kind in ("EMA", "ZScore", "Percentile"):
        for how in (*COPIES.values(), copy.copy):
            threshold = how(CAPS[kind]())
            model = Model()
            clipper = ComponentClipper(model, threshold)
            backward(model, gradients_of(model))
            clipper.clip_()
            twin = how(threshold)
            state, other = threshold.state_dict(), twin.state_dict()
            assert state["components"] == other["components"]
            for name, tensor in state["tensors"].items():
                assert same_bits(tensor, other["tensors"][name])
            with pytest.raises(ValueError, match="has loaded the state of other components"):
                ComponentClipper(nn.Linear(2, 1).to(DEVICE), twin)


@pytest.mark.parametrize("way", [Clipper, Attached, Scaler, InBackward])
@every_cap
def test_resumed_from_a_checkpoint(way, kind):
    skip_refused(way, kind)
    model = Model()
    loop, fresh = way(model, CAPS[kind]()), None
    for _ in range(5):
        loop.step(gradients_of(model, size=0.1))
    holder = getattr(loop, "handle", None) or loop.clipper
    state = _saved_and_loaded(holder.state_dict())
    assert (state == {}) == (kind in ("number", "mapping", "tensor"))
    twin = copy.deepcopy(model)
    fresh = way(twin, CAPS[kind]())
    (getattr(fresh, "handle", None) or fresh.clipper).load_state_dict(state)
    for _ in range(3):
        gradients = gradients_of(model)
        assert all(same_bits(a, b) for a, b in zip(loop.step(gradients), fresh.step(gradients), strict=True))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["EMA", "ZScore", "Percentile"])
def test_a_checkpoint_of_torch_distributed(kind, tmp_path):
    """It fills the tensors that it finds: none, before the policy is bound."""
    import torch.distributed.checkpoint as dcp

    model = Model()
    loop = Clipper(model, CAPS[kind]())
    for _ in range(5):
        loop.step(gradients_of(model, size=0.1))
    dcp.save({"clipper": loop.clipper.state_dict()}, checkpoint_id=tmp_path, no_dist=True)

    early = CAPS[kind]()
    state = {"clipper": {"max_norm": early.state_dict()}}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    early.load_state_dict(state["clipper"]["max_norm"])
    with pytest.raises(ValueError, match="make the clipper first, and load then"):
        ComponentClipper(model, early)

    resumed = Clipper(model, CAPS[kind]())
    state = {"clipper": resumed.clipper.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    resumed.clipper.load_state_dict(state["clipper"])
    gradients = gradients_of(model)
    assert all(same_bits(a, b) for a, b in zip(loop.step(gradients), resumed.step(gradients), strict=True))


@every_way
@every_cap
def test_made_in_inference_mode(way, kind):
    skip_refused(way, kind)
    model = Model()
    with torch.inference_mode():
        loop = way(model, CAPS[kind]())
    expected = way(model := copy.deepcopy(model), CAPS[kind]())
    loop = loop if way is not InBackward else way(copy.deepcopy(model), CAPS[kind]())
    for _ in range(5):
        gradients = gradients_of(model)
        assert all(same_bits(a, b) for a, b in zip(loop.step(gradients), expected.step(gradients), strict=True))


@every_cap
def test_called_in_inference_mode(kind):
    model = Model()
    clippers = [ComponentClipper(model, CAPS[kind]()) for _ in range(2)]
    for _ in range(4):
        model.zero_grad()
        gradients = gradients_of(model)
        backward(model, gradients)
        expected = clippers[0].clip_()
        model.zero_grad()
        backward(model, gradients)
        with torch.inference_mode():
            found = clippers[1].clip_()
        assert same_bits(found.coefs, expected.coefs)
        found.norms.add_(1.0)  # an ordinary tensor


# ------------------------------------------------------------------------------------------------------------
# Without data
# ------------------------------------------------------------------------------------------------------------


@every_cap
@pytest.mark.parametrize("fake", [True, False])
def test_without_data(kind, fake):
    """What estimates memory runs a step on fake tensors or the meta device; nothing of it stays behind."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    cap = CAPS[kind]()
    with FakeTensorMode() if fake else torch.device("meta"):
        model = nn.Module()
        model.first, model.last = nn.Linear(5, 4, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)
        model.last(model.first(torch.randn(2, 5, dtype=torch.float64))).sum().backward()
        own = CAP if kind == "tensor" else cap
        norms = fused_component_clip_(model, own)
        assert norms.shape == (4,)
        assert norms.dtype == torch.float64
        assert component_norms(model, components="all").shape == (1,)
        result = ComponentClipper(model, own).clip_()
        assert result.coefs.shape == (4,)
        assert norms.is_meta != fake
        assert (type(norms) is not torch.Tensor) == fake
    real = Model()
    del real.base
    loops = [Function(real, cap), Function(copy.deepcopy(real), CAPS[kind]())]
    for _ in range(2):
        gradients = gradients_of(real)
        left, expected = (loop.step(gradients) for loop in loops)
        assert all(same_bits(a, b) for a, b in zip(left, expected, strict=True))


def test_nested_tensors_are_refused_by_name():
    with pytest.warns(UserWarning, match="nested tensors is in prototype stage"):
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], requires_grad=True)
    nested.to_padded_tensor(0.0).sum().backward()
    for call in (component_norms, lambda p: fused_component_clip_(p, 1.0)):
        with pytest.raises(TypeError, match="the gradient of 'w' is a nested tensor"):
            call([("w", nested)])


# ------------------------------------------------------------------------------------------------------------
# Replaced
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["to_empty", "assign", "one"])
def test_parameters_that_have_been_replaced(how):
    model = nn.Sequential(nn.Linear(3, 2, device="meta" if how == "to_empty" else DEVICE), nn.ReLU())
    clipper = ComponentClipper(model, CAP)
    if how == "to_empty":
        model.to_empty(device=DEVICE)
    elif how == "assign":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    else:
        model[0].bias = nn.Parameter(torch.zeros(2, device=DEVICE))
    backward(model, gradients_of(model))
    with pytest.warns(
        UserWarning, match="'0.(weight|bias)' is no longer the model's.* Make the clipper anew"
    ) as seen:
        clipper.clip_()
    assert len(seen) == 1
    assert seen[0].filename == __file__
    clipper.clip_()  # said once
    ComponentClipper(model, CAP).clip_()


def test_parameters_without_a_gradient_are_not_taken_for_replaced():
    model = Model()
    clipper = ComponentClipper(model, CAP)
    for _ in range(3):
        model.zero_grad()
        (model.first.weight.sum() * 2).backward()
        clipper.clip_()
        model.double()
        model.float()
