"""AdapLeR and the methods it is compared with: one fine-tuned start, one budget of training, the same FLOPs.

    python benchmarks/adapler.py start      imdb --data-dir DIR --out RUNS/imdb
    python benchmarks/adapler.py methods    imdb --data-dir DIR --out RUNS/imdb
    python benchmarks/adapler.py target     imdb --data-dir DIR --out RUNS/imdb
    python benchmarks/adapler.py speed      imdb --data-dir DIR --out RUNS/imdb
    python benchmarks/adapler.py adaptivity imdb --data-dir DIR --out RUNS/imdb
    python benchmarks/adapler.py rationales eraser_movies --data-dir DIR --out RUNS/eraser_movies

start: fine-tunes MiniLM-L6 in OUT/start, once. methods: trains each method from it in a directory of its own, sets it to each
of SPEEDUPS on held-out rows, and reads the test rows. Its budget: --passes examples read forward and backward, a forward pass
counting a third; what a teacher reads is not counted; of the training rows as many as it has passes for an epoch. AdapLeR
stands there twice: as it was published (adapler), and with the hard stage after it (adapler-hard). target: it alone, as
published or with --hard-stage, at the speedup that was aimed at before anything was measured. speed: its wall-clock there,
paired, in batches of 32. rationales: how what each trained method keeps agrees with human rationales on the test split, beside
saliencies of the start; examples go to OUT as pages. adaptivity: the FLOPs of each example against its length and the start's
confidence, as plots. What is complete is not trained again. --limit: a few rows, nothing recorded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import thresher
from classifying import Texts, options, start, wall_clock
from records import all_entries, record
from settling import set_to, settled
from thresher.errors import TargetError
from thresher.measure.flops import dense_flops, flops
from thresher.measure.latency import compare
from thresher.measure.rationales import (
    Agreement,
    agreement,
    agreement_by_layer,
    kept_layers,
    rationale_maps,
    rationales_page,
)
from thresher.measure.run import prepared, run, run_packed
from thresher.model import attachment_of
from thresher.policy import PolicyConfig
from thresher.report import Chart, Series, frontier_chart
from thresher.tasks.rationales import RationaleRows, encode_rationales
from thresher.training import fit

# At least so many, for what has a schedule by epochs (the shortest of the paper's, in its part of the budget); others: 1.
EPOCHS = {"adapler": 3, "adapler-hard": 6}
# The part of the budget that each stage has. A step of TR-BERT's first stage reads its batch eight times forward or, as often,
# once forward and backward; one of its second stage once forward and backward and seven times forward.
METHODS: dict[str, tuple[PolicyConfig, dict[str, float]]] = {
    "adapler": (thresher.AdapLeR(hard_stage=False), {"soft": 1.0}),
    "adapler-hard": (thresher.AdapLeR(), {"soft": 0.5, "hard": 0.5}),
    "tr-bert": (thresher.TRBert(), {"policy": 0.3 / (11 / 6), "joint": 0.7 / (10 / 3)}),
    "ltp": (thresher.LTP(temperature=5e-4), {"soft": 0.25, "hard": 0.75}),
    "power-bert": (thresher.PowerBert(penalty=1e-3), {"soft": 0.5, "hard": 0.5}),
    "length-adaptive": (thresher.LengthAdaptive(), {"length-drop": 0.25}),
    "transkimmer": (thresher.Transkimmer(), {"skim": 1.0}),
    "random": (thresher.RandomTokens(), {"distil": 1.0}),
}
SPEEDUPS = (1.5, 2.0, 3.0)
AIMED_AT = {"imdb": 2.5, "eraser_movies": 3.0, "ag_news": 2.0, "sst2": 1.2, "mrpc": 1.2}  # AdapLeR's, at a point lost
MARGIN = 1.02  # so that what is set on held-out rows is reached on test rows
SALIENCIES = ("gradient-x-input", "integrated-gradients", "attention")
SHOWN = 5  # documents, on pages and pictures of rationales


class Bench(Texts):
    """One data set, its start, and the methods trained from it."""

    def trained(self, method: str) -> Any:
        """A method trained in OUT/method; loaded where that was done."""
        directory, (policy, share) = self.args.out / method, METHODS[method]
        about = {name: getattr(self.args, name) for name in ("name", "passes", "trained_at", "seed", "limit")}
        if (directory / "thresher.json").is_file():
            model = thresher.load(directory)
            if attachment_of(model).notes.get("benchmark") != about:
                raise SystemExit(f"{directory} holds a run with other settings; give another --out.")
            return model
        epochs = max(EPOCHS.get(method, 1), -(-self.args.passes // len(self.train)))
        rows = self.train.select(range(self.args.passes // epochs))
        overrides = {f"{stage}.epochs": part * epochs for stage, part in share.items()}
        searches = bool(policy.searches)
        return fit(
            self.model(),
            policy,
            rows,
            self.tokenizer,
            directory,
            validation=self.held_out,
            # Of a method with a hard stage: what it is trained at; of AdapLeR: the last epoch, not the fastest, is kept.
            speedup=self.args.trained_at if method not in ("tr-bert", "length-adaptive", "transkimmer") else None,
            quality=lambda predictions: self.score(predictions, self.held_out),
            search={"evaluations": self.args.evaluations} if searches else None,
            overrides=overrides,
            seed=self.args.seed,
            notes={"benchmark": about},
            progress=False,
        )

    def each(self, speedup: float | None = None) -> Iterator[tuple[str, Any]]:
        """The methods asked for, trained, and set to a speedup where it is given."""
        for method in self.args.methods:
            try:
                model = self.trained(method)
                if speedup is not None:
                    set_to(model, self.held_out, speedup)
            except TargetError as error:  # the others need not wait for better settings of this one
                print(f"{method}: {error}", flush=True)
                continue
            yield method, model

    def record(self, id: str, what: str, value: float, unit: str, **about: Any) -> None:
        print(f"{id}: {value:.4g} {unit} {about.get('spread') or ''}", flush=True)
        if not self.dry:
            given = {"data": self.args.name, "split": self.judged, "seeds": [self.args.seed], **about}
            part = self.args.command
            file = "adapler" if part in ("target", "speed") else f"adapler_{part}"
            record(file, f"adapler-{self.args.name}-{id}", what, value, unit, **given)

    @property
    def note(self) -> str:
        return (
            f"MiniLM-L6, {self.max_tokens} tokens; {self.args.passes} training passes for each method; set to the speedup on "
            f"{len(self.held_out)} held-out training rows"
        )


def methods(bench: Bench) -> None:
    baseline = bench.score(run_packed(thresher.attach(bench.model()), bench.test).predictions, bench.test)
    metric = bench.task.metric
    points = _recorded(bench)
    for name, model in bench.each():
        points[name] = []
        for speedup in settled(model, bench.held_out, SPEEDUPS):
            result = run(model, bench.test)
            value = bench.score(result.predictions, bench.test)
            points[name].append((result.speedup, value))
            bench.record(
                f"{name}-{speedup}",
                f"{metric} lost at about {speedup}x FLOPs: {name}",
                100 * (baseline - value),
                "points",
                baseline=f"the same start, packed, nothing dropped: {100 * baseline:.2f} %",
                spread={"flops_speedup": round(result.speedup, 3), metric: round(100 * value, 2)},
                cell=(_table(bench), name, f"about {speedup}x"),
                examples=len(bench.test),
                note=bench.note,
            )
    drawn = {name: points[name] for name in METHODS if points.get(name)}
    chart = frontier_chart(drawn, baseline=baseline, quality_label=f"{metric} on {bench.args.name}")
    bench.draw(chart, f"adapler-{bench.args.name}-methods")


def _table(bench: Bench) -> str:
    return f"{bench.task.metric} lost on {bench.args.name}"


def _recorded(bench: Bench) -> dict[str, list[tuple[float, float]]]:
    """The points of the table by their methods, of earlier runs, which may have trained others."""
    points: dict[str, list[tuple[float, float]]] = {}
    for id, entry in ({} if bench.dry else all_entries()).items():
        table, method, _ = entry.get("cell") or (None, None, None)
        if table == _table(bench) and id.startswith("adapler-"):
            point = entry["spread"]["flops_speedup"], entry["spread"][bench.task.metric] / 100
            points.setdefault(method, []).append(point)
    return points


def at_target(bench: Bench) -> Any:
    """AdapLeR, set to the speedup that was aimed at."""
    model = bench.trained("adapler-hard" if bench.args.hard_stage else "adapler")
    set_to(model, bench.held_out, AIMED_AT[bench.args.name] * MARGIN)
    return model


def target(bench: Bench) -> None:
    aim, model = AIMED_AT[bench.args.name], at_target(bench)
    baseline = bench.score(run_packed(model, bench.test).predictions, bench.test)
    undropped = bench.score(run_packed(thresher.attach(bench.model()), bench.test).predictions, bench.test)
    result = run(model, bench.test)
    metric, value = bench.task.metric, bench.score(result.predictions, bench.test)
    about = {
        "baseline": f"the same start, packed, nothing dropped: {metric} {100 * undropped:.2f} %",
        "examples": len(bench.test),
        "note": bench.note,
    }
    bench.record("target-flops", "AdapLeR: FLOPs ratio", result.speedup, "x", target=f">= {aim}", **about)
    bench.record(
        "target-lost",
        f"AdapLeR: {metric} lost at about {aim}x FLOPs",
        100 * (undropped - value),
        "points",
        target="<= 1.0",
        spread={f"{metric}, trained, nothing dropped": round(100 * baseline, 2)},
        **about,
    )


def speed(bench: Bench) -> None:
    model = at_target(bench)
    rows = bench.test.select(range(min(bench.args.timed, len(bench.test))))
    found = compare(model, rows, batch_size=32, rounds=bench.args.rounds)
    targets = {"realised": ">= 0.85"}
    for id, what, value, about in wall_clock(found):
        bench.record(id, f"AdapLeR: {what}", value, "x", target=targets.get(id), examples=len(rows), **about)


def rationales(bench: Bench) -> None:
    rows = encode_rationales(bench.load(bench.judged), bench.tokenizer, bench.max_tokens)
    _agree(bench, rows, "a constant", agreement(rows, [np.ones(len(of)) for of in rows.word_of]), {})
    for name in SALIENCIES:
        _agree(
            bench, rows, name, agreement(rows, thresher.saliency(thresher.attach(bench.model()), rows.rows, name)), {}
        )
    for name, model in bench.each(bench.args.speedup):
        if name == "adapler":
            _agree(
                bench, rows, "contribution", agreement(rows, thresher.saliency(model, rows.rows, "contribution")), {}
            )
        layers, count = kept_layers(model, rows), attachment_of(model).engine.entrance.calls
        by_layer = {
            f"f1_{n}": round(choice.f1, 4) for n, choice in enumerate(agreement_by_layer(rows, layers, count), 1)
        }
        _agree(bench, rows, name, agreement(rows, layers), by_layer)
        shown = range(min(SHOWN, len(rows)))
        page = rationales_page(rows, layers, count, shown, f"What {name} reads on")
        (bench.args.out / f"rationales-{name}.html").write_text(page)
        bench.draw(_side_by_side(rows, layers, count, shown, name), f"rationales-{name}")


def _side_by_side(
    rows: RationaleRows, layers: list[np.ndarray], count: int, numbers: Sequence[int], method: str
) -> Chart:
    """Where in each document people's reasons lie, and below them the words that the method reads to the end; no text."""
    marks: dict[str, tuple[list[float], list[float]]] = {}
    for number in numbers:
        for below, (who, one) in enumerate(
            zip(("people", method), rationale_maps(rows, number, layers[number], count), strict=True)
        ):
            xs, ys = marks.setdefault(who, ([], []))
            words = [word for word, dropped in enumerate(one.dropped_at) if dropped is None]
            xs += words
            ys += [number + 1 - 0.25 * below] * len(words)
    series = tuple(Series(who, tuple(xs), tuple(ys), "points") for who, (xs, ys) in marks.items())
    return Chart(f"Words that people mark, and words that {method} reads to the end", "Word", "Document", series)


