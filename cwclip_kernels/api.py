"""The functions: component clipping in one call, and measuring without touching."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.multiprocessing.reductions import StorageWeakRef

from . import compiled
from .caps import MaxNorm
from .components import Grouping, Parameters, as_items, named_tensors
from .distributed.groups import as_group, check_parts
from .distributed.share import local_value
from .engine import Engine, check_options, settings_in_words
from .native import form_of
from .resolve import resolve
from .scaled_loss import NOT_SCALED, ScaledLoss
from .spec import ComponentSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def fused_component_clip_(
    parameters: Parameters,
    max_norm: MaxNorm,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    components: Grouping = None,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    inv_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    pp_mesh: ProcessGroup | DeviceMesh | None = None,
    backend: str | None = None,
) -> Tensor:
    """Clips each component's gradient to its own norm, in place.

        norm_c = (sum over component c of |g|^p)^(1/p)
        coef_c = min(1, max_norm_c / (norm_c + eps));  g <- coef_c * g

    The first four arguments are those of ``torch.nn.utils.clip_grad_norm_``, in its order. Where coef_c is 1
    nothing is written. No host sync, except to raise for a non-finite norm when that is asked for, to add up
    duplicate indices of a sparse gradient, and where one call's gradients lie on several devices.

    Args:
        parameters: a Module, a Tensor, or an iterable of Tensors or of (name, Tensor) pairs, whose ``.grad`` is
            clipped: float32, bfloat16, float16, float64 or complex, dense or sparse COO, on any mix of
            devices. A tensor that comes twice, tied weights included, counts once, under its first name. Names are
            the model's own, whatever wraps it or its modules: ``torch.compile``, ``DistributedDataParallel``,
            ``FullyShardedDataParallel``, activation checkpointing. Of pairs, a leading ``module.`` is left out if all
            names begin with it. Where two names would become equal, all stay as they are.
        max_norm: the cap. A number; a floating-point Tensor of shape [] or [K], used where it lies, without a
            sync; a mapping of ``fnmatch`` patterns on component names to numbers: the first that matches
            counts, a component that none matches is not clipped; or one of ``cwclip_kernels.thresholds``, which
            follow the norms. ``inf`` measures only, 0 zeroes.
        norm_type: order p of the norm: any real number, or inf ("inf"). 1, 2 and inf have kernels.
        error_if_nonfinite: same as ``nonfinite="error"``.
        components: what is clipped together. None or "parameter": each tensor alone. "module": all that one
            module owns, with what ``torch.nn.utils.parametrize`` made of it. "layer": all under the name up to its
            last number (``encoder.layer.3``). "type": the same place in every layer
            (``encoder.layer.*.output.dense.weight``). "all": everything, as ``clip_grad_norm_``. Or a callable
            (name, tensor) -> hashable key, None to leave the tensor alone; it is asked for every tensor at every
            call (once by ``ComponentClipper``, the faster way then). Parameters that the root module itself owns
            have "" for module and layer. Or a ``ComponentSpec``, which composes these and cuts single tensors into
            several components.
        eps: added to the norm before dividing, as ``clip_grad_norm_`` does. It isn't where ``max_norm`` is a
            threshold that follows norms (``ParamRelative``, ``EMA``, ``ZScore``, ``Percentile``, one of your own):
            beside a small cap it would clip what is below the cap.
        nonfinite: what becomes of a component whose norm is inf or NaN. "propagate": as torch, inf scales by
            0 and NaN spreads, inside that component alone. "zero": zeroes it. "skip": leaves it as it is.
            "error": RuntimeError that names the components, no gradient changed; syncs with the host. A
            component whose cap is inf is only measured, whatever its norm.
        inv_scale: for gradients of a scaled loss, what undoes the scale: a number, or a Tensor of one element, used
            where it lies, without a sync. Norms and caps are those of g * inv_scale, and that is what is left in
            ``.grad``, clipped, from the same pass. A parameter left alone keeps its scale.
        found_inf: Tensor of one element, set to 1 if any gradient is inf or NaN, otherwise left as it is; what
            ``torch.amp.GradScaler`` decides by.
        process_group: for plain tensors of which each rank holds a part (``FullyShardedDataParallel``, partitions of
            ZeRO): the ranks that together hold all; sums over it make norms whole. DTensors need no word: norms and
            slices are those of the logical gradient, whatever its mesh and placements. Not for
            ``DistributedDataParallel``, where each rank has all.
        pp_mesh: ranks that hold different parameters of one model, such as stages of a pipeline. Components that
            several of them have parts of are added up over it; all others cause no traffic.
        backend: None for the best available, or "cuda", "triton", "cpu", "foreach", "reference": used or refused.

    With sharded parameters all ranks that share them call this together, and pass all of them, with or without a
    gradient. The first call with them compares the ranks' components (with a callable in ``components`` every call,
    so prefer ``ComponentClipper`` there); from then on each costs one all-reduce of a number a component for each set
    of ranks that parameters are spread over. It doesn't matter which ranks have gradients for which shards.

    Returns:
        [K] norms before clipping, float32 (float64 if any gradient of this call is), on the device of the first
        gradient. K and the order depend on ``parameters`` alone: without gradient, a component's norm is 0.

    Raises:
        TypeError, ValueError: an argument or gradient that isn't what it should be; nothing is changed. On all ranks,
            at the first call: they don't have the same components.
        RuntimeError: a non-finite norm under "error", on all ranks alike; or a named backend that can't serve.
            Nothing is changed.

    Example:
        >>> import torch
        >>> from cwclip_kernels import fused_component_clip_
        >>> model = torch.nn.Linear(2, 1)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> model.bias.grad = torch.tensor([0.5])
        >>> fused_component_clip_(model, max_norm=1.0)
        tensor([5.0000, 0.5000])
        >>> model.weight.grad, model.bias.grad
        (tensor([[0.6000, 0.8000]]), tensor([0.5000]))

    References:
        Yang & Ma, "Improving Stability of Fine-Tuning Pretrained Language Models via Component-Wise Gradient
        Norm Clipping", EMNLP 2022, arXiv 2210.10325. eps: ``torch.nn.utils.clip_grad_norm_``.
    """
    options = check_options(norm_type, error_if_nonfinite, eps, nonfinite, backend)
    if is_dynamo_compiling():
        compiled.refuse_ranks(process_group is not None or pp_mesh is not None)
        named = named_tensors(parameters)
        resolved = resolve(named, components)
        return compiled.clip_(named.tensors, resolved, max_norm, options, inv_scale, found_inf)[0]
    scaled = NOT_SCALED if inv_scale is None and found_inf is None else ScaledLoss(inv_scale, found_inf)
    settings = partial(settings_in_words, options, max_norm, pp_mesh)
    tensors, engine = engine_for(parameters, components, settings, process_group, pp_mesh)
    return engine.clip_(tensors, engine.policy(max_norm, tensors, options.rule), options, scaled)[0]


def component_norms(
    parameters: Parameters,
    norm_type: float = 2.0,
    *,
    components: Grouping = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    pp_mesh: ProcessGroup | DeviceMesh | None = None,
    backend: str | None = None,
) -> Tensor:
    """Norm of each component's gradient; nothing is changed.

    Args:
        parameters: as for :func:`fused_component_clip_`.
        norm_type: likewise.
        components: likewise.
        process_group: likewise.
        pp_mesh: likewise.
        backend: likewise.

    Returns:
        [K] norms, float32 (float64 if any gradient is), on the gradients' device; no host sync.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fused_component_clip_`.

    Example:
        >>> import torch
        >>> from cwclip_kernels import component_norms
        >>> model = torch.nn.Linear(2, 1)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> component_norms(model)
        tensor([5., 0.])
        >>> component_norms(model, norm_type=1.0, components="all")
        tensor([7.])
    """
    options = check_options(norm_type, False, 0.0, "propagate", backend)
    if is_dynamo_compiling():
        compiled.refuse_ranks(process_group is not None or pp_mesh is not None)
        named = named_tensors(parameters)
        return compiled.norms_of(named.tensors, resolve(named, components), options.rule.norm_type, backend)
    tensors, engine = engine_for(parameters, components, partial(settings_in_words, options), process_group, pp_mesh)
    return engine.norms(tensors, options.rule.norm_type, backend)


@dataclass(frozen=True)
class _Entry:
    """An engine for parameters seen before. It keeps none of them alive.

    Attributes:
        engine: components and plan.
        form: what the parameters looked like.
        positions: of each parameter's first occurrence in the caller's list; None if each occurs once.
        module: where the tensors came from, if from a module; with it the entry goes.
        storage: where the first tensor's data lies, if not from a module.
    """

    engine: Engine
    form: object
    positions: tuple[int, ...] | None
    module: weakref.ref[nn.Module] | None
    storage: StorageWeakRef | None

    def is_over(self) -> bool:
        """Whether the parameters' memory is gone, so that the entry is hardly of use any more."""
        return self.storage is not None and bool(self.storage.expired())  # type: ignore[no-untyped-call]

    def is_for(self, tensors: Sequence[Tensor], form: object) -> bool:
        """Whether it serves these parameters, which have the ids of those that it was made for."""
        if self.form != form or any(tensors[i].requires_grad for i, _ in self.engine.components.problems):
            return False
        if self.engine.spread is None or self.storage is None:
            return True
        # Ranks make their engines together, and ids are reused on one rank and not on another: by chance.
        now = _storage_of(tensors)
        return now is not None and not self.is_over() and now.cdata == self.storage.cdata


