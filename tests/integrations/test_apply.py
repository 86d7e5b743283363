"""``apply()``: timm and torchtitan call ours, in every module that has their function, until it is undone."""

import sys
import types

import pytest

from cwclip_kernels import fused_component_clip_
from cwclip_kernels.integrations import timm, torchtitan
from helpers import copy_of, grads_of, parameters, same_bits
from libraries import LIBRARIES, stand_in

SHAPES = [(3, 4), (7,), (2, 5)]


APPLY = {"timm": timm.apply, "torchtitan": torchtitan.apply}


@pytest.fixture(params=APPLY)
def library(request, monkeypatch):
    """How to apply it, the original, and the modules that have it: the library's and one that has imported it."""
    original, _ = LIBRARIES[request.param]
    script = types.ModuleType("a_script")
    monkeypatch.setitem(sys.modules, "a_script", script)
    setattr(script, original.__name__, original)
    return APPLY[request.param], original, [*stand_in(request.param, monkeypatch), script]


def functions(original, holders):
    return [getattr(module, original.__name__) for module in holders]


def is_component_clipping(function, **options):
    ours = parameters(SHAPES)
    theirs = copy_of(ours)
    function(ours, 0.5)
    fused_component_clip_(theirs, 0.5, **options)
    return all(map(same_bits, grads_of(ours), grads_of(theirs)))


def test_until_it_is_removed(library):
    apply, original, holders = library
    handle = apply()
    assert all(map(is_component_clipping, functions(original, holders)))
    handle.remove()
    assert all(f is original for f in functions(original, holders))
    handle.remove()
    assert all(f is original for f in functions(original, holders))


def test_with_a_block_and_options(library):
    apply, original, holders = library
    with apply(components="all", eps=0.1):
        for function in functions(original, holders):
            assert is_component_clipping(function, components="all", eps=0.1)
    with pytest.raises(KeyError), apply():
        raise KeyError
    assert all(f is original for f in functions(original, holders))


def test_twice_is_refused(library):
    apply, original, holders = library
    with apply():
        with pytest.raises(RuntimeError, match=r"is replaced already, by this package; call remove\(\)"):
            apply()
        assert all(map(is_component_clipping, functions(original, holders)))
    with apply():
        pass


def test_what_was_replaced_since_stays(library):
    apply, original, holders = library
    handle = apply()
    setattr(holders[0], original.__name__, len)
    handle.remove()
    assert functions(original, holders) == [len] + [original] * (len(holders) - 1)


def test_a_module_that_imports_it_while_applied_gets_the_original_back(library, monkeypatch):
    apply, original, holders = library
    late = types.ModuleType("late")
    monkeypatch.setitem(sys.modules, "late", late)
    with apply():
        setattr(late, original.__name__, getattr(holders[0], original.__name__))
    assert functions(original, [late]) == [original]


def test_another_version_is_refused_by_name(library):
    apply, original, holders = library
    name = original.__name__

    def changed(parameters, max_norm, *, compute_only=False):
        pass

    for other, found in ((changed, r"\(parameters, max_norm, \*, compute_only=False\)"), (None, "no such function")):
        for module in holders:
            setattr(module, name, other)
        with pytest.raises(RuntimeError, match=rf"9\.8\.7: .*{name} was \(parameters, .*\), here it is {found}; "):
            apply()
        assert all(f is other for f in functions(original, holders))


def test_wrong_options_are_refused_at_once(library):
    apply, original, holders = library
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_norm'; the options are components, eps"):
        apply(max_norm=0.05)
    with pytest.raises(ValueError, match="nonfinite: expected one of"):
        apply(nonfinite="ignore")
    assert all(f is original for f in functions(original, holders))


def test_timms_other_modes_refuse_options_that_are_not_theirs(monkeypatch):
    utils, *_ = stand_in("timm", monkeypatch)
    with timm.apply(eps=1e-8), pytest.raises(ValueError, match="eps: 'agc' adds nothing to a norm"):
        utils.dispatch_clip_grad(parameters(SHAPES), 0.01, mode="agc")


@pytest.mark.parametrize("name", APPLY)
def test_without_the_library(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=name):
        APPLY[name]()
