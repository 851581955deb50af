"""Stage 2 in Lightning, over a bank that `pemt source` has filled: `pip install lightning`.

    python docs/examples/lightning_module.py --base google-t5/t5-base --bank bank --folder runs/lightning

On GPUs Lightning's own `strategy="ddp"` or `"deepspeed_stage_2"` shards it, as any module.
"""

import argparse
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import pemt

parser = argparse.ArgumentParser()
parser.add_argument("--base", default="google-t5/t5-base")
parser.add_argument("--bank", default="bank")
parser.add_argument("--folder", type=Path, default=Path("runs/lightning"))
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


class Adapting(lightning.LightningModule):
    """The model's forward gives the loss; the rest is Lightning's."""

    def __init__(self, model: pemt.TargetModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


lightning.seed_everything(42)
model = pemt.target_model(
    options.base, options.bank, tokenizer=tokenizer, description="says whether it is wet"
)
trainer = lightning.Trainer(
    max_epochs=options.epochs,
    gradient_clip_val=1.0,
    default_root_dir=options.folder,
    logger=False,
    log_every_n_steps=1,
)
trainer.fit(Adapting(model), DataLoader(rows * 4, 8, shuffle=True, collate_fn=collate))
print(f"loss {trainer.callback_metrics['train/loss']:.3f}")
if trainer.is_global_zero:
    model.save_pretrained(options.folder)
