"""checkpoint: the same network as Hugging Face's, both ways; what does not fit, or would run code, is refused."""

import json
import math
import os
import re
import stat
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from nanochat import InputError, checkpoint
from nanochat import model as network
from nanochat.generate import SampleConfig, generate
from nanochat.model import GPT
from nanochat.tokenizer import CHAT_TEMPLATE, CHAT_TOKENS, END_OF_TEXT, Tokenizer

ROOT = Path(__file__).parent.parent
TOKENS = torch.tensor([[3, 1, 380, 1, 5, 92, 65, 35, 8, 97], [9, 7, 9, 3, 238, 46, 264, 338, 327, 95]])


@pytest.fixture(scope="module")
def hugging_face() -> GPT2LMHeadModel:
    """A GPT-2 whose sizes all differ and whose every tensor matters: + N(0, 0.1)."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=384, n_positions=24, n_layer=2, n_head=3, n_embd=36, attn_implementation="eager")
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture
def folder(hugging_face, tokenizer, tmp_path) -> Path:
    """It, saved by Hugging Face, beside a tokenizer of as many ids."""
    hugging_face.save_pretrained(tmp_path / "gpt2")
    tokenizer.save(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def expected(hugging_face) -> torch.Tensor:
    """Its logits in float64."""
    return logits_of(hugging_face)


@pytest.fixture
def model(make_model) -> GPT:
    """One of ours, in fp32 as `save` writes it."""
    return make_model(dtype=torch.float32, vocab_size=384)


@torch.no_grad()
def logits_of(model, tokens=TOKENS) -> torch.Tensor:
    """Logits in float64, of Hugging Face's model or ours."""
    dtype = next(model.parameters()).dtype
    out = model.double()(tokens)
    model.to(dtype)
    return out if isinstance(out, torch.Tensor) else out.logits


