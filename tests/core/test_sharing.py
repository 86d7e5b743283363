"""Gradients that have elements in common are refused; those that lie between each other's elements are clipped."""

import itertools
import random

import pytest
import torch

from cwclip_kernels import clip_gradients_, fused_component_clip_
from cwclip_kernels.core.checks import sharing
from helpers import DEVICE, parameter


def elements(view):
    """Byte addresses of all its elements."""
    size = view.element_size()
    places = itertools.product(*(range(n) for n in view.shape))
    starts = (sum(i * s for i, s in zip(place, view.stride(), strict=True)) for place in places)
    return {view.data_ptr() + size * start + byte for start in starts for byte in range(size)}


def random_view(base):
    """A part of a matrix: rows, columns or blocks with steps, maybe transposed, maybe seen as other dtype."""

    def part(size):
        start = random.randrange(size - 1)
        return slice(start, random.randrange(start + 1, size + 1), random.choice([1, 1, 2, 3]))

    view = base[part(base.shape[0]), part(base.shape[1])]
    return view.t() if random.random() < 0.3 else view


def test_exactly_those_with_an_element_in_common_are_found():
    random.seed(torch.initial_seed())
    found = {True: 0, False: 0}
    for _ in range(300):
        base = torch.zeros(random.randint(3, 9), random.randint(3, 9), device=DEVICE)
        views = [random_view(base) for _ in range(random.randint(2, 4))]
        if random.random() < 0.2:
            views.append(torch.view_as_real(torch.view_as_complex(base[:, :2].contiguous())))
        pairs = {
            (i, j) for (i, a), (j, b) in itertools.combinations(enumerate(views), 2) if elements(a) & elements(b)
        }
        shared = sharing(views)
        assert (shared is not None) == bool(pairs)
        assert shared is None or tuple(sorted(shared)) in pairs
        found[bool(pairs)] += 1
    assert min(found.values()) > 20  # both were tried


def test_bytes_of_another_dtype_count():
    base = torch.zeros(8, device=DEVICE)
    halves = base.view(torch.float16)
    assert sharing([base[::2], halves[2::4]]) is None  # the lower half of every other element
    assert sharing([base[::2], halves[1::4]]) is not None


def on_parameters(views):
    fused_component_clip_([(name, parameter(view)) for name, view in views.items()], 0.5)


@pytest.mark.parametrize("call", [on_parameters, lambda views: clip_gradients_(views, 0.5)])
def test_what_is_shared_in_part_is_refused_before_anything_is_changed(call):
    base = torch.ones(10, device=DEVICE)
    square = torch.ones(4, 4, device=DEVICE)
    for views in ({"a": base[0:8:2], "b": base[2:10:2]}, {"a": square.t(), "b": square[1:]}):
        with pytest.raises(ValueError, match="gradients of 'a' and 'b' share memory"):
            call(views)
    assert (base == 1).all()
    assert (square == 1).all()


def test_columns_of_one_matrix_are_clipped_each():
    square = torch.ones(4, 4, device=DEVICE)
    norms = clip_gradients_({"q": square[:, :2], "k": square[:, 2:]}, 1.0)
    assert norms.tolist() == pytest.approx([8**0.5] * 2)
    assert torch.allclose(square, torch.full_like(square, 8**-0.5))
