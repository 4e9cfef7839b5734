"""From formula to code: the main formulas of the project, written once more in plain NumPy, and held equal to the code.

A page to read alone, from top to bottom, with the papers beside it: each test names its equation, writes it as
loops and sums, and compares with what the package computes, in float64. Where a formula is a derivative, the slope
is measured: (f(x + h) − f(x − h)) / 2h, whose error is of the order h².

Shapes as in nanochat/model.py: T tokens, C channels, H heads of D = C / H, V ids.
"""

import importlib
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat import lora, model, training
from nanochat.generate import SampleConfig, keep_top_p, probabilities
from nanochat.model import IGNORED
from nanochat.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))


def array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as a NumPy array of its own."""
    return tensor.detach().numpy().copy()


def assert_equal(ours: torch.Tensor, formula: np.ndarray, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(array(ours), formula, rtol=tolerance, atol=tolerance)


def softmax(x: np.ndarray) -> np.ndarray:
    """e^x / Σ e^x over the last dimension; the largest x is taken off first, so that no power overflows."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# ------------------------------------------------------------------ the network


def test_layer_norm_is_the_distance_from_the_mean_in_standard_deviations(make_model):
    """Ba et al. 2016, equations 3 and 4: of each vector x of C numbers on its own

        μ = Σ xᵢ / C        σ² = Σ (xᵢ − μ)² / C        y = g · (x − μ) / √(σ² + ε) + b

    ε, which the paper has not, keeps a vector of equal numbers from being 0 / 0. Gain g and bias b are learned.
    """
    norm = make_model().ln_f
    g, b, x = array(norm.weight), array(norm.bias), 0.01 * np.random.default_rng(0).normal(3, 1, (4, 36))  # small: ε shows

    y = np.empty_like(x)
    for t in range(4):
        mean = x[t].sum() / 36
        variance = ((x[t] - mean) ** 2).sum() / 36
        y[t] = g * (x[t] - mean) / np.sqrt(variance + 1e-5) + b

    assert_equal(norm(torch.from_numpy(x)), y)


@pytest.mark.parametrize("path", ["attention", "attention_formula"])
def test_attention_is_a_mean_of_values_weighted_by_how_well_keys_answer_queries(path, make_model, monkeypatch):
    """Vaswani et al. 2017, equation 1 and section 3.2.2, with the causal mask of section 3.2.3:

        Attention(Q, K, V) = softmax(Q Kᵀ / √D) V        MultiHead(x) = Concat(head₁ … head_H) Wᴼ

    For the query of position t that is a mean over the positions s ≤ t; in GPT-2 each product also adds a bias.
    """
    monkeypatch.setattr(model, "attention", getattr(model, path))
    part = make_model().h[0].attn
    C, H, D = 36, 3, 12
    x = np.random.default_rng(0).normal(size=(7, C))

    q, k, v = np.split(x @ array(part.c_attn.weight).T + array(part.c_attn.bias), 3, axis=1)  # each (T, C)
    heads = np.zeros((7, C))
    for h in range(H):
        mine = slice(h * D, (h + 1) * D)
        for t in range(7):
            scores = np.array([q[t, mine] @ k[s, mine] / np.sqrt(D) for s in range(t + 1)])
            weights = softmax(scores)
            heads[t, mine] = sum(weights[s] * v[s, mine] for s in range(t + 1))
    y = heads @ array(part.c_proj.weight).T + array(part.c_proj.bias)

    assert_equal(part(torch.from_numpy(x)[None], None, None)[0], y)


def test_gelu_in_its_tanh_form_is_near_x_times_the_normal_distribution_function(make_model):
    """Hendrycks and Gimpel 2016, section 2: x · Φ(x), and the approximation that GPT-2 was trained with

        GELU(x) ≈ ½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))

    Φ(x) is the area under the bell curve up to x, here a sum of narrow trapezia.
    """
    x = np.linspace(-6, 6, 1201)
    form = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    assert_equal(model.ACTIVATIONS["gelu_new"](torch.from_numpy(x)), form)

    bell = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    area = np.concatenate([[0], np.cumsum((bell[1:] + bell[:-1]) / 2 * np.diff(x))])
    assert 1e-4 < np.abs(form - x * area).max() < 1e-3

    part, x = make_model().h[0].mlp, np.random.default_rng(0).normal(size=(7, 36))
    hidden = x @ array(part.c_fc.weight).T + array(part.c_fc.bias)  # (T, 4C)
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    assert_equal(part(torch.from_numpy(x)), hidden @ array(part.c_proj.weight).T + array(part.c_proj.bias))


