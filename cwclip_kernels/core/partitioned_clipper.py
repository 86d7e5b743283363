"""Clipping for an optimizer that keeps gradients in flat partitions, and asks for norms first and scaling later."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..components.parameters import NamedTensors
from ..components.resolve import resolve
from ..components.spec import Grouping
from ..distributed.partitions import Partitions
from ..distributed.run import DistributedCall
from ..result import ClipResult
from ..thresholds.constant import MaxNorm
from . import run
from .loss_scale import LossScale
from .options import Options
from .parameter_clipper import ParameterClipper
from .plan import Plans, home_of
from .session import ClipSession


class PartitionedClipper(ParameterClipper):
    """Clips what an optimizer keeps of its gradients, in two steps: ``measure``, then ``scale_`` for each partition.

    All ranks make it, and call ``measure``, together. What is measured and what is scaled need not be the same
    tensors: ZeRO measures gradients as they were reduced, and scales their copy in the dtype of its own parameters.

    Attributes:
        covers_all: whether each element of the optimizer's parameters belongs to a component.
    """

    def __init__(
        self,
        parameters: NamedTensors,
        partitions: Partitions,
        max_norm: MaxNorm,
        options: Options,
        components: Grouping = None,
    ) -> None:
        # Under ZeRO-3 a parameter has no shape of its own.
        whole = zip(parameters.tensors, partitions.shapes, strict=True)
        tensors = tuple(nn.Parameter(torch.empty(s, dtype=p.dtype, device="meta"), p.requires_grad) for p, s in whole)
        resolved = resolve(replace(parameters, tensors=tensors), components)
        settings = options.in_words(max_norm)
        session = ClipSession(resolved, parameters.tensors, settings=settings, partitions=partitions)
        super().__init__(parameters.tensors, session, max_norm, options)
        assert session.reductions is not None  # since there are partitions
        self._reductions = session.reductions
        own = {i for i, fragment in enumerate(partitions.fragments) if fragment is not None}
        left_out = own - resolved.clipped
        self.covers_all = not left_out
        count = 1 + max((f.partition for f in partitions.fragments if f is not None), default=-1)
        local = session.reductions.local
        self._plans = [Plans(partitions.components_in(i, local, left_out), "the gradient in") for i in range(count)]
        self._factors: Tensor | None = None  # of the gradients that were measured last

    @torch.no_grad()
    def measure(self, scale: LossScale) -> ClipResult:
        """Norms, caps and coefficients of the unscaled gradients. Nothing is written, and nothing learnt.

        No host sync, unless non-finite norms are errors.

        Raises:
            RuntimeError: non-finite norms are errors, and there are some, on any rank.
            TypeError, ValueError: a gradient that can't be measured.
        """
        options, policy = self._options, self._caps()
        rule = options.rule if policy.adds_eps else options.rule.without_eps
        plans, home = self._session.plans, home_of(self._tensors)
        call = DistributedCall(self._reductions, plans, self._tensors, home, options.backend, writes=False)
        self._factors = None
        norms, coefs, caps = call.measure(policy, rule, options.raise_nonfinite, scale)
        factors = call.factors(coefs)
        self._factors = factors if self.covers_all else torch.cat((factors, call.factor_of_unclipped(coefs)))
        return ClipResult(self.names, norms, coefs, caps)

    @torch.no_grad()
    def scale_(self, partition: int, gradient: Tensor) -> None:
        """Multiplies a partition's gradient, [its length], in place by what ``measure`` has found.

        What belongs to no component is unscaled alone; padding stays as it is. No host sync, if the gradient is on
        the parameters' device.
        """
        if self._factors is None:
            raise RuntimeError("measure() has to come first")
        rule, backend = self._options.rule, self._options.backend
        plan, found = self._plans[partition].get([gradient], [gradient], rule.norm_type, backend)
        run.apply_(plan, found, self._factors, rule)
