"""lora: what learns and what stays, merging, freezing, and PEFT's files in both directions."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import Killed, assert_same_end, call_main, flags_of, killed, save_base

import sample
from nanochat import InputError, checkpoint, lora, runs, training
from nanochat.classifier import with_label_head
from nanochat.generate import Chat, SampleConfig
from nanochat.lora import LINEARS, LoRAConfig, add_lora, freeze, is_adapted, plain_state
from nanochat.metrics import read_metrics
from nanochat.model import GPT, GPTConfig
from nanochat.tokenizer import CHAT_TOKENS

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
TOKENS = torch.tensor([[1, 96, 5, 93, 94, 7, 95, 2], [96, 96, 0, 1, 92, 93, 40, 41]])  # the last rows of 97 among them
TARGETS = torch.tensor([[96, 5, 93, 94, 7, 95, 2, 3], [96, -100, 1, 92, 93, 40, 41, 95]])


def with_additions(model: GPT, config: LoRAConfig | None = None, new_rows: int = 4) -> GPT:
    """LoRA on the model, with a B that matters and new rows that differ from the start."""
    add_lora(model, config or LoRAConfig(rank=4), new_rows)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B") or name == "wte.rows":
                p += 0.1 * torch.randn_like(p)
    return model


def copy_of(model: GPT, **changes) -> GPT:
    """A plain GPT of the same weights."""
    plain = GPT(model.config).to(model.wte.weight.dtype).eval()
    plain.load_state_dict({name: w.clone() for name, w in plain_state(model).items()} | changes)
    return plain


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


# ------------------------------------------------------------------ the formula


@pytest.mark.parametrize("targets", [LINEARS, LINEARS[:1], ("attn.c_proj", "mlp.c_proj")], ids=["all", "c_attn", "projections"])
@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["float64", "float32"])
def test_merged_additions_change_no_logit(make_model, dtype, most, targets):
    model = make_model(dtype)
    before = model(TOKENS)
    with_additions(model, LoRAConfig(rank=4, alpha=6.0, targets=targets))
    after = model(TOKENS)
    assert difference(copy_of(model)(TOKENS), after) < most
    assert difference(before, after) > 0.1  # they do something


def test_an_addition_is_alpha_over_rank_times_b_a(make_model):
    model = make_model()
    whole = {name: w.clone() for name, w in model.named_parameters()}
    with_additions(model, LoRAConfig(rank=4, alpha=6.0, targets=("mlp.c_fc",)))
    module = model.h[1].mlp.c_fc
    expected = whole["h.1.mlp.c_fc.weight"] + 6 / 4 * module.lora_B @ module.lora_A
    torch.testing.assert_close(plain_state(model)["h.1.mlp.c_fc.weight"], expected, rtol=0, atol=1e-12)
    assert torch.equal(plain_state(model, merge=False)["h.1.mlp.c_fc.weight"], whole["h.1.mlp.c_fc.weight"])
    assert plain_state(model).keys() == whole.keys()


def test_at_the_start_additions_change_nothing(make_model):
    model = make_model()
    before = model(TOKENS)
    add_lora(model, LoRAConfig(rank=4), new_rows=4)
    assert difference(model(TOKENS), before) < 1e-12  # (the two parts of the table are multiplied apart)
    plain = make_model()
    before = plain(TOKENS)
    add_lora(plain, LoRAConfig(rank=4), new_rows=0)
    assert torch.equal(plain(TOKENS), before)
    loss = model(TOKENS, TARGETS)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name.endswith("lora_B"))


def test_dropout_is_of_the_additions_input_and_only_in_training(make_model):
    model = with_additions(make_model(dropout=0.0), LoRAConfig(rank=4, lora_dropout=0.5))
    before = model(TOKENS)
    assert torch.equal(model(TOKENS), before)
    model.train()
    dropped = model(TOKENS)
    assert difference(dropped, before) > 1e-3 and difference(model(TOKENS), dropped) > 1e-3
    for module in model.modules():
        if isinstance(module, lora.LoRALinear):
            torch.nn.init.zeros_(module.lora_B)
    assert torch.equal(model(TOKENS), model(TOKENS))  # the frozen path drops nothing


def test_only_the_additions_and_the_new_rows_learn(make_model):
    model = make_model()
    before = {name: w.clone() for name, w in plain_state(model).items()}
    with_additions(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"wte.rows"} | {f"h.{i}.{name}.lora_{x}" for i in range(2) for name in LINEARS for x in "AB"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS, TARGETS).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in learning)
        assert torch.equal(p, start[name]) == (name not in learning), name
    base = plain_state(model, merge=False)
    assert all(torch.equal(base[name], w) for name, w in before.items() if name != "wte.weight")
    assert torch.equal(base["wte.weight"][:93], before["wte.weight"][:93])
    assert (base["wte.weight"][93:] != before["wte.weight"][93:]).any(dim=1).all()


@pytest.mark.parametrize("new_rows", [1, 4, 96])
def test_rows_that_learn_apart_are_the_plain_table(make_model, new_rows):
    """Embedding, head, loss, and the gradient of the rows from both ends."""
    model = make_model()
    plain = copy_of(model)
    freeze(model, ("0",), new_rows)
    assert torch.equal(model.wte(TOKENS), plain.wte(TOKENS))
    assert torch.equal(model.wte.weight, plain.wte.weight)
    x = torch.randn(2, 3, 36, dtype=torch.float64)
    assert difference(model.head(x), plain.head(x)) < 1e-12
    assert difference(model(TOKENS), plain(TOKENS)) < 1e-12
    for each in (model, plain):
        each(TOKENS, TARGETS).backward()
    torch.testing.assert_close(model.wte.rows.grad, plain.wte.weight.grad[-new_rows:], rtol=1e-9, atol=1e-12)
    assert model.wte.frozen.grad is None and model.h[0].attn.c_attn.weight.grad is None


def test_a_model_with_additions_uses_the_cache_and_recomputes_like_any(make_model):
    model = with_additions(make_model())
    cache = model.new_cache(2)
    parts = [model.head(model.features(TOKENS[:, i : i + 4], cache=cache)) for i in (0, 4)]
    assert difference(torch.cat(parts, dim=1), model(TOKENS)) < 1e-12
    model.train()
    model(TOKENS, TARGETS).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model.recompute = True
    model(TOKENS, TARGETS).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip((p for p in model.parameters() if p.requires_grad), expected))


# ------------------------------------------------------------------ freezing


@pytest.mark.parametrize("learn, names", [
    (("0",), set()),
    (("1",), {"h.1.", "ln_f."}),
    (("7",), {"h.0.", "h.1.", "ln_f."}),
    (("attn.",), {"h.0.attn.", "h.1.attn."}),
    (("1", "ln_1", "wpe"), {"h.1.", "ln_f.", "h.0.ln_1.", "wpe."}),
    (("mlp.c_fc.bias",), {"h.0.mlp.c_fc.bias", "h.1.mlp.c_fc.bias"}),
])
def test_what_learns_is_what_was_named_and_the_new_rows(make_model, learn, names):
    model = make_model()
    freeze(model, learn, 4)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"wte.rows"} | {name for name, _ in model.named_parameters() if name.startswith(tuple(names))}


def test_a_named_table_learns_as_a_whole(make_model):
    model = make_model()
    freeze(model, ("wte",), 4)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["wte.weight"]


def test_a_label_head_learns_in_every_method(make_model):
    for method in (lambda m: freeze(m, ("0",), 4), lambda m: add_lora(m, LoRAConfig(), 4)):
        model = with_label_head(make_model(torch.float32), ["no", "yes"])
        before = model(TOKENS)
        method(model)
        assert model(TOKENS).shape == (2, 8, 2) and difference(model(TOKENS), before) < 1e-6
        assert model.score.weight.requires_grad and not model.wpe.weight.requires_grad


def test_what_names_nothing_is_refused(make_model):
    with pytest.raises(InputError, match=r"--learn attention is a part of no weight's name; names are wte.weight, wpe.weight, h.0"):
        freeze(make_model(), ("1", "attention"), 4)


@pytest.mark.parametrize("wrong, said", [
    ({"rank": 0}, "--rank is 0, must be from 1 to 100,000"),
    ({"alpha": float("nan")}, "--alpha is nan"),
    ({"lora_dropout": 1.0}, r"--lora-dropout is 1.0, must be in \[0, 1\)"),
    ({"targets": ("c_attn",)}, "--targets is c_attn, must be some of attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    ({"targets": ()}, "--targets is empty"),
])
def test_wrong_settings_are_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        LoRAConfig(**wrong)


# ------------------------------------------------------------------ PEFT's files


@pytest.fixture
def base(tokenizer, make_model):
    """A chat model of the tokenizer's vocabulary, as one has it before LoRA; ids for its logits."""
    model = make_model(torch.float32, noise=0.05, vocab_size=tokenizer.vocab_size)
    ids = torch.tensor([[*range(0, 380, 24), *tokenizer.control.values()]])
    return model, ids


