"""Stage 2 in a plain accelerate loop, over a bank that `pemt source` has filled.

accelerate launch docs/examples/accelerate_loop.py --base google-t5/t5-base --bank bank --folder runs/loop
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import pemt

parser = argparse.ArgumentParser()
parser.add_argument("--base", default="google-t5/t5-base")
parser.add_argument("--bank", default="bank")
parser.add_argument("--folder", type=Path, default=Path("runs/loop"))
parser.add_argument("--epochs", type=int, default=3)
options = parser.parse_args()

rows = [(f"text : the {thing} is wet", "yes") for thing in ("box", "lid")]
rows += [(f"text : the {thing} is dry", "no") for thing in ("box", "lid")]
tokenizer = AutoTokenizer.from_pretrained(options.base)


def collate(batch: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Padded on the right, as T5's tokenizer does; labels that are padding do not count."""
    texts, answers = zip(*batch, strict=True)
    encoded = tokenizer(list(texts), padding=True, return_tensors="pt")
    labels = tokenizer(list(answers), padding=True, return_tensors="pt").input_ids
    labels[labels == tokenizer.pad_token_id] = -100
    return {
        "input_ids": encoded.input_ids,
        "attention_mask": encoded.attention_mask,
        "labels": labels,
    }


accelerator = Accelerator()
set_seed(42)
model = pemt.target_model(
    options.base, options.bank, tokenizer=tokenizer, description="says whether it is wet"
)
trained = [each for each in model.parameters() if each.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3)
loader = DataLoader(rows * 4, batch_size=8, shuffle=True, collate_fn=collate)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for epoch in range(options.epochs):
    model.train()
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")

if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(options.folder)
