"""The model as a program with a free batch size: StableHLO and ONNX."""

import contextlib
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.export
import jax.numpy as jnp
import numpy as np

from jvitmoe.config import Config, ModelConfig
from jvitmoe.errors import UserError
from jvitmoe.experts import cost
from jvitmoe.extras import is_installed
from jvitmoe.interop import classifier, load, weight_names
from jvitmoe.interop.formats import base
from jvitmoe.models import vit

OPSET = 23  # of ONNX
MOST_BYTES = 2**31 - 2**20  # of parameters: an ONNX model in one file is a message of protobuf, below 2 GiB


def _forward(source: load.Source, model: ModelConfig) -> Callable[[jax.Array], jax.Array]:
    """Returns the model as a function of normalised images, with its parameters as constants and its layers unrolled,
    because exporters cannot combine a loop with a batch of unknown size."""
    net = vit.build(model).clone(loops=False)
    params = jax.tree.map(jnp.asarray, weight_names.unflatten(classifier.dense_arrays(source)))
    return lambda images_BHWc: vit.logits(net, params, images_BHWc)


@base.register
class StableHlo(base.Target):
    """StableHLO for CPU and CUDA, read back by `jax.export`."""

    name = "stablehlo"
    library = "jax"
    reader = "jax.export"
    use = """```python
from pathlib import Path

from jax import export

model = export.deserialize(bytearray(Path("model.stablehlo").read_bytes()))
run = model.call
```

The program runs on cpu and cuda; JAX reads it for at least six months after the version that wrote it."""
    check = 'run(sample["inputs"])'

    def write(self, out: Path, source: load.Source, model: ModelConfig) -> base.Run:
        (batch,) = jax.export.symbolic_shape("B")
        images = jax.ShapeDtypeStruct((batch, model.image_size, model.image_size, model.channels), jnp.float32)
        with jax.default_matmul_precision("highest"):
            exported = jax.export.export(jax.jit(_forward(source, model)), platforms=("cpu", "cuda"))(images)
        (out / "model.stablehlo").write_bytes(exported.serialize())
        again = jax.export.deserialize(bytearray((out / "model.stablehlo").read_bytes()))
        return lambda inputs: np.asarray(again.call(inputs))


@base.register
class Onnx(base.Target):
    """ONNX, read back by onnxruntime."""

    name = library = "onnx"
    reader = "onnxruntime"
    use = """```python
import onnxruntime

model = onnxruntime.InferenceSession("model.onnx")
run = lambda inputs: model.run(None, {model.get_inputs()[0].name: inputs})[0]
```"""
    check = 'run(sample["inputs"])'

    def examine(self, config: Config) -> list[str]:
        if not is_installed("jax2onnx"):
            raise UserError("--to=onnx needs jax2onnx, which is not installed: pip install 'jvitmoe[export]'")
        if (needed := 4 * cost.tree_size(vit.shapes(vit.build(config.model.plain())))) > MOST_BYTES:
            rule = f"--to=onnx writes at most {MOST_BYTES:,}; export --to=safetensors"
            raise UserError(f"the parameters have {needed:,} bytes; {rule}")
        return super().examine(config)

    def remarks(self, config: Config) -> list[str]:
        return [f"operator set {OPSET} of ONNX"]

    def write(self, out: Path, source: load.Source, model: ModelConfig) -> base.Run:
        # They log dozens of unknown shapes, and tracebacks of plugins that do not support this JAX; they print each
        # convolution.
        for name in ("onnx_ir", "jax2onnx"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        import jax2onnx
        import onnx
        import onnxruntime

        shape = ("B", model.image_size, model.image_size, model.channels)
        with jax.default_matmul_precision("highest"), contextlib.redirect_stdout(io.StringIO()):
            proto = jax2onnx.to_onnx(_forward(source, model), [shape], model_name="vit", opset=OPSET)
        _name_and_pad(proto.graph)
        onnx.checker.check_model(proto)
        onnx.save(proto, str(out / "model.onnx"))
        session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
        return lambda inputs: np.asarray(session.run(None, {"images": inputs})[0])


def _name_and_pad(graph: Any) -> None:
    """Names the input `images` and the output `logits`. Pads an empty batch to one image and drops its logits, because
    onnxruntime's Einsum ends the process by SIGFPE on an empty batch."""
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
