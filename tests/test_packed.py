"""Weights laid out for decoding: the same logits, within the rounding of each type."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from test_generate import BLOCK, greedy, prompt_of, said_by
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from nanochat import InputError, packed
from nanochat.classifier import GPTClassifier
from nanochat.generate import Reader
from nanochat.lora import LoRAConfig, add_lora
from nanochat.model import GPT, GPTConfig
from nanochat.packed import Blocked, DynamicInt8, Int8, Plain, Sliced, pack, ready

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
@pytest.mark.parametrize("kind", [Int8, DynamicInt8])
def test_int8_errs_by_a_few_hundredths_of_the_logits_spread(make_model, monkeypatch, dtype, kind):
    if kind is Int8:
        monkeypatch.setattr(DynamicInt8, "__init__", lambda *_: torch.ops.nobody.has_this())
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
    top = 128.0 if torch.cpu._is_vnni_supported() else 64.0
    for kind in (Int8, DynamicInt8):  # inputs that are 255 whole steps apart, or 127: nothing is rounded there
        got = kind(weight, torch.tensor([1.0, 2.0, 3.0]))(torch.tensor([[top, 1 - top, 1.0]]))
        expected = torch.tensor([[127 * top + 63 * (top - 1) + 1 + 1, -1.27 * top + 0.01 + 2, 3.0]])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [Int8, DynamicInt8])
def test_int8_takes_large_inputs_and_small_ones_beside_them(kind):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).half()
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).half() * torch.tensor([[1.0], [50.0], [400.0]]).half()
    got, expected = kind(weight, None)(x).float(), x.float() @ weight.float().T
    assert ((got - expected).norm(dim=1) / expected.norm(dim=1) < 0.02).all()


@pytest.mark.slow
def test_int8_is_as_exact_on_a_cpu_without_vnni():
    """All its tests once more, with the kernel that such a CPU has: it adds pairs of products in 16 bits."""
    code = """import ctypes, pathlib, sys, pytest, torch
try:
    kernels = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    kernels._ZN6fbgemm14fbgemmForceIsaENS_10inst_set_tE(1)  # AVX2
except (OSError, AttributeError):
    sys.exit(77)  # another system, or another kind of CPU
torch.cpu._is_vnni_supported = lambda: sys.argv[1] == "as if it had it"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[2], "-k", "int8 and not without"]))"""
    outcomes = [subprocess.run([sys.executable, "-c", code, said, __file__], capture_output=True, text=True) for said in ("", "as if it had it")]
    if outcomes[0].returncode == 77:
        pytest.skip("no FBGEMM here")
    assert outcomes[0].returncode == 0, outcomes[0].stdout
    assert "test_int8_takes_large_inputs_and_small_ones_beside_them[DynamicInt8]" in outcomes[1].stdout  # the test can fail


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


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_for_a_cpu_it_says_what_the_plain_model_says(make_model, monkeypatch, capsys, backend, dtype):
    """Of one text, whose steps are compiled, to the end of its block and beyond; and of several, whose are not."""
    model = make_model(dtype=dtype)
    exact = copy.deepcopy(model)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    ready(model, torch.device("cpu"), dtype, compile=True)
    assert capsys.readouterr().err.startswith("compiling the step of one token")
    assert kinds(model) == {Plain}
    for prompts in ([prompt_of(1)], [prompt_of(5)], [prompt_of(3), prompt_of(7)]):
        compiled, plain = (Reader(network, len(prompts)) for network in (model, exact))
        texts = prompts
        for _ in range(BLOCK - len(prompts[-1]) + 1):  # the last time the block is full
            got, expected = compiled.logits(texts), plain.logits(texts)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)
            texts = [[*text, token] for text, token in zip(texts, expected.argmax(dim=-1).tolist())]
    if dtype == torch.float32:
        assert said_by(model, [prompt_of(5)], greedy(3 * BLOCK)) == said_by(exact, [prompt_of(5)], greedy(3 * BLOCK))


def test_what_is_compiled_is_the_step_of_one_text_and_no_other(make_model, monkeypatch):
    seen = []

    def compiled(f):
        return lambda *args: seen.append(args[0].shape) or f(*args)

    monkeypatch.setattr(torch, "compile", compiled)
    model = ready(make_model(), torch.device("cpu"), torch.float32, compile=True)
    width, seen[:] = model.config.n_embd, []
    said_by(model, [prompt_of(5)], greedy(3))  # a prompt and two steps; the head each time
    assert seen == [(width,), *[(1, 1, width), (width,)] * 2]
    seen.clear()
    said_by(model, [prompt_of(5), prompt_of(5)], greedy(3))
    model(torch.tensor([[1]]))  # without a cache
    assert seen == [(width,)]


def test_all_that_is_compiled_is_compiled_before_it_is_ready(make_model, monkeypatch):
    """Not at a text's first token, nor where it fills the block, nor for a cache made elsewhere."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)  # with the real compiler's conditions on shapes

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model = ready(make_model(dtype=torch.float32).train(), torch.device("cpu"), torch.float32, compile=True)
    assert len(graphs) == 2  # the blocks, for any number of earlier tokens, and the head
    for prompt in ([1], prompt_of(5), prompt_of(BLOCK)):
        said_by(model, [prompt], greedy(2 * BLOCK))
        said_by(model, [prompt], greedy(2 * BLOCK), reader=Reader(model, 1))
    assert len(graphs) == 2


def test_a_row_of_every_other_number_is_read_as_it_is():
    x, weight = torch.arange(8.0)[::2], torch.arange(12.0).view(3, 4)
    torch.testing.assert_close(packed.row_product(x, weight), weight @ x)


@pytest.mark.parametrize("device, why, message", [
    ("cpu int8", None, "--compile on a CPU is for --quantize none: int8 is faster without (benchmarks/README.md)"),
    ("mps", None, "--compile is for cuda and cpu, not for mps"),
    ("cpu", RuntimeError("No working C++ compiler\nfound in …"), "--compile does not work here: No working C++ compiler"),
    ("cpu", AssertionError(), "--compile does not work here: AssertionError"),
])  # fmt: skip
def test_where_compiling_is_of_no_use_or_fails_one_line_says_so(make_model, monkeypatch, device, why, message):
    def compiled(f):
        def fail(*_):
            raise why
        return fail

    monkeypatch.setattr(torch, "compile", compiled)
    device, *quantize = device.split()
    with pytest.raises(InputError) as info:
        ready(make_model(), torch.device(device), torch.float32, *quantize, compile=True)
    assert str(info.value) == message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_made_ready_it_is_as_if_converted_first(make_model, dtype):
    model, tokens = make_model(dtype=torch.float32), torch.tensor([prompt_of(5)])
    model.h[0].mlp.c_fc.weight.data = model.h[0].mlp.c_fc.weight.T.contiguous().T  # as a GPT-2 file has it
    expected = pack(copy.deepcopy(model).to(dtype))(tokens)
    ready(model, torch.device("cpu"), dtype)
    got = model(tokens)
    assert got.dtype == dtype and torch.equal(got, expected)
    assert all(part.weight.is_contiguous() for part in model.modules() if isinstance(part, Plain))


def test_additions_that_learn_are_left_as_they_are(make_model):
    model = make_model(dtype=torch.float32)
    add_lora(model, LoRAConfig(targets=("attn.c_attn",)), 0)
    tokens = torch.tensor([prompt_of(5)])
    expected = model(tokens)
    torch.testing.assert_close(pack(model)(tokens), expected, rtol=1e-4, atol=1e-5)
