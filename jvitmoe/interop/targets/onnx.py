"""ONNX with a free batch size, read back by onnxruntime."""

import contextlib
import importlib.util
import io
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jvitmoe.config import Config, ModelConfig
from jvitmoe.errors import UserError
from jvitmoe.experts import cost
from jvitmoe.interop import load
from jvitmoe.interop.targets import base
from jvitmoe.models import vit

OPSET = 23
MOST_BYTES = 2**31 - 2**20  # of parameters: a model in one file is a message of protobuf, below 2 GiB


@base.register
class Onnx(base.Target):
    name = library = "onnx"
    reader = "onnxruntime"
    use = """```python
import onnxruntime

model = onnxruntime.InferenceSession("model.onnx")
run = lambda inputs: model.run(None, {{model.get_inputs()[0].name: inputs}})[0]
```"""
    check = 'run(sample["inputs"])'

    def examine(self, config: Config) -> list[str]:
        if importlib.util.find_spec("jax2onnx") is None:
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
            proto = jax2onnx.to_onnx(base.forward(source, model), [shape], model_name="vit", opset=OPSET)
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
