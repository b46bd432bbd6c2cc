"""The part of a model card that PEFT cannot know: how to load an adapter of this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepeft.tuners.config import TaskAdapterConfig

_BEGIN, _END = "<!-- sparsepeft: how to load -->", "<!-- /sparsepeft -->"

_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def write_card(folder: Path, config: TaskAdapterConfig) -> None:
    """Add or renew the loading section of ``README.md`` in ``folder``, leaving the rest of the card as it is."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if _BEGIN in text and _END in text:
        before, _, rest = text.partition(_BEGIN)
        text = before + rest.partition(_END)[2].lstrip("\n")
    path.write_text(f"{text.rstrip()}\n\n{_section(config)}\n", encoding="utf-8")


def _section(config: TaskAdapterConfig) -> str:
    method = config.peft_type.value
    auto_class = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel")
    base = config.base_model_name_or_path or "path/to/the/backbone"
    labels = "\nLabels: " + ", ".join(config.id2label.values()) + ".\n" if config.id2label else ""
    parameters = f"\nParameters of the memory: {config.formula}\n" if config.formula else ""
    return f"""{_BEGIN}
## How to load

This is a `{method}` adapter made with `sparsepeft` (`pip install sparsepeft`). PEFT knows the method once
`sparsepeft` has been imported; without that import, loading ends in a `KeyError: '{method}'`.

```python
import sparsepeft  # registers the method with PEFT
from peft import PeftModel
from transformers import {auto_class}

backbone = {auto_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(backbone, "path/to/this/folder")
```

The adapter was trained on the backbone `{base}` and refuses any other.
{parameters}{labels}{_END}"""
