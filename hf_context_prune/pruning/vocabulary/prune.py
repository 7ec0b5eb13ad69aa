"""Model + tokenizer + text -> both with a smaller vocabulary: count, choose, rebuild, trim, refit."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import add
from typing import Any, get_args

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.config import DEFAULT_PAD_TO_MULTIPLE_OF, PrunerConfig, ThresholdConfig, VocabCriterion
from hf_context_prune.data.balance import check_sources, split_by_source
from hf_context_prune.data.documents import TextData, TextSource, load_documents
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.errors import ConfigError, DataError, NumericsError, PruningWarning, unknown_name
from hf_context_prune.modeling.in_turns import forward_in_turns
from hf_context_prune.modeling.inference import evaluation_mode
from hf_context_prune.modeling.offloaded import map_offloaded
from hf_context_prune.modeling.patching import bfloat16_layers
from hf_context_prune.modeling.plan import PruningPlan, fingerprint
from hf_context_prune.modeling.plan_vocabulary import Vocabulary
from hf_context_prune.modeling.token_rows import num_rows
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.utils.distributed import on_main_process
from hf_context_prune.utils.precision import overflow_remedy

from .checks import check_prunable, find_ids, read_paired_table, required_ids
from .rebuild import build_state, order_ids, rebuild_tokenizer
from .refit import refit_to_text
from .selection import (
    TokenCounts,
    VocabularySize,
    choose_tokens,
    count_tokens,
    expected_scores,
    mandatory_tokens,
)

_SAMPLES, _LENGTH, _BATCH = 128, 512, 4
_ROWS = 32
"""Tokens whose probabilities are computed at once: few enough for the processor's cache."""
EXPECTATION_TOKENS = 8_192
"""Tokens of text on which the model's expectation of every token is averaged."""


