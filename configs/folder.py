"""A ViT on a folder of pictures of any size, train/CLASS/FILE and test/CLASS/FILE or CLASS/FILE: 192 x 6, at 64 pixels.

    jvitmoe train --config folder --config.data.dir=FOLDER
    jvitmoe train --config folder:random --config.data.dir=FOLDER

A start, not a recipe: what it gives depends on the pictures (docs/data.md, few pictures). With 200 simple shapes a
class and --config.optim.mlp_rate=2 it reached 97 % of 150 test pictures in 20 epochs, 4.5 minutes of CPU time of an
EPYC Zen 4; with fewer, fine-tune (configs/finetune.py). Copy the file to change more than a few settings. In the random
variant the experts have four times the learning rate, which is measured with Muon on CIFAR-10 only: if the loss rises,
set --config.optim.mlp_rate=1. To export it to Hugging Face, train with --config.model.pool=cls.
"""

from jvitmoe.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, with_variant


def get_config(variant: str = "dense") -> Config:
    config = Config(
        data=DataConfig(name="folder", stream=True, crop="resized", crop_area=0.35, flip=True),  # RandomResizedCrop
        model=ModelConfig(
            **{"image_size": 64, "channels": 3, "classes": 0, "patch": 8, "width": 192, "hidden": 768},
            **{"depth": 6, "heads": 3, "pool": "mean"},
        ),
        optim=OptimConfig(learning_rate=5e-4, warmup_epochs=2, clip_norm=1.0),  # AdamW, cosine to 0
        train=TrainConfig(epochs=20, batch_size=0, label_smoothing=0.1),
    )
    return with_variant(config, variant)
