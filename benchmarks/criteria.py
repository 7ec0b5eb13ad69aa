"""Measure the excess loss of every criterion and reconstruction, with 25 % of the MLP neurons of every layer removed.

python -m benchmarks.criteria --data PATH/TO/data
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from benchmarks.common import Rows, cell, corpus, given, parser, table, write_section
from benchmarks.models import smollm2
from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.evaluation.losses import DocumentLoss, compare_losses, summarize_losses
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.pruning.calibration.calibrate import calibrate
from hf_context_prune.pruning.calibration.samples import batches_of
from hf_context_prune.pruning.criteria import CRITERIA
from hf_context_prune.pruning.planner import make_plan, reconstruct_with
from hf_context_prune.pruning.reconstruction import RECONSTRUCTIONS
from hf_context_prune.pruning.surgery import apply_plan


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--mlp-ratio", type=float, default=0.25, help="share of neurons to remove from every layer")
    options.add_argument("--num-samples", type=int, default=48, help="calibration samples")
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument("--eval-tokens", type=int, default=32_000, help="at most this many test tokens")
    args = options.parse_args()
    args.given = given(options, args)
    rows = Rows(args, "criteria", seed=args.seed)
    loaded = smollm2()
    model, tokenizer = loaded.model, loaded.tokenizer
    train, test = corpus(args, "train"), corpus(args, "validation")
    samples = tokenize_samples(
        train, tokenizer, num_samples=args.num_samples, max_seq_length=args.length, seed=args.seed
    )
    common = {
        "domain": args.domain,
        "mlp_ratio": args.mlp_ratio,
        "blocks": args.num_samples,
        "length": args.length,
        "eval_tokens": args.eval_tokens,
    }

    @cache
    def stats() -> Any:
        needs = frozenset({"gram", "taylor"})
        return calibrate(model, batches_of(samples), targets=("mlp",), statistics=needs)

    def losses(candidate: Any) -> dict[str, Any]:
        found = document_losses(candidate, tokenizer, test, max_seq_length=args.length, max_tokens=args.eval_tokens)
        return {"losses": [dataclasses.asdict(loss) for loss in found]}

    def pruned(criterion: str, reconstruction: str) -> dict[str, Any]:
        config = PrunerConfig(
            mlp_ratio=args.mlp_ratio,
            criterion=criterion,
            reconstruction=reconstruction,
            pruning_seed=args.seed,
        )
        plan = make_plan(model, stats(), config)
        return losses(apply_plan(model, plan, reconstruct=reconstruct_with(stats(), config)))

    dense_row = rows.get_or_measure({**common, "criterion": "dense"}, lambda: losses(model))
    dense = [DocumentLoss(**loss) for loss in dense_row["losses"]]
    cells: dict[tuple[str, str], Any] = {}
    for criterion in CRITERIA:
        for reconstruction in RECONSTRUCTIONS:
            key = {**common, "criterion": criterion, "reconstruction": reconstruction}
            row = rows.get_or_measure(key, lambda c=criterion, r=reconstruction: pruned(c, r))
            found = [DocumentLoss(**loss) for loss in row["losses"]]
            cells[criterion, reconstruction] = compare_losses(dense, found, seed=args.seed).excess_nats_per_token
    base = summarize_losses(dense, seed=args.seed)

    body = table(
        ["criterion", *RECONSTRUCTIONS],
        [[criterion, *(cell(cells[criterion, r]) for r in RECONSTRUCTIONS)] for criterion in CRITERIA],
    )
    write_section(
        "criteria",
        f"""## Criterion x reconstruction

Excess loss over the base model in nats per token, 95 % bootstrap interval over documents, paired with the base model.
SmolLM2-135M-Instruct (float32, dequantised), {args.mlp_ratio:.0%} of the MLP neurons of every layer removed, calibrated on
{args.num_samples} x {args.length} tokens of `{args.domain}` train, tested on {base.num_tokens:,} tokens
({base.num_documents} whole documents) of its validation split. Base model: perplexity {base.perplexity.value:.2f},
{base.bits_per_byte.value:.4f} bits per byte. Seed {args.seed}. `bias` adds biases that this architecture can't save, so
`bias` is measured in memory.

{body}

`python -m benchmarks.criteria --data DATA{args.given}` at `{dense_row["setting"]["commit"]}`, {dense_row["setting"]["machine"]}.
""",
    )


if __name__ == "__main__":
    main()
