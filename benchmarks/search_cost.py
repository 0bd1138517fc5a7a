"""How long a search takes: 100 retention configurations on 500 pairs, on all cores.

    python benchmarks/search_cost.py ubuntu_irc --data-dir DIR --start STARTS/ubuntu_irc --out RUNS/search-cost --validation 50

--validation: dialogues; of ubuntu_irc each has ten pairs.
"""

from __future__ import annotations

import time
from tempfile import TemporaryDirectory

import torch

import thresher
from responses import WORTH, Bench, parser


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--evaluations", type=int, default=100)
    bench = Bench(options.parse_args())
    rows = bench.encoded("validation")
    model = bench.model(thresher.ASE())
    began = time.perf_counter()
    with TemporaryDirectory(dir=bench.args.out) as work:  # so that nothing is remembered from before
        found = thresher.search(
            model,
            rows.rows,
            quality=rows.worth,
            directory=work,
            evaluations=bench.args.evaluations,
            seed=bench.args.seed,
            label=WORTH,
        )
    bench.record(
        "search_cost",
        f"search-cost-{bench.label}",
        f"time to search {bench.args.evaluations} configurations on {len(rows.rows)} pairs",
        (time.perf_counter() - began) / 60,
        "minutes",
        rows,
        target="<= 20",
        note=f"MiniLM-L6 fp32, dual attention, {torch.get_num_threads()} threads, at most {bench.task.max_length} tokens; "
        f"{len(found.points)} points on the frontier",
    )


if __name__ == "__main__":
    main()
