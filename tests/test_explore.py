"""One prompt seen from inside: each figure of the page is what model.py computes, and the page is safe and whole."""

import base64
import copy
import html.parser
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanochat import InputError, checkpoint, explore, runtime
from nanochat.classifier import with_label_head
from nanochat.dialogue import render_prompt
from nanochat.model import forward_flops
from nanochat.wordpiece import WordPieceTokenizer

ROOT = Path(__file__).parent.parent
IDS = [5, 90, 17, 17, 3, 60, 0, 41, 8]
HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & {{inside}}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def inside(model):
    return explore.look(model, IDS)


# ------------------------------------------------------------------ one forward pass


def test_attention_rows_sum_to_one_and_are_causal(inside):
    assert inside.weights.shape == (2, 3, 9, 9)
    assert same(inside.weights.sum(-1), torch.ones(2, 3, 9, dtype=torch.float64))
    assert inside.weights.triu(1).abs().max() == 0 and inside.weights.tril().min() >= 0


def test_the_weights_times_the_values_through_c_proj_are_what_attention_added(model, inside):
    for layer, block in enumerate(model.h):
        with torch.no_grad():
            v = rearrange(block.attn.c_attn(block.ln_1(inside.streams[layer]))[:, -36:], "T (H D) -> H T D", H=3)
            gathered = rearrange(inside.weights[layer] @ v, "H T D -> T (H D)")
            assert same(block.attn.c_proj(gathered), inside.attn[layer])


def test_the_stream_is_the_sum_of_all_that_was_added(model, inside):
    with torch.no_grad():
        assert same(inside.tokens, model.wte.weight[IDS]) and same(inside.positions, model.wpe.weight[: len(IDS)])
    assert same(inside.streams[0], inside.tokens + inside.positions)
    assert same(inside.streams[1:], inside.streams[:-1] + inside.attn + inside.mlp)


def test_the_lens_after_a_block_is_a_model_that_ends_there(model, inside):
    for layers in range(3):
        shorter = copy.deepcopy(model)
        shorter.h = shorter.h[:layers]
        with torch.no_grad():
            assert same(explore.lens(model, inside.streams[layers]), logits(shorter))
    with torch.no_grad():
        assert same(explore.lens(model, inside.streams[-1]), inside.logits) and same(inside.logits, logits(model))


