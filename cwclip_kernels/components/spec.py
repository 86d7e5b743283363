"""``ComponentSpec``: components put together from words, functions, and slices of single tensors."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from operator import index as as_index
from typing import TypeAlias, TypeVar

from torch import Tensor
from torch.nn import UninitializedParameter

from ..arguments import type_name
from .grouping import By, key_function
from .membership import Slice
from .naming import Aliases
from .patterns import check_readings, matches, no_match


@dataclass(frozen=True)
class ComponentSpec:
    """Says what is clipped together, down to slices of one tensor. Immutable: each method returns a new one.

    Fused layers keep in one tensor what a model means as several: query, key and value, or all experts of a layer.
    A slice along dim 0 costs nothing extra; along other dims it is right, and slower. A slice's component is named
    after what it is cut from: ``h.0.attn.c_attn.weight[q]``.

    Frozen parameters are not in the way: tensors of integers, such as packed 4-bit weights, are never cut, and other
    frozen ones that a split doesn't fit stay whole. Those that it fits are cut, so that freezing changes no name.

    Args:
        base: how parameters that no ``group`` matches are grouped: None or "parameter", "module", "layer", "type",
            "all", or a callable (name, tensor) -> hashable key, None to leave the tensor alone.

    Raises:
        TypeError, ValueError: an argument that isn't what it should be; named in the message. Patterns and sizes are
            held against the parameters when the spec is first used with them.

    Example:
        >>> import torch
        >>> from cwclip_kernels import ComponentClipper, ComponentSpec
        >>> layer = torch.nn.MultiheadAttention(4, 2)
        >>> spec = ComponentSpec().split("in_proj_*", sizes=(4, 4, 4), names=("q", "k", "v"))
        >>> ComponentClipper(layer, 0.05, components=spec).names[:3]
        ('in_proj_weight[q]', 'in_proj_weight[k]', 'in_proj_weight[v]')
        >>> spec = ComponentSpec("layer").group("*.bias", "all")  # layer by layer, but all biases together
    """

    base: By = None
    groups: tuple[_Group, ...] = ()
    cuts: tuple[_Cut, ...] = ()

    def __post_init__(self) -> None:
        key_function(self.base)

    def group(self, pattern: str, by: By) -> ComponentSpec:
        """Groups the parameters that match otherwise than the base does; the last ``group`` that matches counts.

        Args:
            pattern: ``fnmatch`` pattern on parameter names, or one exact name.
            by: as ``base``. "all" puts everything that matches into one component, named after the pattern.
        """
        _check_pattern(pattern)
        key_function(by)
        return replace(self, groups=(*self.groups, _Group(pattern, by)))

    def split(
        self, pattern: str, sizes: int | Sequence[int], names: Sequence[str] | None = None, dim: int = 0
    ) -> ComponentSpec:
        """Cuts every parameter that matches into consecutive slices, each a component.

        Two splits of one parameter along different dims cut it both ways: ``experts.w[3][gate]``.

        Args:
            pattern: ``fnmatch`` pattern on parameter names, or one exact name.
            sizes: lengths of the slices along ``dim``, which they must fill; one number for slices of that length
                each (a head's rows, 1 for experts stacked along ``dim``).
            names: one for each slice, distinct; "0", "1", ... without.
            dim: dimension that is cut; negative ones count from the end.
        """
        _check_pattern(pattern)
        return replace(
            self,
            cuts=(*self.cuts, _Cut(pattern, _checked_sizes(sizes), _checked_names(names, sizes), _checked_dim(dim))),
        )

    def unitwise(self, pattern: str, dim: int = 0) -> ComponentSpec:
        """One component for each index along ``dim`` of every parameter that matches: each output unit of a Linear.

        Parameters with fewer than two dimensions have no rows and stay whole, as in Brock et al., "High-Performance
        Large-Scale Image Recognition Without Normalization", 2021, arXiv 2102.06171.

        Args:
            pattern: ``fnmatch`` pattern on parameter names, or one exact name.
            dim: 0 for the rows of a Linear or a convolution, 1 for those of a Conv1D of GPT-2.
        """
        _check_pattern(pattern)
        return replace(self, cuts=(*self.cuts, _Cut(pattern, 1, None, _checked_dim(dim), unitwise=True)))

    @property
    def words(self) -> tuple[By, ...]:
        """Everything that parameters are grouped by."""
        return (self.base, *(g.by for g in self.groups))

    @property
    def is_static(self) -> bool:
        """Whether names and shapes alone decide: no callable is to be asked."""
        return not any(map(callable, self.words))

    def check_patterns(self, names: Sequence[str], aliases: Aliases = (), prefix: str = "") -> None:
        """Raises ValueError if a pattern matches none of these parameters, of which tied ones have other names.

        Args:
            names: of the parameters.
            aliases: other names of tied ones, for the message.
            prefix: that the names have lost, and a pattern may begin with.
        """
        parts: tuple[_Part, ...] = (*self.groups, *self.cuts)
        for part in parts:
            method, pattern = part.method, part.pattern
            if not any(matches(name, pattern) or (prefix and matches(prefix + name, pattern)) for name in names):
                raise ValueError(
                    f"components: {method}({pattern!r}) {no_match(pattern, names, 'parameters', aliases)}"
                )

    def read_for(self, names: Sequence[str], prefix: str) -> ComponentSpec:
        """The same, its patterns read without the prefix that these names have lost, or with it if none matches so.

        Raises:
            ValueError: a pattern matches names without it and others with it.
        """

        def read(part: _AnyPart) -> _AnyPart:
            own = {name for name in names if matches(name, part.pattern)}
            prefixed = {name for name in names if matches(prefix + name, part.pattern)}
            check_readings(f"components: the pattern of {part.method}", part.pattern, own, prefixed)
            return replace(part, prefix=prefix) if prefixed and not own else part

        return replace(self, groups=tuple(map(read, self.groups)), cuts=tuple(map(read, self.cuts)))

    def key_of(self, name: str, tensor: Tensor, beside: Collection[str] = ()) -> Hashable | None:
        """The key of the component that a whole parameter would belong to, None to leave it alone."""
        group = self._group_of(name)
        if group is None:
            return key_function(self.base, beside)(name, tensor)
        return group.pattern if group.by == "all" else key_function(group.by, beside)(name, tensor)

    def key_by_name(self, name: str, tensor: Tensor, beside: Collection[str] = ()) -> Hashable | None:
        """As ``key_of``, but None where a callable would have to be asked."""
        group = self._group_of(name)
        return None if callable(self.base if group is None else group.by) else self.key_of(name, tensor, beside)

    def prefixed_key(self, name: str, key: Hashable, prefix: str) -> str | None:
        """What a parameter's key would be, had its name kept this prefix; None where that makes no difference."""
        group = self._group_of(name)
        by = self.base if group is None else group.by
        return None if by == "all" or callable(by) else f"{prefix}{key}".removesuffix(".")

    def _group_of(self, name: str) -> _Group | None:
        return next((group for group in reversed(self.groups) if group.matches(name)), None)

    def slices_of(self, name: str, tensor: Tensor) -> list[tuple[str, Slice]]:
        """The slices of a parameter, each with what is appended to its component's name; none if it stays whole.

        Integers, such as the packed weights of a quantized model, have no gradient and stay whole.

        Raises:
            ValueError: sizes that don't fill the dimension, a dimension that isn't there or that is cut twice.
        """
        if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
            return []
        cuts: dict[int, _Cut] = {}
        for cut in self.cuts:
            if not cut.matches(name):
                continue
            if isinstance(tensor, UninitializedParameter):  # torch's is_lazy() can't be traced
                raise ValueError(f"components: {name!r} can't be cut before its shape is known; run the model once")
            if cut.unitwise and tensor.ndim < 2:
                continue
            dim = cut.dim_of(name, tensor)
            if dim in cuts:
                raise ValueError(
                    f"components: {name!r} is cut along dim {dim} twice, by {cuts[dim].pattern!r} and {cut.pattern!r}"
                )
            cuts[dim] = cut
        if not cuts:
            return []
        along = [cut.slices(name, tensor, dim) for dim, cut in cuts.items()]
        return [
            ("".join(f"[{label}]" for label, _ in chosen), tuple(sorted(part for _, part in chosen)))
            for chosen in product(*along)
        ]


@dataclass(frozen=True)
class _Part:
    pattern: str
    prefix: str = field(default="", kw_only=True)  # which names get before they are held against the pattern

    def matches(self, name: str) -> bool:
        return matches(self.prefix + name, self.pattern)

    @property
    def method(self) -> str:
        return "group"


_AnyPart = TypeVar("_AnyPart", bound=_Part)


@dataclass(frozen=True)
class _Group(_Part):
    by: By


@dataclass(frozen=True)
class _Cut(_Part):
    sizes: int | tuple[int, ...]
    names: tuple[str, ...] | None
    dim: int
    unitwise: bool = False

    @property
    def method(self) -> str:
        return "unitwise" if self.unitwise else "split"

    def dim_of(self, name: str, tensor: Tensor) -> int:
        if not -tensor.ndim <= self.dim < tensor.ndim:
            raise ValueError(
                f"components: {name!r} has shape {list(tensor.shape)}, no dim {self.dim} (cut by {self.pattern!r})"
            )
        return self.dim % tensor.ndim

    def slices(self, name: str, tensor: Tensor, dim: int) -> list[tuple[str, tuple[int, int, int]]]:
        length = tensor.shape[dim]
        sizes = self.sizes
        if isinstance(sizes, int):
            if length % sizes:
                raise ValueError(
                    f"components: dim {dim} of {name!r} has length {length}, which is not a multiple of "
                    f"sizes={sizes} (cut by {self.pattern!r})"
                )
            sizes = (sizes,) * (length // sizes)
        if sum(sizes) != length:
            raise ValueError(
                f"components: dim {dim} of {name!r} has length {length}, but sizes={sizes} add up to {sum(sizes)} "
                f"(cut by {self.pattern!r})"
            )
        labels = self.names or tuple(map(str, range(len(sizes))))
        if len(labels) != len(sizes):
            raise ValueError(
                f"components: {name!r} has {len(sizes)} slices along dim {dim}, but there are {len(labels)} names "
                f"(cut by {self.pattern!r})"
            )
        starts = (
            [sum(sizes[:i]) for i in range(len(sizes))]
            if len(set(sizes)) > 1
            else [i * s for i, s in enumerate(sizes)]
        )
        return [(label, (dim, start, size)) for label, start, size in zip(labels, starts, sizes, strict=True)]


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------


def _check_pattern(pattern: object) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"pattern: expected a string, not {type_name(pattern)}")


def _checked_length(size: object) -> int:
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"sizes: expected a whole number or a sequence of them, not {type_name(size)}")
    length = as_index(size)
    if length < 1:
        raise ValueError(f"sizes: expected numbers >= 1, not {length}")
    return length


def _checked_sizes(sizes: int | Sequence[int]) -> int | tuple[int, ...]:
    if hasattr(sizes, "__index__") or isinstance(sizes, str) or not isinstance(sizes, Sequence):
        return _checked_length(sizes)
    if not sizes:
        raise ValueError("sizes: expected at least one")
    return tuple(map(_checked_length, sizes))


def _checked_names(names: Sequence[str] | None, sizes: int | Sequence[int]) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise TypeError("names: expected a sequence of strings, one for each slice")
    if len(set(names)) < len(names):
        raise ValueError(f"names: expected distinct ones, not {tuple(names)}")
    if isinstance(sizes, Sequence) and len(names) != len(sizes):
        raise ValueError(f"names: expected {len(sizes)}, one for each of sizes, not {len(names)}")
    return tuple(names)


def _checked_dim(dim: object) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected a whole number, not {type_name(dim)}")
    return dim


Grouping: TypeAlias = "By | ComponentSpec"
