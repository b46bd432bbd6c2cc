"""Training protocols over ``transformers.Trainer``, and using what they leave."""

from sparsepeft.training.config import RunConfig, load_config, parse_settings
from sparsepeft.training.generation import GenerationSettings, Generator
from sparsepeft.training.inference import Prediction, Predictor, evaluate
from sparsepeft.training.language_model import train_language_model
from sparsepeft.training.lm_config import LanguageModelConfig, is_language_model, load_language_model_config
from sparsepeft.training.lm_convert import sparsify_language_model
from sparsepeft.training.run import train

__all__ = [
    "GenerationSettings",
    "Generator",
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
