"""Windows of dialogues against a naive reading of them, and a stage that learns from them, resumes and saves a start."""

from __future__ import annotations

import copy
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from helpers import FAMILIES, WITH_TYPES, make, tokenizer
from thresher.errors import CheckpointError, DataError, OptionError, UnsupportedModelError
from thresher.model import detach, is_attached
from thresher.tasks.responses import EOS
from thresher.tasks.windows import NEXT, RANDOM, SAME_DIALOGUE, Windows, read_dialogues
from thresher.training import post_training
from thresher.training.post_training import PostTraining, post_train

Turns = list[list[str]]
QUIET: dict[str, Any] = {"max_length": 40, "batch_size": 4, "progress": False, "precision": "float32"}
PLAIN = [[f"w{10 * d + u} w{10 * d + u}" for u in range(5, 5 + n)] for d, n in enumerate((6, 4, 3, 2, 5))]


@cache
def _knowing() -> Any:
    known = tokenizer()
    known.add_special_tokens({"extra_special_tokens": [EOS]})
    return known


def knowing() -> Any:
    """A tokenizer with [EOS]."""
    return copy.deepcopy(_knowing())


def start(directory: Path, family: str = "bert", head: str = "base", **options: Any) -> Path:
    make(family, head, layers=2, **options).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def rows(dialogues: Turns = PLAIN) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"turns": dialogues})


def words(example: dict[str, Any], known: Any) -> tuple[list[str], str]:
    """The utterances of the context and the answer of an example, read off its tokens."""
    tokens = known.convert_ids_to_tokens(example["input_ids"])
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and tokens.count("[SEP]") == 2
    middle = tokens.index("[SEP]")
    *context, rest = " ".join(tokens[1:middle]).split(EOS)
    assert not rest
    return [utterance.strip() for utterance in context], " ".join(tokens[middle + 1 : -1])


def naive(dialogues: Turns, k: int) -> list[tuple[int, list[str], str]]:
    """(dialogue, context, next utterance) of every window, in order."""
    found = []
    for number, turns in enumerate(dialogues):
        ends = range(k, len(turns)) if len(turns) > k else [len(turns) - 1] if len(turns) > 1 else []
        found += [(number, turns[max(0, end - k) : end], turns[end]) for end in ends]
    return found


@st.composite
def talks(draw: st.DrawFn) -> Turns:
    """Dialogues of one to seven utterances, of which two have two; some utterances occur more than once."""
    word = st.integers(5, 12).map(lambda i: f"w{i}")
    utterance = st.lists(word, min_size=1, max_size=3).map(" ".join)
    long = st.lists(utterance, min_size=2, max_size=7)
    dialogues = draw(st.lists(st.lists(utterance, min_size=1, max_size=7), max_size=3))
    return draw(st.permutations([*dialogues, draw(long), draw(long)]))


@given(talks(), st.integers(1, 4), st.integers(0, 3))
def test_windows_are_those_of_a_naive_reading(dialogues: Turns, k: int, epoch: int) -> None:
    known = _knowing()
    windows = Windows(dialogues, known, k=k, max_length=200)
    expected = naive(dialogues, k)
    assert len(windows) == len(expected)
    assert windows.left_out == sum(len(turns) == 1 for turns in dialogues)
    usable = [turns for turns in dialogues if len(turns) > 1]
    for number, (dialogue, context, following) in enumerate(expected):
        example = windows.example(number, epoch)
        read, answer = words(example, known)
        assert read == context
        own = dialogues[dialogue]
        others = [utterance for utterance in own if utterance != following]
        if example["relevance"] == NEXT:
            assert answer == following
        elif example["relevance"] == SAME_DIALOGUE:
            assert answer in others
        else:
            foreign = [u for i, turns in enumerate(dialogues) if i != dialogue and turns in usable for u in turns]
            assert answer in foreign
            assert answer != following or set(foreign) == {following}


def test_an_utterance_inside_the_window_is_drawn_only_where_there_is_no_other() -> None:
    known = knowing()
    windows = Windows(PLAIN, known, k=3)
    inside = Counter[int]()
    for number, (dialogue, context, _) in enumerate(naive(PLAIN, 3)):
        for epoch in range(60):
            example = windows.example(number, epoch)
            if example["relevance"] == SAME_DIALOGUE:
                inside[dialogue] += words(example, known)[1] in context
    assert inside[0] == inside[4] == 0  # six and five utterances: there is always one outside
    assert min(inside[1], inside[2], inside[3]) > 0


