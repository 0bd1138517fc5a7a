"""What packed execution and real dropping gain in wall-clock, paired and interleaved.

    python benchmarks/speed.py [--data-dir DIR] [--rounds 15]

MiniLM-L6 on random token ids (and on IMDb's real lengths when the data is there). Every ratio is the median over rounds of the
ratio within a round. Where MKL multiplies as fast as oneDNN records have names of their own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import thresher
from records import record
from starts import minilm
from thresher.linears import mkl_is_slow
from thresher.measure.flops import dense_flops, speedup
from thresher.measure.latency import packed_plainly, paired, ratio

# Saves 2x FLOPs at 384 tokens on six layers.
HALF = thresher.AttentionMass(retention=(0.8, 0.62, 0.5, 0.38, 0.28, 0.2))


def random_batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 20_000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def imdb_batches(data_dir: Path, batches: int) -> list[dict[str, torch.Tensor]]:
    from thresher.tasks.data import load_rows

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    texts = load_rows(data_dir / "imdb", split="test", limit=32 * batches, seed=0)["text"][:]
    return [
        dict(tokenizer(texts[i : i + 32], truncation=True, max_length=384, padding=True, return_tensors="pt"))
        for i in range(0, len(texts), 32)
    ]


def of_this_processor(id: str, what: str) -> tuple[str, str]:
    """A record's id and what it is: figures of a processor on which MKL is fast stand beside the others."""
    return (id, what) if mkl_is_slow() else (f"{id}-fast-mkl", f"{what}; where MKL is fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry", action="store_true", help="print, record nothing")
    args = parser.parse_args()
    thresher.keep_memory()
    model = AutoModelForSequenceClassification.from_pretrained(minilm()).eval()
    thresher.attach(model, HALF)
    policy = thresher.policy_of(model)

    def write(
        id: str, what: str, spread, target: str | None, baseline: str, scale: float = 1.0, note: str = ""
    ) -> None:
        id, what = of_this_processor(id, what)
        value = spread.median * scale
        print(
            f"{id:32} {value:.3f}  (quartiles {spread.low * scale:.3f}-{spread.high * scale:.3f}; target {target})",
            flush=True,
        )
        if not args.dry:
            about = {
                "data": "random token ids" if "imdb" not in id else "imdb",
                "split": "test" if "imdb" in id else "",
            }
            record(
                "speed", id, what, value, "ratio", target=target, baseline=baseline,
                spread=[round(spread.low * scale, 4), round(spread.high * scale, 4)], seeds=[0],
                note=f"MiniLM-L6 fp32, {torch.get_num_threads()} threads, {args.rounds} rounds. {note}", **about,
            )  # fmt: skip

    with torch.inference_mode():
        for rows, tokens, packed_target, saving_target in (
            (8, 384, ">= 1.0", ">= 0.9"),
            (32, 128, ">= 1.0", ">= 0.85"),
            (1, 384, ">= 1.0", ">= 0.8"),
            (1, 128, ">= 1.0", None),
            (1, 32, ">= 1.0", None),
        ):
            batch = random_batch(rows, tokens)

            def as_stock(batch=batch) -> None:
                with thresher.stock():
                    model(**batch)

            def packed(batch=batch) -> None:
                with thresher.keep_everything():
                    model(**batch)

            def dropping(batch=batch) -> None:
                model(**batch)

            with thresher.tracing() as traces:
                dropping()
            flops = speedup(traces, policy.geometry, policy)

            def plain(batch=batch) -> None:
                with packed_plainly():
                    model(**batch)

            ways = {"stock": as_stock, "plain": plain, "packed": packed, "dropping": dropping}
            timings = paired(ways, rounds=args.rounds * (1 if rows > 1 else 3), warmup=3)
            shape = f"{rows}x{tokens}"
            write(f"packed-{shape}", "packed, nothing dropped, against stock SDPA without padding",
                  ratio(timings["stock"], timings["packed"]), packed_target, "stock, no padding in the batch")  # fmt: skip
            write(f"kernels-{shape}", "of it: oneDNN's float32 kernels over torch's own",
                  ratio(timings["plain"], timings["packed"]), None, "packed, torch's own kernels")  # fmt: skip
            write(f"realised-{shape}", "measured speedup / FLOPs speedup", ratio(timings["packed"], timings["dropping"]),
                  saving_target, "packed, nothing dropped", 1 / flops, f"FLOPs speedup {flops:.3f}.")  # fmt: skip
        if args.data_dir:
            batches = imdb_batches(args.data_dir, 4)

            def padded() -> None:
                with thresher.stock():
                    for batch in batches:
                        model(**batch)

            def unpadded() -> None:
                with packed_plainly():
                    for batch in batches:
                        model(**batch)

            lengths = [b["attention_mask"].sum(1).tolist() for b in batches]
            real = sum(dense_flops(policy.geometry, n) for rows in lengths for n in rows)
            widths = [(b["input_ids"].shape[1], len(b["input_ids"])) for b in batches]
            ideal = sum(dense_flops(policy.geometry, width) * count for width, count in widths) / real
            timings = paired({"padded": padded, "packed": unpadded}, rounds=max(args.rounds // 3, 3))
            gain = ratio(timings["padded"], timings["packed"])
            write("padding-imdb", "padding only: stock padded / packed with torch's kernels, IMDb <= 384, batch 32", gain,
                  None, "stock, padded, arrival order", note=f"FLOPs of padding {ideal:.3f}.")  # fmt: skip
            write("padding-imdb-share", "measured padding ratio / FLOPs of padding", gain, ">= 0.85",
                  "stock, padded, arrival order", 1 / ideal)  # fmt: skip


if __name__ == "__main__":
    main()
