"""A share of the calibration samples from general text: which samples, what is held out, what the plan says."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from hf_context_prune import EvalOptions, PrunerConfig, prune
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.errors import ConfigError, DataError
from hf_context_prune.evaluation.general_text import read_general
from hf_context_prune.evaluation.perplexity import document_losses
from hf_context_prune.pipelines.matrix import domain_matrix
from hf_context_prune.pipelines.recover import recover_folder
from hf_context_prune.pruning.calibration.samples import CalibrationSet, choose_general_share
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.training.recovery.config import RecoveryConfig
from tests.support.marks import TINY_TEXT
from tests.support.tiny_domain import documents, model_for, shared_tokenizer
from tests.support.tiny_tokenizers import WORDS

pytestmark = TINY_TEXT

OPTIONS = {"mlp_ratio": 0.3, "num_calibration_samples": 8, "max_seq_length": 32}


def general_text(count=30):
    draw = random.Random(5)
    return [{"text": " ".join(draw.choices(WORDS[20:], k=40)), "doc": f"g{i}"} for i in range(count)]


@pytest.fixture(scope="module")
def base():
    tokenizer = shared_tokenizer("llama3")
    return LoadedModel(model_for("llama", tokenizer), tokenizer, "tiny", None, None)


@pytest.mark.parametrize(("mix", "mixed"), [(0.0, 0), (0.25, 2), (0.5, 4), (0.9, 7)])
def test_the_share_of_blocks_is_the_one_asked_for(base, mix, mixed):
    domain, general = documents(WORDS[:8]), documents(WORDS[20:])
    config = PrunerConfig(**OPTIONS, general_data_ratio=mix)
    blocks = CalibrationSet(domain, config, general).samples(base.tokenizer)
    assert blocks.shape == (8, 32)
    both = [any(w in WORDS[20:] for w in base.tokenizer.decode(block).split()) for block in blocks]
    assert sum(both) == mixed
    assert torch.equal(blocks, CalibrationSet(domain, config, general).samples(base.tokenizer))
    if 1 < mixed < 7:
        assert sorted(both) != both  # spread, not at the end


def test_another_count_of_blocks_is_never_general_text_alone(base):
    domain, general = documents(WORDS[:8]), documents(WORDS[20:])
    config = PrunerConfig(**OPTIONS, general_data_ratio=0.875)
    blocks = CalibrationSet(domain, config, general).samples(base.tokenizer, 4)  # 3.5 of 4
    both = [any(w in WORDS[20:] for w in base.tokenizer.decode(block).split()) for block in blocks]
    assert sorted(both) == [False, True, True, True]


def test_what_is_mixed_in_is_not_what_is_measured(base, tmp_path):
    options = EvalOptions(benchmark=False, memory=False, general_data=general_text())
    config = PrunerConfig(**OPTIONS, general_data_ratio=0.5)
    domain = documents(WORDS[:8])
    result = prune(base, domain, config, eval_options=options)
    facts = result.plan.provenance
    whole = read_general(general_text(), apart_from=None, test=documents(WORDS[:8]), tokenizer=base.tokenizer, seed=0)
    assert whole is not None
    assert facts["general_data"] == whole.whole
    assert facts["config"]["general_data_ratio"] == 0.5
    part = read_general(
        general_text(), apart_from=None, test=documents(WORDS[:8]), tokenizer=base.tokenizer, seed=0, hold_out=True
    )
    assert part is not None
    assert part.calibration is not None
    held_out, fitted = ({x.text for x in one.documents} for one in (part.source, part.calibration))
    assert not held_out & fitted
    assert len(held_out) + len(fitted) == 30
    assert result.report.general is not None
    assert result.report.general.dataset.fingerprint == part.source.fingerprint
    assert "a share of 0.5 of" in " ".join(result.report.notes)
    plain = prune(base, domain, PrunerConfig(**OPTIONS, general_data_ratio=0.0), eval_options=options)
    assert plain.report.general is not None
    assert plain.report.general.dataset.fingerprint == whole.source.fingerprint  # nothing of it was calibrated on
    assert plain.plan.layers != result.plan.layers or not torch.equal(
        next(plain.model.model.layers[0].mlp.down_proj.parameters()),
        next(result.model.model.layers[0].mlp.down_proj.parameters()),
    )
    # recovery measures on the same part
    folder = result.save_pretrained(tmp_path / "mixed")
    recovery = RecoveryConfig(max_steps=1, num_epochs=9.0, max_seq_length=32, batch_size=2)
    later = recover_folder(folder, domain, recovery, eval_options=options)
    assert later.report.general is not None
    assert later.report.general.dataset.fingerprint == part.source.fingerprint


def test_mixing_needs_a_text_and_says_so_before_the_work(base, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_context_prune.pipelines.comparison.document_losses", None)
    with pytest.raises(ConfigError, match=r"general_data_ratio is 0\.5.*--general-data"):
        prune(base, documents(WORDS[:8]), PrunerConfig(**OPTIONS, general_data_ratio=0.5))
    with pytest.raises(ConfigError, match="general_data_ratio"):
        domain_matrix(base, {"a": "x", "b": "y"}, tmp_path, PrunerConfig(**OPTIONS, general_data_ratio=0.5))
    with pytest.raises(DataError):
        read_general(
            general_text(1), apart_from=None, test=documents(WORDS[:8]), tokenizer=base.tokenizer, seed=0, hold_out=True
        )


def identities(texts):
    return {" ".join(document.text.split()) for document in texts}


@pytest.mark.parametrize("searching", [False, True])
def test_what_is_measured_or_searched_on_is_not_mixed_in_either(base, monkeypatch, searching):
    """General text may hold the domain's documents under other names, or the evaluation text itself."""
    domain = documents(WORDS[:8])
    copies = [{"text": x.text, "doc": f"copy{i}"} for i, x in enumerate(domain.documents) if i % 2]
    options = EvalOptions(benchmark=False, memory=False, general_data=[*copies, *general_text(400)])
    used, measured, searched = [], [], []

    def blocks(source, *args, **how):
        used.extend(source.documents)
        return tokenize_samples(source, *args, **how)

    def losses(model, tokenizer, source, *, to, **how):
        to.extend(source.documents)
        return document_losses(model, tokenizer, source, **how)

    monkeypatch.setattr("hf_context_prune.pruning.calibration.samples.tokenize_samples", blocks)
    monkeypatch.setattr("hf_context_prune.pipelines.comparison.document_losses", partial(losses, to=measured))
    monkeypatch.setattr("hf_context_prune.evaluation.validation.document_losses", partial(losses, to=searched))
    size = {"max_loss_increase": 0.5} if searching else {"mlp_ratio": 0.3}
    config = PrunerConfig(**{**OPTIONS, "mlp_ratio": None} | size, general_data_ratio=0.5)
    report = prune(base, domain, config, eval_options=options).report
    assert measured
    assert bool(searched) == searching
    assert not identities(measured + searched) & identities(used)
    assert "3 of these documents were dropped" in report.dataset.held_out