_KEPT = 1024  # enough for who calls once for each parameter
_entries: OrderedDict[Hashable, _Entry] = OrderedDict()
_lock = threading.Lock()
_next_look = 8  # for entries that are over, in so many insertions


def engine_for(
    parameters: Parameters,
    grouping: Grouping,
    settings: Callable[[], str],
    process_group: object = None,
    pp_mesh: object = None,
) -> tuple[Sequence[Tensor], Engine]:
    """Resolving names costs milliseconds and a plan more, so both are kept for the last sets of parameters.

    The keys are made of ids, which another tensor may have when the first is gone. But an engine depends on names and
    on what the parameters look like, not on which they are: so that is compared at every call, and no weak reference
    has to tell that a tensor is gone. (A tensor that has one can't be swapped, which moving a model may take.)

    ``settings`` says what ranks have to choose alike; it is asked where an engine is made, not at every call.
    """
    source = parameters if isinstance(parameters, nn.Module) else as_items(parameters)
    key, given = _identify(source, grouping)
    if key is not None:
        # Not by the ids of meshes: mesh["pp"] is another object each time, and an id may be that of a later one.
        key = key, as_group(process_group, "process_group"), as_group(pp_mesh, "pp_mesh")
    with _lock:
        entry = _entries.get(key)
        if entry is not None:
            _entries.move_to_end(key)
    form = None if key is None else form_of(given)
    if entry is not None:
        tensors = given if entry.positions is None else [given[i] for i in entry.positions]
        if entry.is_for(tensors, form):
            return tensors, entry.engine
    check_parts(source, process_group)
    named = named_tensors(source)
    engine = Engine.of(named, grouping, process_group, pp_mesh, settings())
    if key is not None:
        _remember(key, _Entry(engine, form, _positions(given), *_watched(source, key, named.tensors)))
    return named.tensors, engine


