"""Training: losses, Muon + AdamW, schedules, router balancing, quantization-aware training, the loop."""
