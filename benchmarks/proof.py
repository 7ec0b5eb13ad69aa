"""Run the proof: the cross-domain matrix with multiple-choice questions, and the paper's grid of thresholds.

python -m benchmarks.proof --data PATH/TO/data            # four domains, two sizes, two grids; resumes
python -m benchmarks.proof --data PATH/TO/data --quick    # two domains at one size, four points, few questions
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Rows, given, machine, parser, table, write_section
from benchmarks.common import commit as current_commit
from benchmarks.models import smollm2
from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.documents import TextSource, load_documents
from hf_context_prune.evaluation.accuracy import summarize_answers
from hf_context_prune.evaluation.options import EvalOptions, QuestionOptions
from hf_context_prune.evaluation.reports.report import Environment
from hf_context_prune.evaluation.reports.run_report import RunReport
from hf_context_prune.pipelines.evaluate import evaluate
from hf_context_prune.pipelines.matrix import MODELS, REFERENCE, domain_matrix
from hf_context_prune.pipelines.matrix_report import DENSE, DomainMatrix
from hf_context_prune.pipelines.sweep import GRID, SweepOptions, sweep
from hf_context_prune.pipelines.sweep_report import Sweep
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.training.recovery.config import RecoveryConfig

GOAL_MINUTES = 15.0
"""Minutes to evaluate base and pruned model on half a megabyte of text and 500 questions, on two cores."""
PUBLISHED = (
    "The paper reports for Phi-1.5, OPT and Llama of 1.3B, on its own text: by its measure about a tenth smaller at 1e-3, "
    "with a perplexity that a short tuning brings back to the old value or below; up to 42 % smaller at 1e-1, with a "
    "perplexity that explodes and needs many epochs of tuning. (From a summary of the paper: its tables could not be read "
    "here, so its rows are not shown.)"
)
FOUR = ("law", "medicine", "finance", REFERENCE)


def folder(args: argparse.Namespace, name: str) -> Path:
    """Return the folder of one run."""
    return Path(args.work / "proof" / name)


def corpora(args: argparse.Namespace, split: str, domains: Sequence[str]) -> dict[str, str]:
    """Return the paths of one split, by domain."""
    return {domain: str(args.data / domain / f"corpus.{split}.jsonl.gz") for domain in domains}


def asked(args: argparse.Namespace, domain: str, number: int, **how: Any) -> QuestionOptions:
    """Return the options for the questions of a domain."""
    return QuestionOptions(str(args.data / domain / "mcq.jsonl"), max_questions=number, **how)


def questions_at(args: argparse.Namespace, share: float) -> int:
    """Return the number of questions per domain at a size."""
    return args.questions if share in args.question_shares else 0


def measure_matrix(base: LoadedModel, args: argparse.Namespace, share: float) -> DomainMatrix:
    """Measure the cross-domain matrix at a size; the first size also has the mixtures with general text."""
    mixed = share == args.shares[0] and {args.mix_domain, REFERENCE} <= set(args.domains)
    number = questions_at(args, share)
    config = PrunerConfig(
        pruning_ratio=share,
        units="neurons,kv_groups",
        refit_lm_head=False,
        native_architecture=False,
        num_calibration_samples=args.num_samples,
        max_seq_length=args.length,
        pruning_seed=args.seed,
    )
    return domain_matrix(
        base,
        corpora(args, "train", args.domains),
        folder(args, f"matrix-{share:g}"),
        config,
        eval_data=corpora(args, "validation", args.domains),
        questions={
            domain: asked(args, domain, number, num_fewshot=args.num_fewshot)
            for domain in (args.domains if number else ())
        },
        mixes={args.mix_domain: args.mixes} if mixed and args.mixes else {},
        max_tokens=args.eval_tokens,
    )


def pictures_of(args: argparse.Namespace, share: float) -> list[str]:
    """Return the names of the pictures of a matrix."""
    return sorted(path.name for path in folder(args, f"matrix-{share:g}").glob("*.png"))


def measure_grid(base: LoadedModel, args: argparse.Namespace, domain: str) -> Sweep:
    """Measure the paper's grid of thresholds on a domain."""
    options = SweepOptions(
        linear=args.grid,
        activation=args.grid,
        recovery=RecoveryConfig(
            max_steps=args.steps,
            num_epochs=1e6,
            num_evals=1,  # measuring more often would take longer than the training itself
            max_seq_length=args.length,
            recovery_seed=args.seed,
        ),
        num_calibration_samples=args.grid_samples,
        max_seq_length=args.length,
        max_tokens=args.grid_tokens,
        seed=args.seed,
    )
    return sweep(
        base,
        corpora(args, "train", [domain])[domain],
        folder(args, f"sweep-{domain}"),
        options,
        eval_data=corpora(args, "validation", [domain])[domain],
        questions=asked(args, domain, args.grid_questions, scorer="paper"),
    )


