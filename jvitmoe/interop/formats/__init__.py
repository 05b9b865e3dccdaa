"""Export targets. Each file of this folder defines subclasses of `base.Target`; the import below registers them."""

from jvitmoe.interop.formats import programs, weights
from jvitmoe.interop.formats.base import TARGETS

__all__ = ["TARGETS", "programs", "weights"]
