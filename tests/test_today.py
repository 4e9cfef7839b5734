"""docs/today.md: its code is run and held equal to PyTorch's and Hugging Face's, its figures follow from the shape."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding, apply_rotary_pos_emb

import train
from nanochat import model
from nanochat.model import GPT, GPTConfig, KVCache, attention_formula, forward_flops

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / "today.md", ROOT / "docs" / "today.zh-CN.md"]
SMALL = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=4, n_embd=48)  # D = 12


def code(page: Path) -> str:
    """The page's blocks of code, which are one file from top to bottom."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))


@pytest.fixture(scope="module")
def today() -> dict:
    """What the page's code defines, by its name."""
    names: dict = {}
    exec(compile(code(PAGES[0]), str(PAGES[0]), "exec"), names)
    return names


@pytest.fixture(autouse=True)
def exact():
    """float64, so that equal means equal."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def hugging_face() -> LlamaForCausalLM:
    """A tiny Llama with 2 heads of keys and values for 4 of queries, whose every weight matters."""
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=SMALL.vocab_size, hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, rms_norm_eps=1e-5, tie_word_embeddings=False))
    with torch.no_grad():
        for p in llama.parameters():
            p += 0.1 * torch.randn_like(p)
    return llama.eval()


def test_both_languages_show_the_same_code_tables_and_headings():
    english, chinese = (page.read_text(encoding="utf-8") for page in PAGES)
    assert code(PAGES[0]) == code(PAGES[1])
    for pattern in (r"^#+ ", r"^\|", r"^\*\*", r"^- "):
        assert len(re.findall(pattern, english, re.MULTILINE)) == len(re.findall(pattern, chinese, re.MULTILINE)), pattern


def test_every_link_leads_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)", text, re.MULTILINE)}
        for target in re.findall(r"\]\((.*?)\)", text):
            assert target[1:] in anchors if target.startswith("#") else (page.parent / target).exists(), f"{page.name}: {target}"


def test_rmsnorm_equals_pytorch(today):
    x, norm = 3 + torch.randn(2, 5, 48), today["RMSNorm"](48)
    with torch.no_grad():
        norm.weight.normal_()
    torch.testing.assert_close(norm(x), F.rms_norm(x, (48,), norm.weight, 1e-5), rtol=0, atol=1e-12)
    large = torch.full((1, 48), 3e4, dtype=torch.float16)  # whose squares are beyond fp16
    torch.testing.assert_close(norm.half()(large)[0], norm.weight)


def test_rotate_equals_hugging_face(today):
    q, k = torch.randn(2, 4, 16, 12), torch.randn(2, 2, 16, 12)
    positions = torch.stack([torch.arange(16), torch.arange(40, 56)])
    cos, sin = LlamaRotaryEmbedding(hugging_face().config)(q, positions)  # angles in fp32, and here the default type
    for ours, theirs in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin)):
        torch.testing.assert_close(today["rotate"](ours, positions), theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(today["rotate"](q, positions[0])[0], today["rotate"](q, positions)[0])


def test_after_rotation_a_product_depends_on_the_distance_alone(today):
    q, k = torch.randn(2, 1, 1, 1, 12)
    products = {(t, s): (today["rotate"](q, torch.tensor([t])) * today["rotate"](k, torch.tensor([s]))).sum()
                for t, s in [(7, 2), (905, 900), (5, 0), (7, 3)]}
    torch.testing.assert_close(products[7, 2], products[905, 900], rtol=0, atol=1e-10)
    torch.testing.assert_close(products[7, 2], products[5, 0], rtol=0, atol=1e-10)
    assert (products[7, 2] - products[7, 3]).abs() > 1e-3, "another distance, another product"
    torch.testing.assert_close(today["rotate"](q, torch.tensor([999])).norm(), q.norm())


def test_swiglu_equals_hugging_face(today):
    theirs, ours = LlamaMLP(hugging_face().config), today["SwiGLU"](SMALL)
    names = {"gate_proj": "c_gate", "up_proj": "c_fc", "down_proj": "c_proj"}
    ours.load_state_dict({names[name.split(".")[0]] + ".weight": p for name, p in theirs.state_dict().items()})
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)


def test_grouped_attention_equals_pytorch_and_with_all_heads_the_formula(today):
    q, k, v = torch.randn(2, 6, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.rand(7, 7) < 0.5
    mask.fill_diagonal_(True)
    for seen in (None, mask):
        grouped = today["grouped_attention"](q, k, v, seen)
        built_in = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=True)
        torch.testing.assert_close(grouped, built_in, rtol=0, atol=1e-12)
        each = [x.repeat_interleave(3, dim=1) for x in (k, v)]
        torch.testing.assert_close(today["grouped_attention"](q, *each, seen), attention_formula(q, *each, seen, 0.0), rtol=0, atol=1e-12)


def from_hugging_face(today: dict, theirs: LlamaForCausalLM) -> list:
    """The page's blocks with the weights of a Hugging Face Llama."""
    blocks = []
    for layer in theirs.model.layers:
        block = today["TodayBlock"](SMALL, 2)
        a, m = layer.self_attn, layer.mlp
        block.load_state_dict({
            "ln_1.weight": layer.input_layernorm.weight, "ln_2.weight": layer.post_attention_layernorm.weight,
            "attn.c_attn.weight": torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
            "attn.c_proj.weight": a.o_proj.weight, "mlp.c_gate.weight": m.gate_proj.weight,
            "mlp.c_fc.weight": m.up_proj.weight, "mlp.c_proj.weight": m.down_proj.weight})
        blocks.append(block)
    return blocks


