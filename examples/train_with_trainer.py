"""Fine-tune a text classifier as transformers' own examples do; from sparsepeft comes the config alone.

python examples/train_with_trainer.py distilbert/distilroberta-base --output_dir out/topics --learning_rate 1e-3
"""

import sys
from importlib.resources import files

from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from sparsepeft import SpartanConfig

(training,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(sys.argv[2:])
topics = str(files("sparsepeft") / "tasks" / "topics" / "train.jsonl")  # or your own: columns "text" and "label"
data = load_dataset("json", data_files=topics, split="train").class_encode_column("label")
names = data.features["label"].names
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True).train_test_split(0.1, seed=0)

model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
model = get_peft_model(model, SpartanConfig(task_type="SEQ_CLS", id2label=dict(enumerate(names))))
model.print_trainable_parameters()
trainer = Trainer(model, training, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