@pytest.fixture
def run(base, tokenizer, tmp_path):
    """A run folder with LoRA, as training leaves it, and the logits of its model."""
    model, ids = base
    with_additions(model, LoRAConfig(rank=4, alpha=6.0), len(CHAT_TOKENS))
    out = tmp_path / "out"
    runs.save(out, 3, model, tokenizer, settings={}, results={}, resume={"progress": {"step": 3}})
    runs.add_results(out, 3, {}, best=True)
    return out, ids, model(ids).detach()


def hugging_face(out: Path) -> torch.nn.Module:
    """The base of a run folder with the best adapter on it, as PEFT opens it."""
    return peft.PeftModel.from_pretrained(transformers.GPT2LMHeadModel.from_pretrained(out / "base"), out / "best").eval()


def test_peft_opens_what_we_wrote(run):
    out, ids, logits = run
    about = json.loads((out / "best" / "adapter_config.json").read_text(encoding="utf-8"))
    assert about["fan_in_fan_out"] and about["task_type"] == "CAUSAL_LM" and about["base_model_name_or_path"] == str(out / "base")
    adapted = hugging_face(out)
    assert difference(adapted(ids).logits, logits) < 1e-4
    merged = adapted.merge_and_unload()
    assert difference(merged(ids).logits, logits) < 1e-4
    assert merged.lm_head.weight.data_ptr() == merged.transformer.wte.weight.data_ptr()
    plain = transformers.GPT2LMHeadModel.from_pretrained(out / "base")
    assert difference(plain(ids).logits, logits) > 0.1  # the base has none of it


