"""Post-training: reinforcement learning, distillation, and the sandbox that runs a model's programs."""
