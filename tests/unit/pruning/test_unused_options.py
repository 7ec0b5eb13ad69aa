"""Options that are accepted and change nothing: each is refused, or named once in a warning."""

from __future__ import annotations

import warnings

import pytest

from hf_context_prune import prune_vocabulary
from hf_context_prune.config import PrunerConfig, build_config
from hf_context_prune.errors import BudgetError, CalibrationWarning, ConfigError, PruningWarning
from hf_context_prune.evaluation.options import EvalOptions
from hf_context_prune.pipelines.dry_run import dry_run
from hf_context_prune.pipelines.export import export_model
from hf_context_prune.pipelines.prune import prune
from hf_context_prune.pruning.check_budget import check_budget
from hf_context_prune.pruning.unused_options import warn_of_unused_options
from hf_context_prune.storage.loading import load_meta_model, load_model
from hf_context_prune.training.callback.callback import ContextPruneCallback
from hf_context_prune.training.callback.checks import check_reachable
from hf_context_prune.training.callback.schedule import PruningSchedule
from hf_context_prune.training.recovery.config import RecoveryConfig
from tests.support.callback_cases import trainer_for
from tests.support.marks import TINY_TEXT
from tests.support.tiny import texts, tiny_model, tiny_tokenizer

pytestmark = TINY_TEXT

ALONE = {"vocab_size": 280, "pad_to_multiple_of": 1}  # nothing but vocabulary entries goes
RATIO = {"pruning_ratio": 0.2}
LAYERS = {**RATIO, "units": "neurons,kv_groups"}
UNUSED = [
    ({**LAYERS, "pad_to_multiple_of": 8}, "pad_to_multiple_of=8 has no effect: no vocabulary entry is removed"),
    ({**LAYERS, "vocab_criterion": "frequency"}, "vocab_criterion='frequency' has no effect: no vocabulary entry"),
    ({"attention_ratio": 0.5, "round_to": 8}, "round_to=8 has no effect: no MLP neuron is removed"),
    ({"mlp_ratio": 0, "attention_ratio": 0.5, "round_to": 8}, "round_to=8 has no effect: no MLP neuron is removed"),
    ({**RATIO, "reconstruction": "none", "ridge": 0.5}, "ridge=0.5 has no effect: reconstruction='none' solves no"),
    ({**RATIO, "reconstruction": "bias", "ridge": 0.5}, "ridge=0.5 has no effect: reconstruction='bias' solves no"),
    ({**ALONE, "round_to": 8}, "round_to=8 has no effect: neither MLP neurons nor KV groups are removed"),
    ({**ALONE, "ridge": 0.5}, "ridge=0.5 has no effect: neither"),
    ({**ALONE, "criterion": "wanda"}, "criterion='wanda' has no effect: neither"),
    ({**ALONE, "allocation": "adaptive"}, "allocation='adaptive' has no effect: neither"),
    ({**ALONE, "reconstruction": "least_squares"}, "reconstruction='least_squares' has no effect: neither"),
    ({**RATIO, "units": "tokens", "round_to": 8}, "round_to=8 has no effect: neither"),
    ({"embedding_threshold": 0.0, "num_calibration_samples": 4}, "num_calibration_samples=4 has no effect: embedding"),
    ({"embedding_threshold": 0.0, "general_data_ratio": 0.5}, "general_data_ratio=0.5 has no effect: embedding_thre"),
]
USED = [
    RATIO,
    LAYERS,
    {**RATIO, "units": "tokens", "pad_to_multiple_of": 8, "vocab_criterion": "frequency"},
    {**RATIO, "pad_to_multiple_of": 8, "vocab_criterion": "frequency"},
    {**ALONE, "general_data_ratio": 0.5},
    {"target_params": 1000, "round_to": 8},
    {"mlp_ratio": 0.5, "round_to": 8},
    {"max_loss_increase": 0.1, "round_to": 8, "ridge": 0.5},
    {**RATIO, "reconstruction": "none", "criterion": "wanda", "allocation": "uniform"},
    {**RATIO, "vocab_size": 280, "pad_to_multiple_of": 8, "vocab_criterion": "frequency", "criterion": "wanda"},
    {**ALONE, "reconstruction": "none", "vocab_criterion": "frequency", "pruning_seed": 3},
    {**ALONE, "mlp_ratio": 0.5, "general_data_ratio": 0.5, "ridge": 1.0},
    {"linear_threshold": 0.1, "num_calibration_samples": 4, "general_data_ratio": 0.5},
]


