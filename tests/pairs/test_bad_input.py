"""What a scorer is given that it cannot take, or only in part: a clear error, or what is defined for it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from helpers import make, tokenizer
from pairs.scoring import KINDS, QUERY, SETTINGS, TEXTS, scorer
from thresher.errors import DataError, OptionError
from thresher.pairs import SCORERS

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_bad_candidates_and_queries(kind: str) -> None:
    made = scorer(kind)
    for texts, ids, says in (
        ([], None, "no candidates"),
        (["w9"], [""], "empty id"),
        (["w9", "w10"], ["a", "a"], "'a' is given twice"),
        (["w9", "w10"], ["a"], "1 ids do not fit 2"),
        (["w9"], [1.5], "text or a whole number"),
        (["w9", "w10 \ud800"], None, "half a character .*, at 4"),
        (["w9", None], None, "token ids is expected, not None"),
        ([["w9", 3]], None, "is expected"),
        ("w9 w10", None, "list of texts"),
    ):
        with pytest.raises(DataError, match=says):
            made.encode_candidates(texts, ids)
    cache = made.encode_candidates(TEXTS)
    for query in (None, [], 7, [True]):
        with pytest.raises(DataError):
            made.score(query, cache)
    for wrong in (0, -3, 1.5, True, "3"):
        with pytest.raises(OptionError, match="at least 1"):
            made.rank(QUERY, cache, wrong)
        with pytest.raises(OptionError, match="at least 1"):
            made.score(QUERY, cache, chunk=wrong)
    with pytest.raises(DataError, match="no pairs"):
        made.predict([])
    for pair in (("w9",), ("w9", "w10", "w11"), "ab", {"query": "w9"}, None):
        with pytest.raises(DataError, match="Pair 2 is .* where a query and a candidate are expected"):
            made.predict([("w9", "w10"), pair])
    with pytest.raises(DataError, match="is expected, not None"):
        made.predict([("w9", None)])
    numbered = made.encode_candidates(TEXTS, np.arange(10, 10 + len(TEXTS)))
    assert numbered.ids == tuple(range(10, 10 + len(TEXTS))) and all(type(one) is int for one in numbered.ids)
    assert made.rank(QUERY, numbered, np.int64(2)) == made.rank(QUERY, numbered.select(np.array(numbered.ids)), 2)


@every_kind
def test_what_is_too_long_is_cut_counted_and_said(kind: str) -> None:
    made = scorer(kind)
    long = " ".join(f"w{5 + i % 50}" for i in range(40))
    with pytest.warns(UserWarning, match=r"2 of 3 candidates were longer than the limit and were cut\."):
        cache = made.encode_candidates([long, "w9", long])
    assert cache.cut == 2
    with pytest.warns(UserWarning, match="query is longer than 22 tokens and was cut"):
        cut = made.score(long, cache)
    room = {"mixencoder": 15, "deformer": 17, "cross": 17}.get(kind, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = made.encode_candidates([long[: len(" ".join(long.split()[:room]))]])
        torch.testing.assert_close(fits.data, cache.select([0]).data)
        torch.testing.assert_close(made.score(" ".join(long.split()[:20]), cache), cut)


@every_kind
def test_a_dialogue_keeps_its_end(kind: str) -> None:
    made = scorer(kind)
    rows, cut = made.query_rows([["w5 w6 w7 w8 w9 w10"] * 4, ["w5", "w6"]])
    assert cut == 1
    before, after = made.query_room()
    content = rows[0][len(before) : len(rows[0]) - len(after)]
    assert content == ([5, 6, 7, 8, 9, 10, 3] * 4)[-len(content) :] and len(content) >= 19
    assert rows[1] == [*made.query_room()[0], 5, 3, 6, 3, *made.query_room()[1]]
    assert made.score(["w5", "w6"], made.encode_candidates(TEXTS)).isfinite().all()


def test_a_cache_of_another_scorer_is_refused() -> None:
    cache = scorer("dual").encode_candidates(TEXTS)
    with pytest.raises(DataError, match="was made by"):
        scorer("poly").score(QUERY, cache)
    other = scorer("mixencoder", k=3)
    with pytest.raises(DataError, match="was made by"):
        other.score(QUERY, scorer("mixencoder").encode_candidates(TEXTS))
    longer = scorer("dual", max_query=30)  # the queries' limit is nothing to what was cached
    assert longer.score(QUERY, cache).shape == (len(TEXTS),)


@every_kind
def test_settings_are_checked(kind: str) -> None:
    config = SCORERS[kind].config_class
    assert config() == config()
    assert config.from_dict(config(max_query=30).to_dict()) == config(max_query=30)
    with pytest.raises(OptionError, match="no setting 'max_quer'; did you mean"):
        config.from_dict({"max_quer": 3})
    with pytest.raises(OptionError, match="classes"):
        config(classes=-1)
    with pytest.raises(OptionError, match="max_candidate"):
        config(max_candidate=1)
    with pytest.raises(OptionError, match="positions for"):
        SCORERS[kind](make("bert", "base"), tokenizer(), config(**SETTINGS.get(kind, {})))


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("mixencoder", {"k": 0}, "at least 1 vector"),
        ("mixencoder", {"layers": ()}, "at least one interaction layer"),
        ("mixencoder", {"layers": (-1, 3)}, "not different ones"),
        ("mixencoder", {"layers": (4,)}, "not different ones"),
        ("mixencoder", {"strategy": "X"}, "no strategy 'X'"),
        ("mixencoder", {"use_h": False, "use_e": False}, "dual-encoder"),
        ("mixencoder", {"k": 17}, "no room"),
        ("dual", {"pooling": "max"}, "no pooling 'max'"),
        ("dual", {"similarity": "dott"}, "did you mean 'dot'"),
        ("poly", {"m": 0}, "at least 1 code"),
        ("colbert", {"classes": 2}, "no classes"),
        ("colbert", {"augment": 99}, "augment"),
        ("deformer", {"lower": 3}, "1 to 2"),
        ("cross", {"max_query": 40, "max_candidate": 40}, "longer than the 48"),
    ],
)
def test_settings_that_do_not_fit(kind: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        scorer(kind, **settings)
