"""Fine-tune MiniLM to select responses: the start that every method on one dialogue data set shares.

    python benchmarks/response_starts.py ubuntu_irc --data-dir DIR --out STARTS/ubuntu_irc
    python benchmarks/response_starts.py ubuntu_irc --data-dir DIR --out STARTS/ubuntu_irc-fp --start POST_TRAINED

--start: a checkpoint to begin from, e.g. what post_training.py wrote. One logit, binary cross-entropy, one wrong response
for each right one; [EOS] after every utterance of the context (BERT-FP's recipe).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

import thresher
from starts import minilm
from thresher.measure.run import run_packed
from thresher.policy import Stage
from thresher.tasks.dialogues import load_dialogues
from thresher.tasks.ranking import ranking_metrics
from thresher.tasks.responses import ResponseTask, prepare
from thresher.training.stages import run_stage

MAX_TOKENS = {"ubuntu_irc": 256, "mutual": 256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(MAX_TOKENS))
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--train", type=int, help="dialogues; default: all")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--negatives", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--validation", type=int, default=400, help="dialogues")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    source = args.start or minilm()
    tokenizer = AutoTokenizer.from_pretrained(source)
    # Attention dropout would send CPU attention down its slow path.
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=1, problem_type="multi_label_classification", attention_probs_dropout_prob=0.0
    )
    prepare(model, tokenizer)
    task = ResponseTask(MAX_TOKENS[args.name])
    rows = load_dialogues(args.data_dir / args.name, split="train", limit=args.train, seed=args.seed)
    held_out = load_dialogues(args.data_dir / args.name, split="validation", limit=args.validation, seed=0)
    train = task.encode(rows, tokenizer, negatives=args.negatives, seed=args.seed).rows.remove_columns("group")
    checked = task.encode(held_out, tokenizer).rows
    lengths = [len(ids) for ids in train["input_ids"]]
    print(f"{len(rows)} dialogues, {len(train)} pairs of {sum(lengths) / len(lengths):.0f} tokens")

    thresher.attach(model)
    stage = Stage(
        name="fine-tune",
        mode="off",
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
    )
    run_stage(model, stage, train, tokenizer, args.out / "training", seed=args.seed)
    found = ranking_metrics(run_packed(model, checked).predictions, checked["labels"], checked["group"])
    thresher.detach(model)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    about = {"data": args.name, "pairs": len(train), "epochs": args.epochs, "seed": args.seed, "validation": found}
    (args.out / "start.json").write_text(json.dumps({**about, "from": "MiniLM" if args.start is None else "given"}))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
