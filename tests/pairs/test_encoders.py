"""What a new scorer begins with: limits that its encoder can read, and a policy that knows something."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import thresher
from helpers import build, config_of, make, tokenizer
from pairs.scoring import KINDS, QUERY, TEXTS
from thresher.errors import CheckpointError, OptionError
from thresher.methods import CONFIGS
from thresher.pairs import SCORERS, load
from thresher.policy import Policy

POSITIONS = 48
TRAINED = {"adapler", "block-skim", "ltp", "power-bert", "tr-bert", "transkimmer"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    make("bert", "base").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_limits_that_are_not_given_are_what_the_encoder_reads(encoder: Path, kind: str) -> None:
    made = SCORERS[kind].from_encoder(encoder)
    limits = (made.config.max_query, made.config.max_candidate)
    assert limits == ((32, 16) if kind == "cross" else (POSITIONS, POSITIONS))
    assert SCORERS[kind].from_encoder(encoder, max_query=20).config.max_query == 20
    long = " ".join(["w9"] * 99)
    with pytest.warns(UserWarning, match="cut"):
        assert made.score(long, made.encode_candidates([long])).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_limits_that_are_given_are_refused_where_they_are_too_long(encoder: Path, kind: str) -> None:
    for name in ("max_query", "max_candidate"):
        with pytest.raises(
            OptionError, match=rf"{name}={POSITIONS + 1} .*48 tokens that the encoder has positions for"
        ):
            SCORERS[kind].from_encoder(encoder, **{name: POSITIONS + 1})
    with pytest.raises(OptionError, match="positions for"):
        SCORERS[kind].from_encoder(encoder, SCORERS[kind].config_class())


def test_the_sides_of_a_cross_encoder_share_its_positions() -> None:
    limits = SCORERS["cross"].limits
    assert limits(512, {}) == {"max_query": 256, "max_candidate": 128}
    assert limits(384, {}) == {"max_query": 256, "max_candidate": 128}
    for most in range(8, 384):
        found = limits(most, {})
        assert sum(found.values()) == most and found["max_query"] >= found["max_candidate"]
    assert limits(48, {"max_query": 40}) == {"max_candidate": 8}
    assert limits(512, {"max_candidate": 400}) == {"max_query": 112}
    assert limits(512, {"max_candidate": 4, "max_query": 5}) == {}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_method_acts_untrained_or_is_refused(encoder: Path, method: str) -> None:
    """What is refused is what has weights to learn; the error names what is not."""
    for kind in ("dual", "cross"):
        limits: dict[str, Any] = {"max_query": 20, "max_candidate": 18}
        if method in TRAINED:
            with pytest.raises(OptionError, match="knows nothing before it is trained") as error:
                SCORERS[kind].from_encoder(encoder, policy=method, **limits)
            named = str(error.value).partition("(")[2].partition(")")[0].split(", ")
            assert set(named) == set(CONFIGS) - TRAINED
        else:
            made = SCORERS[kind].from_encoder(encoder, policy=method, **limits)
            assert thresher.policy_of(made.encoder).config.method == method
            assert made.score(QUERY, made.encode_candidates(TEXTS)).isfinite().all()


def fitted(path: Path) -> Policy[Any]:
    """A saved classifier with thresholds that it could only have learned."""
    model = thresher.attach(make("bert", "sequence"), thresher.LTP())
    policy = thresher.policy_of(model)
    with torch.no_grad():
        policy.theta.copy_(torch.tensor([0.05, 0.1, 0.2]))
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return policy


def test_the_policy_of_a_fitted_model_is_kept(tmp_path: Path) -> None:
    learned = fitted(tmp_path)
    made = SCORERS["dual"].from_encoder(tmp_path, max_query=20)
    policy = thresher.policy_of(made.encoder)
    assert policy.config == thresher.LTP() and torch.equal(policy.theta, learned.theta)
    made.save(tmp_path / "scorer")
    again = thresher.policy_of(thresher.pairs.load(tmp_path / "scorer").encoder)
    assert torch.equal(again.theta, learned.theta)
    other = SCORERS["dual"].from_encoder(tmp_path, policy=thresher.AttentionMass())
    assert thresher.policy_of(other.encoder).config == thresher.AttentionMass()


@pytest.mark.parametrize("policy", [None, thresher.AttentionMass(retention=(0.8, 0.7, 0.6))])
def test_a_cross_encoder_keeps_the_exit_of_a_fitted_model(tmp_path: Path, policy: Any) -> None:
    model = thresher.attach(
        build(config_of("bert", 3, num_labels=2), "sequence"), policy, exit=thresher.FastBERT()
    ).eval()
    with torch.no_grad():
        for parameter in thresher.exit_of(model).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    thresher.set_exit(model, threshold=0.9)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    made = SCORERS["cross"].from_encoder(tmp_path, classes=2)
    pairs = [("w20 w21", "w30"), ("w9", "w10 w11 w12"), ("w9", "w40")]
    asked = tokenizer()([a for a, _ in pairs], [b for _, b in pairs], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**asked).logits
    torch.testing.assert_close(torch.from_numpy(made.predict(pairs)), logits, rtol=1e-4, atol=1e-5)
    thresher.set_exit(model, strength=0.0)
    with torch.no_grad():
        assert (model(**asked).logits - logits).abs().max() > 1e-3
    made.save(tmp_path / "saved")
    torch.testing.assert_close(load(tmp_path / "saved").predict(pairs), made.predict(pairs))
    other = SCORERS["cross"].from_encoder(tmp_path, classes=2, policy="random")
    assert thresher.policy_of(other.encoder).config.method == "random"
    assert thresher.exit_of(other.encoder).config == thresher.exit_of(made.encoder).config
    for kind, settings in (("dual", {}), ("cross", {"classes": 3})):
        with pytest.warns(UserWarning, match="exit .* is left out: it looks at what the model's head says"):
            SCORERS[kind].from_encoder(tmp_path, **settings)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cross"])
def test_a_model_with_a_head_is_no_encoder(kind: str) -> None:
    with pytest.raises(OptionError, match="an encoder without a head, and this is a BertForSequenceClassification"):
        SCORERS[kind](make("bert", "sequence"), tokenizer(), SCORERS[kind].config_class(max_query=20, max_candidate=20))


def test_a_setting_that_a_scorer_does_not_have_is_said(encoder: Path) -> None:
    for config in (None, SCORERS["mixencoder"].config_class(max_query=20, max_candidate=20)):
        with pytest.raises(OptionError, match="scorer 'mixencoder' has no setting 'kk'.*did you mean 'k'"):
            SCORERS["mixencoder"].from_encoder(encoder, config, kk=3)


def test_a_directory_without_config_says_so(encoder: Path, tmp_path: Path) -> None:
    place = tmp_path / "encoder"
    shutil.copytree(encoder, place)
    (place / "config.json").unlink()
    with pytest.raises(CheckpointError, match="it has no config.json; copy the whole directory"):
        SCORERS["dual"].from_encoder(place)


def test_a_damaged_policy_is_said(tmp_path: Path) -> None:
    fitted(tmp_path)
    weights = tmp_path / "thresher.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match=r"thresher\.safetensors is not the file"):
        SCORERS["dual"].from_encoder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe"])
def test_files_that_make_no_sense_are_one_sentence(encoder: Path, tmp_path: Path, name: str, content: bytes) -> None:
    place = tmp_path / "encoder"
    shutil.copytree(encoder, place)
    (place / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="does not load as an encoder") as error:
        SCORERS["dual"].from_encoder(place)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("classes", [0, 1, 3])
def test_a_cross_encoder_keeps_a_trained_head(tmp_path: Path, classes: int) -> None:
    """So that what others trained, sentence-transformers' cross-encoders for instance, scores and teaches as it is."""
    trained = build(config_of("bert", 3, num_labels=max(1, classes)), "sequence").eval()
    trained.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    made = SCORERS["cross"].from_encoder(tmp_path, classes=classes)
    pairs = [("w20 w21", "w30"), ("w9", "w10 w11 w12")]
    asked = tokenizer()([a for a, _ in pairs], [b for _, b in pairs], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = trained(**asked).logits
    expected = logits if classes > 1 else logits[:, 0]
    torch.testing.assert_close(torch.from_numpy(made.predict(pairs)), expected, rtol=1e-4, atol=1e-5)
    made.save(tmp_path / "saved")
    torch.testing.assert_close(load(tmp_path / "saved").predict(pairs), made.predict(pairs))
    new = SCORERS["cross"].from_encoder(tmp_path, classes=2)
    assert new.head is not None and new.predict(pairs).shape == (2, 2)
    assert SCORERS["dual"].from_encoder(tmp_path).encode_candidates(["w5"]).data.shape == (1, 32)
