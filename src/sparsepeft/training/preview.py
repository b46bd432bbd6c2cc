"""Looking at data as a training would read them, before there is one."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer

from sparsepeft.backbones import describe_backbone, resolve_model
from sparsepeft.errors import UserError
from sparsepeft.inference.encoding import longest_input
from sparsepeft.tasks import load_task
from sparsepeft.tasks.local import describe_files
from sparsepeft.tasks.preview import describe_data, describe_lengths
from sparsepeft.tasks.spec import CUSTOM, canonical_name


def preview(task: str, model: str | None = None, **options: Any) -> dict[str, Any]:
    """Describe a task's data and how long its texts are for a model, of which only the tokenizer is loaded.

    Args:
        task: its name; ``"custom"`` takes own files.
        model: hub id or local folder; None is the bundled MiniLM.
        **options: of :func:`sparsepeft.tasks.load_task`.

    Returns:
        What JSON can hold: see :func:`sparsepeft.tasks.preview.describe_data`; ``tokens`` as
        :func:`sparsepeft.tasks.preview.describe_lengths` has them; for own files also ``files`` and ``columns``.

    Raises:
        UserError: the data or the model cannot be used.
    """
    name = resolve_model(model)
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(name), AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        from sparsepeft.methods.models import not_loaded  # PEFT takes a second

        raise UserError(not_loaded("tokenizer of the model", name, error)) from error
    limit = longest_input(tokenizer, config, None)
    data = load_task(task, **options)
    own_files: Any = {key: value for key, value in options.items() if key != "data_dir"}
    own = describe_files(own_files) if canonical_name(task) == CUSTOM else {}
    lengths = {"model": describe_backbone(name), **describe_lengths(data, tokenizer, limit)}
    return {**describe_data(data), **own, "tokens": lengths}
