"""AdapterHub's side of ``equality.py``: runs in the peer's environment, never in the project's own.

    python answers.py FOLDER

For each case in ``FOLDER/cases.json`` builds a random model with an adapter and writes into ``FOLDER/NAME``:
``fresh.safetensors`` (the adapter as initialised), ``backbone.safetensors``, ``inputs.safetensors``, the trained-like
adapter and head as ``save_adapter`` writes them (``checkpoint``), and what the model answers (``MODE.safetensors``).
``FOLDER/versions.json`` comes last.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

CLASSES = {"bert": "BertForSequenceClassification", "roberta": "RobertaForSequenceClassification"}
CONFIGS = {"bert": "BertConfig", "roberta": "RobertaConfig"}
NAME = "peer"


def main() -> None:
    """Answer all cases."""
    logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns that saved adapters are not active yet
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for case in json.loads((folder / "cases.json").read_text()):
        answer(case, folder / case["name"])
    versions = {name: importlib.metadata.version(name) for name in ("adapters", "transformers", "torch")}
    versions["python"] = platform.python_version()
    (folder / "versions.json").write_text(json.dumps(versions))


def answer(case: dict, folder: Path) -> None:
    """Build the case's model, save it, and save what it computes."""
    import adapters  # which only the peer's environment has; our side shares the functions below

    styles = {"pfeiffer": adapters.SeqBnConfig, "houlsby": adapters.DoubleSeqBnConfig}
    folder.mkdir()
    torch.manual_seed(case["seed"])
    config = getattr(transformers, CONFIGS[case["model_type"]])(**case["config"])
    model = getattr(transformers, CLASSES[case["model_type"]])(config)
    own_keys = list(model.state_dict())  # adapters.init adds others
    adapters.init(model)
    model.add_adapter(NAME, config=styles[case["style"]](reduction_factor=case["reduction_factor"]))
    model.train_adapter(NAME)
    save_file(adapter_parameters(model), folder / "fresh.safetensors")
    randomize(model)
    model.save_adapter(str(folder / "checkpoint"), NAME)
    state = model.state_dict()
    save_file({key: state[key] for key in own_keys}, folder / "backbone.safetensors")
    inputs = random_inputs(config, case)
    save_file(inputs, folder / "inputs.safetensors")
    for mode in case["modes"]:
        model.to(getattr(torch, mode["dtype"])).train(mode["train"])
        set_dropout(model, mode["dropout"])
        torch.manual_seed(case["seed"])
        save_file(compute(model, model.base_model, inputs), folder / f"{mode['name']}.safetensors")


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors by name."""
    return {key: value.detach() for key, value in model.named_parameters() if f".adapters.{NAME}." in key}


def randomize(model: torch.nn.Module) -> None:
    """Move every value that starts at 0 or 1 (biases, normalisation layers) and make the adapter matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if ".adapters." in name else 0.1 if parameter.dim() == 1 else 0.0
            parameter.add_(torch.randn_like(parameter) * scale)


def random_inputs(config: Any, case: dict) -> dict[str, torch.Tensor]:
    """Token ids with padding on the right, labels, and a direction for the hidden states' gradient."""
    batch, length = case["batch"], case["length"]
    ids = torch.randint(5, config.vocab_size, (batch, length))
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, length - row :] = 0
    return {
        "input_ids": torch.where(mask == 1, ids, config.pad_token_id),
        "attention_mask": mask,
        "labels": torch.randint(0, config.num_labels, (batch,)),
        "direction": torch.randn(batch, length, config.hidden_size),
    }


def set_dropout(model: torch.nn.Module, probability: float) -> None:
    """Set the hidden states' dropout; attention's stays at 0, since the two transformers draw it differently."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and not name.endswith(".self.dropout") and ".adapters." not in name:
            module.p = probability


def compute(
    model: Any, encoder: Any, inputs: dict[str, torch.Tensor], names: dict[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """All hidden states, logits, loss, and the gradients of adapter, head and embeddings' output.

    Args:
        model: answers.
        encoder: the part of it that has the embeddings.
        inputs: of the model, and the ``direction`` of the hidden states' gradient.
        names: what trained parameters are called in the answers; their own names if None.
    """
    inputs = dict(inputs)
    direction = inputs.pop("direction")
    embedded: list[torch.Tensor] = []

    def note(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        embedded.append(output.requires_grad_())

    handle = encoder.embeddings.register_forward_hook(note)
    model.zero_grad()
    output = model(**inputs, output_hidden_states=True)
    handle.remove()
    (output.loss + (output.hidden_states[-1] * direction.to(output.logits)).mean(1).sum()).backward()
    results = {f"hidden_states.{index}": states.detach() for index, states in enumerate(output.hidden_states)}
    results |= {"logits": output.logits.detach(), "loss": output.loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            results[f"gradient.{names[name] if names else name}"] = parameter.grad
    results["gradient.embeddings"] = embedded[0].grad
    return {key: value.contiguous().clone() for key, value in results.items()}


if __name__ == "__main__":
    main()
