"""Training protocols over ``transformers.Trainer``, and using what they leave."""

from sparsepeft.predictions import Prediction
from sparsepeft.training.answers import Answer, answer
from sparsepeft.training.config import RunConfig, load_config, parse_settings
from sparsepeft.training.evaluation import Evaluation, evaluate
from sparsepeft.training.inference import Predictor
from sparsepeft.training.language_model import train_language_model
from sparsepeft.training.lm_config import LanguageModelConfig, is_language_model, load_language_model_config
from sparsepeft.training.lm_convert import sparsify_language_model
from sparsepeft.training.questions import TableOptions, read_lines, read_questions
from sparsepeft.training.run import train

__all__ = [
    "Answer",
    "Evaluation",
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
