"""An engine on a backbone that was made sparse: each task has routers and codebooks of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tests.inference.conftest import TASKS
from tests.models import randomize
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparsepeft import MultiTaskEngine, SptConfig, sparsify

NAMES = ("two", "upper", "pfeiffer", "bitfit", "head")
TEXTS = ("one text", "another text that is longer", "a third")


def sparse_backbone(folder: Path) -> Any:
    ids = torch.randint(4, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return sparsify(model, SptConfig(top_l=3, values="routed", num_blocks=4, num_active_blocks=2), ids).eval()


@pytest.fixture(scope="module")
def alone(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, torch.Tensor]]:
    """Folders of tasks, and what each task's model answers by itself."""
    folders, logits = {}, {}
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = get_peft_model(sparse_backbone(backbone), TASKS[name]).eval()
        randomize(model, "default")
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                if "modules_to_save.default" in key and ("spt_router" in key or "codebooks" in key):
                    tensor.add_(torch.randn(tensor.shape)) if tensor.is_floating_point() else None
            logits[name] = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(str(folders[name]))
    return folders, logits


@pytest.mark.parametrize("onednn", [False, True])
def test_each_row_is_answered_as_its_task_alone_does(backbone: Path, alone: Any, onednn: bool) -> None:
    folders, logits = alone
    engine = MultiTaskEngine(
        sparse_backbone(backbone), folders, tokenizer=AutoTokenizer.from_pretrained(backbone), onednn=onednn
    )
    found = engine.predict([(name, text) for text in TEXTS for name in NAMES], on_error="raise")
    for place, answer in enumerate(found):
        text, name = divmod(place, len(NAMES))
        expected = logits[NAMES[name]][text].softmax(-1)
        torch.testing.assert_close(torch.tensor(list(answer.scores.values())), expected, rtol=1e-4, atol=1e-5)
