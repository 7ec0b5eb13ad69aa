"""One budget for tokens, neurons and KV groups: it is met, shared by measured cost, or refused."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from hf_context_prune import PrunerConfig, ThresholdConfig
from hf_context_prune.config import NATIVE_TOLERANCE
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.splits import hold_out_documents
from hf_context_prune.errors import BudgetError, ConfigError, DataError
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.modeling.architectures import unit_costs
from hf_context_prune.modeling.geometry import LayerWidths, read_geometry
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.modeling.token_rows import num_rows, token_cost
from hf_context_prune.modeling.view import ModelView
from hf_context_prune.pipelines.validation_text import (
    describe_size_search,
    withhold_size_text,
    withhold_token_probe,
)
from hf_context_prune.pruning.allocation.adaptive import loss_on_hull
from hf_context_prune.pruning.allocation.sizes import UnitCurves
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.check_budget import check_budget
from hf_context_prune.pruning.notes import refit_note, sizes_note, vocabulary_note
from hf_context_prune.pruning.prune_model import prune_model
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.pruning.vocabulary.prune import VocabularyPruner
from hf_context_prune.pruning.vocabulary.selection import VocabularySize
from tests.support.marks import TINY_TEXT
from tests.support.tiny import tiny_model, tiny_tokenizer
from tests.support.tiny_domain import documents, model_for, shared_tokenizer
from tests.support.tiny_tokenizers import WORDS

pytestmark = TINY_TEXT

SMALL = {"num_calibration_samples": 16, "max_seq_length": 32}
AUTO = {
    "units": "tokens,neurons,kv_groups",
    "allocation": "adaptive",
    "pad_to_multiple_of": 8,
    "reconstruction": "none",
    "criterion": "wanda",
}


@cache
def dense(name="llama"):
    return model_for(name, shared_tokenizer("smollm2"))


def pruned(config, *, text=None, name="llama", **options):
    model, tokenizer, source = dense(name), shared_tokenizer("smollm2"), text or documents()
    calibration = CalibrationSet(source, config)
    if config.searches_tokens:
        options["token_probe"] = withhold_token_probe(model, tokenizer, calibration, config)
    return prune_model(model, tokenizer, calibration, config, **options)


def one_unit(name="llama"):
    spec = SPECS[dense(name).config.model_type]
    return max(unit_costs(dense(name), spec, read_geometry(dense(name).config, spec)).values())


SIZE = {"pruning_ratio": 0.3, "vocab_size": 256}
COVERAGE = {"pruning_ratio": 0.4, "vocab_coverage": 0.9, "reconstruction": "least_squares"}
MIN_COUNT = {"pruning_ratio": 0.4, "vocab_min_count": 5, "allocation": "adaptive", "reconstruction": "none"}


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", SIZE), ("llama-mqa-tied", COVERAGE), ("phi", MIN_COUNT), ("llama-mqa-tied", SIZE)],
)
def test_tokens_and_units_meet_one_budget(name, options):
    config = PrunerConfig(**options, **SMALL)
    model, tokenizer, plan = pruned(config, name=name)
    total, left = dense(name).num_parameters(), model.num_parameters()
    target = (1 - config.pruning_ratio) * total
    step = len(plan.layers) * one_unit(name)  # with uniform widths, one unit of every layer
    assert target - (step if config.allocation == "uniform" else one_unit(name)) < left <= target
    assert 0 < len(plan.vocabulary.kept) == len(tokenizer) == num_rows(model) < num_rows(dense(name))
    assert plan.widths != plan.dense
    assert plan.model_fingerprint == fingerprint(dense(name))
    assert plan.provenance["config"] == config.to_dict()
    if config.reconstruction == "none":  # nothing is refitted, so the plan says all
        again = apply_plan(dense(name), plan)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_tokens_alone_may_exceed_the_budget():
    config = PrunerConfig(pruning_ratio=0.05, vocab_size=128, **SMALL)
    model, _, plan = pruned(config)
    assert plan.widths == plan.dense
    removed = (num_rows(dense()) - 128) * token_cost(dense())
    assert dense().num_parameters() - model.num_parameters() == removed > 0.05 * dense().num_parameters()


def test_tokens_without_a_budget_leave_all_units():
    config = PrunerConfig(vocab_size=256, **SMALL)
    model, tokenizer, plan = pruned(config, provenance={"mine": 1})
    assert plan.widths == plan.dense
    assert len(plan.vocabulary.kept) == len(tokenizer) == num_rows(model) == 256
    assert plan.provenance["config"] == config.to_dict()
    assert plan.provenance["mine"] == 1
    assert plan.provenance["vocabulary"]["tokens_before"] == num_rows(dense())


def test_tokens_and_a_loss_budget():
    config = PrunerConfig(vocab_size=320, max_loss_increase=0.3, reconstruction="none", criterion="wanda", **SMALL)
    rest, search = withhold_size_text(documents(), shared_tokenizer("smollm2"), config)
    model, tokenizer, plan = pruned(config, text=rest, validation_loss=search.bits_per_byte)
    base = search.bits_per_byte(dense(), shared_tokenizer("smollm2"))
    increase = search.bits_per_byte(model, tokenizer) / base - 1
    assert plan.provenance["loss_budget"]["increase"] == pytest.approx(increase, abs=1e-6)
    assert increase <= 0.3
    assert len(plan.vocabulary.kept) == 320


def test_tokens_share_a_loss_budget():
    """Every trial may have another number of tokens; the result is within the limit, as measured."""
    counts, sizes = [], []
    for limit in (0.02, 0.2):
        config = PrunerConfig(max_loss_increase=limit, **AUTO, **SMALL)
        rest, search = withhold_size_text(documents(), shared_tokenizer("smollm2"), config)
        model, tokenizer, plan = pruned(config, text=rest, validation_loss=search.bits_per_byte)
        facts = plan.provenance["loss_budget"]
        base = search.bits_per_byte(dense(), shared_tokenizer("smollm2"))
        assert search.bits_per_byte(model, tokenizer) / base - 1 == pytest.approx(facts["increase"], abs=1e-6)
        assert facts["increase"] <= limit
        assert len(plan.vocabulary.kept) == len(tokenizer) < num_rows(dense())
        counts.append(len(facts["trials"]))
        sizes.append(model.num_parameters())
    assert max(counts) > 1
    assert sizes[1] <= sizes[0]


def test_the_budget_is_spent_where_it_costs_least(subtests):
    """No other number of tokens, with the cheapest layers beside it, has a smaller sum of losses."""
    rows, total = num_rows(dense()), dense().num_parameters()
    for words, ratio in ((WORDS[:13], 0.1), (WORDS[:13], 0.6), (WORDS, 0.3), (WORDS, 0.6)):
        with subtests.test(words=len(words), ratio=ratio):
            config = PrunerConfig(pruning_ratio=ratio, native_architecture=False, **AUTO, **SMALL)
            model, tokenizer, plan = pruned(config, text=documents(words))
            assert plan.provenance["config"] == config.to_dict()
            target = (1 - ratio) * total
            assert target - max(8 * token_cost(dense()), one_unit()) < model.num_parameters() <= target
            assert num_rows(model) == len(tokenizer)
            curves = read_curves(plan)
            tokens = curves.pop((0, "tokens"))
            view = ModelView.of(dense())
            layers = UnitCurves(curves, view.geometry, rows, view.costs, {})
            losses = {}
            for kept in [rows, *range(rows // 8 * 8, tokens[-1][0] - 1, -8)]:
                rest = total - target - (rows - kept) * token_cost(dense())
                if rest <= layers.most_removable:
                    own = loss_on_hull(tokens, [rows - kept])[0]
                    losses[kept] = own + layers.cheapest(max(0, math.ceil(rest))).loss
            assert plan.provenance["predicted_loss_increase"] == pytest.approx(min(losses.values()), rel=1e-4, abs=1e-6)
            assert losses[num_rows(model)] == pytest.approx(min(losses.values()), rel=1e-4, abs=1e-6)


def read_curves(plan):
    return {
        (0, "tokens") if name == "tokens" else (int(name.split(".")[0]), name.split(".")[1]): tuple(map(tuple, curve))
        for name, curve in plan.provenance["sensitivity"].items()
    }


def test_what_a_vocabulary_costs_is_measured_on_text_that_it_was_not_counted_on():
    config = PrunerConfig(pruning_ratio=0.2, **AUTO, **SMALL)
    text, tokenizer = documents(WORDS), shared_tokenizer("smollm2")
    *_, plan = pruned(config, text=text)
    rest, withheld = hold_out_documents(text)
    base = document_losses(dense(), tokenizer, withheld, max_seq_length=32)
    pruner = VocabularyPruner(dense(), tokenizer, rest, num_samples=16, max_seq_length=32)
    first, *others = plan.provenance["sensitivity"]["tokens"]
    assert first == [num_rows(dense()), 0.0]
    assert others
    for tokens, cost in others:
        trimmed = pruner.trim(VocabularySize(tokens, pad_to_multiple_of=8), refit=False)
        losses = document_losses(trimmed.model, trimmed.tokenizer, withheld, max_seq_length=32)
        excess = sum(loss.nll for loss in losses) - sum(loss.nll for loss in base)
        assert cost == pytest.approx(max(0.0, excess) / sum(loss.num_tokens for loss in base), abs=1e-4)


def test_one_width_for_all_layers_where_it_costs_next_to_nothing(subtests):
    """With a measured base loss the native architecture wins within 1 %; asked for, it always does."""
    for native in (True, None, False):
        with subtests.test(native=native):
            config = PrunerConfig(pruning_ratio=0.3, **AUTO, **SMALL, native_architecture=native)
            _, _, plan = pruned(config, text=documents(WORDS))
            losses = plan.provenance["predicted_losses"]
            alike = len(set(plan.widths)) == 1
            if native is None:
                close = losses["native"] - losses["variable"] <= NATIVE_TOLERANCE * losses["base"]
                assert alike == close
                assert sizes_note(plan)
            else:
                assert alike or not native
                assert set(losses) == ({"native"} if native else {"variable", "base"})
            if native:
                assert plan.provenance["predicted_loss_increase"] == pytest.approx(losses["native"], rel=1e-5)


@pytest.mark.parametrize("options", [{"vocab_size": 256}, AUTO], ids=["size", "auto"])
def test_the_same_config_gives_the_same(options):
    config = PrunerConfig(pruning_ratio=0.35, **SMALL, **options)
    (first, _, plan), (second, _, again) = pruned(config), pruned(config)
    assert plan == again
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


def test_budgets_that_cannot_be_met(subtests):
    for options, said in (
        ({**AUTO, "pruning_ratio": 0.97}, r"tokens, neurons, kv_groups together can give [\d,]+ \(0\.\d+ of all\)"),
        ({**AUTO, "units": "tokens", "pruning_ratio": 0.97}, "With neurons and kv_groups as well"),
        ({**AUTO, "units": "neurons", "pruning_ratio": 0.97}, r"let tokens go as well \(--units\)"),
        ({"vocab_size": 256, "pruning_ratio": 0.97}, "adaptive widths can remove at most"),
        ({"vocab_size": 64, "pruning_ratio": 0.2}, r"\b102\b"),
        ({"vocab_size": 4000}, r"\b392\b"),
        ({**AUTO, "target_params": 10**9}, f"{dense().num_parameters():,}"),
    ):
        with subtests.test(**options), pytest.raises(BudgetError, match=said):
            check_budget(dense(), shared_tokenizer("smollm2"), PrunerConfig(**options, **SMALL))
    with pytest.raises(BudgetError, match="parameters; tokens, neurons together can give"):  # heads that must stay
        check_budget(tiny_model("olmo2"), tiny_tokenizer(), PrunerConfig(pruning_ratio=0.97, **AUTO, **SMALL))


def test_the_fewest_tokens_are_considered_too():
    """A budget that needs them can be met, as it can with that number of tokens given."""
    most = PrunerConfig(pruning_ratio=0.5, **AUTO, **SMALL)
    with pytest.raises(BudgetError) as refused:
        check_budget(dense(), shared_tokenizer("smollm2"), replace(most, pruning_ratio=0.97))
    possible = float(str(refused.value).split("(")[-1].split(" ")[0])
    *_, plan = pruned(replace(most, pruning_ratio=possible - 0.005))
    fewest = VocabularyPruner(dense(), shared_tokenizer("smollm2"), documents()).fewest_tokens(8)
    assert len(plan.vocabulary.kept) == fewest == plan.provenance["sensitivity"]["tokens"][-1][0]


@pytest.mark.parametrize("options", [{"vocab_size": 300, "pad_to_multiple_of": 64}, {"vocab_coverage": 0.5}])
def test_what_is_left_for_units_is_told_in_terms_of_the_whole(options):
    """Whether it is known before the text is read or only after."""
    asked = round(0.96 * dense().num_parameters())
    with pytest.raises(BudgetError, match=rf"\b{asked:,} .*[\d,]+ go with the") as error:
        pruned(PrunerConfig(pruning_ratio=0.96, allocation="uniform", **options, **SMALL))
    if "vocab_size" in options:
        assert "320." in str(error.value)
        with pytest.raises(BudgetError, match=r"\b320\b"):
            check_budget(dense(), shared_tokenizer("smollm2"), PrunerConfig(pruning_ratio=0.96, **options, **SMALL))


HIGH = {**SMALL, "num_calibration_samples": 48, "pruning_ratio": 0.2}


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("llama-mqa-tied", {"vocab_size": 256}), ("llama-mqa-tied", {"native_architecture": True})],
    ids=["units", "tokens", "native"],
)
def test_the_head_of_the_pruned_model_is_refitted(name, options):
    text, withheld = hold_out_documents(documents(), seed=3)
    config = PrunerConfig(**HIGH, **options)
    low, tokenizer, plan = pruned(replace(config, refit_lm_head=False), text=text, name=name)
    high, again, longer = pruned(config, text=text, name=name)
    assert "refit" not in plan.provenance
    refit = longer.provenance["refit"]
    assert refit["after"] < refit["before"]
    assert (longer.layers, longer.vocabulary) == (plan.layers, plan.vocabulary)
    changed = {key for key, value in low.state_dict().items() if not torch.equal(value, high.state_dict()[key])}
    assert changed == {"lm_head.weight"} | ({"model.embed_tokens.weight"} if "tied" in name else set())
    losses = [
        sum(loss.nll for loss in document_losses(model, own, withheld, max_seq_length=32))
        for model, own in ((low, tokenizer), (high, again))
    ]
    assert losses[1] < losses[0]
    assert refit_note(plan) == ()
    assert "were refitted" in refit_note(longer)[0]


def test_a_refit_of_the_head_with_little_text_says_so():
    config = PrunerConfig(mlp_ratio=0.3, refit_lm_head=True, num_calibration_samples=2, max_seq_length=2000)
    *_, plan = pruned(config, text=TextSource.from_documents([next(iter(documents().documents))], name="one"))
    assert plan.provenance["refit"] is None
    assert "too little text" in refit_note(plan)[0]


def test_padding_is_the_first_to_go():
    tokenizer = shared_tokenizer("smollm2")
    model = model_for("llama", tokenizer, spare_rows=56)
    config = PrunerConfig(pruning_ratio=0.05, **AUTO, **SMALL)
    calibration = CalibrationSet(documents(WORDS), config)
    probe = withhold_token_probe(model, tokenizer, calibration, config)
    *_, plan = prune_model(model, tokenizer, calibration, config, token_probe=probe)
    assert plan.provenance["sensitivity"]["tokens"][:2] == [[448, 0.0], [392, 0.0]]
    assert plan.widths == plan.dense
    assert len(plan.vocabulary.kept) == 392


def test_where_all_tokens_stay_the_report_says_so():
    plan = PruningPlan.identity("llama", read_geometry(dense().config, SPECS["llama"]), "")
    assert vocabulary_note(plan, documents()) == ()
    weighed = replace(plan, provenance={"sensitivity": {"tokens": [[392, 0.0], [320, 0.4]]}})
    assert vocabulary_note(weighed, documents())[0].startswith("All tokens stay, since removing tokens costs more")
    mixture = replace(weighed, dense=(LayerWidths(0, 2, 8),) * 3, layers=(LayerPlan((), (0, 1), tuple(range(8))),) * 3)
    assert vocabulary_note(mixture, documents())[0].endswith("costs more than removing KV groups.")
    unfit = replace(plan, provenance={"all_tokens_stay": "They are few."})
    assert vocabulary_note(unfit, documents()) == ("All tokens stay: They are few.",)


def test_tokens_that_cost_more_than_a_loss_budget_allows():
    config = PrunerConfig(vocab_size=128, max_loss_increase=1e-6, reconstruction="none", criterion="wanda", **SMALL)
    rest, search = withhold_size_text(documents(WORDS), shared_tokenizer("smollm2"), config)
    with pytest.raises(BudgetError, match="the least that was tried"):
        pruned(config, text=rest, validation_loss=search.bits_per_byte)


def test_a_loss_budget_that_the_tokens_alone_meet():
    options = {"reconstruction": "none", "criterion": "random"}  # whose neurons cost much more than the tokens do
    config = PrunerConfig(vocab_size=376, pad_to_multiple_of=8, max_loss_increase=0.01, **options, **SMALL)
    rest, search = withhold_size_text(documents(), shared_tokenizer("smollm2"), config)
    model, _, plan = pruned(config, text=rest, validation_loss=search.bits_per_byte)
    assert num_rows(model) == 376
    trials = plan.provenance["loss_budget"]["trials"]
    assert describe_size_search(search, plan).measured == plan.provenance["loss_budget"]["increase"] <= 0.01
    gone = 1 - model.num_parameters() / dense().num_parameters()
    assert all(trial["increase"] > 0.01 for trial in trials if trial["share"] > gone + 1e-9)


def test_text_of_one_document_can_not_weigh_vocabularies():
    with pytest.raises(DataError, match=r"single one.*units='neurons,kv_groups'"):
        pruned(PrunerConfig(pruning_ratio=0.2, **AUTO, **SMALL), text=documents(count=1, length=2000))


def test_what_shapes_alone_refuse_is_refused_before_the_long_work(subtests):
    for options, said in (
        ({"vocab_size": 256, "pruning_ratio": 0.97}, r"\b13,056\b"),
        ({"vocab_size": 64, "pruning_ratio": 0.2}, r"\b102\b"),
        ({"vocab_size": 4000}, r"\b392\b"),
    ):
        with subtests.test(**options), pytest.raises(BudgetError, match=said):
            check_budget(dense(), shared_tokenizer("smollm2"), PrunerConfig(**options, **SMALL))


def test_what_is_measured_has_to_be_handed_in(subtests):
    for options, said in (
        ({"max_loss_increase": 0.1}, "max_loss_increase.*validation_loss="),
        ({"pruning_ratio": 0.2, "units": "tokens,neurons,kv_groups"}, "How many tokens.*token_probe="),
    ):
        config = PrunerConfig(**options, **SMALL)
        with subtests.test(**options), pytest.raises(ConfigError, match=said):
            prune_model(dense(), shared_tokenizer("smollm2"), CalibrationSet(documents(), config), config)


def test_a_threshold_for_the_embedding_alone_removes_tokens_alone():
    config = ThresholdConfig(embedding_threshold=0.0, **SMALL)
    text = documents()
    model, tokenizer, plan = prune_model(dense(), shared_tokenizer("smollm2"), CalibrationSet(text, config), config)
    assert plan.widths == plan.dense
    assert len(tokenizer) == num_rows(model) == len(plan.vocabulary.kept) < num_rows(dense())
    assert plan.provenance["config"]["embedding_threshold"] == 0.0
    assert plan.provenance["num_calibration_tokens"] == plan.provenance["vocabulary"]["tokens_counted"]
