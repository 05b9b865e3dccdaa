"""Takes a run's dense model elsewhere:
`python -m jvitmoe.export --workdir runs/X --to {safetensors,timm,hf,onnx,stablehlo} --out DIR`.

Writes the model, a model card and sample.npz (test images and their logits), then reads the model back and compares.
A model that the target cannot express is refused before anything is written.
"""

import dataclasses
import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from absl import flags
from safetensors.numpy import save

from jvitmoe import cards, classifier, cli, compilation, formats, pretrained, tracking
from jvitmoe.config import Config, ModelConfig, UserError
from jvitmoe.data import augment, sources, stream
from jvitmoe.models import vit
from jvitmoe.tracking import console

TARGETS = ("safetensors", "timm", "hf", "onnx", "stablehlo")
READERS = {"onnx": "onnxruntime", "stablehlo": "jax.export"}  # what reads an export back; jvitmoe itself for the others
SAMPLE = 16  # test images in sample.npz
CLOSE = 1e-4  # largest difference of logits that passes


def main(argv: list[str]) -> None:
    """Writes one export. Raises UserError where the run, the target or the folder does not allow it."""
    values = cli.parse(argv, _define_flags)
    compilation.use_cache()
    workdir = cli.run_folder(values)
    if values.to not in TARGETS:
        raise UserError(f"--to is {values.to!r}; it must be one of {', '.join(TARGETS)}")
    if not values.out:
        raise UserError("--out is missing; give a new folder, such as --out=exports/digits_timm")
    out = Path(values.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out is {values.out!r}, which holds something; give a new folder")
    source = pretrained.read(workdir, checkpoint=values.checkpoint)
    assert source.config is not None, "a run has a config"
    config = source.config
    config.data.dir = values.data_dir or config.data.dir
    remarks = examine(values.to, config)
    for remark in remarks:
        console.print(f"note        {remark}")
    sample = make_sample(source, config, values.to)

    part = out.with_name(out.name + ".part")  # renamed at the end, so `out` is never incomplete
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        apart = _write(part, source, values.to, sample)
        result = tracking.read_result(workdir)
        card = cards.write(config, source.model, result, source.classes, values.to, source.step, remarks)
        tracking.write_text(part / "README.md", card)
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    reader = READERS.get(values.to, "jvitmoe")
    console.print(f"exported    {out}, checkpoint at step {source.step:,}, as {values.to}")
    console.print(
        f"checked     read back by {reader}: logits of {len(sample['labels'])} images within {apart:.2g} of ours"
    )
    if values.to in ("timm", "hf"):
        console.print(f"            README.md has a check that runs {cards.LIBRARY[values.to]} itself")


def _write(out: Path, source: pretrained.Source, target: str, sample: formats.Dict) -> float:
    """Writes the model and the sample. Returns the largest difference between the logits that the files give and the
    sample's. Raises UserError where it exceeds the tolerance."""
    model = dataclasses.replace(source.model, position_rows=0, dtype="float32", dropout=0.0, unroll=1)
    write = {"safetensors": _write_ours, "timm": _write_timm, "hf": _write_hf}
    write |= {"onnx": _write_onnx, "stablehlo": _write_stablehlo}
    run = write[target](out, source, model)
    np.savez(out / "sample.npz", allow_pickle=False, **sample)
    apart = max(
        float(np.abs(run(sample["inputs"][:n]) - sample["logits"][:n]).max()) for n in (1, len(sample["labels"]))
    )
    if not apart < CLOSE:
        cause = "".join(f" ({remark})" for remark in _epsilon(target, model))
        raise UserError(
            f"the exported model's logits are {apart:.2g} from ours, more than {CLOSE}{cause}; nothing was written: "
            "export --to=onnx, stablehlo or safetensors"
        )
    return apart


def examine(target: str, config: Config) -> list[str]:
    """Returns what should be known of this export. Raises UserError, with the config that would do, where the target
    has no such ViT."""
    model = config.model
    obstacles: list[tuple[bool, str, str]] = []
    if target in ("timm", "hf"):
        whose = "timm" if target == "timm" else "Hugging Face's ViT"
        obstacles = [
            (model.head_hidden > 0, f"{whose} has no two-layer head (model.head_hidden={model.head_hidden})", "0"),
            (model.norm != "pre", f"{whose} has no such blocks (model.norm={model.norm})", "pre"),
            (
                target == "hf" and model.pool != "cls",
                f"{whose} classifies by CLS and has no mean pooling (model.pool={model.pool})",
                "cls",
            ),
        ]
        fields = ("model.head_hidden", "model.norm", "model.pool")
        found = [(why, f"--config.{f}={v}") for f, (holds, why, v) in zip(fields, obstacles, strict=True) if holds]
        if found:
            raise UserError(
                f"{'; '.join(why for why, _ in found)}; nothing was written: train with "
                f"{' '.join(flag for _, flag in found)}, or export --to=onnx, stablehlo or safetensors"
            )
    if target == "onnx" and importlib.util.find_spec("jax2onnx") is None:
        raise UserError("--to=onnx needs jax2onnx, which is not installed: pip install 'jvitmoe[export]'")
    remarks = []
    if config.routing.router != "random":
        remarks.append(f"the router ({config.routing.router}) is left behind: this is the mean of the experts")
    if target == "hf" and not model.cls_position:
        remarks.append("CLS has no position here and must have one there: it is zeros, which computes the same")
    if target == "timm" and not model.cls_position and model.pool == "cls":
        remarks.append(
            "CLS has no position: timm's argument no_embed_class=True says so (model.cls_position=True has one)"
        )
    remarks += _epsilon(target, model)
    if target in ("timm", "hf") and model.positions == "sincos2d":
        remarks.append("positions are computed here and a table there: the same numbers, but there they would train")
    if target in ("timm", "hf"):
        remarks.append(
            "predict turns pictures as their EXIF says and puts transparency on white; the transform there does neither"
        )
    if target == "hf":
        remarks.append(
            'the processor with backend="pil" gives the pixels of predict, but shifted by one where (resized long side '
            f"- {model.image_size}) % 4 is 3; the default backend was measured up to 2 of 255 levels off besides"
        )
    return remarks


def _epsilon(target: str, model: ModelConfig) -> list[str]:
    """Returns the remark on LayerNorm's epsilon, if the target cannot express ours."""
    if target != "timm" or model.norm_epsilon in formats.TIMM_NORMS:
        return []
    known = " and ".join(f"{epsilon:g}" for epsilon in formats.TIMM_NORMS)
    return [f"timm's config.json can express LayerNorm epsilons {known}, not model.norm_epsilon={model.norm_epsilon:g}"]


def make_sample(source: pretrained.Source, config: Config, target: str) -> dict[str, np.ndarray]:
    """Returns the arrays of sample.npz: images of the test split, as the target takes them too, and their logits."""
    records = sources.browse(config.data, config.model).test
    test = stream.read(records.part(np.arange(min(SAMPLE, len(records)))), config)
    images_NHWc, labels_N = test.images_NHWC, test.labels_N
    inputs = np.asarray(augment.normalize(jnp.asarray(images_NHWc)))
    if target in ("timm", "hf"):
        inputs = np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))
    logits_NC = classifier.from_source(source).logits(images_NHWc)
    return {"images": images_NHWc, "inputs": inputs, "labels": labels_N, "logits": logits_NC}


