"""The experts that stay are refitted to what their layer computed with all of its experts.

Notation, for one layer and in the pruned stream: h_e(x) are the inputs of the output projection W_e of expert e, g_e(x)
is its gate, 0 for tokens that are not routed to it, and z_e = g_e h_e (with a bias: g_e [h_e, 1]). r is what the
residual stream lacks, beside what the layer gives now, to equal the base model's. The changes C_e of all W_e minimise

    sum over tokens |r - sum over e C_e z_e|^2 + sum over e n_e ridge_e tr(C_e D_e C_e^T)

over the n_e tokens that reach each expert, with D_e = diag E[z_e z_e^T]: least squares weighted by the gates, with a
ridge that pulls towards the old weights.

One system for all experts would have as many features as they have neurons together: 65,536 for 64 experts of 1,024, a
Gram matrix of 34 GB. So they take turns (block Gauss-Seidel): each solves its own system for what the changes of the
others leave of r. The Gram matrix of one expert exists at a time, so this works at every size. A token reaches only a
few of the experts, which ties their systems together loosely: `SWEEPS` rounds are enough.

An expert's ridge is chosen in the first round, on its tokens of the text that is never fitted. An expert for which no
ridge beats leaving it alone is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_context_prune.errors import NumericsError
from hf_context_prune.modeling.architectures import output_scale, residual_scale
from hf_context_prune.modeling.experts import experts_spec, gate_and_up, output_tensors
from hf_context_prune.modeling.layer_device import layer_device
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.utils.compat import apply_expert_gate
from hf_context_prune.utils.distributed import all_reduce_
from hf_context_prune.utils.linalg import all_finite
from hf_context_prune.utils.precision import bfloat16_autocast, overflow_remedy

from .hidden_states import Stream, StreamStorage
from .layer_pruner import DEFAULT_CORRECTION_RIDGE, GAP_RIDGES
from .regression import MomentRegression, Rows

SWEEPS = 2
"""Rounds in which every expert is solved once."""


@dataclass(frozen=True)
class _Routed:
    """What reaches the experts of a layer from one batch, unpadded tokens alone; possibly memory-mapped.

    Attributes:
        hidden: Inputs of the experts, [tokens, hidden].
        chosen: Experts of every token, [tokens, slots].
        gates: Their gates, [tokens, slots].
        lacking: r less what the changes so far give, [tokens, hidden], float32.
        validation: Whether the batch only chooses ridges.
    """

    hidden: torch.Tensor
    chosen: torch.Tensor
    gates: torch.Tensor
    lacking: torch.Tensor
    validation: bool


@dataclass(frozen=True)
class RepairedExperts:
    """The output projections of the experts that stay in one layer.

    Attributes:
        weight: As the layer's module stores them.
        bias: Their biases; None where the family has none.
        left: Share of the squared error that is left, on text that was never fitted; None where none was withheld.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    left: float | None

    def install(self, module: nn.Module) -> None:
        """Set the output projections of a layer's experts, in place."""
        weight, bias = output_tensors(module)
        weight.copy_(self.weight)
        if bias is not None and self.bias is not None:
            bias.copy_(self.bias)


