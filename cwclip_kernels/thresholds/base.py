"""What every threshold is: bound to components, asked for caps, told what came of them, saved and loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import some_of, type_name
from ..components.naming import Aliases, are_same_names
from ..core.formula import ClipRule, coefficients, wide_dtype
from ..core.identity import Owner, is_alive


class StepCaps(NamedTuple):
    """Where the caps of one step come from: ``Threshold``'s attributes and methods, ready for one call."""

    adds_eps: bool
    needs_norms: bool
    caps: Callable[[torch.device, Tensor | None], Tensor]
    update_: Callable[[Tensor, Tensor], None] | None = None  # None if nothing is learnt
    # What is added to each norm, [K] on a device, where that differs; the kernels take one number for all.
    eps: Callable[[torch.device], Tensor] | None = None

    def coefficients(self, norms: Tensor, caps: Tensor, rule: ClipRule) -> Tensor:
        """See ``core.formula``."""
        return coefficients(norms, caps, rule, None if self.eps is None else self.eps(caps.device))


@dataclass(frozen=True)
class Setting:
    """What a threshold is told about the components that it makes caps for.

    Attributes:
        names: the K component names.
        numels: elements of each component, frozen parameters left out; 0 for a component that isn't trained.
        norm_type: order p of the norm.
        eps: what the clipper adds to a norm before dividing, where ``adds_eps``.
        device: of the first trained parameter.
        parameter_norms: the norms of the parameters as they are now, [K] on their device, without a sync; 0 for
            frozen ones. To be called in ``caps`` only.
        trained: of each parameter whether it is trained; () if all are.
        spellings: the names as a pattern may write them too: with the prefix that parameters have lost; or ().
        aliases: names of tied components that don't count, each with the one that does.
        everywhere: names of the components of all ranks, where other ranks have others.
        members: of each component, the positions in ``trained`` of the parameters that it has elements of; or ().
        sizes: elements of each component, frozen parameters included; or ().
        spanning: components of which several ranks of ``pp_mesh`` have parts, by name; of these ``numels`` and
            ``sizes`` count this rank's alone.
        owner: tells apart models whose components have the same names; None for gradients without parameters.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    norm_type: float
    eps: float
    device: torch.device
    parameter_norms: Callable[[], Tensor]
    trained: tuple[bool, ...] = ()
    spellings: tuple[str, ...] = ()
    aliases: Aliases = ()
    everywhere: tuple[str, ...] | None = None
    members: tuple[tuple[int, ...], ...] = ()
    sizes: tuple[int, ...] = ()
    spanning: tuple[str, ...] = ()
    owner: Owner | None = None

    def only(
        self,
        components: Sequence[int],
        parameter_norms: Callable[[], Tensor],
        everywhere: tuple[str, ...] | None,
    ) -> Setting:
        """That of some of the components, by position; the last two arguments are theirs."""

        def some(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[i] for i in components) if values else ()

        names, members = some(self.names), some(self.members)
        positions = {p: i for i, p in enumerate(sorted({p for each in members for p in each}))}
        trained = tuple(self.trained[p] for p in positions) if self.trained else ()
        own = set(names)
        return replace(
            self,
            names=names,
            numels=some(self.numels),
            parameter_norms=parameter_norms,
            trained=() if all(trained) else trained,
            spellings=some(self.spellings),
            aliases=tuple((other, first) for other, first in self.aliases if first in own),
            everywhere=everywhere,
            members=tuple(tuple(positions[p] for p in each) for each in members),
            sizes=some(self.sizes),
            spanning=tuple(name for name in self.spanning if name in (everywhere or ())),
        )


class Threshold(ABC):
    """A rule that computes the caps of each step.

    A clipper calls, each step, and none of these waits for the device:

        caps = threshold.caps(device, norms)
        coefs = min(1, caps / norms)
        threshold.update_(norms, coefs)

    One object serves one set of components. One that learns can go on with another model that has the same
    components, but not go back and forth between two.

    A threshold of your own defines ``caps``; if it learns, ``update_``; if it depends on the step's own norms,
    ``needs_norms``. Tensors made by ``self.state(...)`` are saved and loaded.

    The clipper's ``eps`` is not added to these norms, unless ``adds_eps`` says so. Beside caps that follow the norms
    it would clip small gradients that are below their cap, and a threshold that learns the clipped norm would shrink
    it from step to step. Without it nothing depends on the loss scale. A norm of 0 has coefficient 1.

    In a mapping of patterns it gets the components that its patterns match, and knows of no others.

    A threshold can be copied and pickled, with its state. The copy is bound by the clipper that uses it.
    """

    adds_eps = False
    """Whether coefficients are caps / (norms + eps), as for a number: for caps that don't follow the norms."""

    reads_parameters = False
    """Whether ``caps`` calls ``setting.parameter_norms()``: in the backward pass each is then asked for alone."""

    needs_all_components = False
    """Whether the cap of one component depends on the others: then it can't be used on a rank of a pipeline."""

    untraceable: str | None = None
    """Why ``torch.compile`` can't trace this threshold, and what to do instead; None if it can."""

    reads_numels = True
    """Where ``needs_all_components``: whether caps depend on ``setting.numels``. In the backward pass these stay as
    they were at set-up, so that freezing or unfreezing parameters is refused."""

    def __init__(self) -> None:
        self._setting: Setting | None = None
        self._state: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}  # until the device is known
        self._loaded_names: tuple[str, ...] | None = None
        self._on: dict[torch.device, Tensor] = {}  # caps by device, for those that stay the same
        self._former: list[Owner] = []  # those that it has left for others
        self.within: object = None  # the ``ByPattern`` that a mapping with this threshold has become

    def __getstate__(self) -> dict[str, Any]:
        # A copy isn't bound: the state goes along, and waits for a clipper.
        loaded, names = self._tensors(), self._names()
        unbound: dict[str, Any] = {
            "_setting": None,
            "_state": {},
            "_loaded": loaded,
            "_loaded_names": names,
            "_on": {},
            "_former": [],
        }
        return {**self.__dict__, **unbound, "within": None}

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in {**self._loaded, **self._state}.items()}

    def _names(self) -> tuple[str, ...] | None:
        return self._loaded_names if self._setting is None else self._setting.names

    @property
    def setting(self) -> Setting:
        """What the threshold is bound to; RuntimeError if it isn't bound yet."""
        if self._setting is None:
            raise RuntimeError(f"{type_name(self)} is used before a clipper has bound it to its components")
        return self._setting

    def bind(self, setting: Setting) -> None:
        """Called by a clipper that uses this threshold; ValueError if this, or its state, is for other components."""
        self.check_fits(setting)
        before, self._setting = self._setting, setting
        left = None if before is None else before.owner
        if left is not None and (setting.owner is None or left.ids != setting.owner.ids):
            self._former = [*(one for one in self._former if is_alive(one.storage) and one.ids != left.ids), left]
        if setting.device.type == "meta":  # state is made when the parameters have moved to where gradients are
            return
        known = {*self._state, *self._loaded}
        try:
            self.allocate(setting.device)
            missing = sorted(set(self._state) - known)
            if missing and self._loaded_names is not None:
                for name in missing:
                    del self._state[name]
                raise ValueError(
                    f"max_norm: this {type_name(self)} has loaded a state without {some_of(missing)}. "
                    "torch.distributed.checkpoint fills the tensors that are in a state_dict(), and there are none "
                    "before a clipper has bound the threshold: make the clipper first, and load then"
                )
        except ValueError:
            self._setting = before
            raise

    def check_fits(self, setting: Setting) -> None:
        """Raises ValueError if this, or its state, is for other components, or in use for another model."""
        self.check_sizes(setting.spanning)
        last, owner = None if self._setting is None else self._setting.owner, setting.owner
        is_other = last is not None and owner is not None and last.ids != owner.ids
        returns = owner is not None and any(one.is_same(owner) for one in self._former)
        if self.learns and is_other and returns:
            raise ValueError(
                f"max_norm: this {type_name(self)} learns from two sets of parameters in turn, whose components have "
                "the same names; make one for each"
            )
        if (names := self._names()) is not None and not are_same_names(names, setting.names):
            is_for = "has loaded the state of" if self._setting is None else "is in use for"
            difference = difference_of(names, setting.names)
            kind = f"max_norm: this {type_name(self)}"
            raise ValueError(f"{kind} {is_for} other components{difference}; make one for each clipper")

    def is_bound_to(self, setting: Setting) -> bool:
        """Whether this is the last setting that it was bound to."""
        return self._setting is setting

    def serves(self, ids: tuple[int, ...]) -> bool:
        """Whether it is bound to the parameters of these ``ids_of``; RuntimeError if to none."""
        owner = self.setting.owner
        return (() if owner is None else owner.ids) == ids

    def check_sizes(self, spanning: tuple[str, ...]) -> None:  # noqa: B027  # most don't read them
        """Raises ValueError if caps need sizes of components that nobody knows: those that span stages."""

    def allocate(self, device: torch.device) -> object:  # noqa: B027  # not every threshold has state
        """Makes all state that the threshold will need: later steps may be traced or captured."""

    def adds_eps_to(self, *, bounded: bool = False) -> tuple[bool, ...] | None:
        """Of each component whether eps is added to its norm, where that differs; None where ``adds_eps`` says it.

        ``bounded``: a cap of inf, which takes either, may become another.
        """
        return None

    @property
    def learns(self) -> bool:
        """Whether steps change it, so that a checkpoint needs its state."""
        return type(self).update_ is not Threshold.update_

    def __str__(self) -> str:
        return type_name(self)

    @property
    def needs_norms(self) -> bool:
        """Whether caps depend on the norms of the step that they are for; clipping then takes two passes."""
        return False

    @abstractmethod
    def caps(self, device: torch.device, norms: Tensor | None) -> Tensor:
        """The caps of this step on ``device``: [] or [K], contiguous, float64 (float32 if the device has none).

        ``norms``: [K] before clipping, on ``device``; None unless ``needs_norms``. No state may be changed.
        """

    def update_(self, norms: Tensor, coefs: Tensor) -> None:  # noqa: B027  # not every threshold learns
        """Learns from a step's norms [K] before clipping and the coefficients [K] applied to the gradients."""

    def state(self, name: str, device: torch.device, *shape: int, fill: float = 0.0) -> Tensor:
        """A tensor of the threshold's state, ``wide_dtype``; made and filled on ``device`` when first asked for."""
        found = self._state.get(name)
        if found is not None and found.device == device:
            return found
        # It outlives this call: tensors of inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if found is not None:
                found = found.to(device)
            elif name in self._loaded:
                self._check_shape(name, self._loaded[name].shape, torch.Size(shape))
                found = self._loaded.pop(name).to(device, wide_dtype(device), copy=True)
            else:
                found = torch.full(shape, fill, dtype=wide_dtype(device), device=device)
        self._state[name] = found
        return found

    def state_tensors(self) -> list[Tensor]:
        """All of its state that lies on a device, each tensor as it is and not as a copy."""
        return list(self._state.values())

    def _check_shape(self, name: str, theirs: torch.Size, ours: torch.Size) -> None:
        if theirs != ours:
            other = f"of a {type_name(self)} with other arguments"
            raise ValueError(f"state: {name!r} has shape {list(theirs)}, not {list(ours)}: {other}")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue with the same bits: tensors, numbers and strings."""
        names = self._names()
        return {
            "policy": type_name(self),
            "components": None if names is None else list(names),
            "tensors": self._tensors(),
            "host": self.host_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a ``state_dict()``, before or after the threshold is bound, on any device.

        Raises:
            TypeError, ValueError: not a state of such a threshold, or for other components; nothing is changed. If
                the threshold isn't bound yet, shapes and components are compared when it is.
        """
        self.check_state(state)
        tensors, host = state["tensors"], state["host"]
        names = None if state["components"] is None else tuple(state["components"])
        missing = sorted(set(self._state) - set(tensors))
        self._loaded_names = names
        self.load_host_state(dict(host))
        self._loaded = {name: tensor.clone() for name, tensor in tensors.items() if name not in self._state}
        for name in missing:  # as before the first step
            del self._state[name]
        for name, tensor in self._state.items():
            tensor.copy_(tensors[name])  # in place: a captured graph goes on reading it
        if missing and self._setting is not None:
            self.allocate(self._setting.device)

    def check_state(self, state: object) -> None:
        """Raises what ``load_state_dict`` would, and changes nothing."""
        if not isinstance(state, dict) or set(state) != {"policy", "components", "tensors", "host"}:
            raise TypeError("state: expected what state_dict() of a threshold returned")
        if state["policy"] != type_name(self):
            raise ValueError(f"state: of a {state['policy']}, not of a {type_name(self)}")
        tensors, host = state["tensors"], state["host"]
        values = tensors.values() if isinstance(tensors, Mapping) else [None]
        if not all(isinstance(tensor, Tensor) and not tensor.is_meta for tensor in values):
            raise TypeError("state: expected tensors with data under 'tensors'")
        if not isinstance(host, Mapping) or set(host) != set(self.host_state()):
            raise TypeError(f"state: expected {sorted(self.host_state())} under 'host', not {host!r}")
        names = None if state["components"] is None else tuple(state["components"])
        if names is not None and self._setting is not None and not are_same_names(names, self._setting.names):
            raise ValueError(f"state: of other components{difference_of(names, self._setting.names)}")
        for name, tensor in tensors.items():
            if name in self._state:
                self._check_shape(name, tensor.shape, self._state[name].shape)
        missing = sorted(set(self._state) - set(tensors))
        if missing and names is not None:  # without names the threshold had learnt nothing yet
            raise ValueError(f"state: has no {some_of(missing)}, which belong to a {type_name(self)}")

    def host_state(self) -> dict[str, int | float]:
        """What else belongs to the state: numbers on the host."""
        return {}

    def load_host_state(self, state: dict[str, int | float]) -> None:  # noqa: B027  # most have none
        """Takes over what ``host_state()`` returned."""


