"""Write the evaluation suites as a task folder of EleutherAI's lm-evaluation-harness.

    python tools/export_lm_eval.py --out lm_eval_tasks
    lm_eval --model hf --model_args pretrained=final_merged_model --tasks arciva_gold,arciva_answers --include_path lm_eval_tasks --apply_chat_template

`arciva_gold` asks how likely the gold answers are (`perplexity` is per answer, not per token; `acc` is the share that greedy decoding
would give word for word; the harness counts the white space that ends a prompt, and no end of turn), `arciva_answers` generates and compares (`exact_match`, case and punctuation ignored). The harness shares no
code with this repository, which makes it an outside check of both figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import arciva_assistant_poc as arciva


def tasks(folder: Path) -> dict[str, dict]:
    """Task name → its settings, in the harness's own words."""
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "description": arciva.SYSTEM_PROMPT,
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metadata": {"version": 1},
    }
    likelihood = [{"metric": "perplexity", "higher_is_better": False}, {"metric": "acc", "higher_is_better": True}]
    exact = {"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True, "higher_is_better": True}
    exact["regexes_to_ignore"] = [r"^\s+|\s+$"]  # the harness keeps the line break with which a model may begin
    decoding = {"until": [], "do_sample": False, "max_gen_toks": arciva.Config().max_new_tokens}
    return {
        "arciva_gold": {**shared, "task": "arciva_gold", "output_type": "loglikelihood", "metric_list": likelihood},
        "arciva_answers": {
            **shared,
            "task": "arciva_answers",
            "output_type": "generate_until",
            "generation_kwargs": decoding,
            "metric_list": [exact],
        },
    }


def export(suites: str, out: Path) -> dict[str, Path]:
    """Write items and tasks, all or nothing."""
    items = arciva.load_suites(suites)
    if not items:
        raise arciva.ArcivaError(f"no suites in {suites}, expected *.jsonl files; give their folder with --suites")
    keep = ("id", "suite", "capability", "type", "language", "prompt", "gold")
    lines = [json.dumps(item.model_dump(include=set(keep)), ensure_ascii=False) for item in items]
    with arciva.atomic_folder(out) as folder:
        arciva.write_atomic(folder / "items.jsonl", "\n".join(lines) + "\n")
        for name, settings in tasks(out.resolve()).items():
            arciva.write_atomic(folder / f"{name}.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    return {"tasks": out}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", default="data/suites", help="folder of suite files")
    parser.add_argument("--out", type=Path, default=Path("lm_eval_tasks"), help="folder to write")
    options = parser.parse_args(arguments)
    return arciva.run_main(lambda: export(options.suites, options.out))


if __name__ == "__main__":
    sys.exit(main())
