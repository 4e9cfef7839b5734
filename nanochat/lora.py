"""Which weights learn: all of them, a low-rank addition to some matrices (LoRA), or those that are named.

LoRA leaves a matrix W (out, in) as it is and learns what is added to its product:

    W x  becomes  W x + (alpha / rank) · B A x        A (rank, in) random, B (out, rank) zero at the start

Rows of the token table that stand for new tokens learn in every method: nothing has taught them yet. In
the files of Hugging Face's PEFT an adapted model is its base's folder and these few tensors; `to_peft` and
`from_peft` are the two directions, `plain_state` merges.

Source: Hu et al. 2021 (LoRA), equation 3; names and layout of PEFT's files, to which tests/test_lora.py holds them.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat import InputError
from nanochat.model import GPT

LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
HEADS = ("score.weight",)  # of a classifier: always learned, as it starts at random
PEFT = "base_model.model."
TOKEN_ROWS = "wte.token_adapter.trainable_tokens_delta"  # in spite of its name the rows themselves
# Fields of adapter_config.json that would change what the tensors mean, with the value that they must have here.
REQUIRED = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
            "layer_replication": None, "lora_bias": False, "use_qalora": False, "target_parameters": None, "use_bdlora": None,
            "alora_invocation_tokens": None, "kasa_config": None, "monteclora_config": None, "arrow_config": None}
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of init_lora_weights: the adapter fits a base that no file holds


@dataclass
class LoRAConfig:
    """What is added, and where."""

    rank: int = 8
    """rank r of the addition; 8 to 64 is usual"""
    alpha: float = 16.0
    """the addition is scaled by alpha / rank"""
    lora_dropout: float = 0.0
    """share of the addition's inputs zeroed in training"""
    targets: tuple[str, ...] = LINEARS
    """matrices of each block that get one"""

    def __post_init__(self):
        wrong = []
        if not 1 <= self.rank <= 100_000:
            wrong.append(f"--rank is {self.rank}, must be from 1 to 100,000")
        if not 0 < self.alpha < math.inf:
            wrong.append(f"--alpha is {self.alpha}, must be above 0")
        if not 0 <= self.lora_dropout < 1:
            wrong.append(f"--lora-dropout is {self.lora_dropout}, must be in [0, 1)")
        if not self.targets or not set(self.targets) <= set(LINEARS):
            wrong.append(f"--targets is {' '.join(self.targets) or 'empty'}, must be some of {' '.join(LINEARS)}")
        if wrong:
            raise InputError("; ".join(wrong))


class LoRALinear(nn.Linear):
    """A Linear whose own weights are frozen, with a low-rank addition that learns."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.alpha, self.scale, self.dropout = alpha, alpha / rank, dropout
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (..., in) → W x + scale · B A x, (..., out)."""
        added = F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + self.scale * added

    def merged(self) -> Tensor:
        """W + scale · B A, (out, in)."""
        return self.weight + self.scale * self.lora_B @ self.lora_A


