"""Set before anything imports the Hub client, numpy or torch: no test may reach the Hub, or take more than a thread."""

import gc
import os
import sys
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"
# For numpy, and for the processes that tests start: two workers with two threads each slow one another down.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

from hf_context_prune.utils import precision
from tests.support.tiny import FAST_PRECISION, tiny_model, tiny_tokenizer

torch.set_num_threads(1)  # with two, OpenMP barriers cost more than tiny layers; and two processes share two cores
OF_MINUTES = {"test_real.py", "test_real_export.py", "test_real_vocabulary.py", "test_space_environment.py"}


@pytest.hookimpl(trylast=True)  # once `-m` has chosen
def pytest_collection_modifyitems(items):
    """Files with a test of a minute first, then those with most tests: a long one at the end leaves a worker idle."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in OF_MINUTES, -tests[item.path]))


def pytest_collection_finish():
    """What is imported stays: the full collection that every pruning asks for took half of the time of a tiny one."""
    gc.freeze()


@pytest.fixture(scope="session")
def loaded_smollm2():
    from hf_context_prune import load_model
    from hf_context_prune.storage.known_models import fetch_smollm2

    return load_model(fetch_smollm2(), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def smollm2(loaded_smollm2):
    """The real SmolLM2-135M-Instruct, for tests that are marked real, and fast products while they run."""
    precision.FAST_PRECISION = FAST_PRECISION
    yield loaded_smollm2
    precision.FAST_PRECISION = "highest"


@pytest.fixture(scope="session")
def licences():
    """Real text: software licences from the package index."""
    from hf_context_prune.data.demo import licence_texts

    return licence_texts()


@pytest.fixture
def run(place, capsys, monkeypatch):
    """The command line in this process: (exit code, stdout, stderr); "@name" is a path in the test's `place`."""
    from hf_context_prune.cli import app as cli

    def call(*arguments):
        words = [str(place / a[1:]) if isinstance(a, str) and a.startswith("@") else str(a) for a in arguments]
        monkeypatch.setattr(sys, "argv", ["hf-context-prune", *words])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        captured = capsys.readouterr()
        return exit_info.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_space(tmp_path_factory):
    """A dense and two pruned tiny models, for the tests of the Space."""
    from tests.support.space_models import make_models

    return make_models(tmp_path_factory.mktemp("space-models"))
