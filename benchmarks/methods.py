"""Methods, sizes and domains: shared by all benchmarks that measure the loss of pruned models."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkouts, peers
from benchmarks.common import corpus
from benchmarks.grasprune import GRASPrune
from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.evaluation.losses import DocumentLoss
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.modeling.architectures import Target, layers_of, spec_of, unit_costs
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.pruning.allocation.budget import removed_params
from hf_context_prune.pruning.allocation.widths import plan_widths
from hf_context_prune.pruning.calibration.calibrate import calibrate
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.calibration.statistics import CalibrationStats
from hf_context_prune.pruning.planner import Planner, make_plan, plan_and_reconstruct, reconstruct_with
from hf_context_prune.pruning.scoring import Requirements
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.pruning.vocabulary.refit import refit_rows
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.utils.precision import reduced_precision_matmul
from hf_context_prune.utils.rounding import six_digits

OURS = {"criterion": "obs", "reconstruction": "sequential", "refit_lm_head": False}
"""The layers alone, as peers prune them: the default refits the rows of the LM head too."""
DEFAULT, LAYERS = "default", "layers"
"""What the command does, and the same without tokens."""
REFERENCE = "flap+bias"
OWN_RECIPE = "grasprune-own"
HIGH = "ours-high"
"""The adaptive model with its rows refitted, on the same calibration samples that all methods have."""
PREDICTED = "predicted_loss_increase"
"""Key of a plan's provenance with the loss increase that adaptive allocation predicts."""


@dataclass(frozen=True)
class Method:
    """One row of the tables: options of `PrunerConfig`, or the code of a peer."""

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    peer: peers.Peer | None = None
    whole: bool = False
    """Whether `prune` itself runs, as the command does: the layers, the rows of the LM head, and the tokens if asked."""
    num_samples: int | None = None
    """Calibration samples of a peer's own recipe; None: the samples of all methods."""

    @property
    def adaptive(self) -> bool:
        """Whether every layer has its own width."""
        return self.options.get("allocation") == "adaptive"


def _plain(criterion: str, reconstruction: str = "none") -> Method:
    return Method(f"`{criterion}` + `{reconstruction}`", {"criterion": criterion, "reconstruction": reconstruction})


METHODS: dict[str, Method] = {
    **{name: _plain(name) for name in ("random", "magnitude", "l1", "wanda")},
    REFERENCE: _plain("flap", "bias"),
    "taylor": _plain("taylor"),
    "obs": _plain("obs"),
    "obs+least_squares": Method(
        "`obs` + `least_squares` (SlimGPT, GRAIL)", {"criterion": "obs", "reconstruction": "least_squares"}
    ),
    "ours": Method("ours: `obs` + `sequential`", OURS),
    "ours-adaptive": Method("ours, adaptive widths", {**OURS, "allocation": "adaptive"}),
    HIGH: Method(
        "ours, adaptive widths, `refit_lm_head=True`", {**OURS, "allocation": "adaptive", "refit_lm_head": True}
    ),
    LAYERS: Method("the default, neurons and KV groups alone", whole=True),
    DEFAULT: Method("the default", whole=True),
    "optipfair-maw": Method("optipfair MAW (with data)", peer=peers.optipfair_maw),
    "optipfair-ppm": Method("optipfair PPM", peer=peers.optipfair_ppm),
    "torch-pruning": Method("torch-pruning, LLM example", peer=peers.torch_pruning_example),
    "torch-pruning-units": Method("torch-pruning, same units", peer=peers.torch_pruning_units),
}


def add_checkouts(folder: Path, kept: Path) -> None:
    """Add the peers of a folder of checkouts to the methods.

    Args:
        folder: It has ``GRASPrune/`` and ``2SSP/``.
        kept: Folder where the choices of GRASPrune's gates are kept.
    """
    gates, two_stage = GRASPrune(folder / "GRASPrune", kept), folder / "2SSP"
    found = {
        "grasprune": ("GRASPrune", gates.prune),
        "grasprune-repaired": ("GRASPrune's units, our repair", gates.repaired),
        "grasprune-widths": ("GRASPrune's widths, our units and repair", gates.widths),
        "ours-scaled": ("our units, GRASPrune's scales", gates.scaled),
        "2ssp": ("2SSP", partial(checkouts.two_stage, two_stage)),
        "slicegpt": ("SliceGPT", partial(checkouts.slicegpt, two_stage)),
    }
    METHODS.update({name: Method(label, peer=peer) for name, (label, peer) in found.items()})
    METHODS[OWN_RECIPE] = Method("GRASPrune, as many tokens as its own recipe", peer=gates.prune, num_samples=512)


@dataclass(frozen=True)
class Size:
    """A size: a share of the MLP neurons of every layer to remove, or with `attention` of all layer parameters.

    Attributes:
        label: Name in the tables.
        share: Share to remove.
        attention: Whether KV groups are removed too.
        goal: Largest mean share of the reference's excess loss that meets the goal.
        high: Whether `refit_lm_head=True` is measured too, which takes twenty minutes more per domain.
    """

    label: str
    share: float
    attention: bool = False
    goal: float | None = None
    high: bool = True


