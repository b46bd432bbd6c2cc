"""What a SPARTAN memory costs at inference: RoBERTa-base with and without it, and the files a task takes.

    python benchmarks/bench_spartan_inference.py --output benchmarks/results/spartan_inference.json

RoBERTa-base is built from its config with random weights, which cost the same time as trained ones. The memory has the
paper's sizes (P=16, C=3, K=8) and random values. Batches of 32 x 128 tokens give throughput, 1 x 32 latency; fp32.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import RobertaConfig, RobertaForSequenceClassification

from _common import describe_environment, time_alternating, write_json
from sparsepeft import SpartanConfig

ROBERTA_BASE = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
SHAPES = {"throughput": (32, 128, 9), "latency": (1, 32, 101)}  # batch, tokens, repeats


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/spartan_inference.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--idle-wait", type=float, default=20.0, help="seconds to wait for an idle machine per round")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = build()
    results = {name: measure(model, *shape, options.idle_wait) for name, shape in SHAPES.items()}
    report = {
        "model": "RoBERTa-base from its config, random weights, float32",
        "memory": {"num_parents": 16, "num_children": 3, "top_k": 8},
        "results": results,
        "files": files(),
        "environment": describe_environment(seed=0),
    }
    write_json(options.output, report)
    print(f"throughput of the bare backbone's: {results['throughput']['backbone_over_spartan']:.3f} (wanted: 0.97)")
    print(f"latency over the bare backbone's:  {1 / results['latency']['backbone_over_spartan']:.3f} (wanted: 1.05)")
    print(report["files"])


def build() -> PeftModel:
    """RoBERTa-base with a memory that does something."""
    backbone = RobertaForSequenceClassification(RobertaConfig(**ROBERTA_BASE))
    model = get_peft_model(backbone, SpartanConfig(task_type="SEQ_CLS", inference_mode=True)).eval()
    for name, parameter in model.named_parameters():
        if "child_values" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def measure(model: PeftModel, batch: int, tokens: int, repeats: int, idle_wait: float) -> dict[str, Any]:
    """Alternate passes with the memory and with it disabled."""
    inputs = {
        "input_ids": torch.randint(5, ROBERTA_BASE["vocab_size"], (batch, tokens)),
        "attention_mask": torch.ones(batch, tokens, dtype=torch.long),
    }

    @torch.inference_mode()
    def spartan() -> torch.Tensor:
        return model(**inputs).logits

    bare = RobertaForSequenceClassification(RobertaConfig(**ROBERTA_BASE)).eval()  # no wrappers, no hooks

    @torch.inference_mode()
    def backbone() -> torch.Tensor:
        return bare(**inputs).logits

    timings = time_alternating(
        {"backbone": backbone, "spartan": spartan}, repeats=repeats, warm_up=3, idle_wait_s=idle_wait
    )
    return {
        "batch": batch,
        "tokens": tokens,
        "timings": {name: timing._asdict() for name, timing in timings.items()},
        "backbone_over_spartan": timings["backbone"].median_ms / timings["spartan"].median_ms,
        "inputs_per_minute": {name: 60_000 * batch / timing.median_ms for name, timing in timings.items()},
    }


def files() -> dict[str, Any]:
    """Bytes of a saved task with a linear head, and whether it answers the same after loading."""
    torch.manual_seed(0)
    state = RobertaForSequenceClassification(RobertaConfig(**ROBERTA_BASE)).state_dict()
    inputs = torch.randint(5, ROBERTA_BASE["vocab_size"], (8, 32))
    report: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):

        def backbone() -> RobertaForSequenceClassification:
            fresh = RobertaForSequenceClassification(RobertaConfig(**ROBERTA_BASE))
            fresh.load_state_dict(state)
            return fresh

        config = SpartanConfig(task_type="SEQ_CLS", head_type="linear", save_dtype=dtype)
        model = get_peft_model(backbone(), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.02)
            before = model(input_ids=inputs).logits
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                size = (Path(folder) / "adapter_model.safetensors").stat().st_size
                loaded = PeftModel.from_pretrained(backbone(), folder).eval()
            after = loaded(input_ids=inputs).logits
        formula, parameters = model.base_model.parameter_formula()
        report[dtype] = {
            "memory_parameters": parameters,
            "formula": formula,
            "file_bytes": size,
            "largest_logit_difference_after_loading": (after - before).abs().max().item(),
            "same_predictions_after_loading": bool((after.argmax(-1) == before.argmax(-1)).all()),
        }
    return report


if __name__ == "__main__":
    main()
