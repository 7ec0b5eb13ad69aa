"""`CalibrationSet`: every tokenizer reads the text once."""

import pytest
import torch

from hf_context_prune.config import PrunerConfig
from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.errors import CalibrationWarning, ConfigError
from hf_context_prune.pruning.calibration import samples as module
from hf_context_prune.pruning.calibration.samples import CalibrationSet, batches_of
from tests.support.tiny import tiny_tokenizer

CONFIG = PrunerConfig(num_calibration_samples=4, max_seq_length=16)


def source(*texts):
    from hf_context_prune.data.documents import load_documents

    return load_documents([{"text": text, "doc": str(index)} for index, text in enumerate(texts)])


@pytest.fixture
def text() -> TextSource:
    return source(*(f"the court finds that party {index} has a duty of care " * 4 for index in range(8)))


def test_a_tokenizer_reads_the_text_once(text, monkeypatch):
    read = []

    def counted(*args, **options):
        read.append(options["num_samples"])
        return tokenize_samples(*args, **options)

    monkeypatch.setattr(module, "tokenize_samples", counted)
    calibration, first, second = CalibrationSet(text, CONFIG), tiny_tokenizer(), tiny_tokenizer()
    assert calibration.samples(first) is calibration.samples(first)
    assert calibration.samples(first).shape == (4, 16)
    calibration.samples(first, 6)
    assert torch.equal(calibration.samples(second), calibration.samples(first))
    assert read == ([4, 6] if first is second else [4, 6, 4])


def test_more_samples_than_the_config_asks_for_give_no_warning(text):
    short = CalibrationSet(source("the patient was given the dose of the court"), CONFIG)
    with pytest.warns(CalibrationWarning, match="4"):
        short.samples(tiny_tokenizer())
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short.samples(tiny_tokenizer(), 40)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75])
def test_more_samples_only_continue_the_order(share):
    domain = source(*(f"court {index} " * 16 for index in range(80)))
    general = source(*(f"dose {index} " * 16 for index in range(80)))
    config = PrunerConfig(num_calibration_samples=8, max_seq_length=16, general_data_ratio=share)
    calibration, tokenizer = CalibrationSet(domain, config, general), tiny_tokenizer()
    few, many = calibration.samples(tokenizer), calibration.samples(tokenizer, 32)
    assert (len(few), len(many)) == (8, 32)
    assert torch.equal(many[:8], few)
    from_general = ["dose" in tokenizer.decode(row) for row in many]
    assert sum(from_general[:8]) == round(8 * share)
    assert sum(from_general) == round(32 * share)


def test_general_text_that_is_not_there_is_refused_at_once(text):
    with pytest.raises(ConfigError, match=r"general_data_ratio is 0\.5"):
        CalibrationSet(text, PrunerConfig(num_calibration_samples=4, max_seq_length=16, general_data_ratio=0.5))


def test_batches_hold_every_sample_once(text):
    samples = CalibrationSet(text, CONFIG).samples(tiny_tokenizer())
    for tokens, sizes in ((1, [1, 1, 1, 1]), (32, [2, 2]), (48, [3, 1]), (1000, [4])):
        batches = batches_of(samples, batch_tokens=tokens)
        assert [len(batch["input_ids"]) for batch in batches] == sizes
        assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), samples)
