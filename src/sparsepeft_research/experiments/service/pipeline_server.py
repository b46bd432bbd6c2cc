"""A server of several tasks as it is often written: a transformers pipeline for each, behind FastAPI.

    python -m sparsepeft_research.experiments.service.pipeline_server NAME=FOLDER ... PORT

Imports nothing of this project.
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

*named, port = sys.argv[1:]
pipelines = {
    name: pipeline("text-classification", model=folder, top_k=None)
    for name, folder in (one.split("=", 1) for one in named)
}
app = FastAPI()


class Text(BaseModel):
    """To be classified."""

    inputs: str


@app.post("/tasks/{task}")
def predict(task: str, text: Text) -> list[list[dict[str, Any]]]:
    """Score the labels."""
    scores: Any = pipelines[task]([text.inputs])
    return list(scores)


uvicorn.run(app, port=int(port), log_level="warning")
