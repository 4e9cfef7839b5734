"""model.py: exactness, causality, tying, initial state. Parity with Hugging Face is in test_checkpoint.py."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from nanochat import InputError, model
from nanochat.model import GPT, IGNORED, GPTConfig, forward_flops
from nanochat.runtime import autocast


@pytest.fixture(params=["fused", "formula"])
def attention_path(request, monkeypatch):
    """Runs a test twice: with scaled_dot_product_attention, and with the written-out formula."""
    if request.param == "formula":
        monkeypatch.setattr(model, "attention", model.attention_formula)
    return request.param


def tokens_of(gpt: GPT, B: int = 2, T: int = 11) -> torch.Tensor:
    return torch.randint(gpt.config.vocab_size, (B, T))


@pytest.mark.parametrize("kind", ["causal", "segments", "one new token", "chunk", "rows of their own length"])
def test_fused_attention_equals_the_formula(kind):
    past = {"one new token": [6, 6], "chunk": [4, 4], "rows of their own length": [3, 4]}.get(kind, [0, 0])
    T = {"one new token": 1, "chunk": 3, "rows of their own length": 3}.get(kind, 7)
    q = torch.randn(2, 3, T, 5, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, max(past) + T, 5, dtype=torch.float64)
    mask = model.KVCache(k, v, torch.tensor(past)).advance(T)[1]
    assert (mask is None) == (kind in ("causal", "segments", "one new token"))
    if kind == "segments":
        mask = model.visible(torch.tensor([[0, 0, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 1, 1]]))
    expected = model.attention_formula(q, k, v, mask, 0.0)
    torch.testing.assert_close(model.attention(q, k, v, mask, 0.0), expected, rtol=1e-9, atol=1e-12)


def test_attention_is_the_mean_of_the_past_when_all_scores_are_equal():
    v = torch.randn(1, 1, 5, 4, dtype=torch.float64)
    zeros = torch.zeros_like(v)
    expected = v.cumsum(dim=2) / torch.arange(1, 6)[:, None]
    torch.testing.assert_close(model.attention(zeros, zeros, v, None, 0.0), expected)


def test_changing_a_token_changes_no_earlier_logit(make_model, attention_path):
    gpt = make_model()
    tokens = tokens_of(gpt)
    logits = gpt(tokens)
    for t in range(1, tokens.size(1)):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % gpt.config.vocab_size
        new = gpt(changed)
        assert torch.equal(new[:, :t], logits[:, :t])
        assert not torch.allclose(new[:, t], logits[:, t])


def test_both_attention_paths_give_the_same_logits(make_model, monkeypatch):
    gpt = make_model()
    tokens = tokens_of(gpt)
    fused = gpt(tokens)
    monkeypatch.setattr(model, "attention", model.attention_formula)
    torch.testing.assert_close(gpt(tokens), fused, rtol=1e-9, atol=1e-12)


def test_dropout_acts_in_training_only(make_model, attention_path):
    for setting in ("dropout", "attention_dropout"):
        gpt = make_model(**{setting: 0.3})
        tokens = tokens_of(gpt)
        logits = gpt(tokens)
        assert torch.equal(gpt(tokens), logits)
        without = make_model()
        without.load_state_dict(gpt.state_dict())
        assert torch.equal(without(tokens), logits)
        gpt.train()
        assert not torch.allclose(gpt(tokens), gpt(tokens)), setting
        gpt.eval()
        assert torch.equal(gpt(tokens), logits)


def test_dropout_zeroes_its_share_of_the_embedding_and_of_each_branch(make_model):
    gpt, shares = make_model(dropout=0.3).train(), {}

    def note(name: str, x: torch.Tensor) -> None:
        shares[name] = (x == 0).double().mean().item()

    block = gpt.h[0]
    block.register_forward_pre_hook(lambda _, inputs: note("embedding", inputs[0]))
    for name in ("attn", "mlp"):
        block.get_submodule(name).register_forward_hook(lambda _, inputs, output, name=name: note(name, output))
    gpt(tokens_of(gpt, 16, 24))
    assert shares == pytest.approx({"embedding": 0.3, "attn": 0.3, "mlp": 0.3}, abs=0.02)


def test_every_layer_norm_has_the_epsilon_of_the_settings(make_model):
    norms = [module.eps for module in make_model(layer_norm_epsilon=0.1).modules() if isinstance(module, torch.nn.LayerNorm)]
    assert norms == [0.1] * 5  # two in each of two blocks, and the last


def test_gpt2_small_has_124_439_808_parameters():
    with torch.device("meta"):
        gpt = GPT(GPTConfig())
    assert sum(p.numel() for p in gpt.parameters()) == 124_439_808


def test_head_and_embedding_are_one_tensor_everywhere(make_model):
    gpt = make_model(dtype=torch.float32)
    for same in (gpt, gpt.to(torch.float64), torch.compile(gpt, backend="eager")):
        names = [name for name, p in same.named_parameters() if p.shape == (97, 36)]
        assert len(names) == 1 and names[0].endswith("wte.weight")
    x = torch.randn(1, 36, dtype=torch.float64)
    gpt.wte.weight.data.mul_(2)
    torch.testing.assert_close(gpt.head(x), x @ gpt.wte.weight.T)
    gpt(tokens_of(gpt), tokens_of(gpt)).backward()  # both uses reach its gradient
    assert (gpt.wte.weight.grad.abs().sum(dim=1) > 0).all()


def test_initial_weights_have_the_stds_of_the_paper():
    gpt = GPT(GPTConfig(vocab_size=512, block_size=64, n_layer=8, n_head=4, n_embd=256))
    for name, p in gpt.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / std - 1) < 0.05, name


def test_first_loss_is_the_logarithm_of_the_vocabulary():
    gpt = GPT(GPTConfig(vocab_size=512, block_size=64, n_layer=4, n_head=4, n_embd=256))
    tokens, targets = torch.randint(512, (2, 4, 64))
    assert abs(gpt(tokens, targets).item() / targets.numel() - math.log(512)) < 0.3


def test_loss_is_the_sum_over_supervised_targets(make_model, monkeypatch):
    monkeypatch.setattr(model, "LOSS_CHUNK", 5)  # several chunks, the last one shorter
    gpt = make_model()
    tokens, targets = tokens_of(gpt), tokens_of(gpt)
    targets[0, 2:7] = targets[1, -1] = IGNORED
    logits = gpt(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    nll = gpt.nll(tokens, targets)
    torch.testing.assert_close(nll.flatten(), expected, rtol=1e-9, atol=1e-12)
    assert (nll[targets == IGNORED] == 0).all()
    torch.testing.assert_close(gpt(tokens, targets), expected.sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("supervised, rows", [(0, 0), (1, 64), (64, 64), (65, 100), (100, 100)])
def test_the_head_sees_rows_in_steps_of_64(supervised, rows, monkeypatch):
    """Else a CPU would keep a kernel of its own for each number of supervised tokens."""
    gpt = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=32))
    tokens, targets = torch.randint(64, (2, 10, 10), generator=torch.Generator().manual_seed(0))
    targets.view(-1)[torch.randperm(100, generator=torch.Generator().manual_seed(0))[supervised:]] = IGNORED
    expected = F.cross_entropy(gpt(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    heard, head = [], gpt.head
    monkeypatch.setattr(gpt, "head", lambda x: heard.append(len(x)) or head(x))
    torch.testing.assert_close(gpt.nll(tokens, targets).flatten(), expected)
    assert heard == [rows]


def test_token_0_is_learned_like_any_other(make_model):
    gpt = make_model()
    tokens = tokens_of(gpt)
    expected = -gpt(tokens).log_softmax(dim=-1)[..., 0]
    torch.testing.assert_close(gpt.nll(tokens, torch.zeros_like(tokens)), expected, rtol=1e-9, atol=1e-12)


def test_loss_is_fp32_when_the_network_is_not(make_model):
    gpt = make_model(dtype=torch.bfloat16)
    assert gpt(tokens_of(gpt), tokens_of(gpt)).dtype == torch.float32


def test_no_supervised_target_is_a_zero_loss_with_zero_gradients(make_model):
    gpt = make_model()
    loss = gpt(tokens_of(gpt), torch.full((2, 11), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in gpt.parameters())


def gradients(gpt: GPT, recompute: bool, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[list[torch.Tensor], int]:
    """→ (the loss and the gradients of a training forward, the bytes that it keeps for its backward)."""
    gpt.recompute, tokens, kept = recompute, torch.arange(40).view(2, 20) % 97, {}
    gpt.train().zero_grad()
    torch.manual_seed(seed)
    with saved_tensors_hooks(lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x):
        with autocast(tokens.device, dtype):
            loss = gpt(tokens, tokens, tokens // 13)
        size = sum(kept.values())
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in gpt.parameters())], size


@pytest.mark.parametrize("weights, dtype", [(torch.float64, torch.float32), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_blocks_give_the_same_gradients_bit_for_bit(weights, dtype, dropout, make_model):
    """Dropout draws the same masks again; another draw would show."""
    gpt = make_model(weights, n_layer=4, dropout=dropout, attention_dropout=dropout)
    expected, _ = gradients(gpt, False, dtype)
    again, _ = gradients(gpt, True, dtype)
    assert all(torch.equal(one, other) for one, other in zip(expected, again, strict=True))
    assert torch.equal(expected[0], gradients(gpt, True, dtype, seed=2)[0][0]) is (dropout == 0)


def test_recomputing_keeps_little_more_than_the_input_of_each_block(make_model):
    sizes = {layers: [gradients(make_model(n_layer=layers), recompute)[1] for recompute in (False, True)] for layers in (1, 5)}
    kept, kept_less = ((long - short) / 4 for short, long in zip(*sizes.values()))  # a block
    weights = sum(p.numel() for p in model.Block(make_model().config).parameters()) * 8
    assert kept_less == 2 * 20 * 36 * 8  # its input, in float64
    assert kept > 10 * kept_less + weights / 2


def test_evaluating_recomputes_nothing(make_model, monkeypatch):
    gpt, asked, real = make_model(), [], model.checkpoint
    tokens = tokens_of(gpt)
    expected = gpt(tokens)
    gpt.recompute = True
    monkeypatch.setattr(model, "checkpoint", lambda *args, **named: asked.append(args) or real(*args, **named))
    assert torch.equal(gpt(tokens), expected) and not asked
    gpt.train()(tokens)
    assert len(asked) == gpt.config.n_layer


def test_segments_are_separate_texts(make_model, attention_path):
    gpt = make_model()
    a, b = tokens_of(gpt, 1, 5), tokens_of(gpt, 1, 8)
    segments = torch.tensor([[1] * 5 + [2] * 8])
    together = gpt.head(gpt.features(torch.cat([a, b], dim=1), segments=segments))
    torch.testing.assert_close(together[:, :5], gpt(a), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(together[:, 5:], gpt(b), rtol=1e-9, atol=1e-12)


def test_positions_restart_where_the_segment_changes():
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5], [1, 2, 3, 3, 1, 1]])
    expected = [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 0, 1]]
    assert model.segment_positions(segments).tolist() == expected


def test_more_tokens_than_the_block_are_refused(make_model):
    gpt = make_model()
    with pytest.raises(ValueError, match="0 \\+ 25 tokens exceed block_size 24"):
        gpt(tokens_of(gpt, 1, 25))
    cache = gpt.new_cache(1)
    gpt.features(tokens_of(gpt, 1, 20), cache=cache)
    with pytest.raises(ValueError, match="20 \\+ 5 tokens"):
        gpt.features(tokens_of(gpt, 1, 5), cache=cache)


def test_new_rows_start_near_the_mean_and_old_logits_stay(make_model):
    gpt = make_model()
    tokens = tokens_of(gpt)
    old, mean = gpt(tokens), gpt.wte.weight.mean(0)
    gpt.grow(101)
    assert gpt.config.vocab_size == 101
    torch.testing.assert_close(gpt(tokens)[..., :97], old, rtol=1e-9, atol=1e-12)
    assert (gpt.wte.weight[97:] - mean).abs().max() < 0.1 * gpt.wte.weight.std()
    assert not torch.equal(gpt.wte.weight[97], gpt.wte.weight[98])


def test_all_wrong_settings_are_named_together():
    with pytest.raises(InputError) as error:
        GPTConfig(n_layer=0, dropout=1.5, activation="relu")
    for part in ("n_layer is 0", "dropout is 1.5", "'relu'"):
        assert part in str(error.value)
    with pytest.raises(InputError, match="n_embd 64 is not a multiple of n_head 5"):
        GPTConfig(n_embd=64, n_head=5)


def test_a_table_of_one_row_grows_by_rows_like_it():
    model = GPT(GPTConfig(vocab_size=1, block_size=4, n_layer=1, n_head=1, n_embd=4))
    model.grow(3)
    assert torch.equal(model.wte.weight, model.wte.weight[:1].expand(3, -1))


def test_flops_agree_with_torchs_counter(monkeypatch):
    monkeypatch.setattr(model, "attention", model.attention_formula)  # it does not count the fused one on a CPU
    config = GPTConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32)
    gpt = GPT(config)
    tokens = torch.zeros(10, 10, dtype=torch.long)
    targets = torch.where(torch.arange(100) < 64, 0, IGNORED).view(10, 10)
    for arguments, expected in [
        ((torch.zeros(1, 16, dtype=torch.long),), 16 * forward_flops(config)),
        ((tokens,), forward_flops(config, 100, T=10)),
        ((tokens, targets), forward_flops(config, 100, 64, T=10)),
    ]:
        with FlopCounterMode(display=False) as counter:
            gpt(*arguments)
        assert counter.get_total_flops() == expected


def test_the_table_lists_every_tensor_and_the_total():
    shown = subprocess.run([sys.executable, "-m", "nanochat.model"], capture_output=True, text=True, check=True).stdout
    assert "124,439,808" in shown
    assert "h.11.mlp.c_proj.weight" in shown
    wrong = subprocess.run(
        [sys.executable, "-m", "nanochat.model", "--n-embd", "65"], capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "n_embd 65 is not a multiple of n_head 12" in wrong.stderr
