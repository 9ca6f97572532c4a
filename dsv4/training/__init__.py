"""Training: losses, Muon + AdamW, schedules, router balancing, quantisation-aware training, the loop."""
