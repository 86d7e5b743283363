"""What both ways into transformers' Trainer share: the model's own names whatever wraps it, and the cap."""

import pytest
import torch
from torch import nn

from accelerate_models import steps_agree, with_fsdp1, wrapped
from cwclip_kernels import fused_component_clip_
from cwclip_kernels.integrations.accelerate import clip_grad_norm_
from ranks import on_ranks
from small_transformer import batches

pytest.importorskip("transformers")

from cwclip_kernels.integrations.transformers.clipping import TrainerClipping


def small():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def test_a_cap_that_changes_is_followed():
    model, clipping = small(), TrainerClipping()
    for cap in (0.1, 0.2, None, 0.0, -1.0):
        model(torch.ones(1, 3)).sum().backward()
        clipping.clip_(model, cap)
        assert clipping.last.caps.item() == (cap if cap and cap > 0 else torch.inf)


def test_no_component_at_all():
    clipping = TrainerClipping(0.1, components=lambda name, parameter: None)
    model = small()
    model(torch.ones(1, 3)).sum().backward()
    assert clipping.clip_(model).item() == 0.0
    assert clipping.numbers() == {}


@on_ranks(2)
def test_fsdp1_is_clipped_over_its_own_group():
    model, clipping = wrapped(), TrainerClipping(0.1)
    steps_agree(torch.Tensor.backward, model, lambda m: clipping.clip_(m))
    model(batches()[0]).square().sum().backward()
    clipping.clip_(model)
    assert not any("_fsdp" in name for name in clipping.last.names)
    model(batches()[0]).square().sum().backward()
    same, other = TrainerClipping(torch.inf, process_group=model.process_group), TrainerClipping(torch.inf)
    torch.testing.assert_close(same.clip_(model), other.clip_(model), rtol=0.0, atol=0.0)


class Around(nn.Module):
    """FSDP around one module alone, and what is whole beside it."""

    def __init__(self):
        super().__init__()
        self.inner = wrapped()
        self.packed = nn.Parameter(torch.ones(5, dtype=torch.uint8), requires_grad=False)
        self.base = nn.Linear(3, 3).double().requires_grad_(False)

    def forward(self, tokens):
        return self.base(self.inner(tokens))


@on_ranks(2)
def test_what_fsdp1_leaves_whole_may_be_frozen():
    """And learn later, half of the way through a run: it counts once."""
    model, clipping = Around(), TrainerClipping(0.1)
    for frozen in (True, True, False):
        model.base.requires_grad_(not frozen)
        model(batches()[0]).square().sum().backward()
        expected = clip_grad_norm_(with_fsdp1(model.inner), model.inner, torch.inf)
        if not frozen:
            expected = torch.stack([expected, *(p.grad.norm().to(expected) for p in model.base.parameters())]).norm()
        total = clipping.clip_(model)
        torch.testing.assert_close(total, expected)
        model.zero_grad()


def test_the_total_is_that_of_all():
    model, clipping = small(), TrainerClipping(0.1, norm_type=1.0)
    model(torch.ones(1, 3)).sum().backward()
    expected = sum(p.grad.abs().sum() for p in model.parameters())
    torch.testing.assert_close(clipping.clip_(model), expected)
    assert fused_component_clip_(model, torch.inf, norm_type=1.0).max() <= 0.1 + 1e-6
