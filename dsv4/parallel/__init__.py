"""Training over several processes on PyTorch's engine, applied to the model from outside."""
