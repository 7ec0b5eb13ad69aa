"""Sentences of a report on a pruned vocabulary and on refitted rows."""

from __future__ import annotations

from collections.abc import Mapping

from hf_context_prune.data.documents import TextSource
from hf_context_prune.modeling.plan import PruningPlan


def vocabulary_note(plan: PruningPlan, text: TextSource) -> tuple[str, ...]:
    """Return a sentence on the vocabulary, where it was or could have been pruned."""
    if plan.vocabulary is None and plan.provenance.get("considered_vocabularies"):
        return ("Vocabulary: all tokens stay, since removing tokens costs more than removing neurons and KV groups.",)
    if plan.vocabulary is None:
        return ()
    facts = plan.provenance["vocabulary"]
    return (
        f"Vocabulary: {len(plan.vocabulary.kept):,} of {facts['tokens_before']:,} tokens, {facts['coverage']:.2%} of "
        f"the token occurrences in {text.name}; {_describe_rows(facts['refit'])}. Losses per token compare "
        f"across tokenizers only where both cut the text into the same number of tokens; bits per byte always compare.",
    )


def refit_note(plan: PruningPlan) -> tuple[str, ...]:
    """Return a sentence on the effect of `refit_lm_head=True`, where it was asked for."""
    if "refit" not in plan.provenance:
        return ()
    refit = plan.provenance["refit"]
    why = ""
    if refit is None:
        why = ", since there is too little text for validation, or the logits are not linear in the hidden states"
    return (f"After the layers, {_describe_rows(refit)}{why}.",)


def _describe_rows(refit: Mapping[str, float] | None) -> str:
    if refit is None:
        return "the rows of the tokens are unchanged"
    if not refit["share"]:
        return "the rows of the tokens are unchanged, since no refit lowered the loss on validation text"
    return (
        f"the rows of the tokens were refitted ({refit['before']:.3f} -> {refit['after']:.3f} nats per token on "
        f"validation samples)"
    )
