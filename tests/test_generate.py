"""generate and evaluate: choosing a token, decoding with a cache, streaming text, chatting, scoring."""

import math
from itertools import islice

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nanochat import InputError, checkpoint, evaluate, generate, runs
from nanochat.dialogue import Cuts, render, render_prompt, to_rows, windows
from nanochat.evaluate import Replies, about_replies, greedy_replies, score, words_of
from nanochat.generate import (
    Chat,
    SampleConfig,
    fit,
    generate_ids,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_token,
    penalise_repetition,
    stream_text,
    texts,
)
from nanochat.model import GPT, Batch

BLOCK = 24  # of make_model


def greedy(tokens: int) -> SampleConfig:
    return SampleConfig(max_new_tokens=tokens, temperature=0)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(100 * seed + length)
    return torch.randint(97, (length,), generator=generator).tolist()


def plain_greedy(model: GPT, prompt: list[int], tokens: int) -> list[int]:
    """The definition: read all that fits, take the likeliest; when the block is full, keep its newest half."""
    row, block_size = list(prompt), model.config.block_size
    new = []
    for _ in range(tokens):
        if len(row) > block_size:
            row = row[len(row) - max(1, block_size // 2) :]
        new.append(model(torch.tensor([row]))[0, -1].argmax().item())
        row.append(new[-1])
    return new


def said_by(model: GPT, prompts: list[list[int]], config: SampleConfig, **kwargs) -> list[list[int]]:
    """The ids of each row, when nothing ends it."""
    return [list(row) for row in zip(*generate.generate(model, prompts, config, **kwargs))]


def rig(model: GPT, *likeliest: int) -> GPT:
    """Make these ids, the first above the second, the likeliest whatever came before."""
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        for rank, token in enumerate(likeliest):
            model.wte.weight[token] = 5.0 - rank
    return model


# the cache


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, BLOCK - 1])
def test_cached_decoding_equals_full_forward(make_model, length, batch):
    model = make_model()
    prompts = [prompt_of(length, seed) for seed in range(batch)]
    tokens = BLOCK + 1 - length  # to the last place of the block
    cached = said_by(model, prompts, greedy(tokens))
    assert cached == [plain_greedy(model, prompt, tokens) for prompt in prompts]
    assert length > 2 or len(set(cached[0])) > 2  # a model that repeats itself would prove little


@pytest.mark.parametrize("lengths", [(7, 7), (7, 4), (0, 7)])
def test_a_chunk_appended_to_a_cache_equals_the_full_forward(make_model, lengths):
    model = make_model()
    first = [prompt_of(n, seed) for seed, n in enumerate(lengths)]
    chunk = [prompt_of(5, seed=2), prompt_of(5, seed=3)]
    cache = model.new_cache(2)
    for row, text in enumerate(first):
        if text:
            model.features(torch.tensor([text]), cache=cache.rows(row, row + 1))
    parts = [model.features(torch.tensor(chunk), cache=cache)]
    one_more = torch.tensor([[8], [9]])
    parts.append(model.features(one_more, cache=cache))
    for i in range(2):
        whole = model.features(torch.tensor([first[i] + chunk[i] + one_more[i].tolist()]))
        torch.testing.assert_close(torch.cat(parts, dim=1)[i], whole[0, -6:], rtol=1e-9, atol=1e-9)


def test_a_reader_gives_the_logits_of_any_texts_and_reads_no_id_twice(make_model, monkeypatch):
    model, read = make_model(), []
    features = model.features
    monkeypatch.setattr(model, "features", lambda tokens, **kwargs: read.append(tokens.tolist()) or features(tokens, **kwargs))
    a, b = prompt_of(6), prompt_of(9, seed=1)
    reader = generate.Reader(model, 3)
    for asked, expected in [
        ([a, b], [[a[:5]], [b[:8]], [[a[5]], [b[8]]]]),  # each all but its last, then those side by side
        ([a + [1], b + [2]], [[[1], [2]]]),
        ([a + [1]], [[[1]]]),  # the same again: its last is read for the logits
        ([a + [1, 5, 6], b[:3] + [4, 4, 4]], [[[5]], [[4, 4]], [[6], [4]]]),  # the second text goes another way
        ([b[:4], b], [[b[:3]], [b[3:8]], [[b[3]], [b[8]]]]),
        ([a, b, a], [[a[:5]], [a[:5]], [[a[5]], [b[8]], [a[5]]]]),
    ]:
        read.clear()
        logits = reader.logits(asked)
        assert read == expected
        plain = torch.cat([model(torch.tensor([text]))[:, -1] for text in asked])
        torch.testing.assert_close(logits, plain, rtol=1e-9, atol=1e-9)
    read.clear()
    reader.read(1, b + [3, 4])
    assert read == [[[3, 4]]]


def test_rows_that_change_places_keep_what_they_have_read(make_model):
    model, a, b = make_model(), prompt_of(9), prompt_of(3, seed=1)
    reader = generate.Reader(model, 2)
    reader.read(0, a)
    reader.swap(0, 1)
    reader.read(0, b)
    reader.swap(0, 1)
    assert reader.ids == [a, b] and reader.cache.lengths.tolist() == [9, 3]
    plain = torch.cat([model(torch.tensor([text]))[:, -1] for text in (a + [1], b + [2])])
    torch.testing.assert_close(reader.logits([a + [1], b + [2]]), plain, rtol=1e-9, atol=1e-9)


