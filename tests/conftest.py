"""Set before anything imports the Hub client: no test may reach the Hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)  # with two, OpenMP barriers cost more than tiny layers


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()
