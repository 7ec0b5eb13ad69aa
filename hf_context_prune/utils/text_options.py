"""The options of a pruning config on the text that is calibrated on."""

from __future__ import annotations

from dataclasses import dataclass

from .options import TEXT, at_least, below_one, name_such_as, option
from .saved_options import SavedOptions

DEFAULT_GENERAL_DATA_RATIO = 0.125


@dataclass(kw_only=True)
class TextOptions(SavedOptions):
    """How much text is calibrated on, and from where it is taken."""

    num_calibration_samples: int = option(128, "Samples of calibration text.", panel=TEXT, allowed=at_least(1))
    max_seq_length: int = option(512, "Tokens per sample.", panel=TEXT, allowed=at_least(2))
    general_data_ratio: float | None = option(
        None,
        "Share of the calibration samples taken from general text instead of domain text, in [0, 1). The model loses a "
        "little more on the domain and forgets less elsewhere. Needs general text (--general-data), of which a tenth "
        f"is then held out to measure on. Default {DEFAULT_GENERAL_DATA_RATIO} with general text, else 0.",
        panel=TEXT,
        allowed=below_one("0.25 takes a quarter of the calibration samples from general text"),
    )
    balance_sources: bool = option(
        False,
        "Calibrate, refit and train on equally much text of every source, as far as each has it, so that none is "
        "sacrificed to larger ones. A source is what the column 'source' names, or a file of a folder (not .txt).",
        panel=TEXT,
    )
    text_column: str | None = option(
        None,
        "Column that holds the text; found automatically if there is one candidate.",
        panel=TEXT,
        allowed=name_such_as("text"),
    )