def test_a_row_that_is_forgotten_leaves_nothing_in_its_keys_or_values(make_model):
    """What lies beyond a row's own length has a weight of 0, and 0 times NaN is NaN."""
    model, a, b = make_model(), prompt_of(9), prompt_of(3, seed=1)
    reader = generate.Reader(model, 2)
    reader.logits([a, a])
    for stored in (reader.cache.keys, reader.cache.values):
        stored[:, 1] = math.nan
    reader.forget(slice(1, 2))
    assert reader.ids == [a, []]
    plain = torch.cat([model(torch.tensor([text]))[:, -1] for text in (a + [1], b)])
    torch.testing.assert_close(reader.logits([a + [1], b]), plain, rtol=1e-9, atol=1e-9)


def test_a_cache_that_is_full_says_so(make_model):
    model = make_model()
    cache = model.new_cache(1)
    model.features(torch.tensor([prompt_of(BLOCK)]), cache=cache)
    with pytest.raises(ValueError, match=r"24 \+ 1 tokens exceed block_size 24"):
        model.features(torch.tensor([[0]]), cache=cache)


def test_a_call_is_not_affected_by_one_before_or_beside_it(make_model):
    model = make_model()
    config = SampleConfig(max_new_tokens=40, temperature=1)
    first, second = [prompt_of(5)], [prompt_of(9), prompt_of(3)]
    alone = said_by(model, first, config), said_by(model, second, config)
    assert (said_by(model, first, config), said_by(model, second, config)) == alone
    pairs = list(zip(generate.generate(model, first, config), generate.generate(model, second, config)))
    beside = [[list(row) for row in zip(*steps)] for steps in zip(*pairs)]
    assert tuple(beside) == alone


def test_a_cached_step_costs_the_same_products_at_any_context_and_the_head_reads_one_position(make_model):
    model = make_model(block_size=64, n_head=2, n_embd=32)
    blocks, head = 2 * 2 * 12 * 32 * 32, 2 * 97 * 32  # a multiply-add is two; two layers of 12 C², and V · C
    for context in (10, 60):
        steps = generate.generate(model, [prompt_of(context)], greedy(3))
        for tokens in (context, 1, 1):  # the prompt, then what was chosen
            with FlopCounterMode(display=False) as counter:
                next(steps)
            by_kind = {str(kind): flops for kind, flops in counter.get_flop_counts()["Global"].items()}
            assert (by_kind["aten.addmm"], by_kind["aten.mm"]) == (tokens * blocks, head)


# past the block


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
@pytest.mark.parametrize("length", [1, 16, 17, 40])
def test_past_the_block_cached_and_uncached_decoding_stay_equal(make_model, block_size, length):
    model = make_model(block_size=block_size)
    tokens = 3 * block_size + 5
    cached = said_by(model, [prompt_of(length)], greedy(tokens))
    assert cached == [plain_greedy(model, prompt_of(length), tokens)]


def test_a_full_block_keeps_its_newest_half_and_reads_it_from_position_zero(make_model, monkeypatch):
    model = make_model(block_size=16)
    read, features = [], model.features

    def spy(tokens, **kwargs):
        read.append((tokens[0].tolist(), kwargs["cache"].longest))
        return features(tokens, **kwargs)

    monkeypatch.setattr(model, "features", spy)
    prompt = prompt_of(12)
    [new] = said_by(model, [prompt], SampleConfig(max_new_tokens=30, temperature=1))
    text = prompt + new
    chunks = [(tokens, past) for tokens, past in read if len(tokens) > 1]
    # 12 + 5 tokens are one too many: the newest 8 stay; 8 + 9 are again one too many, and so on
    assert chunks == [(prompt, 0), (text[9:17], 0), (text[18:26], 0), (text[27:35], 0)]
    assert all(len(tokens) == 1 for tokens, past in read if past)  # else one token a step


# batches


def test_prompts_of_different_length_in_a_batch_give_the_logits_of_each_alone(make_model, monkeypatch):
    model, seen = make_model(), []
    head = model.head
    monkeypatch.setattr(model, "head", lambda x: seen.append(head(x)) or seen[-1])
    prompts = [prompt_of(3), prompt_of(11), prompt_of(BLOCK), prompt_of(BLOCK + 9)]
    together = said_by(model, prompts, greedy(2 * BLOCK))  # each row outgrows the block
    logits, seen = torch.stack(seen, dim=1), []
    for row, prompt in enumerate(prompts):
        assert said_by(model, [prompt], greedy(2 * BLOCK)) == [together[row]]
        torch.testing.assert_close(torch.cat(seen), logits[row], rtol=1e-9, atol=1e-9)
        seen.clear()


def test_a_row_that_has_ended_gives_none_and_disturbs_no_other(make_model):
    model = make_model()
    prompts = [prompt_of(5), prompt_of(8)]
    whole = said_by(model, prompts, greedy(30))
    stop = next(token for token in whole[0][1:] if token not in whole[1])
    end = whole[0].index(stop)
    first, second = said_by(model, prompts, greedy(30), stop_ids=[stop])
    assert first == whole[0][:end] + [None] * (30 - end) and second == whole[1]
    new, ended = generate_ids(model, prompts, greedy(30), [stop])
    assert (new, ended) == ([whole[0][:end], whole[1]], [True, False])
    alone = said_by(model, prompts[:1], greedy(30), stop_ids=[stop])
    assert alone == [[*whole[0][:end], None]]  # the steps end with the last row


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_a_prompt_without_tokens_is_an_error(make_model, prompts):
    with pytest.raises(InputError, match="nothing to continue"):
        list(generate.generate(make_model(), prompts, greedy(1)))


# what generation leaves as it was


