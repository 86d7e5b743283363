"""Clipping gradients that hang on no parameter: those of ``torch.func`` and ``torch.autograd.grad``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .components.gradients import GivenGradients, Grads, given_gradients
from .components.membership import Components
from .components.resolve import resolve
from .components.spec import ComponentSpec, Grouping
from .core import differentiable, traced
from .core.cache import session_for_gradients
from .core.caps import fixed_caps
from .core.checks import check_gradients, check_not_leaf
from .core.loss_scale import LossScale
from .core.modes import check_not_recorded, is_traced
from .core.options import Options, check_options
from .core.session import ClipSession
from .distributed.shards import is_dtensor
from .thresholds import Threshold
from .thresholds.by_pattern import Settled, settled
from .thresholds.constant import MaxNorm


def clip_gradients_(
    grads: Grads,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    components: Grouping = None,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    inv_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Clips each component of gradients that hang on no parameter by its own norm, in place.

        norm_c = (sum over component c of |g|^p)^(1/p)
        coef_c = min(1, max_norm_c / (norm_c + eps));  g <- coef_c * g

    For what ``torch.func.grad`` or ``torch.autograd.grad`` returned. Components are those of
    :func:`fused_component_clip_`, by the same names, and so are all other arguments, costs and errors. Thresholds
    learn, but for those that read parameters (``ParamRelative``), which are refused.

    Args:
        grads: a Tensor, a mapping of names to Tensors, or an iterable of Tensors or of (name, Tensor) pairs; None
            where there is no gradient, as ``allow_unused=True`` leaves it. Each is a component of its own, or part of
            one; two that share memory are refused. DTensors count as the whole tensors that they are shards of.
        max_norm: the caps; patterns are matched with the names, or with positions "0", "1", ... where there are none.
        norm_type: order p of the norm.
        error_if_nonfinite: same as ``nonfinite="error"``.
        components: what is clipped together. A callable gets each name and a tensor like the gradient.
        eps: added to the norm before dividing.
        nonfinite: what becomes of a component whose norm is inf or NaN.
        inv_scale: inverse of the loss scale, taken out in the same pass.
        found_inf: Tensor of one element, set to 1 if any gradient of a component is inf or NaN.
        backend: None for the best available.

    Returns:
        [K] norms before clipping, float32 (float64 if any gradient is); 0 where there is no gradient.

    Raises:
        TypeError, ValueError: an argument or gradient that isn't what it should be, or that has a graph of its own,
            which goes on without knowing of what is done in place: see ``clip_gradients``. Nothing is changed.
        RuntimeError: a non-finite norm under "error"; a named backend that can't serve; a call inside of a function
            that ``torch.func`` transforms. Nothing is changed.

    Example:
        >>> import torch
        >>> from cwclip_kernels import clip_gradients_
        >>> grads = {"weight": torch.tensor([[3.0, 4.0]]), "bias": torch.tensor([0.5])}
        >>> clip_gradients_(grads, max_norm=1.0)
        tensor([5.0000, 0.5000])
        >>> grads
        {'weight': tensor([[0.6000, 0.8000]]), 'bias': tensor([0.5000])}

    References:
        As :func:`fused_component_clip_`.
    """
    options = check_options(norm_type, error_if_nonfinite, eps, nonfinite, backend)
    scale, given = LossScale.of(inv_scale, found_inf), given_gradients(grads)
    if differentiable.is_transformed():
        raise RuntimeError(
            "grads: inside of a function that torch.func transforms nothing can be clipped in place; use "
            "clip_gradients, which returns new gradients"
        )
    inference = None if is_traced() else next((n for n, g in _pairs(given) if g.is_inference()), None)
    if inference is not None:
        raise ValueError(f"{_named(inference)} was made in inference mode; use clip_gradients, or clone() it")
    with_graph = _with_graph(given)
    if with_graph:
        raise ValueError(
            f"{_named(with_graph[0][0])} has a graph (create_graph=True), which would go on as if nothing had been "
            "clipped; use clip_gradients, whose result can be differentiated, or detach() it"
        )
    return _clip_(given, settled(max_norm), options, components, scale)


