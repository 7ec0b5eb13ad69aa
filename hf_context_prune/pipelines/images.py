"""What a run does with a model of images and text: its text part is pruned, and its vocabulary stays whole."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.modeling_context_pruned import model_class_name
from hf_context_prune.modeling.specs import PREFIX
from hf_context_prune.modeling.wrappers import wrapper_spec
from hf_context_prune.pruning.available_units import without_tokens
from hf_context_prune.storage.loading import LoadedModel

from .pruning_texts import AnyConfig

_WHY_TOKENS_STAY = "the model and its processor name tokens of images by their ids"


def take_text_only(base: LoadedModel) -> LoadedModel:
    """Return the text part of a model of images and text as a model of its own.

    Raises:
        ConfigError: The model is a causal LM.
    """
    if base.wrapper is None:
        raise ConfigError(
            f"--text-only (text_only=True) is for models of images and text; {base.name} is a "
            f"{type(base.model).__name__}, which reads text alone. Leave it out."
        )
    return replace(base, wrapper=None, folder=None)  # no file holds the text part alone, so none is measured


def keep_image_tokens(base: LoadedModel, config: AnyConfig) -> tuple[AnyConfig, str | None]:
    """Keep the whole vocabulary of a model of images and text.

    Returns:
        (the config, why all tokens stay; None where the model reads text alone or the config removes none).

    Raises:
        ConfigError: The config asks for fewer tokens or layers.
    """
    if base.wrapper is not None and isinstance(config, PrunerConfig) and config.removes_layers:
        raise ConfigError(
            f"Whole layers of {base.name} can't be removed (num_layers, layer_ratio, layers in units): its images may "
            f"enter at layers by their number, and the config of the whole model counts them. Prune neurons and KV "
            f"groups, or save the text part alone (--text-only, text_only=True)."
        )
    if base.wrapper is None or not config.prunes_vocabulary:
        return config, None
    if not isinstance(config, PrunerConfig) or config.fixes_tokens or config.units is not None:
        raise ConfigError(
            f"The vocabulary of {base.name} can't be pruned: {_WHY_TOKENS_STAY}. Prune neurons and KV groups alone "
            f"(--units neurons,kv_groups), or save the text part alone (--text-only, text_only=True)."
        )
    return without_tokens(config), f"{_WHY_TOKENS_STAY} (--text-only prunes them, too)."


def parameters_beside(base: LoadedModel) -> int:
    """Return the parameters of a model of images and text that are not in its text part; 0 for any other model."""
    return 0 if base.wrapper is None else base.wrapper.num_parameters() - base.model.num_parameters()


def images_note(base: LoadedModel) -> tuple[str, ...]:
    """Return a sentence for the report on what of a model of images and text was measured."""
    if base.wrapper is None:
        return ()
    return (
        f"{base.name} reads images too. Sizes, losses and speed are those of its text part; the other "
        f"{parameters_beside(base):,} parameters are unchanged, and count in bytes and memory alone.",
    )


def saved_class(base: LoadedModel, model: PreTrainedModel) -> str:
    """Return the name of the class that a pruned model of this base is saved as."""
    spec = None if base.wrapper is None else wrapper_spec(base.wrapper.config)
    if spec is None:
        return type(model).__name__
    return model_class_name(spec) if str(model.config.model_type).startswith(PREFIX) else spec.model_class