@pytest.mark.parametrize("training", [True, False])
def test_generation_leaves_the_mode_as_it_was_and_drops_nothing_out(make_model, training):
    model = make_model(dropout=0.5, attention_dropout=0.5)
    expected = said_by(model, [prompt_of(5)], greedy(10))
    model.train(training)
    assert said_by(model, [prompt_of(5)], greedy(10)) == expected
    assert all(module.training == training for module in model.modules())
    for leave in ("close", "throw", "forget"):
        steps = generate.generate(model, [prompt_of(5)], greedy(10))
        next(steps)
        if leave == "close":
            steps.close()
        elif leave == "throw":
            with pytest.raises(KeyboardInterrupt):
                steps.throw(KeyboardInterrupt)
        else:
            del steps
        assert all(module.training == training for module in model.modules()), leave


def test_streaming_that_stops_early_leaves_the_mode_as_it_was(tokenizer, make_model):
    model = make_model(vocab_size=tokenizer.vocab_size).train()
    rig(model, *tokenizer.encode("a"))
    pieces = generate.stream(model, tokenizer, [0], greedy(20))
    assert next(pieces) == "a" and not model.training
    del pieces
    assert model.training
    config = SampleConfig(max_new_tokens=20, temperature=0, stop=("aaa",))
    assert list(generate.stream(model, tokenizer, [0], config)) == []
    assert model.training


def test_sampling_and_evaluation_draw_nothing_from_the_default_generator(tokenizer, make_model):
    model = make_model(vocab_size=tokenizer.vocab_size, block_size=64, dropout=0.2).train()
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    rows = to_rows([talk], tokenizer, 64)
    before = torch.get_rng_state()
    said_by(model, [prompt_of(4)], SampleConfig(max_new_tokens=30, temperature=1))
    first = score(model, tokenizer, rows.batches(1))
    greedy_replies(model, tokenizer, [talk], max_new_tokens=5)
    list(Chat(model, tokenizer, SampleConfig(max_new_tokens=5)).ask("Hi"))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and score(model, tokenizer, rows.batches(1)) == first


# choosing the next token

HAND_MADE = torch.tensor([[0.09, 0.5, 0.41]]).log()


def kept(logits: torch.Tensor) -> list[int]:
    [row] = logits.tolist()
    return [i for i, value in enumerate(row) if value > -torch.inf]


@pytest.mark.parametrize(
    "p, expected", [(0.0, [1]), (0.3, [1]), (0.51, [1, 2]), (0.9, [1, 2]), (0.92, [0, 1, 2]), (1.0, [0, 1, 2])]
)
def test_top_p_keeps_the_token_that_crosses_the_threshold(p, expected):
    filtered = keep_top_p(HAND_MADE, p)
    assert kept(filtered) == expected
    assert torch.equal(filtered[:, expected], HAND_MADE[:, expected])  # what is kept is unchanged


@pytest.mark.parametrize("p, count", [(0.25, 1), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_top_p_needs_no_token_more_where_the_sum_is_exactly_p(p, count):
    assert len(kept(keep_top_p(torch.zeros(1, 4), p))) == count  # four tokens of a quarter each


@pytest.mark.parametrize("k, expected", [(1, [1]), (2, [1, 2]), (3, [0, 1, 2]), (50, [0, 1, 2])])
def test_top_k_may_exceed_the_vocabulary(k, expected):
    assert kept(keep_top_k(HAND_MADE, k)) == expected


@pytest.mark.parametrize("share, expected", [(0.1, [0, 1, 2]), (0.2, [1, 2]), (0.8, [1, 2]), (0.83, [1]), (1.0, [1])])
def test_min_p_is_a_share_of_the_likeliest(share, expected):
    assert kept(keep_min_p(HAND_MADE, share)) == expected


def test_a_repeated_token_becomes_less_likely_whatever_its_sign():
    logits = torch.tensor([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    penalised = penalise_repetition(logits, [[0, 1, 1], [2]], 2.0)
    assert penalised.tolist() == [[1.0, -4.0, 1.0], [2.0, -2.0, 0.5]]
    assert logits.tolist() == [[2.0, -2.0, 1.0]] * 2


def test_greedy_decoding_does_not_repeat_itself_under_a_heavy_penalty(make_model):
    model = rig(make_model(), 5, 6, 7)
    assert said_by(model, [[1]], greedy(3)) == [[5, 5, 5]]
    config = SampleConfig(max_new_tokens=3, temperature=0, repetition_penalty=2)
    assert said_by(model, [[1]], config) == [[5, 6, 7]]
    assert said_by(model, [[5]], config)[0][0] == 6  # the prompt counts as text
    assert said_by(model, [[1], [2, 5]], config) == [[5, 6, 7], [6, 7, 5]]  # each row its own


@pytest.mark.parametrize("vocabulary", [50, 1000])  # the second: mostly, the likeliest 256 are enough for top-p
@pytest.mark.parametrize("seed", range(8))
def test_the_filters_are_those_of_hugging_face(seed, vocabulary):
    process = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, vocabulary, generator=generator) * (0.1 + seed)
    context = torch.randint(50, (4, 12), generator=generator)

    def same(theirs, ours: torch.Tensor) -> None:
        torch.testing.assert_close(ours, theirs(context, logits.clone()), rtol=1e-6, atol=0)

    for temperature in (0.3, 1.7):
        same(process.TemperatureLogitsWarper(temperature), logits / temperature)
    for k in (1, 7, 50, 99):
        same(process.TopKLogitsWarper(k), keep_top_k(logits, k))
    for p in (0.0, 0.1, 0.5, 0.9, 0.999):
        same(process.TopPLogitsWarper(p), keep_top_p(logits, p))
    for share in (0.01, 0.2, 1.0):
        same(process.MinPLogitsWarper(share), keep_min_p(logits, share))
    for penalty in (0.7, 1.3):
        same(
            process.RepetitionPenaltyLogitsProcessor(penalty),
            penalise_repetition(logits, context.tolist(), penalty),
        )


def assert_drawn_from(probabilities: torch.Tensor, drawn: torch.Tensor) -> None:
    """Each id comes as often as its probability says, within 5 standard deviations."""
    n = drawn.numel()
    counts = drawn.bincount(minlength=probabilities.numel()).double()
    expected = n * probabilities.double()
    assert not counts[probabilities == 0].any()
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected / n)).sqrt()).all()


