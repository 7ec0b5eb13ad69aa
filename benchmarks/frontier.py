"""Measure what the default costs at every size, beside its own options, peers and training: README's picture.

python -m benchmarks.frontier --data PATH/TO/data            # three domains, four sizes; four hours; resumes
python -m benchmarks.frontier --data PATH/TO/data --quick    # one domain, two sizes, little text
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.by_source import read_sources, sources_of
from benchmarks.common import ROOT, Rows, corpus, parse_compared, parser, plot_path, write_section
from benchmarks.frontier_picture import draw
from benchmarks.frontier_text import BASE, FORMS, HEALED, LARGEST_OF_FORMS, results_text
from benchmarks.methods import DEFAULT, LAYERS, METHODS, Domain, Size, count_gone, documents_of, rounded
from benchmarks.models import smollm2
from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.decontamination import drop_overlapping
from hf_context_prune.data.documents import TextSource
from hf_context_prune.evaluation.passages import Passages
from hf_context_prune.modeling.native_fit import assess_native_fit
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pipelines.kept_model import load_or_prune
from hf_context_prune.pipelines.validation_text import withhold_token_probe
from hf_context_prune.pruning.allocation.budget import ParameterBudget
from hf_context_prune.pruning.allocation.widths import native_groups
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.model_builder import PrunedModel
from hf_context_prune.pruning.prune_model import prune_model
from hf_context_prune.pruning.unit_curves import TokenProbe, measure_units
from hf_context_prune.training.recovery.config import RecoveryConfig
from hf_context_prune.training.recovery.recover import recover

OPTIONS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    LAYERS: {"units": "neurons,kv_groups"},
    "native": {"native_architecture": True},
    "variable": {"native_architecture": False},
}
"""Options of `PrunerConfig` beside the size, by method."""
PASSAGES = "passages"
"""What is scored, in the keys of rows."""
PICTURE = ROOT.parent / "docs" / "frontier.png"


class FrontierDomain(Domain):
    """A domain whose curves are measured once for all sizes, and kept in a folder that a resumed run reads."""

    label = "frontier"
    """Beginning of the name of the folder of the curves."""
    keeps_models = True
    """Whether the default's models, trained back too, stay on the disk for other benchmarks of the same settings."""
    _kept: tuple[str, float, PrunedModel] | None = None

    @cached_property
    def test_text(self) -> tuple[TextSource, int]:
        """Passages of a hundred documents of the validation split, as in `evaluate`; how many overlap with the train text."""
        text, dropped = super().test_text
        return self._passages(text, self.args.eval_tokens), dropped

    @cached_property
    def general(self) -> TextSource:
        """General test text (validation split), without documents that overlap with the domain's train text."""
        text = drop_overlapping(corpus(self.args, "validation", "general"), self.train)[0]
        return self._passages(text, self.args.general_tokens)

    def _passages(self, text: TextSource, max_tokens: int) -> TextSource:
        return Passages.of(text, self.load().tokenizer, max_tokens=max_tokens).text

    @cached_property
    def calibration(self) -> CalibrationSet:
        """The calibration text, read once for all sizes."""
        return CalibrationSet(self.train, self.own_config(DEFAULT, self.args.shares[0]))

    @cached_property
    def probe(self) -> TokenProbe:
        """The text that vocabularies are compared on, with the base model's loss there, measured once for all sizes."""
        return withhold_token_probe(self.model, self.load().tokenizer, self.calibration, self.calibration.config)

    @cached_property
    def folder(self) -> Path:
        """Folder of the measured curves, and of the finished layers of the size that is measured now."""
        args = self.args
        folder = Path(args.work) / "models" / f"{self.label}-{self.name}-{args.num_samples}-{args.length}-{args.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def own_config(self, method: str, share: float) -> PrunerConfig:
        """Return the config of a method of this package at a share of all parameters."""
        return PrunerConfig(
            pruning_ratio=share,
            **OPTIONS[method],
            num_calibration_samples=self.args.num_samples,
            max_seq_length=self.args.length,
            pruning_seed=self.args.seed,
        )

    def own_recovery(self) -> RecoveryConfig:
        """Return the config of the training."""
        args = self.args
        return RecoveryConfig(max_minutes=args.minutes, max_seq_length=args.length, recovery_seed=args.seed)

    def compare_forms(self, share: float) -> dict[str, bool | None]:
        """Return for both forms whether the default has its sizes; None where a form can't become so small."""
        config, view = self.own_config(DEFAULT, share), ModelView.of(self.model)
        curves = measure_units(
            self.model, self.load().tokenizer, self.calibration, config, self.probe, self.folder
        ).curves
        remove, groups = ParameterBudget.of(config, view.num_parameters).remove_params or 0, native_groups(view)
        chosen = curves.choose(remove, None, groups)[0]
        found = {"native": curves.cheapest_native(remove, groups), "variable": curves.cheapest(remove)}
        return {
            form: None if sizes is None else (sizes.tokens, sizes.widths) == (chosen.tokens, chosen.widths)
            for form, sizes in found.items()
        }

    def pruned(self, method: str, share: float) -> PrunedModel:
        """Prune as `prune` does, from the curves of the domain; the last model is kept."""
        if self._kept is None or self._kept[:2] != (method, share):
            self._kept = None

            def prune() -> PrunedModel:
                return prune_model(
                    self.model,
                    self.load().tokenizer,
                    self.calibration,
                    self.own_config(method, share),
                    token_probe=self.probe,
                    resume_dir=self.folder,
                )

            self._kept = method, share, self.keep(share, prune) if method == DEFAULT else prune()
        return self._kept[2]

    def keep(self, share: float, make: Callable[[], PrunedModel], *facts: object) -> PrunedModel:
        """Return the model that an earlier run made of the default's, or make it; facts say what is done to it."""
        if not self.keeps_models:
            return make()
        name = "-".join(map(str, ("kept", self.name, share, *facts)))
        place = Path(self.args.work) / "models" / name
        place.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads()

        def make_with_threads() -> PrunedModel:
            torch.set_num_threads(threads)
            return make()

        torch.set_num_threads(1)  # in the key: what one thread has pruned is timed and exported with all of them
        try:
            return load_or_prune(
                place, self.load(), (self.own_config(DEFAULT, share).to_dict(), facts), make_with_threads
            )
        finally:
            torch.set_num_threads(threads)

    def forget(self) -> None:
        """Remove the last model, and the finished layers of its size, whose rows are complete."""
        self._kept = None
        for layers in filter(Path.is_dir, self.folder.iterdir()):
            shutil.rmtree(layers)

    def scored(self, model: Any, tokenizer: Any, base: Mapping[str, Any], *, general: bool) -> dict[str, Any]:
        """Score a model on the documents of the base model's row."""
        row: dict[str, Any] = {"parameters": model.num_parameters()}
        row["nll"] = rounded(self.losses(model, tokenizer, [doc for doc, _, _ in base["documents"]]))
        if general:
            docs = [doc for doc, _, _ in base["general"]["documents"]]
            row["general"] = {"nll": rounded(self.losses(model, tokenizer, docs, source=self.general))}
        return row

    def measure_base(self, *, general: bool) -> dict[str, Any]:
        """Return the row of the base model, which also holds the sizes of documents."""
        row = self.measure_dense()
        if general:
            losses = self.losses(self.model, source=self.general)
            row["general"] = {"documents": documents_of(losses), "nll": rounded(losses)}
        return row

    def measure_own(self, method: str, share: float, base: Mapping[str, Any], *, general: bool) -> dict[str, Any]:
        """Prune by a method of this package and score the model; stages are in seconds."""
        stages, row, clock = {}, {}, time.perf_counter
        begin = clock()
        if method == DEFAULT:
            row["forms"] = self.compare_forms(share)
        stages["curves"], begin = clock() - begin, clock()
        model, tokenizer, plan = self.pruned(method, share)
        stages["prune"], begin = clock() - begin, clock()
        row |= self.scored(model, tokenizer, base, general=general)
        stages["score"] = clock() - begin
        stages = {stage: round(seconds, 1) for stage, seconds in stages.items()}
        native = assess_native_fit(model.config, ModelView.of(self.model).spec, plan.widths).fits
        facts = {name: plan.provenance.get(name) for name in ("predicted_loss_increase", "predicted_losses", "refit")}
        return {**row, **facts, "gone": count_gone(plan), "native": native, "stages": stages}

    def healed(self, share: float) -> PrunedModel:
        """Train the default's model back; its plan's provenance has the history (`training`)."""

        def train() -> PrunedModel:
            model, tokenizer, plan = self.pruned(DEFAULT, share)
            found = recover(model, self.train, self.own_recovery(), tokenizer=tokenizer)
            facts = {**plan.provenance, "training": found.history.to_dict()}
            return PrunedModel(found.model, tokenizer, replace(plan, provenance=facts))

        return self.keep(share, train, HEALED, self.args.minutes)

    def measure_healed(self, share: float, base: Mapping[str, Any]) -> dict[str, Any]:
        """Train the default's model back, and score it."""
        model, tokenizer, plan = self.healed(share)
        return {**self.scored(model, tokenizer, base, general=True), "history": plan.provenance["training"]}

    def measure_peer(self, method: str, share: float, base: dict[str, Any]) -> dict[str, Any]:
        """Prune to a share of all parameters by neurons alone, equally many in every layer, and score the model."""
        view = ModelView.of(self.model)
        neurons = view.widths[0].neurons
        gone = math.ceil(share * view.num_parameters / (len(view.widths) * view.costs["mlp"]))
        return self.measure(METHODS[method], Size("", gone / neurons), base)


