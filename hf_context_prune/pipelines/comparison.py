"""Base, pruned and recovered model on the same documents, and the report that their figures make."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_context_prune.data.splits import TextSplit
from hf_context_prune.evaluation.general_text import (
    GeneralText,
    ModelAndTokenizer,
    build_loss_facts,
    measure_general_losses,
)
from hf_context_prune.evaluation.losses import DocumentLoss
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.evaluation.reports.report import (
    DatasetFacts,
    Environment,
    EvalReport,
    SizeFacts,
    SizeSearch,
    SpeedFacts,
)
from hf_context_prune.evaluation.speed import measure_speed
from hf_context_prune.modeling.in_turns import fits_with_weights
from hf_context_prune.modeling.inference import dtype_name
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.utils.distributed import on_main_process


@dataclass(frozen=True)
class Comparison:
    """A base model with its losses on test text, to which other models are compared.

    Attributes:
        base: The model that the others are compared with.
        losses: Its losses on the test text.
        split: The domain's text, whose test part is measured on.
        general: Text of no domain that is measured on too, if there is one.
        options: How much is measured.
        max_seq_length: Tokens per window.
        seed: Seed of the intervals.
    """

    base: LoadedModel
    losses: list[DocumentLoss]
    split: TextSplit
    general: GeneralText | None
    options: EvalOptions
    max_seq_length: int
    seed: int

    @classmethod
    def begin(
        cls,
        base: LoadedModel,
        split: TextSplit,
        general: GeneralText | None,
        options: EvalOptions,
        *,
        max_seq_length: int,
        seed: int,
    ) -> Comparison:
        """Measure the base on the test text, before the long work."""
        losses = document_losses(
            base.model, base.tokenizer, split.test, max_seq_length=max_seq_length, max_tokens=options.max_tokens
        )
        return cls(base, losses, split, general, options, max_seq_length, seed)

    def report(
        self,
        size: SizeFacts,
        *,
        pruned: ModelAndTokenizer | None,
        recovered: ModelAndTokenizer | None = None,
        notes: tuple[str, ...],
        with_speed: bool = True,
        search: SizeSearch | None = None,
        predicted_excess: float | None = None,
    ) -> EvalReport:
        """Measure the other models, and put everything into a report; speed is that of the last model.

        Args:
            size: Sizes of the base and the last model.
            pruned: The pruned model; None where the base is that model.
            recovered: The pruned model after recovery, if there was one.
            notes: Sentences that a reader of the figures must know.
            with_speed: Whether the base is the model to compare the speed with.
            search: How the size was found, if by search.
            predicted_excess: See `LossFacts`.
        """
        others = {"pruned": pruned, "recovered": recovered}
        models = {name: pair for name, pair in others.items() if pair is not None}
        last, _ = recovered or pruned or (self.base.model, None)
        # The same documents, whatever number of tokens they are for another tokenizer.
        docs, test = [loss.doc for loss in self.losses], self.split.test
        losses = {
            name: document_losses(*pair, test, max_seq_length=self.max_seq_length, docs=docs)
            for name, pair in models.items()
        }
        general = measure_general_losses(
            self.general,
            (self.base.model, self.base.tokenizer),
            **models,
            max_seq_length=self.max_seq_length,
            max_tokens=self.options.max_tokens,
            seed=self.seed,
        )
        speed = None
        measured = [self.base.model, last]
        if with_speed and self.options.benchmark and not all(map(fits_with_weights, measured)):
            notes = (
                *notes,
                "No speed was measured: a model that does not fit into memory is read again for each token.",
            )
        elif with_speed and self.options.benchmark:  # in one process: several would slow each other down
            speed = on_main_process(lambda: measure_speed({"base": self.base.model, "pruned": last}))
        return EvalReport(
            base_model=self.base.name,
            dataset=DatasetFacts(test.name, test.revision, test.fingerprint, self.split.how),
            size=size,
            loss=replace(build_loss_facts(self.losses, losses, seed=self.seed), predicted_excess=predicted_excess),
            environment=Environment.current(dtype_name(last)),
            speed=SpeedFacts(speed["base"], speed["pruned"]) if speed else None,
            budget=search,
            general=general,
            notes=notes,
        )
