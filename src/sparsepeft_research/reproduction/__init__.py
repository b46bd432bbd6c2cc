"""The paper's comparison again: a matrix of runs that resumes, and the tables made of it."""

from sparsepeft_research.reproduction.cluster import Cluster
from sparsepeft_research.reproduction.grid import GridSearch
from sparsepeft_research.reproduction.matrix import Matrix, Run
from sparsepeft_research.reproduction.planning import Planned, plan
from sparsepeft_research.reproduction.render import write_table
from sparsepeft_research.reproduction.reproduce import Outcome, plan_of, reproduce
from sparsepeft_research.reproduction.runner import run_all
from sparsepeft_research.reproduction.tables import Table, make_table

__all__ = [
    "Cluster",
    "GridSearch",
    "Matrix",
    "Outcome",
    "Planned",
    "Run",
    "Table",
    "make_table",
    "plan",
    "plan_of",
    "reproduce",
    "run_all",
    "write_table",
]
