"""Fine-tune a text classifier with transformers' own tools; from sparsepeft comes the config alone.

python examples/train_with_trainer.py distilbert/distilroberta-base          # the built-in news topics
python examples/train_with_trainer.py path/to/a/model --data reviews.csv     # columns "text" and "label"
"""

import argparse
from importlib.resources import files

from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from sparsepeft import SpartanConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="distilbert/distilroberta-base")
parser.add_argument("--data", default=str(files("sparsepeft") / "tasks" / "topics" / "train.jsonl"))
parser.add_argument("--output", default="out/topics")
parser.add_argument("--epochs", type=float, default=10)
parser.add_argument("--max-steps", type=int, default=-1)
args = parser.parse_args()

data = load_dataset("csv" if args.data.endswith(".csv") else "json", data_files=args.data, split="train")
data = data.class_encode_column("label").train_test_split(test_size=0.1, seed=0)
names = data["train"].features["label"].names
tokenizer = AutoTokenizer.from_pretrained(args.model)
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True)

model = AutoModelForSequenceClassification.from_pretrained(args.model)
model = get_peft_model(model, SpartanConfig(task_type="SEQ_CLS", id2label=dict(enumerate(names))))
model.print_trainable_parameters()
training = TrainingArguments(
    args.output, learning_rate=1e-3, num_train_epochs=args.epochs, max_steps=args.max_steps, report_to="none"
)
trainer = Trainer(model, training, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