def caps_of(threshold: Threshold, device: torch.device, norms: Tensor | None, count: int) -> Tensor:
    """What ``Threshold.caps`` returns, checked; ``count`` components."""
    caps, wide = threshold.caps(device, norms), wide_dtype(device)
    found = type_name(caps)
    if isinstance(caps, Tensor):
        if (caps.dtype, caps.device) == (wide, device) and caps.shape in ((), (count,)) and caps.is_contiguous():
            return caps
        found = f"{caps.dtype} of shape {list(caps.shape)} on {caps.device}"
    raise TypeError(
        f"max_norm: caps() of {threshold} has to return a contiguous {wide} tensor of shape [] or [{count}] on "
        f"{device}, not {found}"
    )


def observed(norms: Tensor) -> Tensor:
    """[K] bool: where a norm tells something. inf and NaN don't, nor does 0: a component without a gradient."""
    return norms.isfinite() & (norms > 0)


def as_wide(norms: Tensor) -> Tensor:
    """[K] in the dtype of the state."""
    return norms.to(wide_dtype(norms.device))


def difference_of(theirs: tuple[str, ...], ours: tuple[str, ...]) -> str:
    """How two lists of component names differ, in a few words."""
    missing = [name for name in ours if name not in set(theirs)]
    extra = [name for name in theirs if name not in set(ours)]
    parts = [f"no {some_of(missing)}"] if missing else []
    parts += [f"but {some_of(extra)}"] if extra else []
    return f" ({' '.join(parts)})" if parts else " (the same names in another order)"
