"""What importing the package costs and does."""

from __future__ import annotations

import json
import subprocess
import sys


def _modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json; print(json.dumps(sorted(m.partition('.')[0] for m in sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_loads_nothing_but_the_package() -> None:
    assert not _modules_after("import sparsepeft") & {"torch", "transformers", "peft", "datasets", "numpy"}


def test_its_methods_load_no_more_than_peft_does() -> None:
    after = _modules_after("from sparsepeft import SpartanConfig, SptConfig")
    assert after - _modules_after("import peft") == {"sparsepeft"}


def test_importing_registers_with_peft_and_patches_nothing() -> None:
    code = """
import inspect, peft, transformers
from peft import mapping
from peft.tuners import tuners_utils
from peft.utils import other
watched = [peft, mapping, tuners_utils, other, peft.PeftModel, tuners_utils.BaseTuner, transformers.PreTrainedModel]
before = [dict(vars(thing)) for thing in watched]
import sparsepeft
for thing, old in zip(watched, before):
    changed = [k for k, v in vars(thing).items() if old.get(k, None) is not v and not inspect.ismodule(v)]
    assert not changed, (thing, changed)
assert sparsepeft.SpartanConfig is mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SPARTAN"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
