"""The table of models of images and text whose text part is one of the architectures.

This file travels with every saved variable-width model, so it imports nothing but the standard library and the table of
architectures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .specs import SPECS, ArchSpec, base_model_type

TEXT_SPECS: dict[str, ArchSpec] = {
    "qwen3_vl_text": replace(
        SPECS["qwen3"],
        model_type="qwen3_vl_text",
        config_class="Qwen3VLTextConfig",
        headless_class="Qwen3VLTextModel",
    ),
}
"""Text parts of which `transformers` has no causal LM, each with one of another family that computes the same."""


def text_spec(model_type: str) -> ArchSpec | None:
    """Return the entry of a wrapper's text part, native or variable-width; None if the table has none."""
    base = base_model_type(model_type)
    return TEXT_SPECS.get(base) or SPECS.get(base)


@dataclass(frozen=True)
class WrapperSpec:
    """A model of images and text, whose text part is one of this table.

    Attributes:
        model_type: ``config.model_type`` of the native architecture.
        config_class: Name of the config class in `transformers`.
        model_class: Name of the model class in `transformers`.
        texts: ``config.text_config.model_type`` of the text parts that it may have.
        text: Module path of the text part, a model without an LM head.
    """

    model_type: str
    config_class: str
    model_class: str
    texts: tuple[str, ...]
    text: str = "model.language_model"

    @property
    def layers(self) -> str:
        """Module path of the list of decoder layers."""
        return f"{self.text}.layers"

    @property
    def saved_layers(self) -> tuple[str, ...]:
        """The names of the list of layers in a file: those that `transformers` gives it on saving, too."""
        text = self.text.partition(".")[2]
        return self.layers, f"{self.text}.model.layers", f"{text}.model.layers"


def _wrapper(model_type: str, name: str, *texts: str) -> WrapperSpec:
    return WrapperSpec(model_type, f"{name}Config", f"{name}ForConditionalGeneration", texts)


WRAPPERS: dict[str, WrapperSpec] = {
    spec.model_type: spec
    for spec in (
        _wrapper("gemma3", "Gemma3", "gemma3_text"),
        _wrapper("mistral3", "Mistral3", "mistral", "ministral3"),
        _wrapper("qwen3_5", "Qwen3_5", "qwen3_5_text"),
        _wrapper("qwen3_vl", "Qwen3VL", "qwen3_vl_text"),
    )
}
