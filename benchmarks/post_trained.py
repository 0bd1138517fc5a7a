"""What post-training on whole dialogues is worth: two starts of one recipe and budget, one of them post-trained before.

    python benchmarks/post_trained.py ubuntu_irc --data-dir DIR --start STARTS/plain --post-trained STARTS/fp --out RUNS/fp

The starts are what response_starts.py wrote, from MiniLM and from what post_training.py wrote. Both judge the same dialogues.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer

import thresher
from responses import DEVICE, Bench, Encoded, Judge, parser


def recipe(start: Path) -> dict[str, Any]:
    """What a start was trained on."""
    about: dict[str, Any] = json.loads((start / "start.json").read_text(encoding="utf-8"))
    return {name: about[name] for name in ("data", "pairs", "epochs", "seed")}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--post-trained", required=True, type=Path, help="the start to compare with --start")
    bench = Bench(options.parse_args())
    args = bench.args
    if recipe(args.start) != recipe(args.post_trained):
        raise SystemExit("The two starts were fine-tuned by different recipes; make both with the same options.")
    plain = Judge(bench, bench.model(), bench.encoded("test"))(packed=True)
    # Its tokenizer is its own: post-training adds [EOS] with a vector that it has learned.
    tokenizer = AutoTokenizer.from_pretrained(args.post_trained)
    model = AutoModelForSequenceClassification.from_pretrained(args.post_trained).eval().to(DEVICE)
    rows, called = bench.dialogues("test")
    test = Encoded(bench.task.encode(rows, tokenizer).rows, called)
    found = Judge(bench, thresher.attach(model), test)(packed=True)
    about = recipe(args.start)
    bench.record(
        "post_training",
        f"post-training-{bench.label}",
        "R@1 gained by post-training on whole dialogues before fine-tuning",
        -found.lost(plain),
        "points",
        test,
        baseline=f"the same recipe from MiniLM itself: R@1 {100 * plain.quality:.2f} %",
        spread={**found.spread(plain), "R@1": round(found.quality, 4)},
        note=f"both fine-tuned on {about['pairs']} pairs, {about['epochs']} epochs, at most {bench.task.max_length} tokens",
    )


if __name__ == "__main__":
    main()
