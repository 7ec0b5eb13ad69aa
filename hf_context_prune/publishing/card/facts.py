"""The facts of a card, read from a saved folder alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_context_prune.errors import LoadError, NumericsError
from hf_context_prune.evaluation.reports.report import EvalReport
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.specs import PREFIX, base_model_type
from hf_context_prune.modeling.wrapper_specs import WRAPPERS
from hf_context_prune.storage.known_models import name_of_base
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.storage.registered_entry import register_entry_of
from hf_context_prune.utils.file_names import PLAN_NAME, REPORT_NAME
from hf_context_prune.utils.foreign_code import find_foreign_code
from hf_context_prune.utils.reading import read_json, why


@dataclass(frozen=True)
class CardFacts:
    """The facts that a card shows.

    Attributes:
        name: The name of the model: of its folder, or its id on the Hub.
        plan: The widths, and in its provenance how they were chosen and what the base states of itself.
        report: The measured figures; None where nothing was measured.
        model_type: The model type in config.json.
        architecture: The model class in config.json.
        biases: What the config says of biases.
        foreign_code: The references of the folder to code of others, in words (see [`find_foreign_code`][]).
        base: The facts that the base states of itself.
    """

    name: str
    plan: PruningPlan
    report: EvalReport | None = None
    model_type: str = ""
    architecture: str = ""
    biases: Mapping[str, bool] = field(default_factory=dict)
    foreign_code: tuple[str, ...] = ()
    base: Mapping[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse figures that are not finite.

        Raises:
            NumericsError: NaN or Inf in the report or in the plan's provenance.
        """
        try:
            json.dumps(dict(self.plan.provenance), allow_nan=False)
        except ValueError as error:
            raise NumericsError(
                f"The plan's provenance holds NaN or Inf ({error}); a card shows numbers only."
            ) from error
        if self.report is not None:
            self.report.to_dict()
        object.__setattr__(self, "base", self.recorded("base_card"))

    def recorded(self, name: str) -> Mapping[str, Any]:
        """Return a mapping of the plan's provenance; empty where it has none of this name."""
        value = self.plan.provenance.get(name)
        return value if isinstance(value, Mapping) else {}

    @property
    def is_native(self) -> bool:
        """Whether transformers opens the model without this package."""
        return not self.model_type.startswith(PREFIX)

    @property
    def reads_images(self) -> bool:
        """Whether the model reads images beside text."""
        return base_model_type(self.model_type) in WRAPPERS

    @property
    def base_name(self) -> str:
        """The base as the plan names it: an id, a folder or a file."""
        return str(self.plan.provenance.get("base_model") or self.base.get("id") or "BASE")

    @property
    def base_place(self) -> str:
        """The base as commands take it."""
        return str(name_of_base(self.plan.provenance) or self.base.get("id") or "BASE")

    @property
    def base_id(self) -> str | None:
        """The id of the base on the Hub, where it differs from `base_name`."""
        value = self.base.get("id")
        return str(value) if value and value != self.base_name else None

    @property
    def domain(self) -> str | None:
        """The name of the domain, if it was given."""
        return self.plan.domain


def read_facts(folder: str | Path, *, name: str | None = None) -> CardFacts:
    """Read the facts of a folder that this package saved, after checking its files.

    Args:
        folder: The folder; it must hold a plan, and may lack a report.
        name: The name of the model; None takes the name of the folder.

    Raises:
        LoadError: The folder was not saved by this package, is damaged, or has no plan.
        NumericsError: NaN or Inf among the figures.
    """
    path = Path(folder)
    files = verify_folder(path, hash_weights=False)["files"]
    if PLAN_NAME not in files:
        raise LoadError(f"{path} has no {PLAN_NAME}, so a card would have no facts. Prune a model first.")
    return facts_in(path, name=name or path.resolve().name)


def facts_in(folder: Path, *, name: str, report: EvalReport | None = None) -> CardFacts:
    """Read the facts of a folder, which may have no manifest yet; a newer report takes the place of the one in it."""
    config = _read_config(folder / "config.json")
    register_entry_of(str(folder), folder, None, config)  # what is said of runtimes depends on the architecture
    if report is None and (folder / REPORT_NAME).is_file():
        report = EvalReport.load(folder / REPORT_NAME)
    return CardFacts(
        name=name,
        plan=PruningPlan.load(folder / PLAN_NAME),
        report=report,
        model_type=str(config.get("model_type", "")),
        architecture=next((str(name) for name in config.get("architectures") or ()), ""),
        biases={name: bool(config.get(name)) for name in ("attention_bias", "mlp_bias")},
        foreign_code=tuple(find_foreign_code(folder)),
    )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} can't be read as a model config: {why(error)}. Save the model again.") from error
    if not isinstance(values, dict) or not isinstance(values.get("architectures", []), list | None):
        raise LoadError(f"{file} is not a model config. Save the model again.")
    return values
