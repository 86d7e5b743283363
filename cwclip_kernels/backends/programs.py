"""What the native backends keep with a bucket: its gradients' addresses and the program made for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from ..core.bucket import Bucket
from . import native
from .native import Addresses


@dataclass
class ProgramState:
    """What a backend keeps with a bucket, at the least."""

    addresses: Addresses


State = TypeVar("State", bound=ProgramState)


def look_up(
    bucket: Bucket,
    grads: list[Tensor],
    addresses: bytes | None,
    make: Callable[[Bucket, Addresses], State],
    writes: bool,
) -> tuple[State, bytes]:
    """A bucket's state, made by ``make`` where there is none yet, and the addresses of its gradients.

    ``addresses`` are those that the plan has read; it reads none of gradients like the values of sparse ones, whose
    number changes. ``writes`` says whether the gradients are to be written to.

    Raises:
        RuntimeError: the gradients share memory, or these are not those that the plan was made for.
    """
    state: State | None = bucket.state
    if state is None:
        state = bucket.state = make(bucket, Addresses(grads))
    found = state.addresses.of(grads, writes=writes) if addresses is None else addresses
    if found is None and not bucket.plain:
        state = bucket.state = make(bucket, Addresses(grads))
        found = state.addresses.of(grads, writes=writes)
    if found is None:
        raise RuntimeError("these are not the gradients that the plan was made for, or they share memory")
    return state, found


def program_arguments(bucket: Bucket, addresses: Addresses) -> tuple[bytes, bytes, bytes | None, int, bool]:
    """What ``cpu_program`` and ``cuda_program`` take."""
    cuts = bucket.cuts()
    return (
        addresses.signature,
        native.bytes_of(bucket.components),
        None if cuts is None else native.packed(cuts),
        bucket.count,
        bucket.norm_dtype.itemsize == 8,
    )
