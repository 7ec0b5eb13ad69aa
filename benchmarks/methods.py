"""What the benchmarks of pruned loss share: the methods, the sizes, and a domain that prunes and scores by them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from benchmarks import peers
from benchmarks.common import corpus
from benchmarks.cost import dense_forward, timed
from hf_context_prune.allocation import removed_params
from hf_context_prune.architectures import Target, blocks, read_geometry, spec_of, unit_costs
from hf_context_prune.calibration import batches_of, calibrate
from hf_context_prune.config import PrunerConfig
from hf_context_prune.data import TextSource, token_blocks
from hf_context_prune.evaluation import DocumentLoss, count_parameters, document_losses
from hf_context_prune.loading import LoadedModel
from hf_context_prune.overlap import drop_overlapping
from hf_context_prune.planning import make_plan, needed_statistics, plan_and_repair, plan_widths, repair_with
from hf_context_prune.stats import CalibrationStats
from hf_context_prune.surgery import apply_plan

OURS = {"criterion": "obs", "reconstruction": "sequential"}
REFERENCE = "flap+bias"
PREDICTED = "predicted_loss_increase"
"""Key of a plan's provenance with the loss increase that adaptive allocation expects, where it has one."""


@dataclass(frozen=True)
class Method:
    """One row of the tables: options of `PrunerConfig`, or a peer's code."""

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    peer: peers.Peer | None = None

    @property
    def adaptive(self) -> bool:
        return self.options.get("allocation") == "adaptive"


def _plain(criterion: str, reconstruction: str = "none") -> Method:
    return Method(f"`{criterion}` + `{reconstruction}`", {"criterion": criterion, "reconstruction": reconstruction})


METHODS: dict[str, Method] = {
    **{name: _plain(name) for name in ("random", "magnitude", "l1", "wanda")},
    REFERENCE: _plain("flap", "bias"),
    "taylor": _plain("taylor"),
    "obs": _plain("obs"),
    "obs+least_squares": _plain("obs", "least_squares"),
    "ours": Method("ours: `obs` + `sequential`", OURS),
    "ours-adaptive": Method("ours, adaptive widths", {**OURS, "allocation": "adaptive"}),
    # A slower effort of ours is one more entry, once PrunerConfig has a field for it: {**OURS, that field: its value}.
    "optipfair-maw": Method("optipfair MAW (with data)", peer=peers.optipfair_maw),
    "optipfair-ppm": Method("optipfair PPM", peer=peers.optipfair_ppm),
    "torch-pruning": Method("torch-pruning, LLM example", peer=peers.torch_pruning_example),
    "torch-pruning-units": Method("torch-pruning, our units", peer=peers.torch_pruning_units),
}


@dataclass(frozen=True)
class Size:
    """What is removed: a share of the MLP neurons of every layer, or with `attention` of all block parameters."""

    label: str
    share: float
    attention: bool = False
    goal: float | None = None


SIZES = {
    "mlp25": Size("25 % of the MLP neurons", 0.25, goal=0.28),
    "mlp50": Size("50 % of the MLP neurons", 0.50, goal=0.25),
    "all20": Size("20 % of all block parameters, one KV group of every layer among them", 0.20, attention=True),
    "all30": Size("30 % of all block parameters, one KV group of every layer among them", 0.30, attention=True),
}


def budgets(model: Any, size: Size) -> tuple[dict[str, Any], dict[str, Any], int]:
    """A size as options of uniform widths, as options of adaptive ones, and as parameters that uniform widths remove."""
    spec = spec_of(model.config)
    geometry = read_geometry(model.config, spec)
    total = count_parameters(model)
    uniform: dict[str, Any] = {"mlp_ratio": size.share}
    if size.attention:
        gone = round(size.share * sum(p.numel() for block in blocks(model, spec) for p in block.parameters()))
        uniform = {"target_params": total - gone, "attention_ratio": 1 / geometry.layers[0].kv_groups}
    widths = plan_widths(model, PrunerConfig(**uniform))
    removed = removed_params(geometry.layers, widths, unit_costs(model, spec, geometry))
    # Adaptive widths may also mix neurons and KV groups as they like.
    return uniform, {"target_params": total - removed} if size.attention else uniform, removed


