"""One prompt seen from inside: attention, residual stream, logit lens, switched-off heads → one HTML page.

    python -m nanochat.explore --checkpoint out/pretrained --prompt "The river runs" --out explore.html

`look` runs the model once and keeps what passes by: hooks on the modules of model.py catch it, and model.py knows
nothing of them. `ablate` switches off each head and each half of each layer in turn, and measures what that does to the
predictions. `page` puts both into explore.html, beside this file, which draws them and loads nothing from anywhere.

Sources: nostalgebraist 2020, "interpreting GPT: the logit lens"; Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits" (the residual stream); Michel et al. 2019, "Are Sixteen Heads Really Better than One?".
"""

import argparse
import base64
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from nanochat import InputError, checkpoint, runtime
from nanochat.classifier import GPTClassifier
from nanochat.dialogue import opening, render_prompt
from nanochat.generate import SampleConfig, generate
from nanochat.model import GPT, attention_formula, forward_flops
from nanochat.tokenizer import Tokenizer

LONGEST = 64  # tokens that are looked at: each head has LONGEST² weights, and a phone has 390 pixels
PARTS = ("attn", "mlp")  # what a block adds to the stream, by their names in Block
SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
NEXT, NEIGHBOURS = 10, 6  # likeliest next tokens, and nearest rows of wte, that are listed


# ------------------------------------------------------------------ one forward pass, seen from inside


@dataclass
class Inside:
    """What a text of T tokens leaves on its way through L layers of width C with H heads."""

    ids: list[int]
    tokens: Tensor  # (T, C) rows of wte
    positions: Tensor  # (T, C) rows of wpe
    streams: Tensor  # (L + 1, T, C) the residual stream before the first block, and after each
    attn: Tensor  # (L, T, C) what the attention of each block added to it
    mlp: Tensor  # (L, T, C) what its MLP added
    weights: Tensor  # (L, H, T, T) weights[l, h, t, s]: the share of token s in what head h gathers for token t
    logits: Tensor  # (T, V)


@torch.no_grad()
def look(model: GPT, ids: list[int]) -> Inside:
    """Run the model (in eval mode) over at most block_size ids; one hook on each module keeps its output."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda module, inputs, output: seen.update({name: output})

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(keep(name)))
        logits = model(torch.tensor([ids], device=model.wpe.weight.device))[0]
    blocks = [f"h.{layer}" for layer in range(model.config.n_layer)]
    return Inside(
        ids=list(ids),
        tokens=seen["wte"][0],
        positions=seen["wpe"],
        streams=torch.cat([seen["wte"] + seen["wpe"], *(seen[block] for block in blocks)]),
        attn=torch.cat([seen[f"{block}.attn"] for block in blocks]),
        mlp=torch.cat([seen[f"{block}.mlp"] for block in blocks]),
        weights=torch.stack([attention_weights(model, seen[f"{block}.attn.c_attn"][0]) for block in blocks]),
        logits=logits,
    )


def attention_weights(model: GPT, qkv: Tensor) -> Tensor:
    """The output of c_attn (T, 3C) → weights (H, T, T) of each query over the keys.

    The fast attention never holds them. attention_formula makes weights @ v: with the identity for v, the weights.
    """
    q, k, _ = rearrange(qkv, "T (three H D) -> three H T D", three=3, H=model.config.n_head)
    return attention_formula(q, k, torch.eye(len(qkv)).to(qkv), None, 0.0)


def lens(model: GPT, stream: Tensor) -> Tensor:
    """The residual stream (…, C) after any block → logits (…, V), as if that block were the last one."""
    return model.head(model.ln_f(stream))


# ------------------------------------------------------------------ switching parts off


@contextmanager
def without_head(model: GPT, layer: int, head: int) -> Iterator[None]:
    """While this is open, one head adds nothing: its D columns of what c_proj reads are zero."""
    D = model.config.n_embd // model.config.n_head

    def silence(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0].clone()  # (B, T, H·D)
        x[..., head * D : (head + 1) * D] = 0
        return (x,)

    with model.get_submodule(f"h.{layer}.attn.c_proj").register_forward_pre_hook(silence):
        yield


@contextmanager
def without_part(model: GPT, layer: int, part: str) -> Iterator[None]:
    """While this is open, "attn" or "mlp" of one layer adds nothing to the stream, not even its bias."""
    module = getattr(model.h[layer], part)
    with module.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output)):
        yield


@torch.no_grad()
def ablate(model: GPT, inside: Inside) -> tuple[Tensor, Tensor]:
    """Switch off each head, then attention, then MLP, of each layer → what that changes, both (L, H + 2, T), in bits.

    First the distance KL(whole ‖ ablated) of the next-token distributions after each position, then by how much more
    surprising each token of the text becomes (0 for the first, which nothing predicts). Layers below the one that is
    changed give what they gave, so each run starts from the stream there.
    """
    L, H, T = model.config.n_layer, model.config.n_head, len(inside.ids)
    distance, surprise = torch.zeros(L, H + 2, T), torch.zeros(L, H + 2, T)
    whole, before = inside.logits.log_softmax(-1), surprisal(inside.logits, inside.ids)
    runs = [(layer, column) for layer in range(L) for column in range(H + 2)]
    for layer, column in tqdm(runs, "switching off", leave=False, unit="part", delay=2, disable=None):
        off = without_head(model, layer, column) if column < H else without_part(model, layer, PARTS[column - H])
        x = inside.streams[layer][None]
        with off:
            for block in model.h[layer:]:
                x = block(x, None, None)
        logits = lens(model, x[0])
        kl = F.kl_div(logits.log_softmax(-1), whole, reduction="none", log_target=True).sum(-1)
        distance[layer, column] = kl.clamp(min=0) / math.log(2)  # rounding makes −1e-9 of 0
        surprise[layer, column] = surprisal(logits, inside.ids) - before
    return distance, surprise


def surprisal(logits: Tensor, ids: list[int]) -> Tensor:
    """−log₂ p of each token, given those before it: (T, V) → (T,) bits, 0 for the first, which nothing predicts."""
    nats = F.cross_entropy(logits[:-1], torch.tensor(ids[1:], dtype=torch.int64, device=logits.device), reduction="none")
    return F.pad(nats, (1, 0)) / math.log(2)


# ------------------------------------------------------------------ what it costs


def cost(model: GPT, T: int) -> list[dict]:
    """Each part's parameters, and its FLOPs in a forward pass of T tokens; these sum to forward_flops."""
    c = model.config
    C, L = c.n_embd, c.n_layer
    flops = {
        ".attn.": T * L * (2 * 4 * C * C + 4 * T * C),  # q, k, v and c_proj; q kᵀ and the weighted sum of v
        ".mlp.": T * L * 2 * 8 * C * C,
        "head": forward_flops(c, T, T=T) - forward_flops(c, T, supervised=0, T=T),
    }
    return [{
        "part": part.strip("._"),
        "parameters": sum(p.numel() for name, p in model.named_parameters() if part in name),
        "flops": flops.get(part, 0),
    } for part in ("wte", "wpe", "ln_", ".attn.", ".mlp.", "head")]


