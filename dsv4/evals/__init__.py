"""Evaluations: tasks scored through the engine, with intervals; logits compared with an independent implementation."""