def _agree(bench: Bench, rows: RationaleRows, name: str, found: Agreement, more: dict[str, float]) -> None:
    spread = {
        "auprc": found.auprc,
        "token_f1": found.choice.f1,
        "iou_f1": found.choice.iou_f1,
        "share_chosen": found.choice.share,
    }
    bench.record(
        f"rationales-{name.replace(' ', '-')}",
        f"average precision against human rationales: {name}",
        found.average_precision,
        "",
        spread={**{key: round(value, 4) for key, value in spread.items()}, **more},
        examples=found.documents,
        note=f"{bench.note}; methods at about {bench.args.speedup}x; words beyond {bench.max_tokens} tokens count as least "
        "important",
    )


def adaptivity(bench: Bench) -> None:
    ready = list(prepared(thresher.attach(plain := bench.model()), bench.test))
    said = run_packed(plain, ready).predictions
    powers = np.exp(said - said.max(1, keepdims=True))
    confidence = (powers / powers.sum(1, keepdims=True)).max(1)
    lengths = np.array([len(ids) for ids in bench.test["input_ids"]])
    against = {"length": ("Tokens", lengths), "confidence": ("The start's confidence", confidence)}
    series: dict[str, list[Series]] = {name: [] for name in against}
    for method, model in bench.each(bench.args.speedup):
        policy = attachment_of(model).policy
        assert policy is not None
        spent = np.zeros(len(lengths))
        for (index, _), trace in zip(ready, run(model, ready).traces, strict=True):
            dense = [dense_flops(policy.geometry, n) for n in trace.original]
            spent[index] = np.array(flops(trace, policy.geometry, policy)) / dense
        shown = np.arange(min(60, len(spent)))
        for name, (_, values) in against.items():
            series[name].append(Series(method, tuple(values[shown].tolist()), tuple(spent[shown].tolist()), "points"))
            bench.record(
                f"adaptivity-{name}-{method}",
                f"rank correlation of an example's share of its FLOPs with {name}: {method}",
                rank_correlation(values, spent),
                "",
                spread={"quartiles": [round(float(q), 4) for q in np.quantile(spent, (0.25, 0.5, 0.75))]},
                cell=(f"share of FLOPs on {bench.args.name}, its rank correlation", method, f"with {name}"),
                shown=("quartiles",) if name == "length" else (),  # those of an example's share, once
                examples=len(spent),
                note=f"{bench.note}; at about {bench.args.speedup}x",
            )
    for name, (label, _) in against.items():
        title = f"FLOPs of an example against {name}, {bench.args.name}"
        chart = Chart(title, label, "Share of the FLOPs without dropping", tuple(series[name]))
        bench.draw(chart, f"adapler-{bench.args.name}-adaptivity-{name}")


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; 0 where one is constant."""
    from scipy.stats import rankdata

    ranks = rankdata(one), rankdata(other)
    return float(np.corrcoef(*ranks)[0, 1]) if all(len(set(r)) > 1 for r in ranks) else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {
        "start": start,
        "methods": methods,
        "target": target,
        "speed": speed,
        "rationales": rationales,
        "adaptivity": adaptivity,
    }
    parser.add_argument("command", choices=list(commands))
    options(parser)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--passes", type=int, default=25_000, help="examples read forward and backward, for each method"
    )
    parser.add_argument(
        "--trained-at", type=float, default=2.0, help="speedup of the methods with a hard stage in training"
    )
    parser.add_argument("--hard-stage", action="store_true", help="of target and speed: AdapLeR with its hard stage")
    parser.add_argument("--speedup", type=float, default=2.0, help="of the methods in rationales and adaptivity")
    parser.add_argument("--timed", type=int, default=128, help="rows that are timed")
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    parser.add_argument("--evaluations", type=int, default=100, help="of a search")
    args = parser.parse_args()
    if args.command == "rationales" and args.name != "eraser_movies":
        parser.error("only eraser_movies has human rationales")
    commands[args.command](Bench(args))


if __name__ == "__main__":
    main()
