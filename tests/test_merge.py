"""Section 8: the fp16 merge. Run: pytest tests/test_merge.py"""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from conftest import ARCHITECTURES, ROOT, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import arciva_assistant_poc as arciva


def make_run(
    folder: Path,
    tokenizer,
    *,
    architecture="llama",
    tied=True,
    rslora=False,
    max_shard_size="50GB",
    dtype=torch.float32,
) -> arciva.Config:
    """A base and an adapter on disk as training leaves them, the adapter with random weights."""
    model = make_model(architecture, vocabulary=len(tokenizer), tied=tied).to(dtype)
    model.save_pretrained(folder / "base", max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder / "base")
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=rslora, task_type="CAUSAL_LM")
    )
    torch.manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    config = arciva.Config(
        base_model=str(folder / "base"),
        output_dir=str(folder / "adapter"),
        merged_dir=str(folder / "merged"),
        merge_base="original",
    )
    adapted.save_pretrained(config.output_dir)
    tokenizer.save_pretrained(config.output_dir)
    manifest = {"config": asdict(config), "base_model": config.base_model, "base_fingerprint": arciva.base_fingerprint(config.base_model), "quantized_from": "float32", "data_fingerprint": "x"}  # fmt: skip
    (Path(config.output_dir) / "manifest.json").write_text(json.dumps(manifest))
    return config


def merged_tensors(config) -> dict[str, torch.Tensor]:
    return {k: v for file in Path(config.merged_dir).glob("*.safetensors") for k, v in load_file(file).items()}


CASES = {
    "tied head": {},
    "untied head": {"tied": False},
    "sharded base": {"max_shard_size": "60KB"},
    "rank-stabilised": {"rslora": True},
    "bf16 base": {"dtype": torch.bfloat16},
    "mistral": {"architecture": "mistral"},
    "qwen2, biases": {"architecture": "qwen2", "tied": False},
}


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_equal_pefts_within_fp16_rounding(tmp_path, chatml, case):
    config = make_run(tmp_path, chatml, **CASES[case])
    if case == "sharded base":
        assert len(list(Path(config.base_model).glob("*.safetensors"))) > 2
    arciva.merge_adapter(config)
    base = AutoModelForCausalLM.from_pretrained(config.base_model, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, config.output_dir).merge_and_unload().state_dict()
    merged = merged_tensors(config)
    assert merged.keys() == set(arciva.base_shards(config.base_model, None))
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float16
        # fp16 has 11 significant bits: half a unit in the last place is 2^-11 of the value, and 2^-25 near zero.
        assert torch.allclose(tensor.float(), expected[name].float(), rtol=2**-10, atol=2**-24), name


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_the_merged_folder_loads_without_peft_or_bitsandbytes(tmp_path, chatml, architecture):
    config = make_run(tmp_path, chatml, architecture=architecture)
    arciva.merge_adapter(config)
    script = (
        "import sys, torch; sys.modules['peft'] = sys.modules['bitsandbytes'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({config.merged_dir!r}, dtype='auto'); t = AutoTokenizer.from_pretrained({config.merged_dir!r})\n"
        "assert m.dtype == torch.float16 and t.chat_template; print(m.config.model_type)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == architecture


def test_the_default_merge_adds_to_what_the_adapter_was_trained_beside(tmp_path, chatml, cpu):
    """The live model computes with dequantised weights; merging into those must reproduce it, into the originals must not."""
    config = make_run(tmp_path, chatml)
    live = PeftModel.from_pretrained(arciva.load_base_model(config, cpu), config.output_dir)
    distances = {}
    for base in ("dequantized", "original"):
        arciva.merge_adapter(replace(config, merge_base=base))
        merged, tokenizer = arciva.load_merged_model(config, cpu)
        prompts = ["How do I export?", "Wie groß?"]
        distances[base] = (
            (
                arciva.prompt_logits(live, tokenizer, prompts, cpu)
                - arciva.prompt_logits(merged, tokenizer, prompts, cpu)
            )
            .abs()
            .max()
            .item()
        )
    # fp16 rounds each weight by at most 2^-11 of its size; logits here are of order 10.
    assert distances["dequantized"] < 0.05 < distances["original"]


@pytest.mark.parametrize("rows", [320, 128, 64])
def test_the_round_trip_is_what_a_four_bit_layer_computes_with(rows):
    """In pieces too, each of another scale: a centre of its own for each piece would show."""
    torch.manual_seed(0)
    weight = torch.randn(320, 64) * torch.logspace(-2, 0, 320)[:, None]
    layer = bnb.nn.Linear4bit(
        64, 320, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True
    )
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    pieces = arciva.nf4_round_trip(weight.split(rows), torch.float32)
    assert torch.equal(layer(torch.eye(64)).T, torch.cat(list(pieces)))


def test_large_tensors_in_blocks_and_several_files_give_the_same_bytes(tmp_path, chatml, monkeypatch):
    config = make_run(tmp_path, chatml, tied=False)
    arciva.merge_adapter(config)
    whole = merged_tensors(config)
    monkeypatch.setattr(arciva, "BLOCK_ELEMENTS", 1000)
    deltas, shards = arciva.load_deltas(config.output_dir), arciva.base_shards(config.base_model, None)
    (tmp_path / "parts").mkdir()
    arciva.merge_tensors(shards, deltas, tmp_path / "parts", round_trip=None, shard_bytes=50_000)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "parts" / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), whole[name])


