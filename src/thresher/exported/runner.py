"""Run an exported model without torch: one sequence a call, so there is no padding and every drop is real.

Many sequences: one worker a core, longest first. One sequence: all cores inside the call. Needs numpy, tokenizers and the
runtime (`pip install "thresher[onnx]"`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thresher.errors import DataError, OptionError, ThresherError
from thresher.exported import directory as files
from thresher.exported.sessions import Session, cores, has_int8_instructions, open_session
from thresher.measure.layer import Sizes, layer_flops

Text = str | tuple[str, str]
Row = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Output:
    """What the graph said of one sequence of N tokens.

    answer: logits [C], embedding [D] or score; [N, C] for heads that say something of every token (start and end logits
    side by side). dropped_at: [N] int64, the layer at which each token was dropped, 0 = kept to the end.
    exited_at: the last layer that ran.
    """

    answer: NDArray[np.float32]
    dropped_at: NDArray[np.int64]
    exited_at: int


class Runner:
    """An exported directory, ready to answer. Safe under threads.

    workers: sequences run at a time, one a core; None for the cores this process may use.

    Raises CheckpointError for a directory that is incomplete or has changed, ThresherError when the runtime is not
    installed; warns where int8 is to run on a processor that is not made for it.
    """

    def __init__(self, path: str | Path, *, workers: int | None = None) -> None:
        self.path = Path(path)
        self.manifest = files.read(path)
        if workers is not None and (not isinstance(workers, int) or workers < 1):
            raise OptionError(f"workers must be a whole number of at least 1, not {workers!r}.")
        self.workers = cores() if workers is None else workers
        if self.manifest.int8 and has_int8_instructions() is False:
            warnings.warn(
                f"This processor has no int8 dot-product instructions: {self.path} works, but may be no faster than float32, "
                "and rounds otherwise than where it was exported. Evaluate it here, or export it anew.",
                stacklevel=2,
            )
        self._sessions: dict[int, list[Session]] = {}
        self._tokenizer: Any = None

    def predict(self, texts: Sequence[Text], *, on_done: Callable[[int], object] | None = None) -> Any:
        """What the model says of texts, or of pairs of texts, in their order: [n, ...] float32, or a list of [N, C] for heads
        that say something of every token. Longer texts are cut to the length it was exported for."""
        return self.answers(self.encode(texts), on_done=on_done)

    def answers(self, rows: Sequence[Row], *, on_done: Callable[[int], object] | None = None) -> Any:
        """The same from token ids: each row a mapping with the graph's inputs, as `encode` makes them."""
        outputs = [output.answer for output in self.run(rows, on_done=on_done)]
        same = len({o.shape for o in outputs}) == 1 and outputs[0].ndim < 2
        return np.stack(outputs) if same else outputs

    def run(self, rows: Sequence[Row], *, on_done: Callable[[int], object] | None = None) -> list[Output]:
        """Answers and what was dropped, in the order of the rows.

        on_done: called with 1 after each row (progress bars), from the worker's thread.
        """
        feeds = [self._feed(row, number) for number, row in enumerate(rows, start=1)]
        workers = min(self.workers, len(feeds))
        sessions = self._chain(self.workers if workers <= 1 else 1)

        def one(index: int) -> Output:
            output = self._output(sessions, feeds[index])
            if on_done:
                on_done(1)
            return output

        if workers <= 1:
            return [one(i) for i in range(len(feeds))]
        order = sorted(range(len(feeds)), key=lambda i: -feeds[i]["input_ids"].shape[1])
        with ThreadPoolExecutor(workers) as pool:
            done = dict(zip(order, pool.map(one, order), strict=True))
        return [done[i] for i in range(len(feeds))]

    def encode(self, texts: Sequence[Text]) -> list[dict[str, list[int]]]:
        """Token ids (and token types where the model takes them) of texts or of pairs."""
        if isinstance(texts, str) or not isinstance(texts, Sequence | np.ndarray):
            raise DataError(f"Give a list of texts, not {'one text' if isinstance(texts, str) else repr(texts)}.")
        for number, text in enumerate(texts, start=1):
            pair = isinstance(text, list | tuple) and len(text) == 2 and all(isinstance(t, str) for t in text)
            if not (isinstance(text, str) or pair):
                raise DataError(f"Text {number} is neither a text nor a pair of texts but {type(text).__name__}.")
        encodings = self._load_tokenizer().encode_batch([t if isinstance(t, str) else tuple(t) for t in texts])
        columns = {"input_ids": "ids", "token_type_ids": "type_ids"}
        return [{name: getattr(e, columns[name]) for name in self.manifest.inputs} for e in encodings]

    def speedup(self, outputs: Iterable[Output]) -> float:
        """FLOPs of the same sequences with nothing dropped / FLOPs spent, the work of method and exit included."""
        sizes = Sizes(**self.manifest.geometry)
        spent = dense = 0.0
        for output in outputs:
            length = len(output.dropped_at)
            dense += sizes.layers * layer_flops(sizes, length, length)
            spent += self._flops(output, sizes)
        return dense / spent if spent else 1.0

    def _flops(self, output: Output, sizes: Sizes) -> float:
        length = read = len(output.dropped_at)
        spent = 0.0
        for layer in range(1, output.exited_at + 1):
            gone = (output.dropped_at > 0) & (output.dropped_at <= layer)
            fed = length - int(gone.sum())
            spent += _at(self.manifest.overhead[layer - 1], read)
            read = fed if sizes.before else read
            spent += layer_flops(sizes, read, fed if sizes.midpoint else read)
            read = fed
            if layer < sizes.layers and (self.manifest.after is None or layer in self.manifest.after):
                spent += _at(self.manifest.branch, length if self.manifest.branch_reads_dropped else read)
        return spent

    def _feed(self, row: Row, number: int) -> dict[str, NDArray[np.int64]]:
        lengths = set()
        feed = {}
        for name in self.manifest.inputs:
            if name not in row and name == "token_type_ids":
                feed[name] = np.zeros((1, len(row["input_ids"])), dtype=np.int64)
                continue
            if name not in row:
                raise DataError(f"Row {number} has no {name}, which this model reads.")
            feed[name] = self._ids(row[name], name, number)
            lengths.add(feed[name].shape[1])
        if len(lengths) > 1 or not min(lengths) or max(lengths) > self.manifest.max_length:
            raise DataError(
                f"Row {number} must have 1 to {self.manifest.max_length} tokens, as many of each input; it has "
                f"{' and '.join(map(str, sorted(lengths)))}."
            )
        return feed

    def _ids(self, values: Any, name: str, number: int) -> NDArray[np.int64]:
        """[1, N]. Raises DataError for what are no whole numbers or no ids of the model, which a runtime may not notice."""
        try:
            found = np.asarray(values).reshape(1, -1)
        except ValueError:  # lists of several lengths
            found = np.array([None])
        if found.size and found.dtype.kind not in "iu":
            raise DataError(f"Row {number} has {name} that are no whole numbers.")
        known = self.manifest.known[name]
        wrong = found[(found < 0) | (found >= known)] if found.size else found
        if wrong.size:
            raise DataError(f"Row {number} has {wrong[0]} among its {name}, where this model knows 0 to {known - 1}.")
        return found.astype(np.int64)

    def _output(self, sessions: Sequence[Session], feed: Mapping[str, NDArray[Any]]) -> Output:
        """Pass the chain until the row leaves."""
        manifest, known = self.manifest, dict(feed)
        for link, session in zip(manifest.chain, sessions, strict=True):
            made = session({name: known[name] for name in link.inputs})
            known |= zip(link.outputs, made, strict=True)
            if link.layer and known[files.after(link.layer, files.LEAVES)][0]:
                break
        *answers, dropped = (known[files.after(link.layer, name)] for name in manifest.outputs)
        answer = np.stack(answers, -1) if len(answers) > 1 else answers[0]
        return Output(answer[0], dropped, link.layer or manifest.geometry["layers"])

    def _chain(self, threads: int) -> list[Session]:
        if threads not in self._sessions:
            manifest = self.manifest
            linked = len(manifest.chain) > 1
            self._sessions[threads] = [
                open_session(manifest.runtime, self.path / file, link.outputs, threads, linked=linked)
                for file, link in zip(manifest.graphs, manifest.chain, strict=True)
            ]
        return self._sessions[threads]

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            file = self.path / files.TOKENIZER
            if not file.is_file():
                raise OptionError(f"{self.path} was exported without a tokenizer; give token ids to answers() instead.")
            try:
                from tokenizers import Tokenizer
            except ImportError as error:
                raise ThresherError('tokenizers is not installed; run pip install "thresher[onnx]".') from error
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_padding()
            tokenizer.enable_truncation(self.manifest.max_length)
            self._tokenizer = tokenizer
        return self._tokenizer


def _at(overhead: tuple[float, float, float], n: int) -> float:
    """FLOPs written as c0 + c1 n + c2 n^2."""
    c0, c1, c2 = overhead
    return c0 + c1 * n + c2 * n * n


__all__ = ["Output", "Runner"]
