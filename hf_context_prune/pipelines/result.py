"""`PruneResult`: a pruned model with plan and report, to be saved to a folder or to the Hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_context_prune.evaluation.reports.notebook import result_html
from hf_context_prune.evaluation.reports.report import EvalReport, MemoryFacts
from hf_context_prune.evaluation.reports.summary import headline
from hf_context_prune.evaluation.speed import measure_peak_memory
from hf_context_prune.modeling.native_fit import NativeFit
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.runtimes import Runtime, runtimes_of
from hf_context_prune.modeling.wrappers import with_text
from hf_context_prune.pruning.notes import layers_note
from hf_context_prune.publishing.card.card import write_card
from hf_context_prune.publishing.card.facts import facts_in
from hf_context_prune.publishing.hub import PushResult, push_folder
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.storage.saving import count_weight_bytes, estimate_bytes, write_model_folder
from hf_context_prune.storage.staging import resolve_target, staged_folder
from hf_context_prune.utils.distributed import is_main_process, on_main_process
from hf_context_prune.utils.file_names import REPORT_NAME
from hf_context_prune.utils.temporary import scratch_folder


@dataclass(repr=False)
class PruneResult:
    """A pruned model with its plan and what pruning cost.

    Attributes:
        model: The smaller model, in evaluation mode.
        tokenizer: The base's tokenizer, with fewer tokens where the vocabulary was pruned.
        plan: What was kept, with provenance.
        report: Base against pruned model on test text.
        native_fit: Whether the native architecture holds the widths, and why or why not.
        base: Where the base model came from, if it has a folder.
        wrapper: The model of images and text that the text part is saved in; None saves `model` as it is.
    """

    model: PreTrainedModel
    tokenizer: Any
    plan: PruningPlan
    report: EvalReport
    native_fit: NativeFit
    base: LoadedModel | None = None
    wrapper: LoadedModel | None = None

    def whole_model(self) -> PreTrainedModel:
        """Return the model that is saved: `model` itself, or the model of images and text with it as its text part.

        Raises:
            SaveError: See [`with_text`][].
        """
        return self.model if self.wrapper is None else with_text(self.wrapper.whole, self.model)

    def summary(self, *, intervals: bool = False) -> str:
        """Return sizes, losses and speed in words and as a table; see [`EvalReport.summary`][].

        Layers that were removed as a whole are named, with a warning of what the loss does not show.
        """
        figures = self.report.summary(intervals=intervals)
        return "\n\n".join([figures, *layers_note(self.plan)])

    def __repr__(self) -> str:
        """Return two lines: what the model is, and what pruning did to it."""
        smaller, domain, *_ = headline(self.report)
        return f"<PruneResult: {type(self.model).__name__} from {self.report.base_model}\n {smaller} {domain}>"

    def __str__(self) -> str:
        """Return the summary."""
        return self.summary()

    def _repr_html_(self) -> str:
        """Return the summary for a notebook, with a picture of the widths where they differ by layer."""
        return result_html(self.report, self.plan)

    def opens_in(self, folder: str | Path) -> list[Runtime]:
        """Return where the model opens once it is saved to a folder, with a line of code or a command for each.

        Args:
            folder: The folder, as the lines name it.
        """
        return runtimes_of(self.whole_model().config.to_dict(), str(folder))

    def save_pretrained(
        self, directory: str | Path, *, measure_memory: bool = False, card_name: str | None = None
    ) -> Path:
        """Write model, tokenizer, plan, report and model card to a folder, whole or not at all.

        Under ``accelerate launch`` the main process writes; in the others this does nothing and does not wait.

        Args:
            directory: Absent, empty, or an older folder of this package, which is replaced.
            measure_memory: Also load base and pruned model in fresh processes, for the peak memory in the report.
            card_name: How the card names the model; None takes the folder's name.

        Returns:
            The absolute path.

        Raises:
            SaveError: Nothing was put in place; an older folder is as it was.
        """
        target = resolve_target(directory)
        if not is_main_process():
            return target
        # The work is done: waiting for another run that saves to the same place is better than losing it.
        whole, place = self.whole_model(), None if self.wrapper is None else self.wrapper.folder or self.wrapper.source
        with staged_folder(target, required_bytes=estimate_bytes(whole), wait_seconds=600) as staging:
            write_model_folder(staging, whole, tokenizer=self.tokenizer, plan=self.plan, processor=place)
            self._with_footprint(staging, measure_memory=measure_memory).save(staging / REPORT_NAME)
            write_card(staging, facts_in(staging, name=card_name or target.name))
        self.model.name_or_path = str(target)  # a variable-width model's own push_to_hub reads plan and card there
        return target

    def as_saved(self, folder: str | Path) -> PruneResult:
        """Return the same result with the report that [`save_pretrained`][] wrote, sizes on disk included."""
        return replace(self, report=EvalReport.load(Path(folder) / REPORT_NAME))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> PushResult:
        """Upload what [`save_pretrained`][] writes, in one commit; see [`push_folder`][] for arguments and errors.

        Under ``accelerate launch`` every process has to call it; the main process uploads, and all get the result.
        """

        def push() -> PushResult:
            with scratch_folder() as place:
                folder = place / "model"
                self.save_pretrained(folder, card_name=repo_id)
                return push_folder(
                    folder,
                    repo_id,
                    private=private,
                    revision=revision,
                    create_pr=create_pr,
                    commit_message=commit_message,
                    token=token,
                    retry_hint="push_to_hub",
                )

        name = self.model.name_or_path
        try:
            return on_main_process(push)
        finally:
            self.model.name_or_path = name

    def _with_footprint(self, folder: Path, *, measure_memory: bool) -> EvalReport:
        base_folder = self.base.folder if self.base else None
        size = replace(
            self.report.size,
            base_weight_bytes=count_weight_bytes(base_folder) if base_folder else self.report.size.base_weight_bytes,
            pruned_weight_bytes=count_weight_bytes(folder),
        )
        memory = self.report.memory
        if measure_memory:
            memory = MemoryFacts(
                base=measure_peak_memory(base_folder) if base_folder else None, pruned=measure_peak_memory(folder)
            )
        return replace(self.report, size=size, memory=memory)