def test_the_loss_is_minus_the_logarithm_of_what_the_target_was_given(make_model):
    """Radford et al. 2018 (GPT), equations 1 and 2: what is made small is

        L = − Σₜ ln P(uₜ | u₀ … uₜ₋₁)        P(u) = softmax(x Wₑᵀ)        x: the last layer's vector, Wₑ: the token table

    summed over the targets that are supervised. Its slope towards a logit is P − 1 at the target and P elsewhere:
    what was given away is pushed down, what was missing is pushed up (measured here with h = 10⁻⁵).
    """
    gpt = make_model()
    tokens, targets = torch.randint(97, (2, 1, 9))
    targets[0, [0, 4]] = IGNORED
    x = array(gpt.features(tokens))[0]  # (T, C)
    P = softmax(x @ array(gpt.wte.weight).T)  # (T, V)

    learned = [(t, u) for t, u in enumerate(targets[0].tolist()) if u != IGNORED]
    assert len(learned) == 7
    assert_equal(gpt(tokens, targets), np.array(-sum(np.log(P[t, u]) for t, u in learned)))

    V = gpt.config.n_embd
    gpt.cut(V)
    gpt.wte.weight.data = torch.eye(V, dtype=torch.float64)  # a head that gives its inputs as logits
    logits, target, h = np.random.default_rng(0).normal(size=V), 3, 1e-5
    slope = [(-np.log(softmax(logits + h * e)[target]) + np.log(softmax(logits - h * e)[target])) / (2 * h) for e in np.eye(V)]
    leaf = torch.from_numpy(logits).requires_grad_()
    gpt.chunk_nll(leaf[None], torch.tensor([target])).sum().backward()
    assert_equal(leaf.grad, softmax(logits) - np.eye(V)[target])
    assert_equal(leaf.grad, np.array(slope), 1e-8)


def test_the_gradient_is_the_slope_of_the_loss_in_any_direction(make_model):
    """Rumelhart, Hinton and Williams 1986: backpropagation gives all the partial derivatives of L at once, so that

        (L(w + h d) − L(w − h d)) / 2h  =  Σ ∂L/∂wᵢ · dᵢ        for each direction d in the space of the weights.

    One random direction moves every weight of the network, so a wrong derivative anywhere would show.
    """
    gpt, h = make_model(), 1e-5
    tokens, targets = torch.randint(97, (2, 2, 9))
    gpt(tokens, targets).backward()
    weights = list(gpt.parameters())
    direction = [torch.randn_like(w) for w in weights]

    def loss_at(step: float) -> float:
        with torch.no_grad():
            for w, d in zip(weights, direction):
                w += step * d
            loss = gpt(tokens, targets).item()
            for w, d in zip(weights, direction):
                w -= step * d
        return loss

    slope = (loss_at(h) - loss_at(-h)) / (2 * h)
    assert slope == pytest.approx(sum((array(w.grad) * array(d)).sum() for w, d in zip(weights, direction)), rel=1e-6)


# ------------------------------------------------------------------ the step


def steps_of(optimizer: str, make_model, config: dict, steps: int = 3) -> tuple[dict, dict, dict]:
    """The optimizer of training.py on a tiny GPT with random gradients: → (weights before, gradients of each step, weights after)."""
    gpt = make_model()
    before = {name: array(w) for name, w in gpt.named_parameters()}
    built = training.build_optimizer(gpt, training.TrainConfig(optimizer=optimizer, **config))
    gradients = {name: [] for name in before}
    for _ in range(steps):
        for name, w in gpt.named_parameters():
            w.grad = torch.randn_like(w)
            gradients[name].append(array(w.grad))
        built.step()
    return before, gradients, {name: w.detach() for name, w in gpt.named_parameters()}


def adamw(w: np.ndarray, gradients: list[np.ndarray], rate: float, beta1: float, beta2: float, decay: float, epsilon: float = 1e-8) -> np.ndarray:
    """Loshchilov and Hutter 2019, algorithm 2; as in PyTorch the rate scales the decay too."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g  # line 7: a moving mean of the gradient …
        v = beta2 * v + (1 - beta2) * g**2  # line 8: … and of its square
        m_hat = m / (1 - beta1**t)  # lines 9 and 10: both began at zero, which is made up for
        v_hat = v / (1 - beta2**t)
        w = w - rate * (m_hat / (np.sqrt(v_hat) + epsilon) + decay * w)  # line 12
    return w


def test_adamw_divides_a_mean_of_gradients_by_the_root_of_a_mean_of_squares(make_model):
    """Loshchilov and Hutter 2019, algorithm 2, lines 7 to 12: `adamw` above. Only the matrices of the blocks decay."""
    before, gradients, after = steps_of("adamw", make_model, dict(learning_rate=1e-2, beta2=0.97, weight_decay=0.3))
    for name, w in before.items():
        decay = 0.3 if name.startswith("h.") and w.ndim == 2 else 0
        assert_equal(after[name], adamw(w, gradients[name], 1e-2, 0.9, 0.97, decay))


def newton_schulz(G: np.ndarray) -> np.ndarray:
    """Liu et al. 2025, equation 2, of Jordan et al. 2024: G = U S Vᵀ → nearly U Vᵀ, by products alone.

    X ← aX + b(XXᵀ)X + c(XXᵀ)²X changes the singular values and no direction: each s becomes as + bs³ + cs⁵. Five times
    over, that sends all but the very small ones to about 1. Dividing by the norm brings all of them into (0, 1].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / np.sqrt((G**2).sum())
    for _ in range(5):
        XXt = X @ X.T
        X = a * X + b * XXt @ X + c * XXt @ XXt @ X
    return X


