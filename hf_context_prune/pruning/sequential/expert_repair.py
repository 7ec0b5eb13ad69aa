"""The experts that stay are refitted to what their layer computed with all of its experts and all of their neurons.

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
ridge beats leaving it alone is left alone. A shared expert takes its turn first, as every token reaches it.

Where experts also lose neurons, those that stay are chosen before the first round, in every expert by the structured
optimal brain surgeon of `criteria`. Then C_e takes the columns of the others away, and what is left is refitted by the
equation of `regression`: what the kept neurons predict of W_e z_e, and of r.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_context_prune.config import DEFAULT_RIDGE
from hf_context_prune.errors import NumericsError
from hf_context_prune.modeling.architectures import output_scale, residual_scale
from hf_context_prune.modeling.expert_neurons import SHARED_OUTPUT, shared_expert
from hf_context_prune.modeling.experts import experts_spec, gate_and_up, output_tensors
from hf_context_prune.modeling.layer_device import layer_device
from hf_context_prune.modeling.spec_parts import Experts
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.calibration.statistics import TargetWeights
from hf_context_prune.pruning.criteria import obs
from hf_context_prune.pruning.scoring import top_units
from hf_context_prune.utils.compat import apply_expert_gate
from hf_context_prune.utils.distributed import all_reduce_
from hf_context_prune.utils.linalg import all_finite
from hf_context_prune.utils.precision import bfloat16_autocast, overflow_remedy

from .hidden_states import Stream, StreamStorage, record_input
from .layer_pruner import DEFAULT_CORRECTION_RIDGE, GAP_RIDGES
from .regression import MomentRegression, Rows

SWEEPS = 2
"""Rounds in which every expert is solved once."""
_SHARED = -1  # the number of the shared expert


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
class ExpertWidths:
    """What stays in every expert, and how it is refitted.

    Attributes:
        neurons: Neurons of an expert; None: all.
        shared: Neurons of a shared expert; None: all.
        ridge: Share of each neuron's mean square, for what the kept neurons predict of the others.
        refits: Whether what stays is refitted; else the columns of the other neurons become zero, and that is all.
    """

    neurons: int | None = None
    shared: int | None = None
    ridge: float = DEFAULT_RIDGE
    refits: bool = True


@dataclass(frozen=True)
class RepairedExperts:
    """The output projections of the experts that stay in one layer; columns of neurons that go are zero.

    Attributes:
        weight: As the layer's module stores them.
        bias: Their biases; None where the family has none.
        shared: Weight of the shared expert's output projection; None where there is none.
        neurons: The neurons that stay in each expert, ascending, [experts, neurons]; None where all do.
        shared_neurons: The same of the shared expert, [neurons].
        left: Share of the squared error that is left, on text that was never fitted; None where none was withheld.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    shared: torch.Tensor | None
    neurons: torch.Tensor | None
    shared_neurons: torch.Tensor | None
    left: float | None

    def install(self, layer: nn.Module, experts: Experts) -> None:
        """Set the output projections of a layer's experts, in place."""
        weight, bias = output_tensors(layer.get_submodule(experts.prefix))
        weight.copy_(self.weight)
        if bias is not None and self.bias is not None:
            bias.copy_(self.bias)
        if self.shared is not None and (module := shared_expert(layer, experts)) is not None:
            module.get_submodule(SHARED_OUTPUT).weight.copy_(self.shared)


@dataclass(frozen=True)
class _Member:
    """An expert, or the shared one, that takes its turn.

    Attributes:
        weight: Its output projection, [outputs, neurons].
        biased: Whether it has a bias, whose input is the gate.
        keeps: Neurons that stay; None: all.
        counts: Tokens that reach it, of the fitted and of the withheld text.
    """

    weight: torch.Tensor
    biased: bool
    keeps: int | None
    counts: tuple[int, int]


@dataclass
class _Change:
    """What is changed in one expert so far.

    Attributes:
        matrix: C, [outputs, neurons], with a column more for a bias.
        kept: The neurons that stay; None: all.
        ridge: The ridge of its correction; None: not chosen yet.
    """

    matrix: torch.Tensor
    kept: tuple[int, ...] | None = None
    ridge: float | None = None


