"""What importing the package costs and does."""

from __future__ import annotations

import subprocess
import sys


def _run(code: str) -> str:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-800:]
    return ended.stdout.splitlines()[-1]


def test_importing_loads_nothing_but_the_package() -> None:
    loaded = "{'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)"
    assert _run(f"import sys, sparsepeft; print({loaded} or 'nothing')") == "nothing"


def test_importing_registers_with_peft_patches_nothing_and_loads_no_more_than_peft_does() -> None:
    code = """
import inspect, peft, sys, transformers
from peft import mapping
from peft.tuners import tuners_utils
from peft.utils import other
watched = [peft, mapping, tuners_utils, other, peft.PeftModel, tuners_utils.BaseTuner, transformers.PreTrainedModel]
before = [dict(vars(thing)) for thing in watched]
loaded = {name.partition(".")[0] for name in sys.modules}
from sparsepeft import SpartanConfig, SptConfig
more = {name.partition(".")[0] for name in sys.modules} - loaded
for thing, old in zip(watched, before):
    changed = [k for k, v in vars(thing).items() if old.get(k, None) is not v and not inspect.ismodule(v)]
    assert not changed, (thing, changed)
assert SpartanConfig is mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SPARTAN"]
print(*more)
"""
    assert _run(code) == "sparsepeft"
