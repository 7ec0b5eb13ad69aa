"""What a report says of a pruned vocabulary."""

from __future__ import annotations

from ..data import TextSource
from ..plan import PruningPlan


def vocabulary_note(plan: PruningPlan, text: TextSource) -> tuple[str, ...]:
    """A sentence on the vocabulary for the report, where it was or could have been pruned."""
    if plan.vocabulary is None and plan.provenance.get("considered_vocabularies"):
        return ("Vocabulary: all tokens stay, since fewer would cost more than neurons and KV groups do.",)
    if plan.vocabulary is None:
        return ()
    facts = plan.provenance["vocabulary"]
    refit = facts["refit"]
    repaired = "their rows are as they were"
    if refit is not None and refit["share"]:
        repaired = (
            f"their rows were refitted ({refit['before']:.3f} -> {refit['after']:.3f} nats a token, withheld blocks)"
        )
    return (
        f"Vocabulary: {len(plan.vocabulary.kept):,} of {facts['tokens_before']:,} tokens, {facts['coverage']:.2%} of "
        f"the token occurrences in {text.name}; {repaired}. Losses a token don't compare between the two tokenizers; "
        f"bits per byte do.",
    )
