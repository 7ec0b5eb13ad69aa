"""`balance_sources`: what is calibrated on, counted, compared, trained on and told."""

import logging
import random

import pytest
import torch

from hf_context_prune import EvalOptions, PrunerConfig, prune, prune_vocabulary
from hf_context_prune.data.documents import TextDocument, TextSource
from hf_context_prune.data.splits import TextSplit
from hf_context_prune.errors import ConfigError, DataError
from hf_context_prune.pipelines.recover import train_back
from hf_context_prune.pipelines.validation_text import withhold_token_probe
from hf_context_prune.pruning.calibration.samples import CalibrationSet
from hf_context_prune.pruning.prune_model import PrunedModel
from hf_context_prune.pruning.vocabulary.prune import VocabularyPruner
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.training.callback.checks import check_config
from hf_context_prune.training.recovery.config import RecoveryConfig
from hf_context_prune.training.recovery.text import RecoveryText
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import model_for, shared_tokenizer
from tests.support.tiny_tokenizers import WORDS

pytestmark = TINY_TEXT

SMALL = {"num_calibration_samples": 16, "max_seq_length": 32}
LARGE, FEW = WORDS[:6], WORDS[8:14]
"""Words of the source of nine tenths of the documents, and of the other."""


def text_of(large=90, few=10, words_each=40):
    draw = random.Random(3)
    documents = [
        TextDocument(" ".join(draw.choices(words, k=words_each)), f"{name}{index}", name)
        for name, words, count in (("large", LARGE, large), ("few", FEW, few))
        for index in range(count)
    ]
    return TextSource.from_documents(documents, name="in-memory")


@pytest.fixture(scope="module")
def base():
    tokenizer = shared_tokenizer("llama3")
    return LoadedModel(model_for("llama", tokenizer), tokenizer, "tiny", None, None)


def share_of_few(samples, tokenizer):
    words = " ".join(tokenizer.decode(row, skip_special_tokens=True) for row in samples).split()
    return sum(word in FEW for word in words) / sum(word in LARGE or word in FEW for word in words)


@pytest.mark.parametrize("share", [None, 0.25])
def test_samples_and_those_of_the_refit(base, share):
    general = TextSource.from_documents([TextDocument("zz " * 200, f"g{n}", "general") for n in range(40)])
    found = {}
    for balances in (False, True):
        config = PrunerConfig(**SMALL, general_data_ratio=share, balance_sources=balances)
        calibration = CalibrationSet(text_of(300, 30), config, general if share else None)
        few, many = (calibration.samples(base.tokenizer, count) for count in (None, 40))
        assert torch.equal(many[:16], few)
        found[balances] = share_of_few(few, base.tokenizer), share_of_few(many, base.tokenizer)
    assert max(found[False]) < 0.35
    assert found[True] == pytest.approx((0.5, 0.5), abs=0.1)


def test_tokens_rank_by_the_mean_over_the_sources(base):
    text = text_of()
    for criterion in ("frequency", "expected"):
        pruners = {
            balances: VocabularyPruner(
                base.model, base.tokenizer, text, criterion=criterion, balance_sources=balances, max_seq_length=32
            )
            for balances in (False, True)
        }
        assert pruners[True].counts == pruners[False].counts  # coverage and min_count are of the text as it is
        rare, common = (base.tokenizer.encode(f" {words[0]}", add_special_tokens=False)[-1] for words in (FEW, LARGE))
        ratios = {balances: one.scores[rare] / one.scores[common] for balances, one in pruners.items()}
        assert ratios[True] > 2 * ratios[False]
        assert sum(pruners[True].scores.values()) == pytest.approx(1)
    with pytest.raises(DataError, match="column 'source'"):
        prune_vocabulary(base.model, base.tokenizer, text_of(few=0), vocab_size=320, balance_sources=True)


def test_vocabularies_are_compared_on_equal_parts(base):
    config = PrunerConfig(**SMALL, balance_sources=True)
    calibration = CalibrationSet(text_of(80, 50, words_each=900), config)
    probe = withhold_token_probe(base.model, base.tokenizer, calibration, config)
    (part,) = probe.texts
    sizes = [sum(len(d.text) for d in part.measured.documents if d.source == name) for name in ("large", "few")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    assert part.balance_sources


def test_a_recovery_repeats_small_sources(base):
    config, text = RecoveryConfig(max_seq_length=32), text_of()
    plain, balanced = (
        RecoveryText.of(text, base.tokenizer, config, balance_sources=balances).samples(base.tokenizer, config)
        for balances in (False, True)
    )
    assert len(balanced) == len(plain)  # a pass is as long
    assert share_of_few(plain, base.tokenizer) < 0.2
    assert share_of_few(balanced, base.tokenizer) > 2.5 * share_of_few(plain, base.tokenizer)
    limited = RecoveryConfig(max_seq_length=32, max_steps=2, batch_size=4)
    few = RecoveryText.of(text, base.tokenizer, limited, balance_sources=True).samples(base.tokenizer, limited)
    assert len(few) == 8
    assert share_of_few(few, base.tokenizer) == pytest.approx(0.5, abs=0.15)
    with pytest.raises(DataError, match="--balance-sources"):
        RecoveryText.of(text_of(few=0), base.tokenizer, config, balance_sources=True)


def test_a_run_says_that_it_was_used(base, caplog):
    options = EvalOptions(benchmark=False, memory=False)
    small = {"mlp_ratio": 0.3, **SMALL}
    result = prune(base, text_of(), PrunerConfig(**small, balance_sources=True), eval_options=options)
    assert result.plan.provenance["config"]["balance_sources"] is True
    (line,) = (note for note in result.report.notes if "--balance-sources" in note)
    assert line.startswith("The 2 sources of in-memory count equally")
    plain = prune(base, text_of(), PrunerConfig(**small), eval_options=options)
    assert not any("--balance-sources" in note for note in plain.report.notes)
    assert not torch.equal(
        plain.model.model.layers[0].mlp.down_proj.weight, result.model.model.layers[0].mlp.down_proj.weight
    )
    pruned = PrunedModel(result.model, result.tokenizer, result.plan)
    steps = RecoveryConfig(max_seq_length=32, max_steps=1)
    assert "as much of every source," in train_back(pruned, TextSplit.of(text_of()), steps)[1]
    with caplog.at_level(logging.WARNING):
        assert "of every source" not in train_back(pruned, TextSplit.of(text_of(few=0)), steps)[1]
    assert "has a single one" in caplog.text


def test_a_single_source_is_refused(base):
    config = PrunerConfig(mlp_ratio=0.3, **SMALL, balance_sources=True)
    with pytest.raises(DataError, match=r"all documents are of one \('large'\)"):
        prune(base, text_of(few=0), config, eval_options=EvalOptions(benchmark=False, memory=False))
    with pytest.raises(ConfigError, match="balance_sources"):
        check_config(PrunerConfig(balance_sources=True))
    with pytest.raises(ConfigError, match="true or false"):
        PrunerConfig(balance_sources="yes")
