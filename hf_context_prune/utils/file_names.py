"""Names of the files that this package writes beside the weights."""

from __future__ import annotations

MANIFEST_NAME = "manifest.json"
PLAN_NAME = "pruning_plan.json"
CONFIG_NAME = "pruner_config.json"
REPORT_NAME = "eval_report.json"
EXPORT_REPORT_NAME = "export_report.json"
CARD_NAME = "README.md"
MODELFILE_NAME = "Modelfile"
RESULTS_NAME = ".eval_results/questions.yaml"
PICTURE_NAME = "widths.png"
SPACE_SETTINGS_NAME = "space.yaml"
REPORT_MARKDOWN_NAME = "report.md"
PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)
"""What `transformers` reads of a processor of images beside its tokenizer."""
