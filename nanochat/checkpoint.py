"""The one door to weights: folders that are Hugging Face GPT-2 checkpoints.

    step-000400/
      config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
      nanochat.json    step and template, which are checked, and the system text that chats begin with;
                       for people: results, settings, tokenizer hash, versions

Our parameter names are GPT-2's, so a conversion adds or strips the prefix "transformer." and
transposes four matrices a block: GPT-2's Conv1D keeps (in, out) where nn.Linear keeps (out, in).
Where a step of a run (runs.py) has its SHA256SUMS, what is not as it was saved is never loaded.

`load` also opens what people have: Hugging Face folders (.safetensors or .bin, sharded or not),
adapters of PEFT, hub names, nanoGPT's ckpt.pt. Pickles are read with weights_only=True: they cannot run code.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nanochat import InputError, lora, runtime, wordpiece
from nanochat.classifier import GPTClassifier
from nanochat.model import GPT, GPTConfig
from nanochat.records import read_json
from nanochat.tokenizer import CHAT_TEMPLATE, END_OF_TURN, TEMPLATE_NAME, Tokenizer

GPT2_FILE = "gpt2's: 548,105,171 bytes, sha256 248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
SUMS = "SHA256SUMS"
ADAPTER = "adapter_config.json"
PREFIX = "transformer."
WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|module)\.")  # what torch.compile and DDP put into names
TRANSPOSED = tuple(f"{name}.weight" for name in lora.LINEARS)  # GPT-2's files have them as (in, out)
BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # masks that old versions saved as weights

# config.json of GPT-2: fields with a place in GPTConfig, …
CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "n_positions": "block_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "resid_pdrop": "dropout",
    "attn_pdrop": "attention_dropout",
    "activation_function": "activation",
    "layer_norm_epsilon": "layer_norm_epsilon",
}
# … fields that change the network, with the values that mean what model.py does, …
CONFIG_REQUIRED: dict[str, tuple] = {
    "model_type": ("gpt2",),
    "n_inner": (None,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "tie_word_embeddings": (True,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
# … and fields that do not. Anything else stops the load by name.
CONFIG_IGNORED = set(
    """
    architectures transformers_version dtype torch_dtype bos_token_id eos_token_id pad_token_id sep_token_id
    cls_token_id decoder_start_token_id output_past n_ctx embd_pdrop initializer_range use_cache task_specific_params
    gradient_checkpointing summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout id2label label2id num_labels problem_type finetuning_task prefix name_or_path
    _name_or_path _num_labels _attn_implementation _commit_hash attn_implementation tokenizer_class
    return_dict return_dict_in_generate output_hidden_states output_attentions output_scores torchscript
    use_bfloat16 is_decoder cross_attention_hidden_size chunk_size_feed_forward tf_legacy_loss
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)


def load(source: str | Path, merge: bool = True) -> tuple[GPT, Tokenizer]:
    """Open a checkpoint: → (model in fp32 on the CPU in eval mode, tokenizer).

    source: a run folder (its best, or else last, step), a Hugging Face GPT-2 folder, an adapter of PEFT
    beside its base, a nanoGPT ckpt.pt, or a name on the Hugging Face hub such as gpt2. After loading, the
    model has exactly one row per id of the tokenizer: fewer raise InputError, surplus rows are cut with a
    line. The weights of an fp32 .safetensors lie in the file, mapped into memory, the matrices transposed.
    A folder with a label head gives a GPTClassifier. merge: an adapter becomes part of the weights; False leaves it
    apart, to go on learning.
    """
    path = locate(source)
    verify(path)
    if (path / ADAPTER).exists():
        return load_adapted(path, merge)
    config, tensors, conv1d = read(path)
    state = to_our_layout(tensors, conv1d, path)
    labels = read_labels(path / "config.json", len(state["score.weight"])) if "score.weight" in state else None
    tokenizer = Tokenizer.gpt2() if path.is_file() else read_tokenizer(path, config)
    rows, ids = config.vocab_size, tokenizer.vocab_size
    if rows < ids:
        raise InputError(f"{path}: the model has {rows:,} token rows, its tokenizer {ids:,} ids")
    model = build(config, state, path, labels)
    if rows > ids:
        print(f"{path}: {rows - ids} token rows have no id in the tokenizer; cut", file=sys.stderr)
        model.cut(ids)
    return model, tokenizer


