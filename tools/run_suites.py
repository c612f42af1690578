"""Score a model on the evaluation suites, wherever it runs.

    python tools/run_suites.py --model final_merged_model                     a merged folder, or any causal LM with a chat template
    python tools/run_suites.py --adapter model_output                         the adapter beside its untuned base
    python tools/run_suites.py --endpoint http://localhost:8000/v1 --name arciva --key-from API_KEY
    python tools/run_suites.py --canned                                       answerers that know nothing, and the gold answers

Writes every answer and the rates to --out and prints the matrix. Any server that speaks OpenAI's chat completions will do (vLLM, llama.cpp,
TGI, Ollama); the key is read from the environment variable that --key-from names. A busy or failing server (429, 5xx) is asked again a few
times. `--canned` prints what empty, echoed, refusing, denying, agreeing and inventing answers reach: a figure near theirs says nothing.
Exit codes: 0 done, 2 something to put right, a missed --min- threshold included.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2  # huggingface_hub's client
import pandas as pd
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import arciva_assistant_poc as arciva

Answerer = Callable[[list[str]], list[str]]
WAITS = (1, 2, 4, 8)  # seconds before each further try of a busy server
CANNED: dict[str, Callable[[arciva.SuiteItem], str]] = {
    "empty": lambda item: "",
    "echo": lambda item: item.prompt,
    "refuse all": lambda item: (
        "That is outside what I can help with. Das liegt außerhalb, dabei kann ich nicht helfen."
    ),
    "deny all": lambda item: "No, Arciva has no such feature. Nein, das gibt es nicht.",
    "always yes": lambda item: "Yes, open the menu and click it. Ja, öffne das Menü und klicke darauf.",
    "eager": lambda item: in_language(
        item,
        "Yes, you only need to open the Magic menu and click it.",
        "Ja, du musst nur das Magic-Menü öffnen und darauf klicken.",
    ),
    "inventor": lambda item: in_language(
        item,
        "No problem. Open Edit > Preferences > Faces and press Ctrl+Shift+9.",
        "Kein Problem. Öffne Bearbeiten > Einstellungen > Gesichter und drücke Strg+Umschalt+9.",
    ),
    "deny and invent": lambda item: in_language(
        item,
        'No, not there. Open "Magic menu" and press Ctrl+Alt+Q.',
        'Nein, dort nicht. Öffne "Magic menu" und drücke Strg+Alt+Q.',
    ),
    "gold": lambda item: item.gold,
}


def in_language(item: arciva.SuiteItem, english: str, german: str) -> str:
    return german if (item.answer_language or item.language) == "de" else english


def ask_endpoint(url: str, name: str, key: str | None, *, max_new_tokens: int, parallel: int = 8) -> Answerer:
    """Greedy answers of a served model, in the order of the prompts; `parallel` requests are under way at a time."""
    client = InferenceClient(base_url=url, api_key=key or "none", timeout=120)

    def answer(prompt: str) -> str:
        messages = [{"role": "system", "content": arciva.SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
        for wait in (*WAITS, None):
            try:
                reply = client.chat_completion(messages, model=name, max_tokens=max_new_tokens, temperature=0, seed=0)
                return (reply.choices[0].message.content or "").strip()
            except InferenceTimeoutError as error:
                raise arciva.ArcivaError(f"{url} gave no answer within two minutes; is the model loaded?") from error
            except HfHubHTTPError as error:
                status = error.response.status_code if error.response is not None else 0
                if wait is None or not (status == 429 or status >= 500):
                    raise arciva.ArcivaError(
                        f"{url} answered {status or 'no status'} for model {name!r}; check the address, --name and the key"
                    ) from error
            except httpx2.TransportError as error:
                raise arciva.ArcivaError(
                    f"cannot reach {url} ({error}); expected a server with /chat/completions there"
                ) from error
            except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
                raise arciva.ArcivaError(
                    f"{url} answered, but not with a chat completion of one choice; check that the address ends in /v1"
                ) from error
            time.sleep(wait)

    def answers(prompts: list[str]) -> list[str]:
        with ThreadPoolExecutor(parallel) as pool:
            return list(pool.map(answer, prompts))

    return answers


def score_models(
    options: argparse.Namespace, items: list[arciva.SuiteItem], vocabulary: arciva.Vocabulary
) -> dict[str, pd.DataFrame]:
    """Results by the name under which they are saved."""
    if options.endpoint:
        key = os.environ.get(options.key_from) if options.key_from else None
        if options.key_from and not key:
            raise arciva.ArcivaError(
                f"the environment variable {options.key_from} is empty; set it to the endpoint's key"
            )
        asked = ask_endpoint(options.endpoint, options.name, key, max_new_tokens=options.max_new_tokens)
        return {"tuned": arciva.run_suite(items, asked, vocabulary)}
    hardware = arciva.detect_hardware()
    folder = {"output_dir": options.adapter} if options.adapter else {"merged_dir": options.model}
    base = arciva.read_manifest(options.adapter)["base_model"] if options.adapter else options.model
    config, _ = arciva.configure(hardware, base_model=base, **folder)
    config = dataclasses.replace(config, max_new_tokens=options.max_new_tokens)
    if options.adapter:
        model, tokenizer = arciva.load_tuned_model(config, hardware)
        return arciva.run_suites(model, tokenizer, items, vocabulary, config, hardware)
    model, tokenizer = arciva.load_merged_model(config, hardware)
    return {"tuned": arciva.run_suite(items, arciva.answerer(model, tokenizer, config, hardware), vocabulary)}


def canned_results(items: list[arciva.SuiteItem], vocabulary: arciva.Vocabulary) -> dict[str, pd.DataFrame]:
    """Results of the canned answerers by name."""
    return {
        name: arciva.run_suite(items, lambda prompts, answer=answer: [answer(i) for i in items], vocabulary)
        for name, answer in CANNED.items()
    }


def canned_table(results: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One line per canned answerer: the rates, and the share of passed items of each type."""
    lines = {}
    for name, frame in results.items():
        rates = arciva.hallucination_summary(frame)
        kept = ("checklists", "false_answer", "false_refusal", "balanced_accuracy", "unsupported_per_answer")
        lines[name] = {k: rates[k] for k in kept} | frame.groupby("type")["passed"].mean().to_dict()
    return pd.DataFrame.from_dict(lines, orient="index")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of a merged model, or a hub id")
    what.add_argument("--adapter", help="folder of a trained adapter")
    what.add_argument("--endpoint", help="address of an OpenAI-compatible server, up to /v1")
    what.add_argument("--canned", action="store_true", help="print what answerers without knowledge reach")
    parser.add_argument("--name", default="arciva", help="model name that the endpoint expects")
    parser.add_argument("--key-from", help="environment variable that holds the endpoint's key")
    parser.add_argument("--suites", default="data/suites", help="folder of suite files")
    parser.add_argument("--data", default="data/arciva_qa_extended.jsonl", help="corpus whose answers may be quoted")
    parser.add_argument("--max-new-tokens", type=int, default=arciva.Config().max_new_tokens)
    parser.add_argument("--out", default="reports/suites", help="folder for the results")
    parser.add_argument("--min-checklists", type=float, help="smallest share of passed checklist items, 0 to 1")
    parser.add_argument("--min-balanced-accuracy", type=float, help="smallest balanced accuracy on probes, 0 to 1")
    options = parser.parse_args(arguments)
    for name in ("min_checklists", "min_balanced_accuracy"):
        if (value := getattr(options, name)) is not None and not 0 <= value <= 1:
            raise arciva.ArcivaError(f"{name} is {value}, expected a figure from 0 to 1")
    return options


