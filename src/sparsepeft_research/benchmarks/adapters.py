"""Are our bottleneck adapters AdapterHub's? Outputs and gradients of both on the same weights and inputs.

    sparsepeft benchmark adapters --output research/results/benchmarks/adapters_equality.json

Makes a virtual environment with ``adapters`` 1.3.0 and its transformers in ``.peers/adapters`` (once), lets it build
random BERT and RoBERTa models with ``seq_bn`` (Pfeiffer) and ``double_seq_bn`` (Houlsby) adapters and save what they
answer, then answers the same with ``BottleneckConfig``: all hidden states, logits, loss, gradients of adapter, head and
embeddings, in eval mode and in train mode (dropout off, and on with the same random numbers). A checkpoint that
``adapters`` saved is also read by ``load_adapterhub``.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from scipy.stats import ks_2samp
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from sparsepeft import BottleneckConfig
from sparsepeft.errors import RunFailed
from sparsepeft.tuners.adapterhub import load_adapterhub
from sparsepeft.tuners.bottleneck import BottleneckLayer
from sparsepeft_research.benchmarks.registry import Progress
from sparsepeft_research.peers import answers
from sparsepeft_research.peers.environment import DEFAULT_FOLDER, HERE, peer_python

LIMITS = {"float32": 1e-5, "float64": 1e-12}  # rounding in another order; float64 shows that nothing else differs
MIN_P_VALUE = 1e-4  # two samples of one distribution fall below it once in ten thousand
MODES = [
    {"name": "float32_eval", "dtype": "float32", "train": False, "dropout": 0.0},
    {"name": "float32_train", "dtype": "float32", "train": True, "dropout": 0.0},
    {"name": "float32_dropout", "dtype": "float32", "train": True, "dropout": 0.1},  # both draw the same numbers
    {"name": "float64_eval", "dtype": "float64", "train": False, "dropout": 0.0},
    {"name": "float64_dropout", "dtype": "float64", "train": True, "dropout": 0.1},
]
MODELS = {
    "bert": (BertConfig, BertForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
}
ODD = {"hidden_size": 39, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 51, "vocab_size": 71}
BASE = {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 3072}


# Our places, and AdapterHub's modules of a BERT-like layer that hold its adapters.
PLACES = {
    "bottleneck_attention": "attention.output.adapters",
    "bottleneck_ffn": "output.adapters",
    "bottleneck_output": "output.adapters",
}
LINEARS = {"down": "adapter_down.0", "up": "adapter_up"}


def run(*, peer_folder: str, progress: Progress) -> dict[str, Any]:
    """Compare all cases.

    Raises:
        RunFailed: an error exceeds the tolerance, or a fresh adapter is initialised differently.
    """
    torch.set_num_threads(1)
    python = peer_python(Path(peer_folder) if peer_folder else DEFAULT_FOLDER)
    cases = all_cases()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "cases.json").write_text(json.dumps(cases))
        progress("AdapterHub's answers")
        subprocess.run([str(python), str(HERE / "answers.py"), str(folder)], check=True)
        results = []
        for case in cases:
            results.append(compare(case, folder / case["name"]))
            progress(f"{case['name']}: " + ", ".join(f"{dtype} {worst(results[-1:], dtype):.1e}" for dtype in LIMITS))
        versions = json.loads((folder / "versions.json").read_text())
    failed = [result["name"] for result in results if not result["passed"]]
    if failed:
        raise RunFailed(f"These differ from AdapterHub's by more than the tolerance: {', '.join(failed)}.")
    return {
        "results": results,
        "settings": {"tolerance": LIMITS | {"initialisation_p_value": MIN_P_VALUE}, "peer": versions},
        "largest_error": {dtype: worst(results, dtype) for dtype in LIMITS},
    }


def all_cases() -> list[dict[str, Any]]:
    """Every model, style and size that is compared."""
    sizes = [("odd", ODD, reduction) for reduction in (1, 2.5, 4, 16, 64)]
    sizes += [("base-width", BASE | {"vocab_size": 500}, reduction) for reduction in (12, 16)]
    cases: list[dict[str, Any]] = []
    for model_type in MODELS:
        for style in ("pfeiffer", "houlsby"):
            for size, config, reduction in sizes:
                dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
                cases.append(
                    {
                        "name": f"{model_type} {style} {size} reduction {reduction}",
                        "model_type": model_type,
                        "style": style,
                        "reduction_factor": reduction,
                        "config": config | dropout,
                        "batch": 4,
                        "length": 11,
                        "seed": len(cases),
                        "modes": MODES,
                    }
                )
    return cases


def compare(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Answer a case and set it against what the peer left in ``folder``."""
    checkpoint = load_file(folder / "backbone.safetensors")
    inputs = load_file(folder / "inputs.safetensors")
    fresh = attach(case, checkpoint)
    names = peer_names(fresh)
    initialisation = compare_initialisation(own_tensors(fresh, names), load_file(folder / "fresh.safetensors"))
    imported = load_adapterhub(backbone(case, checkpoint), folder / "checkpoint")
    model = attach(case, checkpoint)
    trained = torch.load(folder / "checkpoint" / "pytorch_adapter.bin", weights_only=True)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for ours, peer in names.items():
            parameters[ours].copy_(trained[peer] if peer in trained else checkpoint[peer])
    errors = {}
    for mode in case["modes"]:
        dtype = getattr(torch, mode["dtype"])
        expected = load_file(folder / f"{mode['name']}.safetensors")
        for label, candidate in ((mode["name"], model), (f"{mode['name']}_imported", imported)):
            candidate.to(dtype).train(mode["train"])
            answers.set_dropout(candidate, mode["dropout"])
            torch.manual_seed(case["seed"])
            errors[label] = largest_errors(
                answers.compute(candidate, candidate.get_base_model().base_model, inputs, names), expected
            )
    result: dict[str, Any] = {
        **{key: case[key] for key in ("name", "model_type", "style", "reduction_factor", "config", "batch", "length")},
        "largest_errors": errors,
        "largest_values": largest_by_kind(load_file(folder / f"{MODES[0]['name']}.safetensors")),
        "initialisation": initialisation,
    }
    exact = all(worst([result], dtype) < limit for dtype, limit in LIMITS.items())
    return result | {"passed": exact and initialisation["passed"]}


