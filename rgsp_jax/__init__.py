"""Merge fine-tuned models from their weights alone: pure, jitted, differentiable JAX kernels."""
