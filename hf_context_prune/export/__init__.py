"""Pruned models in other formats: quantised (Optimum, torchao), ONNX, GGUF; compared before they are kept."""

from hf_context_prune.storage.saving import EXPORT_REPORT_NAME

from .report import ExportReport
from .run import ExportResult, export, open_export, read_export
from .verify import Verification

__all__ = [
    "EXPORT_REPORT_NAME",
    "ExportReport",
    "ExportResult",
    "Verification",
    "export",
    "open_export",
    "read_export",
]
