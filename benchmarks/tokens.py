"""How loss falls with calibration tokens: ours against one-shot least squares and FLAP, 25 % of the MLP neurons.

python -m benchmarks.tokens --data PATH/TO/data
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from typing import Any

from benchmarks.common import Rows, cell, given, parser, plot_path, table, write_section
from benchmarks.methods import METHODS, REFERENCE, SIZES, Domain
from benchmarks.models import smollm2
from benchmarks.one_shot import errorbars, excess
from hf_context_prune.evaluation import Estimate

COMPARED = ("ours", "obs+least_squares", REFERENCE)
SIZE = SIZES["mlp25"]


def plot(tokens: Sequence[int], found: dict[str, list[Estimate]]) -> None:
    """Excess over calibration tokens, both on log scales."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for method, estimates in found.items():
        errorbars(axis, tokens, estimates, METHODS[method].label.replace("`", ""), horizontal=False)
    drawn = any(estimate.value > 0 for estimates in found.values() for estimate in estimates)
    axis.set(
        xscale="log",
        yscale="log" if drawn else "linear",
        xlabel="calibration tokens",
        ylabel="excess, nats a token",
        title=SIZE.label,
    )
    axis.grid(which="both", alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(plot_path("tokens"), dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64, 128, 192, 256], help="blocks of text")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(COMPARED))
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--eval-tokens", type=int, default=24_000)
    args = options.parse_args(arguments)
    args.given = given(options, args)
    store, load = Rows(args, "tokens", seed=args.seed), cache(smollm2)
    common = {"domain": args.domain, "length": args.length, "eval_tokens": args.eval_tokens, "seed": args.seed}
    found: dict[str, list[Estimate]] = {method: [] for method in args.methods}
    dense_rows: list[dict[str, Any]] = []
    for blocks in args.tokens:
        own = argparse.Namespace(**{**vars(args), "blocks": blocks})
        domain = Domain(load, own, args.domain, targets=("mlp",))
        key = {**common, "blocks": blocks}
        dense = store.get({**key, "method": "dense"}, domain.measure_dense)
        dense_rows.append(dense)
        for method in args.methods:
            row = store.get(
                {**key, "method": method}, lambda d=domain, m=method, row=dense: d.measure(METHODS[m], SIZE, row)
            )
            found[method].append(excess(dense, row, dense, args.seed))
    tokens = [row["calibration_tokens"] for row in dense_rows]
    plot(tokens, found)
    body = table(
        ["calibration tokens", *(METHODS[method].label for method in args.methods)],
        [[f"{n:,}", *(cell(found[method][i]) for method in args.methods)] for i, n in enumerate(tokens)],
    )
    write_section(
        "tokens",
        f"""## Loss and calibration tokens

Excess loss over the dense model in nats a token, 95 % bootstrap interval over documents, paired. SmolLM2-135M-Instruct,
{SIZE.label}, calibrated on blocks of {args.length} tokens of `{args.domain}` train, tested on
{sum(tokens for _, tokens, _ in dense_rows[0]["documents"]):,} tokens ({len(dense_rows[0]["documents"])} whole documents) of
its validation text.

![Excess loss by calibration tokens]({plot_path("tokens").name})

{body}

`python -m benchmarks.tokens --data DATA{args.given}` at `{dense_rows[-1]["setting"]["commit"]}`, {store.setting["machine"]}, seed {args.seed}.
""",
    )


if __name__ == "__main__":
    main()