class ExpertRepair:
    """The experts of one layer that lost some, on all streams.

    Args:
        view: The model without the removed experts.
        index: The layer's number.
        streams: The base stream behind the layer, the pruned stream before it.
        storage: Where the inputs of the experts lie; those of the layer before are overwritten.
        widths: What stays in every expert, and how it is refitted.
    """

    def __init__(
        self,
        view: ModelView,
        index: int,
        streams: Sequence[Stream],
        storage: StreamStorage,
        widths: ExpertWidths = ExpertWidths(),
    ) -> None:
        self.view, self.index, self.where, self.widths = view, index, f"layer {index} (experts)", widths
        self.experts, layer = experts_spec(view.spec), view.layers[index]
        self.module, self.shared = layer.get_submodule(self.experts.prefix), shared_expert(layer, self.experts)
        gate = self.experts.shared_gate
        self._gate = None if gate is None else layer.get_submodule(f"{self.experts.block}.{gate}")
        self._device = layer_device(view.model)
        self.parts = [self._route(stream, storage) for stream in streams]
        withheld = sum(len(part.hidden) for part in self.parts if part.validation)
        self._withheld = StreamStorage(withheld, device=self._device)

    @torch.no_grad()
    def solve(self) -> RepairedExperts:
        """Return the output projections of what stays; the layer stays as it is."""
        members, changes = self._members(), dict[int, _Change]()
        for number, member in members.items():
            if member.keeps is not None:
                changes[number] = self._narrow(number, member)
                self._apply(number, changes[number].matrix)
        before = self._withheld_error()
        for sweep in range(SWEEPS if self.widths.refits else 0):
            for number, member in members.items():
                old = changes.get(number)
                if not member.counts[0] or (sweep and (old is None or old.ridge is None)):
                    continue
                if (found := self._solve_one(number, member, old)) is not None:
                    changes[number] = found
                    self._apply(number, found.matrix if old is None else found.matrix - old.matrix)
        left = self._withheld_error() / before if before else 1.0
        withheld = any(member.counts[1] for number, member in members.items() if number != _SHARED)
        return self._result(changes, left if withheld else None)

    def _members(self) -> dict[int, _Member]:
        """Return all that take turns, by number: a shared expert first."""
        weight, bias = output_tensors(self.module)
        weight = weight.mT if self.experts.transposed else weight
        counts, found = self._count(), dict[int, _Member]()
        if self.shared is not None:
            shared = self.shared.get_submodule(SHARED_OUTPUT).weight.detach()
            tokens = torch.zeros(2, dtype=torch.float64)
            for part in self.parts:
                tokens[int(part.validation)] += len(part.hidden)
            all_reduce_([tokens])
            found[_SHARED] = _Member(shared, False, self.widths.shared, (int(tokens[0]), int(tokens[1])))
        for expert, (fitted, withheld) in enumerate(counts.tolist()):
            found[expert] = _Member(weight[expert], bias is not None, self.widths.neurons, (int(fitted), int(withheld)))
        return found

    def _result(self, changes: dict[int, _Change], left: float | None) -> RepairedExperts:
        weight, bias = (None if one is None else one.clone() for one in output_tensors(self.module))
        assert weight is not None
        shared = None if self.shared is None else self.shared.get_submodule(SHARED_OUTPUT).weight.detach().clone()
        for number, change in changes.items():
            own = weight[number].mT if self.experts.transposed else weight[number]
            if number == _SHARED:
                assert shared is not None
                own = shared
            neurons = own.shape[1]
            own.copy_(own.float() + change.matrix[:, :neurons].to(own.device))
            if change.kept is not None:
                own[:, _others(neurons, change.kept)] = 0  # exactly, whatever rounding left
            if bias is not None and number != _SHARED:
                bias[number] = bias[number].float() + change.matrix[:, neurons].to(bias.device)
        kept = {number: torch.tensor(one.kept) for number, one in changes.items() if one.kept is not None}
        inside = [kept[number] for number in sorted(kept) if number != _SHARED]
        return RepairedExperts(weight, bias, shared, torch.stack(inside) if inside else None, kept.get(_SHARED), left)

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

    def _rows(self, number: int, *, fitted_only: bool) -> Iterator[tuple[_Routed, torch.Tensor, torch.Tensor]]:
        """Yield (batch, tokens that reach an expert, z), where some do."""
        for part in self.parts:
            if fitted_only and part.validation:
                continue
            if number == _SHARED:
                hidden, tokens = part.hidden.to(self._device), torch.arange(len(part.hidden))
                if len(tokens):
                    yield part, tokens, self._shared_inputs(hidden)
                continue
            tokens, slot = (part.chosen == number).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            hidden = part.hidden[tokens].to(self._device)
            gates = part.gates[tokens, slot].to(self._device).float()[:, None]
            with bfloat16_autocast(hidden):
                both = gate_and_up(self.module, number, hidden, transposed=self.experts.transposed)
                inputs = apply_expert_gate(self.module, both)
            z = gates * inputs.float()
            yield part, tokens, z if output_tensors(self.module)[1] is None else torch.cat([z, gates], dim=1)

    def _shared_inputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return z of the shared expert."""
        assert self.shared is not None
        with bfloat16_autocast(hidden), record_input(self.shared.get_submodule(SHARED_OUTPUT)) as seen:
            self.shared(hidden)
            gates = 1.0 if self._gate is None else self._gate(hidden).float().sigmoid()
        return gates * seen[0].float()

    def _narrow(self, number: int, member: _Member) -> _Change:
        """Choose the neurons of an expert that stay, and take the others away."""
        outputs, neurons = member.weight.shape
        assert member.keeps is not None
        seen = MomentRegression(neurons, 1, self._device, centre=False)  # for its Gram matrix alone
        for _, tokens, z in self._rows(number, fitted_only=True):
            seen.add(z[:, :neurons], z.new_zeros(len(tokens), 1))
        seen.finish()
        seen.statistics.check_finite(f"{self.where}, pruned stream")
        weight = member.weight.float()
        scores = weight.double().norm(dim=0).cpu()  # all that is known of an expert that no token reaches
        if bool(seen.statistics.sum_squares.any()):
            weights = TargetWeights(weight, 1, torch.zeros(neurons, dtype=torch.float64), least_kept=member.keeps)
            scores = obs(weights.cpu(), seen.statistics.cpu(), torch.Generator())
        kept = top_units(scores, member.keeps, self.where)
        matrix = torch.zeros(outputs, neurons + member.biased, device=self._device)
        gone = _others(neurons, kept).nonzero().flatten()
        matrix[:, gone] = -weight[:, gone].to(matrix)
        return _Change(matrix, kept)

    def _solve_one(self, number: int, member: _Member, old: _Change | None) -> _Change | None:
        """Return the change of an expert that is best while the others stay; None: leave it alone.

        Args:
            number: Its number.
            member: The expert.
            old: Its change so far, which `lacking` has in it; None: none.
        """
        outputs, neurons = member.weight.shape
        features, ridge = neurons + member.biased, None if old is None else old.ridge
        # From sums even where few tokens reach it: the rounded products of a few rows, of which one may outweigh all
        # others, are not positive definite with a small ridge.
        fit = MomentRegression(features, outputs, self._device, centre=False)
        rows: list[Rows] = []
        seen, kind = 0, "shared" if number == _SHARED else "expert"
        for part, tokens, z in self._rows(number, fitted_only=ridge is not None):
            lacking = part.lacking[tokens].to(self._device)
            if old is not None:
                lacking += z @ old.matrix.T.to(z)
            if part.validation:
                pair = (self._withheld.keep(f"{kind} z", seen, z), self._withheld.keep("r", seen, lacking))
                rows.append(pair)
                seen += len(tokens)
            else:
                fit.add(z, lacking)
        fit.finish()
        fit.statistics.check_finite(f"{self.where}, pruned stream")
        kept = None if old is None else old.kept
        if ridge is None:
            ridge = DEFAULT_CORRECTION_RIDGE
            if member.counts[1]:
                errors = torch.tensor(fit.errors(GAP_RIDGES, rows), dtype=torch.float64)
                all_reduce_([errors])
                if not float(errors.min()) < 0 and kept is None:
                    return None
                ridge = GAP_RIDGES[int(errors.argmin())]
        # From zeros a regression returns the change alone.
        if kept is None:
            nothing = torch.zeros(1, 1, device=self._device).expand(outputs, features)
            return _Change(fit.solve(nothing, None, ridge, ridge).float(), None, ridge)
        whole = torch.zeros(outputs, features, device=self._device)
        whole[:, :neurons] = member.weight
        places = [*kept, *range(neurons, features)]
        matrix = -whole
        matrix[:, places] += fit.solve(whole, places, self.widths.ridge, ridge).to(matrix)
        return _Change(matrix, kept, ridge)

    def _apply(self, number: int, change: torch.Tensor) -> None:
        """Take what an expert gives more out of what is lacking."""
        for part, tokens, z in self._rows(number, fitted_only=False):
            part.lacking.index_add_(0, tokens, (z @ change.T.to(z)).to(part.lacking), alpha=-1)


def _others(neurons: int, kept: Sequence[int]) -> torch.Tensor:
    """Return which neurons go, [neurons] bool."""
    gone = torch.ones(neurons, dtype=torch.bool)
    gone[list(kept)] = False
    return gone
