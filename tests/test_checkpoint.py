"""checkpoint: the same network as Hugging Face's, both ways; what does not fit, or would run code, is refused."""

import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from nanochat import InputError, checkpoint, runs
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
    return runs.save(out, step, model, tokenizer, settings={}, results={}, **options)


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
    "unexpected h.2.score": lambda t: t.update({"h.2.score": torch.ones(2, 36)}),
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
    assert re.search({"activation_function": "activation", "n_layer": "n_layer is 'two', must be a whole number"}.get(name, name), message)


@pytest.mark.parametrize("name, value, said", [
    ("n_layer", 2.0, "n_layer is 2.0, must be a whole number"),
    ("n_layer", True, "n_layer is True, must be a whole number"),
    ("n_layer", 10**9, "n_layer is 1000000000, must be from 1 to 1,000"),
    ("n_head", None, "n_head is None, must be a whole number"),
    ("n_embd", 3 * 2**60, "n_embd is 3458764513820540928, must be from 1 to 1,000,000"),
    ("n_positions", "24", "block_size is '24', must be a whole number"),
    ("activation_function", [], r"activation is \[\], must be a text"),
    ("layer_norm_epsilon", "1e-5", "layer_norm_epsilon is '1e-5', must be a number from 0 to 1"),
    ("layer_norm_epsilon", math.nan, "layer_norm_epsilon is nan, must be a number from 0 to 1"),
    ("attn_pdrop", None, "attention_dropout is None, must be a number from 0 to 1"),
    ("two\nlines", 1, "two lines"),
])
def test_config_values_that_no_network_has_are_refused_at_once(name, value, said, folder):
    edit_json(folder / "config.json", **{name: value})
    assert re.search(said, refusal(folder))


def test_a_saved_config_says_that_the_head_is_tied_and_the_weights_are_float32(make_model, tmp_path):
    checkpoint.write(tmp_path, make_model(torch.float32, vocab_size=50257), Tokenizer.gpt2())
    config = json.loads((tmp_path / "config.json").read_text())
    assert {"tie_word_embeddings": True, "dtype": "float32", "n_positions": 24, "n_ctx": 24}.items() <= config.items()


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


