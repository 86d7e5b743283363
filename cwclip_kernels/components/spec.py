"""``ComponentSpec``: components put together from words, functions, and slices of single tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import Any, TypeAlias, TypeGuard

from torch import Tensor
from torch.nn import UninitializedParameter

from ..arguments import check_type, checked_int
from .grouping import By, check_grouping
from .membership import Slice
from .naming import Aliases, with_prefix
from .patterns import matches, no_match, read_pattern


@dataclass(frozen=True)
class ComponentSpec:
    """Says what is clipped together, down to slices of one tensor. Immutable: each method returns a new one.

    Fused layers keep in one tensor what a model means as several: query, key and value, or all experts of a layer.
    A slice along dim 0 costs nothing extra; along other dims it is slower. A slice's component is named after what
    it is cut from: ``h.0.attn.c_attn.weight[q]``. A pattern is an ``fnmatch`` pattern or an exact parameter name.

    Frozen parameters are cut where a split fits, so that freezing changes no name, and stay whole where it doesn't.
    Tensors of integers, such as packed 4-bit weights, are never cut.

    Args:
        base: how parameters that no ``group`` matches are grouped: None or "parameter", "module", "layer", "type",
            "all", or a callable (name, tensor) -> hashable key, None to leave the tensor alone.

    Raises:
        TypeError, ValueError: names the argument. Patterns and sizes are compared with parameters at the first use.

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
    parts: tuple[_Part, ...] = ()

    def __post_init__(self) -> None:
        check_grouping(self.base)

    def group(self, pattern: str, by: By) -> ComponentSpec:
        """Groups the parameters that match differently from the base; the last ``group`` that matches counts.

        Args:
            pattern: which parameters.
            by: as ``base``. "all" puts all that match into one component, which is named after the pattern.
        """
        check_type(pattern, "pattern", str, "a string")
        check_grouping(by)
        return replace(self, parts=(*self.parts, _Part("group", pattern, by=by)))

    def split(
        self, pattern: str, sizes: int | Sequence[int], names: Sequence[str] | None = None, dim: int = 0
    ) -> ComponentSpec:
        """Cuts every parameter that matches into consecutive slices, each a component.

        Two splits of one parameter along different dims cut it both ways: ``experts.w[3][gate]``.

        Args:
            pattern: which parameters.
            sizes: lengths of the slices along ``dim``, which they must fill; or one length of all slices (a head's
                rows, 1 for experts stacked along ``dim``).
            names: one for each slice, distinct; "0", "1", ... without.
            dim: dimension that is cut; negative ones count from the end.
        """
        check_type(pattern, "pattern", str, "a string")
        kinds = "a whole number or a sequence of them"
        if _is_sequence(sizes):
            sizes = tuple(checked_int(size, "sizes", 1, kinds) for size in sizes)
            if not sizes:
                raise ValueError("sizes: expected at least one")
        else:
            sizes = checked_int(sizes, "sizes", 1, kinds)
        if names is not None:
            if not _is_sequence(names) or not all(isinstance(name, str) for name in names):
                raise TypeError("names: expected a sequence of strings, one for each slice")
            names = tuple(names)
            if len(set(names)) < len(names):
                raise ValueError(f"names: expected distinct ones, not {names}")
            if isinstance(sizes, tuple) and len(names) != len(sizes):
                raise ValueError(f"names: expected {len(sizes)}, one for each of sizes, not {len(names)}")
        part = _Part("split", pattern, sizes=sizes, names=names, dims=(checked_int(dim, "dim"),))
        return replace(self, parts=(*self.parts, part))

    def unitwise(self, pattern: str, dim: int | Sequence[int] = 0) -> ComponentSpec:
        """One component for each index along ``dim`` of every parameter that matches: each output unit of a Linear.

        With several dims there is one for each combination of indices, named ``weight[3,1]``. A parameter with no
        more dimensions than ``dim`` names stays whole, such as a bias: its units would be single numbers. (As in
        Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", 2021, arXiv 2102.06171.)

            weight of                               output unit
            Linear [out, in], Conv [out, in/groups, ...]          dim=0; dim=(0, 1) for each kernel of a convolution
            ConvTranspose [in, out, ...], Conv1D of GPT-2         dim=1
            ConvTranspose [in, out/groups, ...] with groups       .split(p, sizes=in // groups).unitwise(p, dim=1)
            Embedding [tokens, features]                          dim=0 for each token, 1 for each feature

        ``dim`` says what is kept apart. optax's ``adaptive_grad_clip(axis=...)`` names the other axes, that norms are
        taken over, in JAX's layouts; timm's AGC is dim=0.

        Args:
            pattern: which parameters.
            dim: a dimension or several, which give names in this order; negative ones count from the end.
        """
        check_type(pattern, "pattern", str, "a string")
        kinds = "a whole number or a sequence of them"
        dims = tuple(checked_int(d, "dim", kinds=kinds) for d in (dim if _is_sequence(dim) else (dim,)))
        if not dims:
            raise ValueError("dim: expected at least one")
        if len(set(dims)) < len(dims):
            raise ValueError(f"dim: expected distinct ones, not {dims}")
        return replace(self, parts=(*self.parts, _Part("unitwise", pattern, dims=dims)))

    @property
    def words(self) -> tuple[By, ...]:
        """Every word or callable that parameters are grouped by."""
        return (self.base, *(part.by for part in self.parts))

    @property
    def is_static(self) -> bool:
        """Whether names and shapes alone decide: no callable is to be asked."""
        return not any(map(callable, self.words))

    def read_for(self, names: Sequence[str], aliases: Aliases, lost_prefix: bool, is_all: bool) -> ComponentSpec:
        """The same for these parameters: each pattern with the prefix that they have lost, if it matches only so.

        Raises:
            ValueError: a pattern may be meant in both ways, or matches nothing although these are all parameters.
        """
        spelt = {name: with_prefix(name) for name in names} if lost_prefix else {}

        def read(part: _Part) -> _Part:
            what = f"components: {part.method}({part.pattern!r})"
            found, prefixed = read_pattern(what, part.pattern, names, spelt)
            if is_all and not found:
                raise ValueError(f"{what} {no_match(part.pattern, names, 'parameters', aliases)}")
            return replace(part, prefixed=prefixed)

        return replace(self, parts=tuple(map(read, self.parts)))

    def rule_for(self, name: str) -> tuple[By, str]:
        """What a parameter is grouped by, and the key of its component if that is "all"."""
        for part in reversed(self.parts):
            if part.method == "group" and part.matches(name):
                return part.by, part.pattern
        return self.base, "all"

    def slices_of(self, name: str, tensor: Tensor) -> list[tuple[str, Slice]]:
        """The slices of a parameter, each with the end of its component's name: [("", ())] if it stays whole.

        Raises:
            ValueError: sizes that don't fill the dimension, a dimension that isn't there or that is cut twice.
        """
        cuts: dict[int, _Part] = {}
        found: list[list[tuple[str, Slice]]] = []  # of each cut, its slices
        for cut in self.parts if tensor.dtype.is_floating_point or tensor.dtype.is_complex else ():
            if cut.method == "group" or not cut.matches(name):
                continue
            if isinstance(tensor, UninitializedParameter):  # torch's is_lazy() can't be traced
                raise ValueError(f"components: {name!r} can't be cut before its shape is known; run the model once")
            if cut.method == "unitwise" and tensor.ndim <= len(cut.dims):
                continue
            along: list[list[tuple[str, tuple[int, int, int]]]] = []
            for given in cut.dims:
                if not -tensor.ndim <= given < tensor.ndim:
                    raise cut.error(f"{name!r} has shape {list(tensor.shape)}, no dim {given}")
                dim = given % tensor.ndim
                if dim in cuts:
                    raise cut.error(f"{name!r} is cut along dim {dim} twice, before by {cuts[dim].pattern!r}")
                cuts[dim] = cut
                along.append(cut.slices(name, tensor.shape[dim], dim))
            found.append([_joined(chosen) for chosen in product(*along)])
        return [
            ("".join(label for label, _ in chosen), tuple(sorted(place for _, part in chosen for place in part)))
            for chosen in product(*found)
        ]


