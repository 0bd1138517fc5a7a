"""Tiny random models of every family and head, padded batches for them, and comparisons of what they say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from thresher.model import policy_of
from thresher.policy import PolicyConfig, Trace, tracing

HIDDEN, HEADS_OF_ATTENTION, INTERMEDIATE, VOCABULARY = 32, 4, 48, 64
CLS, SEP, FIRST_WORD = 2, 3, 5
LENGTHS = (9, 1, 14, 5)

HEADS = ("base", "sequence", "token", "question-answering")
_AUTO = {
    "base": transformers.AutoModel,
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
}

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS_OF_ATTENTION,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
    "num_labels": 3,
}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _bert_like(kind: type[PretrainedConfig], **fixed: Any) -> Callable[..., PretrainedConfig]:
    def build(layers: int, **extra: Any) -> PretrainedConfig:
        return kind(**{**_SIZES, **_QUIET, "num_hidden_layers": layers, **fixed, **extra})

    return build


def _distilbert(layers: int, **extra: Any) -> PretrainedConfig:
    return transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=HIDDEN,
        n_heads=HEADS_OF_ATTENTION,
        hidden_dim=INTERMEDIATE,
        n_layers=layers,
        max_position_embeddings=48,
        initializer_range=0.3,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        qa_dropout=0.0,
        **{"num_labels": 3, **extra},
    )


def _modernbert(layers: int, **extra: Any) -> PretrainedConfig:
    kinds = ["full_attention" if i % 3 == 0 else "sliding_attention" for i in range(layers)]
    return transformers.ModernBertConfig(
        **{
            **_SIZES,
            "num_hidden_layers": layers,
            "layer_types": kinds,
            "local_attention": 8,
            "pad_token_id": 0,
            "cls_token_id": CLS,
            "bos_token_id": CLS,
            "sep_token_id": SEP,
            "eos_token_id": SEP,
            **extra,
        }
    )


_ROBERTA_LIKE = {"pad_token_id": 1, "bos_token_id": CLS, "eos_token_id": SEP, "type_vocab_size": 1}
_CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "albert": _bert_like(transformers.AlbertConfig, embedding_size=24, pad_token_id=0, classifier_dropout_prob=0.0),
    "bert": _bert_like(transformers.BertConfig),
    "camembert": _bert_like(transformers.CamembertConfig, **_ROBERTA_LIKE),
    "distilbert": _distilbert,
    "electra": _bert_like(transformers.ElectraConfig, embedding_size=24),
    "ernie": _bert_like(transformers.ErnieConfig, use_task_id=False),
    "modernbert": _modernbert,
    "mpnet": _bert_like(transformers.MPNetConfig, pad_token_id=1, bos_token_id=CLS, eos_token_id=SEP),
    "roberta": _bert_like(transformers.RobertaConfig, **_ROBERTA_LIKE),
    "xlm-roberta": _bert_like(transformers.XLMRobertaConfig, **_ROBERTA_LIKE),
}
FAMILIES = tuple(sorted(_CONFIGS))
WITH_TYPES = ("albert", "bert", "electra", "ernie")
WITH_SEGMENTS = tuple(f for f in FAMILIES if f != "distilbert")
POST_NORM = tuple(f for f in FAMILIES if f != "modernbert")
WITH_POSITION_BIAS = ("mpnet",)


def config_of(family: str, layers: int = 3, **extra: Any) -> PretrainedConfig:
    return _CONFIGS[family](layers, **extra)


@cache
def _made(family: str, head: str, layers: int, seed: int) -> PreTrainedModel:
    labels = {"num_labels": 2} if head == "question-answering" else {}
    return build(config_of(family, layers, **labels), head, seed)


def build(config: PretrainedConfig, head: str = "sequence", seed: int = 0, **options: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _AUTO[head].from_config(config, **options).eval()


def make(family: str, head: str = "sequence", layers: int = 3, seed: int = 0) -> PreTrainedModel:
    """A new model in eval mode; the same weights for the same arguments."""
    return copy.deepcopy(_made(family, head, layers, seed))


def batch(
    family: str, lengths: Iterable[int] = LENGTHS, *, side: str = "right", seed: int = 0, width: int | None = None
) -> dict[str, Tensor]:
    """Pairs of "sentences" of random words as padded tensors: [CLS] words [SEP] words [SEP], cut to the given lengths."""
    sizes = list(lengths)
    width = width or max(sizes)
    generator = torch.Generator().manual_seed(seed)
    pad = config_of(family).pad_token_id or 0
    ids = torch.full((len(sizes), width), pad)
    mask = torch.zeros_like(ids)
    types = torch.zeros_like(ids)
    for row, size in enumerate(sizes):
        words = torch.randint(FIRST_WORD, VOCABULARY, (size,), generator=generator)
        words[0] = CLS
        middle = size // 2
        if size >= 4:
            words[middle] = words[-1] = SEP
        start = 0 if side == "right" else width - size
        ids[row, start : start + size] = words
        mask[row, start : start + size] = 1
        if size >= 4:
            types[row, start + middle + 1 : start + size] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family in WITH_TYPES:
        inputs["token_type_ids"] = types
    return inputs


def segments_of(family: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """0 up to and including the first separator, 1 after it."""
    if "token_type_ids" in inputs:
        return inputs["token_type_ids"]
    out = torch.zeros_like(inputs["input_ids"])
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        seen = False
        for column, token in enumerate(ids):
            out[row, column] = int(seen)
            seen = seen or token == SEP
    return out


def alone(inputs: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row without its padding."""
    real = inputs["attention_mask"][row].bool()
    return {name: value[row][real].unsqueeze(0) for name, value in inputs.items()}


