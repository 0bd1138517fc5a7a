"""Words to first tokens and back, entities as seqeval and the CoNLL evaluation count them, and rows that are wrong."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import hypothesis
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

import thresher
from helpers import batch, make, settings, tokenizer
from thresher.errors import DataError, OptionError
from thresher.measure.run import run, run_packed
from thresher.methods import METHODS
from thresher.packed import PackedTokens
from thresher.policy import tracing
from thresher.tasks.tagging import EncodedTags, TaggingTask, entities, read_words_apart, repaired

NAMES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
TASK = TaggingTask(NAMES)
SILENT = "\u200b"  # of which nothing is left


@cache
def pieces() -> Any:
    """A tokenizer that takes words apart: "w5abc" is w5, ##a, ##b, ##c."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, 10)), "##a", "##b", "##c"]
    return transformers.BertTokenizer(vocab={name: i for i, name in enumerate(names)}, model_max_length=48)


def rows_of(words: list[list[str]], tags: list[list[str]] | None = None) -> datasets.Dataset:
    kind = datasets.Sequence(datasets.Value("string"))
    columns = {"tokens": words} | ({} if tags is None else {"tags": tags})
    return datasets.Dataset.from_dict(columns, features=datasets.Features(dict.fromkeys(columns, kind)))


def logits_of(encoded: EncodedTags, tags: list[list[str]]) -> np.ndarray:
    """Predictions that say `tags` on first tokens, and anything else elsewhere."""
    width = max(map(len, encoded.rows["input_ids"]))
    made = np.random.default_rng(0).normal(size=(len(tags), width, len(encoded.names)))
    for row, (firsts, wanted) in enumerate(zip(encoded.firsts, tags, strict=True)):
        for place, tag in zip(firsts, wanted, strict=True):
            if place >= 0:
                made[row, place] = np.eye(len(encoded.names))[encoded.names.index(tag)]
    return made


# --- words and tokens ------------------------------------------------------------------------------------------------

WORD = st.builds(
    lambda stem, rest: f"w{stem}{rest}", st.integers(5, 9), st.text(alphabet="abc", max_size=3)
) | st.sampled_from([SILENT, "[SEP]", "w5 w6"])
ROWS = st.lists(st.lists(st.tuples(WORD, st.sampled_from(NAMES)), max_size=9), min_size=1, max_size=4)


