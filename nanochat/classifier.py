"""Texts with labels: a label head on the last token of a GPT, its batches, and its report.

    <|endoftext|> The film is a delight.<|end|>
                                        ~~~~~~~ here the head reads what the network made of the whole text

The end token is always the same one, so the head need not tell where a text ends. A labelled text is a window
whose only target is its label, at that token: packing, batches, the loop and the loss are those of dialogue.

Source: Radford et al. 2018 (GPT), section 3.2; names and pooling of Hugging Face's GPT2ForSequenceClassification,
to which tests/test_classifier.py holds this file.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nanochat import InputError, records
from nanochat.model import GPT, GPTConfig
from nanochat.records import whole_pairs
from nanochat.rows import Rows, Window
from nanochat.tokenizer import END_OF_TURN, Tokenizer

Labelled = tuple[str, str]  # (text, label)

TEXTS = ("text", "sentence", "content", "review", "文本", "内容", "句子")
LABELS = ("label", "class", "category", "sentiment", "标签", "类别")
MOST_LABELS = 1000


class GPTClassifier(GPT):
    """A GPT whose head gives scores of labels instead of tokens."""

    def __init__(self, config: GPTConfig, labels: Sequence[str]):
        super().__init__(config)
        self.labels: list[str] = list(labels)
        self.score = nn.Linear(config.n_embd, len(self.labels), bias=False)
        self.class_weights: Tensor | None = None  # (labels,), of the loss

    def head(self, x: Tensor) -> Tensor:
        """Vectors (..., C) → scores (..., labels)."""
        return self.score(x)

    def chunk_nll(self, x: Tensor, targets: Tensor) -> Tensor:
        """Vectors (N, C), labels (N,) → −ln p of each label, (N,), times its class's weight in training."""
        nll = super().chunk_nll(x, targets)
        if self.class_weights is None or not self.training:
            return nll
        return nll * self.class_weights.to(x.device)[targets.clamp(min=0)]  # an ignored one is 0 whatever the weight


def with_label_head(model: GPT, labels: Sequence[str]) -> GPTClassifier:
    """A classifier around the weights of `model`, which it shares; its head starts at random."""
    with torch.device("meta"):
        classifier = GPTClassifier(model.config, labels)
    shared = {name: w for name, w in model.state_dict().items() if not name.startswith("score.")}  # of other labels
    classifier.load_state_dict(shared, strict=False, assign=True)
    classifier.score.to_empty(device=model.wpe.weight.device)
    nn.init.normal_(classifier.score.weight, std=0.02)
    return classifier.requires_grad_(True)


def balanced(examples: Sequence[Labelled], labels: Sequence[str]) -> Tensor:
    """Weights (labels,) by which each label counts as much as any other in the sum over `examples`; their mean over them is 1."""
    counts = Counter(label for _, label in examples)
    return torch.tensor([len(examples) / (len(labels) * counts[label]) if counts[label] else 0.0 for label in labels])


# ------------------------------------------------------------------ files and rows


def read(path: str | Path) -> tuple[list[Labelled], list[str]]:
    """Labelled texts of a file (JSON lines, an array, CSV, TSV), and one line "file:line: reason" for each record left out.

    A record has a text (text, sentence, content, review) and a label (label, class, category, sentiment).
    Raises InputError if the file has no usable one.
    """
    return records.converted(path, records.read(path), _labelled, "labelled text")


def _labelled(record: object) -> Labelled:
    """One record → (text, label)."""
    if not isinstance(record, dict):
        raise InputError(f"a record is {type(record).__name__}, must be an object with a text and a label")
    fields = records.named(record)
    text, label = ([name for name in names if name in fields] for names in (TEXTS, LABELS))
    if not (len(text) == len(label) == 1):
        raise InputError(f'keys are {records.shown(list(record))}: name the text "text" and its label "label", each once; '
                         "all others are left aside")
    text, label = fields[text[0]], fields[label[0]]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"the text is {'empty' if isinstance(text, str) else type(text).__name__}, must be text")
    if isinstance(label, bool) or not isinstance(label, (str, int)) or not str(label).strip():
        raise InputError(f"the label is {label!r}, must be a word or a whole number")
    return whole_pairs(text), " ".join(whole_pairs(str(label)).split())


