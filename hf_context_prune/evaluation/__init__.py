"""Evaluation: losses on held-out text, speed, memory and size, and the report that holds them."""

from hf_context_prune.evaluation.reports.report import (
    DatasetFacts,
    Environment,
    EvalReport,
    LossBudget,
    LossFacts,
    MemoryFacts,
    MultipleChoiceFacts,
    SizeFacts,
    SpeedFacts,
    TextLosses,
)
from hf_context_prune.evaluation.reports.run_report import AnyReport, ReportTable, RunReport, load_report

from .bootstrap import Estimate
from .multiple_choice import Accuracy, Answer, PairedAccuracy, answer_questions, compare_answers, summarize_answers
from .perplexity import (
    DocumentLoss,
    LossComparison,
    LossSummary,
    choose_documents,
    compare_losses,
    document_losses,
    summarize_losses,
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
    "Accuracy",
    "Answer",
    "AnyReport",
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
    "MultipleChoiceFacts",
    "PairedAccuracy",
    "ReportTable",
    "RunReport",
    "SizeFacts",
    "SpeedFacts",
    "SpeedMeasurement",
    "SpeedRatio",
    "Spread",
    "TextLosses",
    "answer_questions",
    "choose_documents",
    "compare_answers",
    "compare_losses",
    "count_parameters",
    "document_losses",
    "load_report",
    "measure_peak_memory",
    "measure_speed",
    "speed_ratio",
    "summarize_answers",
    "summarize_losses",
    "weight_bytes",
]
