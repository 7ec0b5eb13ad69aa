"""Where tokens can't share the budget, or hardly count, the default prunes without them and says why in one line."""

from __future__ import annotations

import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_context_prune import PrunerConfig, prune
from hf_context_prune.errors import BudgetError, DataError, VocabularyError
from hf_context_prune.pruning import available_units
from hf_context_prune.pruning.available_units import choose_units, let_experts_give
from hf_context_prune.storage.loading import LoadedModel
from tests.support.marks import TINY_TEXT
from tests.support.runs import OPTIONS, QUICK
from tests.support.tiny_domain import documents, model_for, shared_tokenizer
from tests.support.tiny_tokenizers import WORDS

pytestmark = TINY_TEXT

SMALL = {**OPTIONS, "pruning_ratio": 0.2, "criterion": "wanda", "reconstruction": "none"}
ALL = "tokens,neurons,kv_groups"


def word_pieces():
    """A tokenizer of a kind that can't be trimmed."""
    words = {word: index for index, word in enumerate(dict.fromkeys(["[UNK]", "[EOS]", *WORDS]))}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]")


def pruned(tokenizer=None, text=None, **options):
    tokenizer = tokenizer or shared_tokenizer("smollm2")
    base = LoadedModel(model_for("llama", tokenizer), tokenizer, "tiny", None, None)
    how = {"eval_data": documents(WORDS[::-1]), "eval_options": QUICK}
    return prune(base, text or documents(), PrunerConfig(**SMALL, **options), **how)


@pytest.mark.parametrize(
    ("ratio", "experts"), [(0.02, None), (0.2, 6), (0.5, 3)], ids=["others alone", "others too", "most of them"]
)
def test_experts_give_what_a_budget_has_room_for(ratio, experts):
    """An expert of every layer is 8.8 % of this model."""
    tokenizer = shared_tokenizer("smollm2")
    base = LoadedModel(model_for("mixtral", tokenizer), tokenizer, "tiny", None, None)
    config = PrunerConfig(**{**SMALL, "pruning_ratio": ratio})
    chosen, _ = choose_units(base.model, tokenizer, config)
    assert chosen.num_experts == experts
    result = prune(base, documents(), config, eval_data=documents(WORDS[::-1]), eval_options=QUICK)
    kept = {widths.experts for widths in result.plan.widths}
    assert kept == {experts or 8}
    assert result.report.size.achieved_ratio >= ratio
    for options in ({"units": ALL}, {"vocab_coverage": 0.99}):
        given = PrunerConfig(**{**SMALL, "pruning_ratio": ratio, **options})
        assert let_experts_give(base.model, given, lambda _: None).num_experts is None
    for options in (
        {"num_layers": 2, "removable_layers": "1"},
        {"vocab_size": 300},
        {"expert_neurons_ratio": 0.4},
    ):  # these go first
        given = PrunerConfig(**{**SMALL, "pruning_ratio": ratio, **options})
        assert (choose_units(base.model, tokenizer, given)[0].num_experts or 8) >= (experts or 8)
    assert choose_units(base.model, tokenizer, PrunerConfig(max_loss_increase=0.1))[0].num_experts is None


def test_one_expert_more_goes_where_the_others_can_not_give_the_rest():
    model, asked = model_for("mixtral", shared_tokenizer("smollm2")), []

    def check(config):
        asked.append(config.num_experts)
        if config.num_experts == 6:
            raise BudgetError("the rest can't be reached")

    config = PrunerConfig(**SMALL)
    assert let_experts_give(model, config, check).num_experts == 5
    assert asked == [6, 5]
    with pytest.raises(
        BudgetError, match=r"With 2 of 8 experts in every layer .* are gone \(0\.5\d+ of all\), .*expert_neurons_ratio"
    ):
        choose_units(model, shared_tokenizer("smollm2"), PrunerConfig(**{**SMALL, "pruning_ratio": 0.9}))
    tokenizer = shared_tokenizer("smollm2")
    base = LoadedModel(model, tokenizer, "tiny", None, None)
    given = PrunerConfig(**{**SMALL, "num_experts": 5})
    result = prune(base, documents(), given, eval_data=documents(WORDS[::-1]), eval_options=QUICK)
    assert {widths.experts for widths in result.plan.widths} == {5}  # which is all that the budget asks for
    assert result.plan.vocabulary is None
    assert {widths.kv_groups for widths in result.plan.widths} == {widths.kv_groups for widths in result.plan.dense}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"tokenizer": word_pieces()}, r"The vocabulary can't be pruned\. .*WordPiece"),
        ({"most": 0.5}, r"Those that could go are \d+\.\d\d% of the parameters"),
        ({"text": documents(count=1, length=2000)}, "domain, which is a single one"),
    ],
    ids=["tokenizer", "small vocabulary", "single document"],
)
def test_the_run_goes_on_without_tokens_and_says_why(how, said, monkeypatch):
    if most := how.get("most"):
        monkeypatch.setattr(available_units, "SMALL_VOCABULARY", most)
    result = pruned(**{name: value for name, value in how.items() if name != "most"})
    assert result.plan.vocabulary is None
    assert result.plan.widths != result.plan.dense
    assert result.report.size.achieved_ratio >= 0.2
    assert result.plan.provenance["config"]["units"] == "neurons,kv_groups"
    (line,) = (note for note in result.report.notes if "tokens stay" in note)
    assert line.startswith("All tokens stay: ")
    assert "\n" not in line
    assert re.search(said, line)


def test_who_asks_for_tokens_is_told_that_they_can_not_go(subtests):
    for how, error, said in (
        ({"tokenizer": word_pieces()}, VocabularyError, "WordPiece"),
        ({"text": documents(count=1, length=2000)}, DataError, r"single one.*units='neurons,kv_groups'"),
    ):
        with subtests.test(said), pytest.raises(error, match=said):
            pruned(**how, units=ALL)


def test_a_config_that_says_which_units_is_left_as_it_is(subtests):
    tokenizer = word_pieces()
    model = model_for("llama", tokenizer)
    for options in ({"units": ALL}, {"units": "neurons"}, {"allocation": "uniform"}, {"vocab_size": 40}):
        with subtests.test(**options):
            config = PrunerConfig(pruning_ratio=0.2, **options)
            assert choose_units(model, tokenizer, config) == (config, None)
    usual = PrunerConfig(pruning_ratio=0.2)
    good = shared_tokenizer("smollm2")
    assert choose_units(model_for("llama", good), good, usual) == (usual, None)
    chosen, why = choose_units(model, tokenizer, usual)
    assert (chosen.units, chosen.searches_tokens) == ("neurons,kv_groups", False)
    assert why
