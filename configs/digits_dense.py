"""A small dense ViT on scikit-learn's 1,797 real 8x8 digits: no download, under a minute on two CPU cores.

python -m jvitmoe.train --config configs/digits_dense.py
"""

from jvitmoe.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(name="digits", crop_padding=1),
        model=ModelConfig(image_size=8, channels=1, classes=10, patch=2, width=48, hidden=96, depth=4, heads=4),
        optim=OptimConfig(name="adamw", learning_rate=2e-3, weight_decay=0.05, warmup_epochs=5, clip_norm=1.0),
        train=TrainConfig(epochs=100, batch_size=64, eval_every=10),
    )
