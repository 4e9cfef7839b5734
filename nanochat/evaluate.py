"""How good a model is: loss, perplexity, bits per byte, accuracy; what its replies are like, and where it fails.

    python -m nanochat.evaluate out/finetuned held_out.jsonl      a chat model on conversations
    python -m nanochat.evaluate out/classifier held_out.tsv       a classifier on labelled texts
    python -m nanochat.evaluate gpt2 article.txt                  any model on plain text
    python -m nanochat.evaluate gpt2 questions.jsonl              any model on {"query", "choices", "gold"} records

Sources: bits per byte, Gao et al. 2020 (The Pile), section 3.1; distinct-n, Li et al. 2016; repetition,
Welleck et al. 2020 (seq-rep-n); choosing by likelihood, Brown et al. 2020, as EleutherAI's lm-eval does it.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor
from tqdm import tqdm

from nanochat import InputError, checkpoint, classifier, dialogue, formats, processes, records, runtime, sources
from nanochat.classifier import GPTClassifier
from nanochat.dialogue import render_prompt
from nanochat.formats import Conversation
from nanochat.generate import SampleConfig, generate_ids
from nanochat.model import GPT, IGNORED, LOSS_CHUNK, Batch, at_least_fp32, supervised_places
from nanochat.packed import pack
from nanochat.rows import Rows, Window
from nanochat.runtime import autocast
from nanochat.tokenizer import END_OF_TURN, Tokenizer

# ------------------------------------------------------------------ likelihood


@torch.no_grad()
def score(model: GPT, tokenizer: Tokenizer, batches: Iterable[Batch], dtype: torch.dtype = torch.float32,
          total: int | None = None, each: dict[int, Tensor] | None = None) -> dict[str, float]:
    """The mean over all supervised targets of `batches`, each counted once; total: how many there are, for the bar.

    each: takes, by the number of the batch, −ln p of each of its targets, of the batches that this process has done.
    Several processes, each called with the same batches, take turns and add up: all get the same mean.

    loss: nats per target. perplexity: e^loss; …_without_end: of the tokens but <|end|>. accuracy: the share of targets
    that were the likeliest token. bits_per_byte, …_per_character: nats of all targets, control tokens included, over
    ln 2 · UTF-8 bytes (characters) of their text: they compare models with different tokenizers. A classifier has loss
    and accuracy only.
    """
    device = model.wpe.weight.device
    classifies = isinstance(model, GPTClassifier)
    sizes = torch.tensor([tokenizer.byte_lengths(), tokenizer.character_counts()], device=device)
    end = -1 if classifies else tokenizer.control.get(END_OF_TURN, -1)
    training = model.training
    model.eval()
    sums = torch.zeros(7, dtype=torch.float64)
    for number, batch in enumerate(tqdm(batches, "evaluating", total, leave=False, unit="batch", delay=2, disable=None)):
        if number % processes.world_size() != processes.rank():
            continue
        batch = batch.to(device)
        with autocast(device, dtype):
            nll, correct = token_scores(model, batch)
        if each is not None:
            each[number] = nll.cpu()
        targets = batch.targets[batch.targets != IGNORED]
        inside = targets != end
        text = [0, 0] if classifies else sizes[:, targets].sum(1).tolist()
        sums += torch.tensor([nll.sum(), targets.numel(), *text, correct.sum(), nll[inside].sum(), inside.sum()], dtype=torch.float64)
    model.train(training)
    nats, tokens, text_bytes, characters, right, nats_inside, inside = processes.sum_over_ranks(*sums.tolist())
    loss = nats / max(tokens, 1)
    result = {"loss": loss, "accuracy": right / max(tokens, 1)}
    if classifies:
        return result
    result["perplexity"] = perplexity(loss)
    result["bits_per_byte"] = nats / (math.log(2) * max(text_bytes, 1))
    result["bits_per_character"] = nats / (math.log(2) * max(characters, 1))
    if inside < tokens:
        result["perplexity_without_end"] = perplexity(nats_inside / max(inside, 1))
    return result


def perplexity(loss: float) -> float:
    """e^loss, for a loss in nats."""
    return math.exp(min(loss, 700))


def token_scores(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each supervised target, in order: → (−ln p in nats, whether it was the likeliest), both (N,); model.nll and more."""
    places = supervised_places(batch.targets)
    x = model.features(batch.inputs, segments=batch.segments).flatten(0, 1)[places]
    targets = batch.targets.flatten()[places]
    nll, right = [x.new_zeros(0, dtype=torch.float32)], [targets.new_zeros(0, dtype=torch.bool)]
    for chunk, target in zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK)):
        logits = at_least_fp32(model.head(chunk))
        nll.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        right.append(logits.argmax(dim=-1) == target)
    return torch.cat(nll)[targets != IGNORED], torch.cat(right)[targets != IGNORED]


