"""Clipping while the backward pass is still running: each parameter the moment its gradient is final."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.weak import TensorWeakRef

from .caps import CapPolicy, MaxNorm
from .clipper import ClipResult
from .components import CUT, Box, Components, Grouping, NamedTensors, Parameters, named_tensors, type_name
from .engine import Engine, Options, check_options
from .resolve import resolve
from .sharding import is_dtensor, is_flattened


def clip_in_backward(
    parameters: Parameters,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    *,
    components: Grouping = None,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    backend: str | None = None,
    optimizer: Optimizer | None = None,
    on_clip: Callable[[ClipResult], object] | None = None,
) -> BackwardClipping:
    """Clips each parameter's gradient in the backward pass, as soon as it is final, to the same bits as afterwards.

    A component's norm asks for nothing but its own gradient, so there is no need to wait for the others, as a global
    norm has to. With an ``optimizer`` the parameter is stepped at once too, and its gradient freed: at no time do
    more than a few gradients exist, and the peak of memory falls by nearly the size of them all. The training loop
    is then ``loss.backward()`` and nothing else; ``optimizer.step()`` and ``zero_grad()`` find nothing to do.

    Not for gradients of a scaled loss (float16 under a ``GradScaler``), and not for gradient accumulation.

    Args:
        parameters: as for :func:`fused_component_clip_`; those that require grad now.
        max_norm: likewise. Of ``cwclip_kernels.thresholds`` those that don't depend on the step's own norms.
        norm_type: likewise.
        components: likewise; each component must lie within one parameter.
        eps: likewise.
        nonfinite: likewise, but "error", which would come when other parameters have been clipped or stepped.
        backend: likewise.
        optimizer: steps each of its parameters right after it is clipped, and frees the gradient.
        on_clip: called with a ``ClipResult`` at the end of each backward pass, such as ``ClipRecorder.record``.

    Returns:
        A handle: ``remove()`` ends it, ``last`` is the last backward pass's ``ClipResult``.

    Raises:
        TypeError, ValueError: an argument that isn't what it should be; parameters of ``DistributedDataParallel`` or
            sharded ones, whose hooks see local gradients; a component of several parameters.
        RuntimeError: in the backward pass, where a gradient is accumulated onto one that has been clipped already.

    Example:
        >>> import torch
        >>> from cwclip_kernels import clip_in_backward
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> handle = clip_in_backward(model, 0.1, optimizer=optimizer)
        >>> model(torch.ones(1, 2)).sum().backward()  # clips, steps, frees
        >>> model.weight.grad is None, handle.last.norms
        (True, tensor([1.4142, 1.0000]))
    """
    options = check_options(norm_type, False, eps, nonfinite, backend)
    if options.raise_nonfinite:
        raise ValueError(
            "nonfinite: 'error' would come when other parameters have been clipped already; use 'zero', 'skip' or "
            "'propagate', or clip after backward (ComponentClipper)"
        )
    _check_not_distributed(parameters)
    named = named_tensors(parameters)
    _check_not_sharded(named)
    trained = [i for i, tensor in enumerate(named.tensors) if tensor.requires_grad]
    if not trained:
        raise ValueError("parameters: none requires grad")
    resolved = resolve(named, components)
    _check_separate(resolved, set(trained))
    if optimizer is not None:
        _check_optimizer(optimizer)
    return BackwardClipping(named.tensors, trained, resolved, max_norm, options, optimizer, on_clip)


class BackwardClipping:
    """What ``clip_in_backward`` set up. As a context manager it ends itself.

    Attributes:
        names: the K component names.
        last: what the last backward pass's clipping found and did; None before the first. A component that got no
            gradient has norm 0 and coefficient 1.
    """

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        trained: list[int],
        components: Components,
        max_norm: MaxNorm,
        options: Options,
        optimizer: Optimizer | None,
        on_clip: Callable[[ClipResult], object] | None,
    ) -> None:
        self.names = components.names
        self.last: ClipResult | None = None
        self._policy = Engine(components, tensors).policy(max_norm, tensors, options.rule)
        if self._policy.needs_norms:
            raise ValueError(
                f"max_norm: {type_name(max_norm)} depends on all norms of a step, which aren't known in the backward "
                "pass; clip at the step instead (ComponentClipper.attach)"
            )
        self._options = options
        self._optimizer = optimizer
        self._on_clip = on_clip
        self._lock = threading.Lock()  # gradients of several devices arrive on several threads
        self._pass: _Pass | None = None
        stepped = set() if optimizer is None else {id(p) for g in optimizer.param_groups for p in g["params"]}
        members: dict[int, list[tuple[int, Box]]] = {}
        for position, component, box in components.members():
            members.setdefault(position, []).append((component, box))
        self._hooks = []
        for position in trained:
            if position in members:
                tensor = tensors[position]
                single = _single(components, tensor, position, members[position], id(tensor) in stepped)
                register: Any = tensor.register_post_accumulate_grad_hook
                self._hooks.append(register(self._hook_for(single)))

    def remove(self) -> None:
        """Ends clipping in the backward pass."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> BackwardClipping:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _hook_for(self, single: _Single) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._clip(single, parameter, parameter.grad)

        return hook

    def _clip(self, single: _Single, parameter: Tensor, grad: Tensor) -> None:
        single.check_not_accumulated(grad)
        current = self._current_pass()
        caps = _Share(current.caps_on(grad.device), single.own, self._policy.adds_eps)
        norms, coefs, _ = single.engine.clip_((parameter,), caps, self._options)
        with self._lock:
            current.found.append((single.own, norms, coefs))
            if single.is_stepped and self._optimizer is not None:
                with _alone(self._optimizer, parameter):
                    self._optimizer.step()
                parameter.grad = None
                return
        single.clipped = TensorWeakRef(grad), grad._version

    def _current_pass(self) -> _Pass:
        graph_task = torch._C._current_graph_task_id()
        with self._lock:
            if self._pass is None or self._pass.graph_task != graph_task:  # what an error left behind is forgotten
                self._pass = _Pass(graph_task, self._policy)
                torch.autograd.Variable._execution_engine.queue_callback(self._finish)
            return self._pass

    @torch.no_grad()
    def _finish(self) -> None:
        """Puts the backward pass's results together, at its end."""
        current, self._pass = self._pass, None
        if current is None or not current.found:
            return
        home = current.found[-1][1].device
        dtype = max((norms.dtype for _, norms, _ in current.found), key=lambda kind: kind.itemsize)
        norms = torch.zeros(len(self.names), dtype=dtype, device=home)
        coefs = torch.ones_like(norms)
        for own, some_norms, some_coefs in current.found:
            norms[own], coefs[own] = some_norms.to(home, dtype), some_coefs.to(home, dtype)
        self._policy.update_(norms, coefs)
        self.last = ClipResult(self.names, norms, coefs, current.caps_on(home))
        if self._on_clip is not None:
            self._on_clip(self.last)


