"""thresher explain: what was dropped, what matters, where a text left, and one sentence for whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import thresher
from commands import call, fails, ok, synthetic, write_rows
from helpers import make, tokenizer
from thresher.exits import PABEE, Confidence, TokEE
from thresher.model import exit_of

TEXT = "w5 w6 w7 w8"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose texts all leave after layer 1, or once two layers have agreed with the one before; whose tokens all freeze
    after layer 1; and one without an exit."""
    root = tmp_path_factory.mktemp("explaining")
    exits = {
        "certain": ("sequence", Confidence(threshold=0.0)),
        "patient": ("sequence", PABEE(patience=2)),
        "tagger": ("token", TokEE(threshold=1.0)),
        "plain": ("sequence", None),
    }
    for name, (head, exit) in exits.items():
        model = thresher.attach(make("bert", head, 4 if name == "patient" else 3), exit=exit)
        if name == "patient":  # all of its branches say the same
            with torch.no_grad():
                for parameter in exit_of(model).parameters():
                    parameter.zero_()
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    return root


def test_the_layer_after_which_a_text_left_is_said_everywhere(place: Path, tmp_path: Path) -> None:
    done = call("explain", place / "certain", "--text", TEXT, "--html", tmp_path / "m.html")
    assert "6 of 6 tokens read until the row left after layer 1 of 3" in done.stdout
    page = (tmp_path / "m.html").read_text()
    assert "until the row left after layer 1 of 3" in page and 'data-left="1"' in page
    (found,) = ok("explain", place / "certain", "--text", TEXT)["maps"]
    assert (found["exited_at"], found["frozen_at"]) == (1, None)


def test_the_exit_is_set_for_the_one_look(place: Path) -> None:
    words = ("explain", place / "certain", "--text", TEXT)
    assert ok(*words, "--tau", 1)["maps"][0]["exited_at"] == 3
    assert ok(*words, "--set-exit", "threshold=1")["maps"][0]["exited_at"] == 3
    assert "all 3 layers; no early exit" in call(*words, "--tau", 1).stdout
    assert ok(*words)["maps"][0]["exited_at"] == 1  # as saved
    patient = ("explain", place / "patient", "--text", TEXT)
    assert ok(*patient)["maps"][0]["exited_at"] == 3
    assert ok(*patient, "--set-exit", "patience=1")["maps"][0]["exited_at"] == 2


def test_other_commands_take_the_settings_of_the_exit_too(place: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", synthetic(8))
    for words in (("evaluate",), ("predict",)):
        as_saved, stayed = (
            ok(*words, place / "certain", data, *more)["speedup"] for more in ((), ("--set-exit", "strength=0"))
        )
        assert as_saved > 1.5 > stayed


def test_the_layer_after_which_each_token_froze(place: Path, tmp_path: Path) -> None:
    words = ("explain", place / "tagger", "--text", TEXT)
    (found,) = ok(*words)["maps"]
    assert (found["frozen_at"], found["exited_at"]) == ([1] * 6, 1)
    done = call(*words, "--html", tmp_path / "m.html", "--saliency", "attention")
    assert "{1:[CLS] w5 w6 w7 w8 [SEP]}" in done.stdout
    assert "frozen: 6 after layer 1" in done.stdout
    assert "frozen after layer" in done.stdout[done.stdout.index("What matters most") :]
    assert 'data-frozen="1"' in (tmp_path / "m.html").read_text()
    (none,) = ok(*words, "--tau", 0)["maps"]
    assert (none["frozen_at"], none["exited_at"]) == ([None] * 6, 3)


def test_the_page_shows_what_matters(place: Path, tmp_path: Path) -> None:
    words = ("explain", place / "plain", "--text", TEXT, "--html", tmp_path / "m.html", "--saliency")
    shown = call(*words, "gradient-x-input").stdout
    assert "What matters most, by" in shown and "gradient-x-input" in shown
    page = (tmp_path / "m.html").read_text()
    assert page.count('class="token"') == 6
    assert "The bar below a word is what it matters, by gradient-x-input:" in page
    assert "--s:1.00" in page


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("plain", "--tau", 0.5), "plain has no exit that --tau or --set-exit could set; leave them out"),
        (("plain", "--set-exit", "threshold=1"), "has no exit"),
        (
            ("patient", "--tau", 2),
            r"--tau is a threshold.*'pabee' has none \(it has patience\); set that with --set-exit",
        ),
        (("patient", "--set-exit", "patience=few"), "patience takes a whole number"),
        (("certain", "--set-exit", "treshold=1"), "cannot be set to another 'treshold'; did you mean 'threshold'"),
        (("certain", "--set-exit", "threshold"), "--set-exit takes NAME=VALUE"),
        (("certain", "--set-exit", "threshold=1", "--tau", 1), "Give the threshold once"),
        (("certain", "--tau", -1), r"threshold \(tau\) must lie between 0 and"),
        (("certain", "--saliency", "gradient"), "There is no saliency 'gradient'"),
        (("certain", "--max-length", 0), "leaves no room for text"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    place: Path, tmp_path: Path, words: tuple[object, ...], match: str
) -> None:
    name, *rest = words
    fails("explain", place / str(name), "--text", TEXT, "--html", tmp_path / "m.html", *rest, match=match)
    assert not list(tmp_path.iterdir())


def test_bad_texts_and_places(place: Path, tmp_path: Path) -> None:
    fails("explain", place / "plain", match="Give a text to explain")
    fails(
        "explain", place / "plain", "--text", "a", "--pair", "b", "--pair", "c", match="Give one --pair for each --text"
    )
    fails("explain", tmp_path / "nowhere", "--text", "a", match="There is no directory")
    fails("explain", place, "--text", "a", match="no config.json")
    fails("explain", place / "plain", "--text", "a", "--html", tmp_path, match="is a directory; give a file")
    (tmp_path / "file").write_text("x")
    fails("explain", place / "plain", "--text", "a", "--html", tmp_path / "file" / "m.html", match="is a file")