class TokenRows(nn.Module):
    """The token table, frozen but for its last rows, in the place of wte and, by `head`, of the model's head.

    The two parts are never one tensor in a forward pass, so that the frozen one costs no gradient.
    """

    def __init__(self, table: nn.Embedding, first: int):
        super().__init__()
        self.first = first  # the first row that learns
        self.frozen = nn.Parameter(table.weight[:first].detach(), requires_grad=False)
        self.rows = nn.Parameter(table.weight[first:].detach().clone())

    @property
    def weight(self) -> Tensor:
        """The whole table (V, C)."""
        return torch.cat([self.frozen, self.rows])

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids (...) → rows of the table, (..., C)."""
        old = F.embedding(tokens.clamp(max=self.first - 1), self.frozen)
        new = F.embedding((tokens - self.first).clamp(min=0), self.rows)
        return torch.where((tokens >= self.first).unsqueeze(-1), new, old)

    def head(self, x: Tensor) -> Tensor:
        """Vectors (..., C) → logits (..., V)."""
        return torch.cat([F.linear(x, self.frozen), F.linear(x, self.rows)], dim=-1)


# ------------------------------------------------------------------ choosing what learns


def add_lora(model: GPT, config: LoRAConfig, new_rows: int) -> None:
    """Freeze the model, add LoRA to the named linears of all blocks, and let the last `new_rows` token rows learn; in place."""
    freeze(model, (), new_rows)
    for block in model.h:
        for name in config.targets:
            linear: Any = block.get_submodule(name)
            block.set_submodule(name, LoRALinear(linear, config.rank, config.alpha, config.lora_dropout))


def freeze(model: GPT, learn: Sequence[str], new_rows: int) -> None:
    """Let only some weights learn, in place: those that `learn` names, and the last `new_rows` rows of the token table.

    learn: a number is so many last blocks and the last layer norm; any other text is a part of a name (attn,
    ln_, h.0., wpe, mlp.c_fc.bias, …). InputError for one that fits no name.
    """
    names = [name for name, _ in model.named_parameters()]
    parts = [part for part in learn if not part.isdecimal()]
    blocks = max((int(part) for part in learn if part.isdecimal()), default=0)
    last = [f"h.{i}." for i in range(max(0, len(model.h) - blocks), len(model.h))] + ["ln_f."] * (blocks > 0)
    if unknown := [part for part in parts if not part or not any(part in name for name in names)]:
        raise InputError(f"--learn {unknown[0] or repr(unknown[0])} is a part of no weight's name; names are {', '.join(names[:14])}, …")
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith(tuple(last)) or any(part in name for part in parts) or name in HEADS
    if new_rows and not model.wte.weight.requires_grad:
        learn_rows(model, new_rows)


def learn_rows(model: GPT, count: int) -> None:
    """Let the last `count` rows of the token table learn, and no other, in place."""
    rows = TokenRows(model.wte, model.config.vocab_size - count)
    model.wte = rows  # type: ignore[assignment]  # in the table's place
    if not model.labels:  # a classifier's head is not its token table
        model.head = rows.head


def is_adapted(model: GPT) -> bool:
    """Whether it has LoRA."""
    return any(isinstance(module, LoRALinear) for module in model.modules())


def plain_state(model: GPT, merge: bool = True) -> dict[str, Tensor]:
    """All weights by the names of a plain GPT, whatever of it is adapted; merge=False leaves the additions out."""
    state = {}
    for prefix, module in model.named_modules():
        prefix += "." * bool(prefix)
        if isinstance(module, TokenRows):
            state[f"{prefix}weight"] = module.weight
            continue
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, LoRALinear) and name == "weight" and merge:
                p = module.merged()
            if not name.startswith("lora_"):
                state[prefix + name] = p
    return {name: w.detach() for name, w in state.items()}


# ------------------------------------------------------------------ PEFT's files


def to_peft(model: GPT, base: str) -> tuple[dict, dict[str, Tensor]]:
    """An adapted model → (adapter_config.json, tensors of adapter_model.safetensors). base: where its base is."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    tensors = {}
    for name, module in found.items():
        tensors[f"{PEFT}transformer.{name}.lora_A.weight"] = module.lora_A
        tensors[f"{PEFT}transformer.{name}.lora_B.weight"] = module.lora_B
    rows = None
    if isinstance(model.wte, TokenRows):
        tensors[f"{PEFT}transformer.{TOKEN_ROWS}"] = model.wte.rows
        rows = list(range(model.wte.first, model.config.vocab_size))
    heads = {name: p for name, p in model.named_parameters() if name in HEADS}
    tensors |= {PEFT + name: p for name, p in heads.items()}
    one = next(iter(found.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": one.lora_A.size(0),
        "lora_alpha": one.alpha,
        "lora_dropout": one.dropout,
        "target_modules": sorted({name.split(".", 2)[2] for name in found}),
        "fan_in_fan_out": True,  # the base's file keeps these matrices (in, out)
        "bias": "none",
        "trainable_token_indices": rows,
        "modules_to_save": [name.split(".")[0] for name in heads] or None,
        "inference_mode": True,
    }
    return config, {name: p.detach().float().cpu().contiguous() for name, p in tensors.items()}


def checked(config: dict, path: object) -> tuple[int, float]:
    """Rank and alpha of an adapter_config.json; InputError names what would change the meaning of the tensors."""
    wrong = [f"{name} is {config[name]!r}, must be {value!r}" for name, value in REQUIRED.items() if config.get(name) not in (value, None)]
    if str(config.get("init_lora_weights")).startswith(CHANGE_THE_BASE):
        wrong.append(f"init_lora_weights is {config['init_lora_weights']!r}, must be true")
    rank, alpha = config.get("r", 0), config.get("lora_alpha", "")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        wrong.append(f"r is {rank!r} and lora_alpha {alpha!r}, must be numbers")
    if wrong:
        raise InputError(f"{path}: not implemented here: {'; '.join(wrong)[:1000]}")
    return rank, alpha


def from_peft(model: GPT, config: dict, tensors: dict[str, Tensor], path: object) -> None:
    """Put an adapter of PEFT's files onto its base, in place; `path`, of the adapter, is for the InputErrors.

    Refused by name: what would change the meaning of the tensors (DoRA, rank patterns, …), tensors that
    fit no matrix, whole token tables.
    """
    rank, alpha = checked(config, path)
    left = {name.removeprefix(PEFT).removeprefix("transformer."): w for name, w in tensors.items()}
    places = config.get("trainable_token_indices") or []
    places = next(iter(places.values()), []) if isinstance(places, dict) else places
    model.requires_grad_(False)
    for name in sorted({name[: -len(".lora_A.weight")] for name in left if name.endswith(".lora_A.weight")}):
        A, B = left.pop(f"{name}.lora_A.weight"), left.pop(f"{name}.lora_B.weight", None)
        place = re.fullmatch(rf"h\.(\d+)\.({'|'.join(LINEARS)})", name)
        linear: Any = model.get_submodule(name) if place and int(place[1]) < len(model.h) else None
        shapes = None if linear is None else ((rank, linear.in_features), (linear.out_features, rank))
        if linear is None or B is None or shapes != (tuple(A.shape), tuple(B.shape)):
            raise InputError(f"{path}: lora_A and lora_B of {name} do not fit the base" + (f", which wants {shapes}" if shapes else ""))
        module = LoRALinear(linear, rank, alpha, config.get("lora_dropout") or 0.0)
        module.lora_A, module.lora_B = nn.Parameter(A.float()), nn.Parameter(B.float())
        model.set_submodule(name, module)
    if (rows := left.pop(TOKEN_ROWS, None)) is not None:
        V, C = model.wte.weight.shape
        if not isinstance(places, list) or not all(isinstance(i, int) and 0 <= i < V for i in places) or rows.shape != (len(places), C):
            raise InputError(f"{path}: {tuple(rows.shape)} token rows for ids {str(places)[:80]} do not fit the base's {V:,} rows of {C}")
        with torch.no_grad():
            model.wte.weight[places] = rows.float()
        if places == list(range(V - len(places), V)):  # as ours: they may go on learning
            learn_rows(model, len(places))
    for name, p in model.named_parameters():
        if name in HEADS and name in left and left[name].shape == p.shape:
            p.data.copy_(left.pop(name))
            p.requires_grad = True
    if left or not is_adapted(model):
        first = next(iter(left), "none")
        raise InputError(f"{path}: {len(left)} of its {len(tensors)} tensors fit nothing in the base, the first is {first[:100]}")
