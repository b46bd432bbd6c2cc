"""An HTTP service on the engine: one backbone, many tasks, in the shapes that clients speak."""

from sparsepeft_serve.app import create_app
from sparsepeft_serve.settings import ServeSettings

__all__ = ["ServeSettings", "create_app"]