def clip_gradients(
    grads: Grads,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    components: Grouping = None,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    inv_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Any, Tensor]:
    """Clipped copies of gradients that hang on no parameter, which stay as they are; otherwise ``clip_gradients_``.

    The result can be differentiated, as meta-learning does: where gradients have a graph (``create_graph=True``) the
    clipped ones do too, with the coefficient's own derivative; caps count as constants. There, and in functions that
    ``torch.func`` transforms (``grad``, ``vmap``), it is computed by torch operations rather than kernels, so that
    ``backend`` has to be None or "reference"; in transformed functions thresholds, ``found_inf`` and "error" are
    refused as well.

    Args:
        grads: as for :func:`clip_gradients_`; they may share memory, or be expanded.
        max_norm: as there, like all others.
        norm_type: order p of the norm.
        error_if_nonfinite: same as ``nonfinite="error"``.
        components: what is clipped together.
        eps: added to the norm before dividing.
        nonfinite: what becomes of a component whose norm is inf or NaN.
        inv_scale: inverse of the loss scale, taken out as well.
        found_inf: Tensor of one element, set to 1 if any gradient of a component is inf or NaN.
        backend: None for the best available.

    Returns:
        The clipped gradients, in a dict, list, tuple or Tensor like the caller's (of pairs a list), and the [K] norms
        before clipping, which have no graph.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`clip_gradients_`, but for graphs and transforms.

    Example:
        >>> import torch
        >>> from cwclip_kernels import clip_gradients
        >>> loss = lambda params: (params["weight"] ** 2).sum() / 2 + params["bias"].sum()
        >>> params = {"weight": torch.tensor([3.0, 4.0]), "bias": torch.tensor([0.5])}
        >>> clip_gradients(torch.func.grad(loss)(params), max_norm=1.0)
        ({'weight': tensor([0.6000, 0.8000]), 'bias': tensor([1.0000])}, tensor([5., 1.]))
    """
    options = check_options(norm_type, error_if_nonfinite, eps, nonfinite, backend)
    scale, given = LossScale.of(inv_scale, found_inf), given_gradients(grads)
    is_transformed = differentiable.is_transformed()
    # In a transformed function its own arguments are leaves.
    has_graph = is_transformed or (len(_with_graph(given)) > 0 and torch.is_grad_enabled())
    if has_graph or differentiable.has_tangent(given.values):
        new, norms = _differentiable(given, settled(max_norm), options, components, scale, is_transformed)
    else:
        with torch.inference_mode(False):
            new = [None if grad is None else grad.detach().clone() for grad in given.values]
        copies = GivenGradients(given.given, new, given.named, given.like_given)
        norms = _clip_(copies, settled(max_norm), options, components, scale)
    return given.like_given(new), norms


def _with_graph(given: GivenGradients) -> list[tuple[str, Tensor]]:
    """The gradients with a graph, and their names; ValueError for a parameter."""
    found = [pair for pair in _pairs(given) if pair[1].requires_grad or isinstance(pair[1], torch.nn.Parameter)]
    for name, grad in found:
        check_not_leaf(grad, _named(name))
    return found


def _pairs(given: GivenGradients) -> list[tuple[str, Tensor]]:
    return [(name, grad) for name, grad in zip(given.given, given.values, strict=True) if grad is not None]


def _named(name: str) -> str:
    return f"the gradient of {name!r}"


def _clip_(
    given: GivenGradients, max_norm: Settled, options: Options, grouping: Grouping, scale: LossScale
) -> Tensor:
    """Clips in place, by the kernels."""
    if is_traced():
        if isinstance(max_norm, Threshold):
            raise RuntimeError(
                f"max_norm: {type(max_norm).__name__} can't be traced for gradients without parameters; give a "
                "number, a Tensor or a mapping, or clip outside of the compiled function"
            )
        return traced.clip_gradients_(given.values, _resolved(given, grouping), max_norm, options, scale)[0]
    check_not_recorded()
    session, like = _session(given, max_norm, options, grouping)
    if session.reductions is None and not isinstance(max_norm, Threshold):
        caps = session.caps_for(max_norm, like, options.rule)
        return session.clip_gradients_(given.values, like, caps, options, scale)[0]
    leaves = _leaves(given)
    return session.clip_(leaves, session.caps_for(max_norm, leaves, options.rule), options, scale)[0]


