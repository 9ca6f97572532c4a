"""Train a tiny model with every kind of layer, save it in the official layout, load it again."""

import tempfile
from dataclasses import replace

import torch

import dsv4
from dsv4.checkpoint import save_model
from dsv4.config import nano_path
from dsv4.model.transformer import Transformer

config = replace(dsv4.ModelConfig.from_pretrained(nano_path()), vocab_size=64)
model = Transformer(config)
model.init_weights(torch.Generator().manual_seed(1))
model.requires_grad_(True)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
ids = torch.arange(128).remainder(50).view(1, 128)  # counting, again and again
for step in range(8):
    logits = model(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
with tempfile.TemporaryDirectory() as folder:
    save_model(model, config, folder, "official", overwrite=True)
    print("loaded again:", dsv4.load(folder)(ids[:1, :8]).shape)
