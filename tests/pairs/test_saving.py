"""A saved scorer comes back; a damaged one says so in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import thresher
from helpers import build, config_of, tokenizer
from pairs.scoring import FAMILIES, KINDS, QUERY, TEXTS, scorer
from thresher.errors import CheckpointError
from thresher.pairs import CrossConfig, CrossEncoder, load
from thresher.pairs.saving import SETTINGS, WEIGHTS


def taught(kind: str, family: str = "bert", **settings: Any) -> Any:
    """A scorer whose every weight is other than where it began."""
    made = scorer(kind, family, **settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(0.9).add_(0.003)
    return made


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    taught("mixencoder").save(tmp_path / "scorer")
    return tmp_path / "scorer"


@pytest.mark.parametrize(("kind", "family"), [(k, f) for k in KINDS for f in FAMILIES])
def test_round_trip(kind: str, family: str, tmp_path: Path) -> None:
    made = taught(kind, family)
    cache = made.encode_candidates(TEXTS)
    scores = made.score(QUERY, cache)
    made.save(tmp_path)
    back = load(tmp_path)
    assert type(back) is type(made) and back.config == made.config and not back.training
    assert torch.equal(back.score(QUERY, cache), scores)
    assert torch.equal(back.encode_candidates(TEXTS).data, cache.data)
    assert back.fingerprint() == made.fingerprint()
    plain = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(plain) is type(made.encoder)
    for name, value in made.encoder.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab() == made.tokenizer.get_vocab()


def test_without_its_tokenizer_or_with_another_encoder_it_does_not_load(saved: Path, tmp_path: Path) -> None:
    for name, says in (("tokenizer.json", "tokenizer in .* knows"), ("config.json", "no config.json")):
        place = tmp_path / name
        shutil.copytree(saved, place)
        (place / name).unlink()
        with pytest.raises(CheckpointError, match=says):
            load(place)
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[-40] ^= 1
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the file that scorer\.json was written with"):
        load(saved)


def test_what_was_saved_without_these_checks_loads(saved: Path) -> None:
    settings = json.loads((saved / SETTINGS).read_text())
    del settings["encoder_sha256"], settings["tokens"]
    (saved / SETTINGS).write_text(json.dumps(settings))
    assert load(saved).encode_candidates(TEXTS).data.isfinite().all()


def test_by_the_names_of_hugging_face(tmp_path: Path) -> None:
    made = taught("poly")
    made.save_pretrained(tmp_path)
    back = type(made).from_pretrained(tmp_path)
    assert back.fingerprint() == made.fingerprint() and type(back) is type(made)
    with pytest.raises(CheckpointError, match="holds a scorer 'poly', no DualEncoder; load it with"):
        type(scorer("dual")).from_pretrained(tmp_path)


def test_what_is_no_directory_at_all() -> None:
    with pytest.raises(CheckpointError, match="loaded from the directory that it was saved to, not from None"):
        load(None)


def test_the_policy_comes_along(tmp_path: Path) -> None:
    model = thresher.attach(build(config_of("bert"), "base"), thresher.AttentionMass(retention=(0.6, 0.5, 0.4)))
    made = type(scorer("dual"))(model, tokenizer(), scorer("dual").config).eval()
    made.save(tmp_path)
    back = load(tmp_path)
    assert thresher.policy_of(back.encoder).config == thresher.policy_of(model).config
    cache = made.encode_candidates(TEXTS)
    assert torch.equal(back.score(QUERY, cache), made.score(QUERY, cache))
    with thresher.keep_everything():
        assert not torch.equal(back.score(QUERY, cache), made.score("w9 w10 w11", cache))


def test_a_cross_encoder_with_its_own_head(tmp_path: Path) -> None:
    made = CrossEncoder(
        build(config_of("bert", num_labels=1)), tokenizer(), CrossConfig(max_query=24, max_candidate=20)
    )
    made.eval().save(tmp_path)
    cache = made.encode_candidates(TEXTS)
    torch.testing.assert_close(load(tmp_path).score(QUERY, cache), made.score(QUERY, cache))
    assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_labels == 1


def test_a_fingerprint_tells_weights_and_settings_apart() -> None:
    made = scorer("dual")
    first = made.fingerprint()
    assert scorer("dual").fingerprint() == first and len(first) == 64
    assert scorer("dual", pooling="mean").fingerprint() != first
    with torch.no_grad():
        next(made.parameters()).view(-1)[0] += 1e-3
    assert made.fingerprint() != first


def test_a_fingerprint_tells_apart_how_texts_are_read(tmp_path: Path) -> None:
    """The same weights with another tokenizer, or with other heads, make other vectors; how long a text may be does not."""
    made = scorer("dual")
    first = made.fingerprint()
    made.tokenizer("w5 w6", truncation=True, max_length=3, padding="max_length")
    assert made.fingerprint() == first
    made.save(tmp_path / "it")
    for file, before, after in (("tokenizer.json", '"w9"', '"v9"'), ("config.json", '_heads": 4', '_heads": 2')):
        other = tmp_path / file
        shutil.copytree(tmp_path / "it", other)
        text = (other / file).read_text()
        assert before in text
        (other / file).write_text(text.replace(before, after))
        assert load(other).fingerprint() != first
    assert load(tmp_path / "it").fingerprint() == first


def edit(saved: Path, **changes: Any) -> None:
    values = json.loads((saved / SETTINGS).read_text())
    values.update(changes)
    (saved / SETTINGS).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 99}, "has format 99, this version reads 1"),
        ({"scorer": "mixencode"}, "did you mean 'mixencoder'"),
        ({"scorer": 3}, "is corrupted"),
        ({"config": {"kk": 1}}, "no setting 'kk'"),
        ({"config": {"k": 5, "max_query": 22, "max_candidate": 18}}, "does not load as the scorer"),
        ({"weights_sha256": "0"}, "checksum differs"),
    ],
)
def test_damaged_settings(saved: Path, changes: dict[str, Any], says: str) -> None:
    edit(saved, **changes)
    with pytest.raises(CheckpointError, match=says) as error:
        load(saved)
    assert "\n" not in str(error.value)


def test_missing_or_torn_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=f"has no {SETTINGS}"):
        load(tmp_path)
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:-7])
    with pytest.raises(CheckpointError, match="checksum differs"):
        load(saved)
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"no {WEIGHTS}"):
        load(saved)
    (saved / SETTINGS).write_text("{")
    with pytest.raises(CheckpointError, match="is corrupted"):
        load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("file", [WEIGHTS, "model.safetensors"])
def test_weights_that_are_no_numbers_are_refused(saved: Path, file: str, value: float) -> None:
    made = load(saved)
    with torch.no_grad():
        target = made.context if file == WEIGHTS else made.encoder.get_input_embeddings().weight
        target.view(-1)[3] = value
    made.save(saved)
    assert not safetensors.torch.load_file(saved / WEIGHTS)["context"].isnan().all()
    with pytest.raises(CheckpointError, match="NaN or infinity in"):
        load(saved)


def test_a_failed_save_changes_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load(saved)
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with torch.no_grad():
        made.context.add_(1.0)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        made.save(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
