"""Planning what each module of a model becomes, so that the model is fast and keeps to a budget of perplexity."""

from sparsepeft.planning.plan import DENSE, Choice, Plan, fastest
from sparsepeft.planning.scoring import LossMeter, Text, read_text
from sparsepeft.planning.search import Candidate, Settings, keep_to_budget

__all__ = [
    "DENSE",
    "Candidate",
    "Choice",
    "LossMeter",
    "Plan",
    "Settings",
    "Text",
    "fastest",
    "keep_to_budget",
    "read_text",
]
