"""`PrunerConfig`: ranges, contradictions, YAML and HfArgumentParser."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_context_prune.config import (
    DEFAULT_PRUNING_RATIO,
    AllocationName,
    CriterionName,
    PrunerConfig,
    ReconstructionName,
    VocabCriterion,
    read_yaml,
)
from hf_context_prune.errors import ConfigError

RATIOS = ["pruning_ratio", "mlp_ratio", "attention_ratio"]
OPTIONAL_INTEGERS = {"target_params": 1, "vocab_size": 1, "vocab_min_count": 1}
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
    "mlp_ratio": None,
    "attention_ratio": 0.5,
    "max_loss_increase": None,
    "criterion": "wanda",
    "reconstruction": "bias",
    "allocation": "adaptive",
    "refit_lm_head": True,
    "round_to": 8,
    "native_architecture": False,
    "vocab_size": None,
    "vocab_coverage": 0.99,
    "vocab_min_count": None,
    "vocab_auto": False,
    "pad_to_multiple_of": 8,
    "vocab_criterion": "frequency",
    "linear_threshold": None,
    "activation_threshold": None,
    "embedding_threshold": None,
    "ridge": 0.1,
    "general_data_ratio": 0.25,
    "domain": "law",
    "num_calibration_samples": 7,
    "max_seq_length": 33,
    "text_column": "body",
    "pruning_seed": 5,
}


def refused(**options):
    with pytest.raises(ConfigError) as error:
        PrunerConfig(**options)
    return str(error.value)


def test_defaults():
    config = PrunerConfig()
    assert config.pruning_ratio == DEFAULT_PRUNING_RATIO == 0.2
    assert (config.criterion, config.reconstruction, config.allocation) == ("obs", "sequential", "adaptive")
    assert set(EVERYTHING) == {field.name for field in dataclasses.fields(PrunerConfig)}


@pytest.mark.parametrize(
    "options",
    [
        {"target_params": 9},
        {"mlp_ratio": 0.0},
        {"attention_ratio": 0.5},
        {"max_loss_increase": 0.03},
        {"vocab_size": 64},
    ],
)
def test_another_size_leaves_the_default_ratio_out(options):
    assert PrunerConfig(**options).pruning_ratio is None


@pytest.mark.parametrize(
    "bad", [-0.1, 1, 1.0, 1.5, math.nan, math.inf, "0.2", True, False, pytest.param(10**400, id="huge"), [0.2]]
)
@pytest.mark.parametrize("name", RATIOS)
def test_ratios_out_of_range(name, bad):
    message = refused(**{name: bad})
    assert message.startswith(f"{name} is {bad!r}; ")
    assert "[0, 1)" in message


@pytest.mark.parametrize("good", [0, 0.0, 0.25, 0.999999])
@pytest.mark.parametrize("name", RATIOS)
def test_ratios_in_range(name, good):
    assert getattr(PrunerConfig(**{name: good}), name) == good


@pytest.mark.parametrize(("name", "lowest"), INTEGERS.items())
def test_integers(name, lowest):
    assert getattr(PrunerConfig(**{name: lowest}), name) == lowest
    for bad in (lowest - 1, -5, 3.0, "4", True, False):
        message = refused(**{name: bad})
        assert message == f"{name} is {bad!r}; it must be an integer of at least {lowest}."
    if name not in OPTIONAL_INTEGERS:
        assert f"{name} is None" in refused(**{name: None})


def test_effort_needs_a_repair():
    assert "refit_lm_head=True repairs more" in refused(refit_lm_head=True, reconstruction="none")


@pytest.mark.parametrize("bad", [0, -1, 0.0, math.nan, math.inf, "0.01", True, None, 2e6])
def test_ridge(bad):
    message = refused(ridge=bad)
    assert message.startswith(f"ridge is {bad!r}; ")
    assert "above 0" in message
    assert "1e6" in message
    assert PrunerConfig(ridge=1).ridge == 1


@pytest.mark.parametrize("bad", [0, -0.1, 0.0, 1.5, 3, math.nan, math.inf, "3%", True])
def test_max_loss_increase(bad):
    message = refused(max_loss_increase=bad)
    assert message.startswith(f"max_loss_increase is {bad!r}; ")
    assert "above 0, up to 1" in message
    assert PrunerConfig(max_loss_increase=1).max_loss_increase == 1


@pytest.mark.parametrize(("name", "literal"), NAMES.items())
def test_names(name, literal):
    for good in get_args(literal):  # taylor needs gradients, which the walk does not have
        assert getattr(PrunerConfig(**{"reconstruction": "bias", name: good}), name) == good
    message = refused(**{name: get_args(literal)[0] + "x"})
    assert message.startswith(f"Unknown {name} '{get_args(literal)[0]}x'; allowed are ")
    assert all(good in message for good in get_args(literal))
    assert message.endswith(f"Did you mean '{get_args(literal)[0]}'?")
    for bad in (None, 3, ["obs"], ""):
        if (name, bad) != ("allocation", None):  # to be filled in
            assert f"Unknown {name} {bad!r}" in refused(**{name: bad})


@pytest.mark.parametrize(
    ("options", "allocation"),
    [
        ({"pruning_ratio": 0.3}, "adaptive"),
        ({"target_params": 1000}, "adaptive"),
        ({"max_loss_increase": 0.03}, "adaptive"),
        ({"pruning_ratio": 0.3, "vocab_size": 64}, "adaptive"),
        ({"pruning_ratio": 0.3, "attention_ratio": 0.5}, "uniform"),
        ({"mlp_ratio": 0.25}, "uniform"),
        ({"pruning_ratio": 0.3, "native_architecture": True}, "uniform"),
        ({"vocab_size": 64}, "uniform"),
        ({"pruning_ratio": 0}, "uniform"),
        ({"num_calibration_samples": 1}, "uniform"),
        ({"linear_threshold": 0.001, "criterion": "l1", "reconstruction": "none"}, "uniform"),
        ({"pruning_ratio": 0.3, "allocation": "uniform"}, "uniform"),
        ({"mlp_ratio": 0.25, "allocation": "adaptive"}, "adaptive"),
    ],
)
def test_allocation_that_is_not_given_follows_from_the_budget(options, allocation):
    config = PrunerConfig(**options)
    assert config.allocation == allocation
    assert PrunerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("bad", ["no", "false", 0, 1, None])
def test_stock_must_be_a_bool(bad):
    assert refused(native_architecture=bad) == f"native_architecture is {bad!r}; it must be true or false."


@pytest.mark.parametrize("bad", [3, True, ["text"], ""])
def test_text_column_must_be_a_name(bad):
    assert f"text_column is {bad!r}" in refused(text_column=bad)


@pytest.mark.parametrize("bad", ["", "  ", 3, True, ["law"]])
def test_domain_must_be_a_name(bad):
    assert f"domain is {bad!r}" in refused(domain=bad)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pruning_ratio": 0.2, "target_params": 5}, "pruning_ratio and target_params both"),
        ({"pruning_ratio": 0.2, "mlp_ratio": 0.1, "attention_ratio": 0.1}, "leave out pruning_ratio/target_params"),
        ({"target_params": 5, "mlp_ratio": 0.1, "attention_ratio": 0.1}, "leave out pruning_ratio/target_params"),
        ({"allocation": "adaptive", "native_architecture": True}, "native_architecture=True rules out"),
        ({"max_loss_increase": 0.03, "pruning_ratio": 0.2}, "and pruning_ratio fixes it; give one"),
        ({"max_loss_increase": 0.03, "target_params": 9}, "and target_params fixes it"),
        ({"max_loss_increase": 0.03, "mlp_ratio": 0.0}, "and mlp_ratio fixes it"),
        ({"max_loss_increase": 0.03, "attention_ratio": 0.5}, "and attention_ratio fixes it"),
    ],
)
def test_contradictions(options, said):
    assert said in refused(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"pruning_ratio": 0.2, "mlp_ratio": 0.1},
        {"pruning_ratio": 0.2, "attention_ratio": 0.1},
        {"target_params": 5, "attention_ratio": 0.1},
        {"mlp_ratio": 0.1, "attention_ratio": 0.1},
    ],
)
def test_combinations_that_are_meant(options):
    config = PrunerConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_dict_round_trip():
    config = PrunerConfig.from_dict(EVERYTHING)
    assert config.to_dict() == EVERYTHING
    assert PrunerConfig.from_dict(config.to_dict()) == config
    assert PrunerConfig.from_dict(PrunerConfig().to_dict()) == PrunerConfig()


def test_unknown_keys():
    with pytest.raises(ConfigError, match=r"Unknown option 'prunning_ratio'.*Did you mean 'pruning_ratio'\?"):
        PrunerConfig.from_dict({"prunning_ratio": 0.2})
    with pytest.raises(ConfigError, match=r"Unknown option 7; allowed are pruning_ratio, "):
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
    assert read_yaml(path) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"pruning_ratio: [0.2", "can't be read"),
        (b"- 1\n- 2\n", "holds a list"),
        (b"0.2\n", "holds a float"),
        (b"\xff\xfe\x00", "can't be read"),
        (b"!!python/object/apply:os.getcwd []\n", "can't be read"),
        (b"pruning_ratoi: 0.2\n", "Did you mean 'pruning_ratio'"),
        (b"pruning_ratio: lots\n", "pruning_ratio is 'lots'"),
        (b"native_architecture: 'no'\n", "native_architecture is 'no'"),
    ],
)
def test_bad_yaml(text, said, tmp_path):
    path = tmp_path / "options.yaml"
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
        ["--target-params", "12", "--mlp-ratio", "0.5", "--native-architecture"]
    )
    assert config == PrunerConfig(target_params=12, mlp_ratio=0.5, native_architecture=True)


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


def test_integers_that_no_generator_takes():
    with pytest.raises(ConfigError, match=r"pruning_seed is 9{23}; it must be below 2\^63"):
        PrunerConfig(pruning_seed=99999999999999999999999)


@pytest.mark.parametrize("bad", [0, 0.0, -0.1, 1.01, math.nan, "0.9", True])
def test_vocab_coverage(bad):
    message = refused(vocab_coverage=bad)
    assert message.startswith(f"vocab_coverage is {bad!r}; ")
    assert PrunerConfig(vocab_coverage=1).vocab_coverage == 1


def test_vocabulary_options_that_contradict():
    assert refused(vocab_size=64, vocab_min_count=2) == (
        "vocab_size and vocab_min_count each set the number of tokens; give one of them."
    )
    assert "allocation='adaptive'" in refused(vocab_auto=True, pruning_ratio=0.2, allocation="uniform")
    assert "a budget to share" in refused(vocab_auto=True)
    assert "so not stock" in refused(vocab_auto=True, pruning_ratio=0.2, native_architecture=True)
    assert "no mlp_ratio" in refused(vocab_auto=True, allocation="adaptive", pruning_ratio=0.2, mlp_ratio=0.1)
    config = PrunerConfig(vocab_auto=True, pruning_ratio=0.2)
    assert config.prunes_units
    assert config.prunes_vocabulary
    alone = PrunerConfig(vocab_size=64)
    assert alone.prunes_vocabulary
    assert not alone.prunes_units
    assert not PrunerConfig().prunes_vocabulary