@torch.no_grad()
def test_the_four_together_equal_hugging_face_llama_with_our_cache_and_without(today):
    theirs, tokens = hugging_face(), torch.randint(61, (2, 12))
    blocks = from_hugging_face(today, theirs)

    def logits(read: torch.Tensor, positions: torch.Tensor, mask=None, caches=(None, None)) -> torch.Tensor:
        x = theirs.model.embed_tokens(read)
        for block, cache in zip(blocks, caches):
            x = block(x, positions, mask, cache)
        return F.linear(F.rms_norm(x, (48,), theirs.model.norm.weight, 1e-5), theirs.lm_head.weight)

    expected = theirs(tokens).logits
    torch.testing.assert_close(logits(tokens, torch.arange(12)), expected, rtol=0, atol=1e-6)
    keys, values = torch.zeros(2, 2, 2, 2, 16, 12)  # each (n_layer, B, G, block_size, D)
    cache, pieces = KVCache(keys, values, torch.zeros(2, dtype=torch.int64)), []
    for piece in tokens.split([5, 1, 3, 1, 1, 1], dim=1):
        positions, mask = cache.advance(piece.size(1))
        pieces.append(logits(piece, positions, mask, cache.layers(positions)))
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-6)


def test_each_part_fits_into_model_py_where_the_page_says(today, monkeypatch):
    """A GPT with RMSNorm, SwiGLU and grouped attention: each token of the past counts, none of the future, all weights learn."""
    monkeypatch.setattr(model.nn, "LayerNorm", today["RMSNorm"])
    monkeypatch.setattr(model, "MLP", today["SwiGLU"])
    monkeypatch.setattr(model, "attention", today["grouped_attention"])
    monkeypatch.setattr(GPT, "_init_weights", staticmethod(lambda module: None))
    gpt, tokens = GPT(SMALL), torch.randint(61, (1, 8))
    changed = tokens.clone()
    changed[0, 5] += 1 if tokens[0, 5] < 60 else -1
    difference = (gpt(tokens) - gpt(changed)).abs().amax(dim=-1)[0]
    assert (difference[:5] == 0).all() and (difference[5:] > 0).all()
    gpt(tokens, tokens).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in gpt.parameters())


