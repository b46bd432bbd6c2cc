"""What cannot be used ends with exit code 2 and one sentence, before anything is written."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from tests.cli.test_cli import ran, refused, sparsepeft
from tests.tiny import save_tiny_backbone, topics_text

pytestmark = pytest.mark.slow

# The command line, then words of the sentence. `--output-dir` is added where it is needed.
CASES = """
train --task sst3 | sst3 | did you mean 'sst2' | mnli
train --task topics --method spartn | spartn | did you mean 'spartan'
train --task topics --set num_parent=3 | num_parent | did you mean 'num_parents'
train --task topics --set top_k | key=value
train --task topics --set top_k=17 | top_k=17 | num_parents=16
train --task topics --set num_children=0 | num_children=0 | at least 1
train --task sst2 --data-dir {tmp}/none | none | does not exist
train --task custom --train-file {tmp}/none.csv | none.csv
train --task custom --train-file {tmp}/empty.csv | empty.csv | empty
train --task custom --train-file {tmp}/fields.tsv | fields.tsv:3 | 2 | 3
train --task custom --train-file {tmp}/train.csv --validation-file {tmp}/unseen.csv | 'z' | train
train --task topics --model {tmp} | config.json
train --task topics --model nobody/nothing | nobody/nothing | --model
train | --task
train --task topics --config {tmp}/none.yaml | none.yaml | does not exist
train --task topics --output-dir {run} | already holds a finished run | --overwrite
train --model {bert} --task topics --batch-size 0 | --batch-size 0 was given, but it must be a whole number of at least
train --model {bert} --task topics --learning-rate nan | --learning-rate nan was given
train --model {bert} --task topics --class-weights spam | expected --class-weights balanced, or
train --model {bert} --task topics --class-weights spam=2 | --class-weights: the label 'spam' is unknown
train --model {bert} --task topics --device tpu | --device tpu was given
train --model {bert} --task topics --push-to-hub a/b/c | cannot be a repository's name
train --model {bert} --task topics --max-steps -1 | --max-steps -1
train --model {bert} --task lm --class-weights balanced | --class-weights does not go with --task lm
train --model {bert} --train-file {tmp}/train.csv --text-column body | --text-column
train --model {bert} --train-file {tmp}/train.csv --max-length 9999 | --max-length 9999
train --task tickets | lm
train --task topics --text {text} | --text goes | --task lm only | 'topics'
train --task topics --spt-set top_l=3 | --spt-set | --spt
train --block-length 3 | --block-length | --task lm only
train --model {llama} --task lm --text {text} --spt-set top_l=3 | --spt-set | --spt
train --model {llama} --task lm --text {text} --few-shot 3 | --few-shot | --task lm
train --model {llama} --task lm | --text
train --model {llama} --task lm --text {text}.none | topics.txt.none
train --model {llama} --task lm --text {text} --spt --spt-set num_block=3 | num_block | did you mean 'num_blocks'
train --model {llama} --task lm --text {text} --spt --spt-set top_l | --spt-set | key=val
train --model {llama} --task lm --text {text} --method head | head | lora
train --model {llama} --task lm --text {text} --method full --spt | full | lora
compare --model {bert} --train-file {tmp}/train.csv --max-length 9999 | --max-length 9999
compare --model {tmp} --train-file {tmp}/train.csv | config.json
compare --model {bert} --task topics --device tpu | --device tpu was given
sparsify {llama} | pass --text | attention=false
sparsify {llama} --text {text} --budget some | such as 2% or 0.02
sparsify {llama} --text {text} --set topl=3 | topl | did you mean 'top_l'
sparsify {llama} --text {tmp}/short.txt --block-length 32 | less than one block of 32
sparsify {t5} --text {text} | t5 | causal or masked language model
evaluate {tmp} | run.json is missing
predict {tmp} text | run.json is missing
predict {run} one two | takes 1 text
predict {run} --file {tmp}/none | does not exist
predict {run} --output-format xlsx | --output-format xlsx | csv
predict {run} --device abacus text | --device abacus
predict {run} "" | empty text
predict {damaged} text | damaged | could not be loaded
predict {run} text --model {other} | other values | check_backbone=False
data | Pass either a file or --task
data {tmp}/german.csv --task topics | Pass either a file or --task
data none.csv | none.csv does not exist
data {tmp}/german.csv --delimiter , | pass --delimiter semicolon
data {tmp}/german.csv --text-column body | --text-column body was given, but the columns are 'id', 'text'
export {tmp} | holds no adapter
export {damaged} | could not be loaded
export {run} --format executorch --int8 | needs example texts
inspect {tmp} | run.json is missing
inspect {head} | HEAD | has no SPARTAN memory | the method spartan
inspect {run} --layer 9 | --layer 9 | 0, 1
inspect {run} --split tset | 'tset' is unknown | did you mean 'test'
storage --model nobody/nothing | nobody/nothing
storage --methods spartn | did you mean 'spartan'
reproduce figure2 --data-dir {tmp}/none | does not exist
reproduce figure2 --set num_parent=3 | did you mean 'num_parents'
reproduce figure2 --top-k 6 | top_k=6 | num_parents=5
reproduce table2 --model {bert} --device-throughput pi.json | --device-throughput | table1
reproduce table1 --model {bert} --device-throughput none.json --tasks topics | none.json | --emulate
reproduce table2 --model {bert} --tasks topics,tpics | tpics | did you mean 'topics'
reproduce table2 --model {bert} --tasks topics --methods spartn | spartn | 'spartan'
reproduce table2 --model {bert} --seeds 1,x | --seeds x | whole numbers
reproduce table1 --model {bert} --few-shot 3 | --few-shot 3 | table1
reproduce table2 --model {bert} --tasks topics --max-epochs 3 | --max-epochs | --max-steps
reproduce table2 --model {bert} --tasks rte --data-dir /nowhere | /nowhere | does not exist
reproduce table2 --model {bert} --tasks topics --set num_parent=3 | num_parent
benchmark inference --shapes 32 | --shapes 32 | 32x128,1x32
benchmark inference --systems spartn | did you mean 'spartan'
benchmark inference --emulate phone | iphone-11
benchmark inference --device tpu | --device tpu
benchmark inference --precisions fp31 | did you mean 'fp32'
benchmark spt --lengths many | --lengths
benchmark spt --model opt-1025 | --model opt-1025
benchmark spt --repeats 1 | --repeats 1
benchmark memory --dtype int8 | valid are bf16, bfloat16, float16, float32, fp16, fp32
benchmark memory --repeats 1 | --repeats 1
benchmark finetuning --groups method | did you mean 'methods'
""".strip().splitlines()


@pytest.fixture(scope="module")
def places(
    tiny_backbone: Path, tiny_language_model: Path, topics_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What stands between braces in the cases."""
    import transformers as hf
    from tests.spt.models import build

    tmp = tmp_path_factory.mktemp("refusals")
    (tmp / "empty.csv").write_text("")
    (tmp / "fields.tsv").write_text("text\tlabel\none\ta\ntwo\tb\tc\n")
    (tmp / "train.csv").write_text("text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(20)))
    (tmp / "unseen.csv").write_text("text,label\nt,z\n")
    (tmp / "german.csv").write_text("id;text;dringend\n" + "".join(f"{i};Text {i};ja\n" for i in range(9)))
    (tmp / "short.txt").write_text("the team won")
    shutil.copytree(topics_run, tmp / "damaged")
    weights = tmp / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    one_step = ("--task", "topics", "--method", "head", "--model", tiny_backbone, "--max-steps", 1)
    ran("train", *one_step, "--output-dir", tmp / "head")
    return {
        "tmp": tmp,
        "bert": tiny_backbone,
        "llama": tiny_language_model,
        "t5": save_tiny_backbone(tmp / "t5", build=lambda **config: hf.T5Model(build("t5").config)),
        "other": save_tiny_backbone(tmp / "other", seed=3),
        "run": topics_run,
        "head": tmp / "head",
        "damaged": tmp / "damaged",
        "text": topics_text(tmp),
    }


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_nothing_else(case: str, places: dict[str, Path], tmp_path: Path) -> None:
    command, *words = case.split(" | ")
    arguments = shlex.split(command.format_map(places))
    if arguments[0] in ("train", "compare", "sparsify", "export", "reproduce") and "--output-dir" not in arguments:
        arguments += ["--output-dir", str(tmp_path / "out")]
    refused(*arguments, words=words)
    assert not (tmp_path / "out").exists()


def test_options_that_are_missing_or_out_of_range(topics_run: Path, tiny_backbone: Path) -> None:
    refused("train", "--model", tiny_backbone, "--task", "topics", words="No --output-dir was given")
    for *arguments, option in (
        ("export", topics_run, "--output-dir"),
        ("storage", "--num-tasks", 0, "--num-tasks"),
        ("inspect", topics_run, "--max-examples", 0, "--max-examples"),
    ):
        done = sparsepeft(*arguments)
        assert done.returncode == 2
        assert option in done.stderr