def load_adapted(path: Path, merge: bool) -> tuple[GPT, Tokenizer]:
    """A base with the adapter of `path` on it: the base beside it in a run folder, or else the one that it names."""
    about = read_json(path / ADAPTER)
    base = about.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise InputError(f"{path / ADAPTER}: base_model_name_or_path is {base!r}, must name the base")
    beside = path.resolve().parent / "base"
    if Path(base).name == "base" and beside.is_dir():  # the run folder may have moved since
        base = beside
    if (locate(base) / ADAPTER).exists():
        raise InputError(f"{path}: its base {base} is an adapter too; only one on a whole model is read")
    model, tokenizer = load(base)
    if (path / "tokenizer.json").exists():
        tokenizer = read_tokenizer(path, model.config)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise InputError(f"{path}: its tokenizer has {tokenizer.vocab_size:,} ids, its base {base} {model.config.vocab_size:,} token rows")
    found = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if (path / name).exists()]
    if not found:
        raise InputError(f"{path}: no adapter_model.safetensors")
    lora.from_peft(model, about, read_tensors(path / found[0]), path)
    if not merge:
        return model.eval(), tokenizer
    return build(model.config, lora.plain_state(model), path, model.labels), tokenizer


def build(config: GPTConfig, state: dict[str, Tensor], path: Path, labels: list[str] | None = None) -> GPT:
    """A GPT, or with labels a GPTClassifier, of exactly these weights; InputError names each missing, unexpected or mis-shaped one."""
    with torch.device("meta"), WithoutValues():
        model = GPTClassifier(config, labels) if labels else GPT(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = [f"missing {name}" for name in wanted if name not in state]
    wrong += [f"unexpected {name}" for name in state if name not in wanted]
    wrong += [
        f"{name} is {tuple(state[name].shape)}, must be {shape}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if wrong:
        more = f" … and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(f"{path}: weights do not fit the network: {one_line('; '.join(wrong[:8]))}{more}")
    model.load_state_dict({name: w.float() for name, w in state.items()}, assign=True)
    model.requires_grad_(True)
    return model.eval()


class WithoutValues(TorchFunctionMode):
    """While this is open, torch.nn.init leaves tensors as they are: on "meta" it would first import the compiler, for 1.3 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return (args or [kwargs["tensor"]])[0]
        return function(*args, **(kwargs or {}))


def one_line(text: str) -> str:
    """A text out of a file or an error, as part of one line."""
    return " ".join(text.split())[:1000]


def locate(source: str | Path, prefer: tuple[str, ...] = ("best", "last")) -> Path:
    """The folder (or ckpt.pt) that holds the weights: follows run folders, asks the hub for names."""
    path = Path(source)
    if not str(source).strip():
        raise InputError("the name of a checkpoint is empty")
    if path.is_dir():
        for pointer in prefer:
            if os.path.lexists(path / pointer):
                return followed(path / pointer)
        if (path / "config.json").exists() or (path / ADAPTER).exists():
            return path
        if (path / "ckpt.pt").exists():
            return path / "ckpt.pt"
        raise InputError(f"{path}: no config.json, ckpt.pt or {' or '.join(prefer)} in this folder")
    if path.is_file():
        return followed(path) if path.name in ("best", "last") else path
    owner, _, name = str(source).rpartition("/")
    if re.fullmatch(r"[\w-]*", owner) and re.fullmatch(r"[\w.-]+", name) and not Path(owner or "-").exists() and owner != "out":
        return download(str(source))
    raise InputError(f"{source}: no such checkpoint; train.py writes out/pretrained, finetune.py out/finetuned")


def followed(pointer: Path) -> Path:
    """The step that `best` or `last` names: a link or, where those are forbidden, a file with its name."""
    if pointer.is_symlink():
        name = os.readlink(pointer)
    elif pointer.is_dir():  # scp and zip put a copy of the step where the link was
        name = f"step-{str(read_json(pointer / 'nanochat.json').get('step')).zfill(6)}"
    else:
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"step-\d+", name) or not (pointer.parent / name).is_dir():
        raise InputError(f"{pointer} names {name[:40]!r}, which is no checkpoint of this run; point it at one, or delete it")
    return pointer.parent / name


def download(name: str) -> Path:
    """A model of the Hugging Face hub → its folder in the local cache. Nothing but data is fetched."""
    import huggingface_hub

    try:
        for weights in ("*.safetensors", "*.bin"):
            wanted = ["*.json", "merges.txt", "vocab.txt", weights]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
            if any(folder.glob(weights)):
                break
        return folder
    except Exception as error:  # the hub raises a dozen kinds, by version; the user's remedy is one
        raise InputError(
            f"{name}: no such folder here, and the Hugging Face hub gave {type(error).__name__}; put config.json, "
            f"tokenizer.json and model.safetensors ({GPT2_FILE}) into ./{name}/, from "
            f"https://huggingface.co/{name} or its mirror in China, https://hf-mirror.com/{name}"
        ) from None


# ------------------------------------------------------------------ reading


class Source(NamedTuple):
    """What a checkpoint holds, before renaming."""

    config: GPTConfig
    tensors: dict[str, Tensor]  # by their names there
    conv1d: bool  # four matrices a block are kept (in, out), as Hugging Face does


def read(path: Path) -> Source:
    """Config and tensors of a Hugging Face folder, or of nanoGPT's ckpt.pt (a file)."""
    if path.is_file():
        return read_nanogpt(path)
    config = read_config(path / "config.json")
    names = ("model.safetensors", "pytorch_model.bin")
    found = [path / (name + end) for name in names for end in ("", ".index.json") if (path / (name + end)).exists()]
    if not found:
        raise InputError(f"{path}: no model.safetensors or pytorch_model.bin, nor an index of shards")
    shards = [found[0]]
    if found[0].suffix == ".json":
        files = read_json(found[0]).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]{1,255}", name) for name in files.values()):
            raise InputError(f"{found[0]}: damaged: no weight_map from tensors to files beside it")
        shards = [path / name for name in sorted(set(files.values()))]
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= read_tensors(shard)
    return Source(config, tensors, conv1d=True)


def name_here(there: str) -> str | None:
    """The name of a tensor in model.py; None for what is no parameter: the tied head, saved masks."""
    name = WRAPPERS.sub("", there).removeprefix(PREFIX)
    return None if name == "lm_head.weight" or BUFFERS.fullmatch(name) else name


def to_our_layout(tensors: dict[str, Tensor], conv1d: bool, path: Path) -> dict[str, Tensor]:
    """Tensors by their names there → tensors by our names, in nn.Linear's layout."""
    state: dict[str, Tensor] = {}
    for there, w in tensors.items():
        if not isinstance(there, str) or not isinstance(w, Tensor):
            raise InputError(f"{path}: holds {one_line(repr(there))}, a {type(w).__name__}: not only tensors with names")
        name = name_here(there)
        if name in state:
            raise InputError(f"{path}: holds {one_line(name)} twice, the second time as {one_line(there)}")
        if name is not None:
            if not (w.is_floating_point() and w.layout is torch.strided and w.device.type == "cpu"):
                raise InputError(f"{path}: {one_line(there)} is {w.dtype}, {w.layout}: only plain floating-point weights are read")
            state[name] = w.t() if conv1d and name.endswith(TRANSPOSED) and w.dim() == 2 else w
    for there, w in tensors.items():
        if there.endswith("lm_head.weight") and "wte.weight" in state and not torch.equal(w.float(), state["wte.weight"].float()):
            raise InputError(f"{path}: {there} differs from wte.weight; an untied head is not implemented")
    return state


def read_config(path: Path) -> GPTConfig:
    """A GPT-2 config.json → GPTConfig; InputError names every field that model.py does not implement."""
    if not path.exists():
        raise InputError(f"{path.parent}: no config.json, so this is no Hugging Face checkpoint")
    fields = read_json(path)
    wrong = []
    for name, value in fields.items():
        if name in CONFIG_REQUIRED and value not in CONFIG_REQUIRED[name]:
            if name == "n_inner" and value == 4 * fields.get("n_embd", 768):
                continue
            wrong.append(f"{name} is {value!r}, must be {CONFIG_REQUIRED[name][0]!r}")
        elif name not in CONFIG_REQUIRED and name not in CONFIG_NAMES and name not in CONFIG_IGNORED:
            wrong.append(f"{name} ({value!r}) is unknown")
    values = {ours: fields[theirs] for theirs, ours in CONFIG_NAMES.items() if theirs in fields}
    if values.get("activation") == "gelu_pytorch_tanh":
        values["activation"] = "gelu_new"  # another name of the same function
    if fields.get("embd_pdrop", 0.1) != fields.get("resid_pdrop", 0.1):
        wrong.append("embd_pdrop differs from resid_pdrop; one dropout serves both")
    if wrong:
        raise InputError(f"{path}: not implemented here: {one_line('; '.join(wrong))}")
    return config_of({"dropout": 0.1, "attention_dropout": 0.1} | values, path)  # what absent fields mean in Hugging Face


def read_labels(path: Path, count: int) -> list[str]:
    """The names of a classifier's labels, from config.json: LABEL_0, … where it names none."""
    fields = read_json(path)
    if fields.get("problem_type") not in (None, "single_label_classification"):
        raise InputError(f"{path}: problem_type is {fields['problem_type']!r}, must be single_label_classification")
    names = fields.get("id2label") or {str(i): f"LABEL_{i}" for i in range(count)}
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(count)} or len(set(map(str, names.values()))) < count:
        raise InputError(f"{path}: id2label does not name each of the {count} labels of score.weight")
    return [str(names[str(i)]) for i in range(count)]


