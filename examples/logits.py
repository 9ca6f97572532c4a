"""Logits of token ids with a cache: the same bits however a sequence is split."""

import torch

import dsv4
from dsv4.config import nano_path

model = dsv4.load(nano_path())
ids = torch.tensor([[0, 17, 23, 42, 99]])
cache = model.new_cache(batch_size=1, max_tokens=64)
first = model(ids[:, :2], cache=cache)
rest = model(ids[:, 2:], cache=cache)
print("the same bits:", torch.equal(torch.cat([first, rest], dim=1), model(ids)))