def by_hand(words: list[str], numbers: list[int], limit: int) -> tuple[list[int], list[int], list[int]]:
    """Ids, labels and first places, with every word tokenised alone."""
    tokens, labels, firsts = [2], [-100], []
    for word, number in zip(words, numbers, strict=True):
        own = pieces()(word, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        firsts.append(len(tokens) if own and len(tokens) < limit - 1 else -1)
        tokens += own
        labels += [number] + [-100] * (len(own) - 1) if own else []
    return [*tokens[: limit - 1], 3], [*labels[: limit - 1], -100], firsts


@hypothesis.settings(max_examples=25)
@given(ROWS, st.integers(3, 20))
def test_labels_stand_on_the_first_token_of_each_word(pairs: list[list[tuple[str, str]]], limit: int) -> None:
    words = [[word for word, _ in row] for row in pairs]
    tags = [repaired([tag for _, tag in row]) for row in pairs]
    found = TASK.encode(rows_of(words, tags), pieces(), limit)
    lost = 0
    for row, given_words, given_tags, firsts in zip(found.rows, words, tags, found.firsts, strict=True):
        numbers = [NAMES.index(tag) for tag in given_tags]
        assert (row["input_ids"], row["labels"], firsts) == by_hand(given_words, numbers, limit)
        assert row["attention_mask"] == [1] * len(row["input_ids"])
        lost += sum(a != b for a, b in zip(firsts, by_hand(given_words, numbers, 999)[2], strict=True))
    assert found.lost == lost
    assert found.silent == sum(word == SILENT for row in words for word in row)
    assert found.empty == sum(not row for row in words)
    assert found.tags == tags and found.words == words


def test_a_batch_is_cut_row_by_row_and_said() -> None:
    words = [["w5abc", "w6", "w7"], ["w8"], [], ["w5", SILENT, "w6"]]
    tags = [["B-PER", "I-PER", "O"], ["I-LOC"], [], ["O", "B-LOC", "O"]]
    found = TASK.encode(rows_of(words, tags), pieces(), 5)
    assert found.rows["input_ids"][:] == [[2, 5, 10, 11, 3], [2, 8, 3], [2, 3], [2, 5, 6, 3]]
    assert found.rows["labels"][:] == [[-100, 3, -100, -100, -100], [-100, 1, -100], [-100] * 2, [-100, 0, 0, -100]]
    assert found.firsts == [[1, -1, -1], [1], [], [1, -1, 2]]
    assert (found.truncated, found.lost, found.silent, found.begun, found.empty) == (1, 2, 1, 1, 1)
    assert found.notice() == (
        "1 of 4 rows was longer than 5 tokens, with 2 words cut off, which get the tag O; 1 word without a token gets the "
        "tag O; 1 entity begins with I-, which is read as B-; 1 row is empty"
    )
    assert TASK.encode(rows_of([["w5"]], [["O"]]), pieces()).notice() is None
    middle = TASK.encode(rows_of([["w5", "w6abc"]], [["O", "B-PER"]]), pieces(), 5)
    assert middle.notice() == "1 of 1 rows was longer than 5 tokens, in the middle of the last word"


def test_words_that_are_not_read_get_o() -> None:
    words = [["w5abc", "w6", "w7"], [SILENT, "w6"], []]
    found = TASK.encode(rows_of(words), pieces(), 5, require_tags=False)
    assert found.tags is None and "labels" not in found.rows.column_names
    said = logits_of(found, [["B-PER", "I-PER", "I-PER"], ["B-LOC", "B-LOC"], []])
    assert found.predicted(said) == [["B-PER", "O", "O"], ["O", "B-LOC"], []]
    with pytest.raises(DataError, match="without tags"):
        found.metrics(said)
    with pytest.raises(DataError, match=r"do not fit 3 rows and 5 tags"):
        found.predicted(said[:, :, :4])
    with pytest.raises(DataError, match=r"do not fit"):
        found.predicted(said[:2])


def test_training_leaves_out_rows_that_teach_nothing() -> None:
    words, tags = [["w5"], [], [SILENT], ["w6", "w7"]], [["O"], [], ["B-PER"], ["B-PER", "I-PER"]]
    found = TASK.encode(rows_of(words, tags), pieces(), training=True)
    assert found.words == [["w5"], ["w6", "w7"]] and found.tags == [["O"], ["B-PER", "I-PER"]]
    assert len(found.rows) == len(found.firsts) == 2 and found.left_out == 2
    assert "2 rows without a word to learn from were left out" in (found.notice() or "")
    with pytest.raises(DataError, match="no row with a word"):
        TASK.encode(rows_of([[], []], [[], []]), pieces(), training=True)


def test_other_names_of_columns_and_declared_tags() -> None:
    kind = datasets.Sequence(datasets.ClassLabel(names=["O", "B-X", "I-X"]))
    words = datasets.Sequence(datasets.Value("string"))
    rows = datasets.Dataset.from_dict(
        {"words": [["w5", "w6", "w7"]], "ner_tags": [[1, 2, 0]]},
        features=datasets.Features({"words": words, "ner_tags": kind}),
    )
    task = TaggingTask.infer(rows)
    assert task.names == ("O", "B-X", "I-X")
    assert task.encode(rows, pieces()).tags == [["B-X", "I-X", "O"]]
    assert TaggingTask(("I-X", "O", "B-X")).encode(rows, pieces()).rows["labels"][0] == [-100, 2, 0, 1, -100]
    missing = datasets.Dataset.from_dict(
        {"words": [["w5"]], "ner_tags": [[-1]]}, features=datasets.Features({"words": words, "ner_tags": kind})
    )
    with pytest.raises(DataError, match="Row 1 has the tag -1, which is not BIO"):
        task.encode(missing, pieces())


def test_the_tags_of_rows_are_both_of_every_type() -> None:
    rows = rows_of([["w5", "w6"], ["w7"]], [["B-creative-work", "O"], ["I-LOC"]])
    assert TaggingTask.infer(rows).names == ("O", "B-LOC", "I-LOC", "B-creative-work", "I-creative-work")
    with pytest.raises(DataError, match="Every tag is O"):
        TaggingTask.infer(rows_of([["w5"]], [["O"]]))


def byte_level() -> Any:
    """A tokenizer that knows words after a space by tokens of their own, as ModernBERT's."""
    names = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "a", "b", "Ġ", "Ġa", "Ġb"]
    kind = models.BPE(
        vocab={name: i for i, name in enumerate(names)}, merges=[("Ġ", "a"), ("Ġ", "b")], unk_token="[UNK]"
    )
    backend = Tokenizer(kind)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def test_bytes_of_words_are_read_as_in_a_text(tmp_path: Path) -> None:
    words, rows = byte_level(), rows_of([["a", "b"]])
    read_words_apart(words)
    words.save_pretrained(tmp_path)
    for one in (words, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        found = TASK.encode(rows, one, require_tags=False)
        assert one.convert_ids_to_tokens(found.rows["input_ids"][0]) == ["Ġa", "Ġb"] and found.firsts == [[0, 1]]
    glued = TASK.encode(rows, byte_level(), require_tags=False)
    assert words.convert_ids_to_tokens(glued.rows["input_ids"][0]) == ["a", "b"]
    before = pieces().backend_tokenizer.to_str()
    read_words_apart(pieces())
    assert pieces().backend_tokenizer.to_str() == before


# --- entities --------------------------------------------------------------------------------------------------------


def conll(tags: list[str]) -> set[tuple[str, int, int]]:
    """Entities as the evaluation of CoNLL 2000 finds them (conlleval's rules on where chunks begin and end)."""
    found, begun = set(), None
    for i, tag in enumerate([*tags, "O"]):
        before = "O" if i == 0 else tags[i - 1]
        new = tag != "O" and (tag[0] == "B" or before == "O" or before[2:] != tag[2:])
        if begun is not None and (tag == "O" or new):
            found.add((tags[begun][2:], begun, i))
            begun = None
        if new:
            begun = i
    return found


@given(st.lists(st.sampled_from(NAMES), max_size=12))
def test_entities_are_those_of_conll_before_and_after_repair(tags: list[str]) -> None:
    assert set(entities(tags)) == conll(tags) == set(entities(repaired(tags)))
    for before, tag in zip(["O", *repaired(tags)], repaired(tags), strict=False):
        assert tag[0] != "I" or before in ("B" + tag[1:], tag)


def scored(true: list[list[str]], said: list[list[str]], names: tuple[str, ...]) -> tuple[EncodedTags, np.ndarray]:
    encoded = TaggingTask(names).encode(rows_of([["w5"] * len(row) for row in true], true), pieces())
    return encoded, logits_of(encoded, said)


def test_the_published_example_of_seqeval() -> None:
    """github.com/chakki-works/seqeval, README: F1 0.50; PER 1, 1, 1 of 1 and MISC 0, 0, 0 of 1."""
    true = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    said = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    encoded, logits = scored(true, said, ("O", "B-MISC", "I-MISC", "B-PER", "I-PER"))
    assert encoded.metrics(logits) == {"f1": 0.5, "precision": 0.5, "recall": 0.5}
    assert encoded.report(logits) == {
        "MISC": {"f1": 0.0, "precision": 0.0, "recall": 0.0, "support": 1.0},
        "PER": {"f1": 1.0, "precision": 1.0, "recall": 1.0, "support": 1.0},
    }


TAGGED = st.lists(
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), min_size=1, max_size=8), min_size=1, max_size=4
)


