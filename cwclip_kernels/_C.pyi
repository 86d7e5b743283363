"""The compiled extension, built from csrc/. Its index is csrc/python.cpp.

Most functions take addresses instead of tensors: an int is the address of a tensor's first element, or of a CUDA
stream, and 0 stands for None. Those that read gradients themselves, ``*_at_once``, take tensors. ``addresses`` are
int64 numbers as bytes, one for each gradient of the program. Errors come before the first gradient is written:
TypeError and ValueError for arguments, RuntimeError for what doesn't fit together and for CUDA's errors. A build
without CUDA kernels has no functions named cuda_*.
"""

from collections.abc import Sequence
from types import EllipsisType
from typing import final

from torch import Tensor

@final
class Rule:
    """How norms become coefficients: a capsule."""

@final
class CpuProgram:
    """What is static about a bucket of gradients, for the CPU kernels: a capsule."""

@final
class CpuStepProgram:
    """What is static about an optimizer's step of a bucket's parameters, for the CPU kernels: a capsule."""

@final
class CudaProgram:
    """What is static about a bucket of gradients, for the CUDA kernels: a capsule."""

def rule(norm_type: float, eps: float, nonfinite: int, /) -> Rule:
    """norm_type: 1, 2 or inf. nonfinite: the policy's place in ``formula.POLICIES``, up to 2."""

def signature_of(tensors: Sequence[Tensor | EllipsisType | None], /) -> bytes | None:
    """Dtypes, devices, shapes and strides of a list of strided tensors, each exactly of type Tensor or Parameter.

    In the list None stands for a gradient that doesn't exist, Ellipsis for an entry that isn't compared.

    Returns:
        None if there is anything else in the list.
    """

def addresses_of(
    grads: Sequence[Tensor | None], signature: bytes, last: bytes | None, writes: bool, /
) -> bytes | None:
    """The addresses of tensors with this signature, some 20 ns each.

    Args:
        grads: a list.
        signature: from ``signature_of``.
        last: what the last call with the same ``writes`` returned; returned again if nothing moved.
        writes: whether the tensors are to be written to; then they may not share memory.

    Returns:
        None if the tensors have another signature or share memory.
    """

def gradients_of(parameters: tuple[Tensor, ...], /) -> list[Tensor | None]:
    """``[p.grad for p in parameters]``, some 10 ns each; raises what reading one raises.

    Of a Tensor or Parameter it is read past modes of ``__torch_function__``.
    """

def cpu_program(signature: bytes, components: bytes, cuts: bytes | None, count: int, wide: bool, /) -> CpuProgram:
    """Cuts the gradients of one bucket into tiles.

    Args:
        signature: of its gradients.
        components: int64, component of each piece.
        cuts: int64, ``Bucket.cuts``; None if the pieces are the gradients.
        count: number of components K.
        wide: whether norms and coefficients are float64, not float32.
    """

def cpu_power_sums(program: CpuProgram, addresses: bytes, norm_type: float, sums: int, /) -> None:
    """Sum |g|^p, or max |g|: float64 [K] at ``sums``."""

def cpu_scale(program: CpuProgram, addresses: bytes, factors: int, zero_fill: bool, /) -> None:
    """g <- factor * g. factors: float64 [K]; zero_fill: whether a factor of 0 writes zeros over inf and NaN."""

def cpu_clip(
    program: CpuProgram,
    addresses: bytes,
    rule: Rule,
    caps: int,
    caps_stride: int,
    inverse: int,
    found_inf: int,
    norms: int,
    coefs: int,
    /,
) -> None:
    """Norms and coefficients [K], and gradients scaled by them.

    Args:
        program: of the bucket.
        addresses: of its gradients.
        rule: how norms become coefficients.
        caps: float64.
        caps_stride: elements from one component's cap to the next, 0 if all share one.
        inverse: float64 [], what undoes the loss's scale; or 0.
        found_inf: float32 [], set to 1 if any element is inf or NaN; or 0.
        norms: written.
        coefs: written.
    """

def cpu_clip_at_once(
    program: CpuProgram,
    parameters: tuple[Tensor, ...],
    signature: bytes,
    last: bytes | None,
    rule: Rule,
    caps: Tensor,
    inverse: Tensor | None,
    found_inf: Tensor | None,
    norms: Tensor,
    coefs: Tensor,
    /,
) -> bytes | None:
    """Looks at parameters' gradients as ``addresses_of`` with ``writes``, bumps their versions, and clips them.

    Args:
        program: of the bucket.
        parameters: those of the call.
        signature: of their gradients, from ``signature_of``.
        last: what the last call returned; returned again if nothing moved.
        rule: this and all below as for ``cpu_clip``, as tensors.
        caps: float64, [] or [K].
        inverse: float64 [].
        found_inf: float32 [].
        norms: [K], contiguous.
        coefs: [K], contiguous.

    Returns:
        The gradients' addresses. None, and nothing done, if they have another signature, share memory or require
        grad, or if a tensor has no address, as a fake one.
    """

def cpu_step_program(program: CpuProgram, grads: bytes, written: bytes, rule_of: bytes, /) -> CpuStepProgram:
    """How a bucket's parameters are stepped; RuntimeError with a reason, to follow "cpu", if they can't be.

    Args:
        program: of the gradients.
        grads: their signature.
        written: the signature of ``AdamWStep.written()``.
        rule_of: int64, ``AdamWStep.rule_of``.
    """