# ------------------------------------------------------------------ the page


def page(model: GPT, tokenizer: Tokenizer, ids: list[int], name: str, written: int = 0) -> str:
    """The HTML page of a text, whose last `written` tokens the model wrote itself. name: what the model is called.

    Only the newest LONGEST tokens are looked at. Raises InputError for weights that give no finite logits.
    """
    shown = ids[-min(LONGEST, model.config.block_size) :]
    inside = look(model, shown)
    if not inside.logits.isfinite().all():
        raise InputError(f"{name}: its logits are not finite; the weights are damaged")
    content = json.dumps(measured(model, tokenizer, inside) | {"name": name, "left": len(ids) - len(shown), "written": written},
                         ensure_ascii=False, separators=(",", ":"))
    safe = content.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")  # no text ends the script element
    return Path(__file__).with_name("explore.html").read_text(encoding="utf-8").replace("{{inside}}", safe, 1)


@torch.no_grad()
def measured(model: GPT, tokenizer: Tokenizer, inside: Inside) -> dict:
    """All that the page draws, as JSON takes it; tokens by their ids, with `names` to show them by."""
    c, ids, rows = model.config, inside.ids, model.wte.weight
    top = inside.logits.softmax(-1).topk(min(NEXT, c.vocab_size))
    through = [lens(model, stream).softmax(-1).max(-1) for stream in inside.streams]
    unit = F.normalize(rows, dim=-1)
    likeness = unit[ids] @ unit.T  # (T, V)
    near = likeness.scatter(1, torch.tensor(ids, device=rows.device)[:, None], -2).topk(min(NEIGHBOURS, c.vocab_size - 1))
    distance, surprise = ablate(model, inside)
    lower = torch.tril(torch.ones_like(inside.weights[0, 0], dtype=torch.bool))
    kept: dict = {
        "ids": ids,
        "bits": numbers(surprisal(inside.logits, ids), digits=6),  # the page also shows 2 to the minus that
        "next": {"ids": top.indices.tolist(), "p": numbers(top.values)},
        "near": {"ids": near.indices.tolist(), "cosine": numbers(near.values)},
        "norms": {part: numbers(getattr(inside, part).norm(dim=-1)) for part in ("tokens", "positions", "streams", *PARTS)},
        "cosines": {part: numbers(cosines(getattr(inside, part))) for part in ("tokens", "positions")},
        "lens": {"ids": [best.indices.tolist() for best in through], "p": [numbers(best.values) for best in through]},
        # one byte a weight, row t of t + 1 of them after the other
        "weights": base64.b64encode(bytes((inside.weights[..., lower] * 255).round().byte().flatten().tolist())).decode(),
        "distance": numbers(distance),
        "surprise": numbers(surprise.sum(-1) / max(1, len(ids) - 1)),
    }
    mentioned = {i for table in (kept["next"], kept["near"], kept["lens"]) for row in table["ids"] for i in row}.union(ids)
    return kept | {
        "names": {i: visible(tokenizer.token_bytes[i]) for i in sorted(mentioned)},
        "bytes": [tokenizer.token_bytes[i].hex(" ") for i in ids],
        "control": [i for i in tokenizer.control.values() if i in mentioned],
        "config": {name: getattr(c, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")},
        "cost": cost(model, len(ids)),
        "cache": 2 * c.n_layer * c.n_embd * 4,  # bytes a token: keys and values of each layer, fp32
    }


def cosines(x: Tensor) -> Tensor:
    """Cosine of the angle between any two rows: (T, C) → (T, T)."""
    unit = F.normalize(x, dim=-1)
    return unit @ unit.T


def visible(token: bytes) -> str:
    """The bytes of a token as a reader sees them: text with signs for blanks, or hex where they are not whole characters."""
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return f"‹{token.hex(' ').upper()}›"
    return "".join(SIGNS.get(c, c if c.isprintable() else ascii(c)[1:-1]) for c in text)


def numbers(x: Tensor, digits: int = 3) -> list:
    """A tensor as nested lists of numbers with so many digits; three are more than a page can show."""
    return [numbers(row, digits) for row in x] if x.dim() > 1 else [float(f"{value:.{digits}g}") for value in x.tolist()]


# ------------------------------------------------------------------ the command


def prompt_ids(text: str, tokenizer: Tokenizer, raw: bool) -> list[int]:
    """What the model reads, as from sample.py: a turn of a user if it was fine-tuned on dialogue, else the text. InputError for none."""
    if tokenizer.chat_template is None or raw:
        ids = tokenizer.encode(text)
    else:
        ids = render_prompt([*opening(tokenizer.system), {"role": "user", "content": text}], tokenizer)
    if not text.strip() or not ids:
        raise InputError("--prompt is empty; give it a few words")
    return ids


def main() -> None:
    """Show one prompt from inside a model: a page that opens in any browser, without a network."""
    parser = argparse.ArgumentParser(prog="python -m nanochat.explore", description=main.__doc__)
    add = parser.add_argument
    add("--checkpoint", default="out/finetuned", help="run folder, GPT-2 folder, gpt2 … (default: out/finetuned)")
    add("--prompt", required=True, help=f"a few words; of a text of more than {LONGEST} tokens, the newest are looked at")
    add("--raw", action="store_true", help="read --prompt as plain text even with a fine-tuned model")
    add("--new-tokens", type=int, default=0, help="let the model go on by so many tokens, the likeliest each time (default: 0)")
    add("--out", type=Path, default=Path("explore.html"), help="(default: explore.html)")
    add("--device", default="auto", help="cuda, cpu, cuda:1, …")
    args = parser.parse_args()
    if args.new_tokens < 0:
        raise InputError(f"--new-tokens is {args.new_tokens}, must be 0 or more")
    if args.out.suffix not in (".html", ".htm") or args.out.is_dir() or not os.access(args.out.parent, os.W_OK):
        raise InputError(f"--out {args.out}: must be an .html file, in a folder that can be written to")
    device = runtime.pick_device(args.device)
    model, tokenizer = checkpoint.load(args.checkpoint)
    if isinstance(model, GPTClassifier):
        raise InputError(f"{args.checkpoint} gives labels, not text; this page is for models that continue a text")
    ids = prompt_ids(runtime.argument_text(args.prompt), tokenizer, args.raw)
    read, most = len(ids), min(LONGEST, model.config.block_size)
    if args.new_tokens and read + args.new_tokens > most:
        raise InputError(f"--prompt has {read} tokens with its template, and --new-tokens is {args.new_tokens}; must be at most {most} in all")
    model.to(device)
    if args.new_tokens:
        greedy = SampleConfig(max_new_tokens=args.new_tokens, temperature=0)
        for [token] in generate(model, [ids], greedy):
            assert token is not None  # no token ends a row here: the page shows that the model chose to end
            ids.append(token)
            if token in tokenizer.control.values():
                break
    if len(ids) > most:
        print(f"{len(ids):,} tokens; only the newest {most} are looked at", file=sys.stderr)
    html = page(model, tokenizer, ids, args.checkpoint, written=len(ids) - read)
    out = args.out.resolve()
    whole = out.with_name(f".tmp-{out.name}")
    try:
        whole.write_text(html, encoding="utf-8")
        os.replace(whole, out)
    except OSError as error:  # the disk is full
        raise InputError(f"--out {args.out}: {error.strerror}") from None
    finally:
        whole.unlink(missing_ok=True)
    print(f"{args.out}: {len(html.encode()) / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    runtime.run_as_script(main)