class FrontierRows:
    """The rows of a run, by (domain, method, share); each is measured or found on disk.

    Args:
        args: Options of the run.
        domains: The domains, by name.
    """

    def __init__(self, args: argparse.Namespace, domains: Mapping[str, FrontierDomain]) -> None:
        self.args, self.domains = args, domains
        self.store = Rows(args, "frontier", seed=args.seed)
        self.found: dict[tuple[str, str, float], dict[str, Any]] = {}
        self.sources = read_sources(args, [*domains, "general"])

    def key(self, name: str, method: str, share: float) -> dict[str, Any]:
        """Return the key of a row: all that decides it."""
        args = self.args
        key = {"domain": name, "method": method, "share": share, "blocks": args.num_samples}
        key |= {"length": args.length, "eval_tokens": args.eval_tokens, "seed": args.seed, "text": PASSAGES}
        if self.has_general(name, method):
            key["general"] = self.args.general_tokens
        return key | ({"minutes": args.minutes} if method == HEALED else {})

    def has_general(self, name: str, method: str) -> bool:
        """Return whether a row has the loss on general text too."""
        return name == self.args.compared and method in (BASE, DEFAULT, HEALED)

    def get(self, name: str, method: str, share: float = 0.0) -> dict[str, Any]:
        """Return a row, with the seconds that it took."""
        domain, general = self.domains[name], self.has_general(name, method)

        def measure() -> dict[str, Any]:
            begin = time.perf_counter()
            base = None if method == BASE else self.found[name, BASE, 0.0]
            row = _measure(domain, method, share, base, general=general)
            return {**row, "seconds": round(time.perf_counter() - begin, 4)}

        row = self.store.get_or_measure(self.key(name, method, share), measure)
        if method == BASE:
            row = {**row, "sources": sources_of(row, self.sources[name])}
            if "general" in row:
                row["general"] = {**row["general"], "sources": sources_of(row["general"], self.sources["general"])}
        self.found[name, method, share] = row
        return row

    def get_size(self, name: str, share: float) -> None:
        """Get all rows of a domain at one size; a form with the default's sizes has the default's row."""
        forms, compared = self.get(name, DEFAULT, share)["forms"], name == self.args.compared
        if compared:
            self.get(name, HEALED, share)  # the default's model is still in memory
        for form in FORMS if share <= LARGEST_OF_FORMS else ():
            if forms[form]:
                self.found[name, form, share] = self.found[name, DEFAULT, share]
            elif forms[form] is not None:
                self.get(name, form, share)
        for method in (LAYERS, *(self.args.peers if compared else ())):
            self.get(name, method, share)
        self.domains[name].forget()

    def lacks_peer(self, peer: str) -> bool:
        """Return whether a row of a peer is not measured yet."""
        return any(self.store.find(self.key(self.args.compared, peer, share)) is None for share in self.args.shares)


