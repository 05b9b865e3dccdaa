"""Fine-tuning of a ViT-S/16 of timm on a folder of images, train/CLASS/FILE and test/CLASS/FILE, at 224 pixels.

    jvitmoe train --config finetune --config.data.dir=FOLDER \
        --config.init.source=timm://vit_small_patch16_224.augreg_in21k

With finetune:random the experts have four times the learning rate, which is measured with Muon on CIFAR-10
only (docs/study.md, A): if the loss rises, set --config.optim.mlp_rate=1. The source may also be a file of
timm's weights with its config.json beside it. For another ViT set model.width, model.depth and so on; a message says
which differ. Layers near the input learn slower (layer decay 0.75, arXiv 2106.08254). Not measured here: it needs a
GPU and the weights; tests/training/test_finetune.py runs it on a smaller ViT with random weights. For a TFDS set
instead of a folder: --config.data.name=NAME --config.data.dir=DIR.
"""

from jvitmoe.config import Config, DataConfig, InitConfig, ModelConfig, OptimConfig, TrainConfig, with_variant


def get_config(variant: str = "dense") -> Config:
    config = Config(
        data=DataConfig(name="folder", stream=True, crop="resized", flip=True, mixup=0.2),
        model=ModelConfig(
            **{"width": 0, "classes": 0, "drop_path": 0.1},  # all else as the source has it
        ),
        init=InitConfig(source="model.safetensors"),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=0.05, warmup_epochs=2, clip_norm=1.0, layer_decay=0.75),
        train=TrainConfig(epochs=20, batch_size=0, label_smoothing=0.1, ema=0.9998),
    )
    return with_variant(config, variant)
