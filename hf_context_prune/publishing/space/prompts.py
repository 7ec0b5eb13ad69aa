"""Example prompts by domain, for a Space that is given none."""

from __future__ import annotations

from hf_context_prune.data.demo import LICENCE_PROMPTS

_GENERAL = ("The most important point is", "In other words,", "What should I know about this topic?")
_BY_WORD = {
    ("medic", "clinic", "health", "pubmed"): (
        "What are the symptoms of type 2 diabetes?",
        "Chronic kidney disease is a condition in which",
        "How is asthma treated?",
    ),
    ("licen",): LICENCE_PROMPTS,
    ("law", "legal", "contract", "court"): (
        "This Agreement shall be governed by the laws of",
        "The court held that the defendant",
        "What is the difference between civil and criminal law?",
    ),
    ("financ", "bank", "econom"): (
        "The Federal Reserve decided to raise interest rates because",
        "Net income for the fiscal year increased",
        "What is the difference between a stock and a bond?",
    ),
}


def prompts_for(name: str) -> tuple[str, ...]:
    """Prompts of the domain that a name speaks of; general ones for any other name."""
    for words, prompts in _BY_WORD.items():
        if any(word in name.lower() for word in words):
            return prompts
    return _GENERAL