def caught(run):
    """The texts of the warnings of a call."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [str(item.message) for item in found if issubclass(item.category, PruningWarning)]


def test_options_beside_which_others_change_nothing(subtests):
    for values, said in UNUSED:
        with subtests.test(str(values)):
            with pytest.warns(PruningWarning, match=said) as found:
                warn_of_unused_options(build_config(values))
            assert len(found) == 1
    for values in USED:
        with subtests.test(str(values)):
            assert not caught(lambda values=values: warn_of_unused_options(build_config(values)))
    both = build_config({**LAYERS, "pad_to_multiple_of": 8, "vocab_criterion": "frequency"})
    assert len(caught(lambda: warn_of_unused_options(both))) == 1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_model("llama", vocab_size=len(tiny_tokenizer())).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def pruned(base, eval_options=None, **values):
    values = {"num_calibration_samples": 8, "max_seq_length": 32, "allocation": "uniform"} | values
    if any(name.endswith("threshold") for name in values):
        del values["allocation"]
    options = eval_options or EvalOptions(benchmark=False, memory=False)
    return prune(load_model(base), texts(), build_config(values), eval_options=options)


def test_a_vocabulary_of_which_all_would_stay(base, subtests):
    model, tokenizer = tiny_model("llama", vocab_size=len(tiny_tokenizer())), tiny_tokenizer()
    total = len(tokenizer)
    for multiple in (10**9, 320):
        config = PrunerConfig(vocab_size=280, pad_to_multiple_of=multiple)
        said = rf"vocab_size is 280, which pad_to_multiple_of={multiple:,} rounds up to all {total} tokens, so none"
        for name, run in (
            ("before the text is read", lambda config=config: check_budget(model, tokenizer, config)),
            ("dry run", lambda config=config: dry_run(base, config)),
            (
                "function",
                lambda multiple=multiple: prune_vocabulary(
                    model, tokenizer, texts(), vocab_size=280, pad_to_multiple_of=multiple
                ),
            ),
        ):
            with subtests.test(f"{name}, {multiple}"), pytest.raises(BudgetError, match=said):
                run()
    with subtests.test("the remedy of the message works"):
        with pytest.raises(BudgetError, match=r"would be removed\. Ask for a smaller pad_to_multiple_of"):
            check_budget(model, tokenizer, PrunerConfig(vocab_size=280, pad_to_multiple_of=64))
        check_budget(model, tokenizer, PrunerConfig(vocab_size=280, pad_to_multiple_of=1))
    for how in ({"vocab_min_count": 1}, {"vocab_coverage": 0.9}):
        with subtests.test(str(how)):
            with pytest.warns(PruningWarning, match=f"No vocabulary entry is removed: .*keeps all {total}"):
                trimmed = prune_vocabulary(model, tokenizer, texts(), **how, pad_to_multiple_of=10**9, refit=False)
            assert trimmed.model.config.vocab_size == total


def test_a_width_that_no_layer_has(base, subtests):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for values in (RATIO, {"target_params": 60_000}, {"max_loss_increase": 0.1}):
        for allocation in ("adaptive", "uniform"):
            config = PrunerConfig(**values, round_to=1000, allocation=allocation)
            for name, run in (
                ("prune", lambda config=config: check_budget(model, tokenizer, config)),
                ("callback", lambda config=config: check_reachable(model, config, 0.5)),
                ("dry run", lambda config=config: dry_run(base, config)),
            ):
                if name != "prune" and config.max_loss_increase:
                    continue  # both refuse that option
                with (
                    subtests.test(f"{name} {values} {allocation}"),
                    pytest.raises(
                        BudgetError, match=r"round_to is 1,000, but .* at most 40 MLP neurons, so none could"
                    ),
                ):
                    run()
    with subtests.test("KV groups alone, as the message says"):
        check_budget(model, tokenizer, PrunerConfig(attention_ratio=0.5))


def test_runs_warn_once(base, subtests):
    runs = {
        "prune": (lambda: pruned(base, **RATIO, pad_to_multiple_of=8), "pad_to_multiple_of=8 has no effect"),
        "thresholds": (
            lambda: pruned(base, linear_threshold=1e-9, activation_threshold=1e-9),
            r"Nothing was removed or zeroed: nothing lies below linear_threshold=1e-09, activation_threshold=1e-09",
        ),
        "dry run": (lambda: dry_run(base, PrunerConfig(**LAYERS, pad_to_multiple_of=8)), "pad_to_multiple_of=8 has no"),
        "revision of a folder": (lambda: load_model(base, revision="main"), "revision='main' has no effect: .*base is"),
        "revision, dry run": (lambda: load_meta_model(base, revision="v1"), "revision='v1' has no effect"),
        "full, with a rank": (
            lambda: RecoveryConfig(lora_rank=8).warn_of_unused_options(),
            "lora_rank=8 has no effect: method='full' trains all weights",
        ),
        "callback": (
            lambda: ContextPruneCallback(PrunerConfig(**RATIO, pad_to_multiple_of=8, text_column="body")),
            "pad_to_multiple_of=8 has no effect: .* text_column='body' has no effect: the callback takes the token ids",
        ),
        "schedule": (
            lambda: ContextPruneCallback(schedule=PruningSchedule(start=1, end=6, num_prunings=1, shape="linear")),
            "end=6 has no effect: num_prunings=1 prunes at the start alone. shape='linear' has no effect",
        ),
    }
    for name, (run, said) in runs.items():
        with subtests.test(name):
            found = caught(run)
            assert len(found) == 1, found
            with pytest.warns(PruningWarning, match=said):
                warnings.warn(found[0], PruningWarning, stacklevel=1)
    with subtests.test("nothing to say"):
        assert not caught(lambda: pruned(base, **RATIO))
        assert not caught(lambda: RecoveryConfig(method="lora", lora_rank=8).warn_of_unused_options())
        assert not caught(lambda: ContextPruneCallback(schedule=PruningSchedule(start=1, num_prunings=1)))
        assert not caught(lambda: ContextPruneCallback(schedule=PruningSchedule(start=5, end=5, num_prunings=1)))
        assert not caught(lambda: load_model(base))


def test_an_export_without_text_names_options_of_the_text(base, tmp_path):
    with (
        pytest.warns(PruningWarning, match="text_column='body', max_tokens=5 has no effect: without data"),
        pytest.raises(ConfigError, match="nothing"),
    ):
        export_model(base, tmp_path / "out", format="nothing", text_column="body", max_tokens=5)


def test_a_pruning_in_training_on_less_text_than_asked_for(tmp_path):
    config = PrunerConfig(mlp_ratio=0.5, num_calibration_samples=64, max_seq_length=32)
    hook = ContextPruneCallback(config, PruningSchedule(start=2, end=4, num_prunings=2))
    with pytest.warns(CalibrationWarning, match="after step 2 calibrates on 8 samples of 32 tokens, and not on 64"):
        trainer_for(tmp_path, hook).train()
