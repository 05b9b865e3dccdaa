"""StableHLO with a free batch size, for CPU and CUDA, read back by `jax.export`."""

from pathlib import Path

import jax.export
import jax.numpy as jnp
import numpy as np

from jvitmoe.config import ModelConfig
from jvitmoe.interop import load
from jvitmoe.interop.targets import base


@base.register
class StableHlo(base.Target):
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
            exported = jax.export.export(jax.jit(base.forward(source, model)), platforms=("cpu", "cuda"))(images)
        (out / "model.stablehlo").write_bytes(exported.serialize())
        again = jax.export.deserialize(bytearray((out / "model.stablehlo").read_bytes()))
        return lambda inputs: np.asarray(again.call(inputs))
