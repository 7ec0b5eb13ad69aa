"""Evaluation: losses on held-out text, speed, memory and size, and the report that holds them."""

from ._bootstrap import Estimate
from .perplexity import (
    DocumentLoss,
    LossComparison,
    LossSummary,
    choose_documents,
    compare_losses,
    document_losses,
    summarize_losses,
)
from .report import (
    DatasetFacts,
    Environment,
    EvalReport,
    LossBudget,
    LossFacts,
    MemoryFacts,
    SizeFacts,
    SpeedFacts,
)
from .speed import (
    MemoryMeasurement,
    SpeedMeasurement,
    SpeedRatio,
    Spread,
    count_parameters,
    measure_peak_memory,
    measure_speed,
    speed_ratio,
    weight_bytes,
)

__all__ = [
    "DatasetFacts",
    "DocumentLoss",
    "Environment",
    "Estimate",
    "EvalReport",
    "LossBudget",
    "LossComparison",
    "LossFacts",
    "LossSummary",
    "MemoryFacts",
    "MemoryMeasurement",
    "SizeFacts",
    "SpeedFacts",
    "SpeedMeasurement",
    "SpeedRatio",
    "Spread",
    "choose_documents",
    "compare_losses",
    "count_parameters",
    "document_losses",
    "measure_peak_memory",
    "measure_speed",
    "speed_ratio",
    "summarize_losses",
    "weight_bytes",
]