def test_a_dialogue_that_repeats_one_utterance_lends_none_of_its_own() -> None:
    windows = Windows([["w5", "w5", "w5", "w5", "w5"], ["w6", "w7"]], knowing())
    seen = {windows.example(0, epoch)["relevance"] for epoch in range(60)}
    assert seen == {NEXT, RANDOM}


def test_relevances_come_in_their_proportions() -> None:
    dialogues = [[f"w{5 + (d * u) % 50} w{5 + u}" for u in range(12)] for d in range(40)]
    windows = Windows(dialogues, knowing())
    counts = Counter(windows.example(w, epoch)["relevance"] for w in range(len(windows)) for epoch in range(12))
    total = sum(counts.values())
    assert counts[NEXT] / total == pytest.approx(0.25, abs=0.02)
    assert counts[SAME_DIALOGUE] / total == pytest.approx(0.25, abs=0.02)
    assert counts[RANDOM] / total == pytest.approx(0.5, abs=0.02)


def test_draws_depend_on_seed_epoch_and_window_alone() -> None:
    def drawn(seed: int, epoch: int, order: range) -> list[Any]:
        windows = Windows(PLAIN, knowing(), seed=seed)
        found = {w: windows.example(w, epoch) for w in order}
        return [found[w] for w in sorted(found)]

    there, back = range(8), range(7, -1, -1)
    assert drawn(0, 0, there) == drawn(0, 0, back)
    assert drawn(0, 0, there) != drawn(0, 1, there)
    assert drawn(0, 0, there) != drawn(1, 0, there)


