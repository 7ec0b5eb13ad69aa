"""What a report says of a pruned vocabulary, and of rows that were refitted."""

from __future__ import annotations

from collections.abc import Mapping

from hf_context_prune.data.documents import TextSource
from hf_context_prune.modeling.plan import PruningPlan


def vocabulary_note(plan: PruningPlan, text: TextSource) -> tuple[str, ...]:
    """A sentence on the vocabulary for the report, where it was or could have been pruned."""
    if plan.vocabulary is None and plan.provenance.get("considered_vocabularies"):
        return ("Vocabulary: all tokens stay, since fewer would cost more than neurons and KV groups do.",)
    if plan.vocabulary is None:
        return ()
    facts = plan.provenance["vocabulary"]
    return (
        f"Vocabulary: {len(plan.vocabulary.kept):,} of {facts['tokens_before']:,} tokens, {facts['coverage']:.2%} of "
        f"the token occurrences in {text.name}; {_rows(facts['refit'])}. Losses a token compare between two tokenizers "
        f"only where both cut the text into as many tokens; bits per byte always do.",
    )


def refit_note(plan: PruningPlan) -> tuple[str, ...]:
    """A sentence on what `refit_lm_head=True` gave, where it was asked for."""
    if "refit" not in plan.provenance:
        return ()
    refit = plan.provenance["refit"]
    why = ""
    if refit is None:
        why = ", since the text is too little to withhold some of it, or the logits are not linear in the hidden states"
    return (f"With the blocks done, {_rows(refit)}{why}.",)


def _rows(refit: Mapping[str, float] | None) -> str:
    if refit is None:
        return "the rows of the tokens are as they were"
    if not refit["share"]:
        return "the rows of the tokens are as they were, since withheld text would not have gained"
    return (
        f"the rows of the tokens were refitted ({refit['before']:.3f} -> {refit['after']:.3f} nats a token, withheld "
        f"blocks)"
    )
