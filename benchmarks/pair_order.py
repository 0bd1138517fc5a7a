"""Whether the scorers that pair_scoring.py trained stand in the paper's order, on one set.

    python benchmarks/pair_order.py ubuntu_irc --passes 3000 --out RUNS/pairs

From what was recorded: MixEncoder's three forms, each counted alike, against the dual-, the poly- and the cross-encoder; and
the three with the overlap of words against the dual-encoder.
"""

from __future__ import annotations

import argparse
from statistics import mean

from pair_scoring import EVALUATED, WAYS, learned_id, options
from records import all_entries, record

FORMS = "the mean of its forms a, b and c"


def main() -> None:
    args = options(__doc__).parse_args()
    found = {name: all_entries().get(learned_id(args, name)) for name in WAYS}
    mrr = {name: entry["value"] for name, entry in found.items() if entry is not None}
    forms(args, mrr)
    words(args, mrr)


def forms(args: argparse.Namespace, mrr: dict[str, float]) -> None:
    mixed, dual = [mrr[name] for name in ("mix-a", "mix-b", "mix-c")], mrr["dual"]
    poly = max(value for name, value in mrr.items() if name.startswith("poly"))
    note(args, "over-dual", f"over the dual-encoder, {FORMS}", [one - dual for one in mixed], ">= 0")
    note(args, "over-poly", f"over the better poly-encoder, {FORMS}", [one - poly for one in mixed], ">= -1")
    if "cross" in mrr:
        closed = [100 * (one - dual) / (mrr["cross"] - dual) for one in mixed]
        target = ">= 50" if args.name == "ubuntu_irc" else ""
        note(args, "gap", f"of the gap from the dual- to the cross-encoder, {FORMS}", closed, target, "%")


def words(args: argparse.Namespace, mrr: dict[str, float]) -> None:
    over = [mrr[f"mix-{form}-lexical"] - mrr["dual"] for form in "abc"]
    note(args, "words-over-dual", f"over the dual-encoder with the overlap of words, {FORMS}", over, ">= 0")


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
        spread={form: round(one, 2) for form, one in zip("abc", values, strict=False)},
        data=args.name,
        split=EVALUATED[args.name],
        seeds=args.seeds,
        note=f"{args.passes} queries learned from",
    )


if __name__ == "__main__":
    main()