def test_muon_moves_a_matrix_by_its_momentum_made_nearly_orthogonal(make_model, monkeypatch):
    """Jordan et al. 2024 with the scale of Liu et al. 2025, equations 1 and 4, for a matrix W of the shape (A, B):

        Mₜ = μ Mₜ₋₁ + Gₜ        Oₜ = NewtonSchulz(Gₜ + μ Mₜ)        Wₜ = Wₜ₋₁ − η (0.2 √max(A, B) · Oₜ + λ Wₜ₋₁)

    (Gₜ + μ Mₜ in the place of Mₜ is Nesterov's look-ahead.) 0.2 √max(A, B) makes the numbers of the step about 0.2 in
    size, as AdamW's are. Tables, biases and layer norms take AdamW's step. PyTorch iterates in bfloat16; here it is made
    to keep float64, so that not the rounding but the formula is compared.
    """
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)
    before, gradients, after = steps_of("muon", make_model, dict(learning_rate=1e-2, beta2=0.97, weight_decay=0.3))
    for name, W in before.items():
        if not (name.startswith("h.") and W.ndim == 2):
            assert_equal(after[name], adamw(W, gradients[name], 1e-2, 0.9, 0.97, 0))
            continue
        M = np.zeros_like(W)
        for G in gradients[name]:
            M = 0.95 * M + G
            O = newton_schulz(G + 0.95 * M)  # noqa: E741 (the paper's name)
            W = W - 1e-2 * (0.2 * np.sqrt(max(W.shape)) * O + 0.3 * W)
        assert_equal(after[name], W, 1e-9)

    values = np.linalg.svd(newton_schulz(gradients["h.0.mlp.c_fc.weight"][0]), compute_uv=False)
    assert 0.6 < values.min() and values.max() < 1.3  # orthogonal would be 1, all of them


def test_the_rate_rises_along_a_line_and_falls_along_another():
    """Defazio et al. 2023 (linear decay, 1 − t / T), after a linear warm-up (Goyal et al. 2017, section 2.2).

    Through three points: 0 one step before the first, 1 at step W, when the warm-up of W steps is over, 0 at step T,
    the first that is not made. So neither the first step nor the last is wasted on a rate of zero.
    """
    for W, T in ((0, 5), (3, 20), (20, 784)):
        steps = np.arange(T)
        line = np.interp(steps, [-1, W, T], [0, 1, 0])
        ours = [training.learning_rate_factor(step, T, W) for step in steps.tolist()]
        np.testing.assert_allclose(ours, line, rtol=1e-12)
        assert min(ours) > 0 and max(ours) == ours[W] == 1


# ------------------------------------------------------------------ fine-tuning


def test_lora_adds_a_product_of_two_narrow_matrices(make_model):
    """Hu et al. 2021, equation 3 with the scale of section 4.1:

        h = W x + (α / r) · B A x        W (out, in) frozen, A (r, in), B (out, r)

    Only r·(in + out) numbers learn, and since it is one matrix in the end, W + (α / r) B A takes no more time than W.
    """
    linear, r, alpha = make_model().h[0].mlp.c_fc, 4, 6.0
    module = lora.LoRALinear(linear, r, alpha, dropout=0.0).double()
    W, bias, A = array(linear.weight), array(linear.bias), array(module.lora_A)
    assert not array(module.lora_B).any()  # at the start nothing is added
    rng = np.random.default_rng(0)
    B, x = rng.normal(size=(144, r)), rng.normal(size=36)
    module.lora_B.data = torch.from_numpy(B)

    h = W @ x + bias + alpha / r * (B @ (A @ x))
    assert_equal(module(torch.from_numpy(x)), h)
    assert_equal(module.merged(), W + alpha / r * B @ A)
    assert A.size + B.size == r * (36 + 144)


