# %% [markdown]
# # PEMT in one sitting
#
# Two source tasks, a bank of two experts, a target task over it, answers, and an adapter to give away: all that a real
# run does, on a model small enough to train here in a minute. Run it whole, `python docs/tutorial.py`, or cell by cell.
#
# The tasks are about boxes: is there *red* on it, is there *blue* on it; and the target asks for red in other words.

# %%
import json
import random
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration, set_seed

from pemt import AdaptConfig, PemtModel, SourceConfig, export_run, run_adapt, run_source
from pemt.config.schema import ExpertConfig
from pemt.tasks import Task, register_task

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

# %% [markdown]
# ## A base model
#
# For real it is `google/flan-t5-base` by its name. Here: a random T5 of two layers with a vocabulary of words.

# %%
words = ["<pad>", "</s>", "<unk>", "red", "blue", "green", "white", "box", "crate", "yes", "no"]
words += ["a", "the", "with", "and", "text", ":"]
vocabulary = {word: i for i, word in enumerate(words)}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer.post_processor = processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
)
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
).save_pretrained(folder / "base")
set_seed(0)
shape = {"vocab_size": 32, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2}
T5ForConditionalGeneration(
    T5Config(**shape, decoder_start_token_id=0, dropout_rate=0.0)
).save_pretrained(folder / "base")

# %% [markdown]
# ## Three tasks
#
# A task is a record: a sentence about it, a template, labels, metrics. Its rows lie in jsonl files.


# %%
def write_rows(name: str, yes: str, thing: str, count: int) -> None:
    draw = random.Random(name)
    (folder / name).mkdir()
    for split, rows in (("train", count), ("validation", 32), ("test", 64)):
        lines = []
        for _ in range(rows):
            colours = [draw.choice(["red", "blue", "green", "white"]) for _ in range(2)]
            text = f"a {thing} with {colours[0]} and {colours[1]}"
            lines.append(json.dumps({"text": text, "label": int(yes in colours)}))
        (folder / name / f"{split}.jsonl").write_text("\n".join(lines))


TASKS = {"red": ("red", "box", 256), "blue": ("blue", "box", 256), "crate": ("red", "crate", 32)}
for name, (yes, thing, count) in TASKS.items():
    write_rows(name, yes, thing, count)
    register_task(
        Task(
            name=name,
            description=f"the {thing} with {yes}",
            template="text : {text}",
            labels=("no", "yes"),
            metrics=("accuracy",),
            max_target_length=3,
        )
    )

# %% [markdown]
# ## Stage 1: the bank
#
# `pemt source` for each source task; in Python `run_source`. The fields are those of docs/configuration.md.

# %%
common = {
    "model_name_or_path": str(folder / "base"),
    "bank_dir": str(folder / "bank"),
    "bf16": False,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 4,
    "max_source_length": 16,
}
for name in ("red", "blue"):
    source = run_source(
        SourceConfig(
            **common,
            task_name=name,
            data_dir=str(folder / name),
            output_dir=str(folder / "runs" / name),
            expert=ExpertConfig(rank=8, alpha=8.0),
        )
    )
    print(name, "is in the bank:", source.entry)

# %% [markdown]
# ## Stage 2: the target
#
# Experts and base are frozen; gates, adapters, prompt and layer norms are trained. Results have the published names.

# %%
results = run_adapt(
    AdaptConfig(
        **{**common, "num_train_epochs": 20},
        task_name="crate",
        data_dir=str(folder / "crate"),
        output_dir=str(folder / "runs" / "crate"),
    )
)
for k, source in enumerate(results["sources"]):
    print(f"mean gate of `{source}`: {results[f'test_moe_weight_{k}']:.2f}")
print(f"accuracy on the test split: {results['test_accuracy']:.1f} %")

# %% [markdown]
# ## For others
#
# One folder with all but the base model, and three lines to use it.

# %%
export_run(folder / "runs" / "crate", folder / "export")
model = PemtModel.from_pretrained(folder / "export")
print(model.generate(["text : a crate with red and white", "text : a crate with blue and white"]))
