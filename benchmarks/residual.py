"""What the loss that is left after pruning is made of: which blocks, and choice of units or their repair.

python -m benchmarks.residual --data PATH/TO/data
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

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

WALKED = "ours-adaptive"
CHOICES = {name: Method(f"`{name}`", {**OURS, "criterion": name}) for name in ("random", "l1", "wanda", "obs")}
"""Ways to choose the same number of units in every layer, each with the repair of the walk."""
REPAIRS = ("none", "least_squares")
"""Other repairs of the very units that the walk of adaptive widths kept."""


class ResidualDomain(Domain):
    """A domain with the model of adaptive widths, and mixtures of it and the dense one."""

    @property
    def size(self) -> Any:
        return SIZES[self.args.size]

    @cached_property
    def walked(self) -> tuple[PruningPlan, Any]:
        """Plan and smaller model of adaptive widths."""
        config = self.config(METHODS[WALKED], self.size)
        plan, reconstruct = self.adaptive(config).sequential(config)
        return plan, apply_plan(self.model, plan, reconstruct=reconstruct)

    def scored(self, model: Any, dense: Mapping[str, Any]) -> dict[str, Any]:
        return {"nll": rounded(self.losses(model, docs=[doc for doc, _, _ in dense["documents"]]))}

    def mixed(self, begin: int, end: int, *, alone: bool) -> Any:
        """The pruned model with dense blocks but (or, not `alone`, only) from `begin` to before `end`."""
        model, spec = copy.deepcopy(self.walked[1]), check_supported(self.model)
        layers = model.get_submodule(spec.layers)
        for index, dense in enumerate(layers_of(self.model, spec)):
            if (begin <= index < end) is not alone:
                layers[index] = dense
        return model

    def repaired_otherwise(self, reconstruction: str) -> Any:
        """The units that the walk kept, with another repair."""
        config = PrunerConfig(mlp_ratio=self.size.share, reconstruction=reconstruction)  # type: ignore[arg-type]
        plan = self.walked[0]
        if reconstruction == "none":
            return apply_plan(self.model, plan)
        stats = self.stats(Requirements.of(config).statistics)
        return apply_plan(self.model, plan, reconstruct=reconstruct_with(stats, config))


def results_text(rows: Mapping[tuple[str, str], dict[str, Any]], args: argparse.Namespace, machine: str) -> str:
    """The section of RESULTS.md."""
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
    repairs = [[f"`{name}`", loss("repair", name)] for name in (*REPAIRS, "sequential")]
    choices = [[method.label, loss("choice", name)] for name, method in CHOICES.items()]
    commits = sorted({row["setting"]["commit"] for row in rows.values()})
    return f"""## What the residual loss is made of

SmolLM2-135M-Instruct, {SIZES[args.size].label}, calibrated on {args.blocks} x {args.length} tokens of `{args.domain}` train; excess loss over
the dense model in nats a token on {sum(tokens for _, tokens, _ in dense["documents"]):,} tokens of its validation text, 95 % bootstrap interval over
documents, paired.

**Blocks** of the default with adaptive widths ({cell(whole)} in all): pruned alone, the others dense (sum: {alone:.3f}),
and what the whole model gains where these blocks are dense again.

{table(["blocks", "pruned alone", "gained where dense"], lines)}

**Repair** of the very units that the walk kept:

{table(["repair", "excess"], repairs)}

**Choice** of as many units in every layer, each repaired by the walk:

{table(["criterion", "excess"], choices)}

`python -m benchmarks.residual --data DATA{args.given}` at {", ".join(f"`{c}`" for c in commits)}, {machine}, seed {args.seed}.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument(
        "--size", choices=[name for name, size in SIZES.items() if not size.attention], default="mlp50"
    )
    options.add_argument("--groups", type=int, default=6, help="of blocks")
    options.add_argument("--blocks", type=int, default=128, help="of calibration text")
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--eval-tokens", type=int, default=12_000)
    args = options.parse_args(arguments)
    args.given = given(options, args)
    store = Rows(args, "residual", seed=args.seed)
    domain = ResidualDomain(cache(smollm2), args, args.domain, targets=("mlp",))
    names = ("domain", "size", "groups", "blocks", "length", "eval_tokens", "seed")
    common = {name: getattr(args, name) for name in names}
    rows: dict[tuple[str, str], dict[str, Any]] = {}

    def get(kind: str, place: str, measure: Any) -> None:
        rows[kind, place] = store.get({**common, "kind": kind, "place": place}, measure)

    get("dense", "", domain.measure_dense)
    dense = rows["dense", ""]
    if documents_of(domain.losses(domain.model, docs=[dense["documents"][0][0]])) != dense["documents"][:1]:
        raise SystemExit("The dense row was measured on other documents than are there now; start over: --fresh.")
    get("repair", "sequential", lambda: domain.scored(domain.walked[1], dense))
    count = len(layers_of(domain.model, check_supported(domain.model)))
    bounds = [round(count * index / args.groups) for index in range(args.groups + 1)]
    for begin, end in pairwise(bounds):
        for kind, alone in (("alone", True), ("but", False)):
            get(
                kind,
                f"{begin} to {end - 1}",
                lambda b=begin, e=end, a=alone: domain.scored(domain.mixed(b, e, alone=a), dense),
            )
    for reconstruction in REPAIRS:
        get("repair", reconstruction, lambda r=reconstruction: domain.scored(domain.repaired_otherwise(r), dense))
    for name, method in CHOICES.items():
        get("choice", name, lambda m=method: domain.scored(domain.prune(m, domain.size)[0], dense))
    write_section("residual", results_text(rows, args, store.setting["machine"]))


if __name__ == "__main__":
    main()