def real_parts(outputs: Mapping[str, Any], mask: Tensor) -> dict[str, Tensor]:
    """The tensors of an output; those with one entry a token without the padding."""
    found = {}
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            per_token = value.dim() > 1 and value.shape[:2] == mask.shape
            found[name] = value[mask.bool()] if per_token else value
    assert found
    return found


def worst(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> float:
    """The largest difference between two outputs of `real_parts`."""
    assert set(expected) == set(got)
    for name in expected:
        assert expected[name].shape == got[name].shape
        assert not got[name].isnan().any()
    return max(float((expected[name] - got[name]).detach().abs().max()) for name in expected)


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return real_parts(model(**inputs), inputs["attention_mask"])


def traced(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Trace]:
    """`outputs_of`, and the record of the pass."""
    with tracing(record=True) as traces:
        outputs = outputs_of(model, inputs)
    (trace,) = traces
    return outputs, trace


# Settings under which every method really drops from rows as short as those of `batch`; a method that is not listed
# runs with its defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "ltp": {"threshold": 0.2},
    "adapler": {"threshold": 1.0},  # an untrained predictor gives nearly even shares
    "rising-threshold": {"threshold": 0.2},
    "relative-threshold": {"threshold": 0.4},
    "cascade-top-k": {"keep_rate": 0.3},
    "block-skim": {"block": 2, "threshold": 0.5, "keep_question": False},
    "transkimmer": {"bias": 0.0},  # keeps everything until it is trained
    "tr-bert": {"bias": 0.0},  # keeps nearly everything until it is trained
    "power-bert": {"retention": (0.7, 0.5, 0.3)},  # keeps everything until it is trained
}


def decided(model: Any) -> Any:
    """The attached model, whose policy's batch norms have seen a batch: without, predictors say nearly the same of all."""
    policy = policy_of(model)
    norms = [module for module in policy.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        policy.mode = "soft"
        with torch.no_grad():
            model.train()(**batch(model.config.model_type, (24, 17, 20, 9), seed=5))
        policy.mode = "hard"
    return model.eval()


def settings(config: type[PolicyConfig], **changes: Any) -> PolicyConfig:
    return config(**{**SETTINGS.get(config.method, {}), **changes})


def dataset(count: int = 40, *, seed: int = 0, labels: str | None = "class", low: int = 4, high: int = 20) -> Any:
    """Encoded, unpadded rows for BERT-like models, of shuffled lengths. The class is whether the second word is odd."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "token_type_ids": []}
    answers: list[Any] = []
    for _ in range(count):
        size = int(torch.randint(low, high + 1, (1,), generator=generator))
        words = torch.randint(FIRST_WORD, VOCABULARY, (size,), generator=generator)
        words[0], words[-1] = CLS, SEP
        rows["input_ids"].append(words.tolist())
        rows["attention_mask"].append([1] * size)
        rows["token_type_ids"].append([0] * size)
        answers.append((words % 2).tolist() if labels == "token" else int(words[1]) % 2)
    if labels:
        rows["labels"] = answers
    return datasets.Dataset.from_dict(rows)


def tokenizer() -> Any:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"w{i}" for i in range(FIRST_WORD, VOCABULARY)]
    return transformers.BertTokenizer(vocab={name: i for i, name in enumerate(names)}, model_max_length=48)
