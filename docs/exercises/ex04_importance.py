"""Exercise 4 of docs/exercises.md: which tokens of the prompt matter (Sec. 4.1 of the paper).

    python -m pytest docs/exercises/ex04_importance.py
"""
import pytest
import torch

import sentencekv

def importance_by_hand(q, k, max_pool=1):
    """alpha_i: the attention weight that token i receives from the last N queries, summed -> (T,).

    q (Hq, N, d), k (H, T, d), T > N. The N queries belong to the last N of the T tokens, and none
    sees a later token. Query head i uses KV head i // (Hq / H). Then each token, except for the
    last N, gets the maximum of the `max_pool` weights around it (an odd number; at the ends, of
    those that exist). Use no function of sentencekv.py; loops are welcome.
    """
    raise NotImplementedError

# ------------------------------------------------------------------------------------------ tests

@pytest.mark.parametrize("max_pool", [1, 3, 7])
@pytest.mark.parametrize("Hq, H, N, T", [(1, 1, 1, 2), (4, 2, 3, 20), (6, 2, 5, 9), (4, 4, 8, 40)])
def test_importance_is_that_of_the_cache(max_pool, Hq, H, N, T):
    random = torch.Generator().manual_seed(T)
    q = 2 * torch.randn(Hq, N, 8, generator=random, dtype=torch.float64)
    k = torch.randn(H, T, 8, generator=random, dtype=torch.float64)
    want = sentencekv.importance(q, k, max_pool)
    torch.testing.assert_close(importance_by_hand(q, k, max_pool).float(), want)