def config_of(values: dict, path: Path) -> GPTConfig:
    """GPTConfig of values from a file; InputError names those that cannot be."""
    kinds = {"n_layer": int, "n_head": int, "n_embd": int, "block_size": int, "vocab_size": int, "activation": str}
    wrong = [f"{name} is {values[name]!r}, must be {'a text' if kind is str else 'a whole number'}"
             for name, kind in kinds.items() if name in values and type(values[name]) is not kind]
    wrong += [f"{name} is {values[name]!r}, must be a number from 0 to 1" for name in ("dropout", "attention_dropout", "layer_norm_epsilon")
              if name in values and (type(values[name]) not in (int, float) or not 0 <= values[name] < 1)]
    if wrong:
        raise InputError(f"{path}: {one_line('; '.join(wrong))}")
    try:
        return GPTConfig(**values)
    except InputError as error:
        raise InputError(f"{path}: {one_line(str(error))}") from None


def read_nanogpt(path: Path) -> Source:
    """nanoGPT's ckpt.pt. Its GELU is the erf form; absent biases (bias=False) are zeros."""
    content = read_tensors(path)
    if not isinstance(content.get("model"), dict) or not isinstance(content.get("model_args"), dict):
        raise InputError(f"{path}: keys are {one_line(str(list(content)[:8]))}; a nanoGPT checkpoint has model and model_args")
    args, tensors = content["model_args"], content["model"]
    dropout = args.get("dropout", 0.0)
    shape = {name: args.get(name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    config = config_of(shape | {"dropout": dropout, "attention_dropout": dropout, "activation": "gelu"}, path)
    if config.vocab_size not in (50257, 50304):
        raise InputError(
            f"{path}: vocab_size {config.vocab_size:,} is not GPT-2's 50,257 (or 50,304 padded), "
            f"and the file holds no tokenizer"
        )
    if not args.get("bias", True):
        with torch.device("meta"):
            parameters = dict(GPT(config).named_parameters())
        tensors |= {name: torch.zeros(p.shape) for name, p in parameters.items() if name.endswith("bias")}
    return Source(config, tensors, conv1d=False)


def read_tensors(path: Path) -> dict:
    """A .safetensors, .bin or .pt file on the CPU; InputError for a damaged file or one that runs code."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "nsupported" in line), "")
        raise InputError(f"{path}: refused: it is damaged or holds more than weights. {reason}".rstrip()) from None
    except Exception as error:  # damaged bytes raise a dozen kinds, down to IndexError
        raise InputError(f"{path}: damaged: {type(error).__name__} {one_line(str(error))[:200]}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a dict, found a {type(content).__name__}")
    return content


def read_tokenizer(folder: Path, config: GPTConfig) -> Tokenizer:
    """The tokenizer of a folder; GPT-2's own where there is none and the rows are GPT-2's."""
    if any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        tokenizer = wordpiece.load(folder)
    elif config.vocab_size == 50257:
        return Tokenizer.gpt2()
    else:
        raise InputError(f"{folder}: no tokenizer.json or vocab.txt, and {config.vocab_size:,} rows are not GPT-2's 50,257")
    ours = folder / "nanochat.json"
    about = read_json(ours) if ours.exists() else {}
    named, system = about.get("template"), about.get("system") or ""
    if not isinstance(system, str):
        raise InputError(f"{ours}: system is {type(system).__name__}, must be text")
    tokenizer.system = system
    if named is not None and (named != TEMPLATE_NAME or tokenizer.chat_template != CHAT_TEMPLATE):
        raise InputError(f"{folder}: made with chat template {named!r}, this version speaks {TEMPLATE_NAME!r}")
    return tokenizer


def verify(folder: Path, resume: bool = False) -> None:
    """Check the files of a checkpoint against its SHA256SUMS, if it has any; without `resume`, only what `load` reads.

    InputError names the first file that is missing or not what was saved.
    """
    if not (sums := folder / SUMS).is_file():
        return
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        expected, _, name = line.partition("  ")
        if name.startswith("resume/") and not resume:
            continue
        if not re.fullmatch(r"[0-9a-f]{64}", expected) or not re.fullmatch(r"(resume/)?[\w-]+\.\w+", name):
            raise InputError(f"{sums}: damaged: {line[:80]!r}; without this file, the others are taken as they are")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: missing from this checkpoint")
        if sha256_of(folder / name) != expected:
            raise InputError(f"{folder / name}: not as it was saved: damaged, or changed by hand (then delete {SUMS} beside it)")


def sha256_of(path: Path) -> str:
    """Of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------ writing


def write(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """A Hugging Face folder; of a model with LoRA the adapter alone, as PEFT keeps it, whose base is ../base."""
    if not lora.is_adapted(model):
        return write_hugging_face(folder, model, tokenizer)
    about, tensors = lora.to_peft(model, base=str(folder.parent / "base"))
    write_tokenizer(folder, model, tokenizer)
    write_json(folder / ADAPTER, about)  # and no config.json: beside one, transformers would not look for the base
    write_tensors(folder / "adapter_model.safetensors", tensors)


def write_hugging_face(folder: Path, model: GPT, tokenizer: Tokenizer, merge: bool = True) -> None:
    """config.json, generation_config.json, fp32 model.safetensors and the tokenizer files; merge=False leaves LoRA's additions out."""
    write_config(folder, model, tokenizer)
    write_tokenizer(folder, model, tokenizer)
    tensors = {
        f"{PREFIX * (name not in lora.HEADS)}{name_here(name)}": (w.t() if name.endswith(TRANSPOSED) else w).float().cpu().contiguous()
        for name, w in lora.plain_state(model, merge).items()
    }
    write_tensors(folder / "model.safetensors", tensors)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A .safetensors file, with the permissions that others beside it have."""
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.copymode(path.with_name("tokenizer.json"), path)  # safetensors ignores the umask


def write_config(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """config.json and generation_config.json."""
    config = {theirs: getattr(model.config, ours) for theirs, ours in CONFIG_NAMES.items()}
    head: dict = {"architectures": ["GPT2LMHeadModel"]}
    if model.labels:
        head = {"architectures": ["GPT2ForSequenceClassification"], "problem_type": "single_label_classification",
                "id2label": dict(enumerate(model.labels)), "label2id": {label: i for i, label in enumerate(model.labels)}}
    eos = [tokenizer.control[END_OF_TURN]] if tokenizer.chat_template else []
    ids = {"bos_token_id": tokenizer.end_of_text, "pad_token_id": tokenizer.end_of_text}
    write_json(
        folder / "config.json",
        {"model_type": "gpt2", **head, **config,
         "embd_pdrop": model.config.dropout,
         "tie_word_embeddings": True, "dtype": "float32",
         "n_ctx": model.config.block_size,  # llama.cpp's converter asks for it
         **ids, "eos_token_id": (eos or [tokenizer.end_of_text])[0]},
    )
    write_json(folder / "generation_config.json", ids | {"eos_token_id": [*eos, tokenizer.end_of_text]})


def write_tokenizer(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """The tokenizer files; a classifier's put each text into its frame."""
    tokenizer.save(folder)
    if model.labels:  # a text between <|endoftext|> and <|end|>, for Hugging Face too
        around = [(name, tokenizer.control[name]) for name in (tokenizer.boundary, END_OF_TURN)]
        bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        bpe.post_processor = TemplateProcessing(single=f"{tokenizer.boundary} $A {END_OF_TURN}", special_tokens=around)
        (folder / "tokenizer.json").write_text(bpe.to_str(), encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    """In UTF-8, indented."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    path.write_bytes((text + "\n").encode("utf-8", "surrogateescape"))  # paths of a C locale are bytes in disguise


def print_table(source: Source) -> None:
    """Each tensor of a checkpoint: its name there and here, its shape, whether it is transposed."""
    print(f"{'name there':<44}{'name here':<30}{'shape here':>14}  transposed")
    for there, w in sorted(source.tensors.items()):
        here = name_here(there)
        turned = source.conv1d and here is not None and here.endswith(TRANSPOSED)
        shape = " x ".join(map(str, reversed(w.shape) if turned else w.shape))
        print(f"{there:<44}{here or '- (no parameter)':<30}{shape:>14}  {'yes' if turned else ''}")


def main() -> None:
    """Convert any checkpoint that `load` opens into a Hugging Face GPT-2 folder, tensor by tensor; an adapter is merged."""
    parser = argparse.ArgumentParser(prog="python -m nanochat.checkpoint", description=main.__doc__)
    parser.add_argument("source", help="run folder, Hugging Face folder, nanoGPT ckpt.pt or hub name")
    parser.add_argument("destination", type=Path, help="a folder that does not exist yet")
    args = parser.parse_args()
    if args.destination.exists():
        raise InputError(f"{args.destination} exists already; name a new folder")
    path = locate(args.source)
    if not (path / ADAPTER).exists():
        print_table(read(path))
    model, tokenizer = load(args.source)  # stops here, with their names, if any are missing or unexpected
    temporary = args.destination.with_name(f".tmp-{args.destination.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_hugging_face(temporary, model, tokenizer)
        if tokenizer.system:
            write_json(temporary / "nanochat.json", {"template": TEMPLATE_NAME, "system": tokenizer.system})
        os.replace(temporary, args.destination)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{args.destination} cannot be written ({one_line(str(error))})") from None
    total = sum(p.numel() for p in model.parameters())
    print(f"missing: none; unexpected: none; {total:,} parameters; {model.config}")
    print(f"wrote {args.destination}")


if __name__ == "__main__":
    runtime.run_as_script(main)
