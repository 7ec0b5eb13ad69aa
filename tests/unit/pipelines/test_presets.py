"""Presets: each is a config that can be built, and other options replace its own."""

from __future__ import annotations

import pytest

from hf_context_prune import PrunerConfig, RecoveryConfig, ThresholdConfig
from hf_context_prune.cli.options import combine_options
from hf_context_prune.config import build_config
from hf_context_prune.errors import ConfigError
from hf_context_prune.pipelines.presets import PRESETS, describe_presets, preset_options


@pytest.mark.parametrize("name", PRESETS)
def test_each_is_a_config(name):
    options = preset_options(name)
    recovery = options.pop("recovery", None)
    config = build_config(options)
    assert isinstance(config, ThresholdConfig if name == "paper" else PrunerConfig)
    assert (recovery is None) == (name != "small")
    if recovery is not None:
        assert RecoveryConfig.from_dict(recovery).max_minutes == 10
    assert f"{name}: {PRESETS[name].about}" in describe_presets()


def test_the_balanced_one_is_the_default():
    assert build_config(preset_options("balanced")) == PrunerConfig()
    assert preset_options(None) == {}


def test_other_options_replace_those_of_a_preset():
    safe = combine_options(preset_options("safe"), {"vocab_size": 8192, "pruning_ratio": 0.1})
    assert build_config(safe) == PrunerConfig(vocab_size=8192, pruning_ratio=0.1)
    small = combine_options(preset_options("small"), {"recovery": {"max_minutes": 2}})
    assert small["recovery"] == {"max_minutes": 2}


def test_a_training_keeps_what_is_not_replaced():
    both = combine_options(preset_options("small"), {"recovery": {"learning_rate": 1e-4}})
    assert both["recovery"] == {"max_minutes": 10, "learning_rate": 1e-4}


def test_an_unknown_one():
    with pytest.raises(ConfigError, match=r"preset 'ballanced'.*Did you mean 'balanced'"):
        preset_options("ballanced")