def opened(path: Path) -> torch.Tensor:
    """Logits in float64 of what `load` makes of a checkpoint."""
    return logits_of(checkpoint.load(path)[0])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def refusal(path: Path) -> str:
    """The one line with which `load` refuses a checkpoint."""
    with pytest.raises(InputError) as info:
        checkpoint.load(path)
    message = str(info.value)
    assert "\n" not in message
    return message


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_weights(folder: Path, change) -> None:
    """Apply change(tensors) to the model.safetensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: w.clone().contiguous() for name, w in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save(out: Path, step: int, model: GPT, tokenizer: Tokenizer, **options) -> Path:
    return checkpoint.save(out, step, model, tokenizer, settings={}, results={}, **options)


# the same network as Hugging Face's


def test_logits_equal_hugging_face(folder, expected):
    assert difference(opened(folder), expected) < 1e-9


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_logits_equal_hugging_face_with_activation(tmp_path, tokenizer, activation):
    config = GPT2Config(vocab_size=384, n_positions=24, n_layer=1, n_head=3, n_embd=36, activation_function=activation)
    theirs = GPT2LMHeadModel(config).eval()
    nn.init.normal_(theirs.transformer.h[0].mlp.c_fc.bias)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert difference(opened(tmp_path), logits_of(theirs)) < 1e-9


def erf_gelu(model, patch):
    model.config.activation = "gelu"


def other_epsilon(model, patch):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def transposed_square(model, patch):
    weight = model.h[1].attn.c_proj.weight
    weight.data = weight.data.t().contiguous()


def unscaled_scores(model, patch):
    attention = network.attention
    patch.setattr(network, "attention", lambda q, k, v, *rest: attention(q * math.sqrt(q.size(-1)), k, v, *rest))


def swapped_q_and_k(model, patch):
    for p in model.h[0].attn.c_attn.parameters():
        q, k, v = p.data.chunk(3)
        p.data = torch.cat([k, q, v])


def zeroed_bias(model, patch):
    model.h[0].mlp.c_proj.bias.data.zero_()


MUTATIONS = [erf_gelu, other_epsilon, transposed_square, unscaled_scores, swapped_q_and_k, zeroed_bias]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_logits_no_longer_equal_after(mutation, folder, expected, monkeypatch):
    model = checkpoint.load(folder)[0]
    mutation(model, monkeypatch)
    assert difference(logits_of(model), expected) > 1e-6


def test_every_tensor_moves_the_logits(folder, expected):
    model = checkpoint.load(folder)[0]
    for name, p in model.named_parameters():
        kept, p.data = p.data, torch.zeros_like(p)
        assert difference(logits_of(model), expected) > 1e-6, name
        p.data = kept


def test_the_head_is_the_token_table_after_loading(folder):
    model = checkpoint.load(folder)[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    with torch.no_grad():
        model.wte.weight.zero_()
    assert logits_of(model).abs().max() == 0


# strict loading


def without_prefix(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


def with_head(tensors):
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]


def with_masks(tensors):
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(24, 24).tril()[None, None]
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)


def with_masks_without_prefix(tensors):
    with_masks(tensors)
    with_head(tensors)
    without_prefix(tensors)


HARMLESS = [without_prefix, with_head, with_masks, with_masks_without_prefix]


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.__name__)
def test_weights_load(change, folder, expected):
    edit_weights(folder, change)
    assert difference(opened(folder), expected) < 1e-9


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_names_from_compile_and_ddp_load(prefix, folder, expected):
    with_prefix = {}
    edit_weights(folder, lambda tensors: (with_head(tensors), with_prefix.update(tensors)))
    torch.save({prefix + name: w for name, w in with_prefix.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert difference(opened(folder), expected) < 1e-9


def test_names_from_compiled_blocks_load(folder, expected):
    def compiled_blocks(tensors):
        for name in list(tensors):
            tensors[re.sub(r"(h\.\d+\.)", r"\1_orig_mod.", name)] = tensors.pop(name)

    edit_weights(folder, compiled_blocks)
    assert difference(opened(folder), expected) < 1e-9


LN, ATTN = "transformer.h.1.ln_1.bias", "transformer.h.0.attn.c_attn.weight"
BAD_WEIGHTS = {
    "missing h.1.ln_1.bias": lambda t: t.pop(LN),
    "missing wte.weight": lambda t: t.pop("transformer.wte.weight"),
    "unexpected h.2.ln_1.bias": lambda t: t.update({"transformer.h.2.ln_1.bias": t[LN]}),
    "unexpected score.weight": lambda t: t.update({"score.weight": torch.ones(2, 36)}),
    "unexpected h.0.attn.bias.x": lambda t: t.update({"transformer.h.0.attn.bias.x": t[LN]}),
    r"h.0.attn.c_attn.weight is \(36, 108\)": lambda t: t.update({ATTN: t[ATTN].t()}),
    r"wpe.weight is \(23, 36\), must be \(24, 36\)": lambda t: t.update(
        {"transformer.wpe.weight": t["transformer.wpe.weight"][:23]}
    ),
    "lm_head.weight differs from wte.weight": lambda t: t.update({"lm_head.weight": torch.ones(384, 36)}),
    "module.lm_head.weight differs from wte.weight": lambda t: t.update({"module.lm_head.weight": torch.ones(384, 36)}),
    "h.1.ln_1.bias twice": lambda t: t.update({LN.removeprefix("transformer."): t[LN] + 1}),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_do_not_fit_stop_with_their_name(name, folder):
    edit_weights(folder, BAD_WEIGHTS[name])
    message = refusal(folder)
    assert re.search(name, message) and str(folder) in message


BAD_FIELDS = {
    "model_type": "gpt_neo",
    "activation_function": "relu",
    "n_inner": 100,
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "reorder_and_upcast_attn": True,
    "add_cross_attention": True,
    "tie_word_embeddings": False,
    "embd_pdrop": 0.3,
    "pruned_heads": {"0": [1]},
    "quantization_config": {"quant_method": "bitsandbytes"},
    "rope_theta": 10000,
    "n_layer": "two",
    "n_head": 5,
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_config_fields_not_implemented_stop_with_their_name(name, folder):
    edit_json(folder / "config.json", **{name: BAD_FIELDS[name]})
    message = refusal(folder)
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert re.search({"activation_function": "activation", "n_layer": "str"}.get(name, name), message)


def test_all_problems_of_a_config_are_named_at_once(folder):
    edit_json(folder / "config.json", rope_theta=1, n_inner=7, layer_norm_epsilon=1e-5)
    assert "rope_theta" in refusal(folder) and "n_inner" in refusal(folder)


def test_fields_that_change_nothing_are_accepted(folder, expected):
    edit_json(folder / "config.json", n_inner=4 * 36, n_ctx=24, use_cache=False, torch_dtype="float16")
    assert difference(opened(folder), expected) < 1e-9


def test_more_rows_than_ids_are_cut_and_never_sampled(folder, tokenizer, hugging_face, capsys):
    final, surplus = torch.linspace(-1, 1, 36), 16

    def undefined_ids_win(tensors):
        tensors["transformer.ln_f.weight"].zero_()
        tensors["transformer.ln_f.bias"] = final  # so this is the final vector of every position …
        rows = (100 * final / final.square().sum()).expand(surplus, 36)  # … and +100 their logit
        tensors["transformer.wte.weight"] = torch.cat([tensors["transformer.wte.weight"], rows])

    edit_weights(folder, undefined_ids_win)
    edit_json(folder / "config.json", vocab_size=384 + surplus)
    theirs = logits_of(GPT2LMHeadModel.from_pretrained(folder))
    assert theirs.argmax(-1).min() >= 384  # uncut, nothing else would ever be sampled
    model, _ = checkpoint.load(folder)
    assert f"{surplus} token rows have no id in the tokenizer; cut" in capsys.readouterr().err
    assert difference(logits_of(model), theirs[..., :384]) < 1e-9
    assert model.config.vocab_size == model.wte.num_embeddings == 384
    settings = SampleConfig(max_new_tokens=30, temperature=2.0, top_p=1.0)
    steps = list(generate(model, [[1], [2, 3], [4]], settings))
    assert len(steps) == 30 and max(max(ids) for ids in steps) < 384


def test_fewer_rows_than_ids_stop_with_both_numbers(folder):
    edit_json(folder / "config.json", vocab_size=383)
    assert "383 token rows, its tokenizer 384 ids" in refusal(folder)


# other formats


def test_sharded_safetensors_load(hugging_face, folder, expected):
    (folder / "model.safetensors").unlink()
    hugging_face.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert difference(opened(folder), expected) < 1e-9
    next(folder.glob("model-*.safetensors")).unlink()
    assert re.search(r"model-0000\d-of-0000\d.safetensors: no such file", refusal(folder))


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_bin_loads(hugging_face, folder, expected, zipped):
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(hugging_face.state_dict(), path, _use_new_zipfile_serialization=zipped)
    assert difference(opened(folder), expected) < 1e-9


def test_sharded_pytorch_bin_loads(hugging_face, folder, expected):
    (folder / "model.safetensors").unlink()
    parts = [{}, {}]
    for i, (name, w) in enumerate(hugging_face.state_dict().items()):
        parts[i % 2][name] = w
    for i, part in enumerate(parts):
        torch.save(part, folder / f"pytorch_model-{i}.bin")
    where = {name: f"pytorch_model-{i}.bin" for i, part in enumerate(parts) for name in part}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    assert difference(opened(folder), expected) < 1e-9


def test_half_precision_weights_load_as_fp32(hugging_face, folder):
    edit_weights(folder, lambda tensors: tensors.update({name: w.bfloat16() for name, w in tensors.items()}))
    edit_json(folder / "config.json", dtype="bfloat16")
    rounded = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    assert difference(opened(folder), logits_of(rounded)) < 1e-9


def nanogpt_weights(bias: bool) -> dict[str, torch.Tensor]:
    """A state dict as nanoGPT saves it from a compiled model: 2 layers, width 8, its padded 50,304 rows."""
    C, names = 8, {}
    for i in range(2):
        h = f"transformer.h.{i}."
        names |= {h + "ln_1.weight": (C,), h + "ln_2.weight": (C,)}
        names |= {h + "attn.c_attn.weight": (3 * C, C), h + "attn.c_proj.weight": (C, C)}
        names |= {h + "mlp.c_fc.weight": (4 * C, C), h + "mlp.c_proj.weight": (C, 4 * C)}
    names |= {"transformer.ln_f.weight": (C,)}
    if bias:
        names |= {name.replace("weight", "bias"): shape[:1] for name, shape in names.items()}
    names |= {"transformer.wte.weight": (50304, C), "transformer.wpe.weight": (16, C)}
    weights = {"_orig_mod." + name: torch.randn(shape) for name, shape in names.items()}
    return weights | {"_orig_mod.lm_head.weight": weights["_orig_mod.transformer.wte.weight"]}


def nanogpt_logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """nanoGPT's network written out in float64: nn.Linear layout, erf GELU, biases where there are any."""
    w = {name.removeprefix("_orig_mod.").removeprefix("transformer."): x.double() for name, x in weights.items()}
    B, T, C, H = *tokens.shape, 8, 2

    def norm(x, name):
        return F.layer_norm(x, (C,), w[name + ".weight"], w.get(name + ".bias"), 1e-5)

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    future = torch.ones(T, T).triu(1).bool()
    for h in ("h.0.", "h.1."):
        q, k, v = (
            y.view(B, T, H, C // H).transpose(1, 2)
            for y in linear(norm(x, h + "ln_1"), h + "attn.c_attn").split(C, dim=2)
        )
        scores = (q @ k.transpose(2, 3) / math.sqrt(C // H)).masked_fill(future, -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C), h + "attn.c_proj")
        y = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
        x = x + linear(y * (1 + torch.erf(y / math.sqrt(2))) / 2, h + "mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def save_nanogpt(path: Path, weights: dict, **args) -> None:
    args = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 50304, "dropout": 0.1} | args
    extra = {"optimizer": {"state": {}}, "iter_num": 5, "best_val_loss": torch.tensor(2.5), "config": {"a": 1}}
    torch.save({"model": weights, "model_args": args} | extra, path)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoint_loads(bias, tmp_path, capsys):
    weights = nanogpt_weights(bias)
    save_nanogpt(tmp_path / "ckpt.pt", weights, bias=bias)
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        model, tokenizer = checkpoint.load(path)
        assert tokenizer.vocab_size == model.config.vocab_size == 50257
        assert model.config.dropout == 0.1
        assert difference(logits_of(model), nanogpt_logits(weights, TOKENS)[..., :50257]) < 1e-9
    assert "47 token rows have no id" in capsys.readouterr().err


def test_nanogpt_with_its_own_characters_stops_since_the_file_has_no_tokenizer(tmp_path):
    save_nanogpt(tmp_path / "ckpt.pt", {}, vocab_size=65)
    assert "vocab_size 65 is not GPT-2's" in refusal(tmp_path)


@pytest.mark.parametrize("content", [{"model": {}}, {"weights": 1}, [1, 2], torch.ones(3)])
def test_another_pt_file_stops_with_its_name(tmp_path, content):
    torch.save(content, tmp_path / "ckpt.pt")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'ckpt.pt'}: ")


def test_an_absent_model_names_the_files_and_two_sources():
    message = refusal("nanochat-tests/absent")
    for part in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "https://huggingface.co",
        "https://hf-mirror.com",
    ):
        assert part in message


@pytest.mark.parametrize("name", ["out/absent", "/no/such/folder", "a b"])
def test_an_absent_folder_is_not_asked_for_on_the_hub(name):
    assert refusal(name).startswith(f"{name}: no such checkpoint; train.py writes")


# to Hugging Face


def test_what_we_save_opens_in_hugging_face_with_equal_logits(model, tokenizer, tmp_path):
    folder = save(tmp_path, 3, model, tokenizer)
    theirs, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert difference(logits_of(theirs.eval()), logits_of(model)) < 1e-9
    auto = AutoTokenizer.from_pretrained(folder)
    assert len(auto) == theirs.config.vocab_size == model.config.vocab_size
    text = "The miller's daughter, 小河。🙂"
    assert auto(text)["input_ids"] == tokenizer.encode(text)
    end, end_of_text = tokenizer.control["<|end|>"], tokenizer.end_of_text
    assert theirs.generation_config.eos_token_id == [end, end_of_text]
    assert (theirs.config.bos_token_id, theirs.config.pad_token_id) == (end_of_text, end_of_text)


def test_what_we_save_opens_here_with_equal_weights_settings_and_tokenizer(make_model, tokenizer, tmp_path):
    options = {"dropout": 0.2, "attention_dropout": 0.1, "activation": "gelu", "layer_norm_epsilon": 1e-4}
    model = make_model(dtype=torch.float32, vocab_size=384, **options)
    save(tmp_path, 3, model, tokenizer)
    loaded, loaded_tokenizer = checkpoint.load(tmp_path)
    assert loaded.config == model.config
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in model.named_parameters())
    assert loaded_tokenizer.hash == tokenizer.hash
    assert loaded_tokenizer.chat_template == CHAT_TEMPLATE