@pytest.mark.parametrize(
    "flags",
    [
        dict(temperature=1.0, top_p=1.0),
        dict(temperature=0.5, top_p=1.0),
        dict(temperature=1.5, top_p=0.7),
        dict(temperature=1.0, top_p=1.0, top_k=3),
        dict(temperature=1.0, top_p=1.0, min_p=0.3),
        dict(temperature=1.3, top_p=0.8, top_k=6, min_p=0.1, repetition_penalty=1.4),
    ],
    ids=str,
)
def test_20_000_draws_have_the_distribution_of_hugging_faces_filters(flags):
    process = pytest.importorskip("transformers.generation.logits_process")
    config = SampleConfig(**flags)
    logits, context = torch.randn(1, 12), [[0, 3, 3, 7]]
    filters = [
        process.RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
        process.TemperatureLogitsWarper(config.temperature),
        process.TopKLogitsWarper(config.top_k or 12),
        process.TopPLogitsWarper(config.top_p),
        process.MinPLogitsWarper(config.min_p),
    ]
    theirs = logits
    for filter in filters:
        theirs = filter(torch.tensor(context), theirs)
    n = 20_000
    drawn = next_token(logits.expand(n, -1), config, context * n, torch.Generator().manual_seed(1))
    assert_drawn_from(theirs.softmax(dim=-1)[0], drawn)


def test_the_filters_work_in_the_order_of_hugging_face():
    """Penalty, temperature, top-k, top-p, min-p: with two of the last three changed, some of 200 rows would show it."""
    process = pytest.importorskip("transformers.generation.logits_process")
    logits, context = 2 * torch.randn(200, 30), torch.randint(30, (200, 8))
    config = SampleConfig(temperature=1.3, top_k=12, top_p=0.8, min_p=0.1, repetition_penalty=1.4)
    in_order = [
        process.RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
        process.TemperatureLogitsWarper(config.temperature),
        process.TopKLogitsWarper(config.top_k),
        process.TopPLogitsWarper(config.top_p),
        process.MinPLogitsWarper(config.min_p),
    ]

    def theirs(filters) -> torch.Tensor:
        x = logits
        for filter in filters:
            x = filter(context, x)
        return x.softmax(dim=-1)

    expected = theirs(in_order)
    torch.testing.assert_close(generate.probabilities(logits, config, context.tolist()), expected, rtol=1e-5, atol=1e-7)
    for i in (2, 3):
        other = [*in_order[:i], in_order[i + 1], in_order[i], *in_order[i + 2 :]]
        assert not torch.allclose(theirs(other), expected)


def test_temperature_zero_takes_the_likeliest_whatever_the_other_settings():
    logits = torch.randn(200, 30)
    for flags in ({}, {"top_k": 3}, {"top_p": 0.0}, {"min_p": 1.0}, {"seed": 5}):
        config = SampleConfig(temperature=0, **flags)
        chosen = next_token(logits, config, [[]] * 200, torch.Generator().manual_seed(config.seed))
        assert torch.equal(chosen, logits.argmax(dim=-1))
    cold = next_token(logits, SampleConfig(temperature=1e-9), [[]] * 200, torch.Generator().manual_seed(0))
    assert torch.equal(cold, logits.argmax(dim=-1))  # and a tiny one, without an overflow