@pytest.mark.parametrize("files", [None, [], {"a": 1}, {"a": ["b"]}, {"a": "../gpt2/model.safetensors"}, {"a": "x\n"}, {"a": "x" * 256}])
def test_an_index_that_names_no_files_beside_it_is_refused(files, folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    assert refusal(folder) == f"{index}: damaged: no weight_map from tensors to files beside it"


NO_WEIGHTS = {
    "is torch.int8": lambda w: w.to(torch.int8),  # quantized: rounded to integers and taken as weights, they would load
    "is torch.bool": lambda w: w > 0,
    "torch.sparse_coo": lambda w: w.to_sparse(),
    "a NoneType": lambda w: None,
    "a list": lambda w: w.tolist(),
}


@pytest.mark.parametrize("said", NO_WEIGHTS)
def test_what_is_no_floating_point_tensor_is_refused_with_its_name(said, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wpe.weight"] = NO_WEIGHTS[said](tensors["transformer.wpe.weight"])
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert said in (message := refusal(folder)) and "transformer.wpe.weight" in message
    torch.save(tensors | {"transformer.wpe.weight": torch.ones(24, 36), 7: torch.ones(1)}, folder / "pytorch_model.bin")
    assert "holds 7, a Tensor: not only tensors with names" in refusal(folder)


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name, value", [("n_layer", None), ("n_layer", 10**9), ("n_embd", 8.0), ("dropout", "none")])
def test_nanogpt_sizes_that_no_network_has_are_refused_at_once(name, value, bias, tmp_path):
    save_nanogpt(tmp_path / "ckpt.pt", nanogpt_weights(bias=True), bias=bias, **{name: value})
    assert re.search(f"{name} is {value!r}, must be (a|from 1 to 1,000)", refusal(tmp_path))


@pytest.mark.parametrize("content", [{"model": {}}, {"model": {}, "model_args": [1]}, {"weights": 1}, [1, 2], torch.ones(3)])
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
    folder = save(tmp_path, 1, torch.compile(model), tokenizer)
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


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt", "step-000004/resume/state.pt"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(name, folder, tokenizer, tmp_path):
    touched, path = tmp_path / "touched", folder / name
    if name.startswith("step"):
        save(folder, 4, checkpoint.load(folder)[0], tokenizer)
        (folder / "step-000004" / "SHA256SUMS").unlink()
    (folder / "model.safetensors").unlink()
    path.parent.mkdir(exist_ok=True)
    torch.save({"model": Evil(touched), "model_args": {}, "transformer.wte.weight": Evil(touched)}, path)
    with pytest.raises(InputError) as info:
        if name.startswith("step"):
            runs.open_run(folder, resume=True, overwrite=False)
        else:
            checkpoint.load(path if name == "ckpt.pt" else folder)
    assert f"{path}: refused" in str(info.value) and "\n" not in str(info.value)
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


def resume_state(step: int, best_loss: float = 2.0) -> dict:
    """What a run saves to go on from `step`, as far as checkpoint.py looks into it."""
    return {"progress": {"step": step, "best_loss": best_loss}, "rng": torch.get_rng_state(), "optimizer": {"wte": torch.ones(2)}}


def names_in(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def resumed(out: Path) -> tuple[Path, dict]:
    return runs.open_run(out, resume=True, overwrite=False)


def flip(path: Path, place: int = -5) -> None:
    """What a bad disk does."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "nanochat.json").read_text(encoding="utf-8"))["results"]


@pytest.fixture
def run(make_model, tokenizer, tmp_path) -> Path:
    """A run folder with steps 2 (the best), 4 and 6 (the last), each with its own weights."""
    out = tmp_path / "run"
    for step in (2, 4, 6):
        save(out, step, make_model(dtype=torch.float32, vocab_size=384), tokenizer, resume=resume_state(step), keep=3)
        runs.add_results(out, step, {"val_loss": float(step)}, best=step == 2)
    return out


def test_last_and_best_point_at_steps_and_load_prefers_the_best(make_model, tokenizer, tmp_path):
    steps = {step: make_model(dtype=torch.float32, vocab_size=384) for step in (2, 4)}
    save(tmp_path, 2, steps[2], tokenizer)
    runs.add_results(tmp_path, 2, {}, best=True)
    save(tmp_path, 4, steps[4], tokenizer)
    runs.add_results(tmp_path, 4, {}, best=False)
    assert os.readlink(tmp_path / "best") == "step-000002"  # relative: the folder can be moved
    assert os.readlink(tmp_path / "last") == "step-000004"
    assert torch.equal(checkpoint.load(tmp_path)[0].wte.weight, steps[2].wte.weight)
    assert torch.equal(checkpoint.load(tmp_path / "last")[0].wte.weight, steps[4].wte.weight)
    (tmp_path / "best").unlink()
    assert torch.equal(checkpoint.load(tmp_path)[0].wte.weight, steps[4].wte.weight)


def test_a_best_that_is_gone_is_not_silently_replaced_by_the_last(run):
    shutil.rmtree(run / "step-000002")
    assert refusal(run).startswith(f"{run / 'best'} names 'step-000002', which is no checkpoint of this run; ")


def test_where_links_are_forbidden_a_file_names_the_step(model, tokenizer, tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", forbidden)
    for step in (1, 2, 3, 4):
        save(tmp_path, step, model, tokenizer, resume=resume_state(step))
        runs.add_results(tmp_path, step, {}, best=step == 1)
    assert (tmp_path / "best").read_text() == "step-000001\n"
    assert checkpoint.locate(tmp_path) == tmp_path / "step-000001"
    checkpoint.load(tmp_path)
    flip(tmp_path / "step-000004" / "model.safetensors")
    assert resumed(tmp_path)[0] == tmp_path / "step-000003"
    assert (tmp_path / "last").read_text() == "step-000003\n"
    assert names_in(tmp_path) == ["best", "damaged-step-000004", "last", "step-000001", "step-000003"]


def test_a_run_copied_with_folders_for_links_loads_resumes_and_keeps_its_best(run, model, tokenizer, tmp_path):
    """scp -r, zip and cp -rL copy what a link names."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=False)
    assert (copy / "best").is_dir() and not (copy / "best").is_symlink()
    assert checkpoint.locate(copy) == copy / "step-000002"
    folder, state = resumed(copy)
    assert (folder, state["progress"]["best_loss"]) == (copy / "step-000006", 2.0)
    assert (os.readlink(copy / "best"), os.readlink(copy / "last")) == ("step-000002", "step-000006")
    save(copy, 8, model, tokenizer, keep=1)
    assert names_in(copy) == ["best", "last", "step-000002", "step-000008"]
    shutil.copytree(run, tmp_path / "another", symlinks=False)
    runs.clear(tmp_path / "another")
    assert names_in(tmp_path / "another") == []


def test_old_steps_go_but_the_best_the_newest_and_foreign_folders_stay(model, tokenizer, tmp_path):
    for name in ("step-000001-copy", "step-²", "step-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000003").write_text("a file")
    for step in (999997, 999998, 999999, 1000000):  # the last has one digit more
        save(tmp_path, step, model, tokenizer, keep=2)
        runs.add_results(tmp_path, step, {}, best=step == 999997)
    expected = ["best", "last", "step-000001-copy", "step-000003", "step-1000000", "step-4", "step-999997", "step-999999", "step-²"]
    assert names_in(tmp_path) == expected


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_and_the_best_stay_however_old_it_is(keep, model, tokenizer, tmp_path):
    for step in range(1, 9):
        save(tmp_path, step, model, tokenizer, keep=keep)
        runs.add_results(tmp_path, step, {}, best=step in (1, 2))
    kept = [f"step-{step:06d}" for step in (2, *range(9 - keep, 9))]
    assert names_in(tmp_path) == ["best", "last", *kept]


def test_a_folder_kept_elsewhere_behind_a_link_is_neither_lost_nor_in_the_way(model, tokenizer, tmp_path):
    """A run folder that is a link, and in it an old step that was moved to a larger disk."""
    (tmp_path / "disk").mkdir()
    out = tmp_path / "out"
    out.symlink_to("disk")
    save(out, 1, model, tokenizer, resume=resume_state(1))
    (out / "step-000001").rename(tmp_path / "moved")
    (out / "step-000001").symlink_to(tmp_path / "moved")
    assert resumed(out)[0] == out / "step-000001"
    for step in (2, 3):
        save(out, step, model, tokenizer, keep=1)
    assert names_in(tmp_path / "disk") == ["last", "step-000003"]
    checkpoint.load(out)
    checkpoint.load(tmp_path / "moved")
    runs.clear(out)
    assert out.is_symlink() and names_in(out) == []


def test_saving_a_step_again_replaces_it(make_model, tokenizer, tmp_path):
    old, new = (make_model(dtype=torch.float32, vocab_size=384) for _ in range(2))
    save(tmp_path, 1, old, tokenizer, resume=resume_state(1))
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
    save(tmp_path, 1, model, tokenizer, resume=resume_state(1))
    step, replace, calls = 1 if again else 2, os.replace, []

    def killed(*args):
        if len(calls) == moment:
            raise KeyboardInterrupt
        calls.append(args)
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        try:
            save(tmp_path, step, model, tokenizer, resume=resume_state(step), keep=1)
        except KeyboardInterrupt:
            pass
    folder, state = resumed(tmp_path)
    renamed = moment > (1 if again else 0)  # saving again, the first rename puts the old one aside
    assert folder == tmp_path / f"step-{step if renamed else 1:06d}" and state["progress"]["step"] == runs.step_of(folder)
    assert checkpoint.locate(tmp_path / "last").resolve() == folder
    checkpoint.load(tmp_path / "last")
    assert not list(tmp_path.glob(".tmp-*"))
    save(tmp_path, 3, model, tokenizer)
    assert os.readlink(tmp_path / "last") == "step-000003"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_file_modes_follow_the_umask(umask, model, tokenizer, tmp_path):
    before = os.umask(umask)
    try:
        folder = save(tmp_path / "out", 1, model, tokenizer, resume=resume_state(1))
        runs.add_results(tmp_path / "out", 1, {"val_loss": 1.0}, best=True)
    finally:
        os.umask(before)
    assert {"SHA256SUMS", "model.safetensors", "nanochat.json", "resume", "tokenizer.json"} < {path.name for path in folder.iterdir()}
    assert (folder / "resume" / "state.pt").exists()
    for path in [folder, *folder.rglob("*")]:
        mode = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == mode & ~umask, path


def test_the_state_to_resume_from_loads_with_weights_only(model, tokenizer, tmp_path):
    saved = resume_state(4)
    folder = save(tmp_path, 4, model, tokenizer, resume=saved)
    assert torch.load(folder / "resume" / "state.pt", weights_only=True).keys() == saved.keys()
    step, state = resumed(tmp_path)
    assert step == folder and torch.equal(state["rng"], saved["rng"])


def test_a_step_describes_itself(model, tokenizer, tmp_path):
    settings = {"lr": 1e-3, "out": Path("out")}
    folder = runs.save(tmp_path, 7, model, tokenizer, settings=settings, results={"loss": 1.5})
    about = json.loads((folder / "nanochat.json").read_text(encoding="utf-8"))
    assert (about["step"], about["results"], about["settings"]) == (7, {"loss": 1.5}, {"lr": 1e-3, "out": "out"})
    assert (about["template"], about["tokenizer_hash"]) == ("nanochat-1", tokenizer.hash)
    edit_json(folder / "nanochat.json", template="nanochat-0")
    assert "chat template 'nanochat-0', this version speaks 'nanochat-1'" in refusal(tmp_path)


def test_an_evaluation_is_added_to_what_its_step_says(model, tokenizer, tmp_path):
    folder = runs.save(tmp_path, 7, model, tokenizer, settings={"lr": 1e-3}, results={"loss": 1.5})
    before = json.loads((folder / "nanochat.json").read_text(encoding="utf-8"))
    runs.add_results(tmp_path, 7, {"val_loss": 1.25}, best=False)
    assert not (tmp_path / "best").exists()
    runs.add_results(tmp_path, 7, {"val_loss": 1.125}, best=True)
    after = json.loads((folder / "nanochat.json").read_text(encoding="utf-8"))
    assert after == before | {"results": {"loss": 1.5, "val_loss": 1.125}}
    assert os.readlink(tmp_path / "best") == "step-000007"
    checkpoint.load(tmp_path)  # its sum is none of those in SHA256SUMS


def test_each_file_is_on_the_disk_before_its_rename(model, tokenizer, tmp_path, monkeypatch):
    """A rename that reaches the disk before the content leaves empty files after a power cut."""
    flushed, fsync, replace = set(), os.fsync, os.replace

    def noting(handle):
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def checking(source, target):
        for path in [source] if Path(source).is_symlink() else [source, *Path(source).rglob("*")]:
            assert Path(source).is_symlink() or os.stat(path).st_ino in flushed, path
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", checking)
    for step in (1, 2):
        save(tmp_path, step, model, tokenizer, resume=resume_state(step), keep=1)
        runs.add_results(tmp_path, step, {"val_loss": 1.0}, best=True)
    assert len(flushed) > 20 and tmp_path.stat().st_ino in flushed


def test_a_folder_that_no_system_can_flush_is_no_error(tmp_path):
    """/proc is such a one; some network disks are, too."""
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc")
    runs.flush_to_disk(Path("/proc/self"))
    with pytest.raises(FileNotFoundError):
        runs.flush_to_disk(tmp_path / "absent")


def test_weights_that_are_not_finite_are_never_saved(run, make_model, tokenizer):
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for value in (math.nan, math.inf, -math.inf):
        broken = make_model(dtype=torch.float32, vocab_size=384)
        broken.h[1].mlp.c_fc.bias.data[3] = value
        with pytest.raises(InputError, match="step 8 is not saved: h.1.mlp.c_fc.bias is not finite; the checkpoints in .* stay") as info:
            save(run, 8, broken, tokenizer, keep=1)
        assert "\n" not in str(info.value)
    assert files == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


# sums


def test_sha256sum_agrees_with_the_sums(run):
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    for step in runs.saved_steps(run):
        checked = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=step, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        files = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
        assert {line.removesuffix(": OK") for line in checked.stdout.splitlines()} == files - {"nanochat.json", "SHA256SUMS"}


FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_refused_with_its_name_and_the_remedy_and_without_the_sums_taken(name, run):
    path = run / "step-000002" / name
    path.write_bytes(path.read_bytes() + b" " if name != "model.safetensors" else path.read_bytes())
    if name == "model.safetensors":
        flip(path)
    for source in (run, run / "best", path.parent):
        message = refusal(source)
        assert re.search(rf"step-000002/{name}|best/{name}", message)
        assert message.endswith("not as it was saved: damaged, or changed by hand (then delete SHA256SUMS beside it)")
    (path.parent / "SHA256SUMS").unlink()
    checkpoint.load(run)


def test_a_missing_file_is_told_before_any_is_read(run):
    (run / "step-000002" / "tokenizer_config.json").unlink()  # load could do without
    assert refusal(run) == f"{run / 'step-000002' / 'tokenizer_config.json'}: missing from this checkpoint"


def test_damaged_sums_are_refused_with_the_remedy(run):
    sums = run / "step-000002" / "SHA256SUMS"
    sums.write_bytes(sums.read_bytes().replace(b"  config.json", b"  ../config.json"))
    assert re.fullmatch(rf"{sums}: damaged: '[0-9a-f]{{64}}  ../config.*'; without this file, the others are taken as they are", refusal(run))


def test_weights_load_without_what_only_resuming_needs(run):
    expected = checkpoint.load(run)[0].wte.weight
    shutil.rmtree(run / "step-000002" / "resume")
    assert torch.equal(checkpoint.load(run)[0].wte.weight, expected)


# resuming


def test_resuming_takes_the_newest_sound_step_and_sets_damaged_ones_aside(run, capsys):
    flip(run / "step-000006" / "resume" / "state.pt")
    (run / "step-000004" / "model.safetensors").unlink()
    folder, state = resumed(run)
    assert folder == run / "step-000002" and state["progress"] == {"step": 2, "best_loss": 2.0}
    assert names_in(run) == ["best", "damaged-step-000004", "damaged-step-000006", "last", "step-000002"]
    assert os.readlink(run / "last") == os.readlink(run / "best") == "step-000002"
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"{run}/step-000006/resume/state.pt: not as it was saved: damaged, or changed by hand (then delete SHA256SUMS beside it)",
        f"moved to {run}/damaged-step-000006; going on from the step before",
        f"{run}/step-000004/model.safetensors: missing from this checkpoint",
        f"moved to {run}/damaged-step-000004; going on from the step before",
    ]


def test_a_step_saved_again_after_a_fallback_takes_the_place_of_the_damaged_one(run, model, tokenizer):
    flip(run / "step-000006" / "model.safetensors")
    resumed(run)
    save(run, 6, model, tokenizer, resume=resume_state(6), keep=1)
    assert names_in(run) == ["best", "damaged-step-000006", "last", "step-000002", "step-000006"]
    assert resumed(run)[0] == run / "step-000006"
    flip(run / "step-000006" / "model.safetensors")
    assert resumed(run)[0] == run / "step-000002"  # a second damaged-step-000006 replaces the first
    runs.clear(run)
    assert names_in(run) == []


def test_a_resume_that_finds_nothing_sound_leaves_all_as_it_was(run):
    """State files are gone, weights are sound: the run cannot go on, but it still loads."""
    for step in runs.saved_steps(run):
        shutil.rmtree(step / "resume")
    before = names_in(run)
    with pytest.raises(InputError) as info:
        resumed(run)
    assert str(info.value) == (f"--resume: {run} has no sound checkpoint ({run}/step-000006/resume/state.pt: missing from this "
                               f"checkpoint); --overwrite starts anew")
    assert names_in(run) == before
    checkpoint.load(run)


def test_a_run_without_a_step_cannot_be_resumed(tmp_path):
    with pytest.raises(InputError, match=r"has no sound checkpoint \(no step is saved\); --overwrite starts anew"):
        resumed(tmp_path)


@pytest.mark.parametrize("pointer", ["best", "last"])
@pytest.mark.parametrize("content", ["garbage \0\n", "step-000009", "../run/step-000002", ""])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_pointer_that_names_no_step_is_refused_by_load_and_mended_by_resume(pointer, content, kind, run):
    (run / pointer).unlink()
    if kind == "file":
        (run / pointer).write_text(content)
    else:
        (run / pointer).symlink_to(content.replace("\0", "") or "nothing")
    if pointer == "best":
        assert refusal(run).startswith(f"{run / 'best'} names ")
    folder, state = resumed(run)
    assert folder == run / "step-000006" and os.readlink(run / "last") == "step-000006"
    if pointer == "best":
        assert not os.path.lexists(run / "best") and state["progress"]["best_loss"] == math.inf
    else:
        assert os.readlink(run / "best") == "step-000002" and state["progress"]["best_loss"] == 2.0


def test_a_best_that_is_newer_than_the_sound_step_is_forgotten(run):
    runs.add_results(run, 6, {}, best=True)
    flip(run / "step-000006" / "config.json")
    folder, state = resumed(run)
    assert folder == run / "step-000004" and state["progress"]["best_loss"] == math.inf
    assert not os.path.lexists(run / "best") and os.readlink(run / "last") == "step-000004"


def test_a_damaged_best_is_forgotten_when_the_run_goes_on(run, capsys):
    flip(run / "step-000002" / "model.safetensors")
    folder, state = resumed(run)
    assert folder == run / "step-000006" and state["progress"]["best_loss"] == math.inf
    assert not os.path.lexists(run / "best")
    assert f"removed {run / 'best'}; the next evaluation sets it anew" in capsys.readouterr().err
    checkpoint.load(run)


def test_files_of_another_step_are_told_without_sums(run, capsys):
    for step in runs.saved_steps(run):
        (step / "SHA256SUMS").unlink()
    shutil.copy(run / "step-000002" / "resume" / "state.pt", run / "step-000006" / "resume")
    shutil.copy(run / "step-000002" / "nanochat.json", run / "step-000004")
    assert resumed(run)[0] == run / "step-000002"
    said = capsys.readouterr().err
    assert "step-000006/resume/state.pt: is of another step" in said and "step-000004/nanochat.json: is of another step" in said


@pytest.mark.parametrize("change", [{"template": "nanochat-0"}, {"step": 1}, None], ids=["template", "step", "no file"])
def test_what_resuming_takes_and_calls_best_can_be_loaded(change, run):
    for step in ("step-000002", "step-000006"):
        if change:
            edit_json(run / step / "nanochat.json", **change)
        else:
            (run / step / "nanochat.json").unlink()
    assert resumed(run)[0] == run / "step-000004" and not os.path.lexists(run / "best")
    checkpoint.load(run)


def test_two_processes_never_train_into_one_folder(run):
    """The second is refused, whether it resumes or starts anew; when the first is killed, it may."""
    inside = ("import sys, pathlib; from nanochat import runs; runs.open_run(pathlib.Path(sys.argv[1]), True, False);"
              "print('held', flush=True); sys.stdin.read()")
    first = subprocess.Popen([sys.executable, "-c", inside, str(run)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        (run / ".tmp-step-000008").mkdir()  # what the first one is writing
        before = names_in(run)
        for start in (lambda: resumed(run), lambda: runs.clear(run)):
            with pytest.raises(InputError, match="another process is training into this folder"):
                start()
        assert names_in(run) == before
        checkpoint.load(run)  # reading is free
    finally:
        first.kill()
        first.wait()
        first.stdin.close()
        first.stdout.close()
    assert resumed(run)[0] == run / "step-000006"
    assert resumed(run)[0] == run / "step-000006"  # its own folder is not refused to a process


def test_a_folder_that_holds_something_is_not_written_over_unasked(tmp_path):
    out = tmp_path / "out"
    assert runs.open_run(out, resume=False, overwrite=False) == (None, None)
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not empty: --resume goes on, --overwrite starts anew"):
        runs.open_run(out, resume=False, overwrite=False)
    (out / "step-000003").mkdir()
    (out / "last").symlink_to("step-000003")
    assert runs.open_run(out, resume=False, overwrite=True) == (None, None)
    runs.clear(out)  # the run goes, what is not part of it stays
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_resuming_an_absent_run_stops_with_its_name(tmp_path):
    with pytest.raises(InputError, match="--resume: there is no run folder .*absent"):
        resumed(tmp_path / "absent")


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