def test_names_saved_from_a_compiled_model_hold_no_prefix(model, tokenizer, tmp_path):
    class Compiled(nn.Module):  # as torch.compile names things
        config = model.config

        def __init__(self):
            super().__init__()
            self._orig_mod = model

    folder = save(tmp_path, 1, Compiled(), tokenizer)
    assert set(load_file(folder / "model.safetensors")) == {f"transformer.{n}" for n, _ in model.named_parameters()}


def test_peft_puts_lora_on_what_we_save_and_the_merged_model_opens_here(model, tokenizer, tmp_path):
    folder = save(tmp_path, 1, model, tokenizer)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    assert difference(logits_of(again), logits_of(adapted)) < 1e-9
    assert difference(logits_of(adapted), logits_of(model)) > 1e-3
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save(tmp_path / "merged")
    assert difference(opened(tmp_path / "merged"), logits_of(again)) < 1e-4  # merged in fp32


# growing


def test_growing_for_chat_hardly_changes_the_loss_on_plain_text(make_model, tokenizer):
    plain = Tokenizer(tokenizer.merges)
    model = make_model(vocab_size=plain.vocab_size, block_size=64, noise=0.5)  # logits of a few nats, as trained ones
    text = torch.tensor([[i for (i,) in generate(model, [[1]], SampleConfig(max_new_tokens=60, top_p=1.0))]])
    inputs, targets = text[:, :-1], text[:, 1:]
    with torch.no_grad():
        logits, loss = model(inputs), model.nll(inputs, targets).mean()
        chat = plain.for_chat()
        model.grow(chat.vocab_size)
        grown = model.nll(inputs, targets).mean()
        assert 0 < grown - loss < 0.01
        assert difference(model(inputs)[..., : plain.vocab_size], logits) < 1e-9
        assert model.config.vocab_size == model.wte.num_embeddings == chat.vocab_size == plain.vocab_size + 4
        new = model.wte.weight[plain.vocab_size :]
        assert (new[0] - new[1]).abs().max() > 0  # no two of them are the same
        new.normal_(std=10 * model.wte.weight.std())  # rows made without care would take probability
        assert model.nll(inputs, targets).mean() - loss > 0.01
    assert [chat.control[name] for name in (END_OF_TEXT, *CHAT_TOKENS)] == list(range(379, 384))


