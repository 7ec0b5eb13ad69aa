"""Model + tokenizer + text -> the same with fewer tokens: count, choose, rebuild, trim, refit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig, VocabCriterion
from hf_context_prune.data.documents import TextSource, load_documents
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.errors import ConfigError, DataError, NumericsError, VocabularyError, unknown_name
from hf_context_prune.modeling.architectures import check_supported
from hf_context_prune.modeling.patching import bfloat16_layers
from hf_context_prune.modeling.plan import PruningPlan, Vocabulary, fingerprint
from hf_context_prune.modeling.specs import read_geometry
from hf_context_prune.modeling.token_rows import iter_token_ids, num_rows
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.utils.distributed import on_main_process

from .chat_template import template_ids
from .rebuild import order_of, pruned_state, rebuild_tokenizer, table_of
from .refit import refit_to_text
from .selection import TokenCounts, VocabularySize, choose, count_tokens, expected_scores, must_stay
from .tokens import TokenTable

_SAMPLES, _LENGTH, _BATCH = 128, 512, 4


@dataclass(frozen=True)
class TrimmedModel:
    """A model with its tokenizer after tokens were removed.

    Attributes:
        model: The smaller model, in evaluation mode.
        tokenizer: The smaller tokenizer, as `AutoTokenizer` opens it.
        plan: The kept tokens; all other units are kept.
        zeroed_by_paper: Ids whose rows the paper's code zeroes, where a threshold chose; some of them may have to stay.
    """

    model: PreTrainedModel
    tokenizer: Any
    plan: PruningPlan
    zeroed_by_paper: frozenset[int] = frozenset()


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    data: Any,  # noqa: ANN401 - whatever load_documents reads
    *,
    vocab_size: int | None = None,
    vocab_coverage: float | None = None,
    vocab_min_count: int | None = None,
    multiple: int = 64,
    criterion: VocabCriterion = "expected",
    refit: bool = True,
    keep: Collection[str] = (),
    remove: Collection[str] = (),
    seed: int = 0,
) -> TrimmedModel:
    """Remove the tokens that a domain does not need; any text still goes in and out.

    Text made of kept tokens is encoded to the same tokens as before (see `vocabulary.tokens` for why), and decoding an
    encoded text gives what it gave before.

    Args:
        model: A causal LM; left as it is.
        tokenizer: Its fast tokenizer; left as it is.
        data: Text of the domain: what [`load_documents`][] reads.
        vocab_size: Tokens to keep. Give this, `vocab_coverage` or `vocab_min_count`.
        vocab_coverage: Share of the text's token occurrences that must be kept tokens, in (0, 1].
        vocab_min_count: Keep tokens that occur at least this often. The paper's threshold t on normalised frequency is
            `vocab_min_count = t * occurrences of all tokens` (arXiv 2312.12682).
        multiple: The number of tokens is rounded up to a multiple of this.
        criterion: ``"frequency"``: tokens by how often the text has them. ``"expected"``: by how many documents have
            them and by how probable the model holds them there (one forward pass over 65,536 tokens).
        refit: Refit the kept rows to the text, see [`refit_to_text`][]; never to worse on withheld text.
        keep: Tokens (their contents) that must stay.
        remove: Tokens that must go.
        seed: Of the choice of text.

    Raises:
        VocabularyError: A tokenizer of another kind, or that does not belong to the model; a token that must stay is
            to be removed.
        BudgetError: Fewer tokens are asked for than must stay; the least is named.
        DataError: The text is empty.
    """
    size = VocabularySize(vocab_size, vocab_coverage, vocab_min_count, multiple)
    check_prunable(model, tokenizer, size, keep=keep, remove=remove)
    source = load_documents(data, tokenizer=tokenizer, seed=seed)
    pruner = VocabularyPruner(model, tokenizer, source, criterion=criterion, keep=keep, remove=remove, seed=seed)
    return pruner.trim(size, refit=refit)


class VocabularyPruner:
    """A model with the text of its domain: what every token is worth, measured once, to be trimmed to any size.

    Args:
        model: A causal LM; left as it is.
        tokenizer: Its fast tokenizer; left as it is.
        source: Text of the domain.
        criterion: As for [`prune_vocabulary`][].
        keep: Tokens (their contents) that must stay.
        remove: Tokens that must go.
        num_samples: Blocks of text for the model's expectation; the refit reads up to four times as many.
        max_seq_length: Tokens a block; no more than the model has positions.
        seed: Of the choice of text.

    Raises:
        ConfigError: An unknown criterion.
        VocabularyError: See [`prune_vocabulary`][].
        DataError: The text is empty.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,  # noqa: ANN401
        source: TextSource,
        *,
        criterion: VocabCriterion = "expected",
        keep: Collection[str] = (),
        remove: Collection[str] = (),
        num_samples: int = _SAMPLES,
        max_seq_length: int = _LENGTH,
        seed: int = 0,
    ) -> None:
        if criterion not in get_args(VocabCriterion):
            raise ConfigError(unknown_name("vocab_criterion", criterion, get_args(VocabCriterion)))
        self.model, self.tokenizer, self.source, self.criterion = model, tokenizer, source, criterion
        self.spec, self.table = check_supported(model), _paired(model, tokenizer)
        if not len(source):
            raise DataError(f"{source.name} has no document, so nothing says which tokens the domain needs.")
        self.needed = required_ids(model, tokenizer, self.table) | _ids_of(self.table, keep, "kept")
        self.unwanted = _ids_of(self.table, remove, "removed")
        length = min(max_seq_length, getattr(model.config, "max_position_embeddings", None) or max_seq_length)
        self.blocks = {"num_samples": num_samples, "max_seq_length": length, "seed": seed}

    def fewest(self, multiple: int) -> int:
        """The fewest tokens that it can be trimmed to."""
        size = VocabularySize(multiple=multiple)
        return min(size.rounded(len(must_stay(self.table, size, self.needed, self.unwanted))), len(self.table))

    @cached_property
    def counts(self) -> TokenCounts:
        """How often the text has every token."""
        return count_tokens(self.tokenizer, self.source)

    @cached_property
    def scores(self) -> Mapping[int, float]:
        """What every token is worth."""
        if self.criterion == "frequency":
            return self.counts.occurrences
        samples = tokenize_samples(self.source, self.tokenizer, **self.blocks)  # type: ignore[arg-type]
        return expected_scores(self.counts, mean_probability(self.model, samples).tolist())

    @torch.no_grad()
    def trim(self, size: VocabularySize, *, refit: bool = True) -> TrimmedModel:
        """The model with the best tokens of a size.

        Raises:
            ConfigError: Not exactly one size is given.
            BudgetError: Fewer tokens are asked for than must stay; the least is named.
            VocabularyError: A token that must stay is to be removed.
        """
        size.check()
        must_stay(self.table, size, self.needed, self.unwanted)  # before anything is measured
        kept = choose(self.table, self.scores, self.counts, size, keep=self.needed, remove=self.unwanted)
        order = order_of(self.table, sorted(kept))
        tokenizer = rebuild_tokenizer(self.tokenizer, pruned_state(self.table, order), self.spec.model_type)
        model = self.model
        plan = replace(
            PruningPlan.identity(model.config.model_type, read_geometry(model.config, self.spec), fingerprint(model)),
            vocabulary=Vocabulary(num_rows(model), tuple(order)),
        )
        smaller = apply_plan(model, plan).eval()
        total = sum(self.counts.occurrences.values())
        facts: dict[str, Any] = {
            "criterion": self.criterion,
            "tokens_before": len(self.table),
            "tokens_counted": total,
            "coverage": sum(self.counts.occurrences[index] for index in kept) / total,
            "refit": None,
        }
        zeroed: set[int] = set()
        if size.above_share is not None:
            stay = {index for index, count in self.counts.occurrences.items() if count}
            stay = (stay - self.counts.rare(size.above_share)) | set(self.tokenizer.all_special_ids)
            zeroed = self.table.contents.keys() - stay
        if refit:
            facts["refit"] = refit_to_text(smaller, tokenizer, self.source, **self.blocks)
        return TrimmedModel(smaller, tokenizer, replace(plan, provenance={"vocabulary": facts}), frozenset(zeroed))