def test_transformers_opens_the_best_step_by_itself(run):
    out, ids, logits = run
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "best").eval()
    assert difference(model(ids).logits, logits) < 1e-4
    assert len(transformers.AutoTokenizer.from_pretrained(out / "best")) == logits.size(-1)


def test_the_step_opens_merged_or_apart(run, tokenizer):
    out, ids, logits = run
    merged, same = checkpoint.load(out)
    assert not is_adapted(merged) and same.hash == tokenizer.hash and same.chat_template
    assert difference(merged(ids), logits) < 1e-4 and all(p.requires_grad for p in merged.parameters())
    apart, _ = checkpoint.load(out, merge=False)
    assert is_adapted(apart) and torch.equal(apart(ids), logits)
    assert {n for n, p in apart.named_parameters() if p.requires_grad} == {
        "wte.rows", *(f"h.{i}.{name}.lora_{x}" for i in range(2) for name in LINEARS for x in "AB")}


def test_a_step_is_the_adapter_alone_and_the_base_is_whole(run, tokenizer):
    out, _, _ = run
    tensors = load_file(out / "best" / "adapter_model.safetensors")
    assert not (out / "best" / "model.safetensors").exists()
    assert tensors["base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"].shape == (4, 36)
    assert sum(w.numel() for w in tensors.values()) == 4 * 36 + 2 * 4 * (4 + 2 + 5 + 5) * 36
    base = load_file(out / "base" / "model.safetensors")
    assert base["transformer.wte.weight"].shape == (tokenizer.vocab_size, 36)
    modes = {path.stat().st_mode & 0o777 for path in (out / "best").iterdir() if path.is_file()}
    assert len(modes) == 1


