"""Find the sources of the loss that remains after pruning: layers, choice of units, and reconstruction.

python -m benchmarks.residual --data PATH/TO/data
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

from benchmarks.by_source import read_sources, sources_of
from benchmarks.common import Rows, cell, given, parser, table, write_section
from benchmarks.methods import METHODS, OURS, SIZES, Domain, Method, documents_of, rounded
from benchmarks.models import smollm2
from benchmarks.one_shot import excess
from hf_context_prune.config import PrunerConfig
from hf_context_prune.modeling.architectures import check_supported, layers_of
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.pruning.planner import reconstruct_with
from hf_context_prune.pruning.scoring import Requirements
from hf_context_prune.pruning.surgery import apply_plan

PRUNED = "ours-adaptive"
CHOICES = {name: Method(f"`{name}`", {**OURS, "criterion": name}) for name in ("random", "l1", "wanda", "obs")}
"""Criteria that choose the same number of units in every layer, each with `sequential` reconstruction."""
RECONSTRUCTIONS = ("none", "least_squares")
"""Other reconstructions for the units that the sequential run with adaptive widths kept."""


class ResidualDomain(Domain):
    """A domain with the model of adaptive widths, and mixtures of this model and the base model."""

    @property
    def size(self) -> Any:
        """The size to remove."""
        return SIZES[self.args.size]

    @cached_property
    def sequential(self) -> tuple[PruningPlan, Any]:
        """Plan and smaller model with adaptive widths."""
        config = self.config(METHODS[PRUNED], self.size)
        plan, reconstruct, _ = self.adaptive(config)[0].plan(config)
        return plan, apply_plan(self.model, plan, reconstruct=reconstruct)

    def scored(self, model: Any, dense: Mapping[str, Any]) -> dict[str, Any]:
        """Score a model on the documents of the base model's row."""
        return {"nll": rounded(self.losses(model, docs=[doc for doc, _, _ in dense["documents"]]))}

    def mixed(self, begin: int, end: int, *, alone: bool) -> Any:
        """Return the base model with pruned layers only in [begin, end), or without `alone` only outside of this range."""
        model, spec = copy.deepcopy(self.sequential[1]), check_supported(self.model)
        layers = model.get_submodule(spec.layers)
        for index, dense in enumerate(layers_of(self.model, spec)):
            if (begin <= index < end) is not alone:
                layers[index] = dense
        return model

    def reconstruct_otherwise(self, reconstruction: str) -> Any:
        """Return the model with the units that the sequential run kept, and another reconstruction."""
        config = PrunerConfig(mlp_ratio=self.size.share, reconstruction=reconstruction)  # type: ignore[arg-type]
        plan = self.sequential[0]
        if reconstruction == "none":
            return apply_plan(self.model, plan)
        stats, _ = self.stats(Requirements.of(config).statistics)
        return apply_plan(self.model, plan, reconstruct=reconstruct_with(stats, config))


def results_text(rows: Mapping[tuple[str, str], dict[str, Any]], args: argparse.Namespace, machine: str) -> str:
    """Return the section of RESULTS.md."""
    dense = rows["dense", ""]

    def loss(*place: str) -> str:
        return cell(excess(dense, rows[place], dense, args.seed))

    whole = excess(dense, rows["repair", "sequential"], dense, args.seed)
    groups = [place for kind, place in rows if kind == "alone"]
    alone = sum(excess(dense, rows["alone", place], dense, args.seed).value for place in groups)
    lines = [
        [
            place,
            loss("alone", place),
            cell(excess(rows["but", place], rows["repair", "sequential"], dense, args.seed)),
        ]
        for place in groups
    ]
    reconstructions = [[f"`{name}`", loss("repair", name)] for name in (*RECONSTRUCTIONS, "sequential")]
    choices = [[method.label, loss("choice", name)] for name, method in CHOICES.items()]
    commits = sorted({row["setting"]["commit"] for row in rows.values()})
    return f"""## Sources of the residual loss

SmolLM2-135M-Instruct, {SIZES[args.size].label} removed, calibrated on {args.num_samples} x {args.length} tokens of `{args.domain}` train; excess loss
over the base model in nats per token on {sum(tokens for _, tokens, _ in dense["documents"]):,} tokens of its validation split, 95 % bootstrap interval over
documents, paired.

**Layers** of the model with adaptive widths ({cell(whole)} in all). *Pruned alone*: excess with only these
layers pruned (sum: {alone:.3f}). *Gained if restored*: decrease of the excess with only these layers as in the base model.

{table(["layers", "pruned alone", "gained if restored"], lines)}

**Reconstruction** of the units that the sequential run kept:

{table(["reconstruction", "excess"], reconstructions)}

**Choice** of the same number of units in every layer, with `sequential` reconstruction:

{table(["criterion", "excess"], choices)}

`python -m benchmarks.residual --data DATA{args.given}` at {", ".join(f"`{c}`" for c in commits)}, {machine}, seed {args.seed}.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument(
        "--size",
        choices=[name for name, size in SIZES.items() if not size.attention],
        default="mlp50",
        help="neurons to remove",
    )
    options.add_argument("--groups", type=int, default=6, help="groups of layers")
    options.add_argument("--num-samples", type=int, default=128, help="calibration samples")
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument("--eval-tokens", type=int, default=12_000, help="at most this many test tokens per domain")
    args = options.parse_args(arguments)
    args.given = given(options, args)
    store = Rows(args, "residual", seed=args.seed)
    domain = ResidualDomain(cache(smollm2), args, args.domain, targets=("mlp",))
    names = ("domain", "size", "groups", "length", "eval_tokens", "seed")
    common = {"blocks": args.num_samples, **{name: getattr(args, name) for name in names}}
    rows: dict[tuple[str, str], dict[str, Any]] = {}

    def get(kind: str, place: str, measure: Any) -> None:
        rows[kind, place] = store.get_or_measure({**common, "kind": kind, "place": place}, measure)

    get("dense", "", domain.measure_dense)
    dense = rows["dense", ""]
    dense = {**dense, "sources": sources_of(dense, read_sources(args, [args.domain])[args.domain])}
    rows["dense", ""] = dense
    if documents_of(domain.losses(domain.model, docs=[dense["documents"][0][0]])) != dense["documents"][:1]:
        raise SystemExit(
            "The row of the base model was measured on other documents than --data has now. Start over with --fresh."
        )
    get("repair", "sequential", lambda: domain.scored(domain.sequential[1], dense))
    count = len(layers_of(domain.model, check_supported(domain.model)))
    bounds = [round(count * index / args.groups) for index in range(args.groups + 1)]
    for begin, end in pairwise(bounds):
        for kind, alone in (("alone", True), ("but", False)):
            get(
                kind,
                f"{begin} to {end - 1}",
                lambda b=begin, e=end, a=alone: domain.scored(domain.mixed(b, e, alone=a), dense),
            )
    for reconstruction in RECONSTRUCTIONS:
        get("repair", reconstruction, lambda r=reconstruction: domain.scored(domain.reconstruct_otherwise(r), dense))
    for name, method in CHOICES.items():
        get("choice", name, lambda m=method: domain.scored(domain.prune(m, domain.size)[0], dense))
    write_section("residual", results_text(rows, args, store.setting["machine"]))


if __name__ == "__main__":
    main()
