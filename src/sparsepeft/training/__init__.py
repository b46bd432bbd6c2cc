"""Training protocols over ``transformers.Trainer``, and using what they leave; loaded when first asked for."""

from typing import TYPE_CHECKING

from sparsepeft.lazy import lazily

if TYPE_CHECKING:
    from sparsepeft.inference.answers import Answer, answer
    from sparsepeft.inference.evaluation import Evaluation, evaluate
    from sparsepeft.inference.generation import GenerationSettings, Generator
    from sparsepeft.inference.portable import Prediction
    from sparsepeft.inference.predictor import Predictor
    from sparsepeft.inference.questions import TableOptions, read_lines, read_questions
    from sparsepeft.runs.config import RunConfig, load_config, parse_settings
    from sparsepeft.runs.lm_config import LanguageModelConfig, is_language_model, load_language_model_config
    from sparsepeft.training.language_model import train_language_model
    from sparsepeft.training.lm_convert import sparsify_language_model
    from sparsepeft.training.run import train

__all__ = [
    "Answer",
    "Evaluation",
    "GenerationSettings",
    "Generator",
    "LanguageModelConfig",
    "Prediction",
    "Predictor",
    "RunConfig",
    "TableOptions",
    "answer",
    "evaluate",
    "is_language_model",
    "load_config",
    "load_language_model_config",
    "parse_settings",
    "read_lines",
    "read_questions",
    "sparsify_language_model",
    "train",
    "train_language_model",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "sparsepeft.inference.portable": ("Prediction",),
        "sparsepeft.inference.answers": ("Answer", "answer"),
        "sparsepeft.runs.config": ("RunConfig", "load_config", "parse_settings"),
        "sparsepeft.inference.evaluation": ("Evaluation", "evaluate"),
        "sparsepeft.inference.generation": ("GenerationSettings", "Generator"),
        "sparsepeft.inference.predictor": ("Predictor",),
        "sparsepeft.training.language_model": ("train_language_model",),
        "sparsepeft.runs.lm_config": ("LanguageModelConfig", "is_language_model", "load_language_model_config"),
        "sparsepeft.training.lm_convert": ("sparsify_language_model",),
        "sparsepeft.inference.questions": ("TableOptions", "read_lines", "read_questions"),
        "sparsepeft.training.run": ("train",),
    },
)