def test_at_temperature_zero_one_of_several_likeliest_has_all_the_probability():
    chances = generate.probabilities(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), greedy(1), [[]])
    assert chances.tolist() in ([[0, 1, 0, 0]], [[0, 0, 1, 0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_sampled_in_full_precision(make_model, dtype):
    model = make_model(dtype=dtype)
    config = SampleConfig(max_new_tokens=30, temperature=1, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    for row in said_by(model, [prompt_of(3), prompt_of(20)], config):
        assert len(row) == 30 and all(0 <= token < 97 for token in row)
    logits = torch.randn(100, 2000).to(dtype)
    chosen = [next_token(x, config, [[0]] * 100, torch.Generator().manual_seed(0)) for x in (logits, logits.float())]
    assert torch.equal(*chosen)


def test_equal_seeds_give_equal_texts_and_samples_are_independent(tokenizer, make_model):
    model = make_model(vocab_size=tokenizer.vocab_size, noise=0.02)
    config = SampleConfig(max_new_tokens=40, temperature=1, top_p=1, seed=3)
    four = texts(model, tokenizer, [[5, 6]] * 4, config)
    assert len(set(four)) == 4
    assert texts(model, tokenizer, [[5, 6]] * 4, config) == four
    torch.manual_seed(99)  # the seed of the settings decides, not the default generator's
    assert texts(model, tokenizer, [[5, 6]] * 4, config) == four
    assert not set(texts(model, tokenizer, [[5, 6]] * 4, SampleConfig(**vars(config) | {"seed": 4}))) & set(four)


def test_settings_out_of_bounds_are_named_together():
    nan = float("nan")
    with pytest.raises(InputError) as error:
        SampleConfig(
            max_new_tokens=0, temperature=-0.1, top_k=-1, top_p=1.01, min_p=nan, repetition_penalty=0, stop=("a", "")
        )
    assert str(error.value) == (
        "--max-new-tokens is 0, must be at least 1; --temperature is -0.1, must be from 0 to 100; "
        "--top-k is -1, must be at least 0; --top-p is 1.01, must be from 0 to 1; --min-p is nan, must be from 0 to 1; "
        "--repetition-penalty is 0, must be from 0.01 to 100; --stop has an empty string"
    )


# the same, for any logits

ROW = st.lists(st.floats(-6e4, 6e4, width=16) | st.sampled_from([-torch.inf, 0.0, 1.0, 6e4]), min_size=1, max_size=12)
LOGITS = st.builds(
    lambda row, dtype: torch.tensor([row], dtype=dtype),
    ROW.filter(lambda row: max(row) > -torch.inf),  # some ids may be ruled out, not all
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
SHARE = st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]) | st.floats(0, 1)
FILTERS = {keep_top_k: st.integers(1, 15) | st.just(2**70), keep_top_p: SHARE, keep_min_p: SHARE}


@pytest.mark.parametrize("filter", FILTERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data(), logits=LOGITS)
def test_a_filter_changes_no_logit_that_it_keeps_and_keeps_more_the_wider_it_is(filter, data, logits):
    narrow, wide = sorted((data.draw(FILTERS[filter]), data.draw(FILTERS[filter])), reverse=filter is keep_min_p)
    left = set(kept(filter(logits, narrow)))
    assert left <= set(kept(filter(logits, wide))) <= set(kept(logits))
    assert logits.amax() in logits[0, list(left)]  # so one is left
    for i in left:
        assert filter(logits, narrow)[0, i] == logits[0, i]


WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=10)


@settings(max_examples=200, deadline=None)
@given(weights=WEIGHTS, data=st.data())
def test_the_filters_are_what_their_definitions_say(weights, data):
    """Probabilities are whole numbers over their sum, and every threshold lies half-way between two: no rounding."""
    logits, falling = torch.tensor([weights]).log(), sorted(weights, reverse=True)

    def left(filtered: torch.Tensor) -> list[int]:
        return sorted((weights[i] for i in kept(filtered)), reverse=True)

    k = data.draw(st.integers(1, 12))
    assert left(keep_top_k(logits, k)) == [w for w in falling if w >= falling[: k][-1]]  # equals of the k-th stay too
    reach = data.draw(st.integers(0, sum(weights) - 1)) + 0.5
    expected = [w for i, w in enumerate(falling) if sum(falling[:i]) < reach]
    assert left(keep_top_p(logits, reach / sum(weights))) == expected
    least = data.draw(st.integers(0, max(weights) - 1)) + 0.5
    assert left(keep_min_p(logits, least / max(weights))) == [w for w in falling if w >= least]
    seen, penalty = data.draw(st.lists(st.sampled_from(range(len(weights))))), data.draw(st.floats(0.01, 100))
    shifted = logits - 1  # of both signs
    expected = [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(shifted[0].tolist())]
    assert penalise_repetition(shifted, [seen], penalty)[0].tolist() == pytest.approx(expected)


@settings(max_examples=300, deadline=None)
@given(
    logits=LOGITS,
    seen=st.sets(st.integers(0, 11)),
    config=st.builds(
        SampleConfig,
        temperature=st.sampled_from([0.0, 5e-324, 1e-45, 1e-30, 0.8, 100.0]) | st.floats(0, 100),
        top_k=st.integers(0, 15), top_p=SHARE, min_p=SHARE,
        repetition_penalty=st.just(1.0) | st.floats(0.01, 100), seed=st.integers(-(2**80), 2**80),
    ),
)
def test_whatever_the_settings_a_possible_token_is_chosen(logits, seen, config):
    context = [[i for i in seen if i < logits.size(1)]]
    for scaled in (logits, logits.float() * 1e30):
        chosen = next_token(scaled, config, context, torch.Generator().manual_seed(0)).item()
        assert chosen in kept(logits)
        if config.temperature < 1e-20 and config.repetition_penalty == 1:  # in the limit, the likeliest
            assert logits[0, chosen] == logits.amax()


@pytest.mark.parametrize("row", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]], ids=str)
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_say_nothing_are_an_error_that_names_the_cause(row, temperature):
    logits = torch.tensor([[1.0, 2.0], row])
    with pytest.raises(InputError, match="logits are not finite: its weights are damaged"):
        next_token(logits, SampleConfig(temperature=temperature), [[0], [0]], torch.Generator())


# ids that the tokenizer does not know


def test_rows_without_an_id_are_never_sampled(tokenizer, make_model, tmp_path, capsys):
    ids = tokenizer.vocab_size
    model = rig(make_model(vocab_size=ids + 7, dtype=torch.float32), *range(ids, ids + 7))
    assert said_by(model, [[1]], greedy(1))[0][0] >= ids  # the surplus rows win
    checkpoint.write_hugging_face(tmp_path, model, tokenizer)
    loaded, _ = checkpoint.load(tmp_path)
    assert "7 token rows have no id" in capsys.readouterr().err
    for config in (greedy(40), SampleConfig(max_new_tokens=40, temperature=5, top_p=1)):
        assert max(max(row) for row in said_by(loaded, [[1], [2, 3]], config)) < ids