Run = Callable[[np.ndarray], np.ndarray]  # inputs as the target takes them -> logits


def _write_ours(out: Path, source: pretrained.Source, model: ModelConfig) -> Run:
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in classifier.dense_arrays(source).items()}
    return _save(out, source, arrays, formats.our_config(model, source.classes, source.crop))


def _write_timm(out: Path, source: pretrained.Source, model: ModelConfig) -> Run:
    arrays = formats.write(source.params, formats.TIMM, cls_row=model.cls_position)
    return _save(out, source, arrays, formats.timm_config(model, source.classes, source.crop))


def _write_hf(out: Path, source: pretrained.Source, model: ModelConfig) -> Run:
    arrays = formats.write(source.params, formats.HF, cls_row=True)
    processor = formats.hf_preprocessor(model, source.crop)
    tracking.write_text(out / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")
    return _save(out, source, arrays, formats.hf_config(model, source.classes))


def _save(out: Path, source: pretrained.Source, arrays: formats.Dict, about: dict[str, Any]) -> Run:
    """Writes model.safetensors and config.json, and returns the model that reading them back gives."""
    (out / pretrained.WEIGHTS).write_bytes(save(arrays, metadata={"format": "pt"}))
    tracking.write_text(out / pretrained.CONFIG, json.dumps(about, indent=2) + "\n")
    again = pretrained.read(out)
    read_back = classifier.from_source(again)

    def run(inputs: np.ndarray) -> np.ndarray:
        images = inputs if again.kind == pretrained.OURS else inputs.transpose(0, 2, 3, 1)
        return read_back.logits(np.rint((images + 1.0) * 127.5).astype(np.uint8))

    return run


def _forward(source: pretrained.Source, model: ModelConfig) -> Callable[[jax.Array], jax.Array]:
    """Returns the model as a function of normalised images, its parameters in it and its layers written out: a loop
    over layers takes no batch of unknown size."""
    net = vit.build(model).clone(loops=False)
    params = jax.tree.map(jnp.asarray, formats.unflatten(classifier.dense_arrays(source)))
    return lambda images_BHWc: vit.logits(net, params, images_BHWc)


def _write_onnx(out: Path, source: pretrained.Source, model: ModelConfig) -> Run:
    # Shapes that are not written down, by the dozen, and tracebacks of parts that this JAX is too new for.
    for name in ("onnx_ir", "jax2onnx"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import jax2onnx
    import onnx
    import onnxruntime

    shape = ("B", model.image_size, model.image_size, model.channels)
    with jax.default_matmul_precision("highest"):
        proto = jax2onnx.to_onnx(_forward(source, model), [shape], model_name="vit")
    _name_and_pad(proto.graph)
    onnx.checker.check_model(proto)
    onnx.save(proto, str(out / "model.onnx"))
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    return lambda inputs: np.asarray(session.run(None, {"images": inputs})[0])


def _name_and_pad(graph: Any) -> None:
    """Names the input `images` and the output `logits`, and pads a batch of 0 to one image whose logits are dropped:
    on an empty batch onnxruntime's Einsum ends the process by SIGFPE."""
    from onnx import helper

    names = {graph.input[0].name: "padded_images", graph.output[0].name: "padded_logits"}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    graph.input[0].name, graph.output[0].name = "images", "logits"
    before = [
        helper.make_node("Constant", [], ["pad_zero"], value_ints=[0]),
        helper.make_node("Constant", [], ["pad_one"], value_ints=[1]),
        helper.make_node("Shape", ["images"], ["batch_size"], start=0, end=1),
        helper.make_node("Sub", ["pad_one", "batch_size"], ["pad_missing"]),
        helper.make_node("Max", ["pad_zero", "pad_missing"], ["pad_count"]),
        helper.make_node("Concat", ["pad_zero", "pad_count"], ["pads"], axis=0),
        helper.make_node("Pad", ["images", "pads", "", "pad_zero"], ["padded_images"]),
    ]
    nodes = [*before, *graph.node, helper.make_node("Slice", ["padded_logits", "pad_zero", "batch_size"], ["logits"])]
    del graph.node[:]
    graph.node.extend(nodes)


def _write_stablehlo(out: Path, source: pretrained.Source, model: ModelConfig) -> Run:
    (batch,) = jax.export.symbolic_shape("B")
    shape = (batch, model.image_size, model.image_size, model.channels)
    with jax.default_matmul_precision("highest"):
        exported = jax.export.export(jax.jit(_forward(source, model)), platforms=("cpu", "cuda"))(
            jax.ShapeDtypeStruct(shape, jnp.float32)
        )
    (out / "model.stablehlo").write_bytes(exported.serialize())
    again = jax.export.deserialize(bytearray((out / "model.stablehlo").read_bytes()))
    return lambda inputs: np.asarray(again.call(inputs))


def _define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", "", "Run folder that training wrote.", flag_values=values)
    flags.DEFINE_string("checkpoint", "latest", "latest, best (on validation) or a step.", flag_values=values)
    flags.DEFINE_string("to", "", f"What to write: {', '.join(TARGETS)}.", flag_values=values)
    flags.DEFINE_string("out", "", "New folder to write to.", flag_values=values)
    flags.DEFINE_string("data_dir", "", "Where the data lie, if not where training found them.", flag_values=values)


if __name__ == "__main__":
    cli.run(main)
