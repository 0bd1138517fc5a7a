"""Whether the scorers that pair_scoring.py trained stand in the paper's order, on one set.

    python benchmarks/pair_order.py ubuntu_irc --data-dir DIR --out RUNS/pairs --passes 3000 --seeds 0

MixEncoder's three forms, each counted alike, against the dual-, the poly- and the cross-encoder, as recorded. Then form a with
the overlap of words or without it, as the set's validation rows (wikiqa, ubuntu_irc) say of the models in OUT with these seeds;
the other sets have none beside those that they are judged by, and take it with them.
"""

from __future__ import annotations

import argparse
from statistics import mean
from typing import Any

from pair_scoring import EVALUATED, WAYS, evaluated, learned_id, options, trained
from records import all_entries, record

FORMS = "the mean of its forms a, b and c"
WORDS = {"mix-a": "without the overlap of words", "mix-a-lexical": "with the overlap of words"}
VALIDATED = ("wikiqa", "ubuntu_irc")


def main() -> None:
    args = options(__doc__).parse_args()
    found = {name: all_entries().get(learned_id(args, name)) for name in WAYS}
    mrr = {name: entry["value"] for name, entry in found.items() if entry is not None}
    forms(args, mrr)
    words(args, mrr)


def forms(args: argparse.Namespace, mrr: dict[str, float]) -> None:
    mixed, dual = [mrr[name] for name in ("mix-a", "mix-b", "mix-c")], mrr["dual"]
    poly = max(mrr["poly-64"], mrr["poly-360"])
    note(args, "over-dual", f"over the dual-encoder, {FORMS}", [one - dual for one in mixed], ">= 0")
    note(args, "over-poly", f"over the better poly-encoder, {FORMS}", [one - poly for one in mixed], ">= -1")
    if "cross" in mrr:
        closed = [100 * (one - dual) / (mrr["cross"] - dual) for one in mixed]
        target = ">= 50" if args.name == "ubuntu_irc" else ""
        note(args, "gap", f"of the gap from the dual- to the cross-encoder, {FORMS}", closed, target, "%")


def words(args: argparse.Namespace, mrr: dict[str, float]) -> None:
    chosen, said = "mix-a-lexical", ""
    if args.name in VALIDATED:
        held_out = {
            name: [evaluated(args, trained(args, name, WAYS[name], seed), "validation") for seed in args.seeds]
            for name in WORDS
        }
        means = {name: 100 * mean(one.metrics["MRR"] for one in each) for name, each in held_out.items()}
        chosen = max(means, key=lambda name: means[name])
        said = "; on validation rows " + ", ".join(f"{WORDS[name]} {value:.2f}" for name, value in means.items())
    over = {WORDS[name]: mrr[name] - mrr["dual"] for name in WORDS}
    record(
        "pair_order",
        f"pairs-{args.name}-chosen",
        f"{args.name}: MixEncoder-a's MRR over the dual-encoder, {WORDS[chosen]}{said}",
        over[WORDS[chosen]],
        "points",
        target=">= 0",
        spread={name: round(value, 2) for name, value in over.items()},
        **about(args),
    )


def note(
    args: argparse.Namespace, name: str, says: str, values: list[float], target: str = "", unit: str = "points"
) -> None:
    print(f"{args.name} {name}: {[round(one, 2) for one in values]} {unit}", flush=True)
    record(
        "pair_order",
        f"pairs-{args.name}-{name}",
        f"{args.name}: MixEncoder's MRR {says}",
        mean(values),
        unit,
        target=target or None,
        spread={form: round(one, 2) for form, one in zip("abc", values, strict=True)},
        **about(args),
    )


def about(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "data": args.name,
        "split": EVALUATED[args.name],
        "seeds": args.seeds,
        "note": f"{args.passes} queries learned from",
    }


if __name__ == "__main__":
    main()