def test_a_run_folder_that_was_moved_still_opens(run, tmp_path, monkeypatch):
    out, ids, logits = run
    shutil.move(out, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere" / "best")
    for source in (tmp_path / "elsewhere", ".", "../../elsewhere", tmp_path / "elsewhere" / "step-000003"):
        assert difference(checkpoint.load(source)[0](ids), logits) < 1e-4


def test_a_damaged_base_or_adapter_is_told(run):
    out, _, _ = run
    for name in ("base/model.safetensors", "step-000003/adapter_model.safetensors"):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[:-4] + b"\0\0\0\1")
        with pytest.raises(InputError, match=f"{name}: not as it was saved"):
            checkpoint.load(out)
        (out / name).write_bytes(content)
    checkpoint.load(out)
    shutil.rmtree(out / "base")
    with pytest.raises(InputError, match=f"{out / 'base'}: no such checkpoint"):
        checkpoint.load(out)


def test_a_classifiers_adapter_opens_in_peft(tokenizer, make_model, tmp_path):
    model = with_label_head(make_model(torch.float32, noise=0.05, vocab_size=tokenizer.vocab_size), ["bad", "good", "so so"])
    with_additions(model, new_rows=len(CHAT_TOKENS))
    runs.save(tmp_path / "out", 1, model, tokenizer, settings={}, results={})
    ids = torch.tensor([[tokenizer.end_of_text, 7, 9, tokenizer.control["<|end|>"]]])
    logits = model(ids)[:, -1]
    assert json.loads((tmp_path / "out" / "last" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "out" / "base")
    torch.nn.init.zeros_(theirs.score.weight)  # the adapter brings it
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out" / "last").eval()
    assert difference(theirs(ids).logits, logits) < 1e-4
    again, _ = checkpoint.load(tmp_path / "out")
    assert again.labels == ["bad", "good", "so so"] and difference(again(ids)[:, -1], logits) < 1e-4


def trained_by_peft(folder: Path, ids: torch.Tensor, task: str = "CAUSAL_LM", **settings) -> Path:
    """An adapter on the model of `folder` that PEFT made, trained and saved; → its folder."""
    kind = transformers.GPT2LMHeadModel if task == "CAUSAL_LM" else transformers.GPT2ForSequenceClassification
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["c_attn"]} | settings
    adapted = peft.get_peft_model(kind.from_pretrained(folder), peft.LoraConfig(task_type=task, fan_in_fan_out=True, **settings))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(ids, labels=ids if task == "CAUSAL_LM" else torch.tensor([1])).loss.backward()
        optimizer.step()
    adapted.save_pretrained(folder.parent / "adapter")
    torch.save(adapted.eval()(ids).logits.detach(), folder.parent / "logits.pt")
    return folder.parent / "adapter"


@pytest.fixture
def plain_folder(base, tokenizer, tmp_path):
    """The base as a Hugging Face folder, and ids for its logits."""
    (tmp_path / "plain").mkdir()
    checkpoint.write(tmp_path / "plain", base[0], tokenizer)
    return tmp_path / "plain", base[1]


@pytest.mark.parametrize("rows", [None, [380, 381, 382, 383], [5, 0, 383], {"wte": [382, 7]}], ids=["no rows", "last", "any", "named"])
@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj", "c_fc"], ["attn.c_proj"]], ids=["c_attn", "all", "attn.c_proj"])
def test_what_peft_trained_opens_here(plain_folder, targets, rows):
    folder, ids = plain_folder
    adapter = trained_by_peft(folder, ids, target_modules=targets, trainable_token_indices=rows)
    logits = torch.load(folder.parent / "logits.pt")
    assert difference(checkpoint.load(folder)[0](ids), logits) > 1e-3
    for merge in (True, False):
        assert difference(checkpoint.load(adapter, merge)[0](ids), logits) < 1e-4


