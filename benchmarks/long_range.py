"""Efficient attention and token reduction in score, speed and memory, on two long-range tasks at a small scale.

    python benchmarks/long_range.py --data-dir DATA-DIR --out RUNS/long-range [--task listops bytes] [--steps 1500] [--dry]

Every model is a class of transformers at one small size, trained from scratch on the same rows in the same order for the same
number of steps: BERT (full attention), ModernBERT (a full and then local layers), Longformer (windows), BigBird (windows,
random and global blocks), Nystromformer (landmarks), Perceiver (latents, linear in length) and FNet (Fourier transforms, no
attention). YOSO and MRA are left out: transformers computes the one in full without a GPU kernel and has no other way for the
second. BERT and ModernBERT, which Thresher enters, are forked before the last steps; the fork drops tokens in them and is set
to --speedup in FLOPs on held-out training rows.

Time is of batches padded to --tokens, as Long Range Arena pads them, each model in its turn in every round; Thresher packs the
same batches, and what packing alone gains is a way of its own. --cost adds time and memory at other lengths, of untrained
models on random tokens without padding. Memory is the peak of a process that runs nothing but the batch. A model that OUT holds
of the same run is not trained again.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

import thresher
from long_range_data import BYTES_VOCABULARY, LISTOPS_VOCABULARY, PAD, byte_reviews, listops
from long_range_models import CONFIGS, Batch, Shape, build, forward, padded, pick, random_batch
from records import record
from thresher.measure.latency import Timing, paired, ratio
from thresher.measure.run import run
from thresher.policy import Stage

HERE = Path(__file__).parent
CLASSES = {"listops": 10, "bytes": 2}
VOCABULARIES = {"listops": LISTOPS_VOCABULARY, "bytes": BYTES_VOCABULARY}
FULL = "bert"  # what every time is compared with
ENTERED = ("bert", "modernbert")
RUN = ("tokens", "depth", "steps", "fork", "speedup", "batch", "rate", "validation", "test", "layers", "hidden", "heads",
       "window", "seed")  # fmt: skip
WAYS = {"packed": "packed by Thresher", "reduced": "packed, dropping tokens"}


def fine_tune(model: Any, rows: Batch, order: Tensor, rate: float, fork: int, forked: Callable[[], None]) -> None:
    """One step for each row of `order` [steps, batch]; the rate rises for a twentieth of them and then falls to 0.

    forked: called before step `fork`.
    """
    steps = len(order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = hf.get_linear_schedule_with_warmup(optimizer, max(steps // 20, 1), steps)
    model.train()
    for step, index in enumerate(order):
        if step == fork:
            forked()
        batch = pick(rows, index)
        loss = torch.nn.functional.cross_entropy(forward(model, batch), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.eval()


@torch.inference_mode()
def accuracy(model: Any, rows: Batch, size: int) -> float:
    said = [forward(model, pick(rows, slice(at, at + size))).argmax(-1) for at in range(0, len(rows["labels"]), size)]
    return float((torch.cat(said) == rows["labels"]).float().mean())


def tokenizer(vocabulary: int) -> hf.PreTrainedTokenizerFast:
    """Only pads: the rows are encoded already."""
    words = {"[PAD]": PAD, **{f"[{i}]": i for i in range(1, vocabulary)}}
    return hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "[PAD]")), pad_token="[PAD]")


@dataclass
class Found:
    """What was found of one way to run a model: as it is (""), packed, or packed and dropping tokens.

    built: the model, attached for the latter two. flops: FLOPs of the packed model / FLOPs spent. accuracy: None where nothing
    was trained. mib: peak memory of a batch.
    """

    model: str
    way: str
    built: Any
    directory: Path
    accuracy: float | None = None
    flops: float = 1.0
    timing: Timing | None = None
    mib: float = 0.0

    @property
    def id(self) -> str:
        return f"{self.model}-{self.way}" if self.way else self.model

    @property
    def label(self) -> str:
        return f"{self.model}, {WAYS[self.way]}" if self.way else self.model


def ways(name: str, plain: Any, reduced: Any, directory: Path) -> list[Found]:
    """The model as it is and, where there is a reduced copy, the model packed and that copy; as `saved` keeps them."""
    found = [Found(name, "", plain, directory / name)]
    if reduced is not None:
        found.append(Found(name, "packed", thresher.attach(copy.deepcopy(plain)), directory / name))
        found.append(Found(name, "reduced", reduced, directory / f"{name}-reduced"))
    return found


def saved(name: str, plain: Any, reduced: Any, directory: Path) -> None:
    """For `print_peak`, and for a run that is to go on."""
    plain.save_pretrained(directory / name)
    if reduced is not None:
        thresher.save(reduced, directory / f"{name}-reduced")


def opened(name: str, directory: Path) -> tuple[Any, Any]:
    plain = hf.AutoModelForSequenceClassification.from_pretrained(directory / name).eval()
    return plain, thresher.load(directory / f"{name}-reduced").eval() if name in ENTERED else None


def print_peak(directory: str, way: str, rows: int, shape: Shape) -> None:
    """Run a batch of random tokens and print the MiB that it took above the loaded model, which has run one row.

    Linux only: the peak that getrusage tells would begin with that of the process that started this one.
    """
    import ctypes

    def mib(what: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))

    load = thresher.load if way == "reduced" else hf.AutoModelForSequenceClassification.from_pretrained
    model = load(directory).eval()
    if way == "packed":
        thresher.attach(model)
    batch = random_batch(shape, rows)
    with torch.inference_mode():
        forward(model, pick(batch, slice(1)))
        ctypes.CDLL(None).malloc_trim(0)  # else the batch would fit into what loading has left free
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = mib("VmRSS")
        for _ in range(2):
            forward(model, batch)
    print(mib("VmHWM") - before)


def measure(found: list[Found], batches: list[Batch], rounds: int, shape: Shape) -> None:
    """Time of all batches, every way in every round; and the memory of one."""

    def all_batches(way: Found) -> None:
        for batch in batches:
            forward(way.built, batch)

    with torch.inference_mode():
        timings = paired({way.id: lambda w=way: all_batches(w) for way in found}, rounds=rounds, warmup=2)
    for way in found:
        way.timing = timings[way.id]
        asked = f"{str(way.directory)!r}, {way.way!r}, {len(batches[0]['input_ids'])}, {shape!r}"
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); from long_range import *; print_peak({asked})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        way.mib = float(done.stdout.split()[-1])


def trained(
    name: str, task: str, parts: dict[str, datasets.Dataset], shape: Shape, args: Any, out: Path
) -> list[Found]:
    """A model trained on a task and, where Thresher enters it, its fork that drops tokens; with their accuracy."""
    file, run_of = out / f"{name}.json", {key: getattr(args, key) for key in RUN}
    known = json.loads(file.read_text()) if file.is_file() else {"run": run_of}
    if known["run"] != run_of:
        raise SystemExit(f"{out} holds a run with other settings; give another --out.")
    if "accuracy" not in known:
        saved(name, *learned(name, task, parts, shape, args, out), out)
    found = ways(name, *opened(name, out), out)
    if "accuracy" not in known:
        test = padded(parts["test"], shape.tokens)
        known["accuracy"] = [accuracy(way.built, test, args.batch) for way in found]
        known["flops"] = run(found[-1].built, parts["test"]).speedup if name in ENTERED else 1.0
        file.write_text(json.dumps(known))
    for way, score in zip(found, known["accuracy"], strict=True):
        way.accuracy = score
    found[-1].flops = known["flops"]
    for way in found:
        print(f"  {way.label}: {way.accuracy:.4f} at {way.flops:.2f}x FLOPs", flush=True)
    return found


def learned(
    name: str, task: str, parts: dict[str, datasets.Dataset], shape: Shape, args: Any, out: Path
) -> tuple[Any, Any]:
    """A new model after its steps, and its fork, if it has one."""
    model, reduced = build(name, shape, args.seed), None
    rows = padded(parts["train"], shape.tokens)
    generator = torch.Generator().manual_seed(args.seed)
    epochs = -(-args.steps * args.batch // len(parts["train"]))
    order = torch.cat([torch.randperm(len(parts["train"]), generator=generator) for _ in range(epochs)])
    order = order[: args.steps * args.batch].view(args.steps, args.batch)
    last = max(int(args.steps * args.fork), 1)

    def forked() -> None:
        nonlocal reduced
        reduced = copy.deepcopy(model) if name in ENTERED else None

    print(f"{task}: {name}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    fine_tune(model, rows, order, args.rate, args.steps - last, forked)
    if reduced is not None:
        # It goes on at the rate at which the other one went on.
        rate = args.rate * last / args.steps
        stage = Stage(name="hard", mode="hard", learning_rate=rate, epochs=1.0, batch_size=args.batch, warmup=0.0)
        reduced = thresher.fit(
            reduced, thresher.AttentionMass(), parts["train"].select(order[-last:].flatten().tolist()),
            tokenizer(shape.vocabulary), out / f"{name}-fit", validation=parts["validation"], speedup=args.speedup,
            stages=(stage,), seed=args.seed, precision="float32", progress=False, use_cpu=True,
        )  # fmt: skip
    return model, reduced


def untrained(name: str, shape: Shape, args: Any, out: Path) -> list[Found]:
    """A new model and, where Thresher enters it, a copy set to the same speedup on random tokens."""
    model, reduced, flops = build(name, shape, args.seed), None, 1.0
    if name in ENTERED:
        reduced = thresher.attach(copy.deepcopy(model), thresher.AttentionMass())
        ids = random_batch(shape, 4)["input_ids"].tolist()
        rows = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * shape.tokens] * 4})
        flops = thresher.calibrate(reduced, rows, speedup=args.speedup).speedup
    saved(name, model, reduced, out)
    found = ways(name, model, reduced, out)
    found[-1].flops = flops
    return found


def parts_of(task: str, args: Any) -> dict[str, datasets.Dataset]:
    """Rows to train on, to set how much is dropped on, and to test on; none is in two of them."""
    sizes = {"train": args.steps * args.batch, "validation": args.validation, "test": args.test}
    if task == "listops":
        rows = listops(sum(sizes.values()), seed=args.seed, tokens=args.tokens, depth=args.depth)
        cuts = np.cumsum([0, *sizes.values()])
        return {part: rows.select(range(*cuts[at : at + 2])) for at, part in enumerate(sizes)}
    both = sizes["train"] + sizes["validation"]
    rows = byte_reviews(args.data_dir, "train", both, seed=args.seed, tokens=args.tokens)
    return {
        "train": rows.select(range(sizes["validation"], len(rows))),
        "validation": rows.select(range(sizes["validation"])),
        "test": byte_reviews(args.data_dir, "test", sizes["test"], seed=args.seed, tokens=args.tokens),
    }


def write(found: list[Found], part: str, shape: Shape, args: Any, batches: list[Batch]) -> None:
    """Print what was found, and record it unless --dry. part: a task, or the name of a length."""
    by_id = {way.id: way for way in found}
    mean = float(np.mean([batch["attention_mask"].sum(1).float().mean().item() for batch in batches]))
    rows = len(batches[0]["input_ids"])
    for way in found:
        assert way.timing is not None
        faster = ratio(by_id[FULL].timing, way.timing)
        spread = {
            "faster": round(faster.median, 3),
            "first_quartile": round(faster.low, 3),
            "third_quartile": round(faster.high, 3),
            "ms_a_batch": round(1000 * way.timing.median / len(batches), 2),
            "peak_mib": round(way.mib, 1),
        }
        if way.way == "reduced":
            gain = ratio(by_id[f"{way.model}-packed"].timing, way.timing)
            spread |= {"flops": round(way.flops, 3), "measured_over_packed": round(gain.median, 3)}
        score = "" if way.accuracy is None else f"{100 * way.accuracy:.1f} %"
        print(f"{part:8} {way.label:36} {score:7} {spread}", flush=True)
        if args.dry:
            continue
        judged = way.accuracy is not None
        heading = (
            "accuracy in percent, times as fast as full attention, memory" if judged else "times as fast, and memory"
        )
        what = f"accuracy of {way.label}: {part}" if judged else f"time of full attention / of {way.label}: {part}"
        record(
            "long_range", f"long-range-{part}-{way.id}", what, 100 * way.accuracy if judged else spread.pop("faster"),
            "%" if judged else "x", baseline="speed: BERT, stock, the same padded batches", spread=spread,
            cell=(heading, way.label, part if judged else f"{part} tokens"),
            shown=("faster", "peak_mib") if judged else ("peak_mib",),
            data=("ListOps" if part == "listops" else "imdb, bytes") if judged else "random tokens",
            split="test" if judged else "", examples=args.test if judged else rows, seeds=[args.seed],
            note=f"{shape.layers} layers x {shape.hidden}, {shape.heads} heads, window {shape.window}, "
            f"rows of {mean:.0f} tokens in batches of {rows} x {shape.tokens}, {torch.get_num_threads()} threads, "
            f"{args.rounds} rounds"
            + (f"; from scratch, {args.steps} steps of {args.batch} rows, rate {args.rate}" if judged else "; untrained")
            + (f"; tokens drop in the last {args.fork:.0%} of the steps" if judged and way.way == "reduced" else "")
            + ("; FLOPs count local layers as full ones" if way.model == "modernbert" and way.way == "reduced" else ""),
        )  # fmt: skip


def draw(panels: dict[str, list[Found]], path: Path, tokens: int) -> None:
    """Score over speed, one panel a task; the area of a mark is the memory of a batch."""
    import re

    import matplotlib
    from matplotlib.figure import Figure

    from peers_chart import INK, LOOK, OURS, PEER, SURFACE

    titles = {"listops": "ListOps", "bytes": "IMDb as bytes"}
    with matplotlib.rc_context({**LOOK, "axes.spines.left": True, "font.family": ["DejaVu Sans"]}):
        figure = Figure(figsize=(0.6 + 5.6 * len(panels), 5.0), layout="constrained", facecolor=SURFACE)
        figure.suptitle(
            f"Score, speed and memory at {tokens} tokens", x=0.01, ha="left", fontweight="bold", fontsize=12
        )
        for axes, (task, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            full = next(way for way in found if way.id == FULL).timing
            most = max(way.mib for way in found)
            speeds = [ratio(full, way.timing).median for way in found]
            scores = [100 * (way.accuracy or 0.0) for way in found]
            axes.set_facecolor("none")
            axes.scatter(
                speeds, scores, s=[30 + 900 * way.mib / most for way in found],
                c=[OURS if way.way else PEER for way in found], alpha=0.75, linewidths=0,
            )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_xlim(min(speeds) / 1.3, max(speeds) * 3.2)
            low, high = min(scores), max(scores)
            gap = 0.05 * max(high - low, 1.0)
            axes.set_ylim(low - 3 * gap, max(high, low + gap * len(found)) + 2 * gap)
            below = -np.inf  # names stand apart from one another, each as near to its mark as that allows
            for at in np.argsort(scores, kind="stable"):
                below = max(scores[at], below + gap)
                axes.annotate(
                    f"{found[at].label} ({found[at].mib:.0f} MiB)", (speeds[at], scores[at]), (speeds[at] * 1.18, below),
                    fontsize=9, va="center", arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.5},
                )  # fmt: skip
            ticks = [2.0**power for power in range(-3, 6) if axes.get_xlim()[0] < 2.0**power < axes.get_xlim()[1]]
            axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
            axes.set(title=titles[task], xlabel="times faster than full attention (BERT, stock)", ylabel="accuracy, %")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    font = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
    text = re.sub(r"'DejaVu Sans'[^;\"]*", font, path.read_text(encoding="utf-8"))
    path.write_text(text.rstrip() + "\n", encoding="utf-8")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="for the task bytes")
    parser.add_argument("--out", type=Path, required=True, help="where trained models are kept")
    parser.add_argument("--task", nargs="*", choices=sorted(CLASSES), default=sorted(CLASSES, reverse=True))
    parser.add_argument("--model", nargs="+", choices=list(CONFIGS), default=list(CONFIGS), help=f"{FULL} always runs")
    parser.add_argument("--tokens", type=int, default=512, help="the longest row; every model is built for it")
    parser.add_argument("--cost", type=int, nargs="*", default=[2048, 4096], help="lengths to take time and memory at")
    parser.add_argument("--depth", type=int, default=10, help="of ListOps")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument(
        "--fork", type=float, default=0.25, help="the last part of the steps, in which forks drop tokens"
    )
    parser.add_argument("--speedup", type=float, default=1.5, help="in FLOPs, of the forks")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--validation", type=int, default=200)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--window", type=int, default=64, help="of local attention; also landmarks and latents")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chart", type=Path, help="where to draw it; docs/img/long-range.svg unless --dry")
    parser.add_argument("--dry", action="store_true", help="print, record nothing")
    args = parser.parse_args()
    if not 0.0 < args.fork < 1.0:
        parser.error(f"--fork is a share of the steps, between 0 and 1, not {args.fork:g}")
    if args.window % 4 or any(tokens % args.window or tokens < 5 * args.window for tokens in (args.tokens, *args.cost)):
        parser.error("--window must be a multiple of 4, and every length a multiple of it and at least five of it.")
    if "bytes" in args.task and args.data_dir is None:
        parser.error("The task bytes needs --data-dir.")
    if args.chart is None and not args.dry:
        args.chart = HERE.parent / "docs" / "img" / "long-range.svg"
    args.model = [FULL, *(name for name in args.model if name != FULL)]
    return args


def main() -> None:
    args = options()
    thresher.keep_memory()
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    panels: dict[str, list[Found]] = {}
    for task in args.task:
        shape = Shape(args.tokens, VOCABULARIES[task], CLASSES[task], args.layers, args.hidden, args.heads, args.window)
        parts = parts_of(task, args)
        batches = [pick(padded(parts["test"], args.tokens), slice(at, at + args.batch)) for at in (0, args.batch)]
        out = args.out / task
        out.mkdir(parents=True, exist_ok=True)
        found = [way for name in args.model for way in trained(name, task, parts, shape, args, out)]
        measure(found, batches, args.rounds, shape)
        write(found, task, shape, args, batches)
        panels[task] = found
    for tokens in args.cost:
        shape = Shape(tokens, BYTES_VOCABULARY, 2, args.layers, args.hidden, args.heads, args.window)
        batch = random_batch(shape, max(args.batch * args.tokens // tokens, 1))
        with tempfile.TemporaryDirectory() as scratch:
            found = [way for name in args.model for way in untrained(name, shape, args, Path(scratch))]
            measure(found, [batch], args.rounds, shape)
        write(found, str(tokens), shape, args, [batch])
    if args.chart and panels:
        draw(panels, args.chart, args.tokens)


if __name__ == "__main__":
    main()