def test_dpo_makes_the_chosen_reply_gain_on_the_rejected_one():
    """Rafailov et al. 2023, equation 7, of a pair of replies, y_w chosen and y_l rejected:

        L = − ln σ(β ln π(y_w)/π_ref(y_w) − β ln π(y_l)/π_ref(y_l))

    and its slope (section 4, "What does the DPO update do?"): towards ln π(y_w) it is −β σ(−margin), towards ln π(y_l) the
    opposite. A pair that is in the right order by far has a slope of nearly nothing.
    """
    dpo = importlib.import_module("dpo")
    beta, h = 0.3, 1e-5
    w, l, ref_w, ref_l = np.random.default_rng(0).normal(-20, 5, (4, 6))  # noqa: E741  ln p of six pairs

    def loss(w: np.ndarray, l: np.ndarray) -> np.ndarray:  # noqa: E741
        return -np.log(sigmoid(beta * (w - ref_w) - beta * (l - ref_l)))

    leaves = [torch.from_numpy(x).requires_grad_() for x in (w, l)]
    ours, margin = dpo.dpo_loss(*leaves, torch.from_numpy(ref_w), torch.from_numpy(ref_l), beta)
    assert_equal(ours, loss(w, l))
    ours.sum().backward()
    assert_equal(leaves[0].grad, -beta * sigmoid(-array(margin)))
    assert_equal(leaves[0].grad, (loss(w + h, l) - loss(w - h, l)) / (2 * h), 1e-8)
    assert_equal(leaves[1].grad, (loss(w, l + h) - loss(w, l - h)) / (2 * h), 1e-8)


# ------------------------------------------------------------------ text


@pytest.mark.parametrize("p", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p_and_makes_it_sum_to_one(p, temperature):
    """Holtzman et al. 2020, equations 2 and 3, after the temperature τ:

        P(u) = e^(logit / τ) / Σ e^(logit / τ)
        V_p = the smallest set of tokens with Σ P(u) ≥ p        P'(u) = P(u) / Σ_{V_p} P  in it, 0 elsewhere

    The token that makes the sum reach p is in; at p = 0 one token stays.
    """
    logits = np.random.default_rng(0).normal(0, 2, (5, 400))
    P = softmax(logits / temperature)
    expected = np.zeros_like(P)
    for row in range(5):
        total = 0.0
        for u in np.argsort(-P[row]):
            expected[row, u] = P[row, u]
            total += P[row, u]
            if total >= p:
                break
        expected[row] /= expected[row].sum()

    assert_equal(keep_top_p(torch.from_numpy(logits) / temperature, p).softmax(dim=-1), expected)
    in_fp32 = probabilities(torch.from_numpy(logits), SampleConfig(temperature=temperature, top_p=p), [[]] * 5)
    assert_equal(in_fp32, expected, 1e-5)


TEXT = "low lower lowest new newer newest wide wider widest the river, the mill and the miller's boats " * 30


def pieces(text: str) -> list[str]:
    """GPT-2's cuts for such a text (Radford et al. 2019, section 2.2): words and signs, each with the space before it."""
    return re.findall(r" ?[a-z]+|'s| ?[^\sa-z]+|\s+", text)


def merge(word: tuple, left: bytes, right: bytes) -> tuple:
    """The symbols of a word with each `left` that `right` follows made one."""
    out = list(word[:1])
    for symbol in word[1:]:
        if (out[-1], symbol) == (left, right):
            out[-1] = left + right
        else:
            out.append(symbol)
    return tuple(out)


def symbols(word: str) -> tuple:
    return tuple(bytes([byte]) for byte in word.encode("utf-8"))


def test_bpe_learns_by_merging_the_most_frequent_pair_again_and_again():
    """Sennrich et al. 2016, algorithm 1: count the neighbours in all words, merge those that occur most, repeat.

    Where several pairs occur equally often the paper leaves the choice open: each merge must be one of them.
    """
    merges = Tokenizer.train([TEXT], 384).merges
    words = Counter(symbols(piece) for piece in pieces(TEXT))
    for left, right in merges:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        assert pairs[left, right] == max(pairs.values()) > 0
        words = Counter({merge(word, left, right): count for word, count in words.items()})
    assert len(merges) == 40 and all(len(word) == 1 for word in words)  # it went on until each word of this text was a token


def test_bpe_encodes_by_the_merges_in_the_order_in_which_they_were_learned():
    """Sennrich et al. 2016, section 3.2: a new word becomes bytes, and of its pairs the earliest merge comes first."""
    tokenizer = Tokenizer.train([TEXT], 384)
    rank = {pair: i for i, pair in enumerate(tokenizer.merges)}
    text = "the lowest river newer than the widest slower mill, the mill's boat rows on"
    expected = []
    for piece in pieces(text):
        word = symbols(piece)
        while pairs := [pair for pair in zip(word, word[1:]) if pair in rank]:
            word = merge(word, *min(pairs, key=rank.get))
        expected += word
    assert [tokenizer.decode_bytes([i]) for i in tokenizer.encode(text)] == expected
    assert len(expected) < 0.7 * len(text)