@given(st.lists(st.integers(1, 30), min_size=4, max_size=4), st.integers(6, 60))
def test_contexts_lose_their_head_and_answers_their_tail(sizes: list[int], max_length: int) -> None:
    dialogue = [" ".join(f"w{5 + (7 * u + i) % 50}" for i in range(size)) for u, size in enumerate(sizes)]
    known = _knowing()
    windows = Windows([dialogue, ["w5", "w6"]], known, max_length=max_length)
    whole = f"{f' {EOS} '.join(dialogue[:3])} {EOS}".split()
    example = next(e for e in (windows.example(0, epoch) for epoch in range(60)) if e["relevance"] == NEXT)
    tokens = known.convert_ids_to_tokens(example["input_ids"])
    middle = tokens.index("[SEP]")
    context, answer = tokens[1:middle], tokens[middle + 1 : -1]
    assert len(tokens) == min(max_length, len(whole) + len(answer) + 3)
    assert answer == dialogue[3].split()[: len(answer)]
    assert len(answer) == min(sizes[3], max_length // 2, max_length - 5)
    assert context == whole[-len(context) :]
    assert example["token_type_ids"] == [0] * (middle + 1) + [1] * (len(answer) + 1)
    assert example["special_tokens_mask"] == [int(token.startswith("[")) for token in tokens]


def test_empty_utterances_are_passed_over_and_special_tokens_in_a_text_are_text() -> None:
    known = knowing()
    windows = Windows([["w5", " ", "w6", ""], ["w7", ""], ["w8", f"w9 {EOS} [MASK]"]], known, k=1)
    assert (len(windows), windows.left_out) == (2, 1)
    assert {tuple(words(windows.example(0, epoch), known)[0]) for epoch in range(9)} == {("w5",)}
    said = [windows.example(1, epoch) for epoch in range(40)]
    answer = next(e["input_ids"] for e in said if e["relevance"] == NEXT)
    assert answer.count(known.convert_tokens_to_ids(EOS)) == 1
    assert known.mask_token_id not in answer


def batch_of(
    windows: Windows, known: Any, epoch: int = 0, probability: float = 0.15
) -> tuple[dict[str, Tensor], Tensor]:
    """A masked batch of all windows, and what it was before."""
    examples = [windows.example(w, epoch) for w in range(len(windows))]
    batch = post_training._Masking(known, probability)(copy.deepcopy(examples))
    ids = torch.zeros_like(batch["input_ids"])
    for row, example in enumerate(examples):
        ids[row, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
    return batch, ids


def test_words_are_masked_as_in_bert_and_special_tokens_never() -> None:
    known = knowing()
    dialogues = [[" ".join(f"w{5 + (d + u + i) % 50}" for i in range(8)) for u in range(30)] for d in range(20)]
    batch, ids = batch_of(Windows(dialogues, known), known)
    special = torch.isin(ids, torch.tensor(known.all_special_ids))
    hidden = batch["labels"] != -100
    assert bool((ids[special] == known.convert_tokens_to_ids(EOS)).any())
    assert not bool((hidden & special).any())
    assert torch.equal(batch["input_ids"][~hidden], ids[~hidden])
    assert torch.equal(batch["labels"][hidden], ids[hidden])
    assert float(hidden.sum() / (~special).sum()) == pytest.approx(0.15, abs=0.01)
    put = batch["input_ids"][hidden]
    masks, same = put == known.mask_token_id, put == ids[hidden]
    assert float(masks.float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float(same.float().mean()) == pytest.approx(0.1, abs=0.03)


def test_masks_change_with_the_epoch_and_not_with_what_was_masked_before() -> None:
    known = knowing()
    windows = Windows(PLAIN, known)
    first, second = batch_of(windows, known)[0], batch_of(windows, known)[0]
    assert all(torch.equal(first[name], second[name]) for name in first)
    masking = post_training._Masking(known, 0.15)
    examples = [windows.example(w, 0) for w in range(len(windows))]
    masking(copy.deepcopy(examples[:3]))
    assert torch.equal(masking(copy.deepcopy(examples))["labels"], first["labels"])
    other = batch_of(windows, known, epoch=1)[0]
    assert other["labels"].shape != first["labels"].shape or not torch.equal(other["labels"], first["labels"])


def built(directory: Path, family: str) -> tuple[PostTraining, Any]:
    model, known = post_training._load(start(directory, family), 40)
    return model.eval(), known


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_two_stock_models(family: str, tmp_path: Path) -> None:
    model, known = built(tmp_path, family)
    batch, _ = batch_of(Windows(PLAIN, known, max_length=40), known, probability=0.4)
    calls = []
    encoder = model.classifier.base_model
    encoder.register_forward_hook(lambda *_: calls.append(1))
    out = model(**batch)
    assert len(calls) == 1 and is_attached(model.classifier)
    out["loss"].backward()
    losses = [float(out[name].detach()) for name in ("mlm_loss", "relevance_loss", "loss")]
    embeddings = encoder.get_input_embeddings().weight
    assert model.masked.get_output_embeddings().weight is embeddings
    assert len(embeddings) == len(known)
    assert embeddings.grad is not None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    detach(model.classifier)
    masked = model.masked
    setattr(masked, masked.base_model_prefix, encoder)
    labels, relevance = batch.pop("labels"), batch.pop("relevance")
    if family not in WITH_TYPES:
        batch.pop("token_type_ids", None)
    with torch.no_grad():
        mlm = masked(**batch, labels=labels).loss
        logits = model.classifier(**batch).logits
    related = -logits.log_softmax(-1)[torch.arange(len(logits)), relevance].mean()
    assert logits.shape == (len(relevance), 3)
    assert losses == pytest.approx([float(mlm), float(related), float(mlm + related)], abs=1e-4)


def test_a_batch_without_a_mask_has_a_loss(tmp_path: Path) -> None:
    model, known = built(tmp_path, "bert")
    batch, _ = batch_of(Windows(PLAIN, known), known)
    batch["labels"].fill_(-100)
    out = model(**batch)
    assert float(out["mlm_loss"].detach()) == 0.0
    out["loss"].backward()
    assert bool(model.classifier.classifier.weight.grad.isfinite().all())


class Watch(TrainerCallback):
    """Keeps the logged losses, and the encoder as it was at the end."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.encoder: dict[str, Tensor] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        self.losses += [float(logs["loss"])] if "loss" in logs else []

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.steps.append(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self.encoder = {n: v.clone() for n, v in model.classifier.base_model.state_dict().items()}


def encoder_of(directory: Path) -> dict[str, Tensor]:
    return transformers.AutoModel.from_pretrained(directory).state_dict()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["bert", "modernbert", "roberta"])
def test_what_is_saved_is_a_start(family: str, tmp_path: Path) -> None:
    begin, out, watch = start(tmp_path / "start", family), tmp_path / "out", Watch()
    found = post_train(begin, rows(), out, **QUIET, learning_rate=1e-3, callbacks=[watch])
    loaded, info = AutoModelForSequenceClassification.from_pretrained(out, num_labels=1, output_loading_info=True)
    assert {key.split(".")[0] for key in info["missing_keys"]} <= {"classifier", "pre_classifier", "head"}
    assert not info["unexpected_keys"]
    ours = loaded.base_model.state_dict()
    assert set(ours) == set(watch.encoder)
    assert all(torch.equal(ours[name], watch.encoder[name]) for name in ours)
    before = encoder_of(begin)
    assert all(not torch.equal(ours[name], before[name]) for name in ours if name.endswith("dense.weight"))
    assert (family == "bert") == ("pooler.dense.weight" in ours)
    assert transformers.AutoConfig.from_pretrained(out).num_labels == 2
    known = AutoTokenizer.from_pretrained(out)
    assert known(f"w5 {EOS}", add_special_tokens=False)["input_ids"] == [5, known.convert_tokens_to_ids(EOS)]
    assert loaded.config.vocab_size == len(known)
    report = json.loads((out / "post_training.json").read_text())
    assert report == {**report, **found, "k": 3, "seed": 0, "mask_probability": 0.15, "dialogues": 5}
    assert (found["windows"], found["left_out"]) == (len(naive(PLAIN, 3)), 0)
    assert 0 <= found["relevance_accuracy"] <= 1 and found["mlm_loss"] > 0 and found["relevance_loss"] > 0
    assert {p.name for p in out.iterdir()} >= {"config.json", "model.safetensors", "post_training.json"}
    assert not (out / "training").exists()


def test_a_start_gives_its_pooler_its_own_head_and_its_eos(tmp_path: Path) -> None:
    begin = start(tmp_path / "start", head="sequence", seed=3)
    first, known = post_training._load(begin, 40)
    stock = transformers.AutoModel.from_pretrained(begin)
    assert torch.equal(first.classifier.base_model.pooler.dense.weight, stock.pooler.dense.weight)
    post_train(begin, rows(), tmp_path / "once", **QUIET, max_steps=1)
    again, same = post_training._load(tmp_path / "once", 40)
    assert len(same) == len(known) == again.classifier.get_input_embeddings().num_embeddings
    masked = transformers.AutoModelForMaskedLM.from_config(first.classifier.config)
    masked.save_pretrained(tmp_path / "masked")
    known.save_pretrained(tmp_path / "masked")
    kept = post_training._load(tmp_path / "masked", 40)[0].masked.cls.predictions.transform.dense.weight
    assert torch.equal(kept, masked.cls.predictions.transform.dense.weight)


def test_both_heads_learn_a_batch_by_heart(tmp_path: Path) -> None:
    model, known = built(tmp_path, "bert")
    windows = Windows(PLAIN, known, max_length=40)
    batches = (batch_of(windows, known, epoch, probability=0.3)[0] for epoch in range(60))
    batch = next(b for b in batches if len(b["relevance"].unique()) == 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        out = model(**batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert torch.equal(out["relevance_logits"].argmax(-1), batch["relevance"])
    assert float(out["mlm_loss"].detach()) < 0.5 and float(out["relevance_loss"].detach()) < 0.2


def test_it_learns(tmp_path: Path) -> None:
    dialogues = [[" ".join([f"w{5 + d}"] * size) for size in (1, 2, 3, 4, 5)] for d in range(8)]
    watch = Watch()
    found = post_train(
        start(tmp_path / "start"),
        rows(dialogues),
        tmp_path / "out",
        **{**QUIET, "batch_size": 8, "epochs": 15, "learning_rate": 5e-3},
        k=2,
        logging_steps=10,
        callbacks=[watch],
    )
    assert watch.losses[-1] < 0.7 * watch.losses[0]
    assert found["mlm_loss"] < 2.5  # one of 60 words at random: 4.1


class Stop(Exception):
    pass


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 5:
            raise Stop


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    begin = make("bert", "base", layers=2)
    begin.config.hidden_dropout_prob = 0.2  # so that the state of the random numbers matters
    begin.save_pretrained(tmp_path / "start")
    tokenizer().save_pretrained(tmp_path / "start")
    options = {**QUIET, "batch_size": 3, "epochs": 3, "learning_rate": 1e-3, "save_steps": 2}
    whole = post_train(tmp_path / "start", rows(), tmp_path / "whole", **options)
    where, watch = tmp_path / "broken", Watch()
    with pytest.raises(Stop):
        post_train(tmp_path / "start", rows(), where, **options, callbacks=[Interrupt()])
    assert not (where / "config.json").exists()
    with pytest.raises(OptionError, match=r"other settings \(k, windows\)"):
        post_train(tmp_path / "start", rows(), where, **options, k=2)
    again = post_train(tmp_path / "start", rows(), where, **options, callbacks=[watch])
    assert watch.steps == [5, 6, 7, 8, 9]
    one, two = encoder_of(tmp_path / "whole"), encoder_of(where)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-6
    for name in ("mlm_loss", "relevance_loss", "relevance_accuracy"):
        assert again[name] == pytest.approx(whole[name], abs=1e-5)


def test_every_epoch_draws_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    example = Windows.example

    def noted(self: Windows, window: int, epoch: int) -> dict[str, Any]:
        asked.append((epoch, window))
        return example(self, window, epoch)

    monkeypatch.setattr(Windows, "example", noted)
    post_train(start(tmp_path / "start"), rows(), tmp_path / "out", **QUIET, epochs=2)
    every = range(len(naive(PLAIN, 3)))
    assert Counter(asked) == Counter((epoch, window) for epoch in range(3) for window in every)  # the last is measured


def test_dialogues_are_read_from_turns_or_from_right_candidates() -> None:
    assert read_dialogues(rows([["a", "b"], ["c"]])) == [["a", "b"], ["c"]]
    assert read_dialogues(rows([["a", None, "b"]])) == [["a", "", "b"]]  # type: ignore[list-item]
    given_ = {"context": [["a"], ["b", "c"], ["d"]], "candidates": [["x", "y"], ["z", "u"], ["v", "w"]]}
    by_index = datasets.Dataset.from_dict({**given_, "label": [1, 0, 0]})
    assert read_dialogues(by_index) == [["a", "y"], ["b", "c", "z"], ["d", "v"]]
    by_flag = datasets.Dataset.from_dict({**given_, "labels": [[0, 1], [0, 0], [1, 1]]})
    assert read_dialogues(by_flag) == [["a", "y"], ["d", "v"], ["d", "w"]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"turns": [["a"], None]}, "Row 2 has no turns"),
        ({"turns": [["a"], []]}, "Row 2 has no turns"),
        ({"turns": ["a", "b"]}, "Row 1 has no turns"),
        ({"turns": [[1, 2]]}, "Row 1 holds a number"),
        ({"text": ["a"]}, "they need turns"),
        ({"context": [["a"]], "candidates": [["b"]], "label": [1]}, "Row 1 has the label 1"),
    ],
)
def test_rows_that_are_no_dialogues_are_named(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_dialogues(datasets.Dataset.from_dict(columns))


@pytest.mark.parametrize("dialogues", [[], [["w5"], ["w6"]], [["w5", "w6", "w7"]], [["", " "], ["w5", "w6"]]])
def test_dialogues_without_a_usable_window_are_refused(dialogues: Turns) -> None:
    with pytest.raises(DataError, match="at least two dialogues"):
        Windows(dialogues, knowing())


def test_windows_refuse_what_cannot_be() -> None:
    with pytest.raises(OptionError, match="at least 1 utterance"):
        Windows(PLAIN, knowing(), k=0)
    with pytest.raises(OptionError, match="maximum length of 5"):
        Windows(PLAIN, knowing(), max_length=5)
    assert Windows(PLAIN, knowing(), max_length=6).example(0, 0)
    with pytest.raises(OptionError, match=r"\[EOS\]"):
        Windows(PLAIN, tokenizer())


def test_post_training_refuses_what_cannot_be(tmp_path: Path) -> None:
    begin, out = start(tmp_path / "start"), tmp_path / "out"
    with pytest.raises(OptionError, match="share of masked tokens"):
        post_train(begin, rows(), out, mask_probability=1.0)
    with pytest.raises(OptionError, match="reads 48 tokens"):
        post_train(begin, rows(), out)
    with pytest.raises(CheckpointError, match="no directory"):
        post_train(tmp_path / "absent", rows(), out)
    decoder = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2Model(decoder).save_pretrained(tmp_path / "decoder")
    tokenizer().save_pretrained(tmp_path / "decoder")
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        post_train(tmp_path / "decoder", rows(), out)
    with pytest.raises(DataError, match="two dialogues"):
        post_train(begin, rows([["w5"]]), out, max_length=40)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text((begin / "config.json").read_text())
    tokenizer().save_pretrained(tmp_path / "damaged")
    with pytest.raises(CheckpointError, match="does not load"):
        post_train(tmp_path / "damaged", rows(), out, max_length=40)
    assert not out.exists()