def run(arguments: list[str] | None = None) -> dict[str, Path]:
    """Score, save and print; returns what was written."""
    options = parse(arguments)
    items = arciva.load_suites(options.suites)
    if not items:
        raise arciva.ArcivaError(
            f"no suites in {options.suites}, expected *.jsonl files; give their folder with --suites"
        )
    vocabulary = arciva.knowledge_vocabulary(arciva.load_examples(options.data)[0])
    if options.canned:
        print(canned_table(canned_results(items, vocabulary)).map("{:.2f}".format).T.to_string())
        return {}
    suites = score_models(options, items, vocabulary)
    arciva.save_suites(suites, options.out, arciva.adapter_fingerprint(options.adapter) if options.adapter else None)
    print(arciva.suite_table(suites).to_string())
    for who, results in suites.items():
        print(f"\n{who}: {results['passed'].mean():.1%} of {len(results)} items passed")
        print(arciva.suite_matrix(results).map("{:.0%}".format).replace("nan%", "").to_string())
    refuse_below(options, suites["tuned"])
    return {"suites": Path(options.out) / "suites.json"}


def refuse_below(options: argparse.Namespace, results: pd.DataFrame) -> None:
    """End with one sentence where a threshold is missed."""
    asked = {k: v for k, v in vars(options).items() if k.startswith("min_") and v is not None}
    if found := arciva.below(asked, arciva.reached_on_suites(results)):
        raise arciva.ArcivaError(f"not accepted: {'; '.join(found)}; every answer is in {options.out}")


if __name__ == "__main__":
    sys.exit(arciva.run_main(run))