def test_fewer_rows_than_ids_stop_at_the_start(tokenizer, make_model, tmp_path):
    checkpoint.write_hugging_face(tmp_path, make_model(vocab_size=tokenizer.vocab_size - 1), tokenizer)
    with pytest.raises(InputError, match="token rows, its tokenizer"):
        checkpoint.load(tmp_path)


# streaming text


class Pieces:
    """A tokenizer whose token i is the i-th piece of some bytes, cut anywhere."""

    def __init__(self, data: bytes, cuts: list[int]):
        edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
        self.pieces = [data[a:b] for a, b in zip(edges, edges[1:])]
        self.ids = range(len(self.pieces))

    def decode_bytes(self, ids) -> bytes:
        return b"".join(self.pieces[i] for i in ids)


MIXED = st.text(
    alphabet=st.sampled_from("ab \n你好世界é🙂👩\u200d🇨🇳\U0010ffff\x00") | st.characters(codec="utf-8"), max_size=20
)
CUTS = st.lists(st.integers(0, 10**6), max_size=30)


@settings(max_examples=300, deadline=None)
@given(data=MIXED.map(str.encode) | st.binary(max_size=20), cuts=CUTS)
def test_streamed_pieces_are_the_full_decode_however_its_bytes_are_cut(data, cuts):
    tokens = Pieces(data, cuts)
    pieces = list(stream_text(tokens, tokens.ids))
    assert "".join(pieces) == data.decode("utf-8", "replace")
    assert all(pieces)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_streamed_pieces_are_the_full_decode_of_any_ids(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30) | MIXED.map(tokenizer.encode))
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_every_cut_of_a_text_streams_without_broken_characters():
    data = "a你🙂é".encode()
    for mask in range(2 ** (len(data) - 1)):
        tokens = Pieces(data, [i + 1 for i in range(len(data) - 1) if mask >> i & 1])
        pieces = list(stream_text(tokens, tokens.ids))
        assert "".join(pieces) == "a你🙂é" and "\ufffd" not in "".join(pieces)


def test_text_comes_as_early_as_it_is_certain():
    data = "ab你c<|x".encode()
    tokens = Pieces(data, list(range(1, len(data))))
    read, given_out = 0, []

    def ids():
        nonlocal read
        for i in tokens.ids:
            read += 1
            yield i

    for piece in stream_text(tokens, ids(), ["<|end|>"]):
        given_out.append((read, piece))
    assert given_out == [(1, "a"), (2, "b"), (5, "你"), (6, "c"), (9, "<|x")]


