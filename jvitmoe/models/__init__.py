"""The Flax modules. They take a ModelConfig and routes, and know nothing of devices or optimisers."""
