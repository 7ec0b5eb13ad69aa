"""Can a model be pruned? Find its entry of the table, or propose one, and test it on a tiny copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_context_prune.errors import ConfigError, LoadError, UnsupportedArchitectureError
from hf_context_prune.modeling.architectures import layers_of, output_weight, unit_size
from hf_context_prune.modeling.configuration_context_pruned import native_class
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.native_fit import values_for_another_class
from hf_context_prune.modeling.paths import check_paths
from hf_context_prune.modeling.spec_parts import Projection
from hf_context_prune.modeling.specs import PREFIX, SPECS, ArchSpec, base_model_type
from hf_context_prune.modeling.wrappers import text_config_of, wrapper_spec
from hf_context_prune.storage.gguf import read_gguf_config
from hf_context_prune.storage.hub_download import fetch_config
from hf_context_prune.storage.loading import local_path
from hf_context_prune.storage.model_config import describe, read_any_config, refuse_adapter

from .contract import Check, can_be_sliced, holds, run_contract
from .propose import propose
from .tiny_copy import TinyCopy, make_tiny_copy

_WHOLE = "the model itself has these paths and sizes"
_FAR = {
    "kv_lora_rank": "multi-head latent attention (MLA): keys and values of all heads come from one narrow projection, "
    "and an ArchSpec has no field for such a layout",
    **dict.fromkeys(
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        "a mixture of experts, for which no entry can be proposed; docs/families.md lists those that have one",
    ),
}
"""What an unknown architecture has, by a config attribute above 1, that no entry can describe."""


@dataclass(frozen=True)
class ArchitectureCheck:
    """What was found of a model.

    Attributes:
        name: The model, as it was named.
        model_type: Its model type.
        model_class: Name of its class.
        known: Whether its model type has an entry already.
        spec: The entry that was tested last: the right one if `passed`, else the one that came furthest.
        checks: The checks of that entry, up to the first that failed.
    """

    name: str
    model_type: str
    model_class: str
    known: bool
    spec: ArchSpec
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return holds(self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "model": self.name,
            "model_type": self.model_type,
            "model_class": self.model_class,
            "known": self.known,
            "passed": self.passed,
            "checks": [{"name": check.name, "why_not": check.why} for check in self.checks],
            "entry": entry_code(self.spec),
        }


def check_architecture(
    source: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    report: Callable[[Check], object] = lambda check: None,
) -> ArchitectureCheck:
    """Find the entry of a model, and test it; only the config is read, no weight.

    Args:
        source: A model folder, a ``.gguf`` file, a Hub id or ``"demo"``.
        revision: Branch, tag or commit of a Hub repository.
        trust_remote_code: Whether to run the code that a folder or repository brings along.
        report: Called with each check of the entry that is told.

    Raises:
        LoadError: There is no config, or it is damaged, or its class is in code that may not be run.
        UnsupportedArchitectureError: The model is no causal LM, quantised, or has a part that no entry can describe.
    """
    config, commit = _read(source, revision, trust_remote_code=trust_remote_code)
    whole = _build_whole(str(source), config, commit, trust_remote_code=trust_remote_code)
    spec = SPECS.get(config.model_type)
    if spec is None:
        _refuse_far(config)
    tiny = make_tiny_copy(config, type(whole))
    spec, checks = _try(tiny, [spec] if spec else _proposed(tiny))
    if holds(checks):
        checks += (_check_whole(whole, spec),)
    for check in checks:
        report(check)
    known = config.model_type in SPECS
    return ArchitectureCheck(str(source), config.model_type, type(whole).__name__, known, spec, checks)


def _read(source: str | Path, revision: str | None, *, trust_remote_code: bool) -> tuple[PreTrainedConfig, str | None]:
    """Return the config, of a pruned model that of its base, and the commit of a repository."""
    path = local_path(source)
    if path is not None and path.is_file():
        return read_gguf_config(path), None
    folder = fetch_config(str(source), revision) if path is None else path
    name, commit = (str(source), folder.name) if path is None else (str(path), None)
    refuse_adapter(name, commit)
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder} holds no config.json, so it is not a model folder.")
    config = read_any_config(name, folder, commit, trust_remote_code=trust_remote_code)
    if wrapper_spec(config) is not None:  # `prune` takes the text part of it
        config = text_config_of(config)
    if not config.model_type.startswith(PREFIX):
        return config, commit
    base = SPECS.get(base_model_type(config.model_type))
    if base is None:
        raise UnsupportedArchitectureError(
            f"{name!r} has the config of a text part alone ({config.model_type}), no causal LM. Take the folder of the "
            f"whole model of images and text."
        )
    base_class = native_class(base.config_class)
    return base_class.from_dict(values_for_another_class(config)), commit


def _build_whole(
    source: str, config: PreTrainedConfig, commit: str | None, *, trust_remote_code: bool
) -> PreTrainedModel:
    """Build the model on the meta device.

    Raises:
        UnsupportedArchitectureError: It is no causal LM.
        LoadError: Its code can't build it.
    """
    named = list(config.architectures or ())
    said = f" (config.json names {', '.join(named)})" if named else ""
    if config.is_encoder_decoder:
        raise UnsupportedArchitectureError(
            f"{source!r} is an encoder and a decoder{said}, no causal LM, and only causal LMs can be pruned."
        )
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    options = {"code_revision": commit} if remote and commit else {}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, **options
            )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise LoadError(f"No model can be built from the config of {source!r}: {describe(error)}.") from error
        raise UnsupportedArchitectureError(
            f"{source!r} is a {config.model_type} model{said}, of which transformers has no causal LM, and only causal "
            f"LMs can be pruned."
        ) from error
    except Exception as error:  # the code of any family
        raise LoadError(f"No model can be built from the config of {source!r}: {describe(error)}.") from error
    if named and type(model).__name__ not in named:
        raise UnsupportedArchitectureError(
            f"{source!r} is no causal LM: config.json names {', '.join(named)}, and the causal LM of its type is "
            f"{type(model).__name__}. Take a checkpoint of that."
        )
    return model


def _refuse_far(config: PreTrainedConfig) -> None:
    by_layer = (config.to_dict().get("per_layer_config") or {}).values()
    for name, what in _FAR.items():
        own = [layer[name] for layer in by_layer if name in layer]  # of such a value, the whole config can't be asked
        value = max(own) if own else getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            raise UnsupportedArchitectureError(
                f"The model type {config.model_type!r} can't be pruned: {name} is {value}, so it has {what}."
            )


def _proposed(tiny: TinyCopy) -> list[ArchSpec]:
    try:
        return propose(tiny)
    except UnsupportedArchitectureError as error:
        raise UnsupportedArchitectureError(
            f"No entry can be proposed for the model type {tiny.model.config.model_type!r}. {error}"
        ) from error


def _try(tiny: TinyCopy, specs: list[ArchSpec]) -> tuple[ArchSpec, tuple[Check, ...]]:
    """Return the first entry that passes, with its checks; if none does, the one that came furthest."""
    best: tuple[ArchSpec, tuple[Check, ...]] | None = None
    for spec in specs:
        if best is not None and spec.fixed_heads != best[0].fixed_heads and can_be_sliced(best[1]):
            break  # heads can be removed, so something else is wrong, which keeping them might only hide
        checks = run_contract(tiny.model, spec)
        if holds(checks):
            return spec, checks
        if best is None or len(checks) > len(best[1]):
            best = spec, checks
    assert best is not None  # there is at least one entry
    return best


def _check_whole(model: PreTrainedModel, spec: ArchSpec) -> Check:
    """Compare the sizes that an entry reads from the config with the shapes of every layer."""
    try:
        check_paths(model, spec)
        geometry = read_geometry(model.config, spec)
        for index, (layer, widths) in enumerate(zip(layers_of(model, spec), geometry.layers, strict=True)):
            modules = dict(layer.named_modules())
            for target in widths.targets:
                path, asked = spec.output_path(target), widths.of(target) * unit_size(geometry, target)  # type: ignore[arg-type]
                if path not in modules:
                    return Check(_WHOLE, f"{spec.layers}.{index} has no {path}: it is another kind of layer")
                has = output_weight(modules[path]).shape[1]
                if has != asked:
                    return Check(_WHOLE, f"{spec.layers}.{index}.{path} reads {has} features; by the config, {asked}")
    except ConfigError as error:
        return Check(_WHOLE, str(error))
    except (AttributeError, ValueError, TypeError, IndexError) as error:
        return Check(_WHOLE, f"its sizes can't be read from the config: {describe(error)}")
    return Check(_WHOLE)


def entry_code(spec: ArchSpec) -> str:
    """Return an entry as code, with the fields that differ from their defaults."""
    lines = [
        f"    {'' if item.name in ('model_type', 'config_class', 'model_class') else item.name + '='}"
        f"{_code(getattr(spec, item.name))},"
        for item in fields(spec)
        if getattr(spec, item.name) != item.default
    ]
    return "\n".join(["ArchSpec(", *lines, ")"])


def _code(value: object) -> str:
    if isinstance(value, Projection):
        more = [f", {name}={getattr(value, name)}" for name in ("interleaved", "blocks")]
        defaults = (", interleaved=False", ", blocks=1")
        return f"Projection({_code(value.path)}, {_code(value.roles)}{''.join(x for x in more if x not in defaults)})"
    if isinstance(value, tuple):
        inside = ", ".join(map(_code, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return f'"{value}"' if isinstance(value, str) else repr(value)
