"""One query against many candidates: what each scorer learns in the same number of passes, and what it costs.

    python benchmarks/pair_scoring.py train ubuntu_irc --data-dir DIR --out RUNS/pairs --passes 20000
    python benchmarks/pair_scoring.py speed ubuntu_irc --data-dir DIR --out RUNS/pairs
    python benchmarks/pair_scoring.py scaling --out RUNS/pairs

train: every scorer from the same encoder with --passes queries, then R@k, MRR and MAP; a scorer that lies in OUT already is
only evaluated. Of reqa_squad 1,000 queries are ranked against the whole corpus; pair_order.py says whether the scorers stand in
the paper's order. speed: one query and 1,000 cached candidates, in rounds in which every scorer takes its
turn, against the cross-encoder padded and packed; FLOPs and the bytes of a store beside it; pair_forms.py has the same of
MixEncoder's forms. scaling: 10^3 to 10^6 candidates of random vectors on disk. --limit tries things on so few rows, and
records nothing.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import numpy as np
import torch

import thresher
from records import record
from starts import minilm
from thresher.measure.latency import paired, ratio
from thresher.pairs import SCORERS, Index, PairLoss, evaluate, evaluate_corpus, load, pair_flops, train
from thresher.pairs.store import CandidateStore
from thresher.tasks.data import load_rows

LENGTHS = {"ubuntu_irc": (192, 64), "mutual": (192, 64), "wikiqa": (32, 96), "reqa_squad": (48, 96)}
CORPUS = "reqa_squad"
EVALUATED = {"ubuntu_irc": "test", "mutual": "validation", "wikiqa": "test", "reqa_squad": "test"}
COSINE = {"similarity": "cosine"}
STARTED = {"strategy": "M", "start": "dual", **COSINE}
SHARP = PairLoss(temperature=0.05)
MOUNT = 1_000  # candidates, as in the paper's tables 2, 4 and 6
OF_CORPUS = 1_000  # queries that are ranked against a whole corpus
FASTER = {"packed": ">= 50", "padded": ">= 100"}  # than the cross-encoder, on a corpus
FASTER_THAN = "1 query, 1,000 candidates: times faster than the cross-encoder without padding"
PAIRWISE = ("deformer", "cross")  # read every pair anew: ten million of them for a corpus


@dataclass(frozen=True)
class Way:
    """A scorer, its settings, what it learns from, and the learning rate of what its encoder did not bring (None: the same)."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    loss: PairLoss = SHARP
    own_rate: float | None = None

    def make(self, data: str, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        query, candidate = LENGTHS[data]
        return SCORERS[self.kind].from_encoder(minilm(), max_query=query, max_candidate=candidate, **self.settings)


# A MixEncoder that starts as a dual-encoder goes on learning as one, and its interactions learn faster than what was there.
BESIDE: dict[str, Any] = {"loss": PairLoss(temperature=0.05, apart=True), "own_rate": 5e-4}
THREE = {"layers": (-3, -2, -1)}
JOINT = PairLoss(negatives=2)  # a scorer that reads pairs together reads that many more of them for every query
WAYS = {
    "dual": Way("dual", {"pooling": "mean", **COSINE}),
    "dual-paper": Way("dual", {}, PairLoss()),
    "poly-64": Way("poly", {"m": 64, **COSINE}, own_rate=5e-4),
    "poly-360": Way("poly", {"m": 360, **COSINE}, own_rate=5e-4),
    "colbert": Way("colbert", {}, PairLoss()),
    "virt": Way("virt", COSINE),
    "mix-a": Way("mixencoder", {"k": 1, **STARTED}, **BESIDE),
    "mix-b": Way("mixencoder", {"k": 1, **THREE, **STARTED}, **BESIDE),
    "mix-c": Way("mixencoder", {"k": 2, **THREE, **STARTED}, **BESIDE),
    "mix-a-lexical": Way("mixencoder", {"k": 1, **STARTED, "lexical": 32}, **BESIDE),
    "mix-b-lexical": Way("mixencoder", {"k": 1, **THREE, **STARTED, "lexical": 32}, **BESIDE),
    "mix-c-lexical": Way("mixencoder", {"k": 2, **THREE, **STARTED, "lexical": 32}, **BESIDE),
    "mix-a-paper": Way("mixencoder", {"k": 1}, PairLoss()),
    "deformer": Way("deformer", {}, JOINT),
    "cross": Way("cross", {}, JOINT),
}


def main() -> None:
    args = _parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    {"train": train_all, "speed": speed, "scaling": scaling}[args.what](args)


def _parser() -> argparse.ArgumentParser:
    parser = options(__doc__, ["train", "speed", "scaling"])
    parser.add_argument("--scorers", nargs="+", choices=sorted(WAYS), default=list(WAYS))
    parser.add_argument("--largest", type=int, default=10**6, help="of scaling")
    return parser


def options(description: str | None, parts: Sequence[str] = ()) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if parts:
        parser.add_argument("what", choices=parts)
    parser.add_argument("name", nargs="?", choices=sorted(LENGTHS), default="ubuntu_irc")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--passes", type=int, default=0, help="queries each scorer learns from; 0: it stays as it begins"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--hard", type=int, default=1, help="wrong candidates of its own that a query brings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of train and learn, one training each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=int, help="at most so many rows of any split; records nothing")
    return parser


# What is learned.


def train_all(args: argparse.Namespace) -> None:
    for name in args.scorers:
        if args.name == CORPUS and name in PAIRWISE:
            print(f"{name} reads every pair of {CORPUS} anew, which takes days; left out", flush=True)
            continue
        learned(args, name, WAYS[name])


def learned(args: argparse.Namespace, name: str, way: Way, file: str = "pair_quality") -> dict[str, float]:
    """Train `way` with each seed (or load what was trained), evaluate it, and record its quality, a mean over the seeds."""
    each = [evaluated(args, trained(args, name, way, seed)) for seed in args.seeds]
    metrics = {k: mean(one.metrics[k] for one in each) for k in each[0].metrics}
    print(f"{args.name} {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()), flush=True)
    if not args.limit:
        shown: dict[str, Any] = {k: round(100 * v, 2) for k, v in metrics.items() if k not in ("MRR", "P@1")}
        if len(each) > 1:
            shown["each"] = [round(100 * one.metrics["MRR"], 2) for one in each]
        record(
            file,
            learned_id(args, name),
            f"MRR, {name}",
            100 * metrics["MRR"],
            "%",
            spread=shown,
            cell=("MRR (recall among the candidates, MAP), %", name, args.name),
            data=args.name,
            split=EVALUATED[args.name],
            examples=each[0].queries,
            seeds=args.seeds,
            note=f"MiniLM-L6, {way.settings}, {args.passes} queries learned from, in batches of {args.batch_size}"
            + _lesson(way),
        )
    return metrics


def _lesson(way: Way) -> str:
    found = "; encoder and interaction learn apart" if way.loss.apart else ""
    return found + (f"; own learning rate {way.own_rate:g}" if way.own_rate else "")


def trained(args: argparse.Namespace, name: str, way: Way, seed: int) -> Any:
    place = _place(args, name, seed)
    if (place / "scorer.json").is_file():
        return load(place)
    made = way.make(args.name, seed)
    if args.passes:
        _train(args, made, way, seed, args.out / f"{place.name}.training")
    made.save(place)
    return made


def learned_id(args: argparse.Namespace, name: str) -> str:
    return f"pairs-{args.name}-{name}-{args.passes}"


def _place(args: argparse.Namespace, name: str, seed: int = 0) -> Path:
    more = f"{f'-of-{args.limit}' if args.limit else ''}{f'-seed-{seed}' if seed else ''}"
    return args.out / f"{args.name}-{name}-{args.passes}{more}"


def _train(args: argparse.Namespace, made: Any, way: Way, seed: int, work: Path) -> None:
    rows = _rows(args, "train")
    train(
        made,
        rows,
        work,
        loss=way.loss,
        hard=args.hard,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        own_learning_rate=way.own_rate,
        seed=seed,
        max_steps=max(1, args.passes // args.batch_size),
        use_cpu=not torch.cuda.is_available(),
        progress=False,
    )
    shutil.rmtree(work, ignore_errors=True)


def evaluated(args: argparse.Namespace, made: Any, split: str | None = None) -> Any:
    """split: None for the one that the set is judged by."""
    rows = _rows(args, split or EVALUATED[args.name])
    if args.name != CORPUS:
        return evaluate(made, rows, cutoffs=(1, 2, 5))
    rows = rows.shuffle(seed=0).select(range(min(OF_CORPUS, len(rows))))
    corpus = _rows(args, "candidates", every=True)
    return evaluate_corpus(made, rows, made.encode_candidates(corpus["text"][:], corpus["id"][:]), cutoffs=(1, 10))


def _rows(args: argparse.Namespace, split: str, *, every: bool = False) -> datasets.Dataset:
    """every: all of them, --limit or not: a corpus with holes lacks what queries ask for."""
    limit = None if every else args.limit
    return load_rows(args.data_dir / args.name, split=split, limit=limit, seed=0 if limit else None)


# What it costs.


def speed(args: argparse.Namespace) -> None:
    """Scorers as --passes left them in OUT, else as they begin: the time is the same."""
    made = {name: _at_hand(args, name) for name in args.scorers}
    measured(args, made, "speed")


def _at_hand(args: argparse.Namespace, name: str) -> Any:
    place = _place(args, name)
    return load(place) if (place / "scorer.json").is_file() else WAYS[name].make(args.name)


def measured(args: argparse.Namespace, made: dict[str, Any], what: str) -> None:
    """Time, FLOPs and store of scorers, each against the cross-encoder padded and packed, in the same rounds."""
    query, texts = _mount(args)
    cross = made.get("cross") or WAYS["cross"].make(args.name)
    caches = {name: one.encode_candidates(texts) for name, one in made.items()}
    offered = cross.encode_candidates(texts)
    variants: dict[str, Any] = {
        name: partial(one.score, query, caches[name]) for name, one in made.items() if name != "cross"
    }

    def padded() -> None:
        with thresher.stock():
            cross.score(query, offered)

    variants |= {"cross, packed": partial(cross.score, query, offered), "cross, padded": padded}
    timings = paired(variants, rounds=args.rounds)
    reference = pair_flops(cross, query, offered).total
    for name, one in made.items():
        timing = timings["cross, packed" if name == "cross" else name]
        over = {which: ratio(timings[f"cross, {which}"], timing) for which in ("packed", "padded")}
        spent = pair_flops(one, query, caches[name]).total
        kept = None if name == "cross" else _bytes(one, texts)
        print(
            f"{args.name} {name}: {1e3 * timing.median:.1f} ms, {over['packed'].median:.1f}x packed, "
            f"{over['padded'].median:.1f}x padded, {spent / 1e9:.3f} GFLOPs, store {kept} bytes",
            flush=True,
        )
        if not args.limit:
            about = {"data": args.name, "split": EVALUATED[args.name], "examples": len(texts), "seeds": [0]}
            note = f"1 query, {len(texts)} candidates encoded beforehand; {torch.get_num_threads()} threads"
            record(
                "pair_speed" if what == "speed" else "pair_forms_speed",
                f"pairs-{what}-{args.name}-{name}",
                f"{name} over the cross-encoder without padding",
                over["packed"].median,
                "x",
                baseline="cross-encoder, packed",
                spread={
                    "low": round(over["packed"].low, 2),
                    "high": round(over["packed"].high, 2),
                    "over padded": round(over["padded"].median, 1),
                    "ms": round(1e3 * timing.median, 2),
                    "GFLOPs": round(spent / 1e9, 4),
                    "fewer FLOPs": round(reference / spent, 1),
                    "store bytes": kept,
                },
                cell=(FASTER_THAN, name, args.name),
                shown=("ms", "over padded", "store bytes"),
                note=note,
                **about,
            )
            if what == "speed" and (args.name, name) == (CORPUS, "mix-a"):
                for which, bound in FASTER.items():
                    record(
                        "pair_speed",
                        f"pairs-faster-{which}",
                        f"MixEncoder-a over the cross-encoder, {which}: {CORPUS}",
                        over[which].median,
                        "x",
                        target=bound,
                        baseline=f"cross-encoder, {which}, {1e3 * timings[f'cross, {which}'].median:.0f} ms",
                        spread=[round(over[which].low, 2), round(over[which].high, 2)],
                        note=note,
                        **about,
                    )


def _mount(args: argparse.Namespace) -> tuple[Any, list[str]]:
    """The query of the median length, and 1,000 different candidates (with --limit so many)."""
    rows = _rows(args, EVALUATED[args.name])
    column = "context" if "context" in rows.column_names else "query"
    queries = sorted(rows[column][:], key=lambda q: len(q if isinstance(q, str) else " ".join(q)))
    every = "candidates" not in rows.column_names
    offered = (
        _rows(args, "candidates", every=True)["text"][:] if every else [t for some in rows["candidates"] for t in some]
    )
    return queries[len(queries) // 2], list(dict.fromkeys(offered))[: args.limit or MOUNT]


def _bytes(scorer: Any, texts: list[str]) -> int:
    with tempfile.TemporaryDirectory() as place, Index.create(scorer, place, dtype="float16") as index:
        index.add([(str(i), text) for i, text in enumerate(texts)])
        return index.store.nbytes


def scaling(args: argparse.Namespace) -> None:
    """Ranking a store of random vectors: seconds, and by how much the process grew, which a chunk bounds and not the store."""
    for name in ("dual", "mix-a"):
        one, count = WAYS[name].make(args.name), 1_000
        while count <= (args.limit or args.largest):
            found = _ranked(args, one, count)
            print(f"{name} {count}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
            if not args.limit:
                record(
                    "pair_scaling",
                    f"pairs-scaling-{name}-{count}",
                    f"one query ranked among {count:,} candidates on disk, {name}",
                    found.pop("seconds"),
                    "s",
                    spread={k: round(v, 1) for k, v in found.items()},
                    examples=count,
                    note=f"random vectors in float16, chunks of {one.chunk}; {torch.get_num_threads()} threads",
                )
            count *= 10


def _ranked(args: argparse.Namespace, made: Any, count: int) -> dict[str, float]:
    place = args.out / f"random-{count}"
    shutil.rmtree(place, ignore_errors=True)
    with Index.create(made, place, dtype="float16") as index:
        _fill(index.store, count)
        before = _most_memory()
        timing = paired({"rank": partial(index.rank, "what was the question?", 10)}, rounds=args.rounds)["rank"]
        found = {
            "seconds": timing.median,
            "grown_mb": (_most_memory() - before) / 1e6,
            "store_mb": index.store.nbytes / 1e6,
        }
    shutil.rmtree(place)
    return found


def _most_memory() -> int:
    """The most bytes that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _fill(store: CandidateStore, count: int) -> None:
    draw = np.random.default_rng(0)
    shape = (store.schema.k, store.schema.dim)
    for start in range(0, count, 50_000):
        names = [str(i) for i in range(start, min(start + 50_000, count))]
        store.add(names, draw.standard_normal((len(names), *shape), dtype=np.float32))


if __name__ == "__main__":
    main()
