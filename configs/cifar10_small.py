"""A dense ViT for CIFAR-10 of a size that two CPU cores can train: 128 x 4, patch 8, 0.8 M parameters.

    jvitmoe train --config cifar10_small

For comparing routers where there is no GPU, with a sweep (docs/routing.md, Routers), not for accuracy.
"""

from jvitmoe.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(name="cifar10", crop_padding=4, flip=True),
        model=ModelConfig(
            image_size=32, channels=3, classes=10, patch=8, width=128, hidden=512, depth=4, heads=4, pool="mean"
        ),
        optim=OptimConfig(name="adamw", learning_rate=1e-3, weight_decay=0.05, warmup_epochs=1, clip_norm=1.0),
        train=TrainConfig(epochs=4, batch_size=128, label_smoothing=0.1, log_every=50),
    )