@hypothesis.settings(max_examples=25)
@given(TAGGED)
def test_scores_are_counts_of_entities(pairs: list[list[tuple[str, str]]]) -> None:
    true, said = ([[pair[side] for pair in row] for row in pairs] for side in (0, 1))
    encoded, logits = scored(true, said, NAMES)
    wanted = {(i, *one) for i, row in enumerate(true) for one in conll(row)}
    given_ = {(i, *one) for i, row in enumerate(said) for one in conll(row)}

    def figures(wanted: set[Any], given_: set[Any]) -> dict[str, float]:
        right = len(wanted & given_)
        return {
            "f1": 2 * right / (len(wanted) + len(given_)) if wanted or given_ else 0.0,
            "precision": right / len(given_) if given_ else 0.0,
            "recall": right / len(wanted) if wanted else 0.0,
        }

    assert encoded.metrics(logits) == pytest.approx(figures(wanted, given_))
    report = encoded.report(logits)
    assert set(report) == {kind for _, kind, *_ in wanted | given_}
    for kind, values in report.items():
        own, theirs = ({one for one in found if one[1] == kind} for found in (wanted, given_))
        assert values == pytest.approx(figures(own, theirs) | {"support": len(own)})


def test_an_entity_that_was_cut_off_is_missed() -> None:
    rows = rows_of([["w5", "w6", "w7", "w8"]], [["B-PER", "O", "B-LOC", "I-LOC"]])
    whole, cut = (TASK.encode(rows, pieces(), limit) for limit in (6, 5))
    said = [["B-PER", "O", "B-LOC", "I-LOC"]]
    assert whole.metrics(logits_of(whole, said))["f1"] == 1.0
    assert cut.metrics(logits_of(cut, said)) == {"f1": 0.5, "precision": 0.5, "recall": 0.5}
    assert cut.agreement(logits_of(cut, said), logits_of(cut, [["B-PER", "B-PER", "B-LOC", "O"]])) == 0.75


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ({"tokens": [["w5"], ["w6"]], "tags": [["O"], ["PER"]]}, "Row 2 has the tag 'PER', which is not BIO"),
        ({"tokens": [["w5"]], "tags": [["S-PER"]]}, "Row 1 has the tag 'S-PER', which is not BIO"),
        ({"tokens": [["w5"]], "tags": [["B-"]]}, "Row 1 has the tag 'B-', which is not BIO"),
        ({"tokens": [["w5"]], "tags": [[""]]}, "Row 1 has the tag '', which is not BIO"),
        ({"tokens": [["w5"]], "tags": [[None]]}, "Row 1 has the tag None, which is not BIO"),
        ({"tokens": [["w5"]], "tags": [[1]]}, "Row 1 has the tag 1, which is not BIO"),
        ({"tokens": [["w5"]], "tags": [["B-PRE"]]}, "Row 1 has the tag 'B-PRE', which the task does not know; did you"),
        ({"tokens": [["w5"], ["w6", "w7"]], "tags": [["O"], ["O"]]}, "Row 2 has 1 tags for 2 tokens"),
        ({"tokens": [["w5"], None], "tags": [["O"], ["O"]]}, "Row 2 holds None as its tokens"),
        ({"tokens": ["w5 w6"], "tags": [["O"]]}, "Row 1 holds 'w5 w6' as its tokens, where a list"),
        ({"tokens": [["w5"]], "tags": ["O"]}, "Row 1 holds 'O' as its tags, where a list"),
        ({"tokens": [["w5"], ["w6"]], "tags": [["O"], None]}, "Row 2 holds None as its tags"),
        ({"tokens": [["w5", None]], "tags": [["O", "O"]]}, "Row 1 holds a null among its tokens"),
        ({"tokens": [[7]], "tags": [["O"]]}, "Row 1 holds a number among its tokens"),
        ({"tokens": [["w5"]]}, "no column known to be the tags"),
        ({"text": ["w5"], "tags": [["O"]]}, "no column known to be the words"),
        ({"tokens": [], "tags": []}, "no rows"),
    ],
)
def test_bad_rows_are_named(rows: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        TASK.encode(datasets.Dataset.from_dict(rows), pieces())


def test_bad_tasks_and_tokenizers() -> None:
    for names in (("O", "PER"), ("O", 7), ("B-PER", "I-PER"), ("O",), ("O", "B-PER", "B-PER"), ()):
        with pytest.raises(OptionError):
            TaggingTask(names)
    rows = rows_of([["w5"]], [["O"]])
    with pytest.raises(OptionError, match="no room for text beside 2"):
        TASK.encode(rows, pieces(), 2)

    class Slow:
        is_fast = False

    with pytest.raises(OptionError, match="fast tokenizer"):
        TASK.encode(rows, Slow())  # type: ignore[arg-type]


# --- with models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", sorted(METHODS, key=lambda c: c.method), ids=lambda c: c.method)
def test_a_dropped_word_is_tagged_by_the_state_it_left_with(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = thresher.attach(make("bert", "token"), settings(config))
    left: dict[int, torch.Tensor] = {}
    restore = PackedTokens.restore

    def watched(self: PackedTokens, *args: Any) -> torch.Tensor:
        for states, flat in self.departed:
            left.update(zip(flat.tolist(), states, strict=True))
        return restore(self, *args)

    monkeypatch.setattr(PackedTokens, "restore", watched)
    inputs = batch("bert", (16, 11))
    with torch.no_grad(), tracing(record=True) as traces:
        logits = model(**inputs).logits
    gone = (traces[-1].dropped_at().flatten() > 0).nonzero().flatten().tolist()
    assert set(gone) == set(left) != set()
    with torch.no_grad():
        for flat, state in left.items():
            torch.testing.assert_close(logits.flatten(0, 1)[flat], model.classifier(state))


def test_predictions_do_not_depend_on_the_batch() -> None:
    model = thresher.attach(make("bert", "token"), thresher.AttentionMass(strength=1.0))
    task = TaggingTask(("O", "B-PER", "I-PER"))
    draw = random.Random(0)
    words = [[f"w{draw.randrange(5, 64)}" for _ in range(draw.randint(1, 30))] for _ in range(12)]
    encoded = task.encode(rows_of(words), tokenizer(), require_tags=False)
    one, many = (run(model, encoded.rows, batch_size=size) for size in (1, 12))
    assert one.speedup > 1.0
    assert encoded.predicted(one.predictions) == encoded.predicted(many.predictions)
    assert encoded.agreement(one.predictions, many.predictions) == 1.0
    assert encoded.predicted(run_packed(model, encoded.rows).predictions) != encoded.predicted(one.predictions)


def test_predictions_that_are_too_narrow_or_no_numbers_are_refused() -> None:
    encoded, said = scored([["B-a", "O"]], [["B-a", "O"]], ("O", "B-a", "I-a"))
    with pytest.raises(DataError, match="end before token 2, which begins a word"):
        encoded.metrics(said[:, :2])
    with pytest.raises(DataError, match="are no numbers"):
        encoded.metrics(np.full_like(said, np.nan))