def losses_of_sources(rows: Rows, batch_size: int, each: dict[int, Tensor]) -> dict[int, float]:
    """Mean loss, in nats per supervised token, of each conversation (Window.source); each: as `score` fills it from these rows."""
    sums: dict[int, list[float]] = {}
    for number, nll in each.items():
        for window in (window for row in rows.rows[number * batch_size : (number + 1) * batch_size] for window in row):
            count = sum(window.supervised[1:])
            pair = sums.setdefault(window.source, [0.0, 0])
            pair[0], pair[1], nll = pair[0] + nll[:count].sum().item(), pair[1] + count, nll[count:]
    return {source: nats / count for source, (nats, count) in sums.items() if count}


def text_rows(texts: Iterable[str], tokenizer: Tokenizer, block_size: int) -> Rows:
    """Plain texts in windows of the block that do not overlap, each token a target once, and the token that ends each text."""
    windows = []
    for source, text in enumerate(texts):
        ids = [tokenizer.end_of_text, *tokenizer.encode(text), tokenizer.end_of_text]
        windows += [Window(ids[i : i + block_size + 1], [True] * len(ids[i : i + block_size + 1]), source)
                    for i in range(0, len(ids) - 1, block_size)]
    return Rows.of(windows, block_size)


@torch.no_grad()
def loglikelihood(model: GPT, tokenizer: Tokenizer, context: str, continuation: str) -> float:
    """ln p of the continuation after the context, in nats; of a context too long for the block, the end counts.

    The two are encoded together, and spaces at the end of the context belong to the continuation, as in lm-eval.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    if not before:
        before, whole = [tokenizer.end_of_text], [tokenizer.end_of_text, *whole]
    count = len(whole) - len(before)
    if count < 1:
        raise InputError(f"{continuation!r} has no token of its own after {context[-40:]!r}: it cannot be compared")
    ids = torch.tensor(whole[-model.config.block_size - 1 :], device=model.wpe.weight.device)
    targets = ids[1:].clone()
    targets[: max(0, len(targets) - count)] = IGNORED
    return -model.nll(ids[None, :-1], targets[None]).sum().item()


def choose(model: GPT, tokenizer: Tokenizer, questions: Sequence[dict]) -> dict[str, float]:
    """Which of its choices a model finds likeliest after each query: {"query", "choices", "gold": the index of the right one}.

    → accuracy, and accuracy_per_byte: of the likelihood divided by the choice's length, so that short ones have no advantage.
    """
    right, right_per_byte = 0, 0
    for question in tqdm(questions, "choosing", leave=False, unit="question", delay=2, disable=None):
        choices = question["choices"]
        found = [loglikelihood(model, tokenizer, question["query"], " " + choice) for choice in choices]
        per_byte = [value / len(choice.encode("utf-8")) for value, choice in zip(found, choices)]
        right += found.index(max(found)) == question["gold"]
        right_per_byte += per_byte.index(max(per_byte)) == question["gold"]
    return {"questions": len(questions), "accuracy": right / len(questions), "accuracy_per_byte": right_per_byte / len(questions)}


# ------------------------------------------------------------------ replies


@dataclass
class Replies:
    """Greedy replies to the first user turns of held-out conversations."""

    prompts: list[str]
    replies: list[str]
    lengths: list[int]  # tokens
    ended: list[bool]  # by the model's own <|end|>, within the limit

    def numbers(self) -> dict[str, float]:
        """What they are like; of n-grams of words, or of characters where there are no spaces between words.

        distinct_n: the share of different n-grams among all those of all replies. repetition_n: the share, of a mean
        reply, that is an n-gram which it has said before.
        """
        words = [words_of(reply) for reply in self.replies]
        return {
            "replies": len(self.replies),
            "ended": sum(self.ended) / max(len(self.ended), 1),
            "median_tokens": median(self.lengths) if self.lengths else 0,
            "distinct": len(set(self.replies)),
            "empty": self.replies.count(""),
            "distinct_1": distinct([gram for reply in words for gram in ngrams(reply, 1)]),
            "distinct_2": distinct([gram for reply in words for gram in ngrams(reply, 2)]),
            "repetition_4": mean([1 - distinct(ngrams(reply, 4)) for reply in words]) if words else 0.0,
        }


def about_replies(numbers: dict[str, float]) -> str:
    """Replies.numbers() in one line."""
    if not numbers["replies"]:
        return "no replies: no conversation has a user turn"
    return (f"{numbers['replies']} replies: {numbers['ended']:.0%} end by themselves, median length {numbers['median_tokens']:g} tokens, "
            f"{numbers['distinct']} distinct, {numbers['empty']} empty; distinct-2 {numbers['distinct_2']:.2f}, "
            f"repetition {numbers['repetition_4']:.2f}")


def words_of(text: str) -> list[str]:
    """Words and signs; each Chinese or Japanese character is a word."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]", text.lower())


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n words."""
    return list(zip(*(words[i:] for i in range(n))))


def distinct(items: Sequence) -> float:
    """The share of different ones; 1 of none."""
    return len(set(items)) / len(items) if items else 1.0


def greedy_replies(model: GPT, tokenizer: Tokenizer, conversations: list[Conversation], limit: int = 50,
                   max_new_tokens: int = 64, batch_size: int = 16) -> Replies:
    """Ask the first user turns of the conversations, the first `limit` different ones.

    At temperature 0, so that anybody gets the same; batch_size bounds the memory of the cache.
    """
    openings: dict[str, Conversation] = {}  # first user turn → it, after the system text if there is one
    for conversation in conversations:
        roles = [message["role"] for message in conversation]
        if "user" in roles:
            opening = conversation[: roles.index("user") + 1]
            openings.setdefault(opening[-1]["content"], [m for m in opening if m["role"] != "assistant"])
    prompts = list(openings)[:limit]
    ids = [render_prompt(openings[prompt], tokenizer)[-model.config.block_size :] for prompt in prompts]
    config = SampleConfig(max_new_tokens=max_new_tokens, temperature=0)
    new: list[list[int]] = []
    ended: list[bool] = []
    for start in tqdm(range(0, len(ids), batch_size), "replying", leave=False, unit="batch", delay=2, disable=None):
        rows, stopped = generate_ids(model, ids[start : start + batch_size], config, tokenizer.control.values())
        new, ended = new + rows, ended + stopped
    return Replies(prompts, [tokenizer.decode(row) for row in new], [len(row) for row in new], ended)


# ------------------------------------------------------------------ a whole split


def measure_chat(model: GPT, tokenizer: Tokenizer, conversations: list[Conversation], rows: Rows, batch_size: int,
                 worst: int = 5) -> dict:
    """A chat model on held-out conversations, in fp32: its scores, what its replies are like, its worst conversations."""
    total = math.ceil(len(rows) / batch_size)
    each: dict[int, Tensor] = {}
    result = score(model, tokenizer, rows.batches(batch_size), total=total, each=each)
    parts = processes.from_all_ranks(each)
    if processes.rank():  # the rest is for one to do
        return result
    replies = greedy_replies(model, tokenizer, conversations)
    losses = losses_of_sources(rows, batch_size, {number: nll for part in parts for number, nll in part.items()})
    hardest = sorted(losses, key=losses.__getitem__, reverse=True)[:worst]
    return result | {"replies": replies.numbers(), "worst": [
        {"loss": losses[source], "messages": conversations[source]} for source in hardest]}


def measure_classifier(model: GPTClassifier, examples: list[classifier.Labelled], rows: Rows, batch_size: int,
                       worst: int = 5) -> dict:
    """A classifier on held-out texts, in fp32: accuracy, macro F1, loss, a row for each label, and the texts it was surest and wrong about."""
    found = classifier.probabilities(model, rows, batch_size)
    truth = torch.tensor([model.labels.index(label) for _, label in examples])
    given = found[range(len(truth)), truth]  # what the true label was given
    hardest = [i for i in given.argsort().tolist()[:worst] if found[i].argmax() != truth[i]]
    return classifier.report(model.labels, truth.tolist(), found.argmax(dim=-1).tolist()) | {
        "loss": -given.clamp(min=1e-30).log().mean().item(),
        "worst": [{"text": examples[i][0], "label": examples[i][1], "taken_for": model.labels[int(found[i].argmax())],
                   "probability": found[i].max().item()} for i in hardest],
    }


def main() -> None:
    """Measure a checkpoint on a file that it has not seen; prints JSON."""
    parser = argparse.ArgumentParser(prog="python -m nanochat.evaluate", description=main.__doc__, epilog=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="run folder, Hugging Face GPT-2 folder, PEFT adapter, gpt2 …")
    parser.add_argument("data", type=Path, help="conversations, labelled texts, questions with choices, or plain text: told by their content")
    parser.add_argument("--text", action="store_true", help="take the data as plain text, whatever the model was fine-tuned for")
    parser.add_argument("--quantize", choices=["none", "int8"], default="none", help="int8: what sample.py --quantize int8 costs")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time (default: 8)")
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"--batch-size is {args.batch_size}, must be at least 1")
    model, tokenizer = checkpoint.load(args.checkpoint)
    model.to(runtime.pick_device())
    if args.quantize != "none":
        pack(model, args.quantize)
    block_size, rows = model.config.block_size, None
    if isinstance(model, GPTClassifier):
        if args.text:
            raise InputError(f"--text: {args.checkpoint} is a classifier")
        examples, problems = classifier.read(args.data)
        records.print_left_out(problems)
        if unknown := sorted({label for _, label in examples} - set(model.labels)):
            raise InputError(f"{args.data}: label {unknown[0]!r} is none of the model's: {records.shown(model.labels)}")
        rows = classifier.to_rows(examples, model.labels, tokenizer, block_size)
        result = measure_classifier(model, examples, rows, args.batch_size)
    elif not args.text and (questions := read_questions(args.data)):
        result = choose(model, tokenizer, questions)
    elif not args.text and tokenizer.chat_template:
        conversations, problems = formats.read(args.data)
        records.print_left_out(problems)
        rows = dialogue.to_rows(conversations, tokenizer, block_size)
        result = measure_chat(model, tokenizer, conversations, rows, args.batch_size)
    else:
        rows = text_rows((text for _, text in sources.documents(args.data)), tokenizer, block_size)
        result = score(model, tokenizer, rows.batches(args.batch_size), total=math.ceil(len(rows) / args.batch_size))
    if rows and rows.cuts:
        print(rows.cuts, file=sys.stderr)
    print(json.dumps(result, indent=2, ensure_ascii=False))


def read_questions(path: Path) -> list[dict]:
    """{"query", "choices", "gold"} records of a file; none if its first record is of another kind."""
    if path.suffix.lower() not in (".json", ".jsonl"):
        return []
    questions: list = []
    for line, record in records.read(path):
        fits = isinstance(record, dict) and isinstance(record.get("query"), str) and isinstance(choices := record.get("choices"), list) and (
            all(isinstance(choice, str) and choice for choice in choices) and record.get("gold") in range(len(choices)))
        if not fits and not questions and not (isinstance(record, dict) and "choices" in record):
            return []
        if not fits:
            raise InputError(f'{path}:{line}: a question has a "query", "choices" (texts) and "gold", the index of the right one')
        questions.append(record)
    return questions


if __name__ == "__main__":
    runtime.run_as_script(main)