def worst(results: list[dict[str, Any]], dtype: str) -> float:
    """The largest error of these cases among the modes of a dtype."""
    modes = [errors for result in results for mode, errors in result["largest_errors"].items() if dtype in mode]
    return max(max(errors.values()) for errors in modes)


def backbone(case: dict[str, Any], checkpoint: dict[str, Tensor]) -> torch.nn.Module:
    """The case's model with the peer's weights, every one of them."""
    config_class, model_class = MODELS[case["model_type"]]
    model = model_class(config_class(**case["config"]))
    model.load_state_dict(checkpoint)
    return model


def attach(case: dict[str, Any], checkpoint: dict[str, Tensor]) -> PeftModel:
    """The case's model with a fresh adapter of ours."""
    config = BottleneckConfig(style=case["style"], reduction_factor=case["reduction_factor"], task_type="SEQ_CLS")
    return get_peft_model(backbone(case, checkpoint), config)


def peer_names(model: PeftModel, peer_adapter: str = "peer") -> dict[str, str]:
    """Map each trained parameter of a BERT-like ``model`` to its name in AdapterHub's model."""
    names = {}
    for block_name, block in model.named_modules():
        if not isinstance(block, BottleneckLayer):
            continue
        for place, theirs in PLACES.items():
            for ours, linear in LINEARS.items():
                for kind in ("weight", "bias"):
                    ours_name = f"{block_name}.{place}.default.{ours}.{kind}"
                    base = block_name.removeprefix("base_model.model.")
                    names[ours_name] = f"{base}.{theirs}.{peer_adapter}.{linear}.{kind}"
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = {
        name: name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name in trained
        if ".modules_to_save." in name
    }
    return {name: names[name] for name in trained if name in names} | head


def own_tensors(model: PeftModel, names: dict[str, str]) -> dict[str, Tensor]:
    """The adapter's tensors under the peer's names."""
    parameters = dict(model.named_parameters())
    return {peer: parameters[name].detach() for name, peer in names.items() if ".adapters." in peer}


def compare_initialisation(ours: dict[str, Tensor], peer: dict[str, Tensor]) -> dict[str, Any]:
    """Parameter counts, spread of weights and biases of two fresh adapters."""

    def values(tensors: dict[str, Tensor], kind: str) -> Tensor:
        return torch.cat([tensor.flatten() for name, tensor in sorted(tensors.items()) if name.endswith(kind)])

    p_value = float(ks_2samp(values(ours, "weight").numpy(), values(peer, "weight").numpy()).pvalue)
    shapes_agree = {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in peer.items()}
    result: dict[str, Any] = {"same_distribution_p_value": p_value, "shapes_agree": shapes_agree}
    for side, tensors in (("ours", ours), ("peer", peer)):
        result[side] = {
            "parameters": sum(tensor.numel() for tensor in tensors.values()),
            "weight_std": values(tensors, "weight").std().item(),
            "largest_bias": values(tensors, "bias").abs().max().item(),
        }
    biases_are_zero = result["ours"]["largest_bias"] == result["peer"]["largest_bias"] == 0
    result["passed"] = shapes_agree and biases_are_zero and p_value > MIN_P_VALUE
    return result


def largest_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute error by kind of tensor; every tensor must be there on both sides.

    Raises:
        RuntimeError: one side has a tensor that the other lacks.
    """
    if actual.keys() != expected.keys():
        raise RuntimeError(f"Only one side has {sorted(actual.keys() ^ expected.keys())}; compare the same model.")
    return largest_by_kind({name: actual[name] - tensor for name, tensor in expected.items()})


def largest_by_kind(tensors: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute entry of all tensors of a kind; infinite where one is NaN."""
    largest: dict[str, float] = {}
    for name, tensor in tensors.items():
        value = tensor.abs().max().item()
        largest[_kind(name)] = max(largest.get(_kind(name), 0.0), value if value == value else float("inf"))
    return largest


def _kind(name: str) -> str:
    if not name.startswith("gradient."):
        return name.split(".")[0]
    if name == "gradient.embeddings":
        return name
    return "gradient.adapter" if ".adapters." in name else "gradient.head"
