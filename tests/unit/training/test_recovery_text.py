"""The text of a recovery: its validation documents, and a share of general text."""

from __future__ import annotations

import pytest
import torch

from hf_context_prune.data.documents import load_documents
from hf_context_prune.errors import ConfigError, DataError
from hf_context_prune.training.recovery.config import RecoveryConfig
from hf_context_prune.training.recovery.recover import recover
from hf_context_prune.training.recovery.text import RecoveryText
from tests.support.marks import TINY_TEXT
from tests.support.tiny import texts, tiny_model

pytestmark = TINY_TEXT

SMALL = {"max_seq_length": 32, "learning_rate": 3e-3}


def test_a_share_of_the_samples_is_general_text(tokenizer, subtests):
    domain, general = load_documents(texts(60)), [f"a wholly other word {i} of care" * 9 for i in range(30)]
    for share, size, options, domain_samples, general_samples in (
        (0.25, 30, {"max_steps": 10}, 30, 10),  # 40 samples
        (0.25, 1, {"max_steps": 10}, 30, 10),  # repeated in turn
        (0.9, 30, {"max_steps": 10}, 4, 36),
        (0.5, 30, {}, None, None),
    ):
        with subtests.test(share=share, size=size):
            config = RecoveryConfig(max_seq_length=32, **options)
            source = load_documents(general[:size])
            text = RecoveryText.of(domain, tokenizer, config, source, share)
            alone = RecoveryText.of(domain, tokenizer, config)
            assert text.training.fingerprint == alone.training.fingerprint
            samples, own = text.samples(tokenizer, config), alone.samples(tokenizer, config)
            count = len(own) if domain_samples is None else domain_samples
            mixed = samples[count:]
            assert torch.equal(samples[:count], own[:count])
            assert len(mixed) == (count if general_samples is None else general_samples)
            repeats = torch.unique(mixed, dim=0, return_counts=True)[1]
            assert repeats.max() - repeats.min() <= 1
            assert torch.equal(samples, text.samples(tokenizer, config))


def test_what_general_text_repeats_does_not_choose_weights(tokenizer):
    domain, config = load_documents(texts(60)), RecoveryConfig(**SMALL)
    alone = RecoveryText.of(domain, tokenizer, config).validation.text
    general = load_documents([alone.documents[0].text, *(f"other {i} words" * 9 for i in range(9))])
    chosen = RecoveryText.of(domain, tokenizer, config, general, 0.5).validation.text
    assert [one.text for one in chosen.documents] == [one.text for one in alone.documents[1:]]
    everything = load_documents([one.text for one in alone.documents])
    with pytest.raises(DataError, match="other documents and in-memory repeat all"):
        RecoveryText.of(domain, tokenizer, config, everything, 0.5)


def test_shares_of_general_text_that_make_no_sense(tokenizer, subtests):
    model, general = tiny_model("llama"), texts(9, seed=8)
    for options, said in (
        ({"general_data_ratio": 0.5}, "general_data_ratio is 0.5, but there is no general text"),
        ({"general_data": general}, "general_data_ratio is 0, but in-memory was given"),
        ({"general_data": general, "general_data_ratio": 1.0}, r"general_data_ratio is 1\.0"),
        ({"general_data": general, "general_data_ratio": True}, "general_data_ratio is True"),
    ):
        with subtests.test(said), pytest.raises(ConfigError, match=said):
            recover(model, texts(120), RecoveryConfig(**SMALL), tokenizer=tokenizer, **options)
