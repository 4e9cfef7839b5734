"""What a GPT is fine-tuned for: to reply, or to give a label. The same questions, answered for each.

finetune.py is written once; a task says how its examples are read, what of them is learned, how the
outcome is measured and what is shown of it.
"""

from typing import Any

from nanochat import InputError, classifier, dialogue, evaluate, formats, lora, preview, records
from nanochat.classifier import GPTClassifier, Labelled
from nanochat.formats import Conversation
from nanochat.model import GPT
from nanochat.rows import Rows
from nanochat.tokenizer import Tokenizer

PROMPTS = 5  # held-out first turns that are answered at each evaluation


class ChatTask:
    """Learn the assistant's part of conversations."""

    examples = "conversations"
    read = staticmethod(formats.read)
    describe = staticmethod(preview.about_conversations)

    def prepare(self, model: GPT, train: list[Conversation], balance: bool) -> GPT:
        """The model to train."""
        if isinstance(model, GPTClassifier):
            raise InputError("--init is a classifier: its head gives labels, not text; start from the model that it came from")
        return model

    def rows(self, examples: list[Conversation], model: GPT, tokenizer: Tokenizer, block_size: int) -> Rows:
        """What is learned, or scored."""
        return dialogue.to_rows(examples, tokenizer, block_size)

    def text(self, example: Conversation) -> str:
        """All that was said: what makes two examples duplicates. A system text, often the same for all, would hide the rest."""
        return "\n".join(message["content"] for message in example if message["role"] != "system")

    def ask(self, model: GPT, tokenizer: Tokenizer, examples: list[Conversation]) -> dict[str, str]:
        """The first PROMPTS different first turns → greedy replies."""
        replies = evaluate.greedy_replies(model, tokenizer, examples, limit=PROMPTS, max_new_tokens=40)
        return dict(zip(map(preview.shortened, replies.prompts), replies.replies))

    def measure(self, model: GPT, tokenizer: Tokenizer, examples: list[Conversation], rows: Rows, batch_size: int) -> dict:
        """All that report.md says of a model on held-out examples."""
        return evaluate.measure_chat(model, tokenizer, examples, rows, batch_size)

    def headline(self, result: dict) -> str:
        """The measure of success, in a few words."""
        return f"perplexity {result['perplexity']:.2f}"

    def details(self, result: dict) -> str:
        """A line more about a result."""
        return evaluate.about_replies(result["replies"])


class ClassifyTask:
    """Learn the labels of texts."""

    examples = "labelled texts"
    read = staticmethod(classifier.read)
    describe = staticmethod(preview.about_texts)

    def prepare(self, model: GPT, train: list[Labelled], balance: bool) -> GPTClassifier:
        """A label head on the model, new unless it has one for just these labels."""
        labels = classifier.labels_of(train)
        if not isinstance(model, GPTClassifier) or model.labels != labels:
            if lora.is_adapted(model):  # a resumed run's
                raise InputError("--resume: the labels are not those that the run began with; --init goes on with other data")
            model = classifier.with_label_head(model, labels)
        model.class_weights = classifier.balanced(train, labels) if balance else None
        return model

    def rows(self, examples: list[Labelled], model: GPTClassifier, tokenizer: Tokenizer, block_size: int) -> Rows:
        """What is learned, or scored; InputError for a label that the model does not know."""
        if unknown := sorted({label for _, label in examples} - set(model.labels)):
            raise InputError(f"no training text has the labels {records.shown(unknown)} of some others: give each more texts, or leave them out")
        return classifier.to_rows(examples, model.labels, tokenizer, block_size)

    def text(self, example: Labelled) -> str:
        """What makes two examples duplicates: the text without its label."""
        return example[0]

    def ask(self, model: GPTClassifier, tokenizer: Tokenizer, examples: list[Labelled]) -> dict[str, str]:
        """The first PROMPTS texts → their likeliest label and its probability."""
        first = examples[:PROMPTS]
        rows = classifier.to_rows(first, model.labels, tokenizer, model.config.block_size)
        found = classifier.probabilities(model, rows, PROMPTS)
        return {preview.shortened(text): f"{model.labels[int(p.argmax())]} {p.max():.0%} (it is {label})" for (text, label), p in zip(first, found)}

    def measure(self, model: GPTClassifier, tokenizer: Tokenizer, examples: list[Labelled], rows: Rows, batch_size: int) -> dict:
        """All that report.md says of a model on held-out examples."""
        return evaluate.measure_classifier(model, examples, rows, batch_size)

    def headline(self, result: dict) -> str:
        """The measure of success, in a few words."""
        return f"accuracy {result['accuracy']:.3f}, macro F1 {result['macro_f1']:.3f}"

    def details(self, result: dict) -> str:
        """A line more about a result."""
        return f"the accuracy of always saying the commonest label: {result['majority']:.3f}"


TASKS: dict[str, Any] = {"chat": ChatTask, "classify": ClassifyTask}  # Any: each takes the models of its kind
