"""Example prompts by domain: of cards, and of Spaces without prompts of their own."""

from __future__ import annotations

import re

from hf_context_prune.evaluation.reports.markdown import one_line
from hf_context_prune.modeling.plan import PruningPlan

LICENCE_PROMPTS = (
    "Redistribution and use in source and binary forms, with or without modification,",
    "THE SOFTWARE IS PROVIDED",
    "You may copy and distribute verbatim copies of the Program's source code",
)
OUTSIDE = (
    "The volcano had slept for three hundred years. When it woke, ash fell on the vineyards, the sky over the harbour "
    "turned purple, and the fishermen sailed home without their nets."
)
"""A text of no domain of a list below: what a model has lost shows on it."""
_GENERAL = (
    "The results of the study show that",
    "The main reason for this decision was",
    "What is the difference between weather and climate?",
)
_BY_WORD = {
    ("medic*", "clinic*", "health*", "pubmed*"): (
        "Chronic kidney disease is a condition in which",
        "What are the symptoms of type 2 diabetes?",
        "How is asthma treated?",
    ),
    ("licen*",): LICENCE_PROMPTS,
    ("law", "laws", "legal", "contract", "contracts", "court", "courts"): (
        "This Agreement shall be governed by the laws of",
        "The court held that the defendant",
        "What is the difference between civil and criminal law?",
    ),
    ("financ*", "bank", "banks", "banking", "econom*"): (
        "The Federal Reserve decided to raise interest rates because",
        "Net income for the fiscal year increased",
        "What is the difference between a stock and a bond?",
    ),
}


def _has_word(name: str, word: str) -> bool:
    """Return whether a name holds a word; one that ends with an asterisk is a beginning of words."""
    end = r"" if word.endswith("*") else r"(?![a-z])"
    return re.search(rf"(?<![a-z]){re.escape(word.rstrip('*'))}{end}", name.lower()) is not None


def choose_prompts(*names: str, domain: str | None = None) -> tuple[str, ...]:
    """Return prompts of a domain, and one text from elsewhere.

    Args:
        names: Names that may hold a word of a domain, such as those of a folder and of its text; the first that does
            decides.
        domain: Name of the domain, which comes first; without a known word it stands in the prompts itself.
    """
    for name in (domain, *names) if domain else names:
        for words, prompts in _BY_WORD.items():
            if any(_has_word(name, word) for word in words):
                return (*prompts, OUTSIDE)
    if domain:
        return (
            f"The most important thing to know about {domain} is that",
            f"An introduction to {domain}:",
            f"Which questions does a beginner in {domain} ask?",
            OUTSIDE,
        )
    return (*_GENERAL, OUTSIDE)


def choose_plan_prompts(plan: PruningPlan) -> tuple[str, ...]:
    """Return prompts of the domain that a plan names, or the name of its text, and one text from elsewhere."""
    names = [plan.data_name] if plan.data_name else []
    return choose_prompts(*names, domain=one_line(plan.domain) if plan.domain else None)
