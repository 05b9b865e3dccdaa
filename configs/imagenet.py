"""ViT-S/16 on ImageNet-1k.

    jvitmoe train --config imagenet --config.data.dir=/data/tfds
    jvitmoe train --config imagenet:random --config.data.dir=/data/tfds

Not trained here: no accuracy is claimed. Sizes and recipe are those the field uses for ViT-S/16 (arXiv 2205.01580 for
pooling, positions, 90 epochs, batch 1024 and the peak learning rate; DeiT, arXiv 2012.12877, for decay, warm-up and
smoothing), without their mixup and RandAugment. In the random variant experts have four times that rate, which is
measured with Muon on CIFAR-10 only (docs/study.md, A): if the loss rises, set --config.optim.mlp_rate=1.
It streams `imagenet2012` as TFDS prepares it (ArrayRecord, 150 GB) and tests on its 50,000 validation images; for an
image folder, --config.data.name=folder (docs/data.md). On eight GPUs: scripts/launch_node.sh 8 and the command.
"""

from jvitmoe.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, with_variant


def get_config(variant: str = "dense") -> Config:
    config = Config(
        data=DataConfig(name="imagenet2012", stream=True, crop="resized", flip=True),
        model=ModelConfig(
            image_size=224,
            channels=3,
            classes=1000,
            patch=16,
            width=384,
            hidden=1536,
            depth=12,
            heads=6,
            pool="mean",
            positions="sincos2d",
        ),
        optim=OptimConfig(name="adamw", learning_rate=1e-3, weight_decay=0.05, warmup_epochs=5, clip_norm=1.0),
        train=TrainConfig(epochs=90, batch_size=1024, label_smoothing=0.1, log_every=50),
    )
    return with_variant(config, variant)
