"""The part of a model card that PEFT cannot know: how to load an adapter of this package."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from sparsepeft.provenance import write_bytes

_BEGIN, _END = "<!-- sparsepeft: how to load -->", "<!-- /sparsepeft -->"

_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}

_DENSE = """
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
"""
_SPARSE = """
This `{method}` adapter was trained on a model that `sparsepeft` had made sparse (`pip install sparsepeft`). Routers,
codebooks and settings are in its file; make the backbone sparse with them:

```python
from sparsepeft import load_sparse
from transformers import {auto_class}

backbone = {auto_class}.from_pretrained("{base}")
model = load_sparse(backbone, "path/to/this/folder")
```

A dense `{base}` refuses what acts inside its feed-forward layers; what acts elsewhere PEFT loads, with a warning, and
leaves the rest out.
"""


def write_card(folder: Path, config: PeftConfig, is_sparse: bool = False) -> None:
    """Add or renew the loading section of ``README.md`` in ``folder``, leaving the rest of the card as it is.

    Args:
        folder: the adapter's.
        config: of one of this package's methods, or of PEFT's own where ``is_sparse``.
        is_sparse: the adapter was trained on a sparse model; this package's configs know that themselves.
    """
    is_sparse |= (getattr(config, "backbone_fingerprint", None) or {}).get("sparse", False)
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if _BEGIN in text and _END in text:
        before, _, rest = text.partition(_BEGIN)
        text = before + rest.partition(_END)[2].lstrip("\n")
    write_bytes(path, f"{text.rstrip()}\n\n{_section(config, is_sparse)}\n".encode())


def keep_section(model: PeftModel) -> None:
    """Have the loading section in every card that is written for ``model``.

    ``Trainer.create_model_card`` replaces the card that ``save_pretrained`` wrote, and then asks the model itself for
    what PEFT adds to a card. No method of PEFT's tuners or configs is called after that, so the model does more.
    """
    model.create_or_update_model_card = partial(_create_or_update, model)  # type: ignore[method-assign]


def _create_or_update(model: PeftModel, output_dir: str) -> None:
    type(model).create_or_update_model_card(model, output_dir)
    # Adapters of other names have folders of their own, with a card each.
    config: Any = model.peft_config.get("default")
    if config is not None:
        write_card(Path(output_dir), config)


def _section(config: Any, is_sparse: bool) -> str:
    auto_class = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel")
    base = config.base_model_name_or_path or "path/to/the/backbone"
    id2label, formula = getattr(config, "id2label", None), getattr(config, "formula", None)
    labels = "\nLabels: " + ", ".join(id2label.values()) + ".\n" if id2label else ""
    parameters = f"\nParameters of the memory: {formula}\n" if formula else ""
    text = (_SPARSE if is_sparse else _DENSE).format(method=config.peft_type.value, auto_class=auto_class, base=base)
    return f"{_BEGIN}\n## How to load\n{text}{parameters}{labels}{_END}"