def _differentiable(
    given: GivenGradients,
    max_norm: Settled,
    options: Options,
    grouping: Grouping,
    scale: LossScale,
    is_transformed: bool,
) -> tuple[list[Tensor | None], Tensor]:
    if options.backend not in (None, "reference"):
        where = "in a function that torch.func transforms" if is_transformed else "of gradients with a graph"
        raise RuntimeError(f"backend={options.backend!r} can't clip copies {where}; backend=None takes torch's own")
    for name, grad in _pairs(given):
        if is_dtensor(grad) or grad.layout != torch.strided:
            kind = "a DTensor" if is_dtensor(grad) else f"{grad.layout}"
            raise TypeError(f"{_named(name)} is {kind}, which can't be clipped with its graph; detach() it")
    if is_transformed or is_traced():
        refused = [
            (isinstance(max_norm, Threshold), "max_norm: a threshold"),
            (options.raise_nonfinite, "nonfinite='error'"),
            (scale.found_inf is not None, "found_inf"),
        ]
        where = "in a function that torch.func transforms" if is_transformed else "for gradients with a graph here"
        for is_given, what in refused:
            if is_given:
                raise RuntimeError(f"{what} can't be used {where}; clip outside of it")
        resolved = _resolved(given, grouping)
        assert not isinstance(max_norm, Threshold)  # which has been refused
        policy = fixed_caps(max_norm, resolved)
    else:
        session, _ = _session(given, max_norm, options, grouping)
        resolved, policy = session.components, session.caps_for(max_norm, _leaves(given), options.rule)
    check_gradients(resolved, {i: g for i, g in enumerate(given.values) if g is not None}, writes=False)
    rule = options.rule if policy.adds_eps else options.rule.without_eps
    new, norms, coefs = differentiable.clipped(given.values, resolved, policy, rule, options.raise_nonfinite, scale)
    norms = norms.detach()
    if policy.update_ is not None:
        policy.update_(norms, coefs)
    return new, norms


def _resolved(given: GivenGradients, grouping: Grouping) -> Components:
    """The components, where gradients can't get stand-ins."""
    resolved = resolve(given.named_tensors(_tensors(given)), grouping)
    for position, problem in resolved.problems:
        if given.values[position] is not None:
            raise ValueError(problem)
    _check_cuts(given, resolved, grouping)
    return resolved


def _check_cuts(given: GivenGradients, resolved: Components, grouping: Grouping) -> None:
    """ValueError for a gradient that isn't there but is cut: without its shape its components aren't known."""
    if not isinstance(grouping, ComponentSpec) or all(grad is not None for grad in given.values):
        return
    cut = {*resolved.cut, *(position for position, _ in resolved.problems)}
    if not callable(grouping.base):  # else it may have left it out; cut into numbers, nothing is in no component
        cut |= {*range(len(given.values))} - resolved.clipped
    for position, (name, grad) in enumerate(zip(given.given, given.values, strict=True)):
        if grad is None and position in cut:
            raise ValueError(
                f"{_named(name)} is None, but components cuts it, and its shape isn't known; give zeros in its place"
            )


def _session(
    given: GivenGradients, max_norm: Settled, options: Options, grouping: Grouping
) -> tuple[ClipSession, list[Tensor]]:
    """The session, and a tensor for each gradient as it was made for."""
    if isinstance(max_norm, Threshold) and max_norm.reads_parameters:
        raise ValueError(
            f"max_norm: {max_norm} reads parameters, which these gradients have none of; set p.grad, "
            "and use fused_component_clip_"
        )
    like = _tensors(given)
    named = given.named_tensors(like)
    session = session_for_gradients(named, grouping, lambda: options.in_words(max_norm), lambda: _leaves(given))
    _check_cuts(given, session.components, grouping)
    return session, like


def _tensors(given: GivenGradients) -> list[Tensor]:
    """The gradients; empty tensors where there are none."""
    if all(grad is not None for grad in given.values):
        return given.values  # type: ignore[return-value]
    home = next((grad.device for grad in given.values if grad is not None), torch.device("cpu"))
    nothing = torch.empty(0, device=home)
    return [nothing if grad is None else grad for grad in given.values]


@torch.inference_mode(False)
def _leaves(given: GivenGradients) -> list[Tensor]:
    """Leaves that have these gradients as theirs and share their memory, so that they cost none."""
    leaves = []
    for name, grad, tensor in zip(given.given, given.values, _tensors(given), strict=True):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"{_named(name)} is {tensor.dtype}, which can't be clipped; convert it first")
        leaf = tensor.detach()
        if grad is not None:
            leaf.requires_grad_().grad = grad
        leaves.append(leaf)
    return leaves