@dataclass
class _Single:
    """One parameter, clipped by itself.

    Attributes:
        name: of the parameter.
        own: where its components are among all K.
        engine: clips these.
        is_stepped: whether the optimizer has it.
        clipped: its gradient when it was last clipped, and the version it had then.
    """

    name: str
    own: slice
    engine: Engine
    is_stepped: bool
    clipped: tuple[TensorWeakRef, int] | None = None

    def check_not_accumulated(self, grad: Tensor) -> None:
        """A gradient written just once since it was clipped has been added to; zeroing it, too, would make two."""
        if self.clipped is None or self.clipped[0]() is not grad or grad._version != self.clipped[1] + 1:
            return
        raise RuntimeError(
            f"the gradient of {self.name!r} was added to one that is clipped already: gradient accumulation (or a "
            "tied parameter under reentrant checkpointing) can't be clipped in the backward pass. Call zero_grad() "
            "between backward passes, or clip once at the step: ComponentClipper.attach(optimizer)"
        )


def _single(
    components: Components, tensor: Tensor, position: int, members: list[tuple[int, Box]], is_stepped: bool
) -> _Single:
    # Its components have consecutive numbers: no other parameter has a part in them.
    own = slice(members[0][0], members[-1][0] + 1)
    cut = any(box for _, box in members)
    slices = tuple((0, component - own.start, box) for component, box in members) if cut else ()
    name = components.tensor_names[position]
    mine = Components(components.names[own], (CUT if cut else 0,), (name,), slices)
    return _Single(name, own, Engine(mine, (tensor,)), is_stepped)


