"""docs/glossary.md: each term is in the code, one word stands for one thing, and the names elsewhere are theirs."""

import ast
import inspect
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, TrainingArguments

import sample
import train
from nanochat import checkpoint, generate, model
from nanochat.generate import SampleConfig
from nanochat.model import GPT, IGNORED, GPTConfig
from nanochat.training import TrainConfig

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "glossary.md"
CHINESE = [ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.zh-CN.md"))]


def tables() -> dict[str, list[list[str]]]:
    """English heading → rows of its table, without the table's own first two lines."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.strip("# ").split(" · ")[0]
        elif line.startswith("|"):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return {heading: rows[2:] for heading, rows in found.items()}


TABLES = tables()
TERMS = [row for rows in TABLES.values() for row in rows if len(row) == 5]


@cache
def names_in(path: Path) -> set[str]:
    """What a file defines at its top, and Class.name for a class's methods and fields."""
    found = set()

    def define(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(prefix + node.name)
            for target in [*getattr(node, "targets", []), getattr(node, "target", None)]:
                if isinstance(target, ast.Name):
                    found.add(prefix + target.id)
            if isinstance(node, ast.ClassDef):
                define(node.body, f"{node.name}.")

    define(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def test_sixty_terms_and_more_each_once_in_either_language():
    assert len(TERMS) >= 60
    for language in (0, 1):
        names = [row[language].lower() for row in TERMS]
        assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]


@pytest.mark.parametrize("row", TERMS, ids=lambda row: row[0])
def test_a_term_is_where_the_page_says(row):
    label, link, name = re.fullmatch(r"\[(.+)\]\(\.\./(.+)\) `(.+)`", row[4]).groups()
    assert link.endswith(label)
    assert name in names_in(ROOT / link), f"{link} has no {name}"


def test_a_sentence_in_each_language():
    chinese = re.compile(r"[\u4e00-\u9fff]")
    for _, _, english, other, _ in TERMS:
        assert not chinese.search(english), english
        assert chinese.search(other), other


def test_the_chinese_pages_use_one_word_for_one_thing():
    used = {row[1] for row in TERMS}
    for word, rivals in TABLES["Words that the Chinese pages do not use"]:
        assert word in used, f"{word} is no term of the page"
        for rival in rivals.split("、"):
            for page in CHINESE:
                assert rival not in page.read_text(encoding="utf-8"), f"{page.name} says {rival} for {word}"
            assert rival not in "".join(row[1] + row[3] for row in TERMS), rival


def quoted(cell: str) -> list[str]:
    return re.findall(r"`(.+?)`", cell)


@pytest.mark.parametrize("heading, ours, theirs, same", [
    ("Settings of a network", [GPTConfig], GPT2Config(), {"n_layer", "n_head", "n_embd"}),
    ("Settings of a run", [TrainConfig, train.Settings], TrainingArguments, {"learning_rate", "weight_decay"}),
    ("Settings of sampling", [SampleConfig, sample.Settings], GenerationConfig(), {"max_new_tokens", "top_k"}),
])
def test_settings_have_these_names(heading, ours, theirs, same):
    known = {field.name for kind in ours for field in fields(kind)}
    for name in same:
        assert f"`{name}`" in PAGE.read_text(encoding="utf-8") and name in known and hasattr(theirs, name), name
    for our_cell, _, their_cell, _ in TABLES[heading]:
        assert set(quoted(our_cell)) <= known, our_cell
        assert all(hasattr(theirs, name) for name in quoted(their_cell)), their_cell


def test_the_network_settings_are_those_that_checkpoints_translate():
    rows = [[quoted(cell) for cell in row[:3]] for row in TABLES["Settings of a network"]]
    same = {name: name for name in ("n_layer", "n_head", "n_embd")}
    assert {theirs[0]: ours[0] for ours, _, theirs in rows if ours} | same == checkpoint.CONFIG_NAMES
    assert {name[0] for _, name, _ in rows if name} == {"block_size", "bias", "vocab_size", "dropout"}, "model_args in its ckpt.pt"


@pytest.fixture(scope="module")
def networks() -> tuple[GPT, GPT2LMHeadModel]:
    """One small network, ours and Hugging Face's."""
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=24, n_layer=1, n_head=3, n_embd=36)).double().eval()
    ours = GPT(GPTConfig(vocab_size=97, block_size=24, n_layer=1, n_head=3, n_embd=36)).double().eval()
    renamed = {checkpoint.name_here(name): p.T if name.endswith(checkpoint.TRANSPOSED) else p for name, p in theirs.state_dict().items()}
    ours.load_state_dict({name: p for name, p in renamed.items() if name})
    return ours, theirs


def test_the_tensors_have_these_names_and_shapes(networks):
    ours, theirs = (network.state_dict() for network in networks)
    assert set(theirs) == {"transformer." + name for name in ours} | {"lm_head.weight"}
    sizes = {"V": 97, "C": 36, "3C": 108, "4C": 144}
    for our_cell, nanogpt, hugging_face, note in TABLES["Tensors"]:
        [name], [their_name] = quoted(our_cell), quoted(hugging_face)
        assert quoted(nanogpt) == [their_name]
        transposed = name.endswith(checkpoint.TRANSPOSED)
        assert transposed == ("transformers" in note), name
        assert torch.equal(ours[name], theirs[their_name].T if transposed else theirs[their_name]), name
        if note.startswith("("):
            assert [sizes[size] for size in re.findall(r"\w+", note.split(")")[0])] == list(ours[name].shape), name


def test_the_calls_do_what_the_page_says(networks):
    ours, theirs = networks
    text = torch.randint(97, (2, 9))
    torch.testing.assert_close(ours(text), theirs(text).logits)
    labels = text.masked_fill(torch.rand(2, 9) < 0.3, IGNORED)
    shifted = ours(text[:, :-1], labels[:, 1:])  # a sum, and the shift is the data's business
    torch.testing.assert_close((shifted / (labels[:, 1:] != IGNORED).sum()).float(), theirs(text, labels=labels).loss)
    assert IGNORED == -100 and model.KVCache and generate.generate and checkpoint.load and theirs.generate and theirs.from_pretrained
    assert {"input_ids", "labels", "past_key_values"} <= set(inspect.signature(theirs.forward).parameters)
