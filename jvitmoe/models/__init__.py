"""Flax modules. They depend on ModelConfig and routes only, not on devices or optimisers."""
