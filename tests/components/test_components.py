"""Names to components: words, callables, patterns, every form of ``parameters``."""

import pytest
import torch
from torch import nn

from cwclip_kernels.components.grouping import layer_of, module_of, type_of
from cwclip_kernels.components.parameters import named_tensors
from cwclip_kernels.components.patterns import match_patterns
from cwclip_kernels.components.resolve import resolve


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


NAMES = (
    "embedding.weight",
    "layers.0.weight",
    "layers.0.bias",
    "layers.1.weight",
    "layers.1.bias",
)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (None, NAMES),
        ("parameter", NAMES),
        ("module", ("embedding", "layers.0", "layers.1")),
        ("layer", ("embedding", "layers.0", "layers.1")),
        ("type", ("embedding.weight", "layers.*.weight", "layers.*.bias")),
        ("all", ("all",)),
    ],
)
def test_words_group_a_model_and_tied_weights_count_once(word, expected):
    assert resolve(named_tensors(Tied()), word).names == expected


@pytest.mark.parametrize(
    ("name", "module", "layer", "kind"),
    [
        # A transformer's layer, a mixture of experts (the last number is the expert), an embedding, a ParameterList
        # entry, a root parameter, and digits inside a word, which are no number.
        ("h.11.attn.c_attn.weight", "h.11.attn.c_attn", "h.11", "h.*.attn.c_attn.weight"),
        ("layers.3.experts.17.w1", "layers.3.experts.17", "layers.3.experts.17", "layers.*.experts.*.w1"),
        ("embeddings.word.weight", "embeddings.word", "embeddings.word", "embeddings.word.weight"),
        ("scales.0", "scales", "scales.0", "scales.*"),
        ("scale", "", "", "scale"),
        ("conv1.weight", "conv1", "conv1", "conv1.weight"),
    ],
)
def test_name_rules(name, module, layer, kind):
    assert (module_of(name), layer_of(name), type_of(name)) == (module, layer, kind)


def test_callable_chooses_keys_and_leaves_alone():
    components = resolve(named_tensors(Tied()), lambda name, p: None if p.ndim < 2 else ("matrix", p.shape[0]))
    assert components.names == ("('matrix', 4)", "('matrix', 3)")
    assert components.members == ((0, 0, ()), (1, 1, ()), (3, 1, ()))


@pytest.mark.parametrize(
    ("grouping", "error", "message"),
    [
        ("layers", ValueError, "components: expected one of parameter, module, layer, type, all"),
        (3, TypeError, "components: expected one of .* not int"),
        (lambda name, p: [name], TypeError, "unhashable list for 'embedding.weight'"),
        (lambda name, p: 1 if "0" in name else "1", ValueError, "two different keys are both written '1'"),
    ],
)
def test_bad_groupings_are_named(grouping, error, message):
    with pytest.raises(error, match=message):
        resolve(named_tensors(Tied()), grouping)


@pytest.mark.parametrize("word", ["module", "layer", "type"])
def test_words_about_names_need_names(word):
    with pytest.raises(ValueError, match="needs names: pass the module"):
        resolve(named_tensors(list(Tied().parameters())), word)


def test_every_form_of_parameters():
    model = Tied()
    weight = model.embedding.weight
    tensors = list(model.parameters())
    for form in (
        model,
        model.named_parameters(),
        list(model.named_parameters()),
        tuple(model.named_parameters()),
    ):
        assert named_tensors(form).names == NAMES
    for form in (model.parameters(), tensors, tuple(tensors), set(tensors)):
        assert named_tensors(form).names == ("0", "1", "2", "3", "4")
    assert named_tensors(weight).tensors == (weight,)
    assert named_tensors([weight, model.layers[0].bias, weight]).names == ("0", "1")
    assert named_tensors([("a", weight), ("b", weight)]).names == ("a",)
    assert named_tensors([]).names == ()


@pytest.mark.parametrize(
    ("form", "error", "message"),
    [
        ("weight", TypeError, "parameters: expected an nn.Module.* not str"),
        (3, TypeError, "parameters: expected .* not int"),
        (None, TypeError, "parameters: expected .* not NoneType"),
        ([1.0], TypeError, r"parameters\[0\]: expected .* not float"),
        ([None], TypeError, r"parameters\[0\]: expected .* not NoneType"),
        ({"w": nn.Parameter(torch.ones(1))}, TypeError, "not dict; pass parameters.items()"),
        ([{"params": []}], TypeError, r"parameters\[0\]: .* not dict"),
        ([nn.Linear(1, 1)], TypeError, r"parameters\[0\]: .* not Linear"),
        ([(1, nn.Parameter(torch.ones(1)))], TypeError, r"parameters\[0\]: .* not tuple"),
        ([("w", nn.Parameter(torch.ones(1))), nn.Parameter(torch.ones(1))], TypeError, r"parameters\[1\]"),
        ([nn.Parameter(torch.ones(1)), ("w", nn.Parameter(torch.ones(1)))], TypeError, r"parameters\[1\]"),
        ([("w", nn.Parameter(torch.ones(1))), ("w", nn.Parameter(torch.ones(1)))], ValueError, "named 'w'"),
        ([torch.ones(2), torch.ones(3)], ValueError, "none of the 2 tensors .* or the gradients to clip_gradients_"),
    ],
)
def test_bad_parameters_are_named(form, error, message):
    with pytest.raises(error, match=message):
        named_tensors(form)


def test_used_up_generator_warns():
    generator = Tied().parameters()
    list(generator)
    with pytest.warns(UserWarning, match="already consumed generator"):
        assert named_tensors(generator).names == ()


def test_patterns_first_match_wins_exact_names_too():
    names = ("h.0.weight[q]", "h.0.weight[k]", "h.0.bias", "h.1.bias", "head")
    caps = match_patterns(names, {"h.0.weight[q]": 1.0, "h.0.*": 2.0, "*.bias": 3.0})
    assert [caps.get(name) for name in names] == [1.0, 2.0, 2.0, 3.0, None]
    with pytest.raises(ValueError, match=r"pattern 'H\.\*' matches none of the 5 components \('h.0.weight\[q\]'"):
        match_patterns(names, {"head": 1.0, "H.*": 2.0})