def test_general_text_that_holds_all_of_the_evaluation_text_is_refused(base):
    domain, evaluation = documents(WORDS[:8]), general_text(3)
    options = EvalOptions(benchmark=False, memory=False, general_data=[*evaluation * 9, *general_text(60)])
    with pytest.raises(DataError, match=r"held-out.* general text"):
        prune(base, domain, PrunerConfig(**OPTIONS, general_data_ratio=0.5), eval_data=evaluation, eval_options=options)


def test_a_text_of_less_than_a_block_is_named(base):
    config = PrunerConfig(**OPTIONS | {"max_seq_length": 200}, general_data_ratio=0.5)
    short = documents(WORDS[20:], count=1, length=10)
    with pytest.raises(DataError, match=r"\b200\b.*max_seq_length"):
        CalibrationSet(documents(WORDS[:8]), config, short).samples(base.tokenizer)


@pytest.mark.parametrize("mix", [0.01, 0.99])
def test_a_share_that_is_no_sample_is_refused(base, mix):
    config = PrunerConfig(**OPTIONS, general_data_ratio=mix)
    with pytest.raises(ConfigError, match=rf"{mix}\b.*\b8\b.*0\.125.*0\.875"):
        prune(base, documents(WORDS[:8]), config, eval_options=EvalOptions(general_data=general_text()))


def test_an_eighth_is_general_text_where_there_is_some_and_nobody_asks_otherwise(base):
    for samples, given, general, share in (
        *((8, None, True, 0.125), (5, None, True, 0.125), (4, None, True, None), (1, None, True, None)),
        *((8, None, False, None), (8, 0.0, True, 0.0), (8, 0.5, True, 0.5), (8, 0.5, False, 0.5)),
    ):
        config = PrunerConfig(num_calibration_samples=samples, general_data_ratio=given)
        assert choose_general_share(config, general_text() if general else None) == share
    options = EvalOptions(benchmark=False, memory=False, general_data=general_text())
    result = prune(base, documents(WORDS[:8]), PrunerConfig(**OPTIONS), eval_options=options)
    assert result.plan.provenance["config"]["general_data_ratio"] == 0.125
    assert "a share of 0.125 of" in " ".join(result.report.notes)


def test_general_text_of_two_documents_leaves_tokens_in_the_budget(base):
    """One is measured on, one calibrated on: none is left to compare vocabularies on, so the domain alone decides."""
    options = EvalOptions(benchmark=False, memory=False, general_data=documents(WORDS[20:], count=2, length=200))
    small = {"num_calibration_samples": 8, "max_seq_length": 32, "criterion": "wanda", "reconstruction": "none"}
    plan = prune(base, documents(WORDS[:8]), PrunerConfig(pad_to_multiple_of=8, **small), eval_options=options).plan
    assert plan.provenance["config"]["general_data_ratio"] == 0.125
    assert "tokens" in plan.provenance["sensitivity"]
    assert "all_tokens_stay" not in plan.provenance


def test_text_that_can_not_be_mixed_in_is_only_measured_unless_a_share_is_asked_for(base, subtests):
    for name, general, said in (
        ("a single document", documents(WORDS[20:], count=1), "at least 2"),
        ("less than a sample", documents(WORDS[20:], count=3, length=8), "max_seq_length"),
        ("repetitions", [" ".join([*WORDS[20:], str(index)]) for index in range(20)], "repeats all"),
    ):
        with subtests.test(name):
            options = EvalOptions(benchmark=False, memory=False, general_data=general)
            config = PrunerConfig(**OPTIONS | {"max_seq_length": 64})
            report = prune(base, documents(WORDS[:8]), config, eval_options=options).report
            assert report.general.dataset.held_out.startswith("The documents are of")
            (line,) = (note for note in report.notes if note.startswith("No general text is calibrated on: "))
            assert said in line
            with pytest.raises(DataError, match=said):
                prune(base, documents(WORDS[:8]), replace(config, general_data_ratio=0.25), eval_options=options)


def test_shares_out_of_range(subtests):
    for value in (-0.1, 1.0, "half", True, float("nan")):
        with subtests.test(str(value)), pytest.raises(ConfigError, match="general_data_ratio"):
            PrunerConfig(general_data_ratio=value)
