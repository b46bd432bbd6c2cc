"""Training protocols over ``transformers.Trainer``, and using what they leave; loaded when first asked for."""

from typing import TYPE_CHECKING

from sparsepeft._lazy import lazily

if TYPE_CHECKING:
    from sparsepeft.training.config import RunConfig, load_config, parse_settings
    from sparsepeft.training.inference import Prediction, Predictor, evaluate
    from sparsepeft.training.language_model import train_language_model
    from sparsepeft.training.lm_config import LanguageModelConfig, is_language_model, load_language_model_config
    from sparsepeft.training.lm_convert import sparsify_language_model
    from sparsepeft.training.run import train

__all__ = [
    "LanguageModelConfig",
    "Prediction",
    "Predictor",
    "RunConfig",
    "evaluate",
    "is_language_model",
    "load_config",
    "load_language_model_config",
    "parse_settings",
    "sparsify_language_model",
    "train",
    "train_language_model",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "sparsepeft.training.config": ("RunConfig", "load_config", "parse_settings"),
        "sparsepeft.training.inference": ("Prediction", "Predictor", "evaluate"),
        "sparsepeft.training.language_model": ("train_language_model",),
        "sparsepeft.training.lm_config": ("LanguageModelConfig", "is_language_model", "load_language_model_config"),
        "sparsepeft.training.lm_convert": ("sparsify_language_model",),
        "sparsepeft.training.run": ("train",),
    },
)
