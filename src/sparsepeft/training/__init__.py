"""Training protocols over ``transformers.Trainer``, and using what they leave; loaded when first asked for."""

from typing import TYPE_CHECKING

from sparsepeft.lazy import lazily

if TYPE_CHECKING:
    from sparsepeft.generation import GenerationSettings, Generator
    from sparsepeft.inference import Prediction, Predictor
    from sparsepeft.runs.config import RunConfig
    from sparsepeft.runs.config_file import load_config, parse_settings
    from sparsepeft.scoring import Answer, Evaluation, TableOptions, answer, evaluate, read_lines, read_questions
    from sparsepeft.training.lazy_adamw import LazyAdamW
    from sparsepeft.training.run import train
    from sparsepeft.training.sparse_gradients import SparseGradientTrainer, clip_grad_norm
    from sparsepeft.training.sparsify import sparsify_language_model

__all__ = [
    "Answer",
    "Evaluation",
    "GenerationSettings",
    "Generator",
    "LazyAdamW",
    "Prediction",
    "Predictor",
    "RunConfig",
    "SparseGradientTrainer",
    "TableOptions",
    "answer",
    "clip_grad_norm",
    "evaluate",
    "load_config",
    "parse_settings",
    "read_lines",
    "read_questions",
    "sparsify_language_model",
    "train",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "sparsepeft.generation": ("GenerationSettings", "Generator"),
        "sparsepeft.inference": ("Prediction", "Predictor"),
        "sparsepeft.runs.config": ("RunConfig",),
        "sparsepeft.runs.config_file": ("load_config", "parse_settings"),
        "sparsepeft.scoring": (
            *("Answer", "Evaluation", "TableOptions"),
            *("answer", "evaluate", "read_lines", "read_questions"),
        ),
        "sparsepeft.training.lazy_adamw": ("LazyAdamW",),
        "sparsepeft.training.run": ("train",),
        "sparsepeft.training.sparse_gradients": ("SparseGradientTrainer", "clip_grad_norm"),
        "sparsepeft.training.sparsify": ("sparsify_language_model",),
    },
)