def test_a_classifier_that_peft_trained_opens_here(tokenizer, make_model, tmp_path):
    model = with_label_head(make_model(torch.float32, noise=0.05, vocab_size=tokenizer.vocab_size), ["no", "yes"])
    (tmp_path / "plain").mkdir()
    checkpoint.write(tmp_path / "plain", model, tokenizer)
    ids = torch.tensor([[tokenizer.end_of_text, 7, 9, tokenizer.control["<|end|>"]]])
    adapter = trained_by_peft(tmp_path / "plain", ids, "SEQ_CLS")
    ours, _ = checkpoint.load(adapter)
    assert ours.labels == ["no", "yes"] and not torch.equal(ours.score.weight, model.score.weight)
    assert difference(ours(ids)[:, -1], torch.load(tmp_path / "logits.pt")) < 1e-4


@pytest.mark.parametrize("settings, said", [
    ({"use_dora": True}, "use_dora is True, must be False"),
    ({"use_rslora": True}, "use_rslora is True, must be False"),
    ({"rank_pattern": {"h.0.attn.c_attn": 2}}, "rank_pattern is {'h.0.attn.c_attn': 2}, must be {}"),
    ({"alpha_pattern": {"h.0.attn.c_attn": 2}}, "alpha_pattern is "),
    ({"bias": "all"}, "bias is 'all', must be 'none'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', must be true"),
    ({"modules_to_save": ["wte"]}, "1 of its 5 tensors fit nothing in the base, the first is wte.weight"),
    ({"target_modules": ["wte"]}, "2 of its 2 tensors fit nothing in the base, the first is wte.lora_embedding_A"),
    ({"target_modules": ["lm_head"]}, "lora_A and lora_B of lm_head do not fit the base"),
], ids=["DoRA", "rsLoRA", "ranks", "alphas", "bias", "PiSSA", "table", "embedding", "head"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, of what is refused
def test_what_means_something_else_is_refused_by_name(plain_folder, settings, said):
    folder, ids = plain_folder
    adapter = trained_by_peft(folder, ids, **settings)
    with pytest.raises(InputError) as refused:
        checkpoint.load(adapter)
    assert said in str(refused.value) and str(adapter) in str(refused.value) and "\n" not in str(refused.value)


A = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
B = A.replace("lora_A", "lora_B")
ROWS = "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize("change, said", [
    (lambda t, c: t.update({A: t[A][:, 1:]}), "lora_A and lora_B of h.0.attn.c_attn do not fit the base, which wants ((4, 36), (108, 4))"),
    (lambda t, c: t.update({A: t[A][:3], B: t[B][:, :3]}), "h.0.attn.c_attn do not fit"),
    (lambda t, c: t.pop(B), "h.0.attn.c_attn do not fit"),
    (lambda t, c: t.pop(A), "1 of its 16 tensors fit nothing in the base, the first is h.0.attn.c_attn.lora_B.weight"),
    (lambda t, c: t.update({A.replace("h.0", "h.2"): t.pop(A)}), "lora_A and lora_B of h.2.attn.c_attn do not fit"),
    (lambda t, c: t.update({A.replace("c_attn", "q_proj"): t.pop(A)}), "h.0.attn.q_proj do not fit"),
    (lambda t, c: t.update({ROWS: t[ROWS][:3]}), "(3, 36) token rows for ids [380, 381, 382, 383] do not fit the base's 384 rows of 36"),
    (lambda t, c: c.update(trainable_token_indices=[380, 381, 382, 384]), "do not fit the base's 384 rows"),
    (lambda t, c: c.update(trainable_token_indices=3), "token rows for ids 3 do not fit"),
    (lambda t, c: t.update({"base_model.model.score.weight": torch.zeros(2, 36)}), "the first is score.weight"),
    (lambda t, c: t.clear(), "0 of its 0 tensors fit nothing"),
    (lambda t, c: c.update(r=None), "r is None and lora_alpha 6.0, must be numbers"),
    (lambda t, c: c.update(peft_type="IA3"), "peft_type is 'IA3', must be 'LORA'"),
    (lambda t, c: c.update(base_model_name_or_path=None), "base_model_name_or_path is None, must name the base"),
    (lambda t, c: c.update(base_model_name_or_path=c["base_model_name_or_path"].replace("base", "best")), "is an adapter too"),
])
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(run, change, said):
    out, _, _ = run
    step = out / "step-000003"
    (step / "SHA256SUMS").unlink()
    tensors, config = load_file(step / "adapter_model.safetensors"), json.loads((step / "adapter_config.json").read_text())
    change(tensors, config)
    save_file({name: w.contiguous() for name, w in tensors.items()}, step / "adapter_model.safetensors")
    (step / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as refused:
        checkpoint.load(out)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_truncated_adapter_is_told(run):
    out, _, _ = run
    path = out / "step-000003" / "adapter_model.safetensors"
    (path.parent / "SHA256SUMS").unlink()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="adapter_model.safetensors: damaged"):
        checkpoint.load(out)
    path.unlink()
    with pytest.raises(InputError, match="no adapter_model.safetensors"):
        checkpoint.load(out)


