"""Write the cards and pictures of `model_cards/`: SmolLM2-135M pruned for law, medicine and finance, healed, measured and exported.

python -m benchmarks.model_cards --data PATH/TO/data    # resumes an earlier run; the models stay in --work

The models are calibrated on the train text of a domain and on general train text, and measured on the validation text of
the domain, on withheld documents of the general text and on the domain's questions. The sealed test split is not read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, corpus, parser
from benchmarks.models import smollm2
from hf_context_prune import EvalOptions, PrunerConfig, QuestionOptions, RecoveryConfig, export_model, read_export
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.questions import load_questions
from hf_context_prune.errors import LoadError
from hf_context_prune.evaluation.scores import answer_with_models
from hf_context_prune.pipelines.prune import run_pruning
from hf_context_prune.publishing.card.facts import read_facts
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.utils.file_names import CARD_NAME, PICTURE_NAME

CARDS = ROOT.parent / "model_cards"
BASE = "SmolLM2-135M"


def text(args: argparse.Namespace, split: str, domain: str) -> TextSource:
    """Return a corpus whose name includes its domain, for the readers of the card."""
    source = corpus(args, split, domain)
    return replace(source, name=f"{domain}/{source.name}")


def configuration(args: argparse.Namespace, domain: str) -> PrunerConfig:
    """Return the config of a domain's model."""
    return PrunerConfig(
        pruning_ratio=args.ratio,
        allocation=args.allocation,
        reconstruction=args.reconstruction,
        vocab_size=args.vocab_size or None,
        num_calibration_samples=args.num_samples,
        max_seq_length=args.length,
        pruning_seed=args.seed,
        domain=domain,
    )


def pruned_folder(args: argparse.Namespace, domain: str, load: Callable[[], LoadedModel]) -> Path:
    """Return the folder of a domain's model, made by an earlier run with the same options or now."""
    config = configuration(args, domain)
    setting = [
        config.to_dict(),
        args.eval_tokens,
        args.questions,
        args.memory,
        args.recover_minutes,
        *([] if args.benchmark else ["no speed"]),
    ]
    place = args.work / "models" / hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:12]
    folder = place / f"{BASE}-{domain}"
    if not args.fresh and folder.is_dir():
        try:
            read_facts(folder)
            return folder
        except LoadError as error:
            print(f"{folder} is made again: {error}", flush=True)
    base = load()
    print(f"{domain}: pruning", flush=True)
    resume = place / f"{domain}-resume"
    resume.mkdir(parents=True, exist_ok=True)
    result = run_pruning(
        base,
        text(args, "train", domain),
        config,
        eval_data=text(args, "validation", domain),
        eval_options=EvalOptions(args.eval_tokens, args.benchmark, general_data=text(args, "train", "general")),
        recovery=RecoveryConfig(max_minutes=args.recover_minutes) if args.recover_minutes else None,
        resume_dir=resume,
    )
    if args.questions:
        print(f"{domain}: questions", flush=True)
        asked = load_questions(args.data / domain / "mcq.jsonl", max_questions=args.questions)
        pairs = (base.model, base.tokenizer), (result.model, result.tokenizer)
        answers = answer_with_models(asked, QuestionOptions(asked.name), *pairs)
        result.report = replace(result.report, multiple_choice=replace(answers, name=f"{domain}/{answers.name}"))
    result.save_pretrained(folder, measure_memory=args.memory)
    shutil.rmtree(resume, ignore_errors=True)
    return folder


def exported(args: argparse.Namespace, domain: str, folder: Path) -> Path:
    """Return the GGUF export of a folder, made by an earlier run or now."""
    target = folder.with_name(f"{folder.name}-gguf")
    try:
        read_export(target)
    except LoadError:
        print(f"{domain}: exporting", flush=True)
        export_model(folder, target, format="gguf", dtype=args.export, data=text(args, "validation", domain))
    return target


def publish(folder: Path, target: Path) -> Path:
    """Copy a folder's card and picture, the picture under the card's name; equal widths have no picture."""
    target.mkdir(parents=True, exist_ok=True)
    card = (folder / CARD_NAME).read_text(encoding="utf-8").replace(f"]({PICTURE_NAME})", f"]({folder.name}.png)")
    (target / f"{folder.name}.png").unlink(missing_ok=True)
    if (folder / PICTURE_NAME).is_file():
        shutil.copyfile(folder / PICTURE_NAME, target / f"{folder.name}.png")
    path = target / f"{folder.name}.md"
    path.write_text(card, encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser(__doc__ or "", several=True)
    options.add_argument("--output", type=Path, default=CARDS, help="folder of the cards")
    options.add_argument("--ratio", type=float, default=0.3, help="share of all parameters to remove")
    options.add_argument("--vocab-size", type=int, default=0, help="vocabulary entries to keep; 0: as the budget finds")
    options.add_argument("--allocation", help="allocation of `PrunerConfig`")
    options.add_argument("--reconstruction", default="sequential", help="reconstruction of `PrunerConfig`")
    options.add_argument("--num-samples", type=int, default=64, help="calibration samples")
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument("--recover-minutes", type=float, default=10, help="time of the training after it; 0: none")
    options.add_argument("--export", default="q8_0", help="data type of the GGUF export; empty: none")
    options.add_argument("--eval-tokens", type=int, default=48_000, help="at most this many test tokens")
    options.add_argument("--questions", type=int, default=200, help="multiple-choice questions per domain; 0: none")
    options.add_argument("--benchmark", action=argparse.BooleanOptionalAction, default=True, help="measure speed")
    options.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    args = options.parse_args(arguments)
    loaded: list[Any] = []

    def load() -> LoadedModel:
        loaded[:] = loaded or [smollm2()]
        return loaded[0]

    for domain in args.domains:
        folder = pruned_folder(args, domain, load)
        print(f"Wrote {publish(folder, args.output)}", flush=True)
        if args.export:
            print(f"Wrote {publish(exported(args, domain, folder), args.output / 'exports')}", flush=True)


if __name__ == "__main__":
    main()