def required_ids(model: PreTrainedModel, tokenizer: Any, table: TokenTable) -> set[int]:  # noqa: ANN401
    """Ids that the configs, the tokenizer's special tokens and the chat template rely on.

    Raises:
        VocabularyError: A config names an id that the tokenizer lacks, or an ordinary token as the begin or end of a
            text that the tokenizer begins or ends otherwise.
    """
    ids = {index for index in tokenizer.all_special_ids if index in table.contents}
    special = ids | tokenizer.added_tokens_decoder.keys()
    for kind, config in (("config", model.config), ("generation_config", model.generation_config)):
        for name, index in iter_token_ids(config) if config is not None else ():
            if index not in table.contents:
                raise VocabularyError(
                    f"{kind}.{name} is {index}, which is no token of the tokenizer, so it would have no id in the "
                    f"smaller vocabulary. Load the tokenizer from where the model came from, or set it to one of the "
                    f"tokenizer's ids."
                )
            own = getattr(tokenizer, name, None) if name in ("bos_token_id", "eos_token_id") else None
            if own is not None and own != index and index not in special:
                raise VocabularyError(
                    f"{kind}.{name} is {index}, which is the ordinary token {table.contents[index]!r} of this "
                    f"tokenizer; its own is {tokenizer.convert_ids_to_tokens(own)!r} ({own}): they don't belong "
                    f"together. Load the tokenizer from where the model came from, or set {kind}.{name} to {own}."
                )
            ids.add(index)
    return ids | template_ids(tokenizer)