def labels_of(examples: Sequence[Labelled]) -> list[str]:
    """The labels, in alphabetical order; InputError if there are too few or too many to be classes."""
    labels = sorted({label for _, label in examples})
    if not 2 <= len(labels) <= min(MOST_LABELS, len(examples) // 2):
        raise InputError(f"{len(examples):,} texts have {len(labels):,} different labels ({records.shown(labels)}): a classifier "
                         f"needs two at least and {MOST_LABELS:,} at most, and two texts of each on average")
    return labels


def to_rows(examples: Sequence[Labelled], labels: Sequence[str], tokenizer: Tokenizer, block_size: int, pack: bool = True) -> Rows:
    """A window for each text: its ids, then its label's number as the only target. Of longer ones, the beginning stays."""
    if END_OF_TURN not in tokenizer.control:
        raise InputError(f"the classifier's tokenizer has no {END_OF_TURN}: it reads texts in another frame; finetune.py --task classify makes it ours")
    number = {label: i for i, label in enumerate(labels)}
    end, room = tokenizer.control[END_OF_TURN], block_size - 2
    cut, windows = 0, []
    for source, (text, label) in enumerate(examples):
        ids = tokenizer.encode(text)
        cut += len(ids) > room
        ids = [tokenizer.end_of_text, *ids[:room], end, number[label]]
        windows.append(Window(ids, [False] * (len(ids) - 1) + [True], source))
    return Rows.of(windows, block_size, f"{cut} texts cut to fit the block", pack)


@torch.no_grad()
def probabilities(model: GPTClassifier, rows: Rows, batch_size: int) -> Tensor:
    """Of each label, for each text: (texts, labels), in the order of the texts; fp32."""
    device, training = model.wpe.weight.device, model.training
    model.eval()
    found = torch.zeros(sum(map(len, rows.rows)), len(model.labels))
    for start in range(0, len(rows), batch_size):
        indices = range(start, min(start + batch_size, len(rows)))
        batch = rows.batch(indices).to(device)
        x = model.features(batch.inputs, segments=batch.segments)[batch.targets >= 0]  # (texts of the batch, C), row by row
        sources = [window.source for i in indices for window in rows.rows[i]]
        found[sources] = model.head(x).float().softmax(dim=-1).cpu()
    model.train(training)
    return found


# ------------------------------------------------------------------ report


def report(labels: Sequence[str], truth: Sequence[int], predicted: Sequence[int]) -> dict:
    """What a classifier got right, of the numbers of the true label and of the predicted one of each text.

    accuracy; majority: that of always saying the commonest label; macro_f1: the mean F1 of the labels that a text has or was
    taken for; labels: precision, recall, F1 and support (the texts that have it) of each, 0 where there are none;
    confusion[i][j]: texts of label i taken for label j.
    """
    counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(counts, (np.asarray(truth), np.asarray(predicted)), 1)
    right, support, taken = np.diag(counts), counts.sum(1), counts.sum(0)
    precision, recall = right / np.maximum(taken, 1), right / np.maximum(support, 1)
    f1 = 2 * right / np.maximum(support + taken, 1)  # the harmonic mean of the two
    met, texts = support + taken > 0, max(counts.sum(), 1)
    return {
        "accuracy": float(right.sum() / texts),
        "macro_f1": float(f1[met].mean()) if met.any() else 0.0,
        "majority": float(support.max() / texts),
        "labels": {label: {"precision": float(precision[i]), "recall": float(recall[i]), "F1": float(f1[i]), "support": int(support[i])}
                   for i, label in enumerate(labels)},
        "confusion": counts.tolist(),
    }
