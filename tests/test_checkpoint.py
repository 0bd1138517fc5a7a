"""What was saved comes back; what was damaged says so in one sentence and changes nothing."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import thresher
from helpers import FAMILIES, HEADS, batch, make, outputs_of, settings, tokenizer, worst
from thresher import checkpoint
from thresher.errors import CheckpointError, OptionError, ThresherError
from thresher.methods import CONFIGS
from thresher.model import attachment_of, is_attached, policy_of

TEXTS = [
    "A thresher separates the grain from the chaff, and it did so long before engines drove it.",
    "Rain fell.",
    "The committee met on Tuesday to discuss the budget, the bridge and the bakery.",
    "How do I reset my password?",
]


def teach(model: Any) -> None:
    """Make every learned number of the policy differ from where it starts."""
    with torch.no_grad():
        for parameter in policy_of(model).parameters():
            parameter.mul_(0.7).add_(0.003)


def one_sentence(error: pytest.ExceptionInfo[ThresherError]) -> str:
    text = str(error.value)
    assert "\n" not in text, text
    assert text.endswith((".", "?")), text
    return text


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = thresher.attach(make("bert"), settings(CONFIGS["ltp"]))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(saved: Path, **changes: Any) -> None:
    file = saved / checkpoint.SETTINGS
    values = json.loads(file.read_text())
    values.update(changes)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("method", sorted(CONFIGS))
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_round_trip_of_every_method(family: str, method: str, tmp_path: Path) -> None:
    inputs = batch(family)
    config = settings(CONFIGS[method], strength=0.9, protect_ids=(3,))
    model = thresher.attach(make(family), config)
    teach(model)
    said = outputs_of(model, inputs)
    attachment_of(model).notes["task"] = {"name": "x", "numbers": [1, 2.5]}
    thresher.save(model, tmp_path / "model")
    back = thresher.load(tmp_path / "model")
    assert type(back) is type(model)
    assert not back.training
    assert policy_of(back).config == config
    assert type(policy_of(back)) is type(policy_of(model))
    assert worst(said, outputs_of(back, inputs)) == 0.0
    learned, again = policy_of(model).state_dict(), policy_of(back).state_dict()
    assert set(learned) == set(again)
    for name, value in learned.items():
        assert torch.equal(value, again[name])
    assert attachment_of(back).notes == {"task": {"name": "x", "numbers": [1, 2.5]}}
    assert {k: v.dtype for k, v in back.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}


@pytest.mark.parametrize(("family", "head"), [(f, h) for f in FAMILIES for h in HEADS])
def test_every_family_and_head_loads_with_thresher_and_without(family: str, head: str, tmp_path: Path) -> None:
    inputs = batch(family)
    model = make(family, head)
    stock = outputs_of(model, inputs)
    thresher.attach(model, "attention-mass")
    said = outputs_of(model, inputs)
    model.save_pretrained(str(tmp_path))
    assert worst(said, outputs_of(thresher.load(tmp_path), inputs)) == 0.0
    plain = type(model).from_pretrained(tmp_path).eval()
    assert not is_attached(plain)
    assert worst(stock, outputs_of(plain, inputs)) == 0.0
    assert "thresher" not in (tmp_path / "config.json").read_text()


def test_auto_classes_load_the_directory(saved: Path) -> None:
    inputs = batch("bert")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(saved).eval()
    assert worst(outputs_of(make("bert"), inputs), outputs_of(plain, inputs)) == 0.0


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("[]", "config.json is no JSON object"),
        ("null", "config.json is no JSON object"),
        ("{", "config.json is no JSON object"),
        ('{"model_type": "bert"}', "config.json names other sizes than the weights have"),
    ],
)
def test_a_config_that_makes_no_sense_says_so(saved: Path, config: str, says: str) -> None:
    (saved / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=says) as error:
        thresher.load(saved)
    one_sentence(error)


def test_a_packed_model_without_a_policy_comes_back(tmp_path: Path) -> None:
    inputs = batch("bert")
    model = thresher.attach(make("bert"))
    model.save_pretrained(tmp_path)
    back = thresher.load(tmp_path, device="cpu")
    assert is_attached(back)
    assert attachment_of(back).policy is None
    assert worst(outputs_of(model, inputs), outputs_of(back, inputs)) == 0.0


def test_saving_over_an_older_one_replaces_it(saved: Path) -> None:
    inputs = batch("bert")
    model = thresher.load(saved)
    thresher.attach(model, "last")
    (saved / "notes.txt").write_text("mine")
    model.save_pretrained(saved)
    back = thresher.load(saved)
    assert policy_of(back).config.method == "last"
    assert worst(outputs_of(model, inputs), outputs_of(back, inputs)) == 0.0
    assert (saved / "notes.txt").read_text() == "mine"
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_after_detaching_a_model_saves_as_it_always_did(saved: Path, tmp_path: Path) -> None:
    model = thresher.detach(thresher.load(saved))
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / checkpoint.SETTINGS).exists()
    with pytest.raises(OptionError, match="attach"):
        thresher.save(model, tmp_path / "other")


@pytest.mark.parametrize("method", ["attention-mass", "ltp"])
def test_copies_are_attached_and_independent(method: str) -> None:
    inputs = batch("bert")
    model = thresher.attach(make("bert"), settings(CONFIGS[method]))
    said = outputs_of(model, inputs)
    copied = copy.deepcopy(model)
    assert is_attached(copied)
    assert policy_of(copied) is not policy_of(model)
    assert worst(said, outputs_of(copied, inputs)) == 0.0
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    assert worst(said, outputs_of(copied, inputs)) > 1e-3
    assert worst(said, outputs_of(model, inputs)) == 0.0
    thresher.detach(copied)
    assert is_attached(model)
    assert not is_attached(copied)
    assert worst(said, outputs_of(model, inputs)) == 0.0
    assert worst(said, outputs_of(copied, inputs)) > 1e-3


def test_a_copy_saves_itself_not_its_original(tmp_path: Path) -> None:
    inputs = batch("bert")
    copied = copy.deepcopy(thresher.attach(make("bert"), "attention-mass"))
    with torch.no_grad():
        copied.classifier.bias.add_(5.0)
    copied.save_pretrained(tmp_path)
    assert worst(outputs_of(copied, inputs), outputs_of(thresher.load(tmp_path), inputs)) == 0.0


@pytest.mark.parametrize("method", ["attention-mass", "ltp"])
def test_an_attached_model_pickles(method: str) -> None:
    inputs = batch("bert")
    model = thresher.attach(make("bert"), settings(CONFIGS[method]))
    teach(model)
    back = pickle.loads(pickle.dumps(model))
    assert is_attached(back)
    assert worst(outputs_of(model, inputs), outputs_of(back, inputs)) == 0.0
    thresher.detach(back)
    with thresher.stock():
        assert worst(outputs_of(model, inputs), outputs_of(back, inputs)) == 0.0


def test_a_text_classification_pipeline() -> None:
    names = tokenizer()
    model = make("bert")
    text = " ".join(f"w{5 + (7 * i) % 50}" for i in range(20))
    plain = transformers.pipeline("text-classification", model=model, tokenizer=names, top_k=None, device="cpu")
    scores = lambda said: {x["label"]: x["score"] for x in (said[0] if isinstance(said[0], list) else said)}  # noqa: E731
    stock = scores(plain(text))
    thresher.attach(model, "attention-mass")
    run = transformers.pipeline("text-classification", model=model, tokenizer=names, top_k=None, device="cpu")
    with thresher.tracing() as traces:
        fast = scores(run(text))
    assert traces
    assert sum(traces[0].reads[-1][1]) < 22
    assert set(fast) == set(stock)
    assert fast != stock
    with thresher.keep_everything():
        again = scores(run([text, "w9"], batch_size=2)[0])
    assert again == pytest.approx(stock, abs=1e-5)


def test_a_sentence_transformer_round_trip(minilm: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(minilm, device="cpu")
    stock = model.encode(TEXTS)
    assert thresher.attach(model, "attention-mass") is model
    assert thresher.validate(model, TEXTS).worst <= 1e-4
    said = model.encode(TEXTS)
    assert np.abs(said - stock).max() > 0.02
    assert np.allclose(np.linalg.norm(said, axis=1), 1, atol=1e-4)
    alone = np.concatenate([model.encode([text]) for text in TEXTS])
    assert np.abs(said - alone).max() <= 1e-4
    for _ in range(2):  # the second time over the first
        model.save_pretrained(str(tmp_path / "model"))
    back = thresher.load(tmp_path / "model", device="cpu")
    assert isinstance(back, SentenceTransformer)
    assert policy_of(back).config == policy_of(model).config
    assert np.abs(back.encode(TEXTS) - said).max() <= 1e-6
    plain = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert np.abs(plain.encode(TEXTS) - stock).max() <= 1e-6
    thresher.detach(model)
    assert np.array_equal(model.encode(TEXTS), stock)


def test_a_cross_encoder_round_trip(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers import CrossEncoder

    plain = make("bert")
    thresher_free = tmp_path / "plain"
    plain.config.num_labels = 1
    plain = type(plain)(plain.config)
    plain.save_pretrained(thresher_free)
    tokenizer().save_pretrained(thresher_free)
    pairs = [("w5 w6 w7 w8", " ".join(f"w{i}" for i in range(10, 30))), ("w9", "w11 w12")]
    model = CrossEncoder(str(thresher_free), device="cpu")
    stock = model.predict(pairs)
    thresher.attach(model, thresher.AttentionMass(protect_segments=(0,)))
    assert thresher.validate(model, pairs).worst <= 1e-4
    said = model.predict(pairs)
    assert not np.array_equal(said, stock)
    model.save_pretrained(str(tmp_path / "model"))
    back = thresher.load(tmp_path / "model", device="cpu")
    assert isinstance(back, CrossEncoder)
    assert np.abs(back.predict(pairs) - said).max() <= 1e-6
    assert np.abs(CrossEncoder(str(tmp_path / "model"), device="cpu").predict(pairs) - stock).max() <= 1e-6


# Damage.


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", '{"format": 1}', "\x00"])
def test_settings_that_are_no_settings(saved: Path, text: str) -> None:
    (saved / checkpoint.SETTINGS).write_text(text)
    with pytest.raises(CheckpointError, match="corrupted") as error:
        thresher.load(saved)
    assert checkpoint.SETTINGS in one_sentence(error)


def test_settings_that_are_no_text(saved: Path) -> None:
    (saved / checkpoint.SETTINGS).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="corrupted"):
        thresher.load(saved)


@pytest.mark.parametrize("value", [None, 5, [], {}, "x", [1], {"strength": "high"}, {"temperature": None}], ids=str)
@pytest.mark.parametrize("key", ["format", "method", "config", "model_class", "outer", "weights_sha256", "notes"])
def test_any_setting_mangled_is_named_or_harmless(saved: Path, key: str, value: Any) -> None:
    edit(saved, **{key: value})
    try:
        model = thresher.load(saved)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert is_attached(model)


@pytest.mark.parametrize("missing", ["format", "method", "config", "model_class", "outer", "weights_sha256"])
def test_a_setting_missing(saved: Path, missing: str) -> None:
    values = json.loads((saved / checkpoint.SETTINGS).read_text())
    del values[missing]
    (saved / checkpoint.SETTINGS).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=missing) as error:
        thresher.load(saved)
    one_sentence(error)


def test_no_directory_no_settings(saved: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", saved / "config.json"):
        with pytest.raises(CheckpointError, match="not a directory") as error:
            thresher.load(path)
        one_sentence(error)
    make("bert").save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="not saved by Thresher") as error:
        thresher.load(tmp_path / "plain")
    one_sentence(error)


def test_missing_weights_of_the_policy(saved: Path) -> None:
    (saved / checkpoint.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=checkpoint.WEIGHTS) as error:
        thresher.load(saved)
    one_sentence(error)


def test_changed_weights_of_the_policy(saved: Path) -> None:
    safetensors.torch.save_file({"theta": torch.zeros(3)}, saved / checkpoint.WEIGHTS)
    with pytest.raises(CheckpointError, match="checksum") as error:
        thresher.load(saved)
    one_sentence(error)


@pytest.mark.parametrize(
    "state", [{}, {"theta": torch.zeros(5)}, {"other": torch.zeros(3)}], ids=["none", "size", "name"]
)
def test_weights_of_another_policy(saved: Path, state: dict[str, torch.Tensor]) -> None:
    import hashlib

    safetensors.torch.save_file(state, saved / checkpoint.WEIGHTS)
    edit(saved, weights_sha256=hashlib.sha256((saved / checkpoint.WEIGHTS).read_bytes()).hexdigest())
    with pytest.raises(CheckpointError, match="does not fit") as error:
        thresher.load(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "noise"])
def test_a_damaged_plain_checkpoint(saved: Path, name: str, damage: str) -> None:
    file = saved / name
    content = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(
        content[: len(content) // 2] if damage == "cut" else b"x" * 64
    )
    with pytest.raises(CheckpointError) as error:
        thresher.load(saved)
    assert "\n" not in str(error.value)
    assert str(saved) in str(error.value)


def test_an_unknown_method(saved: Path) -> None:
    edit(saved, method="lpt")
    with pytest.raises(CheckpointError, match=r"'lpt'.*did you mean 'ltp'") as error:
        thresher.load(saved)
    one_sentence(error)


def test_an_unknown_setting(saved: Path) -> None:
    edit(saved, config={"temperatur": 1.0})
    with pytest.raises(CheckpointError, match="temperatur") as error:
        thresher.load(saved)
    one_sentence(error)


def test_a_setting_out_of_range(saved: Path) -> None:
    edit(saved, config={"temperature": -1.0})
    with pytest.raises(CheckpointError, match="temperature") as error:
        thresher.load(saved)
    one_sentence(error)


def test_retention_for_another_depth(tmp_path: Path) -> None:
    thresher.attach(make("bert"), thresher.AttentionMass(retention=(0.9, 0.5, 0.2))).save_pretrained(tmp_path)
    edit(tmp_path, config={"retention": [0.9, 0.5]})
    with pytest.raises(CheckpointError, match="2 fractions") as error:
        thresher.load(tmp_path)
    one_sentence(error)


def test_a_format_from_the_future(saved: Path) -> None:
    edit(saved, format=checkpoint.FORMAT + 1)
    with pytest.raises(CheckpointError, match="matching version") as error:
        thresher.load(saved)
    one_sentence(error)


def test_a_class_transformers_does_not_have(saved: Path) -> None:
    edit(saved, model_class="BertForFortuneTelling")
    with pytest.raises(CheckpointError, match="BertForFortuneTelling"):
        thresher.load(saved)


# Failing to write.


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("where", ["plain", "policy", "settings", "staging"])
def test_a_full_disk_leaves_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    before = contents(saved)
    model = thresher.attach(make("bert", seed=5), "ltp")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    if where == "plain":
        monkeypatch.setattr(type(model), "save_pretrained", full)
    elif where == "policy":
        monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full)
    elif where == "settings":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(checkpoint.tempfile, "mkdtemp", full)
    with pytest.raises(CheckpointError, match="No space left") as error:
        model.save_pretrained(saved)
    monkeypatch.undo()
    one_sentence(error)
    assert contents(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]
    thresher.load(saved)


def test_an_interrupt_while_writing_leaves_no_folder_behind(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = thresher.attach(make("bert", seed=5), "ltp")
    before = contents(saved)

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(saved)
    assert contents(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    model = thresher.attach(make("bert"), "ltp")
    with pytest.raises(CheckpointError) as error:
        model.save_pretrained(tmp_path / "model")
    one_sentence(error)
    assert (tmp_path / "model").read_text() == "mine"
    with pytest.raises(CheckpointError):
        model.save_pretrained(tmp_path / "model" / "below")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_validate_does_not_pass_on_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    model = thresher.attach(make("bert", "question-answering"))
    with torch.no_grad():
        model.qa_outputs.bias.fill_(float("nan"))
    with pytest.raises(ThresherError, match="differ"):
        thresher.validate(model, batch("bert"))


def test_a_sentence_transformer_is_saved_whole_or_not_at_all(
    minilm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    model = thresher.attach(SentenceTransformer(minilm, device="cpu"), thresher.AttentionMass())

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", full)
    with pytest.raises(CheckpointError, match="No space left"):
        thresher.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
