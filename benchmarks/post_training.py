"""Post-train an encoder on dialogues, the stage of BERT-FP before a response selector is fine-tuned.

    python benchmarks/post_training.py --data-dir DIR --out STARTS/ubuntu_irc
    python benchmarks/post_training.py --data-dir DIR --start MODEL --out OUT --limit 200 --batch-size 16

Reads the whole dialogues of ubuntu_irc (conversations.train). What it writes is a start like any other, with [EOS].
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from starts import minilm
from thresher.tasks.data import load_rows
from thresher.training.post_training import post_train

DATA = "ubuntu_irc"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--start", type=Path, help="an encoder; default: MiniLM")
    parser.add_argument("--limit", type=int, help="dialogues; default: all")
    parser.add_argument("--utterances", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=240)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=1.5e-5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    found = post_train(
        args.start or minilm(),
        load_rows(args.data_dir / DATA, split="conversations.train", limit=args.limit),
        args.out,
        k=args.utterances,
        max_length=args.max_length,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
