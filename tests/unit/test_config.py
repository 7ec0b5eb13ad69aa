"""`PrunerConfig` and `ThresholdConfig`: ranges, contradictions, YAML and HfArgumentParser."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import get_args

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_context_prune.config import (
    DEFAULT_PRUNING_RATIO,
    AllocationName,
    CalibrationConfig,
    CriterionName,
    PrunerConfig,
    ReconstructionName,
    ThresholdConfig,
    VocabCriterion,
    build_config,
)
from hf_context_prune.errors import ConfigError
from hf_context_prune.evaluation.options import EvalOptions, QuestionOptions
from hf_context_prune.storage.provenance import config_from_provenance
from hf_context_prune.utils.layer_options import layer_numbers
from hf_context_prune.utils.options import PANELS, help_of, read_options

RATIOS = ["pruning_ratio", "mlp_ratio", "attention_ratio", "layer_ratio"]
OPTIONAL_INTEGERS = {"target_params": 1, "vocab_min_count": 1, "vocab_size": 1, "num_layers": 1}
INTEGERS = {
    **OPTIONAL_INTEGERS,
    "round_to": 1,
    "num_calibration_samples": 1,
    "max_seq_length": 2,
    "pruning_seed": 0,
    "pad_to_multiple_of": 1,
}
NAMES = {
    "criterion": CriterionName,
    "reconstruction": ReconstructionName,
    "allocation": AllocationName,
    "vocab_criterion": VocabCriterion,
}
EVERYTHING = {
    "pruning_ratio": 0.3,
    "target_params": None,
    "num_layers": 20,
    "layer_ratio": None,
    "removable_layers": "2-20,25",
    "num_experts": None,
    "experts_ratio": None,
    "expert_neurons_ratio": None,
    "shared_expert_ratio": None,
    "expert_criterion": "energy",
    "mlp_ratio": None,
    "attention_ratio": 0.5,
    "max_loss_increase": None,
    "criterion": "wanda",
    "reconstruction": "bias",
    "allocation": "adaptive",
    "refit_lm_head": True,
    "units": None,
    "round_to": 8,
    "native_architecture": False,
    "vocab_size": None,
    "vocab_coverage": 0.99,
    "vocab_min_count": None,
    "pad_to_multiple_of": 8,
    "vocab_criterion": "frequency",
    "ridge": 0.1,
    "general_data_ratio": 0.25,
    "balance_sources": True,
    "domain": "law",
    "num_calibration_samples": 7,
    "max_seq_length": 33,
    "text_column": "body",
    "pruning_seed": 5,
}
TEXT = {field.name: EVERYTHING[field.name] for field in dataclasses.fields(CalibrationConfig)}
PAPER = {"linear_threshold": 0.001, "activation_threshold": 0.1, "embedding_threshold": 0.0, **TEXT}


def refused(config=PrunerConfig, **options):
    with pytest.raises(ConfigError) as error:
        config(**options)
    return str(error.value)


def test_defaults():
    config = PrunerConfig()
    assert config.pruning_ratio == DEFAULT_PRUNING_RATIO == 0.2
    assert (config.criterion, config.reconstruction, config.allocation) == ("obs", "sequential", "adaptive")
    assert set(EVERYTHING) == {field.name for field in dataclasses.fields(PrunerConfig)}
    assert set(PAPER) == {field.name for field in dataclasses.fields(ThresholdConfig)}


def test_another_size_leaves_the_default_ratio_out():
    for name, value in (
        ("target_params", 9),
        ("mlp_ratio", 0.0),
        ("attention_ratio", 0.5),
        ("max_loss_increase", 0.03),
        ("vocab_size", 64),
    ):
        assert PrunerConfig(**{name: value}).pruning_ratio is None, name


def test_ratios(subtests):
    for name in RATIOS:
        for bad in (-0.1, 1, 1.0, 1.5, math.nan, math.inf, "0.2", True, False, 10**400, [0.2]):
            with subtests.test(name, bad=str(bad)[:9]):
                message = refused(**{name: bad})
                assert message.startswith(f"{name} is {bad!r}; ")
                assert "[0, 1)" in message
        for good in (0, 0.0, 0.25, 0.999999):
            assert getattr(PrunerConfig(**{name: good}), name) == good


def test_integers(subtests):
    for name, lowest in INTEGERS.items():
        with subtests.test(name):
            assert getattr(PrunerConfig(**{name: lowest}), name) == lowest
            for bad in (lowest - 1, -5, 3.0, "4", True, False, 2**63):
                message = refused(**{name: bad})
                assert message.startswith(f"{name} is {bad!r}; ")
                assert f"at least {lowest}, below 2^63" in message
            if name not in OPTIONAL_INTEGERS:
                assert f"{name} is None" in refused(**{name: None})


def test_refitting_the_head_needs_a_reconstruction():
    assert "refit_lm_head=True" in refused(refit_lm_head=True, reconstruction="none")


def test_numbers_with_bounds_of_their_own(subtests):
    for name, said, bad, good in (
        ("ridge", "above 0, up to 1e6", (0, -1, 0.0, math.nan, math.inf, "0.01", True, None, 2e6), 1),
        ("max_loss_increase", "above 0, up to 1", (0, -0.1, 0.0, 1.5, 3, math.nan, math.inf, "3%", True), 1),
        ("vocab_coverage", "above 0, up to 1", (0, 0.0, -0.1, 1.01, math.nan, "0.9", True), 1),
        ("general_data_ratio", "[0, 1)", (1, 1.5, -0.1, math.nan, "0.5", True), 0.5),
    ):
        for value in bad:
            with subtests.test(name, value=value):
                message = refused(**{name: value})
                assert message.startswith(f"{name} is {value!r}; ")
                assert said in message
        assert getattr(PrunerConfig(**{name: good}), name) == good


def test_names(subtests):
    for name, literal in NAMES.items():
        with subtests.test(name):
            for good in get_args(literal):  # taylor needs gradients, which the sequential reconstruction lacks
                assert getattr(PrunerConfig(**{"reconstruction": "bias", name: good}), name) == good
            message = refused(**{name: get_args(literal)[0] + "x"})
            assert message.startswith(f"Unknown {name} '{get_args(literal)[0]}x'; allowed are ")
            assert all(good in message for good in get_args(literal))
            assert message.endswith(f"Did you mean '{get_args(literal)[0]}'?")
            for bad in (None, 3, ["obs"], ""):
                if (name, bad) != ("allocation", None):  # to be filled in
                    assert f"Unknown {name} {bad!r}" in refused(**{name: bad})


def test_allocation_that_is_not_given_follows_from_the_budget(subtests):
    for options, allocation in (
        ({"pruning_ratio": 0.3}, "adaptive"),
        ({"target_params": 1000}, "adaptive"),
        ({"max_loss_increase": 0.03}, "adaptive"),
        ({"pruning_ratio": 0.3, "vocab_size": 64}, "adaptive"),
        ({"pruning_ratio": 0.3, "attention_ratio": 0.5}, "uniform"),
        ({"mlp_ratio": 0.25}, "uniform"),
        ({"pruning_ratio": 0.3, "native_architecture": True}, "adaptive"),
        ({"vocab_size": 64}, "uniform"),
        ({"pruning_ratio": 0}, "uniform"),
        ({"num_calibration_samples": 1}, "uniform"),
        ({"pruning_ratio": 0.3, "allocation": "uniform"}, "uniform"),
        ({"mlp_ratio": 0.25, "allocation": "adaptive"}, "adaptive"),
    ):
        with subtests.test(**options):
            config = PrunerConfig(**options)
            assert config.allocation == allocation
            assert PrunerConfig.from_dict(config.to_dict()) == config


def test_values_that_are_no_bool_and_no_name(subtests):
    for name in ("native_architecture", "refit_lm_head"):
        for bad in ("no", "false", 0, 1):
            with subtests.test(name, bad=bad):
                assert refused(**{name: bad}) == f"{name} is {bad!r}; it must be true or false."
    for name in ("text_column", "domain"):
        for bad in ("", "  ", 3, True, ["text"]):
            with subtests.test(name, bad=bad):
                assert f"{name} is {bad!r}" in refused(**{name: bad})


def test_contradictions(subtests):
    for options, said in (
        ({"pruning_ratio": 0.2, "target_params": 5}, "pruning_ratio and target_params both"),
        ({"pruning_ratio": 0.2, "mlp_ratio": 0.1, "attention_ratio": 0.1}, "leave out pruning_ratio/target_params"),
        ({"target_params": 5, "mlp_ratio": 0.1, "attention_ratio": 0.1}, "leave out pruning_ratio/target_params"),
        ({"max_loss_increase": 0.03, "pruning_ratio": 0.2}, "and pruning_ratio fixes it; give one"),
        ({"max_loss_increase": 0.03, "target_params": 9}, "and target_params fixes it"),
        ({"max_loss_increase": 0.03, "mlp_ratio": 0.0}, "and mlp_ratio fixes it"),
        ({"max_loss_increase": 0.03, "attention_ratio": 0.5}, "and attention_ratio fixes it"),
        ({"criterion": "taylor"}, "reconstruction='least_squares'"),
        ({"num_layers": 3, "layer_ratio": 0.1}, "num_layers and layer_ratio both"),
        ({"removable_layers": "2-4"}, "removable_layers='2-4' says which layers may be removed, but none is to be"),
        ({"removable_layers": "2-4", "layer_ratio": 0.0}, "none is to be: give num_layers or layer_ratio"),
    ):
        with subtests.test(**options):
            assert said in refused(**options)


def test_layers_are_a_size_of_their_own(subtests):
    alone = PrunerConfig(num_layers=20)
    assert (alone.pruning_ratio, alone.allocation, alone.prunes_layers) == (None, "uniform", False)
    assert alone.removes_layers
    assert PrunerConfig(layer_ratio=0.1, pruning_ratio=0.2).allocation == "adaptive"
    assert not PrunerConfig(layer_ratio=0.0).removes_layers
    for name in ("layer_ratio", "experts_ratio", "expert_neurons_ratio"):
        assert PrunerConfig(**{name: 0.0}).pruning_ratio == 0.0  # nothing goes, as asked
    for text, numbers in (("3", (3,)), ("2-4,9", (2, 3, 4, 9)), (" 9 , 2 - 3", (2, 3, 9)), ("0-0,0", (0,))):
        with subtests.test(text=text):
            assert layer_numbers(text) == numbers
    for bad in ("", "a", "2-", "-2", "4-2", "5-2,3", "1,,2", "1;2", "99999", [1], 3, True):
        with subtests.test(bad=bad):
            assert layer_numbers(bad) is None
            assert f"removable_layers is {bad!r}" in refused(num_layers=3, removable_layers=bad)


def test_combinations_that_are_meant():
    for options in (
        {"pruning_ratio": 0.2, "mlp_ratio": 0.1},
        {"pruning_ratio": 0.2, "attention_ratio": 0.1},
        {"target_params": 5, "attention_ratio": 0.1},
        {"mlp_ratio": 0.1, "attention_ratio": 0.1},
    ):
        config = PrunerConfig(**options)
        assert {name: getattr(config, name) for name in options} == options


def test_the_size_of_the_vocabulary():
    for first, second in (("vocab_size", "vocab_min_count"), ("vocab_size", "vocab_coverage")):
        message = refused(**{first: 64, second: 1})
        assert message == f"{first} and {second} each set the size of the vocabulary; give one of them."
    alone = PrunerConfig(vocab_size=64)
    assert (alone.prunes_vocabulary, alone.searches_tokens, alone.prunes_layers) == (True, False, False)
    beside = PrunerConfig(vocab_size=64, pruning_ratio=0.3)
    assert (beside.fixes_tokens, beside.searches_tokens, beside.prunes_layers) == (True, False, True)


def test_units_that_share_the_budget(subtests):
    for given, tokens, layers in (
        (None, True, True),
        ("tokens", True, False),
        ("kv_groups, neurons", False, True),
        (["tokens", "neurons"], True, True),
    ):
        with subtests.test(given=str(given)):
            config = PrunerConfig(units=given)
            assert (config.searches_tokens, config.prunes_layers) == (tokens, layers)
            assert config.pruning_ratio == DEFAULT_PRUNING_RATIO
            assert PrunerConfig.from_dict(config.to_dict()) == config
    assert PrunerConfig(units="kv_groups, neurons").units == "neurons,kv_groups"
    assert PrunerConfig(units="tokens", target_params=5).pruning_ratio is None
    for bad in ("token", "", "tokens,", "tokens;neurons", [], 3, True, ["heads"]):
        with subtests.test(bad=str(bad)):
            message = refused(units=bad)
            assert message == f"units is {bad!r}; it must be one or several of tokens, neurons, kv_groups, layers."
    for options in (
        {"allocation": "uniform"},
        {"pruning_ratio": 0},
        {"allocation": "adaptive", "pruning_ratio": 0.2, "mlp_ratio": 0.1},
        {"mlp_ratio": 0.1},
        {"vocab_size": 64},
        {"num_calibration_samples": 1},
    ):
        with subtests.test(**options):
            message = refused(units="tokens,neurons", **options)
            for needed in ("pruning_ratio (above 0)", "allocation='adaptive'", "without mlp_ratio", "Leave units out"):
                assert needed in message
    assert "add tokens to units" in refused(units="neurons", vocab_size=64, pruning_ratio=0.2)


def test_the_rows_are_refitted_wherever_something_is_reconstructed():
    assert PrunerConfig().refits_lm_head
    assert not PrunerConfig(reconstruction="none").refits_lm_head
    assert not PrunerConfig(refit_lm_head=False).refits_lm_head


def test_thresholds_of_the_paper(subtests):
    config = ThresholdConfig(**PAPER)
    assert config.to_dict() == PAPER
    assert (config.prunes_layers, config.prunes_vocabulary) == (True, True)
    assert not ThresholdConfig(embedding_threshold=0).prunes_layers
    assert not ThresholdConfig(linear_threshold=1.5).prunes_vocabulary
    assert all(name in refused(ThresholdConfig) for name in ("linear", "activation", "embedding"))
    for name in ("linear_threshold", "activation_threshold", "embedding_threshold"):
        for bad in (-1e-9, math.nan, math.inf, "0.1", True):
            with subtests.test(name, bad=bad):
                assert refused(ThresholdConfig, **{name: bad}).startswith(f"{name} is {bad!r}; ")
    assert "in [0, 1]" in refused(ThresholdConfig, embedding_threshold=1.5)
    with pytest.raises(ConfigError, match="Unknown option 'criterion'"):
        ThresholdConfig.from_dict({"linear_threshold": 0.1, "criterion": "l1"})


def test_options_decide_which_config_they_are():
    assert build_config({}) == PrunerConfig()
    assert build_config(PrunerConfig.from_dict(EVERYTHING).to_dict()) == PrunerConfig.from_dict(EVERYTHING)
    assert build_config({**EVERYTHING, "linear_threshold": None}) == PrunerConfig.from_dict(EVERYTHING)
    nothing = dict.fromkeys(EVERYTHING)
    assert build_config({**nothing, **PAPER}) == ThresholdConfig(**PAPER)
    assert build_config({"linear_threshold": 0.1, "seed": 3}) == ThresholdConfig(linear_threshold=0.1, pruning_seed=3)
    with pytest.raises(ConfigError, match=r"linear_threshold alone .* pruning_ratio, criterion can't be given"):
        build_config({"linear_threshold": 0.1, "pruning_ratio": 0.2, "criterion": "l1"})
    with pytest.raises(ConfigError, match="Did you mean 'linear_threshold'"):
        build_config({"linear_treshold": 0.1, "embedding_threshold": 0})


BEFORE_THE_HOUSE = {
    "pruning_ratio": 0.2,
    "target_params": None,
    "mlp_ratio": None,
    "attention_ratio": None,
    "max_loss_increase": None,
    "criterion": "obs",
    "reconstruction": "sequential",
    "allocation": "adaptive",
    "effort": "normal",
    "round_to": 1,
    "stock": False,
    "vocab_size": None,
    "vocab_coverage": None,
    "vocab_min_count": None,
    "vocab_auto": False,
    "vocab_multiple": 64,
    "vocab_criterion": "expected",
    "linear_threshold": None,
    "activation_threshold": None,
    "embedding_threshold": None,
    "ridge": 0.3,
    "num_calibration_samples": 128,
    "max_seq_length": 512,
    "general_mix": 0.0,
    "text_column": None,
    "domain": None,
    "pruning_seed": 0,
}
"""``provenance["config"]`` as commit 3369b6e wrote it."""


def test_configs_of_plans_are_read_by_their_earlier_names():
    as_it_was = {"refit_lm_head": False, "native_architecture": False, "general_data_ratio": 0.0}
    assert config_from_provenance(BEFORE_THE_HOUSE) == PrunerConfig(units="neurons,kv_groups", **as_it_was)
    given = {"effort": "high", "vocab_auto": True, "vocab_multiple": 8, "general_mix": 0.25}
    assert config_from_provenance({**BEFORE_THE_HOUSE, **given}) == PrunerConfig(
        refit_lm_head=True, native_architecture=False, pad_to_multiple_of=8, general_data_ratio=0.25
    )
    assert config_from_provenance({**BEFORE_THE_HOUSE, "vocab_size": 64}) == PrunerConfig(
        pruning_ratio=0.2, vocab_size=64, **{**as_it_was, "refit_lm_head": None}
    )
    native = {"allocation": "uniform", "stock": True}
    assert config_from_provenance({**BEFORE_THE_HOUSE, **native}) == PrunerConfig(
        pruning_ratio=0.2, allocation="uniform", **{**as_it_was, "native_architecture": True}
    )
    fixed = {"pruning_ratio": None, "criterion": "l1", "reconstruction": "none", "allocation": "uniform"}
    paper = {**BEFORE_THE_HOUSE, **fixed, "linear_threshold": 0.1, "general_mix": 0.5}
    assert config_from_provenance(paper) == ThresholdConfig(linear_threshold=0.1, general_data_ratio=0.5)
    for config in (PrunerConfig.from_dict(EVERYTHING), ThresholdConfig(**PAPER)):
        assert config_from_provenance(config.to_dict()) == config
    with pytest.raises(ConfigError, match="vocab_size can't be given"):
        config_from_provenance({**paper, "vocab_size": 64})
    with pytest.raises(ConfigError, match="Unknown option 'effort'"):  # not a name for users
        PrunerConfig.from_dict({"effort": "high"})


def test_every_option_has_a_help_text_and_a_panel():
    for config in (PrunerConfig, ThresholdConfig, EvalOptions, QuestionOptions):
        for field in dataclasses.fields(config):
            if (config, field.name) != (EvalOptions, "memory"):  # follows --benchmark
                assert len(help_of(field)) > 10
                assert help_of(field).panel in PANELS


def test_dict_round_trip():
    config = PrunerConfig.from_dict(EVERYTHING)
    assert config.to_dict() == EVERYTHING
    assert PrunerConfig.from_dict(config.to_dict()) == config
    assert PrunerConfig.from_dict(PrunerConfig().to_dict()) == PrunerConfig()


def test_a_config_is_saved_and_loaded_as_those_of_transformers(tmp_path):
    config = PrunerConfig(pruning_ratio=0.3, units="neurons,kv_groups", domain="law")
    assert json.loads(config.to_json_string()) == json.loads(json.dumps(config.to_dict()))
    assert config.save_pretrained(tmp_path / "new" / "folder").name == "pruner_config.json"
    assert PrunerConfig.from_pretrained(tmp_path / "new" / "folder") == config
    with pytest.raises(ConfigError, match="neither a folder nor the id of a repository"):
        PrunerConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"neither pruner_config\.json nor pruning_plan\.json"):
        PrunerConfig.from_pretrained(tmp_path)
    (tmp_path / "pruning_plan.json").write_text(json.dumps({"provenance": {"config": {"pruning_ratio": 0.4}}}))
    assert PrunerConfig.from_pretrained(tmp_path).pruning_ratio == 0.4
    for content in ("{", '{"provenance": {}}', "[]"):
        (tmp_path / "pruning_plan.json").write_text(content)
        with pytest.raises(ConfigError, match="holds no options"):
            PrunerConfig.from_pretrained(tmp_path)
    (tmp_path / "pruner_config.json").write_text('{"pruning_ration": 0.4}')
    with pytest.raises(ConfigError, match="Did you mean 'pruning_ratio'"):
        PrunerConfig.from_pretrained(tmp_path)


def test_unknown_keys():
    with pytest.raises(ConfigError, match=r"Unknown option 'prunning_ratio'.*Did you mean 'pruning_ratio'\?"):
        PrunerConfig.from_dict({"prunning_ratio": 0.2})
    with pytest.raises(ConfigError, match=r"Unknown option 7; allowed are .*pruning_ratio, "):
        PrunerConfig.from_dict({7: 0.2})


def test_yaml_round_trip(tmp_path):
    path = tmp_path / "options.yaml"
    for config in (PrunerConfig(), PrunerConfig.from_dict(EVERYTHING)):
        path.write_text(yaml.safe_dump(config.to_dict()))
        assert PrunerConfig.from_yaml(path) == config
    path.write_text("# Größe\nmlp_ratio: .25\ncriterion: wanda\n", encoding="utf-8")
    assert PrunerConfig.from_yaml(str(path)) == PrunerConfig(mlp_ratio=0.25, criterion="wanda")
    path.write_text("target_params: 5e7\nridge: 1e0\n")
    assert PrunerConfig.from_yaml(path) == PrunerConfig(target_params=50_000_000, ridge=1.0)
    path.write_text("")
    assert PrunerConfig.from_yaml(path) == PrunerConfig()
    assert read_options(path) == {}


def test_bad_yaml(tmp_path, subtests):
    path = tmp_path / "options.yaml"
    for text, said in (
        (b"pruning_ratio: [0.2", "can't be read"),
        (b"- 1\n- 2\n", "holds a list"),
        (b"0.2\n", "holds a float"),
        (b"\xff\xfe\x00", "can't be read"),
        (b"!!python/object/apply:os.getcwd []\n", "can't be read"),
        (b"pruning_ratoi: 0.2\n", "Did you mean 'pruning_ratio'"),
        (b"pruning_ratio: lots\n", "pruning_ratio is 'lots'"),
        (b"native_architecture: 'no'\n", "native_architecture is 'no'"),
    ):
        with subtests.test(text=text):
            path.write_bytes(text)
            with pytest.raises(ConfigError, match=said):
                PrunerConfig.from_yaml(path)


def test_missing_yaml(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml can't be read"):
        PrunerConfig.from_yaml(tmp_path / "nothing.yaml")


def argv_of(options):
    argv = []
    for name, value in options.items():
        if value is not None:
            argv += [f"--{name}", str(value)]
    return argv


@dataclasses.dataclass
class OtherArguments:
    """Stands for a script's own arguments."""

    output_dir: str = dataclasses.field(default="out", metadata={"help": "Where to."})


