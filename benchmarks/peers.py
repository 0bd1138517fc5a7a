"""Every way to run one encoder on a CPU, paired and interleaved on the same token ids, with its quality beside its speed.

    python benchmarks/peers.py --data-dir DIR --start STARTS/imdb --method RUNS/ltp-imdb/seed-0 --load imdb --batch 32
    python benchmarks/peers.py --data-dir DIR --start MODEL --load squad --batch 1

Stock Hugging Face, sentence-transformers, torch's bfloat16, int8 and compiler, ONNX Runtime, OpenVINO and Thresher. Every
way gets unpadded token ids in arrival order, gives logits in that order, and does its own sorting and padding; tokenising
is left out for all. Quality comes from the very callable that is timed. What is not installed or fails stands in the table
with its reason.

--batch 8 or 32: throughput over `--rows` rows, each way sorting as it likes. --batch 1: the latency of one request at a time on
all cores, at 32, 128, 256 and 384 tokens (made from the rows' own tokens) and at the rows' lengths.
--start without a head gets a random one, the same for all; then, and without --data-dir, only the agreement with the stock
model's answers can be told. Without --method what drops is attention mass, untrained. Lengths without the data: peers_data.py.

Threads: each way has `--threads` (all cores by default): batches use them inside an operation; "one a core" is that many
sequences at a time with one thread each. So that one runtime's idle threads do not slow the next: OpenMP (torch) waits
passively, set before it loads; ONNX Runtime's pool spins within a call, as it comes, but is stopped at the call's end
(session.force_spinning_stop), and a session with one thread has no pool; OpenVINO's threads (TBB) go to sleep by themselves.
Everything is warmed up on the shapes that are timed, so compiling and laying out weights are not timed.

Each ratio is the median over rounds of the ratio within a round, with quartiles; records go to results/peers.json, the chart to
docs/img/peers-LOAD.svg (peers-LOAD-batch1.svg and so on for other batch sizes than 32).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTHS = (32, 128, 256, 384)
REQUESTS = 16  # of each length, one after another
CALIBRATION = 100  # rows of the train split


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="real texts; without it random ids of like lengths")
    parser.add_argument("--start", type=Path, required=True, help="a Hugging Face checkpoint, fine-tuned or not")
    parser.add_argument("--method", type=Path, help="the same model with a method, as thresher.save wrote it")
    parser.add_argument("--load", required=True, choices=("imdb", "squad", "wikiqa"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=96, help="timed in a round")
    parser.add_argument("--quality-rows", type=int, default=400)
    parser.add_argument("--max-tokens", type=int, help="cut rows here; the load's own by default")
    parser.add_argument("--threads", type=int, help="all cores by default")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these ways, beside the baseline")
    parser.add_argument("--dry", action="store_true", help="print, record and draw nothing")
    return parser


def main() -> None:
    parser = options()
    args = parser.parse_args()
    for name, place in (
        ("--start", args.start / "config.json"),
        ("--method", args.method and args.method / "thresher.json"),
    ):
        if place and not place.is_file():
            parser.error(f"{name}: there is no {place}; give the directory of a saved model.")
    # OpenMP and the loaders of the libraries read these once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    args.threads = args.threads or cores
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    import peers_data
    import peers_ways
    from peers_chart import draw
    from peers_report import BASELINE, report, title, write
    from peers_runtimes import RUNTIMES
    from peers_thresher import THRESHER

    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    load = peers_data.LOADS[args.load]
    max_tokens = args.max_tokens or load.max_tokens
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        start, head, tuned = peers_ways.whole(args.load, args.start, Path(work))
        tokenizer = AutoTokenizer.from_pretrained(start)
        count = {"test": max(args.rows, args.quality_rows), "calibration": CALIBRATION, "max_tokens": max_tokens}
        if args.data_dir:
            rows = peers_data.real(args.load, args.data_dir, tokenizer, **count)
        else:
            rows = peers_data.drawn(args.load, tokenizer, **count)
        parts = {"real": rows.test.rows[: args.rows]}
        if args.batch == 1:
            parts = {str(n): peers_data.of_length(rows.test.rows, n, REQUESTS) for n in LENGTHS} | parts
        longest = max(len(row["input_ids"]) for part in [rows.test.rows, *parts.values()] for row in part)
        job = peers_ways.Job(
            start, args.method, head, args.batch, args.threads, rows.calibration, Path(work), max(longest, max_tokens)
        )
        ways = [w for w in (*peers_ways.TORCH, *RUNTIMES, *THRESHER) if args.batch > 1 or w.single]
        ways = [w for w in ways if not args.only or w.id in (BASELINE, *args.only)]
        asked = rows.test.first(args.quality_rows)
        found = [prepared(way, job, asked.rows) for way in ways]
        if found[0].reason:
            sys.exit(f"The stock model itself fails: {found[0].reason}")
        judged = tuned and args.data_dir is not None
        for m in found:
            if not m.reason:
                m.quality = peers_data.judge(args.load, m.answers, found[0].answers, asked, tuned=judged)
        time_all(found, parts, args)
        about = {
            "tokens": sum(len(row["input_ids"]) for row in parts["real"]) / len(parts["real"]),
            "tuned": tuned,
            "head": head,
            "max_tokens": max_tokens,
            "quality_rows": len(asked.rows),
            "minutes": (time.perf_counter() - begun) / 60,
        }
        report(found, parts, args, about)
        if not args.dry:
            write(found, parts, args, about)
            name = args.load if args.batch == 32 else f"{args.load}-batch{args.batch}"
            path = Path(__file__).parent.parent / "docs" / "img" / f"peers-{name}.svg"
            draw(found, list(parts), path, title(args, about), args.batch)


def answers(built: Any, rows: list[Any], batch: int) -> list[Any]:
    """As the load is timed: all rows in one call, or each in a call of its own."""
    return built.predict(rows) if batch > 1 else [built.predict([row])[0] for row in rows]


def prepared(way: Any, job: Any, rows: list[Any]) -> Any:
    """Build a way and run it once over the quality rows; whatever goes wrong is its reason."""
    from peers_report import Measured
    from peers_ways import Unavailable, first_line, quiet

    measured, begun = Measured(way), time.perf_counter()
    try:
        with quiet():
            measured.built = way.build(job)
            measured.answers = answers(measured.built, rows, job.batch)
    except Unavailable as error:
        measured.reason = str(error)
    except Exception as error:  # one that fails must not take the others along
        measured.reason = first_line(error)
    print(
        f"{way.id:24} {measured.reason or 'ready'} ({time.perf_counter() - begun:.0f} s)", file=sys.stderr, flush=True
    )
    return measured


def time_all(found: list[Any], parts: dict[str, list[Any]], args: argparse.Namespace) -> None:
    from thresher.measure.latency import paired

    for part, rows in parts.items():
        alive = [m for m in found if not m.reason]
        timings = paired(
            {m.way.id: lambda m=m, rows=rows: answers(m.built, rows, args.batch) for m in alive},
            rounds=args.rounds,
            warmup=1,
            on_round=lambda n, part=part: print(f"{part}: round {n - 1} of {args.rounds}", file=sys.stderr, flush=True),
        )
        for measured in alive:
            measured.timings[part] = timings[measured.way.id]


if __name__ == "__main__":
    main()