def test_gpt2s_rows_grow_by_the_chat_tokens_and_the_base_beside_the_adapter_has_them(tokenizer, tmp_path):
    """What fine-tuning does with a model that never saw a dialogue."""
    old = len(tokenizer.token_bytes) - len(CHAT_TOKENS)
    model = GPT(GPTConfig(vocab_size=old, block_size=32, n_layer=1, n_head=2, n_embd=16)).eval()
    before = model.wte.weight.clone()
    model.grow(tokenizer.vocab_size)
    with_additions(model, new_rows=len(CHAT_TOKENS))
    runs.save(tmp_path / "out", 1, model, tokenizer, settings={}, results={})
    runs.add_results(tmp_path / "out", 1, {}, best=True)
    ids = torch.tensor([[3, *range(old - 1, old + 4)]])
    assert difference(hugging_face(tmp_path / "out")(ids).logits, model(ids)) < 1e-5
    again, _ = checkpoint.load(tmp_path / "out")
    assert torch.equal(again.wte.weight[:old], before) and torch.equal(again.wte.weight[old:], model.wte.rows)


# ------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer) -> Path:
    """A folder with a model to fine-tune and dialogues."""
    place = tmp_path_factory.mktemp("lora")
    save_base(place, tokenizer)
    shutil.copy(ROOT / "data" / "samples" / "dialogues.jsonl", place)
    return place


@pytest.fixture
def start(place, monkeypatch):
    """start(…flags): finetune.py's main() in this process, in fp32."""
    monkeypatch.chdir(place)
    return partial(call_main, monkeypatch, "finetune.py", speedup=0.1)


METHODS = {
    "lora": ["--method", "lora", "--rank", "4", "--lora-dropout", "0.1"],
    "freeze": ["--method", "freeze", "--learn", "1", "h.0.ln_", "--optimizer", "adamw"],
    "freeze 0": ["--method", "freeze", "--learn", "0"],
}


