"""Our folders in llama.cpp: its converter takes them, and what it makes of them writes our text.

The converter is no package. NANOCHAT_LLAMA_CPP names a checkout of llama.cpp that has convert_hf_to_gguf.py (the source
distribution of llama-cpp-python holds one, in vendor/llama.cpp); NANOCHAT_LLAMA_PYTHON the Python that has llama_cpp, if not this one.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from nanochat import checkpoint, dialogue
from nanochat.generate import SampleConfig, generate_ids
from nanochat.model import GPT, GPTConfig
from nanochat.tokenizer import END_OF_TURN, Tokenizer

# conversion/base.py of llama.cpp, in llama-cpp-python 0.3.36: get_vocab_base_pre knows a tokenizer by the ids of this text
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 "
    "3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
GPT2_HASH = "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454"  # → "gpt-2"

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, how are you?"},
        {"role": "assistant", "content": "Fine."}, {"role": "user", "content": "Where do the boats go? 你好 🙂"}]
TEXTS = ["The river runs past the mill, isn't it?", "小河流过磨坊，磨坊主的女儿数着船。🙂", "  two  spaces\n\n\n and\ttabs 3333 33.3 --- I'll we've"]
NEW = 30  # tokens of each text

# Runs where llama_cpp is: what is asked on standard input → what it makes of it.
THEIRS = """
import json, sys
import numpy
from llama_cpp import Llama
asked = json.load(sys.stdin)
llm = Llama(asked["model"], n_ctx=256, n_threads=1, type_k=0, type_v=0, logits_all=True, verbose=False)  # 0: fp32
ids = [llm.tokenize(text.encode(), add_bos=False, special=False) for text in asked["texts"]]
for number, row in enumerate(asked["rows"]):
    llm.reset()
    llm.eval(row)
    numpy.save(f"{asked['model']}-{number}.npy", llm.scores[: len(row)])
answer = llm.create_chat_completion(asked["chat"], temperature=0, max_tokens=asked["new"])
choice = answer["choices"][0]
json.dump({"ids": ids, "reply": choice["message"]["content"], "reason": choice["finish_reason"],
           "prompt_tokens": answer["usage"]["prompt_tokens"]}, sys.stdout)
"""


def folder(path: Path, tokenizer: Tokenizer) -> tuple[Path, GPT]:
    """A small random chat model of any vocabulary, which ends its reply to CHAT after five tokens."""
    path.mkdir()
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=256, n_layer=2, n_head=4, n_embd=64)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        model.wpe.weight[len(dialogue.render_prompt(CHAT, tokenizer)) + 4] += 50 * model.wte.weight[tokenizer.control[END_OF_TURN]]
    checkpoint.write(path, model, tokenizer)
    return path, model


def test_the_converter_knows_our_gpt2_vocabulary_as_gpt_2(tmp_path):
    """Also with the chat tokens. A vocabulary of one's own has another hash: docs/serving.md says what then."""
    from transformers import AutoTokenizer

    def hash_of(tokenizer: Tokenizer) -> str:
        tokenizer.save(tmp_path)
        return hashlib.sha256(str(AutoTokenizer.from_pretrained(tmp_path).encode(CHECK_TEXT)).encode()).hexdigest()

    assert hash_of(Tokenizer.gpt2()) == hash_of(Tokenizer.gpt2().for_chat()) == GPT2_HASH
    assert hash_of(Tokenizer.train([CHECK_TEXT * 20], 384)) != GPT2_HASH


def test_the_converter_finds_its_fields_in_config_json(make_model, tokenizer, tmp_path):
    """What conversion/gpt2.py reads."""
    checkpoint.write(tmp_path, make_model(torch.float32, vocab_size=tokenizer.vocab_size), tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {"n_ctx": 24, "n_embd": 36, "n_head": 3, "n_layer": 2, "layer_norm_epsilon": 1e-5}.items() <= config.items()


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True], ids=["gpt2", "own"])
def test_llama_cpp_writes_our_text_and_stops_where_we_do(own, tmp_path):
    source = os.environ.get("NANOCHAT_LLAMA_CPP")
    python = os.environ.get("NANOCHAT_LLAMA_PYTHON", sys.executable)
    if not source or not (Path(source) / "convert_hf_to_gguf.py").exists():
        pytest.skip("NANOCHAT_LLAMA_CPP names no checkout of llama.cpp with convert_hf_to_gguf.py")
    if python == sys.executable and not importlib.util.find_spec("llama_cpp"):
        pytest.skip("llama_cpp is not installed, and NANOCHAT_LLAMA_PYTHON names no Python that has it")

    tokenizer = Tokenizer.train(TEXTS * 40, 512).for_chat() if own else Tokenizer.gpt2().for_chat()
    path, model = folder(tmp_path / "model", tokenizer)
    file = tmp_path / "model.gguf"
    convert = [str(Path(source) / "convert_hf_to_gguf.py")]
    flags = [str(path), "--outtype", "f32", "--outfile", str(file)]
    plain = subprocess.run([sys.executable, *convert, *flags], capture_output=True, encoding="utf-8")
    if own:  # as docs/serving.md says
        assert plain.returncode and "BPE pre-tokenizer was not recognized" in plain.stderr
        code = ("import convert_hf_to_gguf as c; from conversion.base import TextModel as T; "
                "T.get_vocab_base_pre = lambda *_: 'gpt-2'; c.main()")
        plain = subprocess.run([sys.executable, "-c", code, *flags], cwd=source, capture_output=True, encoding="utf-8")
    assert plain.returncode == 0, plain.stderr[-2000:]

    prompts = [tokenizer.encode(text) for text in TEXTS]
    greedy = SampleConfig(max_new_tokens=NEW, temperature=0)
    rows = [prompt + generate_ids(model, [prompt], greedy)[0][0] for prompt in prompts]
    prompt = dialogue.render_prompt(CHAT, tokenizer)
    (reply,), ended = generate_ids(model, [prompt], greedy, set(tokenizer.control.values()))
    assert ended == [True] and len(reply) == 5
    asked = {"model": str(file), "texts": TEXTS, "rows": rows, "chat": CHAT, "new": NEW}
    done = subprocess.run([python, "-c", THEIRS], input=json.dumps(asked), capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout)

    assert theirs["ids"] == prompts
    for number, row in enumerate(rows):
        with torch.no_grad():
            ours = model(torch.tensor([row]))[0]
        logits = torch.from_numpy(numpy.load(f"{file}-{number}.npy"))
        assert (ours - logits).abs().max() < 0.02  # its GELU is a table in fp16
        clear = ours.topk(2).values.diff().abs().squeeze(1) > 0.04
        assert torch.equal(ours.argmax(-1)[clear], logits.argmax(-1)[clear]) and clear.float().mean() > 0.8
    assert theirs["prompt_tokens"] == len(prompt)  # the markers of the template are single tokens
    assert theirs["reason"] == "stop" and theirs["reply"] == tokenizer.decode_bytes(reply).decode("utf-8", "ignore")