def cpu_clip_adamw(
    program: CpuProgram,
    addresses: bytes,
    step: CpuStepProgram,
    written: bytes,
    rules: bytes,
    skip: int,
    rule: Rule,
    caps: int,
    caps_stride: int,
    inverse: int,
    found_inf: int,
    norms: int,
    coefs: int,
    /,
) -> None:
    """Norms and coefficients [K], and one step of ``core.adamw`` with gradients times these, which aren't written.

    Args:
        program: of the gradients.
        addresses: theirs.
        step: made for this program.
        written: addresses of ``AdamWStep.written()``.
        rules: of each param group lr, beta1, beta2, eps, weight_decay, maximize and correct_bias, as doubles.
        skip: float32 []: nothing but norms and coefficients is written unless it is 0; or 0.
        rule: this and all below as for ``cpu_clip``.
        caps: float64.
        caps_stride: 0 if all components share one.
        inverse: float64 [], or 0.
        found_inf: ignored.
        norms: written.
        coefs: written.
    """

def cpu_adamw(
    program: CpuProgram,
    addresses: bytes,
    step: CpuStepProgram,
    written: bytes,
    rules: bytes,
    skip: int,
    factors: int,
    zero_fill: bool,
    /,
) -> None:
    """The same step by factors float64 [K]; zero_fill: whether a factor of 0 erases inf and NaN."""

def cuda_program(
    signature: bytes, components: bytes, cuts: bytes | None, count: int, wide: bool, /
) -> tuple[CudaProgram, bytes, int]:
    """As ``cpu_program``; with tables to bring to the device, and the bytes of workspace that a call needs there."""

def cuda_place(program: CudaProgram, tables: int, device: int, /) -> None:
    """Tells a program where its tables are. From then on ``device`` has to be torch's current one at every call."""

def cuda_power_sums(
    program: CudaProgram, addresses: bytes, stream: int, workspace: int, norm_type: float, sums: int, /
) -> None:
    """Launches what ``cpu_power_sums`` does. workspace: zeros, or as the stream's last call left it."""

def cuda_scale(
    program: CudaProgram, addresses: bytes, stream: int, workspace: int, coefs: int, wide: bool, zero_fill: bool, /
) -> None:
    """Launches what ``cpu_scale`` does. coefs: [K], float64 if ``wide``, else float32."""

def cuda_clip(
    program: CudaProgram,
    addresses: bytes,
    stream: int,
    workspace: int,
    rule: Rule,
    caps: int,
    caps_stride: int,
    inverse: int,
    found_inf: int,
    norms: int,
    coefs: int,
    /,
) -> None:
    """Launches what ``cpu_clip`` does."""

def cuda_clip_at_once(
    program: CudaProgram,
    workspaces: dict[int, Tensor],
    parameters: tuple[Tensor, ...],
    signature: bytes,
    last: bytes | None,
    rule: Rule,
    caps: Tensor,
    inverse: Tensor | None,
    found_inf: Tensor | None,
    norms: Tensor,
    coefs: Tensor,
    /,
) -> bytes | None:
    """Launches what ``cpu_clip_at_once`` does on torch's current stream.

    ``workspaces`` are those of streams, by ``cuda_stream``'s number. None also if the current stream has none there,
    or is being captured.
    """

def cuda_step_table(program: CudaProgram, stepped: bytes, /) -> bytes:
    """What ``cuda_adamw`` and ``cuda_clip_adamw`` need on the device, for tensors that lie where they are.

    Args:
        program: of the bucket of gradients.
        stepped: int64, for each gradient: addresses of p, m, v, w (0 without amsgrad) and t; its rule; the dtype of
            p, and that of m, v and w: 0 float32, 1 bfloat16, 2 float16, 3 float64; whether t is float64, not float32.
    """

def cuda_adamw(
    program: CudaProgram,
    addresses: bytes,
    stream: int,
    workspace: int,
    table: int,
    rules: bytes,
    skip: int,
    factors: int,
    wide: bool,
    zero_fill: bool,
    /,
) -> None:
    """Launches the step of ``core.adamw``.

    Args:
        program: of the bucket of gradients.
        addresses: of the gradients, which are read only.
        stream: to launch on.
        workspace: as for ``cuda_power_sums``.
        table: from ``cuda_step_table``, on the device; a part of it is written.
        rules: of each float64 lr, beta1, beta2, eps, weight_decay; the address of lr on the device, or 0; int32
            whether that is float64, not float32; maximize; correct_bias; 0.
        skip: float32 [], nothing is stepped unless it is 0; or 0.
        factors: [K], float64 if ``wide``, else float32.
        wide: see there.
        zero_fill: whether a factor of 0 erases inf and NaN.
    """

def cuda_clip_adamw(
    program: CudaProgram,
    addresses: bytes,
    stream: int,
    workspace: int,
    table: int,
    rules: bytes,
    skip: int,
    rule: Rule,
    caps: int,
    caps_stride: int,
    inverse: int,
    found_inf: int,
    norms: int,
    coefs: int,
    /,
) -> None:
    """Launches norms and coefficients as ``cuda_clip``, and the step by them; arguments as there and above."""

def cuda_stream(device: int, /) -> tuple[int, int, bool]:
    """Torch's current stream on a device: its handle, its number, and whether it is being captured.

    No other stream of the process ever has this number, but for drivers older than CUDA 12, which don't count them:
    then it is the handle, which a later stream may have. 0 while the stream is captured.
    """

def cuda_obstacle(device: int, /) -> str | None:
    """Why the kernels can't run on a device, or None."""