SIZES = {
    "mlp25": Size("25 % of the MLP neurons", 0.25, goal=0.28, high=False),
    "mlp50": Size("50 % of the MLP neurons", 0.50, goal=0.25),
    "all20": Size("20 % of all layer parameters, including one KV group of every layer", 0.20, attention=True),
    "all30": Size("30 % of all layer parameters, including one KV group of every layer", 0.30, attention=True),
}


def budgets(model: Any, size: Size) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return a size as options for uniform widths, as options for adaptive widths, and as a number of parameters to remove."""
    spec = spec_of(model.config)
    geometry = read_geometry(model.config, spec)
    total = model.num_parameters()
    uniform: dict[str, Any] = {"mlp_ratio": size.share}
    if size.attention:
        gone = round(size.share * sum(p.numel() for layer in layers_of(model, spec) for p in layer.parameters()))
        uniform = {"target_params": total - gone, "attention_ratio": 1 / geometry.layers[0].kv_groups}
    widths = plan_widths(model, PrunerConfig(**uniform))
    removed = removed_params(geometry.layers, widths, unit_costs(model, spec, geometry))
    # Adaptive widths choose how many neurons and how many KV groups to remove.
    shared = {"target_params": total - removed, "units": "neurons,kv_groups", "native_architecture": False}
    return uniform, shared if size.attention else uniform, removed


class Domain:
    """Text, calibration samples and shared statistics of one domain, each read or computed at first use."""

    def __init__(
        self, load: Callable[[], LoadedModel], args: argparse.Namespace, name: str, *, targets: tuple[Target, ...]
    ) -> None:
        self.load, self.args, self.name, self.targets = load, args, name, targets
        self._made: dict[Any, tuple[Any, float]] = {}
        self._last: tuple[PrunerConfig, Any, dict[str, Any]] | None = None

    @property
    def model(self) -> Any:
        """The base model."""
        return self.load().model

    @cached_property
    def train(self) -> TextSource:
        """The text to calibrate on."""
        return corpus(self.args, "train", self.name)

    @cached_property
    def test_text(self) -> tuple[TextSource, int]:
        """Validation split without documents that overlap with the train text, and how many were dropped, as in `prune`."""
        return drop_overlapping(corpus(self.args, "validation", self.name), self.train)

    @cached_property
    def samples(self) -> torch.Tensor:
        """Calibration samples of all methods, [samples, length] int64."""
        return self.tokenize(self.args.num_samples)

    def tokenize(self, num_samples: int) -> torch.Tensor:
        """Return so many calibration samples, [samples, length] int64."""
        return tokenize_samples(
            self.train,
            self.load().tokenizer,
            num_samples=num_samples,
            max_seq_length=self.args.length,
            seed=self.args.seed,
        )

    def _once(self, key: object, make: Callable[[], Any]) -> tuple[Any, float]:
        """Return what is made once for several methods, and the seconds that it took."""
        if key not in self._made:
            begin = time.perf_counter()
            self._made[key] = make(), time.perf_counter() - begin
        return self._made[key]

    def stats(self, needs: frozenset[str]) -> tuple[CalibrationStats, float]:
        """Return only the statistics that a method needs, computed once, and the seconds that they took."""
        return self._once(
            needs,
            lambda: calibrate(self.model, batches_of(self.samples), targets=self.targets, statistics=needs),
        )

    def adaptive(self, config: PrunerConfig) -> tuple[Planner, float]:
        """Return the planner with the loss of every width of every layer, measured once for all sizes, and the seconds."""
        targets = Requirements.of(config).targets
        return self._once(targets, lambda: Planner(self.model, self.samples, config))

    def losses(
        self,
        model: Any,
        tokenizer: Any = None,
        docs: Sequence[str] | None = None,
        *,
        source: TextSource | None = None,
    ) -> list[DocumentLoss]:
        """Measure losses on the named documents, or on as many as ``--eval-tokens`` allows, of the test text or `source`."""
        with reduced_precision_matmul():
            return document_losses(
                model,
                tokenizer or self.load().tokenizer,
                self.test_text[0] if source is None else source,
                max_seq_length=self.args.length,
                max_tokens=None if docs else self.args.eval_tokens,
                docs=docs,
            )

    def time_forward(self) -> float:
        """Return the seconds of a forward pass of the base model, as it is loaded, over the calibration samples."""
        begin = time.perf_counter()
        with torch.inference_mode():
            for batch in batches_of(self.samples):
                self.model(**batch, use_cache=False)
        return time.perf_counter() - begin

    @cached_property
    def forward_seconds(self) -> float:
        """Seconds of that pass, timed once."""
        return self.time_forward()

    def measure_dense(self) -> dict[str, Any]:
        """Return the row of the base model, which also holds sizes of documents."""
        losses = self.losses(self.model)
        return {
            "documents": documents_of(losses),
            "nll": rounded(losses),
            "parameters": self.model.num_parameters(),
            "dropped": self.test_text[1],
            "calibration_tokens": self.samples.numel(),
        }

    def measure_refit(self, dense: dict[str, Any]) -> dict[str, Any]:
        """Score the base model with its rows refitted: the part of the gain that adapts to the domain."""
        model = copy.deepcopy(self.model)
        refit = refit_rows(model, self.samples)
        losses = self.losses(model, docs=[doc for doc, _, _ in dense["documents"]])
        return {"nll": rounded(losses), "refit": refit}

    def measure(self, method: Method, size: Size, dense: dict[str, Any]) -> dict[str, Any]:
        """Prune by one method and score the pruned model on the documents of the base model's row.

        ``forwards`` of the row is the time as a multiple of a forward pass of the base model over the calibration
        samples, with the time of what several methods share.
        """
        smaller, row = self._prune_with_peer(method, size) if method.peer else self.prune(method, size)
        row["forwards"] = round(row.pop("seconds") / self.forward_seconds, 1)
        losses = self.losses(smaller)
        if documents_of(losses) != dense["documents"]:
            raise SystemExit(
                f"The row of the base model on {self.name} was measured on other documents than --data has now. Start over "
                f"with --fresh."
            )
        return {**row, "parameters": smaller.num_parameters(), "nll": rounded(losses)}

    def config(self, method: Method, size: Size) -> PrunerConfig:
        """Return the config of a method of this package at one size."""
        uniform, adaptive, _ = budgets(self.model, size)
        options = {**(adaptive if method.adaptive else uniform), **method.options, "pruning_seed": self.args.seed}
        return PrunerConfig(**options)

    def prune(self, method: Method, size: Size) -> tuple[Any, dict[str, Any]]:
        """Prune by a method of this package; return the smaller model, and a row with seconds and a predicted loss increase."""
        config = self.config(method, size)
        begin, earlier = time.perf_counter(), 0.0
        if config.refit_lm_head:
            model, row = self.prune(METHODS["ours-adaptive"], size)
            begin, model = time.perf_counter(), copy.deepcopy(model)
            refit = refit_rows(model, self.samples)
            return model, {**row, "refit": refit, "seconds": row["seconds"] + time.perf_counter() - begin}
        if self._last is not None and self._last[0] == config:
            return self._last[1], dict(self._last[2])
        if method.adaptive:
            planner, earlier = self.adaptive(config)
            begin = time.perf_counter()
            plan, reconstruct, _ = planner.plan(config)
        elif config.reconstruction == "sequential":
            plan, reconstruct = plan_and_reconstruct(self.model, self.samples, config)
        else:
            stats, earlier = self.stats(Requirements.of(config).statistics)
            begin = time.perf_counter()
            plan, reconstruct = make_plan(self.model, stats, config), reconstruct_with(stats, config)
        smaller = apply_plan(self.model, plan, reconstruct=reconstruct)
        row = {"seconds": earlier + time.perf_counter() - begin}
        if (predicted := plan.provenance.get(PREDICTED)) is not None:
            row["predicted"] = predicted
        self._last = config, smaller, row
        return smaller, dict(row)

    def _prune_with_peer(self, method: Method, size: Size) -> tuple[Any, dict[str, Any]]:
        assert method.peer is not None
        remove = budgets(self.model, size)[2]
        samples = self.samples if method.num_samples is None else self.tokenize(method.num_samples)
        begin = time.perf_counter()
        result = method.peer(self.model, samples, remove, size.attention)
        seconds = time.perf_counter() - begin + result.earlier_seconds
        peers.check_peer(self.model, result, samples, remove)
        return result.model, {
            "version": result.version,
            "call": result.call,
            "note": result.note,
            "seconds": seconds,
        }


def count_gone(plan: PruningPlan) -> dict[str, int]:
    """Return how many units of each kind a plan removes."""
    pairs = list(zip(plan.dense, plan.widths, strict=True))
    return {
        "neurons": sum(before.neurons - after.neurons for before, after in pairs),
        "kv_groups": sum(before.kv_groups - after.kv_groups for before, after in pairs),
        "tokens": plan.vocabulary.dense - len(plan.vocabulary.kept) if plan.vocabulary else 0,
    }


def documents_of(losses: Sequence[DocumentLoss]) -> list[list[Any]]:
    """Return [name, tokens, bytes] of every scored document."""
    return [[loss.doc, loss.num_tokens, loss.num_bytes] for loss in losses]


def rounded(losses: Sequence[DocumentLoss]) -> list[float]:
    """Return losses by document, rounded to six digits because the repository holds the rows."""
    return [six_digits(loss.nll) for loss in losses]
