"""Vision Transformers with randomly routed experts, averaged into one plain ViT, in JAX."""

__version__ = "0.1.0"
