"""What a run needs: the least memory that its largest step fits into, and the room that it takes on disks."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel

from hf_context_prune.config import CalibrationConfig, PrunerConfig
from hf_context_prune.errors import BudgetError, SaveError
from hf_context_prune.modeling.architectures import output_weight
from hf_context_prune.modeling.experts import experts_spec, output_tensors
from hf_context_prune.modeling.token_rows import num_rows
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pruning.allocation.sensitivity import PROBE_TOKENS
from hf_context_prune.pruning.experts import count_experts, repairs
from hf_context_prune.pruning.scoring import Requirements
from hf_context_prune.storage.cache import CACHE_VARIABLE
from hf_context_prune.storage.files import find_existing_folder
from hf_context_prune.storage.layer_shards import SHARD_BYTES
from hf_context_prune.storage.saving import SIDE_FILES_BYTES
from hf_context_prune.storage.staging import bytes_with_margin
from hf_context_prune.storage.write_errors import format_bytes
from hf_context_prune.training.recovery.config import RecoveryConfig
from hf_context_prune.training.recovery.needs import USE_ADAPTERS, kept_bytes, training_bytes
from hf_context_prune.utils.memory import fits_in_memory, free_memory, free_on_machine, own_memory, reserved_by_others

_BATCH_TOKENS = 2048
"""Tokens of a batch, at least one sample."""
_TOKENS_PER_ROW = 4
"""Tokens of text for each different one; where they are fewer, the rows are not refitted if there is no room."""
_LIBRARIES = 2**27
"""Bytes that libraries and tokenizer take before the largest step, beside what is held as the needs are worked out."""
_WIDE, _NARROW = 8, 4
"""Bytes of a float64 and of a float32."""
_TRAINING = "the training"
_LESS_TEXT = "give less calibration text (num_calibration_samples, max_seq_length)"


@dataclass(frozen=True)
class Needs:
    """What a run needs beside the files of the model.

    Attributes:
        step: The step that takes the most memory.
        step_memory: Bytes of memory that it takes, beside what the process holds already.
        resume_disk: Bytes in the cache, until the run is finished: finished layers.
        output_disk: Bytes of the saved folder.
        streams: Bytes of hidden states, which lie in the folder of temporary files where they don't fit into memory.
        training_disk: Bytes in the cache, until the run is finished: the pruned model and the state of its training,
            which are kept where there is room.
    """

    step: str
    step_memory: int
    resume_disk: int
    output_disk: int
    streams: int = 0
    training_disk: int = 0

    def to_dict(self) -> dict[str, int | str]:
        """Return all values as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return a sentence."""
        spilled = "" if fits_in_memory(self.streams) else f", {self.streams / 1e9:.1f} GB for hidden states meanwhile"
        cache = self.resume_disk + self.training_disk
        return (
            f"Needs about {self.step_memory / 2**30:.1f} GiB of memory ({self.step}), {cache / 1e9:.1f} GB "
            f"of disk for finished work until the end{spilled}, and {self.output_disk / 1e9:.1f} GB for the result."
        )

    def missing_memory(self) -> str | None:
        """Return why a run does not fit into the memory that it may take, with the least that does; None if it fits."""
        free, machine, held, needed = free_memory(), free_on_machine(), own_memory(), self.step_memory
        if needed <= free:
            return None
        takes, remedy = f"{needed / 2**30:.2f} GiB", USE_ADAPTERS if self.step == _TRAINING else _LESS_TEXT
        if needed <= machine:
            return (
                f"The memory limit leaves {free / 2**30:.2f} GiB beside what is held already, but the largest step "
                f"({self.step}) takes {takes}. Allow {(held + needed + _LIBRARIES) / 2**30:.2f} GiB in all "
                f"(max_memory), or {remedy}."
            )
        others = {process: size for process, size in reserved_by_others().items() if size}
        taken, wait = "", "Close other programs"
        if others:
            taken = f" beside the {sum(others.values()) / 2**30:.2f} GiB that other runs will take"
            wait = f"Wait for them (process {', '.join(map(str, others))})"
        return (
            f"The largest step ({self.step}) takes {takes} beside what is held already, and this machine has "
            f"{machine / 2**30:.2f} GiB free{taken}. {wait}, take a machine with more memory, or {remedy}."
        )

    def check_memory(self) -> None:
        """Refuse a run that does not fit into the memory that it may take.

        Raises:
            BudgetError: See [`missing_memory`][].
        """
        if (why := self.missing_memory()) is not None:
            raise BudgetError(why)

    def check_disk(self, output: Path, resume_dir: Path | None) -> None:
        """Refuse a run whose result, finished work or hidden states have no room, before it begins.

        Args:
            output: The folder to write; neither it nor its parents need exist.
            resume_dir: Folder of finished work, if there is one, which need not exist either; the finished layers of a
                large model become files of the result.

        Raises:
            SaveError: The message names the disk and what is missing there.
        """
        result = bytes_with_margin(self.output_disk)  # as saving will ask for
        needed = [("the result", find_existing_folder(output.parent), result, "--output")]
        if resume_dir is not None:
            kept = self.resume_disk + (result if self.output_disk > SHARD_BYTES else 0)
            needed.append(("finished work", find_existing_folder(resume_dir), kept, CACHE_VARIABLE))
            if _disk(needed[0][1]) == _disk(needed[1][1]):
                needed[1] = *needed[1][:2], self.resume_disk, CACHE_VARIABLE  # shards are renamed, not copied
        if not fits_in_memory(self.streams):
            needed.append(("hidden states", Path(tempfile.gettempdir()), self.streams, "TMPDIR"))
        for disk in dict.fromkeys(_disk(folder) for _, folder, _, _ in needed):
            whats, folders, sizes, remedies = zip(*(one for one in needed if _disk(one[1]) == disk), strict=True)
            if (free := shutil.disk_usage(folders[0]).free) < sum(sizes):
                raise SaveError(
                    f"The disk of {folders[0]} has {format_bytes(free)} free, but {' and '.join(whats)} will need "
                    f"{format_bytes(sum(sizes))}. Make room there, or use another disk ({', '.join(remedies)})."
                )


def _disk(folder: Path) -> int:
    return folder.stat().st_dev


def estimate_needs(
    model: PreTrainedModel, config: CalibrationConfig, parameters: int, recovery: RecoveryConfig | None = None
) -> Needs:
    """Work out the needs of a run from shapes alone.

    Args:
        model: The base model; its weights may be on the meta device. They count where they lie in memory.
        config: All choices.
        parameters: Parameters after pruning.
        recovery: The training after it.
    """
    view, item = ModelView.of_shapes(model), model.dtype.itemsize
    tokens = config.num_calibration_samples * config.max_seq_length
    batch = max(_BATCH_TOKENS, config.max_seq_length)
    rows, hidden = num_rows(model), int(model.get_input_embeddings().weight.shape[1])
    logits = batch * rows * (item + _NARROW)
    steps = {"the logits of a batch": logits}
    sizes = [(output_weight(view.output_projection(*place)).shape, place[1]) for place in view.places()]
    resume = streams = 0
    if isinstance(config, PrunerConfig) and (config.prunes_layers or config.removes_layers):
        targets = {*Requirements.of(config).targets, *(["mlp"] if config.removes_layers else [])}
        shapes = {tuple(shape) for shape, target in sizes if target in targets} or {(1, 1)}
        outputs = max(sum(item * m * n for (m, n), _ in sizes) // len(view.layers), 1)
        activations = batch * _NARROW * max(6 * m + 4 * n for m, n in shapes)
        solver = max(_solver_bytes(m, n, tokens) for m, n in shapes)
        steps["the equations of a layer"] = outputs + activations + solver
        if config.allocation == "adaptive" and config.max_loss_increase is None:
            # A Gram matrix, its float64 copy, and the system of three quarters of the features.
            search = max(int((_NARROW + 1.75 * _WIDE) * n * n) + 9 * _NARROW * m * n for m, n in shapes)
            steps["the search of widths in a layer"] = activations + search
            streams = 2 * item * min(PROBE_TOKENS, tokens) * hidden * len(view.layers)
        widest = (max((n for (_, n), other in sizes if other == target), default=0) for target in targets)
        streams = max(streams, item * tokens * (2 * hidden + sum(widest)))
        resume = sum(item * m * n for (m, n), _ in sizes)
    if isinstance(config, PrunerConfig) and config.prunes_experts and repairs(config):
        outputs, features = expert_shape(view)
        kept = count_experts(model, config) * outputs * features
        # The changes of all experts of a layer beside their new weights, and the equations of one, from sums.
        steps["the experts of a layer"] = (_NARROW + item) * kept + _solver_bytes(outputs, features, features)
        resume += item * kept * sum(bool(widths.experts) for widths in view.widths)
    if isinstance(config, PrunerConfig) and config.refits_lm_head:
        fitted = min(rows, tokens // _TOKENS_PER_ROW)
        positions = min(4 * tokens, 2**28 // hidden)  # of hidden states, as `num_refit_samples` has it
        steps["the refit of the LM head's rows"] = _NARROW * hidden * (6 * fitted + positions) + logits
    if recovery is not None:
        steps[_TRAINING] = item * parameters + training_bytes(model, recovery, parameters)
    step = max(steps, key=lambda name: steps[name])
    kept = 0 if recovery is None else item * parameters + kept_bytes(recovery, parameters)
    return Needs(step, steps[step], resume, item * parameters + SIDE_FILES_BYTES, streams, kept)


def expert_shape(view: ModelView) -> tuple[int, int]:
    """Return (output features, neurons) of one expert, of the first layer that has experts."""
    experts = experts_spec(view.spec)
    first = next(layer for layer, widths in zip(view.layers, view.widths, strict=True) if widths.experts)
    weight, _ = output_tensors(first.get_submodule(experts.prefix))
    outputs, neurons = weight.shape[:0:-1] if experts.transposed else weight.shape[1:]
    return outputs, neurons


def _solver_bytes(outputs: int, features: int, tokens: int) -> int:
    """Return the bytes of the regression of one output projection."""
    weights = outputs * features
    if 2 * tokens <= features:
        return _NARROW * (6 * weights + 4 * tokens * (features + outputs) + 5 * tokens**2)
    return 6 * _WIDE * weights + (_NARROW + 2 * _WIDE) * features**2
