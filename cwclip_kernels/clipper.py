"""Clipping with names and plan resolved once: what a training loop holds on to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer

from .arguments import warn_caller
from .attachment import Attachment
from .components.parameters import Parameters, named_tensors
from .components.spec import Grouping
from .core import traced
from .core.engine import Engine, Options, check_options, settings_in_words
from .core.loss_scale import NOT_SCALED, ScaledLoss
from .distributed.groups import check_process_group
from .result import ClipResult
from .thresholds import Threshold
from .thresholds.base import learnt, load_learnt
from .thresholds.caps import CapPolicy, MaxNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class ComponentClipper:
    """Clips each component's gradient to its own norm, with everything that can be known ahead done once.

        norm_c = (sum over component c of |g|^p)^(1/p)
        coef_c = min(1, max_norm_c / (norm_c + eps));  g <- coef_c * g, in place

    Hold on to one for a training run and call ``clip_()`` between ``backward()`` and ``optimizer.step()``.
    The parameters are read once, here: make another one when parameters are added or replaced. Which of them
    have gradients may change from step to step.

    Args:
        parameters: as for :func:`fused_component_clip_`.
        max_norm: likewise. A tensor is read at every call, so changing it in place changes the caps.
        norm_type: likewise.
        error_if_nonfinite: likewise.
        components: likewise.
        eps: likewise.
        nonfinite: likewise.
        process_group: likewise.
        pp_mesh: likewise.
        backend: likewise.

    With sharded parameters all ranks that share them make it together, and compare their components.

    Attributes:
        names: the K component names, in the order of every [K] tensor.
        max_norm: as given; one of ``thresholds`` has ``state_dict()`` for checkpoints.

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

    _places: tuple[tuple[int, nn.Module, str], ...]  # of trained parameters: position, owner and name there

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
        check_process_group(parameters, process_group)
        named = named_tensors(parameters)
        settings = settings_in_words(options, max_norm, pp_mesh)
        engine = Engine.of(named, components, process_group, pp_mesh, settings)
        # As given; a mapping as it is now, like the caps.
        self._set_up(named.tensors, engine, dict(max_norm) if isinstance(max_norm, Mapping) else max_norm, options)
        if isinstance(parameters, nn.Module) and engine.spread is None:  # which shards and gathers its parameters
            self._places = _places_of(parameters, named.tensors)

    def _set_up(self, tensors: tuple[Tensor, ...], engine: Engine, max_norm: MaxNorm, options: Options) -> None:
        self.names: tuple[str, ...] = engine.components.names
        self.max_norm = max_norm
        self._tensors = tensors
        self._engine = engine
        self._options = options
        self._whole: ComponentClipper | None = None  # that this is a part of, with its caps
        self._places = ()
        self._turn = self._plans_seen = 0
        self._is_unpickled = False
        self._copied: dict[int, Any] | None = None  # until it is known which parameters have been copied along
        # Comes between a clip and its policy, such as a scaler that may skip the step.
        self._policy_of_clip: Callable[[CapPolicy], CapPolicy] | None = None
        self._fixed: CapPolicy | None = None
        policy = self._policy()  # checks max_norm, and gives a threshold the state that it needs
        if not isinstance(max_norm, Threshold):
            self._fixed = policy

    def _policy(self) -> CapPolicy:
        """Where this call's caps come from."""
        if self._whole is not None:
            return self._whole._policy()
        if self._fixed is not None:
            return self._fixed
        return self._engine.policy(self.max_norm, self._parameters(), self._options.rule)

    def _parameters(self) -> tuple[Tensor, ...]:
        """All parameters, clipped or not; of a deep copy those that have been copied along with it, if they have."""
        copied, self._copied = self._copied, None
        if copied is not None:
            self._tensors = tuple(copied.get(id(tensor), tensor) for tensor in self._tensors)
            self._places = tuple((i, copied.get(id(module), module), leaf) for i, module, leaf in self._places)
        return self._tensors

    def clip_(self, *, inv_scale: float | Tensor | None = None, found_inf: Tensor | None = None) -> ClipResult:
        """Clips the gradients that are there now, in place.

        Args:
            inv_scale: as for :func:`fused_component_clip_`.
            found_inf: likewise.

        Returns:
            Norms before clipping, coefficients and caps. A component without any gradient has norm 0, coefficient 1.

        Raises:
            RuntimeError: a norm is non-finite and that was to be an error (nothing is changed then), or the
                named backend can't serve a gradient.
            TypeError, ValueError: a gradient that can't be clipped in place; nothing is changed.
        """
        if is_dynamo_compiling():
            traced.refuse_ranks(self.is_spread)
            components, options = self._engine.components, self._options
            outcome = traced.clip_(self._parameters(), components, self.max_norm, options, inv_scale, found_inf)
        else:
            untouched = inv_scale is None and found_inf is None
            scaled = NOT_SCALED if untouched else ScaledLoss(inv_scale, found_inf)
            policy = self._policy() if self._policy_of_clip is None else self._policy_of_clip(self._policy())
            self._look_for_replaced()
            outcome = self._engine.clip_(self._parameters(), policy, self._options, scaled)
        return ClipResult(self.names, *outcome)

    def _look_for_replaced(self) -> None:
        """Warns, once, if another parameter has been put in the place of one that is clipped."""
        if self._is_unpickled:
            self._is_unpickled = False
            if self._tensors and all(tensor.grad is None for tensor in self._tensors):
                warn_caller(
                    "parameters: none has a gradient, and this clipper was unpickled: does it clip copies that "
                    "nobody trains? Pickle it together with its model, or make one and load state_dict() into it"
                )
        if not self._places:
            return
        turn = self._turn = (self._turn + 1) % len(self._places)
        # One each time, as a look at all would cost more than the rest; and all where other gradients are there.
        if self._engine.plans_made != self._plans_seen:
            self._plans_seen = self._engine.plans_made
            looked_at: Iterable[int] = range(len(self._places))
        else:
            looked_at = (turn,)
        for i in looked_at:
            position, module, leaf = self._places[i]
            current = module._parameters.get(leaf)
            if current is not None and current is not self._tensors[position]:
                self._places = ()
                warn_caller(
                    f"parameters: {self._engine.components.tensor_names[position]!r} of the model is another one "
                    "than when the clipper was made, as after to_empty() or load_state_dict(assign=True), and goes "
                    "unclipped. Make the clipper anew"
                )
                return

    def part(self, parameters: Iterable[Tensor]) -> ComponentClipper:
        """A clipper for some of the parameters, with the same components, caps and state.

        For parameters that become ready at different times, such as those of several optimizers. Its results have the
        same K, with norm 0 and coefficient 1 where a component is not among them.

        Args:
            parameters: some of this clipper's, and any others, which don't count.

        Raises:
            ValueError: a component has trainable parameters inside and outside, so that its norm would not be whole.
        """
        wanted = {id(p) for p in parameters}
        tensors, components = self._parameters(), self._engine.components
        is_inside = [id(tensor) in wanted for tensor in tensors]
        owner = {component: position for position, component, _ in components.members if is_inside[position]}
        for position, component, _ in components.members:
            if component in owner and not is_inside[position] and tensors[position].requires_grad:
                here, there = components.tensor_names[owner[component]], components.tensor_names[position]
                name = components.names[component]
                raise ValueError(
                    f"component {name!r} is only partly here, with {here!r} but not {there!r}; "
                    "choose components that lie wholly in one part"
                )
        inside = [i for i, yes in enumerate(is_inside) if yes]
        part = copy(self)
        part._tensors = tuple(tensors[i] for i in inside)
        part._engine = Engine(components.only(inside), part._tensors, *self._engine.ranks)
        place = {position: i for i, position in enumerate(inside)}
        part._places = tuple((place[i], module, leaf) for i, module, leaf in self._places if i in place)
        part._whole = self if self._whole is None else self._whole
        return part

    def attach(
        self,
        optimizer: Optimizer,
        *,
        on_clip: Callable[[ClipResult], object] | None = None,
        replace: bool = False,
    ) -> Attachment:
        """Clips at every ``optimizer.step()``, right before the step: what this optimizer owns of the parameters.

        With several optimizers attach to each. Gradients that were accumulated over several backward passes are
        clipped once, whole. A closure's gradients are clipped each time it has been called, and thresholds count each
        call (``LBFGS`` makes many in a step). A parameter that two optimizers own is clipped at the steps of both.
        Don't call ``clip_()`` by hand as well: gradients would be clipped and counted twice.

        Only ``step()`` clips. With SAM, whose ``first_step()`` and ``second_step()`` are called instead of it, attach
        to its ``base_optimizer``. A copied or unpickled optimizer has lost its hooks, this one among them: attach to
        it again. Where a fused optimizer under a ``GradScaler`` skips its step on the device, thresholds have counted
        it.

        Args:
            optimizer: a torch optimizer that owns at least one of the parameters. Of one that wraps another without
                running torch's step hooks, such as Accelerate's, the one inside.
            on_clip: called with each ``ClipResult``, such as ``ClipRecorder.record``.
            replace: whether to end earlier attachments that clip some of the same parameters at this optimizer's
                steps, as when a notebook's cell runs again; otherwise they are an error.

        Returns:
            A handle: ``remove()`` ends it, ``last`` is the last ``ClipResult``, and it has the clipper's
            ``state_dict()`` and ``load_state_dict()``.

        Raises:
            TypeError: not a ``torch.optim.Optimizer``, or one whose steps aren't certain to run its hooks.
            ValueError: it owns none of the parameters, shares a component with another, steps in the backward pass,
                or has a clipper attached for some of the parameters already.
            RuntimeError: gradients are clipped in the backward pass as well. At a step: likewise, or they still carry
                the loss's scale, as a fused optimizer's do under a ``GradScaler``. Nothing is changed.

        Example:
            >>> import torch
            >>> from cwclip_kernels import ComponentClipper
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            >>> handle = ComponentClipper(model, max_norm=0.1).attach(optimizer)
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> optimizer.step()
            >>> handle.last.norms
            tensor([1.4142, 1.0000])
        """
        return Attachment(self, optimizer, on_clip, replace)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The parameters that are clipped, whole or in slices."""
        clipped = self._engine.components.clipped
        return tuple(tensor for i, tensor in enumerate(self._parameters()) if i in clipped)

    @property
    def is_spread(self) -> bool:
        """Whether other ranks have parts of components, or of the model, so that all clip together."""
        return self._engine.spread is not None

    @property
    def raises_nonfinite(self) -> bool:
        """Whether a non-finite norm is an error."""
        return self._options.raise_nonfinite

    def norms(self) -> Tensor:
        """The K norms of the gradients that are there now, which stay as they are: [K], no host sync."""
        norm_type, backend = self._options.rule.norm_type, self._options.backend
        if is_dynamo_compiling():
            traced.refuse_ranks(self.is_spread)
            return traced.norms_of(self._parameters(), self._engine.components, norm_type, backend)
        return self._engine.norms(self._parameters(), norm_type, backend)

    def total_norm(self, norms: Tensor) -> Tensor:
        """The norm of all components together, [], from those of each, as ``clip_grad_norm_`` returns it.

        With ``pp_mesh`` it is that of all its ranks, which make this call together. No host sync.

        Args:
            norms: [K], of a ``ClipResult`` or of ``norms()``.
        """
        return self._engine.total(norms, self._options.rule.norm_type)

    def explain(self) -> str:
        """Which backend serves which gradients, and why, for people to read."""
        return self._engine.explain(self._parameters(), self._options.rule.norm_type, self._options.backend)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on as if nothing had happened: what ``max_norm`` has learnt.

        Returns:
            {"max_norm": ``Threshold.state_dict()``}; {} where nothing is learnt, as by a number.

        Example:
            >>> import torch
            >>> from cwclip_kernels import ComponentClipper, thresholds
            >>> model = torch.nn.Linear(2, 1)
            >>> saved = ComponentClipper(model, thresholds.EMA()).state_dict()
            >>> ComponentClipper(model, thresholds.EMA()).load_state_dict(saved)
        """
        return learnt(self.max_norm)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict()``, of a clipper with the same components and kind of ``max_norm``.

        Raises:
            TypeError, ValueError: that of another threshold, or for other components. Nothing is changed.
        """
        load_learnt(self.max_norm, state_dict)

    # -------------------------------------------------------------------------------------------------------
    # Copies
    # -------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        if self._engine.spread is not None:
            raise TypeError(
                "a ComponentClipper of sharded parameters can't be pickled or copied, since process groups can't be: "
                "make one on each rank, and hand on what it has learnt with state_dict()"
            )
        if self._whole is not None:
            raise TypeError(
                "what part() returned can't be pickled or copied; copy its clipper, and call part() on that"
            )
        return {
            "tensors": self._parameters(),
            "components": self._engine.components,
            "max_norm": self.max_norm,
            "options": self._options,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        engine = Engine(state["components"], state["tensors"])
        self._set_up(state["tensors"], engine, state["max_norm"], state["options"])
        self._is_unpickled = True

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
        if all(id(tensor) in memo for tensor in twin._tensors):
            twin._parameters()  # the memo needn't be kept, with all that is in it
        return twin


def _places_of(model: nn.Module, tensors: tuple[Tensor, ...]) -> tuple[tuple[int, nn.Module, str], ...]:
    position = {id(tensor): i for i, tensor in enumerate(tensors) if tensor.requires_grad}
    return tuple(
        (position[id(parameter)], module, leaf)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in position
    )
