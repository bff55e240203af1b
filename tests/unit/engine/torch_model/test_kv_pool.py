from __future__ import annotations

import pytest
import torch

from engine.backends.torch.kv_pool import KvPool
from engine.errors import CorruptUnit

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 8, 13])
def test_a_sequence_moves_between_pools_of_other_blocks(tiny_model, dtype, num_tokens):
    config = tiny_model("llama").checkpoint.config
    old = KvPool(config, 2, 4, 1, 2, 9, 4, dtype, CPU)
    new = KvPool(config, 3, 3, 0, 2, 5, 8, dtype, CPU)
    kv = torch.randn(num_tokens, 2, 2, config.head_dim).to(dtype)
    blocks = [7, 0, 5, 2]
    slots = torch.tensor([blocks[i // 4] * 4 + i % 4 for i in range(num_tokens)], dtype=torch.long)
    old.write(3, slots, kv)
    data = old.export_sequence(3, 2, blocks, num_tokens)
    assert len(data) == 2 * num_tokens * config.head_dim * dtype.itemsize
    new.import_sequence(3, 2, [4, 1], num_tokens, data)
    assert new.export_sequence(3, 2, [4, 1], num_tokens) == data
    got = new.gather(3, torch.tensor([4, 1]))[:num_tokens, 2]
    assert torch.equal(got, kv[:, 1])
    assert new.gather(3, torch.arange(5))[:, :2].abs().max() == 0  # other groups are untouched


def test_a_wrong_size_is_refused_and_stores_nothing(tiny_model):
    config = tiny_model("llama").checkpoint.config
    pool = KvPool(config, 0, 0, 0, 0, 2, 4, torch.float32, CPU)
    with pytest.raises(CorruptUnit, match="KV of \\(layer 0, group 0\\): 8 bytes"):
        pool.import_sequence(0, 0, [1], 3, b"12345678")
    assert pool.gather(0, torch.arange(2)).abs().max() == 0