@dataclass(frozen=True)
class TrimmedModel:
    """A model and its tokenizer with a smaller vocabulary.

    Attributes:
        model: The smaller model, in evaluation mode.
        tokenizer: The smaller tokenizer, as `AutoTokenizer` opens it.
        plan: The kept tokens; neurons and KV groups are all kept.
        zeroed_by_paper: Ids whose rows the paper's code zeroes, for a size by threshold; some of them may have to stay.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: PruningPlan
    zeroed_by_paper: frozenset[int] = frozenset()


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TextData,
    *,
    vocab_size: int | None = None,
    vocab_coverage: float | None = None,
    vocab_min_count: int | None = None,
    pad_to_multiple_of: int = DEFAULT_PAD_TO_MULTIPLE_OF,
    criterion: VocabCriterion = "expected",
    refit: bool = True,
    keep: Collection[str] = (),
    remove: Collection[str] = (),
    seed: int = 0,
    balance_sources: bool = False,
) -> TrimmedModel:
    """Remove the vocabulary entries that a domain does not need; any text can still be encoded and decoded.

    Text made of kept tokens is encoded to the same tokens as before (see `vocabulary.tokens` for why), and decoding an
    encoded text returns the same text as before.

    Args:
        model: A causal LM; unchanged.
        tokenizer: Its fast tokenizer; unchanged.
        data: Text of the domain, in any form that [`load_documents`][] reads.
        vocab_size: Tokens to keep. Give this, `vocab_coverage` or `vocab_min_count`.
        vocab_coverage: Share of the text's token occurrences that must be kept tokens, in (0, 1].
        vocab_min_count: Keep tokens that occur at least this often. The paper's threshold t on normalised frequency is
            `vocab_min_count = t * occurrences of all tokens` (arXiv 2312.12682).
        pad_to_multiple_of: The number of tokens is rounded up to a multiple of this.
        criterion: ``"frequency"`` ranks tokens by their occurrences in the text. ``"expected"`` ranks them by how many
            documents have them and by their probability under the model there (one forward pass over
            `EXPECTATION_TOKENS` of text).
        refit: Refit the kept rows to the text, see [`refit_to_text`][]; never to a higher loss on validation text.
        keep: Tokens (their contents) that must stay.
        remove: Tokens that must go.
        seed: For the choice of text.
        balance_sources: Rank tokens by the mean over the text's sources, and refit to as much text of each.

    Returns:
        The smaller model, its tokenizer, and the plan with the kept tokens: `trimmed.model`, `trimmed.tokenizer`,
        `trimmed.plan`.

    Raises:
        VocabularyError: The tokenizer is of an unsupported kind or does not belong to the model, or a token that must
            stay is to be removed.
        BudgetError: Fewer tokens are asked for than must stay; the message names the least.
        DataError: The text is empty, or `balance_sources` is given and it has a single source.
    """
    size = VocabularySize(vocab_size, vocab_coverage, vocab_min_count, pad_to_multiple_of)
    model = map_offloaded(model)
    check_prunable(model, tokenizer, size, keep=keep, remove=remove)
    source = load_documents(data, tokenizer=tokenizer, seed=seed)
    if balance_sources:
        check_sources(source)
    options: dict[str, Any] = {"criterion": criterion, "keep": keep, "remove": remove, "seed": seed}
    pruner = VocabularyPruner(model, tokenizer, source, **options, balance_sources=balance_sources)
    return pruner.trim(size, refit=refit, share=False)


class VocabularyPruner:
    """A model with the text of its domain: scores every token once, and trims the vocabulary to any size.

    Args:
        model: A causal LM; unchanged.
        tokenizer: Its fast tokenizer; unchanged.
        source: Text of the domain.
        criterion: As for [`prune_vocabulary`][].
        keep: Tokens (their contents) that must stay.
        remove: Tokens that must go.
        num_samples: Samples for the refit, which reads up to four times as many.
        max_seq_length: Tokens per sample; no more than the model has positions.
        seed: For the choice of text.
        balance_sources: As for [`prune_vocabulary`][].
        general: General text whose tokens count too.
        general_share: Weight of its tokens, in [0, 1).
        expected: The model's mean probability of each token, [rows] float64, where it was measured before; None: it is
            measured on the text.

    Raises:
        ConfigError: An unknown criterion.
        VocabularyError: See [`prune_vocabulary`][].
        DataError: The text is empty.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: TextSource,
        *,
        criterion: VocabCriterion = "expected",
        keep: Collection[str] = (),
        remove: Collection[str] = (),
        num_samples: int = _SAMPLES,
        max_seq_length: int = _LENGTH,
        seed: int = 0,
        balance_sources: bool = False,
        general: TextSource | None = None,
        general_share: float = 0.0,
        expected: torch.Tensor | None = None,
    ) -> None:
        if criterion not in get_args(VocabCriterion):
            raise ConfigError(unknown_name("vocab_criterion", criterion, get_args(VocabCriterion)))
        self.model, self.tokenizer, self.source, self.criterion = model, tokenizer, source, criterion
        self.view, self.table = ModelView.of(model), read_paired_table(model, tokenizer)
        if not len(source):
            raise DataError(f"{source.name} has no document, so nothing says which tokens the domain needs.")
        self.needed = required_ids(model, tokenizer, self.table) | find_ids(self.table, keep, "kept")
        self.unwanted = find_ids(self.table, remove, "removed")
        length = min(max_seq_length, getattr(model.config, "max_position_embeddings", None) or max_seq_length)
        self.sampling = {"num_samples": num_samples, "max_seq_length": length, "seed": seed}
        self.balance_sources = balance_sources
        self.general, self.general_share = general if general_share else None, general_share
        self._expected = expected

    def fewest_tokens(self, multiple: int) -> int:
        """Return the smallest vocabulary that the model can be trimmed to."""
        size = VocabularySize(pad_to_multiple_of=multiple)
        return min(size.round_up(len(mandatory_tokens(self.table, size, self.needed, self.unwanted))), len(self.table))

    @cached_property
    def counts(self) -> TokenCounts:
        """How often the text uses each token."""
        return reduce(add, self._counts_by_source)

    @cached_property
    def _counts_by_source(self) -> list[TokenCounts]:
        """Counts of the texts that count equally: of the sources, or of the text as a whole."""
        texts = split_by_source(self.source) if self.balance_sources else [self.source]
        return [count_tokens(self.tokenizer, text) for text in texts]

    @cached_property
    def expected(self) -> torch.Tensor:
        """The model's mean probability of each token on text of the domain, [rows] float64."""
        if self._expected is not None:
            return self._expected
        length = self.sampling["max_seq_length"]
        count = min(self.sampling["num_samples"], max(1, EXPECTATION_TOKENS // length))
        samples = tokenize_samples(
            self.source,
            self.tokenizer,
            num_samples=count,
            max_seq_length=length,
            seed=self.sampling["seed"],
            warn_if_short=False,
            balance_sources=self.balance_sources,
        )
        return mean_probability(self.model, samples)

    @cached_property
    def scores(self) -> Mapping[int, float]:
        """Score of each token, by id; higher is kept. Of several texts, a weighted mean of what they say."""
        own = 1 - self.general_share if self.general is not None else 1.0
        parts = [(own / len(self._counts_by_source), self._scores_on(counts)) for counts in self._counts_by_source]
        if self.general is not None:
            parts.append((self.general_share, self._scores_on(count_tokens(self.tokenizer, self.general))))
        if len(parts) == 1:
            return parts[0][1]
        scores: dict[int, float] = {}
        for weight, found in parts:
            whole = sum(found.values())
            for index, score in found.items():
                scores[index] = scores.get(index, 0.0) + weight * score / whole
        return scores

    def _scores_on(self, counts: TokenCounts) -> Mapping[int, float]:
        """Return the scores by the counts of one text."""
        if self.criterion == "frequency":
            return counts.occurrences
        return expected_scores(counts, self.expected.tolist())

    @torch.no_grad()
    def trim(self, size: VocabularySize, *, refit: bool = True, share: bool = True) -> TrimmedModel:
        """Return the model and the tokenizer with the best tokens of a size.

        Args:
            size: How many tokens stay.
            refit: As for [`prune_vocabulary`][].
            share: As for [`apply_plan`][]: the layers are those of the base model.

        Raises:
            ConfigError: Not exactly one size is given.
            BudgetError: Fewer tokens are asked for than must stay; the message names the least.
            VocabularyError: A token that must stay is to be removed.
        """
        size.check()
        mandatory_tokens(self.table, size, self.needed, self.unwanted)  # refuses a size before anything is measured
        kept = choose_tokens(self.table, self.scores, self.counts, size, keep=self.needed, remove=self.unwanted)
        order = order_ids(self.table, sorted(kept))
        if size.tokens is None and len(order) == num_rows(self.model):
            _warn_of_whole_vocabulary(len(order), size)
        tokenizer = rebuild_tokenizer(self.tokenizer, build_state(self.table, order), self.view.spec.model_type)
        model = self.model
        plan = replace(
            PruningPlan.identity(model.config.model_type, self.view.geometry, fingerprint(model)),
            vocabulary=Vocabulary(num_rows(model), tuple(order)),
        )
        smaller = apply_plan(model, plan, share=share).eval()
        total = sum(self.counts.occurrences.values())
        facts: dict[str, Any] = {
            "criterion": self.criterion,
            "tokens_before": len(self.table),
            "tokens_counted": total,
            "coverage": sum(self.counts.occurrences[index] for index in kept) / total,
            "refit": None,
        }
        if refit:
            facts["refit"] = refit_to_text(
                smaller, tokenizer, self.source, **self.sampling, balance_sources=self.balance_sources
            )
        plan = replace(plan, provenance={"vocabulary": facts})
        return TrimmedModel(smaller, tokenizer, plan, self._zeroed_by_paper(size.above_share))

    def _zeroed_by_paper(self, threshold: float | None) -> frozenset[int]:
        """Return the ids whose rows the paper's code zeroes at a threshold; none without one."""
        if threshold is None:
            return frozenset()
        used = {index for index, count in self.counts.occurrences.items() if count}
        stay = (used - self.counts.rare(threshold)) | set(self.tokenizer.all_special_ids)
        return frozenset(self.table.contents.keys() - stay)


def _warn_of_whole_vocabulary(tokens: int, size: VocabularySize) -> None:
    names = {"vocab_coverage": size.coverage, "vocab_min_count": size.min_count}
    names["embedding_threshold"] = size.above_share
    asked = next(f"{name}={value:g}" for name, value in names.items() if value is not None)
    warnings.warn(
        f"No vocabulary entry is removed: {asked}, rounded up to a multiple of pad_to_multiple_of="
        f"{size.pad_to_multiple_of:,}, keeps all {tokens:,}.",
        PruningWarning,
        stacklevel=2,
    )


def mean_probability(model: PreTrainedModel, samples: torch.Tensor) -> torch.Tensor:
    """Return the model's probability of each token, averaged over all positions, [rows] float64 on the CPU.

    Args:
        model: The base model.
        samples: [samples, length], int64.

    Raises:
        NumericsError: The model's logits are not finite.
    """
    total = torch.zeros(num_rows(model), dtype=torch.float64)
    name = "hf_context_prune.vocabulary"
    batches = [{"input_ids": batch.to(model.device)} for batch in samples.split(_BATCH)]
    with evaluation_mode(model), bfloat16_layers(model):
        outputs = forward_in_turns(model, batches)
        for output in tqdm(outputs, total=len(batches), desc="Expecting tokens", unit="batch", name=name):
            for rows in output.logits.flatten(0, 1).split(_ROWS):
                total += rows.float().softmax(dim=-1).sum(dim=0)[: len(total)].double().cpu()
    if not bool(torch.isfinite(total).all()):
        raise NumericsError(f"The model's logits on this text are not finite. {overflow_remedy(model.dtype)}")
    return total / samples.numel()


def build_vocabulary_pruner(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    config: PrunerConfig | ThresholdConfig,
    *,
    general: TextSource | None = None,
    expected: torch.Tensor | None = None,
) -> VocabularyPruner:
    """Build the vocabulary pruner that a config describes; the other arguments are those of [`VocabularyPruner`][]."""
    return VocabularyPruner(
        model,
        tokenizer,
        text,
        criterion=config.vocab_criterion,
        num_samples=config.num_calibration_samples,
        max_seq_length=config.max_seq_length,
        seed=config.pruning_seed,
        balance_sources=config.balance_sources,
        general=general,
        general_share=config.general_data_ratio or 0.0,
        expected=expected,
    )


def vocabulary_size(config: PrunerConfig | ThresholdConfig) -> VocabularySize | None:
    """Return how many tokens a config keeps; None where that is to be found."""
    multiple = config.pad_to_multiple_of
    if isinstance(config, ThresholdConfig):
        return VocabularySize(pad_to_multiple_of=multiple, above_share=config.embedding_threshold)
    if not config.fixes_tokens:
        return None
    return VocabularySize(config.vocab_size, config.vocab_coverage, config.vocab_min_count, multiple)


def prune_vocabulary_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TextSource,
    config: PrunerConfig | ThresholdConfig,
    tokens: int | None = None,
    **known: Any,  # noqa: ANN401 - handed on
) -> TrimmedModel:
    """Prune the vocabulary to the size of a config, or to a number of tokens that was found, without a refit.

    `known` is what [`build_vocabulary_pruner`][] takes beside these.
    """
    size = VocabularySize(tokens, pad_to_multiple_of=config.pad_to_multiple_of) if tokens else vocabulary_size(config)
    assert size is not None
    return on_main_process(
        lambda: build_vocabulary_pruner(model, tokenizer, text, config, **known).trim(size, refit=False)
    )
