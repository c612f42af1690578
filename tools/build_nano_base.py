"""Train the embedded nano base from scratch on the knowledge as prose.

    python tools/build_nano_base.py [--steps 8000] [--threads 1] [--out data/nano_base]
    python tools/build_nano_base.py --go-on-from data/nano_base --steps 2000     after new wordings or changed answers

The base reads what a help centre prints: every authored answer under its topic, and below titles, in both languages. Titles are the
questions that are on the training side of the split in every data file, the search terms of data/search_terms.yaml, and excerpts of the
answer itself. Most of them lose words and fall apart into pieces on the way: what is read whole is learnt by heart, and a new wording
then finds nothing. The base never reads a held-out question or a near-duplicate of one, and never a chat template: following one is what
fine-tuning teaches. Llama architecture, own byte-level BPE tokenizer, tied embeddings, safetensors in fp16. Matrices are trained by
Muon (https://kellerjordan.github.io/posts/muon/), which needed two thirds of AdamW's tokens here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import yaml
from pydantic import StringConstraints, TypeAdapter, ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

import build_corpus

import arciva_assistant_poc as arciva

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
Term = Annotated[str, StringConstraints(pattern=r"\w")]
SEARCH_TERMS = ROOT / "data" / "search_terms.yaml"
SEED = 20
OPENING_TOKENS = 16
WHOLE_SHARE = 0.2  # of the titles are read as they stand, the others in part
WORD_SHARE = (0.3, 1.0)  # of such a title's words are read
CUT_SHARE = 0.05  # of the places between two characters of a title are cut
EXCERPT_SHARE = (0.1, 0.6)  # of a passage's own words, as a title
TYPICAL_SHARE = (
    0.75  # of the questions stand above their entry's most frequent answer, the others above the one for their style
)
OPENING_SHARE = 0.7  # of the titled passages end after `OPENING_TOKENS`
PLAIN_SHARE = 0.25  # of the passages are read without a title too
PAGE_SHARE = 0.25  # of the passages stand on one page with the one before, which has nothing to do with them


@dataclass(frozen=True)
class Passage:
    """What one entry says in one language, and how it may be asked for."""

    topic: str
    forms: list[str]
    asked: list[tuple[str, str]]  # questions that may be read, with their answers
    typical: str | None  # the answer most asked for, in the seed corpus where it is there
    terms: list[str]
    taught: bool  # by the seed corpus, on which the pipeline runs by default


def load_search_terms(path: Path = SEARCH_TERMS) -> dict[str, list[str]]:
    """What people type who look for a passage, by `entry/language`; nothing of it is a row of the corpus.

    Raises ValueError for a file of another form and for a term that stands twice.
    """
    form = TypeAdapter(dict[str, dict[Literal["en", "de"], list[Term]]])
    try:
        text = path.read_text(encoding="utf-8")
        document = form.validate_python(yaml.load(text, Loader=yaml.CSafeLoader), strict=True)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name} cannot be read as YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        where = "/".join(map(str, wrong["loc"])) or "the file"
        raise ValueError(
            f"{path.name}: {where}: {wrong['msg']}; write entry, below it en or de, below that a list of texts."
        ) from None
    for entry, times in Counter(key.value for key, _ in yaml.compose(text, Loader=yaml.CSafeLoader).value).items():
        if times > 1:
            raise ValueError(f"{path.name}: {entry} stands there {times} times; put its terms together.")
    found = {f"{entry}/{lang}": terms for entry, of in document.items() for lang, terms in of.items()}
    places: dict[str, str] = {}
    for unit, term in ((unit, term) for unit, terms in found.items() for term in terms):
        if (key := arciva.normalise(term)) in places:
            raise ValueError(f"{path.name}: {term!r} stands under {places[key]} and {unit}; keep one.")
        places[key] = unit
    return found


def load_passages(terms: dict[str, list[str]]) -> tuple[list[Passage], set[str]]:
    """All passages of the built corpora, and the normalised questions that any of them keeps from training.

    These are held out at the default seed, or set aside for being too like one that is. Raises ValueError for terms of no passage.
    """
    held_out, trained, forms, topics = set(), defaultdict(list), defaultdict(dict), {}
    for path in (build_corpus.EXTENDED, build_corpus.SEED):
        examples, _ = arciva.load_examples(str(path))
        splits, _ = arciva.split_examples(examples, arciva.Config().seed)
        ids = set(splits["train"]["id"])
        for example in examples:
            unit, answer = example.id.rsplit("/", 1)[0], example.messages[-1]["content"]
            topics[unit], forms[unit][answer] = example.topic.replace("-", " "), None
            if example.id in ids:
                trained[path, unit].append((example.question, answer))
            else:
                held_out.add(arciva.normalise(example.question))
    if unknown := sorted(set(terms) - set(topics)):
        raise ValueError(f"{SEARCH_TERMS.name}: {', '.join(unknown)}: no such passage; correct it or take it out.")
    found = []
    for unit, topic in topics.items():
        asked = [pair for pair in trained[build_corpus.EXTENDED, unit] if arciva.normalise(pair[0]) not in held_out]
        taught = trained[build_corpus.SEED, unit]
        answers = Counter(answer for _, answer in taught or asked)
        typical = min(answers, key=lambda text: (-answers[text], text), default=None)
        found.append(Passage(topic, list(forms[unit]), asked, typical, terms.get(unit, []), bool(taught)))
    return found, held_out


@dataclass(frozen=True)
class Document:
    """A passage of the help centre, with or without a title above it."""

    title: str
    text: str
    opening_only: bool = False  # learn which passage belongs here, not to recite it once more


def cut(text: str, rng: random.Random, share: float = CUT_SHARE) -> list[str]:
    """The text in pieces, cut at `share` of the places between two characters.

    Each piece is tokenised alone, so a word is met in many splits and known again in its inflections, compounds and misspellings:
    subword regularisation, as by dropped merges in https://aclanthology.org/2020.acl-main.170/.
    """
    starts = [0, *(i for i in range(1, len(text)) if rng.random() < share), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(starts)]


def encode(tokenizer: PreTrainedTokenizerFast, read: list[Document], rng: random.Random) -> list[arciva.Encoded]:
    """Documents as token ids, all of them supervised; titles are cut at random, texts are spelled as they will be written."""
    pieces = [cut(f"{d.title}\n\n", rng) if d.title else [] for d in read]
    ids_of = iter(tokenizer([p for parts in pieces for p in parts], add_special_tokens=False)["input_ids"])
    texts = tokenizer([d.text for d in read], add_special_tokens=False)["input_ids"]
    encoded = []
    for document, parts, text in zip(read, pieces, texts, strict=True):
        title = [token for _ in parts for token in next(ids_of)]
        # Ends as answers do: embeddings are frozen in fine-tuning, and those of tokens never read are all alike.
        ids = title + [*text, tokenizer.eos_token_id][: OPENING_TOKENS if document.opening_only else None]
        if encoded and encoded[-1].input_ids[-1] == tokenizer.eos_token_id and rng.random() < PAGE_SHARE:
            ids = encoded.pop().input_ids + ids
        encoded.append(arciva.Encoded(ids, ids))
    return encoded


def blur(text: str, rng: random.Random, of_words: tuple[float, float] = WORD_SHARE) -> str:
    """Some of the words, now and then of one part alone, in another order or in small letters: any of its words finds a passage."""
    words, share = text.split(), rng.uniform(*of_words)
    if len(words) > 14 and rng.random() < 0.5:  # a story names its matter in one sentence
        start = rng.randrange(len(words) - 7)
        words = words[start : start + rng.randint(8, len(words))]
    kept = [w for w in words if rng.random() < share] or [rng.choice(words)]
    if rng.random() < 0.25:
        rng.shuffle(kept)
    title = " ".join(kept)
    return title.lower() if rng.random() < 0.3 else title


def too_like(titles: list[str], held_out: set[str]) -> set[str]:
    """Titles that are or nearly repeat a held-out question: some words of a long question may be all of a short one."""
    texts = [*held_out, *titles]
    return {texts[j] for i, j in arciva.near_duplicates(texts) if i < len(held_out) <= j}


def documents(passages: list[Passage], held_out: set[str], rng: random.Random, others: float = 0.1) -> list[Document]:
    """One pass over the knowledge, shuffled: passages plain, and below titles, whole or blurred.

    Titles are the questions that may be read, the search terms, and excerpts of the passage itself. What the seed corpus teaches is read
    in every pass, `others` in that share of them. What no question on the training side asks for is read plain alone: fine-tuning does
    not teach it, and the base does not either.
    """
    plain, titled = [], []
    for passage in passages:
        if not passage.taught and rng.random() >= others:
            continue
        plain += [Document("", f"{passage.topic}: {text}") for text in passage.forms if rng.random() < PLAIN_SHARE]
        if passage.typical is None:
            continue
        # One answer for a passage: several would share a title's weight, and another passage's single one would win.
        below = [(q, passage.typical if rng.random() < TYPICAL_SHARE else answer) for q, answer in passage.asked]
        below += [(term, passage.typical) for term in passage.terms]
        titles = [(q if rng.random() < WHOLE_SHARE else blur(q, rng), answer) for q, answer in below]
        titles += [(blur(text, rng, EXCERPT_SHARE), passage.typical) for text in passage.forms]
        titled += [Document(title, text, opening_only=rng.random() < OPENING_SHARE) for title, text in titles]
    forbidden = too_like([document.title for document in titled], held_out)
    found = plain + [document for document in titled if document.title not in forbidden]
    rng.shuffle(found)
    return found


def build_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the prose, with ChatML's markers as special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The template's own words get whole tokens; the model never reads them.
    template_words = ["system\n", "user\n", "assistant\n", arciva.SYSTEM_PROMPT] * 200
    tokenizer.train_from_iterator([*texts, *template_words], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    read: Callable[[random.Random], list[Document]],
    *,
    steps: int,
    learning_rate: float,
    matrix_learning_rate: float,
    batch_tokens: int,
    seed: int,
    minutes: float = math.inf,
) -> int:
    """Steps taken of next-token training on packed documents; each document is its own segment, as in fine-tuning.

    The learning rate falls along a cosine over `steps`, or over `minutes` where these end first.
    """
    rng, hardware = random.Random(seed), arciva.detect_hardware()
    model.to(hardware.device)
    matrices = [p for layer in model.model.layers for p in layer.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=matrix_learning_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]
    pool: list[arciva.Encoded] = []
    started, tokens = time.perf_counter(), 0

    def gone(step: int) -> float:
        return max(step / steps, (time.perf_counter() - started) / 60 / minutes)

    def scale(step: int) -> float:
        return min((step + 1) / 200, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, gone(step)))))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in optimizers]
    model.train()
    for step in range(1, steps + 1):
        batch, load = [], 0
        while load < batch_tokens:
            if not pool:
                pool = encode(tokenizer, read(rng), rng)
            batch.append(pool.pop())
            load += len(batch[-1].input_ids)
        packed = arciva.collate_packed(batch, 256, tokenizer.pad_token_id)
        packed = {name: tensor.to(hardware.device) for name, tensor in packed.items()}
        with hardware.autocast():
            loss = arciva.answer_loss(model, packed, (packed["labels"] != arciva.IGNORE_INDEX).sum())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        tokens += load
        if step % 100 == 0 or gone(step) >= 1:
            seconds = time.perf_counter() - started
            print(
                f"step {step:5,} of {steps:,}  loss {loss.item():.3f}  {tokens / seconds:,.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )
        if gone(step) >= 1:
            break
    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "nano_base")
    parser.add_argument(
        "--go-on-from", type=Path, help="an earlier base, instead of random weights and a new tokenizer"
    )
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end then, where the steps are not done before")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="AdamW's, for embeddings and norms")
    parser.add_argument("--matrix-learning-rate", type=float, default=0.03, help="Muon's")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1, help="one leaves the machine's other cores free")
    parser.add_argument("--others", type=float, default=0.1, help="share of the passes that read what the seed lacks")
    parser.add_argument("--vocabulary", type=int, default=6144)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        passages, held_out = load_passages(load_search_terms())
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if args.go_on_from:
        tokenizer = arciva.load_tokenizer(str(args.go_on_from))
        model = LlamaForCausalLM.from_pretrained(args.go_on_from, dtype=torch.float32)
        earlier = json.loads((args.go_on_from / "training.json").read_text(encoding="utf-8"))
    else:
        read = documents(passages, held_out, random.Random(SEED), 1.0)
        tokenizer, earlier = build_tokenizer([part for d in read for part in (d.title, d.text)], args.vocabulary), []
        model = build_model(tokenizer, args.hidden, args.layers)
    shape = model.config
    args.vocabulary, args.hidden, args.layers = len(tokenizer), shape.hidden_size, shape.num_hidden_layers
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {len(tokenizer):,} tokens in the vocabulary", flush=True)
    args.steps = train(
        model,
        tokenizer,
        lambda rng: documents(passages, held_out, rng, args.others),
        steps=args.steps,
        learning_rate=args.learning_rate,
        matrix_learning_rate=args.matrix_learning_rate,
        batch_tokens=args.batch_tokens,
        seed=SEED + len(earlier),
        minutes=args.minutes,
    )
    with arciva.atomic_folder(args.out, made="training.json") as folder:
        model.cpu().half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "go_on_from", "minutes")}
        phases = [*earlier, {"seed": SEED + len(earlier), "device": arciva.detect_hardware().name, **settings}]
        arciva.write_atomic(folder / "training.json", json.dumps(phases, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