SHORT_TEXT = st.text(alphabet="ab你🙂", min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(text=st.text(alphabet="ab你🙂", max_size=14), stop=st.lists(SHORT_TEXT, max_size=3), cuts=CUTS)
@example(text="abba你", stop=["abba你🙂", "bb"], cuts=[4])
@example(text="aab", stop=["ab"], cuts=[1, 2])
@example(text="abb你", stop=["abb你", "bb"], cuts=[3])
def test_text_ends_where_the_first_stop_string_begins_however_it_is_cut(text, stop, cuts):
    tokens = Pieces(text.encode(), cuts)
    expected = text[: min((text.index(s) for s in stop if s in text), default=len(text))]
    assert "".join(stream_text(tokens, tokens.ids, stop)) == expected


def test_generation_stops_at_a_stop_string_across_tokens(tokenizer, make_model):
    model = rig(make_model(vocab_size=tokenizer.vocab_size), *tokenizer.encode("a"))
    config = SampleConfig(max_new_tokens=12, temperature=0, stop=("aaaaa",))
    assert "".join(generate.stream(model, tokenizer, [0], config)) == ""
    assert texts(model, tokenizer, [[0], [1, 2]], config) == ["", ""]
    config = SampleConfig(max_new_tokens=4, temperature=0, stop=("aaaaa",))  # its beginning only: nothing is lost
    assert texts(model, tokenizer, [[0]], config) == ["aaaa"]
    assert "".join(generate.stream(model, tokenizer, [0], config)) == "aaaa"


def test_no_token_is_made_after_every_text_has_met_a_stop_string(tokenizer, make_model, monkeypatch):
    model = make_model(vocab_size=tokenizer.vocab_size)
    token, end = tokenizer.encode("a") + [tokenizer.control["<|end|>"]]
    # the first row says <|end|> at once, the second "a" for ever, the third "a" from its third token on
    script = iter([[end, token, 5], [end, token, 6]] + [[end, token, token]] * 100)
    monkeypatch.setattr(generate, "next_token", lambda logits, *rest: torch.tensor(next(script)))
    config = SampleConfig(max_new_tokens=50, stop=("aaaaaa", "aa"))  # one is a part of the other: the first to end
    before = tokenizer.decode([5, 6])
    assert texts(model.train(), tokenizer, [[0]] * 3, config) == ["", "", before]
    assert len(list(script)) == 102 - 4 and model.training


@pytest.mark.parametrize("name", ["<|end|>", "<|endoftext|>", "<|user|>"])
def test_any_control_token_ends_the_text_and_is_not_printed(tokenizer, make_model, name):
    model = rig(make_model(vocab_size=tokenizer.vocab_size), tokenizer.control[name])
    assert list(generate.stream(model, tokenizer, [0], greedy(5))) == []
    assert texts(model, tokenizer, [[0]], greedy(5)) == [""]


# evaluation


def test_the_score_is_the_mean_over_all_targets_however_they_are_batched(tokenizer, make_model):
    model = make_model(vocab_size=tokenizer.vocab_size, block_size=64)
    talks = [
        [{"role": "user", "content": "你" * i}, {"role": "assistant", "content": "A boat. 🙂" * (i % 3)}]
        for i in range(1, 8)
    ]
    rows = to_rows(talks, tokenizer, 64)
    result = score(model, tokenizer, rows.batches(2))
    nats = tokens = text_bytes = 0
    for talk in talks:
        for window in windows(talk, tokenizer, 64, Cuts()):
            log_p = model(torch.tensor([window.ids[:-1]])).log_softmax(dim=-1)[0]
            learned = [i for i, s in enumerate(window.supervised) if s]
            nats -= sum(log_p[i - 1, window.ids[i]].item() for i in learned)
            tokens += len(learned)
        text_bytes += len(talk[1]["content"].encode())
    assert result["loss"] == pytest.approx(nats / tokens, rel=1e-9)
    assert result["perplexity"] == pytest.approx(2.718281828459045 ** (nats / tokens), rel=1e-9)
    assert result["bits_per_byte"] == pytest.approx(nats / 0.6931471805599453 / text_bytes, rel=1e-9)
    for batch_size in (1, 5):
        assert score(model, tokenizer, rows.batches(batch_size)) == pytest.approx(result, rel=1e-9)
    assert not model.training  # as it was


def test_where_every_token_is_equally_likely_the_score_is_known_by_hand(tokenizer, make_model):
    model = make_model(vocab_size=tokenizer.vocab_size)
    torch.nn.init.zeros_(model.wte.weight)
    V, ids = tokenizer.vocab_size, tokenizer.encode("Q你")
    row = [tokenizer.end_of_text, *ids, tokenizer.end_of_text]
    batch = Batch(torch.tensor([row[:-1]]), torch.tensor([row[1:]]))  # its targets: 4 bytes and one end
    nats = (len(ids) + 1) * math.log(V)
    expected = {"loss": math.log(V), "perplexity": V, "accuracy": 0, "bits_per_byte": nats / math.log(2) / 4,
                "bits_per_character": nats / math.log(2) / 2}
    assert score(model, tokenizer, [batch]) == pytest.approx(expected, rel=1e-12)


def test_token_0_counts_in_the_score_like_any_other(tokenizer, make_model):
    model, inputs = make_model(vocab_size=tokenizer.vocab_size), torch.randint(97, (2, 9))
    expected = -model(inputs).log_softmax(dim=-1)[..., 0].mean().item()
    assert score(model, tokenizer, [Batch(inputs, torch.zeros_like(inputs))])["loss"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_evaluations_are_equal_bit_for_bit(tokenizer, make_model, dtype):
    model = make_model(vocab_size=tokenizer.vocab_size, dtype=torch.float32, dropout=0.5).train()
    ids = torch.randint(tokenizer.vocab_size, (6, BLOCK + 1))
    batches = [Batch(part[:, :-1], part[:, 1:]) for part in ids.split(4)]
    first = score(model, tokenizer, batches, dtype)
    assert score(model, tokenizer, batches, dtype) == first
    assert score(model, tokenizer, batches, torch.float32) != first or dtype == torch.float32


def test_a_choice_in_chinese_has_its_likelihood_divided_by_bytes_not_characters(tokenizer, make_model, monkeypatch):
    nats = {" 你好": -6.0, " ab": -4.0}  # -1 and -2 a byte, -3 and -2 a character
    monkeypatch.setattr(evaluate, "loglikelihood", lambda model, tokenizer, context, continuation: nats[continuation])
    question = {"query": "", "choices": ["你好", "ab"], "gold": 0}
    assert evaluate.choose(make_model(), tokenizer, [question]) == {"questions": 1, "accuracy": 0, "accuracy_per_byte": 1}


def test_greedy_replies_ask_the_first_different_user_turns(tokenizer, make_model):
    model = make_model(vocab_size=tokenizer.vocab_size, block_size=64)
    first, second, third, longer = (
        {"role": "user", "content": text} for text in ("Hi", "How are you?", "你好🙂", "How many boats?" * 30)
    )
    reply, system = {"role": "assistant", "content": "Fine."}, {"role": "system", "content": "Be kind."}
    talks = [
        [first, reply, longer],
        [system, second, reply],
        [reply, third, reply],
        [reply],
        [system, reply],
        [first, reply],
        [system, reply, longer, reply, first],
    ]
    replies = greedy_replies(model, tokenizer, talks, max_new_tokens=6)
    prompts = [[first], [system, second], [third], [system, longer]]
    assert replies.prompts == [prompt[-1]["content"] for prompt in prompts]
    for i, prompt in enumerate(prompts):
        ids = render_prompt(prompt, tokenizer)[-64:]
        [new], [ended] = generate_ids(model, [ids], greedy(6), tokenizer.control.values())
        assert (replies.replies[i], replies.lengths[i], replies.ended[i]) == (tokenizer.decode(new), len(new), ended)
    assert greedy_replies(model, tokenizer, talks, max_new_tokens=6, batch_size=1) == replies
    assert greedy_replies(model, tokenizer, talks, limit=2, max_new_tokens=6).replies == replies.replies[:2]
    nobody_asks = greedy_replies(model, tokenizer, talks[3:5])
    assert about_replies(nobody_asks.numbers()) == "no replies: no conversation has a user turn"


def test_a_summary_of_replies_counts_ends_and_repetitions():
    replies = Replies(["a", "b", "c", "d"], ["Yes.", "", "Yes.", "No"], [2, 0, 2, 64], [True, True, True, False])
    assert about_replies(replies.numbers()).startswith("4 replies: 75% end by themselves, median length 2 tokens, 3 distinct, 1 empty")


def test_distinct_n_and_repetition_of_replies_are_those_counted_by_hand():
    replies = Replies(["a", "b"], ["to be to be to be", "我是我"], [6, 3], [True, True])
    assert words_of("Don't: 我是 2nd") == ["don", "'", "t", ":", "我", "是", "2nd"]
    numbers = replies.numbers()
    assert numbers["distinct_1"] == 4 / 9  # to be 我 是
    assert numbers["distinct_2"] == 4 / 7  # to-be be-to 我-是 是-我
    assert numbers["repetition_4"] == pytest.approx((1 / 3 + 0) / 2)  # to-be-to-be be-to-be-to to-be-to-be; the other has none


# chat


def test_a_chat_of_60_turns_drops_whole_oldest_turns_and_keeps_the_system_text(tokenizer, make_model, monkeypatch):
    model = make_model(vocab_size=tokenizer.vocab_size, block_size=64)
    prompts, seeds, decode = [], [], generate.generate

    def spy(model, asked, config, *rest):
        prompts.extend(asked)
        seeds.append(config.seed)
        return decode(model, asked, config, *rest)

    monkeypatch.setattr(generate, "generate", spy)
    chat = Chat(model, tokenizer, SampleConfig(max_new_tokens=12), system="Be kind.")
    drops = []
    for turn in range(60):
        said = f"{turn}: " + "船🙂a" * (turn % 4)
        before = list(chat.messages)
        reply = "".join(chat.ask(said))
        asked = [*before, {"role": "user", "content": said}]
        assert chat.messages == [*asked, {"role": "assistant", "content": reply}]
        assert prompts[-1] == render_prompt(asked[:1] + asked[1 + chat.dropped :], tokenizer)
        assert chat.dropped % 2 == 0 and len(prompts[-1]) <= 64 - 12
        if chat.dropped:  # one turn more would not have fitted
            longer = render_prompt(asked[:1] + asked[chat.dropped - 1 :], tokenizer)
            assert len(longer) > 64 - 12
        drops.append(chat.dropped)
    assert drops[0] == 0 and drops[-1] > 100
    assert len(set(seeds)) == 60  # a question asked again may get another answer


def test_a_message_that_does_not_fit_leaves_the_chat_as_it_was(tokenizer, make_model):
    model = make_model(vocab_size=tokenizer.vocab_size, block_size=64)
    chat = Chat(model, tokenizer, SampleConfig(max_new_tokens=100))
    list(chat.ask("Hi"))
    before = list(chat.messages)
    with pytest.raises(InputError, match=r"the message has 1,0\d\d tokens with the template; at most 48 fit"):
        list(chat.ask("QZ" * 500))
    assert chat.messages == before
    list(chat.ask("Still there?"))
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2


def test_of_a_reply_that_is_broken_off_what_was_read_is_remembered(tokenizer, make_model):
    model = rig(make_model(vocab_size=tokenizer.vocab_size, block_size=64), *tokenizer.encode("a"))
    chat = Chat(model, tokenizer, greedy(30))
    assert "".join(islice(chat.ask("My name is Ada."), 3)) == "aaa"
    assert chat.messages[1:] == [{"role": "assistant", "content": "aaa"}]
    with pytest.raises(KeyboardInterrupt):
        chat.ask("What is my name?").throw(KeyboardInterrupt)  # before it began: nothing was asked
    assert len(chat.messages) == 2


def test_a_system_text_that_leaves_no_room_for_a_message_is_refused_at_once(tokenizer, make_model):
    model = make_model(vocab_size=tokenizer.vocab_size, block_size=64)
    with pytest.raises(InputError, match=r"system text and message have 1\d\d tokens with the template; at most 48 fit"):
        Chat(model, tokenizer, SampleConfig(), system="QZ" * 60)


def test_a_long_chat_reads_only_what_fits(tokenizer, monkeypatch):
    talk = [{"role": role, "content": "Hello"} for role in ("user", "assistant") * 1000] + [{"role": "user", "content": "Hi"}]
    read, encode = [], type(tokenizer).encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, text: read.append(text) or encode(self, text))
    prompt, dropped = fit(talk, tokenizer, 64, 12)
    assert len(prompt) <= 64 - 12 and 1900 < dropped < 2000 and len(read) < 200


def test_the_prompt_that_fits_exactly_loses_nothing(tokenizer):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "b"},
    ]
    needed = len(render_prompt(messages, tokenizer))
    room = needed // 4  # what a reply may take of a block of needed + room
    assert fit(messages, tokenizer, needed + room, room) == (render_prompt(messages, tokenizer), 0)
    assert fit(messages, tokenizer, needed + room - 1, room)[1] == 2
    assert render(messages, tokenizer)[0] == fit(messages, tokenizer, 1024, 1)[0][:-1]


def test_the_pipeline_of_hugging_face_gives_our_reply(make_model, tokenizer, tmp_path):
    from transformers import pipeline

    model = make_model(dtype=torch.float32, noise=0.3, vocab_size=tokenizer.vocab_size, block_size=64)
    with torch.no_grad():  # the only control ids that a reply may meet are the two that end it, in both
        model.wte.weight[[tokenizer.control[f"<|{role}|>"] for role in ("system", "user", "assistant")]] = 0
    folder = runs.save(tmp_path / "run", 1, model, tokenizer, settings={}, results={})
    messages = [{"role": "user", "content": "Where do they go? 🙂"}]
    chat = pipeline("text-generation", str(folder), max_new_tokens=16, do_sample=False)
    theirs = chat(messages)[0]["generated_text"][-1]["content"]
    ours = generate.stream(model, tokenizer, render_prompt(messages, tokenizer), SampleConfig(16, temperature=0))
    assert "".join(ours) == theirs != ""
