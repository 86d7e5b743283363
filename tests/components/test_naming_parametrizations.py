"""What torch's parametrizations make of names, and modules that are merely called so."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from cwclip_kernels import component_norms
from cwclip_kernels.components.grouping import layer_of, module_of, type_of
from cwclip_kernels.components.parameters import named_tensors
from cwclip_kernels.components.resolve import resolve
from helpers import random_grad
from naming_models import small


@pytest.mark.parametrize(
    ("name", "module", "layer", "kind"),
    [
        ("enc.lin.parametrizations.weight.original0", "enc.lin", "enc.lin", None),
        ("enc.lin.parametrizations.weight.original", "enc.lin", "enc.lin", None),
        ("h.3.lin.parametrizations.weight.0.lora_A", "h.3.lin", "h.3", "h.*.lin.parametrizations.weight.0.lora_A"),
        ("h.3.parametrizations.weight.1.net.2.bias", "h.3", "h.3", "h.*.parametrizations.weight.1.net.2.bias"),
        ("parametrizations.weight.original1", "", "", None),
        # A module of that name which is none of torch's.
        ("parametrizations.weight", "parametrizations", "parametrizations", None),
        ("parametrizations.lin.weight", "parametrizations.lin", "parametrizations.lin", None),
        (
            "parametrizations.a.0.weight",
            "parametrizations.a.0",
            "parametrizations.a.0",
            "parametrizations.a.*.weight",
        ),
        ("parametrizations.a.original.weight", "parametrizations.a.original", "parametrizations.a.original", None),
        (
            "enc.parametrizations.original1.w",
            "enc.parametrizations.original1",
            "enc.parametrizations.original1",
            None,
        ),
        # A parameter in a ParameterList.
        (
            "enc.parametrizations.a.0",
            "enc.parametrizations.a",
            "enc.parametrizations.a.0",
            "enc.parametrizations.a.*",
        ),
    ],
)
def test_name_rules_of_parametrizations(name, module, layer, kind):
    assert (module_of(name), layer_of(name), type_of(name)) == (module, layer, kind or name)


class LowRank(nn.Module):
    def __init__(self, rows, columns):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(rows, 1)), nn.Parameter(torch.ones(1, columns))

    def forward(self, weight):
        return weight + self.a @ self.b


def with_low_rank(linear):
    parametrize.register_parametrization(linear, "weight", LowRank(*linear.weight.shape))
    return linear


@pytest.mark.parametrize("change", [parametrizations.weight_norm, parametrizations.spectral_norm, with_low_rank])
def test_a_parametrized_weight_goes_with_its_bias(change):
    model = small()
    expected = resolve(named_tensors(model), "module").names
    change(model[0])
    change(change(model[1][0]))
    named = named_tensors(model)
    assert resolve(named, "module").names == resolve(named, "layer").names == expected
    for p in model.parameters():
        p.grad = random_grad(p.shape)
    together = torch.cat([p.grad.flatten() for p in model[0].parameters()])
    norms = component_norms(model, components="module")
    torch.testing.assert_close(norms[0], together.norm())


@pytest.mark.parametrize("change", [parametrizations.weight_norm, parametrizations.spectral_norm, with_low_rank])
def test_the_outermost_module_may_be_parametrized(change):
    model = change(change(nn.Linear(3, 2)))
    for form in (model, list(model.named_parameters()), list(nn.DataParallel(model).named_parameters())):
        named = named_tensors(form)
        assert resolve(named, "module").names == resolve(named, "layer").names == ("",)


def test_modules_that_are_only_called_as_parametrizations_keep_their_components():
    def blocks():
        return nn.ModuleDict({"a": small(), "b": small()})

    model = nn.ModuleDict({"parametrizations": blocks(), "head": nn.Linear(2, 1)})
    for form in (model, list(model.named_parameters()), list(nn.DataParallel(model).named_parameters())):
        named = named_tensors(form)
        own = {f"parametrizations.{name}.{i}" for name in "ab" for i in ("0", "1.0", "1.1")}
        assert set(resolve(named, "module").names) == {*own, "head"}
        assert set(resolve(named, "layer").names) == set(resolve(named, "module").names)
