"""Score a model on the evaluation suites, wherever it runs.

    python tools/run_suites.py --model final_merged_model                     a merged folder, or any causal LM with a chat template
    python tools/run_suites.py --adapter model_output                         the adapter beside its untuned base
    python tools/run_suites.py --endpoint http://localhost:8000/v1 --name arciva --key-from API_KEY

Writes every answer and the rates to --out and prints the matrix. Any server that speaks OpenAI's chat completions will do (vLLM, llama.cpp,
TGI, Ollama); the key is read from the environment variable that --key-from names. Exit codes: 0 done, 2 something to put right.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
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


def ask_endpoint(url: str, name: str, key: str | None, *, max_new_tokens: int, parallel: int = 8) -> Answerer:
    """Greedy answers of a served model, in the order of the prompts; `parallel` requests are under way at a time."""
    client = InferenceClient(base_url=url, api_key=key or "none", timeout=120)

    def answer(prompt: str) -> str:
        messages = [{"role": "system", "content": arciva.SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
        try:
            reply = client.chat_completion(messages, model=name, max_tokens=max_new_tokens, temperature=0, seed=0)
        except InferenceTimeoutError as error:
            raise arciva.ArcivaError(f"{url} gave no answer within two minutes; is the model loaded?") from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else "no status"
            raise arciva.ArcivaError(
                f"{url} answered {status} for model {name!r}; check the address, --name and the key"
            ) from error
        except httpx2.TransportError as error:
            raise arciva.ArcivaError(
                f"cannot reach {url} ({error}); expected a server with /chat/completions there"
            ) from error
        return (reply.choices[0].message.content or "").strip()

    def answers(prompts: list[str]) -> list[str]:
        with ThreadPoolExecutor(parallel) as pool:
            return list(pool.map(answer, prompts))

    return answers


def score_models(
    options: argparse.Namespace, items: list[arciva.SuiteItem], vocabulary: str
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
    folder = options.adapter or options.model
    base = arciva.read_manifest(options.adapter)["base_model"] if options.adapter else options.model
    config, _ = arciva.configure(hardware, base_model=base, output_dir=folder, merged_dir=folder)
    config = dataclasses.replace(config, max_new_tokens=options.max_new_tokens)
    if options.adapter:
        model, tokenizer = arciva.load_tuned_model(config, hardware)
        return arciva.run_suites(model, tokenizer, items, vocabulary, config, hardware)
    model, tokenizer = arciva.load_merged_model(config, hardware)
    return {"tuned": arciva.run_suite(items, arciva.answerer(model, tokenizer, config, hardware), vocabulary)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of a merged model, or a hub id")
    what.add_argument("--adapter", help="folder of a trained adapter")
    what.add_argument("--endpoint", help="address of an OpenAI-compatible server, up to /v1")
    parser.add_argument("--name", default="arciva", help="model name that the endpoint expects")
    parser.add_argument("--key-from", help="environment variable that holds the endpoint's key")
    parser.add_argument("--suites", default="data/suites", help="folder of suite files")
    parser.add_argument("--data", default="data/arciva_qa_extended.jsonl", help="corpus whose answers may be quoted")
    parser.add_argument("--max-new-tokens", type=int, default=arciva.Config().max_new_tokens)
    parser.add_argument("--out", default="reports/suites", help="folder for the results")
    return parser.parse_args(arguments)


def run(arguments: list[str] | None = None) -> dict[str, Path]:
    """Score, save and print; returns what was written."""
    options = parse(arguments)
    items = arciva.load_suites(options.suites)
    if not items:
        raise arciva.ArcivaError(
            f"no suites in {options.suites}, expected *.jsonl files; give their folder with --suites"
        )
    vocabulary = arciva.knowledge_vocabulary(arciva.load_examples(options.data)[0])
    suites = score_models(options, items, vocabulary)
    arciva.save_suites(suites, options.out)
    for who, results in suites.items():
        print(f"\n{who}: {results['passed'].mean():.1%} of {len(results)} items passed")
        print(pd.Series(arciva.hallucination_summary(results)).round(3).to_string())
    print(arciva.suite_matrix(suites["tuned"]).map("{:.0%}".format).replace("nan%", "").to_string())
    return {"suites": Path(options.out) / "suites.json"}


if __name__ == "__main__":
    sys.exit(arciva.run_main(run))
