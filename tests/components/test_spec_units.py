"""Components of single units: of output channels, kernels, tokens."""

import math

import pytest
import torch

from cwclip_kernels import ComponentClipper, ComponentSpec, fused_component_clip_
from cwclip_kernels.thresholds import ParamRelative
from helpers import DEVICE, parameter, random_grad


def test_units_along_several_dims_are_named_by_their_indices():
    pairs = [("conv.weight", parameter(random_grad((2, 3, 2)))), ("fc.weight", parameter(random_grad((2, 3))))]
    names = ComponentClipper(pairs, 0.1, components=ComponentSpec().unitwise("*", dim=(0, 1))).names
    # A matrix stays whole, whose units would be single numbers, as a vector does along one dim.
    assert names == (*(f"conv.weight[{i},{j}]" for i in range(2) for j in range(3)), "fc.weight")
    spec = ComponentSpec().unitwise("conv.*", dim=(-1, 0)).split("conv.*", sizes=3, dim=1)
    result = ComponentClipper(pairs, {"conv.weight[1,0][0]": 0.1}, components=spec).clip_()
    assert result.names[:3] == ("conv.weight[0,0][0]", "conv.weight[0,1][0]", "conv.weight[1,0][0]")
    assert result.caps[:3].tolist() == [math.inf, math.inf, 0.1]
    with pytest.raises(ValueError, match=r"'conv.weight' is cut along dim 0 twice"):
        ComponentClipper(pairs, 0.1, components=ComponentSpec().unitwise("conv.*", dim=(0, -3)))
    with pytest.raises(ValueError, match=r"'conv.weight' has shape \[2, 3, 2\], no dim 3"):
        ComponentClipper(pairs, 0.1, components=ComponentSpec().unitwise("conv.*", dim=(0, 3)))


class TestUnits:
    """AGC unit by unit, whatever axis units lie along."""

    @pytest.mark.parametrize(
        ("module", "spec", "axes"),
        [
            (torch.nn.Linear(3, 4), ComponentSpec().unitwise("weight"), (1,)),
            (torch.nn.Conv2d(4, 6, 2, groups=2), ComponentSpec().unitwise("weight"), (1, 2, 3)),
            (torch.nn.Conv1d(3, 2, 2), ComponentSpec().unitwise("weight", dim=(0, 1)), (2,)),
            (torch.nn.ConvTranspose2d(3, 2, 2), ComponentSpec().unitwise("*", dim=1), (0, 2, 3)),
            (torch.nn.Embedding(5, 3), ComponentSpec().unitwise("weight", dim=-1), (0,)),
        ],
    )
    def test_norms_are_over_the_other_axes(self, module, spec, axes):
        """As optax's ``adaptive_grad_clip(axis=axes)``, which names the axes that are summed over."""
        module.to(DEVICE)
        w = module.weight
        w.grad = random_grad(w.shape)
        size = w.detach().double().pow(2).sum(axes, keepdim=True).sqrt().clamp(min=1e-3) * 0.1
        grad = w.grad.double()
        norm = grad.pow(2).sum(axes, keepdim=True).sqrt()
        expected = torch.where(norm > size, grad * (size / norm), grad)
        fused_component_clip_(module, ParamRelative(0.1), components=spec)
        torch.testing.assert_close(w.grad.double(), expected, rtol=2e-6, atol=1e-12)

    def test_output_channels_of_a_grouped_transposed_convolution(self):
        """Channel c of group g reads the inputs of that group alone."""
        layer = torch.nn.ConvTranspose1d(4, 6, 2, groups=2).to(DEVICE)
        w = layer.weight  # [in, out/groups, 2]
        w.grad = random_grad(w.shape)
        before = w.grad.clone()
        spec = ComponentSpec().split("weight", sizes=2).unitwise("weight", dim=1)
        result = ComponentClipper(layer, math.inf, components=spec).clip_()
        norms = dict(zip(result.names, result.norms.tolist(), strict=True))
        for g in range(2):
            for c in range(3):
                wanted = before[2 * g : 2 * g + 2, c].norm().item()
                assert norms[f"weight[{g}][{c}]"] == pytest.approx(wanted, rel=1e-5)
