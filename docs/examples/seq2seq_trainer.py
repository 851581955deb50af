"""Both stages in transformers' Seq2SeqTrainer: a source task's expert into a bank, then a target task over the bank.

python docs/examples/seq2seq_trainer.py --base google-t5/t5-base --folder runs/trainer
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

import pemt
from pemt.config import ExpertConfig

parser = argparse.ArgumentParser()
parser.add_argument("--base", default="google-t5/t5-base")
parser.add_argument("--folder", type=Path, default=Path("runs/trainer"))
parser.add_argument("--max_steps", type=int, default=100)
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.base)


def examples(wet: str) -> Dataset:
    """Is it wet? A dozen rows; yours come from anywhere."""
    rows = [{"source": f"text : the {thing} is wet", "target": "yes"} for thing in ("red", wet)]
    rows += [{"source": f"text : the {thing} is dry", "target": "no"} for thing in ("blue", wet)]

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        labels = tokenizer(row["target"]).input_ids
        return {**tokenizer(row["source"]), "labels": labels}

    return Dataset.from_list(rows * 4).map(encode, remove_columns=["source", "target"])


def train(model: pemt.SourceModel | pemt.TargetModel, data: Dataset, name: str) -> None:
    """Nothing of this is PEMT's: the model takes and gives what T5 does."""
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(options.folder / name),
        max_steps=options.max_steps,
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        report_to=[],
        predict_with_generate=True,
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    print(name, trainer.evaluate(max_new_tokens=4)["eval_loss"])


set_seed(42)
bank = options.folder / "bank"
source = pemt.source_model(
    options.base, description="says whether it is wet", expert=ExpertConfig(rank=8, alpha=8.0)
)
train(source, examples("box"), "source")
source.save_pretrained(bank / "wet")  # an entry of the bank, as `pemt source` leaves one

target = pemt.target_model(options.base, bank, description="says whether the lid is wet")
train(target, examples("lid"), "target")
target.save_pretrained(options.folder / "adapter")  # for PemtModel.from_pretrained, or to go on

model = pemt.PemtModel.from_pretrained(options.folder / "adapter")
print(model.generate(["text : the lid is wet"]))
