"""Gram matrices: only half of the products is computed, and the whole matrix is there."""

from __future__ import annotations

import pytest
import torch

from hf_context_prune.utils.linalg import add_gram_


@pytest.mark.parametrize("features", [1, 255, 256, 257, 600])
def test_batches_add_up_to_the_gram_matrix(features):
    X = torch.randn(70, features, generator=torch.Generator().manual_seed(0))
    gram = torch.zeros(features, features)
    for batch in X.split(30):
        add_gram_(gram, batch)
    torch.testing.assert_close(gram, X.T @ X, atol=1e-4, rtol=1e-5)
    assert torch.equal(gram, gram.T)
