"""Weights laid out for decoding: the same logits, within the rounding of each type."""

import threading

import pytest
import torch
from test_generate import BLOCK, greedy, prompt_of, said_by
from torch import nn

from nanochat import InputError, packed
from nanochat.classifier import GPTClassifier
from nanochat.lora import LoRAConfig, add_lora
from nanochat.model import GPT, GPTConfig
from nanochat.packed import Blocked, Int8, Int8OneDNN, Plain, Sliced, pack, ready

PARTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def kinds(model: GPT) -> set[type]:
    """How the products of a packed model are computed, that of the head too."""
    return {type(model.h[0].get_submodule(part)) for part in PARTS} | {type(model.wte.head)}


def error(model: GPT, expected: torch.Tensor, tokens: torch.Tensor) -> float:
    """Of the logits: their root mean square difference, as a share of their spread."""
    with torch.inference_mode():
        logits = model(tokens).double()
    return ((logits - expected).square().mean().sqrt() / expected.std()).item()


@pytest.fixture
def threads():
    """threads(n) sets torch's threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_float32_in_slices_equals_the_plain_model(make_model, threads, count):
    threads(count)  # 97 rows of the table and widths of 36 · n: not every one can be divided
    model = make_model(dtype=torch.float32)
    tokens = torch.tensor([prompt_of(BLOCK), prompt_of(BLOCK, seed=1)])
    prompts = [prompt_of(3), prompt_of(BLOCK + 2)]
    plain = [model(tokens), model(tokens[:1, :1]), model.head(torch.ones(36))]
    said = said_by(model, prompts, greedy(2 * BLOCK))
    pack(model)
    assert kinds(model) == {Sliced}
    for got, expected in zip([model(tokens), model(tokens[:1, :1]), model.head(torch.ones(36))], plain):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert said_by(model, prompts, greedy(2 * BLOCK)) == said


def test_bfloat16_in_blocks_is_as_near_as_the_plain_model(make_model):
    exact = make_model()
    tokens = torch.tensor([prompt_of(BLOCK), prompt_of(BLOCK, seed=1)])
    expected = exact(tokens)
    model = exact.to(torch.bfloat16)
    plain = error(model, expected, tokens)
    pack(model)
    assert kinds(model) in ({Blocked}, {Plain})  # the second where torch has no oneDNN
    assert error(model, expected, tokens) < 1.2 * plain < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Int8, Int8OneDNN])
def test_int8_errs_by_a_few_hundredths_of_the_logits_spread(make_model, monkeypatch, dtype, kind):
    if kind is Int8:
        monkeypatch.setattr(Int8OneDNN, "__init__", lambda *_: torch.ops.nobody.has_this())
    exact = make_model(n_embd=72)
    tokens = torch.tensor([prompt_of(BLOCK), prompt_of(BLOCK, seed=1)])
    expected = exact(tokens)
    model = pack(exact.to(dtype), "int8")
    assert kinds(model) == {kind}
    assert 0.001 < error(model, expected, tokens) < 0.06
    assert model(tokens).dtype == dtype


def test_int8_rounds_each_weight_to_a_step_of_its_rows_largest():
    weight = torch.tensor([[127.0, -63.4, 0.6], [-1.27, 0.0, 0.009], [0.0, 0.0, 0.0]])
    numbers, scale = packed.int8(weight)
    assert numbers.tolist() == [[127, -63, 1], [-127, 0, 1], [0, 0, 0]]
    torch.testing.assert_close(scale[:2, 0], torch.tensor([1.0, 0.01]))
    for kind in (Int8, Int8OneDNN):  # inputs that are 255 whole steps apart: nothing is rounded there
        got = kind(weight, torch.tensor([1.0, 2.0, 3.0]))(torch.tensor([[128.0, -127.0, 1.0]]))
        expected = torch.tensor([[127 * 128 + 63 * 127 + 1 + 1.0, -1.27 * 128 + 0.01 + 2, 3.0]])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [Int8, Int8OneDNN])
def test_int8_takes_large_inputs_and_small_ones_beside_them(kind):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).half()
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).half() * torch.tensor([[1.0], [50.0], [400.0]]).half()
    got, expected = kind(weight, None)(x).float(), x.float() @ weight.float().T
    assert ((got - expected).norm(dim=1) / expected.norm(dim=1) < 0.02).all()


def test_where_a_kernel_is_missing_the_plain_product_serves(make_model, monkeypatch):
    monkeypatch.setattr(Blocked, "forward", lambda self, x: torch.ops.nobody.has_this(x))
    model = make_model(dtype=torch.bfloat16)
    tokens = torch.tensor([prompt_of(5)])
    expected = model(tokens)
    assert kinds(pack(model)) == {Plain}
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_the_original_weights_are_let_go_of(make_model, quantize):
    model = pack(make_model(dtype=torch.float32), quantize)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    left = {name for name, _ in model.named_parameters()}
    assert left <= {name for name in left if "ln_" in name or name in ("wpe.weight", "wte.rows") or name.endswith(".bias")}
    assert "wte.rows" not in left  # the slices of the head serve, or int8


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_classifier_keeps_its_own_head(quantize):
    model = GPTClassifier(GPTConfig(vocab_size=97, block_size=BLOCK, n_layer=2, n_head=3, n_embd=36), ["a", "b", "c"]).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    tokens = torch.tensor([prompt_of(9)])
    expected = model.head(model.features(tokens))
    got = pack(model, quantize).head(model.features(tokens))
    assert got.shape == expected.shape == (1, 9, 3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 if quantize == "none" else 0.2)


@pytest.mark.slow
def test_compiled_steps_equal_the_plain_ones_in_any_thread():
    model = GPT(GPTConfig(vocab_size=97, block_size=BLOCK, n_layer=2, n_head=3, n_embd=36)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    model.bfloat16()
    prompts, said = [prompt_of(3), prompt_of(9)], []
    plain = [said_by(model, prompts, greedy(2 * BLOCK)), said_by(model, prompts[:1], greedy(5))]
    ready(model, torch.device("cpu"), torch.bfloat16, compile=True)
    thread = threading.Thread(target=lambda: said.extend(said_by(model, p, greedy(n)) for p, n in ((prompts, 2 * BLOCK), (prompts[:1], 5))))
    thread.start()
    thread.join()
    same = [a == b for whole, other in zip(plain, said) for x, y in zip(whole, other) for a, b in zip(x, y)]
    assert len(said) == 2 and sum(same) / len(same) > 0.5 and said[1] == plain[1]  # bf16 rounds near ties otherwise


@pytest.mark.parametrize("quantize, dtype", [("int8", torch.bfloat16), ("none", torch.float32)])
def test_compiling_where_it_gains_nothing_is_refused(make_model, quantize, dtype):
    with pytest.raises(InputError, match="--dtype bfloat16 alone"):
        ready(make_model(), torch.device("cpu"), dtype, quantize, compile=True)


def test_additions_that_learn_are_left_as_they_are(make_model):
    model = make_model(dtype=torch.float32)
    add_lora(model, LoRAConfig(targets=("attn.c_attn",)), 0)
    tokens = torch.tensor([prompt_of(5)])
    expected = model(tokens)
    torch.testing.assert_close(pack(model)(tokens), expected, rtol=1e-4, atol=1e-5)