class _Pass:
    """One backward pass: caps as they were at its first gradient, and what has been found so far."""

    def __init__(self, graph_task: int, policy: CapPolicy) -> None:
        self.graph_task = graph_task
        self.found: list[tuple[slice, Tensor, Tensor]] = []
        self._policy = policy
        self._caps: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def caps_on(self, device: torch.device) -> Tensor:
        if device not in self._caps:
            first = next(iter(self._caps.values()), None)
            self._caps[device] = self._policy.caps(device, None) if first is None else first.to(device)
        return self._caps[device]


class _Share:
    """The caps of some components, as a policy."""

    needs_norms = False

    def __init__(self, caps: Tensor, own: slice, adds_eps: bool) -> None:
        self.adds_eps = adds_eps
        self._caps = caps[own] if caps.ndim else caps

    def caps(self, device: torch.device, norms: Tensor | None = None) -> Tensor:
        return self._caps

    def update_(self, norms: Tensor, coefs: Tensor) -> None:
        """Done for all components together, at the end of the backward pass."""


@contextmanager
def _alone(optimizer: Optimizer, parameter: Tensor) -> Iterator[None]:
    """Leaves an optimizer nothing but one parameter, for a while."""
    kept = [group["params"] for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is parameter]
        yield
    finally:
        for group, parameters in zip(optimizer.param_groups, kept, strict=True):
            group["params"] = parameters


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------


def _check_not_distributed(parameters: Parameters) -> None:
    if not (isinstance(parameters, nn.Module) and torch.distributed.is_available()):
        return
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    for module in parameters.modules():
        if isinstance(module, DistributedDataParallel | FullyShardedDataParallel):
            raise ValueError(
                f"parameters: in a {type_name(module)} the backward pass sees local gradients, not yet averaged over "
                "ranks; clip at the step instead: ComponentClipper.attach(optimizer)"
            )


def _check_not_sharded(named: NamedTensors) -> None:
    for name, tensor in zip(named.names, named.tensors, strict=True):
        if is_flattened(tensor):
            raise ValueError(
                f"parameters: FullyShardedDataParallel keeps a part of {name!r} on each rank, whose norm takes all "
                "of them; clip at the step instead: ComponentClipper.attach(optimizer)"
            )
        if is_dtensor(tensor):
            raise ValueError(
                f"parameters: {name!r} is a DTensor, whose norm takes all its ranks. In the backward pass each "
                "gradient comes by itself, and perhaps not on every rank: they would wait for each other in vain. "
                "Clip at the step instead, with one all-reduce for all: ComponentClipper.attach(optimizer)"
            )


def _check_separate(components: Components, trained: set[int]) -> None:
    owner: dict[int, int] = {}
    for position, component, _ in components.members():
        if position not in trained:
            continue
        first = owner.setdefault(component, position)
        if first != position:
            names = components.tensor_names
            raise ValueError(
                f"components: {components.names[component]!r} consists of several parameters ({names[first]!r}, "
                f"{names[position]!r}, ...), whose gradients are not final together; use components='parameter' or "
                "slices of parameters, or clip at the step: ComponentClipper.attach(optimizer)"
            )


def _check_optimizer(optimizer: object) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer or None, not {type_name(optimizer)}")
    if isinstance(optimizer, LBFGS):
        raise ValueError("optimizer: LBFGS needs all gradients at once; use ComponentClipper.attach(optimizer)")
