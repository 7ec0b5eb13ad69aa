"""The search for a size: on known curves, with the number of trials counted; the whole path on a tiny trained model."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from hf_context_prune import PrunerConfig, prune
from hf_context_prune.data.documents import load_documents
from hf_context_prune.data.splits import TextSplit
from hf_context_prune.errors import BudgetError, DataError
from hf_context_prune.evaluation.reports.rows import table_rows
from hf_context_prune.pipelines import comparison
from hf_context_prune.pipelines.validation_text import withhold_size_text
from hf_context_prune.pruning.allocation.loss_search import MAX_SEQUENTIAL_TRIALS, TOLERANCE, SizeTrial, search_size
from tests.support.runs import QUICK, trained_model
from tests.support.tiny import texts

RANGE = {"start": 0.15, "smallest": 1e-6, "largest": 0.55}
WALK = {"enough": 0.85, "aim": 0.92, "max_trials": MAX_SEQUENTIAL_TRIALS}


def power(limit, share, exponent, *, noise=0.0):
    """A loss that reaches the limit at a share."""
    draw = random.Random(0)
    return lambda asked: SizeTrial(asked, limit * (asked / share) ** exponent * (1 + draw.gauss(0, noise)), "x")


def test_the_largest_share_within_the_limit_is_found_in_few_trials(subtests):
    for exponent, share, limit in itertools.product((1.0, 1.3, 2.5), (0.01, 0.1, 0.35, 0.5), (0.01, 0.5)):
        with subtests.test(exponent=exponent, share=share, limit=limit):
            found, trials = search_size(power(limit, share, exponent), limit, **RANGE)
            assert share - TOLERANCE <= found.share <= share * (1 + 1e-9)
            assert found in trials
            assert len(trials) <= 7


def test_noise_is_survived_and_the_limit_kept():
    found, trials = search_size(power(0.03, 0.3, 1.3, noise=0.1), 0.03, **RANGE)
    assert found.increase <= 0.03
    assert 0.2 < found.share < 0.4
    assert len(trials) <= 8


def test_where_everything_holds_everything_goes():
    for increase in (0.001, 0.0, -0.2):
        found, trials = search_size(lambda share, y=increase: SizeTrial(share, y, "x"), 0.03, **RANGE)
        assert found.share == RANGE["largest"]
        assert len(trials) <= 4


def test_a_coarse_grid_is_not_measured_twice():
    measured = {}

    def measure(asked):
        share = math.ceil(asked / 0.1 - 1e-9) * 0.1
        return measured.setdefault(share, SizeTrial(share, share, "x"))

    found, trials = search_size(measure, 0.25, start=0.15, smallest=1e-6, largest=0.5)
    assert found.share == pytest.approx(0.2)
    assert len(trials) == len(measured) <= 4


def test_only_the_smallest_may_hold():
    found, _ = search_size(lambda share: SizeTrial(share, 0.0 if share < 1e-5 else 1.0, "x"), 0.03, **RANGE)
    assert found.share == 1e-6


def test_nothing_holds():
    with pytest.raises(BudgetError, match=r"max_loss_increase is 0\.03.*0\.00%.*0\.4000"):
        search_size(lambda share: SizeTrial(share, 0.4 + share, "x"), 0.03, **RANGE)


def test_sequential_runs_are_few_and_use_what_is_allowed(subtests):
    """The size that is tried first costs `at_start` of the limit."""
    for exponent, at_start in itertools.product((1.0, 1.3, 2.5), (0.3, 0.9, 1.1, 3.0)):
        with subtests.test(exponent=exponent, at_start=at_start):
            share = 0.2 / at_start ** (1 / exponent)
            found, trials = search_size(power(0.03, share, exponent), 0.03, **RANGE | {"start": 0.2}, **WALK)
            assert len(trials) <= MAX_SEQUENTIAL_TRIALS
            assert len(trials) == 1 or at_start != 0.9  # over 85 % used: enough
            assert 0.5 * 0.03 < found.increase <= 0.03


def test_the_last_walk_goes_far_back_rather_than_end_with_nothing():
    asked = []

    def measure(share):
        asked.append(share)
        return SizeTrial(share, 0.04 if share > 0.1 else 0.01, "x")

    found, _ = search_size(measure, 0.03, start=0.15, smallest=1e-6, largest=0.55, **WALK)
    assert found.increase == 0.01
    assert len(asked) == MAX_SEQUENTIAL_TRIALS
    with pytest.raises(BudgetError, match="the least that was tried"):
        search_size(lambda share: SizeTrial(share, 0.04, "x"), 0.03, **RANGE, **WALK)


# The whole path


@pytest.fixture(scope="module")
def trained():
    return trained_model()


def run(model, tokenizer, **options):
    config = PrunerConfig(max_seq_length=32, num_calibration_samples=48, **options)
    return prune(model, texts(60), config, tokenizer=tokenizer, eval_options=QUICK)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"allocation": "adaptive"},
        {"reconstruction": "least_squares"},
        {"reconstruction": "sequential", "allocation": "adaptive"},
        {"round_to": 8, "native_architecture": True, "criterion": "wanda", "reconstruction": "none"},
    ],
    ids=str,
)
def test_the_smallest_model_within_the_limit(trained, tokenizer, options, monkeypatch):
    texts_scored = []
    scored = comparison.document_losses

    def spy(model, tokenizer, source, **kwargs):
        texts_scored.append(frozenset(document.text for document in source.documents))
        return scored(model, tokenizer, source, **kwargs)

    for module in ("pipelines.comparison", "evaluation.validation"):
        monkeypatch.setattr(f"hf_context_prune.{module}.document_losses", spy)
    result = run(trained, tokenizer, max_loss_increase=0.04, **options)
    budget, facts = result.report.budget, result.plan.provenance["loss_budget"]
    assert budget.allowed == facts["max_loss_increase"] == 0.04
    assert budget.measured == facts["increase"] <= 0.04
    trials = facts["trials"]
    assert budget.num_trials == len(trials) <= 8 + MAX_SEQUENTIAL_TRIALS
    chosen = next(trial for trial in trials if trial["increase"] == budget.measured)
    assert chosen["share"] == pytest.approx(result.report.size.achieved_ratio)
    walked = options.get("reconstruction", "sequential") == "sequential"
    assert chosen["reconstruction"] == options.get("reconstruction", "sequential")
    assert walked == ("sequential" in {trial["reconstruction"] for trial in trials})
    if not walked:
        assert all(t["increase"] > 0.04 for t in trials if t["share"] > chosen["share"])
    assert result.report.size.asked_ratio is None
    assert result.plan.provenance["config"]["max_loss_increase"] == 0.04
    assert result.plan.provenance["config"]["pruning_ratio"] is None
    # Searched on one text, reported on another, calibrated on a third.
    searched, reported = texts_scored[1], texts_scored[0]
    assert set(texts_scored) == {searched, reported}
    assert not searched & reported
    assert len(searched | reported) == 6 + 5
    assert budget.text in result.report.notes
    assert any("allowed +4.0 %" in row[-1] for row in table_rows(result.report))
    if options.get("allocation") == "adaptive":
        assert result.report.loss.predicted_excess > 0


def test_the_size_is_searched_for_the_model_that_comes_out(trained, tokenizer):
    result = run(trained, tokenizer, max_loss_increase=0.04)
    facts = result.plan.provenance["loss_budget"]
    rest = TextSplit.of(texts(60), tokenizer=tokenizer).calibration
    _, search_text = withhold_size_text(rest, tokenizer, PrunerConfig(max_seq_length=32))
    dense = search_text.bits_per_byte(trained, tokenizer)
    pruned = search_text.bits_per_byte(result.model, result.tokenizer)
    assert pruned / dense - 1 == pytest.approx(facts["increase"], abs=1e-6)


def test_a_prediction_that_is_off_by_a_constant_is_corrected_after_one_trial():
    def predict(share):
        return share**1.5

    for offset in (-0.1, 0.05):
        found, trials = search_size(
            lambda share, offset=offset: SizeTrial(share, predict(share) + offset, "x"),
            0.1,
            **RANGE,
            **WALK,
            predict=predict,
        )
        assert 0.085 <= found.increase <= 0.1
        assert len(trials) <= 3


def test_a_single_document_is_no_text_to_search_on(trained, tokenizer):
    config = PrunerConfig(max_loss_increase=0.04)
    with pytest.raises(DataError, match="max_loss_increase"):
        withhold_size_text(load_documents(texts(1)), tokenizer, config)


def test_more_loss_allows_a_smaller_model(trained, tokenizer):
    sizes = [run(trained, tokenizer, max_loss_increase=x).report.size.achieved_ratio for x in (0.03, 0.3)]
    assert sizes[0] < sizes[1]


def test_the_same_inputs_give_the_same_search(trained, tokenizer):
    first, second = (run(trained, tokenizer, max_loss_increase=0.05, allocation="adaptive").plan for _ in range(2))
    assert first == second
