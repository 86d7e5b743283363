"""(name, parameter) pairs with gradients, for what looks at names."""

from torch import nn

from helpers import parameter, random_grad

NAMES = ("a.weight", "a.bias", "b.weight", "b.bias", "head")
SHAPES = ((4, 3), (4,), (2, 4), (2,), (5,))


def model_of(names=NAMES):
    """(name, parameter) pairs with values and gradients."""
    pairs = [(name, parameter(random_grad(shape))) for name, shape in zip(names, SHAPES, strict=True)]
    for _, p in pairs:
        p.data.normal_()
    return pairs


def twin_of(pairs):
    twins = [(name, nn.Parameter(p.detach().clone(), p.requires_grad)) for name, p in pairs]
    for (_, p), (_, twin) in zip(pairs, twins, strict=True):
        twin.grad = None if p.grad is None else p.grad.clone()
    return twins


def give_gradients(*models, scale=1.0):
    for all_own in zip(*models, strict=True):
        grad = random_grad(all_own[0][1].shape, scale=scale)
        for _, p in all_own:
            p.grad = grad.clone()