def figures() -> list[str | tuple[str, str]]:
    """What the page computes from GPT-2's shape, as it writes it; a pair where the languages write it differently."""
    c, G = GPTConfig(), 4
    C, L, D, V, T = c.n_embd, c.n_layer, c.n_embd // c.n_head, c.vocab_size, c.block_size
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in GPT(c).named_parameters()}
    total = sum(sizes.values())
    biases = sum(n for name, n in sizes.items() if name.endswith("bias"))
    norm_biases = sum(n for name, n in sizes.items() if "ln_" in name and name.endswith("bias"))
    width = 8 * C // 3
    assert 2 * 4 * C * C == 3 * C * width, "SwiGLU has as many weights"
    matrices = L * (C * (C + 2 * G * D) + C * C + 3 * C * width) + (2 * L + 1) * C + V * C
    cache = 2 * L * C * 2  # bytes a token in bf16
    assert 6 * cache * T < 2 * total < 7 * cache * T, "seven caches outweigh the model"
    preset = train.PRESETS["gpt2"]
    planned = preset.training.max_steps * preset.training.batch_size * preset.training.accumulate * preset.block_size
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    millions, steps = re.search(r"\| ([\d.]+) million parameters, ([\d,]+) steps", readme).groups()
    read = int(steps.replace(",", "")) * train.Settings().training.batch_size * train.Settings().block_size
    return [
        f"{total:,}", f"{norm_biases:,}", f"{sizes['wpe.weight']:,}", f"{sizes['wpe.weight'] / total:.2%}",
        f"{6 * C * L:,} FLOP", f"{6 * C * L / forward_flops(c):.2%}", f"{2 * torch.pi * 10_000 ** (1 - 2 / D):,.0f}",
        f"{width:,}", f"{3 * C * width:,}", f"{1.679 - 1.636:.3f}", f"{cache:,}", f"{cache * T / 1e6:.1f} MB",
        f"{cache * T * G / c.n_head / 1e6:.1f} MB", f"{cache * T / c.n_head / 1e6:.1f} MB", f"{2 * total / 1e6:.0f} MB",
        f"{2 * L * C * (C - G * D):,}", f"{matrices:,}", f"{matrices + V * C:,}", f"{biases:,}", f"{biases / total:.2%}",
        f"{V * C:,}", f"{V * C / total:.0%}", f"{32_000 * 4096:,}",
        *(f"{4 * L * C * t / forward_flops(c, T=t):.0%}" for t in (1024, 8192, 131072)),
        (f"{20 * total / 1e9:.1f} billion", f"{20 * total / 1e8:.0f} 亿"), (f"{planned / 1e9:.1f} billion", f"{planned / 1e8:.0f} 亿"),
        (f"{planned / total:.0f} a parameter", f"每个参数 {planned / total:.0f} 个"),
        (f"{read / 1e6:.1f} million tokens", f"{read / 1e4:.0f} 万个词元"),
        (f"{read / float(millions) / 1e6:.1f} a parameter", f"每个参数 {read / float(millions) / 1e6:.1f} 个"),
        (f"{20 * float(millions):.0f} million", f"{20 * float(millions) / 100:.2f} 亿"),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_figures_follow_from_the_shape(page):
    text = " ".join(page.read_text(encoding="utf-8").split())
    for figure in figures():
        figure = figure if isinstance(figure, str) else figure[page == PAGES[1]]
        figure = re.sub(r"%$", " %", figure)
        assert re.search(rf"(?<![\d.,]){re.escape(figure)}", text), f"{page.name} lacks {figure}"


def test_what_the_page_says_of_our_runs_is_in_the_readme():
    for page, readme in zip(PAGES, (ROOT / "README.md", ROOT / "README.zh-CN.md")):
        for figure in ("2.114", "1143", "58.3", "1.98", "`I'm not sure. I'm not sure.`"):
            assert figure in page.read_text(encoding="utf-8"), f"{page.name} lacks {figure}"
            assert figure.strip("`") in readme.read_text(encoding="utf-8"), f"{readme.name} no longer says {figure}"