@pytest.fixture
def whole(place, start):
    """whole("lora") → the folder of a run that was never stopped; each is run once."""

    def whole(method: str) -> Path:
        out = place / f"whole-{method.replace(' ', '-')}"
        if not out.exists():
            start(*flags_of("finetune.py"), *METHODS[method], "--out", out)
        return out

    return whole


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_resumes_to_the_same_end(method, start, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as dying, pytest.raises(Killed):
        killed(dying, training, "learning_rate_factor", lambda step, *_: step == 5)
        start(*flags_of("finetune.py"), *METHODS[method], "--out", tmp_path / "cut")
    start("--resume", "--out", tmp_path / "cut")
    assert_same_end(whole(method), tmp_path / "cut")
    assert len(read_metrics(tmp_path / "cut" / "metrics.jsonl")) == 8


def test_a_run_with_additions_leaves_small_steps_and_a_base(whole, place):
    out = whole("lora")
    assert {path.name for path in out.iterdir()} >= {"base", "best", "last", "report.md", "report.json", "metrics.jsonl"}
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (out / "last", out / "base")]
    assert sizes[0] < sizes[1] / 3
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    learned = 4 * 32 + 2 * 4 * (4 + 2 + 5 + 5) * 32
    assert report["run"]["method"] == "lora" and report["run"]["parameters that learn"] == learned
    original = load_file(place / "base" / "last" / "model.safetensors")
    base = load_file(out / "base" / "model.safetensors")
    for name, w in original.items():
        assert torch.equal(base[name][:380], w[:380]), name


@pytest.mark.parametrize("method, learned", [("freeze", ("h.1.", "h.0.ln_", "ln_f.")), ("freeze 0", ("nothing",))])
def test_frozen_weights_stay_bit_for_bit(whole, place, method, learned):
    before, after = (load_file(step / "last" / "model.safetensors") for step in (place / "base", whole(method)))
    for name, w in before.items():
        changes = name.removeprefix("transformer.").startswith(learned)
        assert torch.equal(w[:380], after[name][:380]) != changes, name
    rows = "transformer.wte.weight"
    assert (before[rows][380:] != after[rows][380:]).any()


def test_an_adapted_run_is_converted_asked_and_gone_on_from(whole, start, tmp_path, capsys, monkeypatch):
    out = whole("lora")
    model, model_tokenizer = checkpoint.load(out)
    for script, *flags in ((checkpoint, out, tmp_path / "merged"),
                           (sample, "--checkpoint", out, "--prompt", "Hello", "--max-new-tokens", 3, "--temperature", 0)):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        script.main()
    config = SampleConfig(max_new_tokens=3, temperature=0)
    assert capsys.readouterr().out.endswith("".join(Chat(model, model_tokenizer, config).ask("Hello")) + "\n")
    ids = torch.arange(0, 384, 9)[None]
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    assert difference(theirs(ids).logits, model(ids)) < 1e-5
    start(*flags_of("finetune.py"), "--init", out, "--method", "freeze", "--learn", "0", "--max-steps", "1", "--out", tmp_path / "more")
    more, _ = checkpoint.load(tmp_path / "more")
    for name, w in model.named_parameters():
        assert torch.equal(more.get_parameter(name)[:380], w[:380]), name


def test_overwriting_removes_the_base(whole, start, tmp_path):
    shutil.copytree(whole("lora"), tmp_path / "out", symlinks=True)
    start(*flags_of("finetune.py"), "--max-steps", "1", "--out", tmp_path / "out", "--overwrite")
    assert not (tmp_path / "out" / "base").exists() and (tmp_path / "out" / "best" / "model.safetensors").exists()


def test_a_run_resumed_where_the_start_is_gone_still_reports(whole, start, tmp_path, monkeypatch, place, capsys):
    shutil.copytree(whole("lora"), tmp_path / "out", symlinks=True)
    shutil.copytree(place, tmp_path / "place", ignore=lambda _, names: {"base", *(n for n in names if n.startswith("whole"))})
    monkeypatch.chdir(tmp_path / "place")
    start("--resume", "--out", tmp_path / "out")
    said = capsys.readouterr()
    assert "base: no such folder here" in said.err and said.out.splitlines()[-1].startswith("wrote")
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["before"] is None


def test_an_unknown_part_of_a_name_is_one_line(start, tmp_path):
    with pytest.raises(InputError, match="--learn nowhere is a part of no weight's name"):
        start(*flags_of("finetune.py"), "--method", "freeze", "--learn", "nowhere", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