class Domain:
    """Text, calibration blocks and shared statistics of one domain; nothing is read or computed before it is needed."""

    def __init__(
        self, load: Callable[[], LoadedModel], args: argparse.Namespace, name: str, *, targets: tuple[Target, ...]
    ) -> None:
        self.load, self.args, self.name, self.targets = load, args, name, targets
        self._stats: dict[frozenset[str], tuple[CalibrationStats, float]] = {}

    @property
    def model(self) -> Any:
        return self.load().model

    @cached_property
    def train(self) -> TextSource:
        return corpus(self.args, "train", self.name)

    @cached_property
    def held_out(self) -> tuple[TextSource, int]:
        """Validation text without what the train text has too, and the number of documents dropped, as `prune` does."""
        return drop_overlapping(corpus(self.args, "validation", self.name), self.train)

    @cached_property
    def samples(self) -> torch.Tensor:
        return token_blocks(
            self.train,
            self.load().tokenizer,
            num_samples=self.args.blocks,
            max_seq_length=self.args.length,
            seed=self.args.seed,
        )

    def stats(self, needs: frozenset[str]) -> tuple[CalibrationStats, float]:
        """Statistics with what a method needs and no more, computed once, and the seconds that took."""
        if needs not in self._stats:
            start = time.perf_counter()
            found = calibrate(self.model, batches_of(self.samples), targets=self.targets, statistics=needs)
            self._stats[needs] = found, time.perf_counter() - start
        return self._stats[needs]

    def losses(self, model: Any) -> list[DocumentLoss]:
        return document_losses(
            model,
            self.load().tokenizer,
            self.held_out[0],
            max_seq_length=self.args.length,
            max_tokens=self.args.eval_tokens,
        )

    def measure_dense(self) -> dict[str, Any]:
        losses = self.losses(self.model)
        dense_forward(self.model, self.samples[:4])
        return {
            "documents": [[loss.doc, loss.num_tokens, loss.num_bytes] for loss in losses],
            "nll": _short(losses),
            "parameters": count_parameters(self.model),
            "dropped": self.held_out[1],
            "calibration_tokens": self.samples.numel(),
            "forward_seconds": round(timed(dense_forward, self.model, self.samples), 4),
        }

    def measure(self, method: Method, size: Size, dense: dict[str, Any]) -> dict[str, Any]:
        """Prune by one method and score it on the documents of the dense row."""
        smaller, row = self._prune_with_peer(method, size) if method.peer else self._prune(method, size)
        losses = self.losses(smaller)
        if [[loss.doc, loss.num_tokens, loss.num_bytes] for loss in losses] != dense["documents"]:
            raise SystemExit(
                f"The dense row of {self.name} was measured on other documents than are there now; start over: --fresh."
            )
        return {**row, "parameters": count_parameters(smaller), "nll": _short(losses)}

    def _prune(self, method: Method, size: Size) -> tuple[Any, dict[str, Any]]:
        uniform, adaptive, _ = budgets(self.model, size)
        options = {**(adaptive if method.adaptive else uniform), **method.options, "pruning_seed": self.args.seed}
        config = PrunerConfig(**options)
        samples, calibration = self.samples, 0.0
        start = time.perf_counter()
        if config.reconstruction == "sequential" or method.adaptive:
            plan, repair = plan_and_repair(self.model, samples, config)
        else:
            stats, calibration = self.stats(needed_statistics(config))
            start = time.perf_counter()
            plan, repair = make_plan(self.model, stats, config), repair_with(stats, config)
        smaller = apply_plan(self.model, plan, repair=repair)
        row = {"seconds": round(calibration + time.perf_counter() - start, 4)}
        if plan.provenance.get(PREDICTED) is not None:
            row["predicted"] = plan.provenance[PREDICTED]
        return smaller, row

    def _prune_with_peer(self, method: Method, size: Size) -> tuple[Any, dict[str, Any]]:
        assert method.peer is not None
        remove, samples = budgets(self.model, size)[2], self.samples
        start = time.perf_counter()
        result = method.peer(self.model, samples, remove, size.attention)
        seconds = time.perf_counter() - start
        peers.check_peer(self.model, result, samples, remove)
        row = {"seconds": round(seconds, 4), "version": result.version, "call": result.call, "note": result.note}
        return result.model, row


def _short(losses: Sequence[DocumentLoss]) -> list[float]:
    """Losses by document to six digits: rows are kept in the repository."""
    return [float(f"{loss.nll:.6g}") for loss in losses]