def _watched(
    source: object, key: Hashable, tensors: Sequence[Tensor]
) -> tuple[weakref.ref[nn.Module] | None, StorageWeakRef | None]:
    """What tells that parameters are gone, without a reference to one of them."""

    def forget(_: weakref.ref[Any]) -> None:
        _entries.pop(key, None)

    if isinstance(source, nn.Module):
        return weakref.ref(source, forget), None
    return None, _storage_of(tensors)


def _storage_of(tensors: Sequence[Tensor]) -> StorageWeakRef | None:
    if not tensors:
        return None
    first: Any = local_value(tensors[0])
    if type(first) not in (Tensor, nn.Parameter) or first.layout != torch.strided or first.is_nested:
        return None
    return StorageWeakRef(first.untyped_storage())  # type: ignore[no-untyped-call]


def _positions(given: Sequence[Tensor]) -> tuple[int, ...] | None:
    first: dict[int, int] = {}
    for position, tensor in enumerate(given):
        first.setdefault(id(tensor), position)
    return None if len(first) == len(given) else tuple(first.values())


def _remember(key: Hashable, entry: _Entry) -> None:
    global _next_look
    with _lock:
        _entries[key] = entry
        _next_look -= 1
        if _next_look <= 0:  # rarely, so that it costs each entry little however many there are
            for over in [known for known, other in _entries.items() if other.is_over()]:
                del _entries[over]
            _next_look = max(8, len(_entries) // 2)
        while len(_entries) > _KEPT:
            _entries.popitem(last=False)


def _identify(source: nn.Module | list[Any], grouping: Grouping) -> tuple[Hashable, list[Tensor]]:
    """A key that no other living set of parameters has, and its tensors, repetitions included.

    The key is None for what must be resolved at every call: a grouping function, which may answer differently, and
    what isn't a set of parameters; reading its names will say why.
    """
    if not (
        grouping is None or isinstance(grouping, str) or (isinstance(grouping, ComponentSpec) and grouping.is_static)
    ):
        return None, []
    if isinstance(source, nn.Module):
        names: list[str] = []
        given: list[Tensor] = []
        _walk(source, names, given, set())
        return (grouping, id(source), tuple(names), tuple(map(id, given))), given
    if not source or isinstance(source[0], Tensor):
        return (grouping, tuple(map(id, source))), source
    try:
        item_names, tensors = zip(*source, strict=True)
        key = grouping, item_names, tuple(map(id, tensors))
        hash(key)
    except (TypeError, ValueError):
        return None, []
    return key, list(tensors)


def _walk(module: nn.Module, names: list[str], tensors: list[Tensor], seen: set[int]) -> None:
    # named_parameters() puts every full name together anew: three times the cost of the walk.
    seen.add(id(module))
    for name, parameter in module._parameters.items():
        if parameter is not None:
            names.append(name)
            tensors.append(parameter)
    for name, child in module._modules.items():
        names.append(name)
        if child is not None and id(child) not in seen:
            _walk(child, names, tensors, seen)
    names.append("")  # where this module ends
