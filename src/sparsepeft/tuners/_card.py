"""The part of a model card that PEFT cannot know: how to load an adapter of this package."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from sparsepeft.provenance import write_bytes

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
    write_bytes(path, f"{text.rstrip()}\n\n{_section(config)}\n".encode())


def keep_section(model: PeftModel) -> None:
    """Have the loading section in every card that is written for ``model``.

    ``Trainer.create_model_card`` replaces the card that ``save_pretrained`` wrote, and then asks the model itself for
    what PEFT adds to a card. No method of PEFT's tuners or configs is called after that, so the model does more.
    """
    model.create_or_update_model_card = partial(_create_or_update, model)  # type: ignore[method-assign]


def _create_or_update(model: PeftModel, output_dir: str) -> None:
    type(model).create_or_update_model_card(model, output_dir)
    config: Any = model.peft_config.get(
        "default"
    )  # adapters of other names have folders of their own, with a card each
    if config is not None:
        write_card(Path(output_dir), config)


def _section(config: TaskAdapterConfig) -> str:
    method = config.method
    auto_class = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel")
    base = config.base_model_name_or_path or "path/to/the/backbone"
    labels = "\nLabels: " + ", ".join(config.id2label.values()) + ".\n" if config.id2label else ""
    parameters = f"\nParameters of the memory: {config.formula}\n" if config.formula else ""
    return f"""{_BEGIN}
## How to load

This is a `{method}` adapter made with `sparsepeft`. PEFT and transformers load it wherever `sparsepeft` is installed
(`pip install sparsepeft`).

```python
from peft import PeftModel
from transformers import {auto_class}

backbone = {auto_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(backbone, "path/to/this/folder")
```

Where Python does not read the `.pth` files of installed packages (`python -S`, a folder on `PYTHONPATH`), loading ends
in a `KeyError: '{method}'`: `import sparsepeft` first.

The adapter was trained on the backbone `{base}` and refuses any other.
{parameters}{labels}{_END}"""