@pytest.mark.parametrize("size", ["50GB", "100KB"])
def test_a_second_copy_of_the_weights_is_not_merged(tmp_path, chatml, size):
    """Mistral's repositories hold all weights once more as consolidated.safetensors, under other names."""
    config = make_run(tmp_path, chatml, max_shard_size=size)
    names = set(arciva.base_shards(config.base_model, None))
    save_file({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, tmp_path / "base" / "consolidated.safetensors")
    assert set(arciva.base_shards(config.base_model, None)) == names


def test_no_more_than_a_block_of_the_base_stays_in_memory(tmp_path):
    """Pages of a mapped file count as memory for as long as it is open: 512 MiB of weights, read 64 MiB at a time."""
    for number in range(8):
        save_file({f"{number}": torch.zeros(16, 1 << 20, dtype=torch.float32)}, tmp_path / f"{number}.safetensors")
    script = f"""
import re, sys
sys.path[:0] = [{str(ROOT)!r}]
from pathlib import Path
import arciva_assistant_poc as arciva

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

arciva.read_rows(Path({str(tmp_path)!r}) / "0.safetensors", "0").sum()
before = resident()
for number in range(8):
    arciva.read_rows(Path({str(tmp_path)!r}) / f"{{number}}.safetensors", str(number)).sum()
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 70


def test_the_merged_folder_s_parents_are_made(tmp_path, chatml):
    config = replace(make_run(tmp_path, chatml), merged_dir=str(tmp_path / "new" / "below" / "merged"))
    assert (arciva.merge_adapter(config) / "model.safetensors").is_file()


def test_a_merged_model_that_overflows_is_refused():
    logits = torch.zeros(1, 4).log_softmax(-1)
    live = {"logits": logits, "answers": ["a"], "perplexity": 2.0}
    with pytest.raises(arciva.ArcivaError, match="overflow fp16"):
        arciva.compare_models(live, live | {"perplexity": float("nan")})


def verification(after: float) -> dict:
    return {"perplexity_adapter": 2.0, "perplexity_merged": after}


def test_a_merge_takes_its_name_only_when_it_is_the_model_that_was_judged(tmp_path, chatml):
    config = replace(make_run(tmp_path, chatml), merge_base="dequantized")
    arciva.merge_adapter(arciva.unverified(config))
    assert not Path(config.merged_dir).exists()
    arciva.publish_merged(config, verification(2.001), None)
    before = merged_tensors(config)
    change_adapter(config, lambda tensors: [t.mul_(3) for t in tensors.values()])
    arciva.merge_adapter(arciva.unverified(config))
    with pytest.raises(arciva.ArcivaError, match=r"perplexity is 2\.200, the adapter's 2\.000"):
        arciva.publish_merged(config, verification(2.2), None)
    assert all(torch.equal(v, before[k]) for k, v in merged_tensors(config).items())
    card = (Path(config.merged_dir) / "README.md").read_text()
    assert f'from_pretrained("{Path(config.merged_dir).name}"' in card
    assert json.loads((Path(config.merged_dir) / "manifest.json").read_text())["verification"] == verification(2.001)


def test_plain_generate_stops_where_answers_end(tmp_path, chatml):
    """Also where the base's own config names another end: it is the end-of-turn token that was supervised."""
    config = make_run(tmp_path, chatml)
    arciva.merge_adapter(config)
    model = AutoModelForCausalLM.from_pretrained(config.merged_dir, dtype=torch.float32)
    assert model.generation_config.eos_token_id == arciva.stop_token_ids(chatml)
    assert model.generation_config.pad_token_id == chatml.pad_token_id and not model.generation_config.do_sample
    prompt = torch.tensor([arciva.encode_prompt(chatml, "Wie groß?")])
    with torch.no_grad():  # the end of turn wins at once
        model.set_output_embeddings(torch.nn.Linear(64, len(chatml)))
        model.get_output_embeddings().bias[chatml.convert_tokens_to_ids("<|im_end|>")] = 1e4
    assert model.generate(prompt, max_new_tokens=5).shape[1] == prompt.shape[1] + 1


def change_adapter(config, change) -> None:
    path = Path(config.output_dir) / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_an_adapter_with_infinite_weights_is_refused(tmp_path, chatml):
    config = make_run(tmp_path, chatml)
    change_adapter(config, lambda tensors: tensors[sorted(tensors)[0]].fill_(float("inf")))
    with pytest.raises(arciva.ArcivaError, match="infinite"):
        arciva.merge_adapter(config)
    assert not Path(config.merged_dir).exists()


def test_weights_beyond_fp16_are_refused_and_leave_the_earlier_merge(tmp_path, chatml):
    config = make_run(tmp_path, chatml)
    arciva.merge_adapter(config)
    before = merged_tensors(config)
    change_adapter(config, lambda tensors: [t.mul_(1e4) for t in tensors.values()])
    with pytest.raises(arciva.ArcivaError, match="beyond fp16"):
        arciva.merge_adapter(config)
    assert all(torch.equal(v, before[k]) for k, v in merged_tensors(config).items())


def test_a_killed_merge_leaves_no_half_folder_under_the_final_name(tmp_path, chatml):
    config = make_run(tmp_path, chatml)
    script = (
        f"import sys, os, json; sys.path[:0] = [{str(ROOT)!r}]\n"
        "import arciva_assistant_poc as arciva\n"
        "original = arciva.merged_rows\n"
        "count = [0]\n"
        "def dying(*args):\n"
        "    count[0] += 1\n"
        "    if count[0] == 9: os.kill(os.getpid(), 9)\n"
        "    return original(*args)\n"
        "arciva.merged_rows = dying\n"
        f"arciva.merge_adapter(arciva.Config(**json.loads({json.dumps(asdict(config))!r})))\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -9
    assert not Path(config.merged_dir).exists()
    arciva.merge_adapter(config)  # what the killed run left behind is no obstacle
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_an_adapter_of_another_base_is_refused(tmp_path, chatml):
    config = make_run(tmp_path, chatml)
    make_model("llama", vocabulary=len(chatml), layers=1).save_pretrained(config.base_model)
    with pytest.raises(arciva.ArcivaError, match="not the base"):
        arciva.merge_adapter(config)


def test_a_base_that_has_moved_is_taken_from_where_it_is(tmp_path, chatml):
    config = make_run(tmp_path, chatml)
    arciva.merge_adapter(config)
    expected = merged_tensors(config)
    Path(config.base_model).rename(tmp_path / "elsewhere")
    moved = replace(config, base_model=str(tmp_path / "elsewhere"), merged_dir=str(tmp_path / "again"))
    arciva.merge_adapter(moved)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged_tensors(moved).items())
    with pytest.raises(arciva.ArcivaError, match="not the base"):
        arciva.merge_adapter(config)


def test_more_than_plain_lora_is_refused(tmp_path, chatml):
    config = make_run(tmp_path, chatml)
    path = Path(config.output_dir) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(arciva.ArcivaError, match="use_dora"):
        arciva.merge_adapter(config)


def test_a_missing_adapter_and_a_full_disk_say_what_to_do(tmp_path, chatml, monkeypatch):
    with pytest.raises(arciva.ArcivaError, match="train first"):
        arciva.merge_adapter(arciva.Config(output_dir=str(tmp_path / "nothing")))
    config = make_run(tmp_path, chatml)
    monkeypatch.setattr(arciva.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(arciva.ArcivaError, match="on disk"):
        arciva.merge_adapter(config)