def _measure(
    domain: FrontierDomain, method: str, share: float, base: dict[str, Any] | None, *, general: bool
) -> dict[str, Any]:
    if base is None:
        return domain.measure_base(general=general)
    if method == HEALED:
        return domain.measure_healed(share, base)
    if method in OPTIONS:
        return domain.measure_own(method, share, base, general=general)
    return domain.measure_peer(method, share, base)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of a run."""
    options = parser(__doc__ or "", several=True)
    options.add_argument("--quick", action="store_true", help="one domain, two sizes, little text")
    options.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.5], help="parameters to remove")
    options.add_argument("--compared", default="medicine", help="domain with peers, training and general text")
    options.add_argument(
        "--peers",
        nargs="*",
        choices=[name for name, method in METHODS.items() if not method.whole],
        default=["flap+bias", "optipfair-maw"],
        help="methods to compare with",
    )
    options.add_argument("--minutes", type=float, default=8.0, help="minutes of training")
    options.add_argument("--num-samples", type=int, default=64, help="calibration samples")
    options.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
    options.add_argument(
        "--eval-tokens",
        type=int,
        default=48_000,
        help="at most this many test tokens per domain: a window per document",
    )
    options.add_argument("--general-tokens", type=int, default=16_000, help="at most this many tokens of general text")
    if "--quick" in arguments:
        options.set_defaults(domains=["medicine"], shares=[0.2, 0.3], minutes=1.0, num_samples=16)
        options.set_defaults(eval_tokens=5_000, general_tokens=5_000)
    return parse_compared(options, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    load: Callable[[], Any] = cache(smollm2)
    rows = FrontierRows(args, {name: FrontierDomain(load, args, name, targets=("mlp",)) for name in args.domains})
    if "optipfair-maw" in args.peers and find_spec("optipfair") is None and rows.lacks_peer("optipfair-maw"):
        raise SystemExit("optipfair is not installed: pip install -e '.[benchmarks]', or leave it out of --peers.")
    for name in args.domains:
        rows.get(name, BASE)
    for share in args.shares:
        for name in args.domains:
            rows.get_size(name, share)
    section = "frontier_quick" if args.quick else "frontier"
    picture = plot_path(section) if args.quick else PICTURE
    draw(rows.found, args, picture)
    write_section(section, results_text(rows.found, args, picture))


if __name__ == "__main__":
    main()
