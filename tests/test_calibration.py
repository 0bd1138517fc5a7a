"""Running over rows, and from a target to the strength that meets it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import thresher
import thresher.calibration as calibration
from helpers import HIDDEN, batch, dataset, decided, make, settings
from thresher.calibration import calibrate
from thresher.errors import OptionError, TargetError
from thresher.measure.run import batches, collate, run, run_packed
from thresher.methods import CONFIGS
from thresher.model import attachment_of, policy_of


def attached(method: str = "attention-mass", head: str = "sequence", **changes: Any) -> Any:
    return thresher.attach(make("bert", head), settings(CONFIGS[method], **changes))


@pytest.fixture(scope="module")
def rows() -> Any:
    return dataset(40, high=24)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_run_gives_the_callers_order(rows: Any, size: int) -> None:
    model = attached()
    result = run(model, rows, batch_size=size)
    assert result.predictions.shape == (40, 3)
    assert len(result.traces) == -(-40 // size)
    for index in (0, 3, 17, 39):
        with torch.no_grad():
            own = model(**collate(rows, [index], 0)).logits[0].numpy()
        np.testing.assert_allclose(result.predictions[index], own, atol=1e-4)


def test_run_restores_the_order_whatever_the_lengths(rows: Any) -> None:
    model = attached()
    lengths = run(model, rows, batch_size=6, predict=lambda m, b: b["attention_mask"].sum(1, keepdim=True).float())
    assert lengths.predictions[:, 0].tolist() == [len(ids) for ids in rows["input_ids"]]


def test_batches_are_of_similar_length_and_hold_everyone_once(rows: Any) -> None:
    made = batches(rows, 7)
    assert sorted(i for index in made for i in index) == list(range(40))
    lengths = [len(rows[i]["input_ids"]) for index in made for i in index]
    assert lengths == sorted(lengths, reverse=True)
    one = collate(rows, made[0], pad_id=9)
    assert (one["input_ids"][one["attention_mask"] == 0] == 9).all()
    assert set(one) == {"input_ids", "attention_mask", "token_type_ids"}


def test_run_leaves_the_mode_and_tells_of_progress(rows: Any) -> None:
    model = attached().train()
    done: list[int] = []
    result = run(model, rows, batch_size=16, on_batch=done.append)
    assert model.training
    assert done == [16, 16, 8]
    assert result.speedup > 1.2
    packed = run_packed(model, rows)
    assert packed.speedup == 1.0
    assert np.abs(packed.predictions - result.predictions).max() > 1e-2
    with thresher.stock():
        stock = run(model, rows)
    np.testing.assert_allclose(stock.predictions, packed.predictions, atol=1e-5)


@pytest.mark.parametrize("head", ["token", "question-answering"])
def test_run_and_calibrate_heads_that_read_every_token(rows: Any, head: str) -> None:
    """A speedup needs no labels, whatever the head says and however wide its batches are."""
    model = attached(head=head)
    assert run(model, rows, batch_size=7).speedup > 1.2
    found = calibrate(model, rows, speedup=1.5, batch_size=7, tolerance=0.05)
    assert found.speedup == pytest.approx(1.5, rel=0.06)


@pytest.mark.parametrize("method", sorted(CONFIGS))
@pytest.mark.parametrize("target", [1.1, 1.35])
def test_a_speedup_is_reached_within_tolerance(rows: Any, method: str, target: float) -> None:
    model = decided(attached(method))
    found = calibrate(model, rows, speedup=target, tolerance=0.03)
    assert target <= found.speedup <= target * 1.03
    assert policy_of(model).config.strength == found.strength > 0
    assert run(model, rows).speedup == pytest.approx(found.speedup)
    assert policy_of(model).config.replace(strength=1.0) == settings(CONFIGS[method])
    notes = attachment_of(model).notes["calibration"]
    assert notes["target"] == {"speedup": target}
    assert notes["rows"] == 40
    assert notes["speedup"] == found.speedup
    assert found.quality is None
    assert found.baseline is None


def test_calibration_keeps_what_was_learned_and_is_saved(rows: Any, tmp_path: Any) -> None:
    model = attached("ltp")
    with torch.no_grad():
        policy_of(model).theta.mul_(0.5)
    learned = policy_of(model).theta.detach().clone()
    found = calibrate(model, rows, speedup=1.3, quality=lambda p: np.float32(0.5))
    assert found.quality == 0.5
    assert torch.equal(policy_of(model).theta, learned)
    model.save_pretrained(tmp_path)
    back = thresher.load(tmp_path)
    assert policy_of(back).config.strength == found.strength
    assert attachment_of(back).notes["calibration"]["speedup"] == found.speedup


def test_an_impossible_speedup_names_the_nearest_and_changes_nothing(rows: Any) -> None:
    model = attached()
    before = policy_of(model).config
    with pytest.raises(TargetError) as error:
        calibrate(model, rows, speedup=500.0)
    most = run(thresher.attach(make("bert"), before.replace(strength=64.0)), rows).speedup
    assert f"{most:.2f}x" in str(error.value)
    assert "500.00x" in str(error.value)
    assert policy_of(model).config == before
    assert attachment_of(model).notes == {}


def test_a_loss_is_honoured_and_the_fastest_such_setting_taken(rows: Any) -> None:
    model = attached()
    reference = run_packed(model, rows).predictions

    def quality(predictions: np.ndarray) -> float:
        return -float(np.abs(predictions - reference).mean())

    losses = {s: -quality(run(attached(strength=s), rows).predictions) for s in (0.05, 0.2, 1.0)}
    allowed = losses[0.2] * 1.01
    found = calibrate(model, rows, max_loss=allowed, quality=quality)
    assert found.quality is not None
    assert found.baseline is not None
    assert found.baseline == 0.0
    assert found.quality >= -allowed - 1e-9
    assert found.quality == pytest.approx(quality(run(model, rows).predictions))
    assert found.strength > 0
    assert found.speedup > 1.0
    assert policy_of(model).config.strength == found.strength


def test_a_loss_that_nothing_holds_names_the_nearest_and_changes_nothing(rows: Any) -> None:
    model = attached()
    reference = run_packed(model, rows).predictions
    with pytest.raises(TargetError, match="nearest has"):
        calibrate(model, rows, max_loss=0.0, quality=lambda p: -float(np.abs(p - reference).sum() > 1e-3))
    assert policy_of(model).config == settings(CONFIGS["attention-mass"])


def test_any_loss_allowed_takes_the_strongest(rows: Any) -> None:
    found = calibrate(attached(), rows, max_loss=1.0, quality=lambda p: 0.5)
    assert found.strength == calibration.STRONGEST


def test_without_a_quality_answers_are_compared(rows: Any) -> None:
    model = attached()
    packed = run_packed(model, rows).predictions
    found = calibrate(model, rows, max_loss=0.3)
    agree = float((run(model, rows).predictions.argmax(1) == packed.argmax(1)).mean())
    assert found.baseline == 1.0
    assert found.quality == pytest.approx(agree)
    assert agree >= 0.7


def test_agreement_of_single_values_is_the_share_of_variance() -> None:
    packed = np.array([[0.0], [1.0], [2.0]])
    judge = calibration.agreement(packed, make("bert", "base"))
    assert judge(packed) == 1.0
    assert judge(packed + 0.5) == pytest.approx(1 - 0.25 / (2 / 3))
    classes = calibration.agreement(np.array([[1.0, 0.0], [0.0, 1.0]]), make("bert"))
    assert classes(np.array([[2.0, 0.0], [3.0, 1.0]])) == 0.5


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({}, "one target"),
        ({"speedup": 2.0, "max_loss": 0.1}, "one target"),
        ({"speedup": 0.5}, "at least 1"),
        ({"max_loss": -0.1}, "at least 0"),
        ({"speedup": float("nan")}, "a number of at least 1, not nan"),
        ({"speedup": float("inf")}, "a number of at least 1, not inf"),
        ({"speedup": "2"}, "a number of at least 1, not '2'"),
        ({"max_loss": float("nan")}, "a number of at least 0, not nan"),
        ({"max_loss": "2"}, "a number of at least 0, not '2'"),
    ],
)
def test_targets_that_make_no_sense(rows: Any, target: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        calibrate(attached(), rows, **target)


def test_no_rows_and_no_policy(rows: Any) -> None:
    with pytest.raises(OptionError, match="at least one row"):
        calibrate(attached(), rows.select([]), speedup=2.0)
    with pytest.raises(OptionError, match="no policy"):
        calibrate(thresher.attach(make("bert")), rows, speedup=2.0)


def test_an_interrupt_restores_the_setting(rows: Any) -> None:
    model = attached()

    def interrupted(predictions: np.ndarray) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, rows, max_loss=0.1, quality=interrupted)
    assert policy_of(model).config == settings(CONFIGS["attention-mass"])


def test_a_base_model_by_a_prediction_of_ones_own(rows: Any) -> None:
    model = attached(head="base")

    def pooled(encoder: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = inputs["attention_mask"].unsqueeze(-1)
        return (encoder(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)

    assert run(model, rows, predict=pooled).predictions.shape == (40, HIDDEN)
    assert calibrate(model, rows, speedup=1.3, predict=pooled).speedup >= 1.3
    assert batch("bert")["input_ids"].shape[0] == 4


def test_a_loss_is_counted_from_the_reference(rows: Any) -> None:
    """What training itself lost counts too: here everything, so no setting holds."""
    model = attached("attention-mass")
    worse = lambda predictions: 0.4  # noqa: E731
    assert calibrate(model, rows, max_loss=0.0, quality=worse).baseline == 0.4
    better = run_packed(model, rows).predictions + 100.0
    quality = lambda predictions: 0.9 if predictions.min() > 50 else 0.4  # noqa: E731
    with pytest.raises(TargetError, match="0.4000"):
        calibrate(model, rows, max_loss=0.1, quality=quality, reference=better)


@pytest.mark.parametrize(
    ("best", "said"), [(3.9962, "4.000x .* 3.996x"), (2.5, "4.00x .* 2.50x"), (3.99998, "4.00000x .* 3.99998x")]
)
def test_what_is_reached_never_looks_like_what_was_asked(
    best: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short:
        already = False

        def __init__(self) -> None:
            self.seen = {1.0: calibration.Run(np.zeros(1), (), best)}

        def at(self, strength: float) -> calibration.Run:
            return self.seen[1.0]

    with pytest.raises(TargetError, match=said):
        calibration._to_speedup(Short(), 4.0, 0.01)  # type: ignore[arg-type]
