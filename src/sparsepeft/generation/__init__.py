"""Texts that a trained language model continues; loaded when first asked for."""

from typing import TYPE_CHECKING

from sparsepeft.lazy import lazily

if TYPE_CHECKING:
    from sparsepeft.generation.generator import GenerationSettings, Generator

__all__ = ["GenerationSettings", "Generator"]

__getattr__, __dir__ = lazily(__name__, {"sparsepeft.generation.generator": ("GenerationSettings", "Generator")})