def measure_time(base: LoadedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds to evaluate base and pruned model on text and questions."""
    domain = args.domains[0]
    text = load_documents(corpora(args, "train", [domain])[domain])
    documents, size = [], 0
    for document in text.documents:
        if size >= args.timed_bytes:
            break
        documents.append(document)
        size += len(document.text.encode())
    begin = time.perf_counter()
    evaluate(
        folder(args, f"matrix-{args.shares[0]:g}") / MODELS / domain,
        TextSource.from_documents(documents, name=text.name),
        base=base,
        questions=asked(args, domain, args.questions),
        eval_options=EvalOptions(max_tokens=None, benchmark=False, memory=False),
    )
    return {"seconds": time.perf_counter() - begin, "bytes": size, "questions": args.questions}


def shown(report: RunReport, pictures: Sequence[str] = ()) -> str:
    """Return pictures and tables of a run without the accuracies by source, whose dozens of columns are in the run's folder."""
    parts = [f"![{report.title}]({picture})" for picture in pictures]
    for one in report.tables:
        if one.title != "Accuracy by source":
            parts += [one.caption or one.title, table(one.header, one.rows)]
    return "\n\n".join(parts)


def signal_text(found: DomainMatrix) -> str:
    """Return the sources of questions that the base model answers better than chance, with the pruned model of the domain."""
    rows, silent = [], []
    for domain in found.domains:
        questions, scores = found.held_out[domain].questions, found.scores[DENSE, domain]
        if questions is None or scores.answers is None:
            continue
        own = found.scores[domain, domain].answers
        assert own is not None
        pairs = zip(summarize_answers(questions, scores.answers), summarize_answers(questions, own), strict=True)
        for before, after in pairs:
            low, high = before.accuracy.interval or (0.0, 1.0)
            if low <= before.chance:
                silent.append(f"{domain} / {before.source} ({before.num_questions})")
                continue
            rows.append(
                (
                    f"{domain} / {before.source}",
                    f"{before.num_questions:,}",
                    f"{before.chance:.0%}",
                    f"{before.accuracy.value:.1%} [{low:.1%}, {high:.1%}]",
                    f"{after.accuracy.value:.1%}",
                )
            )
    body = table(("questions", "number", "guessing", "base", "calibrated on its domain"), rows)
    return (
        f"Sources on which the base model is above guessing (the whole 95 % Wilson interval is):\n\n{body}\n\n"
        f"On all other sources a model of 135M guesses, so a change there means nothing: "
        f"{'; '.join(silent) or 'none'}."
    )


def section(args: argparse.Namespace, heading: str, *parts: str) -> str:
    """Return a section of RESULTS.md; every part of the proof has its own section, so that each can be measured alone."""
    how = (
        f"`python -m benchmarks.proof --data DATA{args.given}` at `{current_commit()}`, {machine()}, seed {args.seed}."
    )
    return "\n\n".join((f"## The proof: {heading}", *parts, how))


def matrix_text(found: DomainMatrix, share: float, args: argparse.Namespace) -> str:
    """Return the section of a cross-domain matrix."""
    number = questions_at(args, share)
    on_questions = (
        f" and on up to {number} questions each (likelihood per byte, {args.num_fewshot}-shot). In brackets 95 % intervals: "
        f"bootstrap over documents, Wilson over questions; p of McNemar's exact test against the base model."
    )
    return section(
        args,
        f"the domain matrix at {share:.0%} of all parameters",
        f"SmolLM2-135M-Instruct (float32), neurons and KV groups pruned in one shot (`obs`, `sequential`, adaptive widths; no "
        f"token is removed and no row refitted) on {args.num_samples} x {args.length} tokens of each domain's train text, tested on the validation split of every domain "
        f"(at most {args.eval_tokens:,} tokens)"
        + (on_questions if number else ". In brackets 95 % intervals: bootstrap over documents."),
        shown(
            found.run_report(Environment.current("float32")),
            [f"{args.section}-{share:g}-{name}" for name in pictures_of(args, share)],
        ),
        *([signal_text(found)] if number else []),
    )


def grid_text(grid: Sweep, domain: str, args: argparse.Namespace) -> str:
    """Return the section of the paper's grid on a domain."""
    return section(
        args,
        f"the paper's grid, {domain}",
        f"Thresholds of linear layers, activations and embedding as in arXiv 2312.12682 on SmolLM2-135M-Instruct (float32), "
        f"calibrated on {args.grid_samples} x {args.length} tokens, scored on at most {args.grid_tokens:,} test tokens; *tuned*: "
        f"{args.steps} steps of cross-entropy on the train text; {args.grid_questions} questions, the paper's scorer (too "
        f"few to compare sources; `sweep.md` in the folder of the run has all sources). {PUBLISHED}",
        shown(grid.run_report(Environment.current("float32"))),
    )


def time_text(timed: Mapping[str, Any], args: argparse.Namespace) -> str:
    """Return the section of the time to evaluate."""
    return section(
        args,
        "time to evaluate",
        f"`evaluate --base` on {timed['bytes'] / 1e6:.1f} MB of text and {timed['questions']} questions, both models: "
        f"{timed['seconds'] / 60:.1f} minutes (goal: under {GOAL_MINUTES:g}).",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser(__doc__ or "", several=True)
    options.set_defaults(domains=list(FOUR))
    options.add_argument("--quick", action="store_true", help="two domains, one size, four points, few questions")
    options.add_argument(
        "--shares",
        nargs="*",
        type=float,
        default=[0.2, 0.3],
        help="shares of all parameters to remove; none: neither matrix nor time",
    )
    options.add_argument(
        "--question-shares",
        nargs="*",
        type=float,
        default=[0.2],
        help="those of --shares that answer questions too (an hour each)",
    )
    options.add_argument("--mix-domain", default="medicine", help="domain of the curve over general_data_ratio")
    options.add_argument(
        "--mixes", nargs="*", type=float, default=[0.25, 0.5, 0.75], help="shares of general text on that curve"
    )
    options.add_argument("--grids", nargs="*", default=["law", "medicine"], help="domains of the paper's grid")
    options.add_argument("--num-samples", type=int, default=96, help="calibration samples")
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument("--eval-tokens", type=int, default=20_000, help="at most this many test tokens per domain")
    options.add_argument(
        "--questions", type=int, default=500, help="questions per domain; 0: neither questions nor time"
    )
    options.add_argument("--num-fewshot", type=int, default=0, help="answered examples before each question")
    options.add_argument("--grid-samples", type=int, default=32, help="calibration samples of the grid")
    options.add_argument("--grid-questions", type=int, default=50, help="questions at each point of the grid")
    options.add_argument(
        "--grid-tokens", type=int, default=8_000, help="at most this many test tokens at each point of the grid"
    )
    options.add_argument("--timed-bytes", type=int, default=500_000, help="bytes of text, for the time to evaluate")
    options.add_argument("--steps", type=int, default=10, help="training steps at each point of the grid")
    options.set_defaults(grid=GRID)
    if "--quick" in arguments:
        small: dict[str, Any] = {"domains": ["medicine", REFERENCE], "shares": [0.2], "grids": ["medicine"]}
        options.set_defaults(mixes=[0.5])
        options.set_defaults(**small, num_samples=16, eval_tokens=4_000, questions=40, grid=(1e-3, 1e-1))
        options.set_defaults(grid_samples=8, grid_questions=20, grid_tokens=2_000, steps=4, timed_bytes=20_000)
    args = options.parse_args(arguments)
    args.given = given(options, args)
    args.section, base = "proof_quick" if args.quick else "proof", smollm2()
    if args.fresh:
        shutil.rmtree(folder(args, ""), ignore_errors=True)
    for share in args.shares:
        found = measure_matrix(base, args, share)
        for name in pictures_of(args, share):
            picture = folder(args, f"matrix-{share:g}") / name
            shutil.copy(picture, common.RESULTS.parent / f"{args.section}-{share:g}-{name}")
        write_section(f"{args.section}-{share:g}", matrix_text(found, share, args))
    for domain in args.grids:
        write_section(f"{args.section}-grid-{domain}", grid_text(measure_grid(base, args, domain), domain, args))
    if args.questions and args.shares:
        key = {"bytes": args.timed_bytes, "questions": args.questions, "share": args.shares[0]}
        timed = Rows(args, args.section, seed=args.seed).get_or_measure(key, lambda: measure_time(base, args))
        write_section(f"{args.section}-time", time_text(timed, args))


if __name__ == "__main__":
    main()