def test_argument_parser():
    parser = HfArgumentParser((PrunerConfig, OtherArguments))
    config, other = parser.parse_args_into_dataclasses([*argv_of(EVERYTHING), "--output_dir", "there"])
    assert config == PrunerConfig.from_dict(EVERYTHING)
    assert other.output_dir == "there"
    assert parser.parse_args_into_dataclasses([])[0] == PrunerConfig()
    (config, _) = parser.parse_args_into_dataclasses(
        ["--target-params", "12", "--mlp-ratio", "0.5", "--native-architecture", "true"]
    )
    assert config == PrunerConfig(target_params=12, mlp_ratio=0.5, native_architecture=True)
    (config, _) = parser.parse_args_into_dataclasses(["--vocab_size", "64", "--refit_lm_head", "false"])
    assert (config.vocab_size, config.refit_lm_head) == (64, False)
    (config, _) = parser.parse_args_into_dataclasses(["--units", "tokens,neurons"])
    assert config.units == "tokens,neurons"
    (paper,) = HfArgumentParser(ThresholdConfig).parse_args_into_dataclasses(argv_of(PAPER))
    assert paper == ThresholdConfig(**PAPER)


def test_argument_parser_refuses_what_the_config_refuses(capsys):
    parser = HfArgumentParser(PrunerConfig)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--criterion", "wandda"])
    assert "wandda" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"mlp_ratio is 1\.5"):
        parser.parse_args_into_dataclasses(["--mlp_ratio", "1.5"])


def test_every_option_has_a_help_text():
    text = " ".join(HfArgumentParser(PrunerConfig).format_help().split())
    for field in dataclasses.fields(PrunerConfig):
        assert f"--{field.name}" in text
        assert len(field.metadata["help"]) > 10
        assert " ".join(field.metadata["help"].split()) in text


def test_argument_parser_beside_training_arguments(tmp_path):
    parser = HfArgumentParser((PrunerConfig, TrainingArguments))
    config, training = parser.parse_args_into_dataclasses([*argv_of(EVERYTHING), "--output_dir", str(tmp_path)])
    assert config.pruning_ratio == EVERYTHING["pruning_ratio"]
    assert training.output_dir == str(tmp_path)