class ExpertRepair:
    """The experts of one layer that lost some, on all streams.

    Args:
        view: The model without the removed experts.
        index: The layer's number.
        streams: The base stream behind the layer, the pruned stream before it.
        storage: Where the inputs of the experts lie; those of the layer before are overwritten.
    """

    def __init__(self, view: ModelView, index: int, streams: Sequence[Stream], storage: StreamStorage) -> None:
        self.view, self.index, self.where = view, index, f"layer {index} (experts)"
        self.module = view.layers[index].get_submodule(experts_spec(view.spec).prefix)
        self._transposed = experts_spec(view.spec).transposed
        weight, bias = output_tensors(self.module)
        self._inside, self._outputs = weight.shape[1:] if self._transposed else weight.shape[:0:-1]
        self._biased = bias is not None
        self._device = layer_device(view.model)
        self.parts = [self._route(stream, storage) for stream in streams]
        withheld = sum(len(part.hidden) for part in self.parts if part.validation)
        self._withheld = StreamStorage(withheld, device=self._device)

    @torch.no_grad()
    def solve(self) -> RepairedExperts:
        """Return the refitted output projections; the layer stays as it is."""
        weight, bias = output_tensors(self.module)
        counts = self._count()
        before = self._withheld_error()
        changes: dict[int, tuple[torch.Tensor, float]] = {}
        for sweep in range(SWEEPS):
            for expert, (fitted, withheld) in enumerate(counts.tolist()):
                if not fitted or (sweep and expert not in changes):
                    continue
                old, ridge = changes.get(expert, (None, None))
                if (found := self._solve_one(expert, bool(withheld), old, ridge)) is not None:
                    changes[expert] = found
                    self._apply(expert, found[0] if old is None else found[0] - old)
        after = self._withheld_error()
        new_weight, new_bias = weight.clone(), None if bias is None else bias.clone()
        for expert, (change, _) in changes.items():
            own = change[:, : self._inside].to(weight.device)
            new_weight[expert] = new_weight[expert].float() + (own.T if self._transposed else own)
            if new_bias is not None:
                new_bias[expert] = new_bias[expert].float() + change[:, self._inside].to(new_bias.device)
        left = after / before if before else 1.0
        return RepairedExperts(new_weight, new_bias, left if bool(counts[:, 1].any()) else None)

    def _route(self, stream: Stream, storage: StreamStorage) -> _Routed:
        """Run the layer on a stream, and keep what reaches its experts and what its output lacks."""
        layer, seen = self.view.layers[self.index], []
        handle = self.module.register_forward_pre_hook(lambda _, args: seen.append(args))
        try:
            after = stream.call(self.index, layer, stream.pruned, pruned=True)
        finally:
            handle.remove()
        scale = residual_scale(self.view.model.config, self.view.spec) * output_scale(layer)
        lacking = (stream.rows(stream.base) - stream.rows(after)) / scale
        if not all_finite(lacking):
            raise NumericsError(f"NaN or Inf in the target of {self.where}. {overflow_remedy(self.view.model.dtype)}")
        values = [one if stream.mask is None else one[stream.mask] for one in seen[0]]
        names = ("hidden", "chosen", "gates", "lacking")
        hidden, chosen, gates, lacking = (
            storage.keep(f"experts {name}", stream.start, value)
            for name, value in zip(names, (*values, lacking), strict=True)
        )
        return _Routed(hidden, chosen, gates, lacking, stream.validation)

    def _count(self) -> torch.Tensor:
        """Return the fitted and the withheld tokens that reach each expert, of all processes, [experts, 2]."""
        counts = torch.zeros(len(output_tensors(self.module)[0]), 2, dtype=torch.float64)
        for part in self.parts:
            own = torch.bincount(part.chosen.flatten(), minlength=len(counts))
            counts[:, int(part.validation)] += own
        all_reduce_([counts])
        return counts

    def _withheld_error(self) -> float:
        """Return the sum of |r|^2 over the withheld tokens of all processes."""
        found = torch.zeros(1, dtype=torch.float64)
        for part in self.parts:
            if part.validation:
                found += part.lacking.square().sum(dtype=torch.float64)
        all_reduce_([found])
        return float(found)

    def _rows(self, expert: int, *, fitted_only: bool) -> Iterator[tuple[_Routed, torch.Tensor, torch.Tensor]]:
        """Yield (batch, tokens that reach an expert, z), where some do."""
        for part in self.parts:
            token, slot = (part.chosen == expert).nonzero(as_tuple=True)
            if not len(token) or (fitted_only and part.validation):
                continue
            hidden = part.hidden[token].to(self._device)
            gates = part.gates[token, slot].to(self._device).float()[:, None]
            with bfloat16_autocast(hidden):
                both = gate_and_up(self.module, expert, hidden, transposed=self._transposed)
                inputs = apply_expert_gate(self.module, both)
            z = gates * inputs.float()
            yield part, token, torch.cat([z, gates], dim=1) if self._biased else z

    def _solve_one(
        self, expert: int, withheld: bool, old: torch.Tensor | None, ridge: float | None
    ) -> tuple[torch.Tensor, float] | None:
        """Return the change of an expert that is best while the others stay, and its ridge; None: leave it alone.

        Args:
            expert: Its number.
            withheld: Whether withheld tokens reach it.
            old: Its change so far, which `lacking` has in it; None: none.
            ridge: Its ridge; None: choose it.
        """
        features = self._inside + self._biased
        # From sums even where few tokens reach it: the rounded products of a few rows, of which one may outweigh all
        # others, are not positive definite with a small ridge.
        fit = MomentRegression(features, self._outputs, self._device, centre=False)
        rows: list[Rows] = []
        seen = 0
        for part, token, z in self._rows(expert, fitted_only=ridge is not None):
            lacking = part.lacking[token].to(self._device)
            if old is not None:
                lacking += z @ old.T.to(z)
            if part.validation:
                rows.append((self._withheld.keep("z", seen, z), self._withheld.keep("r", seen, lacking)))
                seen += len(token)
            else:
                fit.add(z, lacking)
        fit.finish()
        fit.statistics.check_finite(f"{self.where}, pruned stream")
        if ridge is None:
            ridge = DEFAULT_CORRECTION_RIDGE
            if withheld:
                errors = torch.tensor(fit.errors(GAP_RIDGES, rows), dtype=torch.float64)
                all_reduce_([errors])
                if not float(errors.min()) < 0:
                    return None
                ridge = GAP_RIDGES[int(errors.argmin())]
        # From zeros a regression returns the change alone.
        nothing = torch.zeros(1, 1, device=self._device).expand(self._outputs, features)
        return fit.solve(nothing, None, ridge, ridge).float(), ridge

    def _apply(self, expert: int, change: torch.Tensor) -> None:
        """Take what an expert gives more out of what is lacking."""
        for part, token, z in self._rows(expert, fitted_only=False):
            part.lacking.index_add_(0, token, (z @ change.T.to(z)).to(part.lacking), alpha=-1)
