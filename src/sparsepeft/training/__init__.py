"""Training protocols over ``transformers.Trainer``, and using what they leave."""

from sparsepeft.training.config import RunConfig, load_config, parse_settings
from sparsepeft.training.inference import Prediction, Predictor, evaluate
from sparsepeft.training.run import train

__all__ = ["Prediction", "Predictor", "RunConfig", "evaluate", "load_config", "parse_settings", "train"]