# nothing runs, nothing is half read


class Evil:
    """Unpickled without care, this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt", "last/resume/state.pt"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(name, folder, tmp_path):
    touched, path = tmp_path / "touched", folder / name
    (folder / "model.safetensors").unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": Evil(touched), "model_args": {}, "transformer.wte.weight": Evil(touched)}, path)
    with pytest.raises(InputError) as info:
        if name.startswith("last"):
            checkpoint.open_run(folder, resume=True, overwrite=False)
        else:
            checkpoint.load(path if name == "ckpt.pt" else folder)
    assert str(info.value).startswith(f"{path}: refused") and "\n" not in str(info.value)
    assert not touched.exists()
    torch.load(path, weights_only=False)
    assert touched.exists()  # the pickle does what we think it does


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
def test_a_truncated_file_gives_one_line_that_names_it(kind, hugging_face, folder):
    path = folder / "model.safetensors"
    if kind != "safetensors":
        path.unlink()
        path = folder / "pytorch_model.bin"
        torch.save(hugging_face.state_dict(), path, _use_new_zipfile_serialization=kind == "bin")
    data = path.read_bytes()
    for size in (0, 1, 8, 50, 300, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert refusal(folder).startswith(f"{path}: "), size


def test_a_damaged_legacy_pickle_gives_one_line_that_names_it(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save({"model": {"a": torch.ones(5)}, "model_args": {}}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        assert refusal(path).startswith(f"{path}: "), size


def test_no_source_reads_a_pickle_or_runs_text_as_code():
    sources = [*(ROOT / "nanochat").glob("*.py"), *ROOT.glob("*.py")]
    assert len(sources) > 10
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|pickle\.loads?\(", text), path
        assert not re.search(r"(?<![\w.])(eval|exec)\(", text), path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\(.*", text)), path


# a run folder


RESUME = {"progress": {"step": 4}, "rng": torch.get_rng_state(), "optimizer": {"wte": torch.ones(2)}}


def names_in(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def test_last_and_best_point_at_steps_and_load_prefers_the_best(make_model, tokenizer, tmp_path):
    steps = {step: make_model(dtype=torch.float32, vocab_size=384) for step in (2, 4)}
    save(tmp_path, 2, steps[2], tokenizer, best=True)
    save(tmp_path, 4, steps[4], tokenizer)
    assert os.readlink(tmp_path / "best") == "step-000002"  # relative: the folder can be moved
    assert os.readlink(tmp_path / "last") == "step-000004"
    assert torch.equal(checkpoint.load(tmp_path)[0].wte.weight, steps[2].wte.weight)
    assert torch.equal(checkpoint.load(tmp_path / "last")[0].wte.weight, steps[4].wte.weight)
    (tmp_path / "best").unlink()
    assert torch.equal(checkpoint.load(tmp_path)[0].wte.weight, steps[4].wte.weight)


def test_where_links_are_forbidden_a_file_names_the_step(model, tokenizer, tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", forbidden)
    save(tmp_path, 1, model, tokenizer, best=True)
    for step in (2, 3, 4):
        save(tmp_path, step, model, tokenizer, resume=RESUME)
    assert (tmp_path / "best").read_text() == "step-000001\n"
    assert checkpoint.locate(tmp_path) == tmp_path / "step-000001"
    assert checkpoint.open_run(tmp_path, resume=True, overwrite=False)["progress"] == {"step": 4}
    checkpoint.load(tmp_path)


def test_old_steps_go_but_the_best_the_newest_and_foreign_folders_stay(model, tokenizer, tmp_path):
    (tmp_path / "step-000001-copy").mkdir()
    for step in (999997, 999998, 999999, 1000000):  # the last has one digit more
        save(tmp_path, step, model, tokenizer, best=step == 999997, keep=2)
    expected = ["best", "last", "step-000001-copy", "step-1000000", "step-999997", "step-999999"]
    assert names_in(tmp_path) == expected


def test_saving_a_step_again_replaces_it(make_model, tokenizer, tmp_path):
    old, new = (make_model(dtype=torch.float32, vocab_size=384) for _ in range(2))
    save(tmp_path, 1, old, tokenizer, resume=RESUME)
    save(tmp_path, 1, new, tokenizer)
    assert names_in(tmp_path) == ["last", "step-000001"]
    assert torch.equal(checkpoint.load(tmp_path)[0].wte.weight, new.wte.weight)
    assert not (tmp_path / "last" / "resume").exists()


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step again"])
@pytest.mark.parametrize("moment", range(4))
def test_a_save_cut_short_leaves_a_checkpoint_that_resumes_and_no_litter(
    again, moment, make_model, tokenizer, tmp_path, monkeypatch
):
    model = make_model(dtype=torch.float32, vocab_size=384)
    save(tmp_path, 1, model, tokenizer, resume=RESUME)
    replace, calls = os.replace, []

    def killed(*args):
        if len(calls) == moment:
            raise KeyboardInterrupt
        calls.append(args)
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        try:
            save(tmp_path, 1 if again else 2, model, tokenizer, resume=RESUME)
        except KeyboardInterrupt:
            pass
    assert checkpoint.open_run(tmp_path, resume=True, overwrite=False)["progress"] == {"step": 4}
    checkpoint.load(tmp_path / "last")
    assert not list(tmp_path.glob(".tmp-*"))
    save(tmp_path, 3, model, tokenizer)
    assert os.readlink(tmp_path / "last") == "step-000003"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_file_modes_follow_the_umask(umask, model, tokenizer, tmp_path):
    before = os.umask(umask)
    try:
        folder = save(tmp_path / "out", 1, model, tokenizer, resume=RESUME)
    finally:
        os.umask(before)
    for path in [folder, *folder.rglob("*")]:
        mode = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == mode & ~umask, path


def test_the_state_to_resume_from_loads_with_weights_only(model, tokenizer, tmp_path):
    folder = save(tmp_path, 4, model, tokenizer, resume=RESUME)
    assert torch.load(folder / "resume" / "state.pt", weights_only=True).keys() == RESUME.keys()
    state = checkpoint.open_run(tmp_path, resume=True, overwrite=False)
    assert torch.equal(state["rng"], RESUME["rng"])


def test_a_step_describes_itself(model, tokenizer, tmp_path):
    settings = {"lr": 1e-3, "out": Path("out")}
    folder = checkpoint.save(tmp_path, 7, model, tokenizer, settings=settings, results={"val_loss": 1.5})
    about = json.loads((folder / "nanochat.json").read_text(encoding="utf-8"))
    assert (about["step"], about["results"], about["settings"]) == (7, {"val_loss": 1.5}, {"lr": 1e-3, "out": "out"})
    assert (about["template"], about["tokenizer_hash"]) == ("nanochat-1", tokenizer.hash)
    edit_json(folder / "nanochat.json", template="nanochat-0")
    assert "chat template 'nanochat-0', this version speaks 'nanochat-1'" in refusal(tmp_path)


def test_a_folder_that_holds_something_is_not_written_over_unasked(tmp_path):
    out = tmp_path / "out"
    assert checkpoint.open_run(out, resume=False, overwrite=False) is None
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not empty: --resume goes on, --overwrite starts anew"):
        checkpoint.open_run(out, resume=False, overwrite=False)
    (out / "step-000003").mkdir()
    (out / "last").symlink_to("step-000003")
    assert checkpoint.open_run(out, resume=False, overwrite=True) is None
    checkpoint.clear_run(out)  # the run goes, what is not part of it stays
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_resuming_an_absent_run_stops_with_its_name(tmp_path):
    with pytest.raises(InputError, match="--resume: there is no run folder .*absent"):
        checkpoint.open_run(tmp_path / "absent", resume=True, overwrite=False)


# the converter


def convert(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, arguments)])
    checkpoint.main()


def test_the_converter_prints_the_table_and_the_result_opens(folder, expected, tmp_path, monkeypatch, capsys):
    edit_weights(folder, with_masks)
    convert(monkeypatch, folder, tmp_path / "new")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight", "108", "x", "36", "yes"] in lines
    assert ["transformer.h.1.ln_1.bias", "h.1.ln_1.bias", "36"] in lines
    assert ["transformer.h.0.attn.masked_bias", "-", "(no", "parameter)"] in lines
    assert lines[-1] == ["wrote", str(tmp_path / "new")]
    assert difference(opened(tmp_path / "new"), expected) < 1e-9
    assert difference(logits_of(GPT2LMHeadModel.from_pretrained(tmp_path / "new")), expected) < 1e-9
    assert names_in(tmp_path) == ["gpt2", "new"]
    with pytest.raises(InputError, match="exists already"):
        convert(monkeypatch, folder, tmp_path / "new")


def test_the_converter_makes_a_hugging_face_folder_of_a_nanogpt_file(tmp_path, monkeypatch):
    weights = nanogpt_weights(bias=False)
    save_nanogpt(tmp_path / "ckpt.pt", weights, bias=False)
    convert(monkeypatch, tmp_path / "ckpt.pt", tmp_path / "new")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "new")
    assert difference(logits_of(theirs), nanogpt_logits(weights, TOKENS)[..., :50257]) < 1e-9


def test_a_file_that_does_not_fit_leaves_no_folder(folder, tmp_path, monkeypatch):
    edit_weights(folder, lambda tensors: tensors.pop(LN))
    with pytest.raises(InputError, match="missing h.1.ln_1.bias"):
        convert(monkeypatch, folder, tmp_path / "new")
    assert names_in(tmp_path) == ["gpt2"]
