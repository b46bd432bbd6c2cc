"""Training protocols over ``transformers.Trainer``, and using what they leave; loaded when first asked for."""

from typing import TYPE_CHECKING

from sparsepeft._lazy import lazily

if TYPE_CHECKING:
    from sparsepeft.predictions import Prediction
    from sparsepeft.training.answers import Answer, answer
    from sparsepeft.training.config import RunConfig, load_config, parse_settings
    from sparsepeft.training.evaluation import Evaluation, evaluate
    from sparsepeft.training.generation import GenerationSettings, Generator
    from sparsepeft.training.inference import Predictor
    from sparsepeft.training.language_model import train_language_model
    from sparsepeft.training.lm_config import LanguageModelConfig, is_language_model, load_language_model_config
    from sparsepeft.training.lm_convert import sparsify_language_model
    from sparsepeft.training.questions import TableOptions, read_lines, read_questions
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
        "sparsepeft.predictions": ("Prediction",),
        "sparsepeft.training.answers": ("Answer", "answer"),
        "sparsepeft.training.config": ("RunConfig", "load_config", "parse_settings"),
        "sparsepeft.training.evaluation": ("Evaluation", "evaluate"),
        "sparsepeft.training.generation": ("GenerationSettings", "Generator"),
        "sparsepeft.training.inference": ("Predictor",),
        "sparsepeft.training.language_model": ("train_language_model",),
        "sparsepeft.training.lm_config": ("LanguageModelConfig", "is_language_model", "load_language_model_config"),
        "sparsepeft.training.lm_convert": ("sparsify_language_model",),
        "sparsepeft.training.questions": ("TableOptions", "read_lines", "read_questions"),
        "sparsepeft.training.run": ("train",),
    },
)
