"""Tiny tokenizers and random models, made here: no test needs a network, a GPU or a download."""

import json
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: more threads than cores would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import arciva_assistant_poc as arciva

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
TEXT = [
    'Click "New project" and choose a name. Drücke Strg+N, um ein Projekt anzulegen. Größe und Länge bleiben.',
    "How do I export my photos? Wie exportiere ich Fotos? Open the panel and press Start export.",
]


def make_tokenizer(template: str | None, *, bos: str | None, eos: str, pad: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE that adds BOS by itself where it has one, as Llama's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = list(dict.fromkeys(t for t in (pad, bos, eos, "<|im_start|>" if template == CHATML else None) if t))
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=template,
        padding_side="left",
    )


TOKENIZERS = {
    "chatml": lambda: make_tokenizer(CHATML, bos=None, eos="<|im_end|>", pad="<|endoftext|>"),
    "zephyr, pad equals eos": lambda: make_tokenizer(ZEPHYR, bos="<s>", eos="</s>", pad="</s>"),
    "default template": lambda: make_tokenizer(arciva.DEFAULT_CHAT_TEMPLATE, bos="<s>", eos="</s>", pad="</s>"),
    "no system role": lambda: make_tokenizer(NO_SYSTEM, bos="<s>", eos="</s>", pad="</s>"),
}
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def make_model(
    architecture: str = "llama", *, vocabulary: int = 420, tied: bool = True, layers: int = 2, seed: int = 0
):
    """A random model whose weights are large enough for attention to matter."""
    torch.manual_seed(seed)
    config_class, model_class = ARCHITECTURES[architecture]
    model = model_class(
        config_class(
            vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=0.2, pad_token_id=0,
        )
    )  # fmt: skip
    return model.eval()


@pytest.fixture(scope="session")
def cpu() -> arciva.Hardware:
    """fp32 on the CPU, whatever this machine could do faster."""
    return arciva.Hardware("cpu", "test", 8.0, torch.float32, "tests compare in fp32")


@pytest.fixture(params=list(TOKENIZERS))
def any_tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture
def chatml():
    return TOKENIZERS["chatml"]()


@pytest.fixture
def tiny_base(tmp_path, chatml) -> Path:
    """A folder with a tiny random Llama and its tokenizer, as a user would have it on disk."""
    folder = tmp_path / "tiny_base"
    make_model(vocabulary=len(chatml)).save_pretrained(folder)
    chatml.save_pretrained(folder)
    return folder


def pair(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def corpus_rows(count: int = 90) -> list[dict]:
    """Three wordings of each of `count` / 3 made-up facts; enough for every side of a split."""
    openings = ("Where is the button numbered {n}?", "I cannot find control {n} anywhere, help", "button {n} position")
    return [
        {
            "id": f"fact-{i // 3}/en/{i % 3}",
            "instruction": openings[i % 3].format(n=f"{i // 3} {chr(97 + i // 3 % 26) * 6}"),
            "response": f"Button {i // 3} is in panel {chr(65 + i // 3 % 26)}.",
            "language": "en",
            "topic": "buttons" if i % 2 else "panels",
            "kind": "where",
            "fact_ids": [f"fact-{i // 3}"],
        }
        for i in range(count)
    ]


def in_whole_steps(rows: list[dict], path: Path, pairs: int) -> list[dict]:
    """The rows without as many training rows as do not fill a step of `pairs`: several processes would repeat some to keep pace."""
    examples, _ = arciva.load_examples(str(write_rows(path, rows)))
    splits, _ = arciva.split_examples(examples, arciva.Config().seed)
    surplus = set(splits["train"]["id"][: len(splits["train"]) % pairs])
    return [row for row in rows if row["id"] not in surplus]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def tiny_config(tmp_path, tiny_base) -> arciva.Config:
    """Settings of a run that takes seconds, all of it below `tmp_path`."""
    data = write_rows(tmp_path / "data.jsonl", corpus_rows())
    return arciva.Config(
        base_model=str(tiny_base), data=str(data), rank=4, alpha=8, dropout=0.1, epochs=2, learning_rate=1e-2, pairs_per_step=8,
        row_tokens=128, evaluations_per_epoch=2, log_every=1, max_new_tokens=8, output_dir=str(tmp_path / "model_output"),
        merged_dir=str(tmp_path / "final_merged_model"), reports_dir=str(tmp_path / "reports"), checkpoint_dir=str(tmp_path / "checkpoints"),
    )  # fmt: skip


def pytest_terminal_summary(terminalreporter):
    """Say on the last lines what a machine without a browser has left out."""
    reasons = [r.longrepr[2] for r in terminalreporter.stats.get("skipped", []) if isinstance(r.longrepr, tuple)]
    browser = [reason for reason in reasons if "Chromium" in reason]
    if browser:
        terminalreporter.write_line(f"{len(browser)} browser tests left out: {browser[0].removeprefix('Skipped: ')}")