@dataclass(frozen=True)
class _Part:
    """What one of ComponentSpec's methods was called with, which is named by ``method``."""

    method: str
    pattern: str
    by: By = None
    sizes: int | tuple[int, ...] = 1
    names: tuple[str, ...] | None = None
    dims: tuple[int, ...] = (0,)
    prefixed: bool = False  # whether names get PREFIX before they are compared with the pattern

    def matches(self, name: str) -> bool:
        return matches(with_prefix(name) if self.prefixed else name, self.pattern)

    def slices(self, name: str, length: int, dim: int) -> list[tuple[str, tuple[int, int, int]]]:
        """Label and (dim, start, size) of each slice."""
        sizes, what = self.sizes, f"dim {dim} of {name!r} has length {length}"
        if isinstance(sizes, int):
            if length % sizes:
                raise self.error(f"{what}, which is not a multiple of sizes={sizes}")
            sizes = (sizes,) * (length // sizes)
        if sum(sizes) != length:
            raise self.error(f"{what}, but sizes={sizes} add up to {sum(sizes)}")
        labels = self.names or tuple(map(str, range(len(sizes))))
        if len(labels) != len(sizes):
            raise self.error(f"{name!r} has {len(sizes)} slices along dim {dim}, but there are {len(labels)} names")
        starts = accumulate(sizes, initial=0)  # and the end of the last slice
        return [(label, (dim, start, size)) for label, start, size in zip(labels, starts, sizes, strict=False)]

    def error(self, problem: str) -> ValueError:
        return ValueError(f"components: {problem} (cut by {self.pattern!r})")


def _joined(chosen: Sequence[tuple[str, tuple[int, int, int]]]) -> tuple[str, Slice]:
    """One slice along each of a cut's dims, as one slice with a label."""
    return f"[{','.join(label for label, _ in chosen)}]", tuple(place for _, place in chosen)


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


Grouping: TypeAlias = "By | ComponentSpec"
