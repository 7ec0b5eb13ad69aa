"""Example prompts by domain, for a Space without prompts of its own."""

from __future__ import annotations

LICENCE_PROMPTS = (
    "Redistribution and use in source and binary forms, with or without modification,",
    "THE SOFTWARE IS PROVIDED",
    "You may copy and distribute verbatim copies of the Program's source code",
)
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


def choose_prompts(name: str) -> tuple[str, ...]:
    """Return the prompts of the domain that a name contains; general ones for any other name."""
    for words, prompts in _BY_WORD.items():
        if any(word in name.lower() for word in words):
            return prompts
    return _GENERAL