def test_looking_leaves_the_model_as_it_was(model, inside):
    before = logits(model)
    explore.ablate(model, inside)
    with pytest.raises(KeyError), explore.without_head(model, 0, 1):
        raise KeyError
    assert torch.equal(logits(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ------------------------------------------------------------------ switched off


def without(model, layer: int, column: int):
    """A copy of the model with weights of zero: a head's columns of c_proj, all of attention, or all of the MLP."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        if column < 3:
            model.h[layer].attn.c_proj.weight[:, 12 * column : 12 * (column + 1)] = 0
        else:
            for p in (model.h[layer].attn if column == 3 else model.h[layer].mlp).c_proj.parameters():
                p.zero_()
    return model


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("column", range(5))
def test_switching_off_equals_weights_of_zero(model, layer, column):
    off = explore.without_head(model, layer, column) if column < 3 else explore.without_part(model, layer, explore.PARTS[column - 3])
    with off:
        found = logits(model)
    assert same(found, logits(without(model, layer, column))) and not same(found, logits(model))


def test_ablations_measure_distance_and_surprise_of_the_zeroed_model(model, inside):
    distance, surprise = explore.ablate(model, inside)
    assert distance.shape == surprise.shape == (2, 5, len(IDS))
    whole = logits(model).softmax(-1)
    for layer in range(2):
        for column in range(5):
            cut = logits(without(model, layer, column)).softmax(-1)
            kl = (whole * (whole / cut).log2()).sum(-1)
            more = (whole[range(8), IDS[1:]] / cut[range(8), IDS[1:]]).log2()
            assert torch.allclose(distance[layer, column].double(), kl, atol=1e-5)
            assert torch.allclose(surprise[layer, column].double(), F.pad(more, (1, 0)), atol=1e-5)


def test_surprisal_is_the_models_own_loss_in_bits(model, inside):
    with torch.no_grad():
        nats = model.nll(torch.tensor([IDS[:-1]]), torch.tensor([IDS[1:]]))[0]
    bits = explore.surprisal(inside.logits, IDS)
    assert bits[0] == 0 and torch.allclose(bits[1:], nats.double() / torch.tensor(2.0).log(), atol=1e-5)


# ------------------------------------------------------------------ cost


def test_the_costs_are_those_that_pytorch_counts(model):
    rows = explore.cost(model, len(IDS))
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # which counts no fused kernel of a CPU
        logits(model)
    assert sum(row["flops"] for row in rows) == forward_flops(model.config, len(IDS), T=len(IDS)) == counter.get_total_flops()
    by_module = counter.get_flop_counts()
    for part, name in (("attn", "attn"), ("mlp", "mlp")):
        counted = sum(sum(by_module[f"GPT.h.{layer}.{name}"].values()) for layer in range(2))
        assert next(row["flops"] for row in rows if row["part"] == part) == counted


# ------------------------------------------------------------------ the page


def on_page(page: str) -> dict:
    """The figures in a page."""
    return json.loads(re.search(r'<script type="application/json" id="inside">(.*?)</script>', page, re.S)[1])


@pytest.fixture
def talker(make_model, tokenizer):
    """A model for the tests' tokenizer."""
    return make_model(torch.float32, vocab_size=tokenizer.vocab_size, block_size=128)


def test_the_page_holds_what_the_model_gave(talker, tokenizer):
    ids = tokenizer.encode("小河 flows.\n")
    inside, found = explore.look(talker, ids), on_page(explore.page(talker, tokenizer, ids, "mine", written=2))
    assert (found["ids"], found["name"], found["written"], found["left"]) == (ids, "mine", 2, 0)
    assert bytes.fromhex("".join(found["bytes"])).decode() == "小河 flows.\n"
    T, weights = len(ids), base64.b64decode(found["weights"])
    for layer, head, row, column in [(0, 0, 0, 0), (1, 2, T - 1, 3), (0, 1, 4, 4), (1, 0, 2, 1)]:  # as explore.html counts
        byte = weights[(layer * 3 + head) * T * (T + 1) // 2 + row * (row + 1) // 2 + column]
        assert abs(byte / 255 - inside.weights[layer, head, row, column]) < 0.003
    assert len(weights) == 6 * T * (T + 1) // 2
    best = inside.logits.softmax(-1).topk(explore.NEXT)
    assert found["next"]["ids"] == best.indices.tolist()
    assert torch.allclose(torch.tensor(found["next"]["p"]), best.values, rtol=0.01)
    assert found["lens"]["ids"][-1] == inside.logits.argmax(-1).tolist() and len(found["lens"]["ids"]) == 3
    assert torch.allclose(torch.tensor(found["norms"]["mlp"]), inside.mlp.norm(dim=-1), rtol=0.01)
    loss = explore.ablate(talker, inside)[1].sum(-1) / (T - 1)
    assert torch.allclose(torch.tensor(found["surprise"]), loss, rtol=0.01, atol=1e-6)
    rows = F.normalize(talker.wte.weight.detach(), dim=-1)
    for i, near in zip(ids, found["near"]["ids"]):
        others = (rows @ rows[i]).argsort(descending=True).tolist()
        assert near == [other for other in others if other != i][: explore.NEIGHBOURS]
    assert found["cache"] * 128 == 2 * talker.new_cache(1).keys.nbytes
    assert set(map(str, ids)) <= set(found["names"])


def test_a_hostile_prompt_is_only_text(talker, tokenizer):
    ids = tokenizer.encode(HOSTILE)[-explore.LONGEST :]
    page = explore.page(talker, tokenizer, ids, HOSTILE)

    class Scripts(html.parser.HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag, attributes):
            self.found += [tag] * (tag in ("script", "img"))

    Scripts().feed(page)
    assert Scripts.found == ["script", "script"]
    found = on_page(page)
    assert found["name"] == HOSTILE
    assert "".join(found["names"][str(i)] for i in ids).replace("␣", " ") == tokenizer.decode(ids)
    assert not set("<>&") & set(re.search(r'id="inside">(.*?)</script>', page, re.S)[1])


@pytest.mark.parametrize("block_size, most", [(128, 64), (24, 24)])
def test_of_a_long_text_the_newest_tokens_are_shown(make_model, tokenizer, block_size, most):
    model = make_model(torch.float32, vocab_size=tokenizer.vocab_size, block_size=block_size)
    ids = [i % 300 for i in range(100)]
    found = on_page(explore.page(model, tokenizer, ids, "m"))
    assert found["ids"] == ids[-most:] and found["left"] == 100 - most


def test_one_token_is_enough(talker, tokenizer):
    found = on_page(explore.page(talker, tokenizer, [7], "m"))
    assert found["bits"] == [0] and all(x == 0 for row in found["surprise"] for x in row)
    assert max(x for layer in found["distance"] for part in layer for x in part) > 0


def test_damaged_weights_get_one_line(talker, tokenizer):
    with torch.no_grad():
        talker.wpe.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="m: its logits are not finite"):
        explore.page(talker, tokenizer, [7, 8], "m")


@pytest.mark.parametrize("token, shown", [
    (b" river", "␣river"), (b"\n\t", "⏎⇥"), ("河".encode(), "河"), ("河".encode()[:2], "‹E6 B2›"), (b"a\xff", "‹61 FF›"),
    ("🙂".encode(), "🙂"), (b"\x00\x1b[", r"\x00\x1b["), ("\u202e".encode(), r"\u202e"), (b"<|end|>", "<|end|>"),
])  # fmt: skip
def test_a_token_is_shown_as_text_or_as_bytes(token, shown):
    assert explore.visible(token) == shown


def test_both_languages_have_the_same_words_and_the_page_asks_for_no_others():
    source = (ROOT / "nanochat" / "explore.html").read_text(encoding="utf-8")
    tables = re.findall(r"^  (?:en|zh): \{\n(.*?)^  \},", source, re.S | re.M)
    names = [re.findall(r"(?:^|[ {])(\w+): ", re.sub(r'"[^"]*"|`[^`]*`', "", table)) for table in tables]
    assert len(names) == 2 and names[0] == names[1] and len(names[0]) > 40
    asked = re.findall(r'data-(?:t|label)="(\w+)"|\bt\("(\w+)"|<section id="(\w+)"', source)
    assert {a or b or c for a, b, c in asked} <= set(names[0])
    assert not re.search(r"https?:|//\w+\.|@import|url\(", source)  # nothing is loaded from anywhere


# ------------------------------------------------------------------ the command


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(*flags) → (exit code, stdout, stderr)."""

    def run(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["explore", "--device", "cpu", *flags])
        code = 0
        try:
            runtime.run_as_script(explore.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def full_disk():
    """No file can grow beyond 20,000 bytes."""
    resource = pytest.importorskip("resource", reason="no such limits here")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_on_a_full_disk_the_page_of_before_stays(command, folder, tmp_path, full_disk):
    (tmp_path / "inside.html").write_text("before")
    (tmp_path / "link.html").symlink_to("inside.html")
    code, _, said = command("--checkpoint", str(folder), "--prompt", "The river", "--out", "link.html")
    assert code == 2 and said.splitlines()[-1] == "error: --out link.html: File too large"
    assert (tmp_path / "inside.html").read_text() == "before" and not list(tmp_path.glob(".tmp*"))


@pytest.fixture
def folder(talker, tokenizer, tmp_path) -> Path:
    """A checkpoint that chats."""
    (tmp_path / "talker").mkdir()
    checkpoint.write(tmp_path / "talker", talker, tokenizer)
    return tmp_path / "talker"


def test_the_command_reads_the_prompt_as_sample_does(folder, tokenizer, command, tmp_path):
    asked = render_prompt([{"role": "user", "content": "Count the boats"}], tokenizer)
    code, out, _ = command("--checkpoint", str(folder), "--prompt", "Count the boats")
    assert code == 0 and out.startswith("explore.html: ") and on_page(Path("explore.html").read_text("utf-8"))["ids"] == asked
    code, _, _ = command("--checkpoint", str(folder), "--prompt", "Count the boats", "--raw", "--out", "raw.html")
    assert code == 0 and on_page(Path("raw.html").read_text("utf-8"))["ids"] == tokenizer.encode("Count the boats")


def test_the_model_may_go_on_with_the_text(folder, tokenizer, command, talker):
    prompt = tokenizer.encode("small river")
    command("--checkpoint", str(folder), "--prompt", "small river", "--raw", "--new-tokens", "3")
    found = on_page(Path("explore.html").read_text("utf-8"))
    ids = list(prompt)
    for _ in range(found["written"]):
        ids.append(int(logits(talker, ids)[-1].argmax()))
    assert found["ids"] == ids and 1 <= found["written"] <= 3


def test_a_prompt_that_is_too_long_is_said(folder, command):
    code, _, err = command("--checkpoint", str(folder), "--prompt", "boats and " * 40, "--raw")
    assert code == 0 and "only the newest 64 are looked at" in err


def test_a_chinese_wordpiece_model_is_shown(make_model, command, tmp_path):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"小河流过磨坊", "mill", "##er"]
    tokenizer = WordPieceTokenizer(names)
    (tmp_path / "zh").mkdir()
    checkpoint.write(tmp_path / "zh", make_model(torch.float32, vocab_size=len(names)), tokenizer)
    code, _, err = command("--checkpoint", "zh", "--prompt", "小河流过 miller 🙂")
    found = on_page(Path("explore.html").read_text("utf-8"))
    shown = [found["names"][str(i)] for i in found["ids"]]
    assert code == 0 and not err and shown == ["小", "河", "流", "过", "␣mill", "er", "\ufffd"]


@pytest.mark.parametrize("flags, said", [
    (["--checkpoint", "no/where/at/all", "--prompt", "a"], "no/where/at/all: no such checkpoint"),
    (["--prompt", ""], "--prompt is empty"),
    (["--prompt", " \n", "--raw"], "--prompt is empty"),
    (["--prompt", "a", "--new-tokens", "-1"], "--new-tokens is -1, must be 0 or more"),
    (["--prompt", "a", "--new-tokens", "999"], "must be at most"),
    (["--prompt", "a", "--out", "no/where.html"], "--out no/where.html"),
    (["--prompt", "a", "--out", "notes.txt"], "must be an .html file"),
    (["--prompt", "a", "--out", "."], "--out ."),
    (["--prompt", "a", "--device", "cuda:77"], "--device cuda:77"),
])
def test_wrong_input_gets_one_line(folder, command, flags, said):
    code, out, err = command("--checkpoint", str(folder), *flags)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert not Path("explore.html").exists()


def test_a_classifier_is_refused_in_one_line(talker, tokenizer, command, tmp_path):
    (tmp_path / "labels").mkdir()
    checkpoint.write(tmp_path / "labels", with_label_head(talker, ["no", "yes"]), tokenizer)
    code, _, err = command("--checkpoint", "labels", "--prompt", "a")
    assert code == 2 and err.startswith("error: labels gives labels, not text") and err.count("\n") == 1


# ------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, talker, tokenizer, tmp_path):
    """open_page(text, **context) → the page of this text; at the end, nothing went wrong and nothing was asked for."""
    wrong = []

    def open_page(text: str, **settings):
        ids = tokenizer.encode(text)
        (tmp_path / "page.html").write_text(explore.page(talker, tokenizer, ids, text, written=2), encoding="utf-8")
        page = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1280, "height": 900}} | settings).new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        return page

    yield open_page
    assert not wrong


def read(page, selector: str) -> str:
    return page.inner_text(selector)


def click(page, selector: str, across: float, down: float) -> None:
    """Click at these shares of an element's width and height."""
    box = page.locator(selector).bounding_box()
    page.click(selector, position={"x": box["width"] * across, "y": box["height"] * down})


@pytest.mark.slow
def test_heads_tokens_and_ablations_are_chosen_in_the_page(open_page, talker, tokenizer):
    text = "Boats carry grain, salt and letters."
    page, ids = open_page(text), tokenizer.encode(text)
    inside = explore.look(talker, ids)
    page.select_option("#layer", "1")
    page.select_option("#head", "2")
    assert read(page, "#mapTitle") == "Layer 1, head 2"
    page.locator("#chips button").nth(5).click()
    best = inside.weights[1, 2, 5].argmax().item()
    said = read(page, "#map output")
    assert re.match(rf"5 “.*” looks at {best} “", said)
    assert abs(float(re.search(r"([\d.]+)\s%$", said)[1]) / 100 - inside.weights[1, 2, 5, best].item()) < 0.004
    likeliest = explore.visible(tokenizer.token_bytes[inside.logits[5].argmax()])
    assert read(page, "#likely .token >> nth=0") == likeliest
    assert read(page, "#lens tr:last-child td.at") == likeliest  # the last row of the lens is the prediction
    click(page, "#overview canvas", 0.5, 0.2)
    assert read(page, "#mapTitle") == "Layer 0, head 1" and page.input_value("#head") == "1"
    page.select_option("#measure", "surprise")
    click(page, "#off canvas", 0.99, 0.99)
    more = explore.ablate(talker, inside)[1].sum(-1)[1, 4].item() / (len(ids) - 1)
    assert read(page, "#off output") == f"Layer 1 without MLP: {float(f'{more:.3g}')} bits"


@pytest.mark.slow
def test_everything_can_be_reached_with_the_keyboard(open_page):
    page = open_page("Boats carry grain, salt and letters.")
    start = int(read(page, "#here").split()[0])
    page.keyboard.press("ArrowLeft")
    assert int(read(page, "#here").split()[0]) == start - 1
    page.focus("#map canvas")
    page.keyboard.press("ArrowUp")
    assert int(read(page, "#here").split()[0]) == start - 2
    page.select_option("#head", "0")
    page.focus("#overview canvas")
    page.keyboard.press("ArrowRight")
    assert page.input_value("#head") == "1" and int(read(page, "#here").split()[0]) == start - 2
    page.focus("#off canvas")
    page.keyboard.press("ArrowRight")
    assert page.input_value("#head") == "2"


@pytest.mark.slow
@pytest.mark.parametrize("size, locale, scheme", [((1280, 900), "en-US", "light"), ((390, 844), "zh-CN", "dark")])
def test_a_hostile_prompt_runs_nothing_and_fits_every_window(open_page, size, locale, scheme):
    page = open_page(HOSTILE, viewport={"width": size[0], "height": size[1]}, locale=locale, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    bright = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 128")
    assert bright == (scheme == "light")
    words = "[...document.querySelectorAll('h2, h3, h2 + p, option[data-t], th')].map(node => node.textContent)"
    before = page.evaluate(words)
    page.click("#language")
    page.click("#theme")
    after = page.evaluate(words)
    assert "undefined" not in "".join(before + after) and sum(a != b for a, b in zip(before, after)) > 20
    assert bright != page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 128")
