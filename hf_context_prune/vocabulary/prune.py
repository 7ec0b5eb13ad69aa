"""Model + tokenizer + text -> the same with fewer tokens: count, choose, rebuild, trim, refit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import jinja2
import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from ..architectures import check_supported, read_geometry
from ..config import VocabCriterion
from ..data import TextSource, load_documents, token_blocks
from ..embeddings import named_ids, num_rows
from ..errors import ConfigError, DataError, NumericsError, VocabularyError, unknown
from ..linalg import fast_matmul
from ..plan import PruningPlan, Vocabulary, fingerprint
from ..surgery import apply_plan
from .rebuild import order_of, pruned_state, rebuilt, table_of
from .refit import refit_rows
from .selection import VocabularySize, choose, count_tokens, expected_scores
from .tokens import TokenTable

_SAMPLES, _LENGTH, _BATCH = 128, 512, 4


@dataclass(frozen=True)
class TrimmedModel:
    """A model with its tokenizer after tokens were removed.

    Attributes:
        model: The smaller model, in evaluation mode.
        tokenizer: The smaller tokenizer, as `AutoTokenizer` opens it.
        plan: The kept tokens; all other units are kept.
    """

    model: PreTrainedModel
    tokenizer: Any
    plan: PruningPlan


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
        refit: Refit the kept rows to the text, see [`refit_rows`][]; never to worse on withheld text.
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
    size.check()
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
        num_samples: Blocks of text for the model's expectation, and for the refit.
        max_seq_length: Tokens a block.
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
            raise ConfigError(unknown("vocab_criterion", criterion, get_args(VocabCriterion)))
        self.model, self.tokenizer, self.source, self.criterion = model, tokenizer, source, criterion
        self.spec, self.table = check_supported(model), table_of(tokenizer)
        _check_pair(model, self.table)
        if not len(source):
            raise DataError(f"{source.name} has no document, so nothing says which tokens the domain needs.")
        self.needed = required_ids(model, tokenizer, self.table) | _ids_of(self.table, keep, "kept")
        self.unwanted = _ids_of(self.table, remove, "removed")
        self.blocks = {"num_samples": num_samples, "max_seq_length": max_seq_length, "seed": seed}
        self.counts = count_tokens(tokenizer, source)
        self.scores: Mapping[int, float] = self.counts.occurrences
        if criterion == "expected":
            samples = token_blocks(source, tokenizer, **self.blocks)  # type: ignore[arg-type]
            self.scores = expected_scores(self.counts, mean_probability(model, samples).tolist())

    @torch.no_grad()
    def trim(self, size: VocabularySize, *, refit: bool = True) -> TrimmedModel:
        """The model with the best tokens of a size.

        Raises:
            ConfigError: Not exactly one size is given.
            BudgetError: Fewer tokens are asked for than must stay; the least is named.
            VocabularyError: A token that must stay is to be removed.
        """
        size.check()
        kept = choose(self.table, self.scores, self.counts, size, keep=self.needed, remove=self.unwanted)
        order = order_of(self.table, sorted(kept))
        tokenizer = rebuilt(self.tokenizer, pruned_state(self.table, order), self.spec.model_type)
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
        if refit:
            facts["refit"] = refit_rows(smaller, token_blocks(self.source, tokenizer, **self.blocks))  # type: ignore[arg-type]
        return TrimmedModel(smaller, tokenizer, replace(plan, provenance={"vocabulary": facts}))


def required_ids(model: PreTrainedModel, tokenizer: Any, table: TokenTable) -> set[int]:  # noqa: ANN401
    """Ids that the configs, the tokenizer's special tokens and the chat template rely on.

    Raises:
        VocabularyError: A config names an id that the tokenizer lacks.
    """
    ids = {index for index in tokenizer.all_special_ids if index in table.contents}
    for kind, config in (("config", model.config), ("generation_config", model.generation_config)):
        for name, index in named_ids(config) if config is not None else ():
            if index not in table.contents:
                raise VocabularyError(
                    f"{kind}.{name} is {index}, which is no token of the tokenizer, so it would have no id in the "
                    f"smaller vocabulary. Set it to one of the tokenizer's ids."
                )
            ids.add(index)
    return ids | _template_ids(tokenizer)


def _template_ids(tokenizer: Any) -> set[int]:  # noqa: ANN401
    """Tokens of conversations that hold nothing but what the chat template (or each of several) writes."""
    templates = getattr(tokenizer, "chat_template", None)
    turns = [{"role": role, "content": ""} for role in ("system", "user", "assistant")]
    found: set[int] = set()
    for template in templates.values() if isinstance(templates, Mapping) else [templates] if templates else ():
        for messages in (turns, turns[1:], turns[1:2]):
            options = {"tokenize": False, "add_generation_prompt": len(messages) == 1, "chat_template": template}
            try:
                text = tokenizer.apply_chat_template(messages, **options)
            except jinja2.TemplateError:  # some templates refuse a system turn, or turns without a user
                continue
            found.update(tokenizer.encode(text, add_special_tokens=False))
    return found


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
            with fast_matmul():
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


def _check_pair(model: PreTrainedModel, table: TokenTable) -> None:
    highest = max(table.contents)
    if highest >= num_rows(model):
        raise VocabularyError(
            f"The tokenizer has ids up to {highest:,}, the model only {num_rows(model):,} embedding rows: they don't "
            f"belong together. Load the tokenizer from where the model came from."
        )


def _ids_of(table: TokenTable, tokens: Collection[str], what: str) -> set[int]:
    known = {**table.vocab, **table.added}
    for token in tokens:
        if token not in known:
            raise VocabularyError(
                f"{token!r} is to be {what}, but the tokenizer has no such token (tokens are written as in its "
                f"vocabulary: tokenizer.tokenize(text) shows them)."
            )
    return {known[token] for token in tokens}