@torch.no_grad()
def mean_probability(model: PreTrainedModel, samples: torch.Tensor) -> torch.Tensor:
    """How probable the model holds every token, on average over all positions, [rows] float64 on the CPU.

    Args:
        model: The dense model.
        samples: Token blocks, [blocks, length], int64.

    Raises:
        NumericsError: The model's logits are not finite.
    """
    total = torch.zeros(num_rows(model), dtype=torch.float64)
    name = "hf_context_prune.vocabulary"
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for batch in tqdm(samples.split(_BATCH), desc="Expecting tokens", unit="batch", name=name):
            with bfloat16_layers(model):
                logits = model(input_ids=batch.to(model.device), use_cache=False).logits
            for rows in logits:  # one block's float32 probabilities at a time
                total += rows.float().softmax(dim=-1).sum(dim=0)[: len(total)].double().cpu()
    finally:
        for module in training:
            module.training = True
    if not bool(torch.isfinite(total).all()):
        raise NumericsError(
            f"The model's logits on this text are not finite. Check the weights for NaN or Inf, or load the model in a "
            f"wider dtype than {model.dtype}."
        )
    return total / samples.numel()


def check_prunable(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    size: VocabularySize | None,
    *,
    keep: Collection[str] = (),
    remove: Collection[str] = (),
) -> None:
    """Refuse what can't be pruned, or not to that size, before any text is read.

    Args:
        model: A causal LM.
        tokenizer: Its fast tokenizer.
        size: How many tokens stay; None: that is to be found.
        keep: Tokens (their contents) that must stay.
        remove: Tokens that must go.

    Raises:
        VocabularyError: See [`prune_vocabulary`][].
        BudgetError: The size can't be reached.
    """
    spec, table = check_supported(model), _paired(model, tokenizer)
    needed = required_ids(model, tokenizer, table) | _ids_of(table, keep, "kept")
    if size is not None:
        size.check()
        must_stay(table, size, needed, _ids_of(table, remove, "removed"))
    whole = pruned_state(table, order_of(table, sorted(table.contents)))
    rebuild_tokenizer(tokenizer, whole, spec.model_type)  # whether its class opens what is written


_SPARE_ROWS = (1024, 0.05)
"""Embedding rows beyond the tokenizer that padding explains: a number, or a share of the rows if that is more."""


def _paired(model: PreTrainedModel, tokenizer: Any) -> TokenTable:  # noqa: ANN401
    """The tokenizer's vocabulary, if it can be this model's.

    Raises:
        VocabularyError: It has tokens of its own without a row, or far fewer tokens than there are rows.
    """
    rows = num_rows(model)
    table = table_of(tokenizer, rows)
    highest, (number, share) = max(table.contents), _SPARE_ROWS
    if highest >= rows:
        raise VocabularyError(
            f"The tokenizer has ids up to {highest:,}, the model only {rows:,} embedding rows: they don't belong "
            f"together. Load the tokenizer from where the model came from."
        )
    if rows - highest - 1 > max(number, share * rows):
        raise VocabularyError(
            f"The model has {rows:,} embedding rows, the tokenizer ids up to {highest:,} only: they don't belong "
            f"together. Load the tokenizer from where the model came from."
        )
    return table


def _ids_of(table: TokenTable, tokens: Collection[str], what: str) -> set[int]:
    known = {content: index for index, content in table.contents.items()}
    if isinstance(tokens, str) or not isinstance(tokens, Collection):
        raise VocabularyError(f"The tokens to be {what} are {tokens!r}; give a list of tokens.")
    for token in tokens:
        if token not in known:
            raise VocabularyError(
                f"{token!r} is to be {what}, but the tokenizer has no such token (tokens are written as in its "
                f"vocabulary: tokenizer.tokenize(text) shows them)."
            )
    return {known[token] for token in tokens}


def build_vocabulary_pruner(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    text: TextSource,
    config: PrunerConfig,
) -> VocabularyPruner:
    """The vocabulary pruner that a config describes."""
    return VocabularyPruner(
        model,
        tokenizer,
        text,
        criterion=config.vocab_criterion,
        num_samples=config.num_calibration_samples,
        max_seq_length=config.max_seq_length,
        seed=config.pruning_seed,
    )


def vocabulary_size(config: PrunerConfig) -> VocabularySize | None:
    """How many tokens a config asks for; None where that is to be found."""
    if config.vocab_auto:
        return None
    return VocabularySize(
        config.vocab_size,
        config.vocab_coverage,
        config.vocab_min_count,
        config.pad_to_multiple_of,
        config.embedding_threshold,
    )


def prune_vocabulary_for(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    text: TextSource,
    config: PrunerConfig,
    tokens: int | None = None,
) -> TrimmedModel:
    """The model with the vocabulary that a config asks for, or with a number of tokens that was found."""
    size = VocabularySize(tokens, multiple=config.pad_to_multiple_of) if tokens else vocabulary_size(config)
    assert size is not None
    return on_main_process(
        lambda: build_vocabulary_pruner(model, tokenizer, text, config).trim(
            size, refit=config.reconstruction != "none"
        )
    )
