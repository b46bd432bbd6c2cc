"""The part of a model card that PEFT cannot know: how to load an adapter of this package."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from sparsepeft.backbones import hub_id, public_name
from sparsepeft.folders import write_bytes

_BEGIN, _END = "<!-- sparsepeft: how to load -->", "<!-- /sparsepeft -->"

THIS_FOLDER = "path/to/this/folder"
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
model = PeftModel.from_pretrained(backbone, "{folder}")
```

Where Python does not read the `.pth` files of installed packages (`python -S`, a folder on `PYTHONPATH`), loading ends
in a `KeyError: '{method}'`: `import sparsepeft` first.

The adapter was trained on the backbone `{name}` and refuses any other.
"""
_PEFT = """
This is a `{method}` adapter of PEFT's.

```python
from peft import PeftModel
from transformers import {auto_class}

backbone = {auto_class}.from_pretrained("{base}"{num_labels})
model = PeftModel.from_pretrained(backbone, "{folder}")
```
"""
_SPARSE = """
This `{method}` adapter was trained on a model that `sparsepeft` had made sparse (`pip install sparsepeft`). What it
takes to make the backbone sparse in the same way (settings, codebooks, routers) is in its file:

```python
from sparsepeft import load_sparse
from transformers import {auto_class}

backbone = {auto_class}.from_pretrained("{base}"{num_labels})
model = load_sparse(backbone, "{folder}")
```

On a dense `{name}`, PEFT refuses what acts inside routed feed-forward layers, and loads the rest with a warning.
"""


def write_card(folder: Path, config: PeftConfig, is_sparse: bool = False) -> None:
    """Add or renew the loading section of ``README.md`` in ``folder``, leaving the rest of the card as it is.

    Except for the backbone's path, which PEFT writes into the card and which is of no use to others: it becomes the
    backbone's public name.

    Args:
        folder: the adapter's.
        config: of one of this package's methods, or of PEFT's own where ``is_sparse``.
        is_sparse: the adapter was trained on a sparse model; this package's configs know that themselves.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if _BEGIN in text and _END in text:
        before, _, rest = text.partition(_BEGIN)
        section = loading_section(config, is_sparse)
        text = f"{before}{section}\n{rest.partition(_END)[2].lstrip(chr(10))}"
    else:
        text = f"{text.rstrip()}\n\n{loading_section(config, is_sparse)}\n"
    backbone = config.base_model_name_or_path
    if backbone and backbone != public_name(backbone):
        text = text.replace(backbone, public_name(backbone))
    write_bytes(path, text.encode())


def loading_section(config: Any, is_sparse: bool = False, num_labels: int | None = None) -> str:
    """How to load an adapter, between markers by which :func:`write_card` finds it again.

    Args:
        config: the adapter's, of one of this package's methods or of PEFT's own.
        is_sparse: it was trained on a sparse model; this package's configs know that themselves.
        num_labels: outputs of the head, for PEFT's own methods, which do not know it.
    """
    is_sparse |= (getattr(config, "backbone_fingerprint", None) or {}).get("sparse", False)
    is_own = hasattr(config, "backbone_fingerprint")
    backbone = config.base_model_name_or_path
    name = public_name(backbone) if backbone else "the backbone"
    text = (_SPARSE if is_sparse else _DENSE if is_own else _PEFT).format(
        method=config.peft_type.value,
        auto_class=_AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel"),
        base=loadable_name(backbone),
        name=name,
        folder=THIS_FOLDER,
        num_labels="" if is_own or num_labels is None else f", num_labels={num_labels}",
    )
    id2label, formula = getattr(config, "id2label", None), getattr(config, "formula", None)
    labels = "\nLabels: " + ", ".join(id2label.values()) + ".\n" if id2label else ""
    parameters = f"\nParameters of the {config.part_name}: {formula}\n" if formula else ""
    return f"{_BEGIN}\n## How to load\n{text}{parameters}{labels}{_END}"


def loadable_name(backbone: str | None) -> str:
    """What a card's reader passes to ``from_pretrained``: the id on the hub, or a placeholder for a path."""
    return (hub_id(backbone) or f"path/to/{public_name(backbone)}") if backbone else "path/to/the/backbone"


def keep_section(model: PeftModel) -> None:
    """Add the loading section to every card that is written for ``model``.

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
