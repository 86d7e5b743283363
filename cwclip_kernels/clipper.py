"""Clipping with names and plans resolved once: what a training loop holds on to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .arguments import warn_caller
from .attachment import Attachment
from .components.parameters import Parameters, named_tensors
from .components.spec import Grouping
from .core import traced, traced_scaling
from .core.loss_scale import UNSCALED, LossScale
from .core.modes import is_traced
from .core.options import check_norms, check_options, checked_coefs
from .core.parameter_clipper import ParameterClipper
from .core.session import ClipSession
from .distributed.units import Units, known_group
from .result import ClipResult
from .thresholds.constant import MaxNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class ComponentClipper(ParameterClipper):
    """Clips each component's gradient by its own norm, with everything that can be known ahead done once.

        norm_c = (sum over component c of |g|^p)^(1/p)
        coef_c = min(1, max_norm_c / (norm_c + eps));  g <- coef_c * g, in place

    Make one for a training run and call ``clip_()`` between ``backward()`` and ``optimizer.step()``. The parameters
    are read once, here: make another one when parameters are added or replaced. Which of them have gradients may
    change from step to step. Arguments are those of :func:`fused_component_clip_`; a tensor as ``max_norm`` is read
    at every call, so changing it in place changes the caps. All ranks that share sharded parameters make it together.

    Attributes:
        names: the K component names, in the order of every [K] tensor.
        max_norm: as given, a mapping with thresholds as a ``thresholds.ByPattern``.

    Raises:
        TypeError, ValueError: an argument that isn't what it should be; named in the message. On all ranks, if they
            don't have the same components.

    Example:
        >>> import torch
        >>> from cwclip_kernels import ComponentClipper
        >>> model = torch.nn.Linear(2, 1)
        >>> clipper = ComponentClipper(model, max_norm=1.0)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> model.bias.grad = torch.tensor([0.5])
        >>> result = clipper.clip_()
        >>> result.names, result.norms
        (('weight', 'bias'), tensor([5.0000, 0.5000]))
        >>> result.coefs, result.clipped
        (tensor([0.2000, 1.0000]), tensor([ True, False]))

    References:
        Yang & Ma, "Improving Stability of Fine-Tuning Pretrained Language Models via Component-Wise Gradient
        Norm Clipping", EMNLP 2022, arXiv 2210.10325.
    """

    # Of trained parameters: position, owning module and name there.
    _places: tuple[tuple[int, nn.Module, str], ...] = ()
    _turn = _plans_seen = 0
    _is_unpickled = False
    _copied: dict[int, Any] | None = None  # until it is known which parameters have been copied along

    def __init__(
        self,
        parameters: Parameters,
        max_norm: MaxNorm,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        components: Grouping = None,
        eps: float = 1e-6,
        nonfinite: str = "propagate",
        process_group: ProcessGroup | DeviceMesh | None = None,
        pp_mesh: ProcessGroup | DeviceMesh | None = None,
        backend: str | None = None,
    ) -> None:
        options = check_options(norm_type, error_if_nonfinite, eps, nonfinite, backend)
        group = known_group(parameters, process_group)
        named = named_tensors(parameters)
        session = ClipSession.of(named, components, group, pp_mesh, options.in_words(max_norm, pp_mesh))
        super().__init__(named.tensors, session, max_norm, options)
        if (
            isinstance(parameters, nn.Module) and session.reductions is None
        ):  # FSDP replaces parameters by shards itself
            self._places = _places_of(parameters, named.tensors)
            self._watches = True

    def _all(self) -> tuple[Tensor, ...]:
        """All parameters; of a deep copy those that have been copied along with it, if they have."""
        copied = self._copied
        if copied is not None:
            self._copied = None
            self._tensors = tuple(copied.get(id(tensor), tensor) for tensor in self._tensors)
            self._places = tuple((i, copied.get(id(module), module), leaf) for i, module, leaf in self._places)
        return self._tensors

    def clip_(self, *, inv_scale: float | Tensor | None = None, found_inf: Tensor | None = None) -> ClipResult:
        """Clips the gradients that are there now, in place; arguments as for :func:`fused_component_clip_`.

        Returns:
            Norms before clipping, coefficients and caps. A component without any gradient has norm 0, coefficient 1.

        Raises:
            RuntimeError: a norm is non-finite and that was to be an error (nothing is changed then), or the
                named backend can't serve a gradient.
            TypeError, ValueError: a gradient that can't be clipped in place; nothing is changed.
        """
        return self.clip(UNSCALED if inv_scale is None and found_inf is None else LossScale.of(inv_scale, found_inf))

    def _before_clip(self) -> None:
        """Warns, once, if the clipped parameters are no longer those of the model."""
        tensors = self._all()
        if self._is_unpickled:
            self._is_unpickled = False
            if tensors and all(tensor.grad is None for tensor in tensors):
                warn_caller(
                    "parameters: none has a gradient, and this clipper was unpickled: does it clip copies that "
                    "nobody trains? Pickle it together with its model, or make one and load state_dict() into it"
                )
        # One at each call, as a look at all would cost more than the rest; and all where other gradients are there.
        looked_at: Iterable[int] = ()
        if self._session.plans.made != self._plans_seen:
            self._plans_seen = self._session.plans.made
            looked_at = range(len(self._places))
        elif self._places:
            self._turn = (self._turn + 1) % len(self._places)
            looked_at = (self._turn,)
        for i in looked_at:
            position, module, leaf = self._places[i]
            current = module._parameters.get(leaf)
            if current is not None and current is not tensors[position]:
                warn_caller(
                    f"parameters: {self._session.components.tensor_names[position]!r} of the model has been replaced "
                    "since the clipper was made, as by to_empty() or load_state_dict(assign=True), and goes "
                    "unclipped. Make the clipper anew"
                )
                self._places = ()
                break
        self._watches = bool(self._places)

    def part(self, parameters: Iterable[Tensor]) -> ComponentClipper:
        """See ``ParameterClipper``."""
        part = super().part(parameters)
        place = {id(tensor): i for i, tensor in enumerate(part._tensors)}
        places = [(place.get(id(self._tensors[i])), module, leaf) for i, module, leaf in self._places]
        part._places = tuple((i, module, leaf) for i, module, leaf in places if i is not None)
        return part

    def attach(
        self,
        optimizer: Optimizer,
        *,
        on_clip: Callable[[ClipResult], object] | None = None,
        replace: bool = False,
    ) -> Attachment:
        """Clips at every ``optimizer.step()``, right before the step: what this optimizer owns of the parameters.

        With several optimizers attach to each; a parameter that two own is clipped at the steps of both. Accumulated
        gradients are clipped once, whole. A closure's gradients are clipped at each of its calls, and thresholds
        count each (``LBFGS`` makes many in a step). Don't call ``clip_()`` by hand as well.

        Only ``step()`` clips: with SAM (``first_step()``, ``second_step()``) attach to its ``base_optimizer``. A
        copied or unpickled optimizer has lost its hooks: attach to it again. Where a fused optimizer under a
        ``GradScaler`` skips its step on the device, thresholds have counted it.

        Args:
            optimizer: a torch optimizer that owns at least one of the parameters. If it wraps another one without
                running torch's step hooks, as Accelerate's does, pass the one inside.
            on_clip: called with each ``ClipResult``, such as ``ClipRecorder.record``.
            replace: whether to end earlier attachments that clip some of the same parameters at this optimizer's
                steps, as when a notebook's cell runs again; otherwise they are an error.

        Returns:
            A handle: ``remove()`` ends it, ``last`` is the last ``ClipResult``.

        Raises:
            TypeError: not a ``torch.optim.Optimizer``, or one whose steps aren't certain to run its hooks.
            ValueError: it owns none of the parameters, shares a component with another, steps in the backward pass,
                clips in its own step (``ComponentClipAdamW``), or has a clipper attached for some of the parameters
                already.
            RuntimeError: gradients are clipped in the backward pass as well. At a step: the same, or they still carry
                the loss scale, as a fused optimizer's do under a ``GradScaler``. Nothing is changed.
        """
        return Attachment(self, optimizer, on_clip, replace)

    def norms(self, *, inv_scale: float | Tensor | None = None, found_inf: Tensor | None = None) -> Tensor:
        """The K norms of the gradients that are there now, which stay as they are; as :func:`component_norms`."""
        norm_type, backend = self._options.rule.norm_type, self._options.backend
        scale = LossScale.of(inv_scale, found_inf)
        if is_traced():
            traced.refuse_ranks(self.is_spread)
            return traced.norms_of(self._all(), self._session.components, norm_type, backend, scale)
        return self._session.norms(self._all(), norm_type, backend, scale)

    def clip_with_norms_(self, norms: Tensor, *, inv_scale: float | Tensor | None = None) -> ClipResult:
        """Clips the gradients that are there now by norms [K] that are known, as :func:`component_clip_with_norms_`.

        Thresholds learn from these norms. For caps of your own making see ``scale_``.
        """
        scale, session, options = LossScale.of(inv_scale, None), self._session, self._options
        check_norms(norms, len(self.names))
        if is_traced():
            self.check_traced()
            own = self._all(), session.components, norms, self.max_norm, options, scale
            return ClipResult(self.names, *traced_scaling.clip_with_norms_(*own))
        if self._watches:
            self._before_clip()
        return ClipResult(self.names, *session.clip_with_norms_(self._all(), norms, self._caps(), options, scale))

    def scale_(self, coefs: float | Tensor, *, inv_scale: float | Tensor | None = None) -> None:
        """Multiplies the gradients that are there now by coefficients, as :func:`component_scale_`.

        A coefficient of 0 writes zeros if the clipper's ``nonfinite`` is "zero". Thresholds learn nothing.
        """
        scale, session, options = LossScale.of(inv_scale, None), self._session, self._options
        coefs = checked_coefs(coefs, len(self.names))
        if is_traced():
            traced.refuse_ranks(self.is_spread)
            traced_scaling.scale_(self._all(), session.components, coefs, options, scale)
            return
        if self._watches:
            self._before_clip()
        session.scale_(self._all(), coefs, options, scale)

    # -------------------------------------------------------------------------------------------------------
    # Copies
    # -------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        units = self._session.ranks[0]
        if self._session.reductions is not None or (isinstance(units, Units) and units.is_needed):
            raise TypeError(
                "a ComponentClipper of sharded parameters can't be pickled or copied, since process groups can't be: "
                "make one on each rank, and hand on what it has learnt with state_dict()"
            )
        if self._whole is not None:
            raise TypeError(
                "what part() returned can't be pickled or copied; copy its clipper, and call part() on that"
            )
        return {
            "tensors": self._all(),
            "components": self._session.components,
            "max_norm": self.max_norm,
            "options": self._options,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        session = ClipSession(state["components"], state["tensors"])
        super().__init__(state["tensors"], session, state["max_norm"], state["options"])
        self._watches = self._is_unpickled = True

    def __copy__(self) -> ComponentClipper:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> ComponentClipper:
        # Not copies that nobody trains: parameters that are copied along, perhaps after this, or else the same ones.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__({**self.__getstate__(), "max_norm": deepcopy(self.max_norm, memo)})
        twin._is_unpickled = False
        twin._places = self._places
        twin._copied = memo
        twin._watches = True
        if all(id(tensor) in memo for tensor in twin._tensors):
            twin._all()  # the memo needn't be kept, with all that is in it
        return twin


def _places_of(model: nn.Module, tensors: tuple[Tensor, ...]) -> tuple[tuple[int, nn.Module, str], ...]:
    position = {id(tensor): i for i, tensor in enumerate(tensors) if tensor.requires_grad}
    return tuple(
        (position[id(parameter)], module, leaf)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in position
    )
