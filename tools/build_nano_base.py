"""Train the embedded nano base from scratch on the knowledge as prose.

    python tools/build_nano_base.py [--steps 8000] [--threads 1] [--out data/nano_base]
    python tools/build_nano_base.py --go-on-from data/nano_base --steps 2000     after new wordings or changed answers

The base reads what a help centre prints: every authored answer under its topic, and below the questions that are on the training side
of the split in every data file, in both languages. Most of these titles lose words and fall apart into pieces on the way: what is
read whole is learnt by heart, and a new wording then finds nothing. The base never reads a held-out question or a near-duplicate of
one, and never a chat template: following one is what fine-tuning teaches. Llama architecture, own byte-level BPE tokenizer, tied
embeddings, safetensors in fp16. Matrices are trained by Muon (https://kellerjordan.github.io/posts/muon/), which needed two thirds of
AdamW's tokens here.
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

import torch
import yaml
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


def load_search_terms(entries: list[build_corpus.Entry], path: Path = SEARCH_TERMS) -> dict[tuple[str, str], list[str]]:
    """What people type who look for a passage, by entry and language; nothing of it is a row of the corpus.

    Raises ValueError for a passage that does not exist and for a term that is no text or stands twice.
    """
    passages, found, seen = {(entry.id, language) for entry in entries for language in entry.answers}, {}, {}
    document = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    for unit, terms in (((entry, lang), terms) for entry, of in document.items() for lang, terms in of.items()):
        where = "/".join(unit)
        if unit not in passages:
            raise ValueError(f"{path.name}: {where} names no passage; correct it or take it out.")
        for term in terms:
            if not isinstance(term, str) or not term.strip():
                raise ValueError(f"{path.name}: {where} lists {term!r}; write a text, in quotes if need be.")
            if (key := arciva.normalise(term)) in seen:
                raise ValueError(f"{path.name}: {term!r} stands under {seen[key]} and {where}; keep one.")
            seen[key] = where
        found[unit] = terms
    return found


def held_out_questions() -> set[str]:
    """Normalised questions that any data file keeps from training, at the default seed: held out, or too like one that is."""
    held_out = set()
    for path in (build_corpus.EXTENDED, build_corpus.SEED):
        examples, _ = arciva.load_examples(str(path))
        splits, _ = arciva.split_examples(examples, arciva.Config().seed)
        trained = set(splits["train"]["id"])
        held_out |= {arciva.normalise(e.question) for e in examples if e.id not in trained}
    return held_out


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


def readable_terms(terms: dict[tuple[str, str], list[str]], held_out: set[str]) -> dict[tuple[str, str], list[str]]:
    """The search terms that neither are nor nearly repeat a held-out question."""
    texts = [*held_out, *itertools.chain.from_iterable(terms.values())]
    pairs = arciva.near_duplicates(texts)
    too_like = {texts[j] for i, j in pairs if i < len(held_out) <= j}
    return {unit: [t for t in found if t not in too_like] for unit, found in terms.items()}


def documents(
    entries: list[build_corpus.Entry],
    held_out: set[str],
    rng: random.Random,
    others: float = 0.1,
    terms: dict[tuple[str, str], list[str]] | None = None,
) -> list[Document]:
    """One pass over the knowledge, shuffled: passages plain, and below titles, whole or blurred.

    Titles are the questions that may be read, the search terms, and excerpts of the passage itself. What the seed corpus teaches, on
    which the pipeline runs by default, is read in every pass, `others` in that share of them. What no question on the training side
    asks for is read plain alone: fine-tuning does not teach it, and the base does not either.
    """
    found, taught = [], defaultdict(Counter)
    for row in build_corpus.seed_rows(entries):
        if arciva.normalise(row["instruction"]) not in held_out:
            taught[tuple(row["id"].split("/")[:2])][row["response"]] += 1
    for entry in entries:
        for language, forms in entry.answers.items():
            if (unit := (entry.id, language)) not in taught and rng.random() >= others:
                continue
            topic = entry.topic.replace("-", " ")
            found += [Document("", f"{topic}: {text.strip()}") for text in forms.values() if rng.random() < PLAIN_SHARE]
            asked = [
                (question, entry.answer(language, style))
                for mapping in entry.questions[language]
                for style, question in mapping.items()
                if arciva.normalise(question) not in held_out
            ]
            if not asked:
                continue
            # One passage for an entry: several would share a title's weight, and another entry's single one would win.
            typical = (taught.get(unit) or Counter(answer for _, answer in asked)).most_common(1)[0][0]
            below = [(q, typical if rng.random() < TYPICAL_SHARE else answer) for q, answer in asked]
            below += [(term, typical) for term in (terms or {}).get(unit, [])]
            titled = [(q if rng.random() < WHOLE_SHARE else blur(q, rng), answer) for q, answer in below]
            titled += [(blur(text, rng, EXCERPT_SHARE), typical) for text in forms.values()]
            # Some words of a long question may be all of a short one that is held out.
            found += [
                Document(title, text, opening_only=rng.random() < OPENING_SHARE)
                for title, text in titled
                if arciva.normalise(title) not in held_out
            ]
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
    entries, problems = build_corpus.load_entries(build_corpus.knowledge_files())
    if problems:
        raise SystemExit("\n".join(problems))
    held_out = held_out_questions()
    terms = readable_terms(load_search_terms(entries), held_out)
    if args.go_on_from:
        tokenizer = arciva.load_tokenizer(str(args.go_on_from))
        model = LlamaForCausalLM.from_pretrained(args.go_on_from, dtype=torch.float32)
        earlier = json.loads((args.go_on_from / "training.json").read_text(encoding="utf-8"))
    else:
        read = documents(entries, held_out, random.Random(SEED), 1.0, terms)
        tokenizer, earlier = build_tokenizer([part for d in read for part in (d.title, d.text)], args.vocabulary), []
        model = build_model(tokenizer, args.hidden, args.layers)
    shape = model.config
    args.vocabulary, args.hidden, args.layers = len(tokenizer), shape.hidden_size, shape.num_hidden_layers
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {len(tokenizer):,} tokens in the vocabulary", flush=True)
    args.steps = train(
        model,
        tokenizer,
        lambda rng: documents(entries, held_out, rng, args.others, terms),
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
