"""Fine-tuning of a trained ViT on a folder of pictures, CLASS/FILE, or train/CLASS/FILE and test/CLASS/FILE.

    jvitmoe train --config finetune --config.init.source=timm://vit_small_patch16_224.augreg_in21k \
        --config.data.dir=FOLDER

timm:// and hf:// need `pip install -e '.[hf]'`. The model is that of the source (model.width=0), with a head for the
classes of the folder. Without a network and for pictures of about 32 pixels: --config.init.source=cifar10_cct, which
came with 60 simple shapes a class to 100 % of 26 test pictures (one seed, 57 seconds of CPU time of an EPYC Zen 4;
tests/training/test_finetune.py).

With finetune:random the experts have four times the learning rate, which is measured with Muon on CIFAR-10 only
(docs/study.md, A): if the loss rises, set --config.optim.mlp_rate=1. The source may also be a file of timm's weights
with its config.json beside it. Layers near the input learn slower (layer decay 0.75, arXiv 2106.08254). At 224 pixels
it is not measured: that needs a GPU and the weights; a test runs it on a smaller ViT with random weights. For a TFDS
set instead of a folder: --config.data.name=NAME --config.data.dir=DIR.
"""

from jvitmoe.config import Config, DataConfig, InitConfig, ModelConfig, OptimConfig, TrainConfig, with_variant


def get_config(variant: str = "dense") -> Config:
    config = Config(
        data=DataConfig(name="folder", stream=True, crop="resized", crop_area=0.35, flip=True, mixup=0.2),
        model=ModelConfig(
            **{"width": 0, "classes": 0, "drop_path": 0.1},  # all else as the source has it
        ),
        init=InitConfig(source="model.safetensors"),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=0.05, warmup_epochs=2, clip_norm=1.0, layer_decay=0.75),
        train=TrainConfig(epochs=20, batch_size=0, label_smoothing=0.1, ema=0.9998),
    )
    return with_variant(config, variant)
