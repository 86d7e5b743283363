"""DeepSpeed engines on the ranks of ``on_ranks``, beside a plain model that sees the batches of all ranks."""

import contextlib
import functools
import logging
import os
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ranks import told_by_launcher

# What a configuration says beside its ZeRO stage, by a name for tests.
PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16-fp32": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}},
}


ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # only a name here, as there is a group


@functools.cache
def started():
    """DeepSpeed, on the process group of this rank. Its CPU can do float16, which it doesn't claim."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with quiet():
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from deepspeed.runtime import bf16_optimizer

        deepspeed.utils.logger.setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which it would compile
        type(get_accelerator()).is_fp16_supported = lambda self: True
        bf16_optimizer.see_memory_usage = lambda *_, **__: None  # takes a second
        deepspeed.init_distributed("gloo")
    return deepspeed


@contextlib.contextmanager
def quiet():
    """As a launcher starts DeepSpeed; and what it warns of is not ours to answer for."""
    with told_by_launcher(**ADDRESS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Model(nn.Module):
    """Sizes that no number of ranks divides; a tied, a frozen and an unused parameter, and several in a row of 1."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.first = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.norm = nn.LayerNorm(7)
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(2))
        self.last = nn.Linear(7, 5, bias=False)
        self.unused = nn.Linear(3, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(5, 11)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.frozen(torch.tanh(self.first(self.embed(tokens))))
        x = self.norm(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.last(x) * self.scale).float()


def groups_of(model):
    """Two param groups, of the parameters that are trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def engine_of(model, optimizer, stage, precision="fp32", zero=None, mesh_param=None, **config):
    """An engine for micro-batches of 2; ``zero`` and ``config`` are more of its configuration, None leaves out."""
    deepspeed = started()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **(zero or {})},
        **PRECISIONS[precision],
        **config,
    }
    config = {key: value for key, value in config.items() if value is not None}
    deepspeed.utils.groups.mesh_device = None  # an earlier engine's, whose group of fewer ranks would be used
    with quiet(), contextlib.redirect_stdout(None):
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config, mesh_param=mesh_param)[0]


def made(stage, precision="fp32", zero=None, optimizer=torch.optim.SGD, **config):
    """An engine over the same model at each call."""
    torch.manual_seed(0)
    model = Model()
    return engine_of(model, optimizer(groups_of(model), lr=0.1), stage, precision, zero, **config)


def batch_of(step):
    """The batch of all ranks, the same everywhere."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(11, (2 * dist.get_world_size(), 4), generator=generator)


def loss_of(model, tokens):
    """Far from small, so that norms are above their caps."""
    return 10 * F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())


def backward(engine, step, scale=1.0):
    """A backward pass of this rank's part of the batch."""
    with quiet():
        engine.backward(loss_of(engine, batch_of(step)[2 * dist.get_rank() :][:2]) * scale)


def step_of(engine):
    """The engine's step."""
    with quiet():
        engine.step()


def train(engine, step):
    """A step of the engine."""
    backward(engine, step)
    step_of(engine)


def train_plain(model, optimizer, clipper, step):
    """A step of the plain model, with the whole batch; what clipping found."""
    optimizer.zero_grad()
    loss_of(model, batch_of(step)).backward()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)  # as for DeepSpeed, so that weight decay is the same
    result = clipper.clip_()
    optimizer.step()
    return result


def full_gradients(engine):
    """The averaged gradients of the trained parameters, by name, still with the loss scale."""
    from deepspeed.utils import safe_get_full_grad

    with quiet():
        found = {n: safe_get_full_grad(p) for n, p in engine.module.named_parameters() if p.requires_grad}
    return {name: None if grad is None else grad.detach().clone() for name, grad in found.items()}


def full_parameters(engine):
    """The parameters that the optimizer steps, whole, by name."""
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer, copies = engine.optimizer, {}
    for group, own in zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False):
        copies |= {id(p): copy for p, copy in zip(group, own, strict=True)}
    found = {}
    with quiet():
        for name, p in engine.module.named_parameters():
            if p.requires_grad:
                kept = copies[id(p)] if id(p) in copies else safe_get_full_fp32_param(p)
                found[name] = (p if kept is None else kept).detach().clone()
    return found
