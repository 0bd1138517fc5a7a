"""MixEncoder's forms: vectors kept of a candidate, interaction layers, strategies, and what its parts are worth.

    python benchmarks/pair_forms.py speed reqa_squad --data-dir DIR --out RUNS/pairs
    python benchmarks/pair_forms.py learn wikiqa --data-dir DIR --out RUNS/pairs --passes 3000

speed: table 4, and beside it the layers: one query and 1,000 cached candidates, each form in every round. learn: figure 3, and
table 3's ablations: every form from the same encoder with --passes queries, as pair_scoring.py trains its scorers; drawn.
--forms takes some of them alone.
"""

from __future__ import annotations

import argparse

from classifying import IMAGES
from pair_scoring import STARTED, Way, learned, measured, options
from thresher.report import Chart, Series, save_chart

LAYERS = 6
COUNTS = (1, 2, 3, 4, 10)


def _way(**settings: object) -> Way:
    return Way("mixencoder", {**STARTED, **settings})


BY_K = {f"k{k}": _way(k=k) for k in COUNTS}
BY_LAYERS = {f"last{n}": _way(k=1, layers=tuple(range(-n, 0))) for n in range(1, LAYERS + 1)}
STRATEGIES = {f"{s}-k{k}": _way(k=k, strategy=s) for s in "SC" for k in COUNTS}
PARTS = {
    "without-H": _way(k=1, use_h=False),
    "without-E": _way(k=1, use_e=False),
    "dot-product": _way(k=1, similarity="dot"),
    "previous-residual": _way(k=1, residual="previous"),
}
FORMS = {**BY_K, **BY_LAYERS, **STRATEGIES, **PARTS}


def main() -> None:
    parser = options(__doc__, ["speed", "learn"])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "speed":
        for name, ways in (("k", BY_K), ("layers", BY_LAYERS)):
            measured(args, {form: way.make(args.name) for form, way in ways.items()}, name)
        return
    chosen = args.forms or list(FORMS)
    found = {name: learned(args, name, FORMS[name], "pair_forms")["MRR"] for name in chosen}
    if not args.limit and len(found) == len(FORMS):
        draw(args, {name: 100 * mrr for name, mrr in found.items()})


def draw(args: argparse.Namespace, mrr: dict[str, float]) -> None:
    """Figure 3: by interaction layers, and by vectors of a candidate for each strategy."""
    kept = {"M": [mrr[name] for name in BY_K], **{s: [mrr[f"{s}-k{k}"] for k in COUNTS] for s in "SC"}}
    charts = {
        "layers": Chart(
            f"MixEncoder on {args.name} by interaction layers",
            "Last layers that interact",
            "MRR, %",
            (Series("k = 1", tuple(range(1, LAYERS + 1)), tuple(mrr[name] for name in BY_LAYERS)),),
        ),
        "k": Chart(
            f"MixEncoder on {args.name} by vectors of a candidate",
            "Vectors kept of a candidate (k)",
            "MRR, %",
            tuple(Series(f"strategy {name}", COUNTS, tuple(values)) for name, values in kept.items()),
        ),
    }
    for name, chart in charts.items():
        print("drawn:", save_chart(chart, IMAGES / f"pair-forms-{name}.svg"))


if __name__ == "__main__":
    main()
