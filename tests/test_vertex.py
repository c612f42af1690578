"""Buckets, interruptions and submission of Vertex jobs, on loopback. Run: pytest tests/test_vertex.py (slow ones: -m slow)"""

import ast
import base64
import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import prove_lock
import pytest
import torch
import yaml
from conftest import ROOT, corpus_rows, in_whole_steps, write_rows
from google.api_core.exceptions import Forbidden, RetryError, ServiceUnavailable
from google.auth.exceptions import DefaultCredentialsError, RefreshError, TransportError
from google.cloud.aiplatform_v1.types import CustomJobSpec
from safetensors import SafetensorError
from worker_simulator import SCRIPT, FaultyBucket, JobEndpoint, Worker

import arciva_assistant_poc as arciva
import train_arciva_assistant_vertex as vertex


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket `training`, found by the real client; waits of a retry are short."""
    served = FaultyBucket("training")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", served.address)
    monkeypatch.setattr(vertex, "RETRY_DELAY", 0.01)
    for name in list(os.environ):
        if name.startswith(("AIP_", "GCS_", "CLOUD_ML_")):
            monkeypatch.delenv(name)
    vertex.storage_client.cache_clear()
    yield served
    served.stop()
    vertex.storage_client.cache_clear()


@pytest.fixture
def endpoint(monkeypatch):
    """The job API, found by the SDK and by gcloud through gcloud's own variable."""
    served = JobEndpoint()
    for service in ("AIPLATFORM", "SECRETMANAGER"):
        monkeypatch.setenv(f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{service}", f"{served.address}/")
    monkeypatch.setattr(vertex, "POLL_SECONDS", 0.01)
    yield served
    served.stop()


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_text("first")
    (tmp_path / "folder" / "sub" / "b.bin").write_bytes(bytes(range(256)) * 40)
    return tmp_path / "folder"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def times(count: int, status: int, *, method: str = "", part: str = ""):
    """A fault that answers the first `count` requests of a kind with `status`."""
    left = [count]

    def fault(asked: str, path: str) -> int | None:
        if left[0] and method in ("", asked) and part in path:
            left[0] -= 1
            return status
        return None

    return fault


# --- Places -----------------------------------------------------------------------------------------------------------


def test_both_forms_of_a_bucket_address_are_one_place():
    for address in ("gs://training/a/b", "gs://training/a/b/", "/gcs/training/a/b", "/gcs/training/a/b/"):
        assert str(vertex.place_of(address)) == "gs://training/a/b"
    assert str(vertex.place_of("gs://training")) == "gs://training"
    assert isinstance(vertex.place_of("model_output"), vertex.Folder)
    with pytest.raises(vertex.JobError, match="names no bucket"):
        vertex.place_of("gs:/training/a")


@pytest.mark.parametrize("address", ["gs://training/x", "/gcs/training/x", "local"])
def test_a_folder_comes_back_as_it_went_and_goes_up_only_once(address, bucket, folder, tmp_path):
    place = vertex.place_of(address if address != "local" else str(tmp_path / "place"))
    vertex.upload_folder(folder, place, job="1")
    vertex.download_folder(place, vertex.uploaded(place), tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    bucket.requests.clear()
    vertex.upload_folder(folder, place, job="1")
    assert all(method == "GET" for method, _ in bucket.requests)


def test_an_upload_that_is_cut_short_is_not_taken_for_whole(bucket, folder):
    place = vertex.place_of("gs://training/x")
    place.upload(folder / "a.txt", "a.txt")
    assert vertex.uploaded(place) is None
    vertex.upload_folder(folder, place)
    assert set(vertex.uploaded(place)["files"]) == {"a.txt", "sub/b.bin"}
    (folder / "a.txt").write_text("second")  # a new state that is on its way: the old marker no longer fits
    place.upload(folder / "a.txt", "a.txt")
    assert vertex.uploaded(place) is None


def test_the_marker_is_the_last_request_of_an_upload(bucket, folder, monkeypatch):
    written = []
    monkeypatch.setattr(vertex.Bucket, "upload", lambda self, file, name: written.append(name))
    monkeypatch.setattr(vertex.Bucket, "write", lambda self, name, text, **_: written.append(name))
    vertex.upload_folder(folder, vertex.place_of("gs://training/x"))
    assert written == ["a.txt", "sub/b.bin", vertex.MARKER]


def test_large_files_go_in_resumable_chunks_and_a_failed_chunk_is_sent_again(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(vertex, "CHUNK_BYTES", 1 << 20)
    large = tmp_path / "large.bin"
    large.write_bytes(random.Random(0).randbytes(9 << 20))  # the client sends up to 8 MiB in one request
    bucket.fault = times(2, 503, method="PUT")
    place = vertex.place_of("gs://training/x")
    place.upload(large, "large.bin")
    assert sum(method == "PUT" for method, _ in bucket.requests) >= 9 + 2
    assert not any("uploadType=multipart" in path or "?uploads" in path for _, path in bucket.requests)
    bucket.fault = times(2, 503, method="GET")
    place.download("large.bin", tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == large.read_bytes()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_errors_that_may_pass_are_waited_out(status, bucket, folder, tmp_path):
    place = vertex.place_of("gs://training/x")
    bucket.fault = times(3, status)
    place.upload(folder / "a.txt", "a.txt")
    bucket.fault = times(3, status)
    assert place.find("a.txt") == vertex.checksum(folder / "a.txt")
    bucket.fault = times(3, status)
    place.download("a.txt", tmp_path / "back.txt")
    assert (tmp_path / "back.txt").read_text() == "first"


@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize("action", ["files", "find", "download", "upload", "write"])
def test_errors_that_stay_stop_at_once_and_name_the_bucket(status, action, bucket, folder, tmp_path):
    place = vertex.place_of("gs://training/x")
    bucket.fault = lambda method, path: status
    call = {
        "files": place.files, "find": lambda: place.find("a"), "download": lambda: place.download("a", tmp_path / "a"),
        "upload": lambda: place.upload(folder / "a.txt", "a"), "write": lambda: place.write("a", "text"),
    }[action]  # fmt: skip
    with pytest.raises(
        vertex.JobError, match=r"bucket training: " if status == 401 else rf"bucket training: .*{status}"
    ):
        call()
    # The client looks at the bucket's own data beside; and on a 404 `find` asks whether it is the bucket that is missing.
    assert sum("/b/training?" not in path for _, path in bucket.requests) <= 2


@pytest.mark.parametrize("status", [404, 410])
def test_an_upload_whose_session_is_lost_starts_over_up_to_three_times(status, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(vertex, "CHUNK_BYTES", 1 << 20)
    large, place = tmp_path / "large.bin", vertex.place_of("gs://training/x")
    large.write_bytes(random.Random(0).randbytes(9 << 20))
    bucket.fault = times(2, status, method="PUT")
    place.upload(large, "large.bin")
    assert place.find("large.bin") == vertex.checksum(large)
    bucket.fault = times(3, status, method="PUT")
    with pytest.raises(vertex.Unavailable, match="lost three times"):
        place.upload(large, "large.bin")


def test_an_answer_without_a_class_of_its_own_may_pass(bucket):
    bucket.fault = lambda method, path: 410
    with pytest.raises(vertex.Unavailable, match="bucket training"):
        vertex.place_of("gs://training/x").files()


def test_errors_that_do_not_pass_in_time_are_not_taken_for_the_users(bucket, folder, monkeypatch):
    monkeypatch.setattr(vertex, "RETRY_SECONDS", 0.05)
    bucket.fault = lambda method, path: 503
    with pytest.raises(vertex.Unavailable, match="bucket training"):
        vertex.place_of("gs://training/x").files()
    monkeypatch.setattr(vertex.signal, "signal", lambda *_: None)
    assert vertex.main(["--output=gs://training/x"]) == 1


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (TransportError("metadata server: timed out"), vertex.Unavailable),
        (ValueError("no such account"), vertex.JobError),
    ],
)
def test_a_token_server_that_does_not_answer_is_no_mistake_of_the_user(cause, kind, bucket):
    with pytest.raises(kind, match="bucket training: cannot upload"), vertex.Bucket("training").naming("upload"):
        raise RefreshError("no token") from cause


def test_a_missing_bucket_is_no_empty_bucket(bucket):
    for call in (lambda p: p.find("a"), lambda p: p.read("a"), lambda p: p.files()):
        with pytest.raises(vertex.JobError, match="bucket elsewhere"):
            call(vertex.place_of("gs://elsewhere/x"))


def test_a_download_with_a_wrong_checksum_is_fetched_again_and_never_kept(bucket, folder, tmp_path):
    place = vertex.place_of("gs://training/x")
    place.upload(folder / "a.txt", "a.txt")
    spoilt = []

    def spoil(content: bytes) -> bytes:
        if content == b"first" and len(spoilt) < 1:
            spoilt.append(content)
            return b"fjrst"
        return content

    bucket.spoil = spoil
    place.download("a.txt", tmp_path / "back.txt")
    assert spoilt and (tmp_path / "back.txt").read_text() == "first"
    bucket.spoil = lambda content: b"fjrst" if content == b"first" else content
    with pytest.raises(vertex.Unavailable, match="wrong checksum"):
        place.download("a.txt", tmp_path / "again.txt")
    assert not list(tmp_path.glob("*again*"))


def test_a_result_is_never_replaced_by_another_but_a_lost_answer_is_no_other(bucket):
    place = vertex.place_of("gs://training/x")
    place.write("COMPLETE.json", "mine", only_new=True)
    refuse = times(1, 412, method="POST")  # what a real bucket answers where this emulator accepts
    bucket.fault = refuse
    place.write("COMPLETE.json", "mine", only_new=True)
    assert any("ifGenerationMatch=0" in path for _, path in bucket.requests)
    bucket.fault = times(1, 412, method="POST")
    with pytest.raises(vertex.JobError, match="exists already"):
        place.write("COMPLETE.json", "another", only_new=True)


def stored_checkpoint(folder: Path, run: str, step: int, best: int) -> Path:
    checkpoint = folder / run / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    state = {"global_step": step, "best_model_checkpoint": f"/elsewhere/{run}/checkpoint-{best}"}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "weights").write_text(f"{run} {step}")
    (checkpoint / "COMPLETE").write_text("{}")
    return checkpoint


def test_the_newest_whole_checkpoint_and_the_best_one_come_back(bucket, tmp_path):
    place, local = vertex.place_of("gs://training/checkpoints"), tmp_path / "local"
    for step in (5, 10, 15, 20):
        vertex.upload_folder(stored_checkpoint(local, "run", step, best=5), place.at("run", f"checkpoint-{step}"))
    place.at("run", "checkpoint-20").delete(vertex.MARKER)  # cut short
    restored = tmp_path / "restored"
    vertex.restore_checkpoints(place, restored)
    assert sorted(p.name for p in (restored / "run").iterdir()) == ["checkpoint-15", "checkpoint-5"]
    state = json.loads((restored / "run/checkpoint-15/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(restored / "run/checkpoint-5")
    assert arciva.newest_checkpoint(restored / "run").name == "checkpoint-15"


def test_a_checkpoint_whose_best_one_is_gone_is_passed_over(bucket, tmp_path):
    place, local = vertex.place_of("gs://training/checkpoints"), tmp_path / "local"
    for step, best in ((5, 5), (10, 10), (15, 10)):
        vertex.upload_folder(stored_checkpoint(local, "run", step, best), place.at("run", f"checkpoint-{step}"))
    place.at("run", "checkpoint-10").delete("weights")
    vertex.restore_checkpoints(place, tmp_path / "restored")
    assert [p.name for p in (tmp_path / "restored/run").iterdir()] == ["checkpoint-5"]


def test_a_checkpoint_half_removed_on_disk_is_mended_from_the_bucket(bucket, tmp_path):
    place, local = vertex.place_of("gs://training/checkpoints"), tmp_path / "local"
    vertex.upload_folder(stored_checkpoint(local, "run", 5, best=5), place.at("run", "checkpoint-5"))
    (local / "run/checkpoint-5/weights").unlink()
    vertex.restore_checkpoints(place, local)
    assert (local / "run/checkpoint-5/weights").read_text() == "run 5"


def test_nothing_is_deleted_but_by_the_flag_which_spares_the_best(bucket, tmp_path):
    place, local = vertex.place_of("gs://training/checkpoints/run"), tmp_path / "local"
    for step in (5, 10, 15, 20):
        vertex.upload_folder(stored_checkpoint(local, "run", step, best=5), place.at(f"checkpoint-{step}"))
    assert not any(method == "DELETE" for method, _ in bucket.requests)
    vertex.prune_checkpoints(place, "checkpoint-5", keep=2)
    assert {name.split("/")[0] for name in place.files()} == {"checkpoint-5", "checkpoint-15", "checkpoint-20"}
    place.at("checkpoint-20").delete("weights")  # cut short: 15 is the newest that a restart could use
    vertex.prune_checkpoints(place, "checkpoint-5", keep=1)
    assert {name.split("/")[0] for name in place.files()} == {"checkpoint-5", "checkpoint-15", "checkpoint-20"}
    place.at("checkpoint-15").delete(vertex.MARKER)
    place.at("checkpoint-5").delete(vertex.MARKER)
    vertex.prune_checkpoints(place, "checkpoint-5", keep=1)
    assert place.find("checkpoint-15/weights")


def test_a_checkpoint_that_only_this_disk_has_goes_up_before_training_goes_on(bucket, tmp_path):
    place, local = vertex.place_of("gs://training/checkpoints"), tmp_path / "local"
    best, newest = (stored_checkpoint(local, "run", step, best=4) for step in (4, 8))
    mirror = vertex.mirror_callback(place, None, tmp_path, keep=0)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, best_model_checkpoint=None)
    mirror.on_train_begin(SimpleNamespace(output_dir=str(local / "run")), state, None)
    assert not vertex.whole_checkpoints(place)
    state.global_step, state.best_model_checkpoint = 8, str(best)
    mirror.on_train_begin(SimpleNamespace(output_dir=str(local / "run")), state, None)
    assert list(vertex.whole_checkpoints(place)["run"]) == [best.name, newest.name]


# --- Data and token ---------------------------------------------------------------------------------------------------


def test_data_comes_from_the_flag_before_the_bucket_variables_before_the_platform():
    env = {"AIP_TRAINING_DATA_URI": "gs://a/p.jsonl", "GCS_BUCKET_NAME": "b", "GCS_BLOB_NAME": "q/r.jsonl"}
    assert vertex.data_sources("x.jsonl, gs://c/y", env) == ["x.jsonl", "gs://c/y"]
    assert vertex.data_sources(None, env) == ["gs://b/q/r.jsonl"]
    assert vertex.data_sources(None, {"AIP_TRAINING_DATA_URI": "gs://a/p.jsonl"}) == ["gs://a/p.jsonl"]
    assert vertex.data_sources(None, {"AIP_TRAINING_DATA_URI": "gs://a/p,gs://b/q"}) == ["gs://a/p", "gs://b/q"]
    assert vertex.data_sources(None, {}) == []
    with pytest.raises(vertex.JobError, match="belong together"):
        vertex.data_sources(None, {"GCS_BUCKET_NAME": "b"})


def test_data_may_be_files_folders_patterns_and_local_paths(bucket, tmp_path):
    rows = corpus_rows(9)
    for i, name in enumerate(("one.jsonl", "two.jsonl", "notes.txt")):
        vertex.place_of("gs://training/data").upload(write_rows(tmp_path / name, rows[3 * i : 3 * i + 3]), name)

    def read(*sources: str) -> list[str]:
        paths = vertex.fetch_data(sources, tmp_path / "fetched").split(",")
        return [json.loads(line)["id"] for path in paths for line in Path(path).read_text().splitlines()]

    ids = [row["id"] for row in rows]
    assert read("gs://training/data/one.jsonl") == ids[:3]
    assert read("/gcs/training/data/one.jsonl", str(tmp_path / "two.jsonl")) == ids[:6]
    assert read("gs://training/data/") == read("gs://training/data") == read("gs://training/data/*.jsonl") == ids[:6]
    assert read("gs://training") == read("gs://training/") == ids[:6]
    assert vertex.fetch_data(["https://example.org/a.jsonl"], tmp_path) == "https://example.org/a.jsonl"
    for nothing in (
        "gs://training/nothing",
        "gs://training/nothing/",
        "gs://training/data/*.csv",
        str(tmp_path / "no.jsonl"),
    ):
        with pytest.raises(vertex.JobError, match="no data at"):
            vertex.fetch_data([nothing], tmp_path)


def test_a_base_model_may_lie_in_a_bucket(bucket, tiny_base, tmp_path):
    vertex.upload_folder(tiny_base, vertex.place_of("gs://training/models/tiny"))
    fetched = Path(vertex.fetch_folder("gs://training/models/tiny", tmp_path / "base", "config.json"))
    assert {n: c for n, c in contents(fetched).items() if n != vertex.MARKER} == contents(tiny_base)
    assert vertex.fetch_folder("Qwen/Qwen2.5-7B-Instruct", tmp_path, "config.json") == "Qwen/Qwen2.5-7B-Instruct"
    with pytest.raises(vertex.JobError, match=r"a folder with predictions\.jsonl"):
        vertex.fetch_folder("gs://training/data", tmp_path, vertex.FOLDER_SETTINGS["compare_to"])


def test_the_hub_token_is_read_by_the_name_of_its_secret(endpoint, monkeypatch):
    monkeypatch.setenv("CLOUD_ML_PROJECT_ID", "project")
    endpoint.secrets["projects/project/secrets/hub/versions/latest"] = base64.b64encode(b"hf_value\n").decode()
    assert vertex.read_secret("hub") == vertex.read_secret("projects/project/secrets/hub") == "hf_value"
    with pytest.raises(vertex.JobError, match=r"secret projects/project/secrets/other/versions/latest: 404"):
        vertex.read_secret("other")


def test_a_secret_that_cannot_be_read_now_is_asked_for_again(endpoint, monkeypatch):
    monkeypatch.setattr(vertex, "RETRY_DELAY", 0.01)
    monkeypatch.setenv("CLOUD_ML_PROJECT_ID", "project")
    endpoint.secrets["projects/project/secrets/hub/versions/latest"] = base64.b64encode(b"hf_value").decode()
    endpoint.secret_faults = [503, 429, 500]
    assert vertex.read_secret("hub") == "hf_value" and not endpoint.secret_faults
    monkeypatch.setattr(vertex, "RETRY_SECONDS", 0.05)
    endpoint.secret_faults = [503] * 99
    with pytest.raises(vertex.Unavailable, match="secret projects/project/secrets/hub"):
        vertex.read_secret("hub")
    monkeypatch.setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER", "http://127.0.0.1:9/")  # nobody answers
    with pytest.raises(vertex.Unavailable, match="secret"):
        vertex.read_secret("hub")


# --- Several machines -------------------------------------------------------------------------------------------------


def cluster(pool0: int, pool1: int, task: str, index: int) -> dict:
    pools = {
        "workerpool0": [f"first-{i}:2222" for i in range(pool0)],
        "workerpool1": [f"more-{i}:2222" for i in range(pool1)],
    }
    return {"cluster": {k: v for k, v in pools.items() if v}, "task": {"type": task, "index": index}}


@pytest.mark.parametrize(
    ("spec", "gpus", "expected"),
    [
        ({}, 0, None),
        ({}, 1, None),
        (cluster(1, 0, "workerpool0", 0), 1, None),
        ({}, 4, "--nnodes=1 --node-rank=0 --master-addr=127.0.0.1 --master-port=29500 --nproc-per-node=4"),
        (
            cluster(1, 3, "workerpool0", 0),
            1,
            "--nnodes=4 --node-rank=0 --master-addr=first-0 --master-port=2222 --nproc-per-node=1",
        ),
        (
            cluster(1, 3, "workerpool1", 2),
            8,
            "--nnodes=4 --node-rank=3 --master-addr=first-0 --master-port=2222 --nproc-per-node=8",
        ),
        (
            cluster(1, 1, "workerpool1", 0),
            0,
            "--nnodes=2 --node-rank=1 --master-addr=first-0 --master-port=2222 --nproc-per-node=1",
        ),
    ],
)
def test_the_platforms_cluster_becomes_a_torchrun_call(spec, gpus, expected):
    command = vertex.torchrun_command(spec, gpus, ["--epochs", "2"])
    assert command is None if expected is None else command == [
        sys.executable, "-m", "torch.distributed.run", *expected.split(), str(SCRIPT), "--epochs", "2",
    ]  # fmt: skip


def test_only_the_first_process_writes(bucket, folder, monkeypatch, tiny_config):
    monkeypatch.setenv("RANK", "1")
    output = vertex.place_of("gs://training/x")
    Path(tiny_config.output_dir).mkdir()
    vertex.publish_results(output, tiny_config, "job")
    assert not any(method in ("POST", "PUT") for method, _ in bucket.requests)


def test_another_process_leaves_a_reason_only_where_the_first_one_does_not(bucket, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(vertex, "FATAL_SECONDS", 0.3)
    output = vertex.place_of("gs://training/x")
    vertex.leave_fatal(output, "job", "out of memory here")
    assert json.loads(output.read(vertex.FATAL))["reason"] == "out of memory here"
    vertex.leave_fatal(output, "job", "said already")
    assert json.loads(output.read(vertex.FATAL))["reason"] == "out of memory here"


def test_a_reason_is_written_to_its_end_though_torchrun_stops_the_process(bucket, monkeypatch):
    write = vertex.Bucket.write
    monkeypatch.setattr(
        vertex.Bucket, "write", lambda *given, **more: (os.kill(os.getpid(), signal.SIGTERM), write(*given, **more))
    )
    output = vertex.place_of("gs://training/x")
    vertex.leave_fatal(output, "job", "reason")
    assert json.loads(output.read(vertex.FATAL))["reason"] == "reason"


def test_a_wrong_flag_is_found_before_several_processes_start(bucket, monkeypatch, capsys):
    monkeypatch.setattr(vertex.signal, "signal", lambda *_: None)
    monkeypatch.setattr(vertex.os, "execv", lambda *_: pytest.fail("started"))
    for processes, flag, sentence in (
        ("2", "--epocs=3", "--epocs=3"),
        ("two", "--epochs=3", "NPROC_PER_NODE is 'two'"),
    ):
        monkeypatch.setenv("NPROC_PER_NODE", processes)
        output = f"--output=gs://training/{processes}"
        assert vertex.main([output, flag]) == 2
        assert sentence in json.loads(vertex.output_place([output]).read(vertex.FATAL))["reason"]


@pytest.mark.slow
def test_a_bad_row_leaves_its_reason_also_under_torchrun(bucket, tmp_path):
    bucket.delay = 0.3  # the first process is slower to write than the second one to end
    bad = write_rows(tmp_path / "bad.jsonl", [{"instruction": "only a question"}])
    env = {"AIP_MODEL_DIR": "gs://training/bad/model/", "CLOUD_ML_JOB_ID": "1", "NPROC_PER_NODE": "2"}
    ended = replay([f"--data={bad}", f"--work={tmp_path / 'work'}"], env)
    assert ended.returncode != 0
    assert "bad.jsonl, line 1" in json.loads(vertex.place_of("gs://training/bad/model").read(vertex.FATAL))["reason"]


# --- Jobs and interruptions -------------------------------------------------------------------------------------------


@pytest.fixture
def job(bucket, endpoint, tiny_base, tmp_path):
    """Submits a small job with the real SDK, and gives the spec that the endpoint received; data and base are in the bucket."""
    rows = corpus_rows()
    for i, row in enumerate(rows):
        row["response"] = (
            f"Panel {random.Random(i).randrange(10**6)}."  # cannot be known, so the held-out loss has a minimum
        )
    vertex.place_of("gs://training/data").upload(write_rows(tmp_path / "pairs.jsonl", rows), "pairs.jsonl")
    vertex.upload_folder(tiny_base, vertex.place_of("gs://training/models/tiny"))

    def make(name: str, *flags: str, **settings) -> dict:
        values = {
            "data": "gs://training/data/pairs.jsonl", "base_model": "gs://training/models/tiny", "rank": 4, "alpha": 8, "dropout": 0.1,
            "epochs": 5, "learning_rate": 3e-2, "pairs_per_step": 8, "row_tokens": 128, "evaluations_per_epoch": 2,
            "log_every": 1, "max_new_tokens": 4, "patience": 50, **settings,
        }  # fmt: skip
        places = "--project=p-1 --region=europe-west4 --staging-bucket=gs://training --image=i --machine=n1-standard-8"
        flags = [*places.split(), f"--base-output-dir=gs://training/{name}", *flags]
        assert vertex.main(["submit", *flags, *(f"--{k}={v}" for k, v in values.items())]) == 0
        return endpoint.jobs[-1]["jobSpec"]

    return make


@pytest.fixture
def one_thread():
    """In-process runs compute as the workers do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_here(spec: dict, tmp_path: Path, monkeypatch) -> None:
    """The uninterrupted run that all others must equal, in this process."""
    worker = Worker(spec, tmp_path / "here", bucket=None)
    with monkeypatch.context() as patch:
        for name, value in worker.variables().items():
            patch.setenv(name, value)
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
        arguments = [*spec["workerPoolSpecs"][0]["containerSpec"]["args"], f"--work={tmp_path / 'here'}"]
        vertex.run_job(arguments, vertex.output_place(arguments), "here")


WEIGHTS = ("model_output/adapter_model.safetensors", "final_merged_model/model.safetensors")


def weights(name: str) -> list[str]:
    """Checksums of adapter and merged model of a finished job."""
    place = vertex.place_of(f"gs://training/{name}/model")
    stored = place.files()
    assert json.loads(place.read(vertex.RESULT))["job"]
    for folder in vertex.RESULT_FOLDERS.values():
        assert vertex.uploaded(place.at(folder)), folder
    return [stored[name] for name in WEIGHTS]


INTERVAL = 4  # steps from one checkpoint of these jobs to the next


def interrupt(worker: Worker, plan, *, fresh=lambda: False, limit: int = 40) -> None:
    """Start the worker until it is done; each start gets the next interruption of the plan, and costs one interval at most."""
    reached = 0
    for signal_name, when in [*plan, *[("", None)] * 3][:limit]:
        start = worker.start(signal_name, when)
        assert start.code == {"SIGKILL": -9, "SIGTERM": 143, "": 0}[start.signal], start.log[-3000:]
        assert start.begun() is None or start.begun() >= reached - INTERVAL, start.log[-3000:]
        reached = max(reached, start.reached())
        if start.signal == "":
            return
        if fresh():
            shutil.rmtree(worker.disk)  # the platform gave another machine
    raise AssertionError(f"not done after {len(worker.starts)} starts")


def test_a_job_interrupted_four_times_ends_with_the_weights_of_an_uninterrupted_one(
    job, bucket, tmp_path, monkeypatch, one_thread
):
    run_here(job("whole"), tmp_path, monkeypatch)
    bucket.delay = 0.005
    worker, moments = Worker(job("parts"), tmp_path / "machine", bucket), random.Random(7)
    later = [start + moments.randrange(6) for start in (2, 9, 16, 23)]  # of 40 steps; each fourth saves and uploads
    plan = [
        ("SIGTERM", lambda w: w.steps() >= later[0]),
        ("SIGKILL", lambda w: w.steps() >= later[1] and w.uploading()),
        ("SIGTERM", lambda w: w.steps() >= later[2]),
        ("SIGKILL", lambda w: w.steps() >= later[3] and w.saving()),
    ]
    interrupt(worker, plan, fresh=lambda: len(worker.starts) == 2)
    assert [s.signal for s in worker.starts] == ["SIGTERM", "SIGKILL", "SIGTERM", "SIGKILL", ""]
    assert "going on from step" in worker.starts[-1].log
    assert weights("parts") == weights("whole")
    assert not any(method == "DELETE" for method, _ in bucket.requests)
    assert any(name.startswith("parts/logs/events.out") for name in bucket.names())
    assert worker.start().code == 0 and "this job is complete" in worker.starts[-1].log


def test_two_processes_of_a_job_train_as_one_and_survive_a_signal(job, bucket, tmp_path, monkeypatch):
    rows = in_whole_steps(corpus_rows(), tmp_path / "all.jsonl", 8)
    vertex.place_of("gs://training/data").upload(write_rows(tmp_path / "whole.jsonl", rows), "whole.jsonl")
    settings = {"data": "gs://training/data/whole.jsonl", "dropout": 0.0, "stages": "train", "micro_batch_pairs": 4}
    run_here(job("one", **settings), tmp_path, monkeypatch)
    worker = Worker(job("two", "--env=NPROC_PER_NODE=2", **settings), tmp_path / "machine", bucket)
    uploads = threading.Event()

    def hold_the_second_checkpoint(method: str, path: str) -> None:
        """Keeps the first process in its upload until torchrun has passed the signal on to both, with 32 of 40 steps to go."""
        if "checkpoint-8" in path and not uploads.is_set():
            uploads.set()
            until = time.monotonic() + 20
            while worker.log.read_text().count("closing signal SIGTERM") < 2 and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(0.2)  # it says so before it does

    bucket.fault = hold_the_second_checkpoint
    interrupted = worker.start("SIGTERM", lambda w: uploads.is_set())
    assert interrupted.signal and interrupted.code != 0 and "stopped by SIGTERM at step 9 of" in interrupted.log, (
        interrupted.log
    )
    shutil.rmtree(worker.disk)  # the platform gave another machine
    ended = worker.start()
    assert ended.code == 0 and "going on from step 9 " in ended.log, f"{interrupted.log}\n--- restart\n{ended.log}"
    one, two = (
        json.loads(vertex.place_of(f"gs://training/{name}/model/model_output").read("manifest.json"))["training"]
        for name in ("one", "two")
    )
    assert two["steps"] == one["steps"] and two["best_loss"] == pytest.approx(one["best_loss"], abs=1e-4)


@pytest.mark.slow
def test_patience_and_the_best_adapter_survive_a_new_machine(job, bucket, tmp_path, monkeypatch, one_thread):
    early = {"epochs": 10, "patience": 3, "stages": "train"}  # the best is at step 36, the end at 48
    run_here(job("whole", **early), tmp_path, monkeypatch)
    worker = Worker(job("parts", **early), tmp_path / "machine", bucket)
    plan = [
        (
            "SIGKILL",
            lambda w: any(n.endswith("checkpoint-44/UPLOADED.json") and n.startswith("parts") for n in bucket.names()),
        )
    ]
    interrupt(worker, plan, fresh=lambda: True)
    manifests = [
        json.loads(vertex.place_of(f"gs://training/{n}/model/model_output").read("manifest.json"))
        for n in ("whole", "parts")
    ]
    steps = [(m["training"]["best_step"], m["training"]["steps"]) for m in manifests]
    assert steps[0][0] < steps[0][1] < 90 and steps[1] == steps[0]
    stored = vertex.place_of("gs://training").files()
    assert stored[f"parts/model/{WEIGHTS[0]}"] == stored[f"whole/model/{WEIGHTS[0]}"]


@pytest.mark.slow
def test_twenty_four_random_interruptions_change_no_weight(job, bucket, tmp_path, monkeypatch, one_thread):
    settings = {"epochs": 12}
    run_here(job("whole", **settings), tmp_path, monkeypatch)
    expected, table, moments = weights("whole"), [], random.Random(2026)
    bucket.delay = 0.01
    while len(table) < 24:
        name = f"parts-{len(table)}"
        worker = Worker(job(name, **settings), tmp_path / name, bucket)
        plan = []
        for _ in range(8):
            kind, after = moments.choice(("any", "any", "upload", "save", "start")), moments.uniform(0.0, 3.0)
            plan.append((moments.choice(("SIGTERM", "SIGKILL")), moment(kind, after)))
        interrupt(worker, plan, fresh=lambda: moments.random() < 0.5)
        assert weights(name) == expected
        table += [(name, s.signal, s.where, s.code) for s in worker.starts if s.signal]
    print(*("  ".join(map(str, line)) for line in table), sep="\n")
    (tmp_path / "interruptions.json").write_text(json.dumps(table))


def moment(kind: str, after: float):
    """Whether a worker is where the signal shall hit it."""
    if kind == "start":  # imports, downloads and restore come before training
        return lambda w: w.alive_for() > after * 4
    return lambda w: w.training_for() > after and {"any": True, "upload": w.uploading(), "save": w.saving()}[kind]


def replay(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )


def test_a_deterministic_error_ends_replays_before_torch_is_imported(bucket, tmp_path):
    bad = write_rows(tmp_path / "bad.jsonl", [{"instruction": "only a question"}])
    env = {"AIP_MODEL_DIR": "gs://training/bad/model/", "CLOUD_ML_JOB_ID": "1"}
    arguments = [f"--data={bad}", f"--work={tmp_path / 'work'}"]
    first = replay(arguments, env)
    assert first.returncode == 2 and "bad.jsonl, line 1" in first.stderr and "Traceback" not in first.stderr
    fatal = json.loads(vertex.place_of("gs://training/bad/model").read(vertex.FATAL))
    assert fatal["job"] == "1" and "bad.jsonl, line 1" in fatal["reason"]
    again = replay(arguments, env | {"PYTHONPROFILEIMPORTTIME": "1"})
    assert again.returncode == 2 and "bad.jsonl, line 1" in again.stderr
    assert not re.search(r"\| +(torch|transformers|arciva_assistant_poc)$", again.stderr, re.MULTILINE)
    # Another job in the same place is a new try.
    assert vertex.earlier_end(vertex.place_of("gs://training/bad/model"), "2") is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--epocs=3"], "unrecognized arguments: --epocs=3"),
        (["--epochs=many"], "invalid float value"),
        (["--output_dir=x"], "say with --output"),
        (["--keep-checkpoints=-1"], "--keep-checkpoints is -1"),
        (["--data=gs://elsewhere/x.jsonl"], "bucket elsewhere"),
    ],
)
def test_what_a_user_got_wrong_is_one_sentence_and_left_for_replays(arguments, sentence, bucket, monkeypatch, capsys):
    monkeypatch.setattr(vertex.signal, "signal", lambda *_: None)
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "4711")
    arguments = ["--output=gs://training/y", *arguments]
    assert vertex.main(arguments) == 2
    assert sentence in capsys.readouterr().err
    assert sentence in json.loads(vertex.place_of("gs://training/y").read(vertex.FATAL))["reason"]
    with monkeypatch.context() as patch:
        patch.setattr(vertex, "run_job", None)  # must not be reached
        assert vertex.main(arguments) == 2


def test_outside_the_platform_a_failed_command_may_be_tried_again(bucket, monkeypatch):
    monkeypatch.setattr(vertex.signal, "signal", lambda *_: None)
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    arguments = ["--output=gs://training/y", "--data=gs://training/pairs.jsonl"]
    assert vertex.main(arguments) == 2 and vertex.place_of("gs://training/y").find(vertex.FATAL)
    monkeypatch.setattr(vertex, "run_job", lambda *_: {})  # the data is there now
    assert vertex.main(arguments) == 0


UNREACHABLE = "We couldn't connect to 'https://huggingface.co' to load the files"


@pytest.mark.parametrize(
    ("cause", "code", "reason"),
    [
        (OSError(UNREACHABLE), 1, None),
        (OSError("There was a specific connection error when trying to load x/y"), 1, None),
        (OSError("x/y is not a valid model identifier"), 2, "cannot load"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full; take a larger --boot-disk-gb"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 2, "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), 2, "the disk is full"),
        (torch.cuda.OutOfMemoryError(), 2, "the GPU ran out of memory"),
    ],
)
def test_only_what_stays_leaves_a_reason_behind(cause, code, reason, bucket, monkeypatch):
    def run_job(*_):
        if "model" in str(cause) or "connect" in str(cause):  # as `load_base_model` tells it
            raise arciva.ArcivaError("cannot load 'x/y'") from cause
        raise cause

    monkeypatch.setattr(vertex.signal, "signal", lambda *_: None)
    monkeypatch.setenv("NPROC_PER_NODE", "1")
    monkeypatch.setattr(vertex, "run_job", run_job)
    assert vertex.main(["--output=gs://training/r"]) == code
    left = json.loads(vertex.place_of("gs://training/r").read(vertex.FATAL) or "null")
    assert left is None if reason is None else reason in left["reason"]


def test_a_paid_job_does_not_train_the_nano_base_for_want_of_the_hub(bucket, monkeypatch, tmp_path):
    gpu = arciva.Hardware("cuda", "test", 24.0, torch.bfloat16, "test")
    monkeypatch.setattr(arciva, "detect_hardware", lambda: gpu)
    monkeypatch.setattr(arciva, "hub_reachable", lambda model: False)
    monkeypatch.setattr(arciva.choose_profile, "__kwdefaults__", {"reachable": arciva.hub_reachable})
    with pytest.raises(vertex.Unavailable, match="cannot be reached on the hub"):
        vertex.run_job([f"--work={tmp_path}"], vertex.place_of("gs://training/n"), "1")


def test_a_finished_result_of_another_job_is_refused_before_training(bucket):
    place = vertex.place_of("gs://training/z")
    place.write(vertex.RESULT, json.dumps({"job": "earlier"}))
    with pytest.raises(vertex.JobError, match="holds the result of job earlier"):
        vertex.run_job(["--output=gs://training/z"], place, "later")


# --- Submission -------------------------------------------------------------------------------------------------------


@pytest.fixture
def submit(bucket, endpoint, tmp_path, capsys, monkeypatch):
    """Runs `submit` in this process: (exit code, stdout, stderr)."""
    data = write_rows(tmp_path / "pairs.jsonl", corpus_rows())
    vertex.place_of("gs://training/data").upload(data, "pairs.jsonl")
    monkeypatch.setattr(vertex.shutil, "which", lambda command: None)  # a real gcloud would ask for real logs

    def run(*flags: str, data: str = "gs://training/data/pairs.jsonl") -> tuple[int, str, str]:
        capsys.readouterr()
        places = [
            "--project=p-1",
            "--region=europe-west4",
            "--staging-bucket=gs://training",
            "--image=europe-docker.pkg.dev/p-1/a/t:1",
        ]
        code = vertex.main(["submit", *places, *([f"--data={data}"] if data else []), *flags])
        return code, *capsys.readouterr()

    return run


FULL = [
    "--machine=g2-standard-12",
    "--spot",
    "--timeout=4h",
    "--disable-retries",
    "--service-account=trainer@p-1.iam.gserviceaccount.com",
    "--env=TOKENIZERS_PARALLELISM=false",
    "--display-name=arciva-1",
    "--label=team=photos",
    "--hub-token-secret=hub",
    "--epochs=2",
    "--base_model=full",
    "--boot-disk-gb=300",
]
EXPECTED = {
    "workerPoolSpecs": [
        {
            "machineSpec": {"machineType": "g2-standard-12", "acceleratorType": "NVIDIA_L4", "acceleratorCount": 1},
            "replicaCount": 1,
            "diskSpec": {"bootDiskSizeGb": 300},
            "containerSpec": {
                "imageUri": "europe-docker.pkg.dev/p-1/a/t:1",
                "args": [
                    "--data=gs://training/data/pairs.jsonl",
                    "--hub-token-secret=hub",
                    "--epochs=2",
                    "--base_model=full",
                ],
                "env": [{"name": "TOKENIZERS_PARALLELISM", "value": "false"}],
            },
        }
    ],
    "scheduling": {"timeout": "14400s", "strategy": "SPOT", "disableRetries": True, "restartJobOnWorkerRestart": False},
    "baseOutputDirectory": {"outputUriPrefix": "gs://training/arciva-1"},
    "serviceAccount": "trainer@p-1.iam.gserviceaccount.com",
}


def typed(spec: dict) -> CustomJobSpec:
    """REST JSON, with enums by name or number, as the one type behind both."""
    return CustomJobSpec.from_json(json.dumps(spec))


def test_a_dry_run_prints_the_job_and_submits_nothing(submit, endpoint):
    code, printed, noted = submit(*FULL, "--dry-run")
    assert code == 0, noted
    assert yaml.safe_load(printed) == EXPECTED
    assert printed.startswith(
        "# gcloud ai custom-jobs create --project=p-1 --region=europe-west4 --display-name=arciva-1 --config=job.yaml --labels=team=photos\n"
    )
    assert not endpoint.jobs and "90 examples" in noted


def test_the_sdk_posts_exactly_the_printed_job(submit, endpoint):
    code, printed, noted = submit(*FULL)
    assert code == 0, noted
    (posted,) = endpoint.jobs
    assert typed(posted["jobSpec"]) == typed(EXPECTED)
    assert posted["displayName"] == "arciva-1" and posted["labels"]["team"] == "photos"
    assert "customJobs/1" in printed and "stream-logs 1" in printed


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_gcloud_posts_exactly_the_printed_job(submit, endpoint, tmp_path):
    _, printed, _ = submit(*FULL, "--dry-run")
    (tmp_path / "job.yaml").write_text(printed)
    command = shlex.split(printed.splitlines()[0].removeprefix("# ").replace("job.yaml", str(tmp_path / "job.yaml")))
    env = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path / "empty"), "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert typed(endpoint.jobs[0]["jobSpec"]) == typed(EXPECTED)


@pytest.mark.parametrize(("end", "code"), [("SUCCEEDED", 0), ("FAILED", 2), ("CANCELLED", 2)])
def test_following_ends_with_the_job(end, code, submit, endpoint):
    endpoint.states = ["JOB_STATE_QUEUED", "JOB_STATE_RUNNING", f"JOB_STATE_{end}"]
    ended, printed, noted = submit(*FULL, "--follow")
    assert ended == code and end.lower() in printed
    assert code == 0 or f"ended as {end.lower()}" in noted


class AnsweringJob:
    """A submitted job whose state is asked for; an exception in place of a state is raised."""

    error, resource_name = None, "projects/p/locations/r/customJobs/7"

    def __init__(self, *answers):
        self.answers = iter(answers)

    @property
    def state(self):
        if isinstance(answer := next(self.answers), BaseException):
            raise answer
        return SimpleNamespace(name=answer)


def test_a_poll_that_fails_is_repeated(monkeypatch, capsys):
    monkeypatch.setattr(vertex, "POLL_SECONDS", 0.0)
    lost = RefreshError("no token")
    lost.__cause__ = TransportError("metadata server: timed out")
    passing = (ServiceUnavailable("later"), lost, RetryError("later", None))
    vertex.wait_for_end(AnsweringJob(*passing, "JOB_STATE_RUNNING", ServiceUnavailable("later"), "JOB_STATE_SUCCEEDED"))
    printed = capsys.readouterr()
    assert "running" in printed.out and "succeeded" in printed.out and printed.err.count("asking again") == 4
    for refusal in (Forbidden("no"), RefreshError("expired")):
        with pytest.raises(vertex.JobError, match="the job goes on"):
            vertex.wait_for_end(AnsweringJob(refusal))


def test_the_log_is_streamed_beside_the_states_and_the_keyboard_leaves_the_job_alone(tmp_path, monkeypatch, capfd):
    (tmp_path / "gcloud").write_text('#!/bin/sh\necho "log of $*"\nexec sleep 60\n')
    (tmp_path / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(vertex, "POLL_SECONDS", 0.3)
    options = SimpleNamespace(project="p", region="r")
    running = ["JOB_STATE_RUNNING"] * 3
    assert vertex.follow(AnsweringJob(*running, "JOB_STATE_SUCCEEDED"), options) == 0
    assert "log of ai custom-jobs stream-logs 7 --project=p --region=r" in capfd.readouterr().out
    assert vertex.follow(AnsweringJob(*running, KeyboardInterrupt()), options) == 130
    assert "the job goes on. To end it: gcloud ai custom-jobs cancel 7 --project=p --region=r" in capfd.readouterr().err


def test_without_credentials_a_submission_says_how_to_get_them(submit, monkeypatch):
    from google.cloud import aiplatform

    def refuse(**_):
        raise DefaultCredentialsError("not found")

    monkeypatch.setattr(aiplatform, "init", refuse)
    code, _, noted = submit(*FULL)
    assert code == 2 and "gcloud auth application-default login" in noted


def test_local_data_is_checked_and_brought_to_the_bucket(submit, endpoint, tmp_path):
    code, _, noted = submit("--display-name=d", data=str(tmp_path / "pairs.jsonl"))
    assert code == 0, noted
    (flag,) = (
        a for a in endpoint.jobs[0]["jobSpec"]["workerPoolSpecs"][0]["containerSpec"]["args"] if a.startswith("--data")
    )
    place, name = flag.removeprefix("--data=").rsplit("/", 1)
    assert place.startswith("gs://training/d/data/")
    assert vertex.place_of(place).read(name) == (tmp_path / "pairs.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--machine=g2-standard-13"], "unknown machine 'g2-standard-13'"),
        (["--machine=n1-standard-7"], "unknown machine 'n1-standard-7'"),
        (["--machine=g2-standard-24", "--accelerator=NVIDIA_L4", "--accelerator-count=1"], "carries 2 x NVIDIA_L4"),
        (["--machine=a2-highgpu-1g", "--accelerator=NVIDIA_L4"], "carries 1 x NVIDIA_TESLA_A100"),
        (["--machine=n1-standard-8", "--accelerator=NVIDIA_L4"], "come with g2"),
        (["--machine=n1-standard-32", "--accelerator=NVIDIA_TESLA_T4", "--accelerator-count=1"], "here 2 or more"),
        (["--machine=n1-standard-8", "--accelerator=NVIDIA_TESLA_T4", "--accelerator-count=3"], "cannot carry 3 x"),
        (["--machine=a3-highgpu-1g"], "add --spot"),
        (["--timeout=8d"], "timeout '8d'"),
        (["--timeout=169h"], "at most 168h"),
        (["--label=Team=Photos"], "lower-case"),
        (["--env=HF_TOKEN=abc"], "looks like a secret"),
        (["--env=X=hf_abc"], "looks like a secret"),
        (["--env=DB_PASSWD=abc"], "looks like a secret"),
        (["--env=AWS_ACCESS_KEY_ID=abc"], "looks like a secret"),
        (["--env=PRIVATEKEY=abc"], "looks like a secret"),
        (["--env=X=github_pat_abc"], "looks like a secret"),
        (["--env=PROXY=http://me:abc@proxy:80"], "looks like a secret"),
        (["--hub-token-secret=hf_abc"], "looks like a secret"),
        (["--hub-token-secret", "sk-abc"], "looks like a secret"),
        (["--compare_to=https://storage.googleapis.com/b/o?X-Goog-Signature=abc"], "looks like a secret"),
        (["--tensorboard=t"], "needs --service-account"),
        (["--base-output-dir=here"], "starts with gs://"),
        (["--replicas=0"], "--replicas of 1"),
        (["--base_model=/tmp"], "lies on this machine"),
        (["--compare_to=tests"], "lies on this machine"),
        (["--replicas=3"], "must be a multiple"),
        (["--env=NPROC_PER_NODE=3"], "number of processes (3)"),
        (["--env=NPROC_PER_NODE=two"], "NPROC_PER_NODE is 'two'"),
        (["--machine=g2-standard-96", "--pairs_per_step=4"], "number of processes (8)"),
        (["--epocs=3"], "unrecognized arguments: --epocs=3"),
        (["--rank=0"], "rank is 0"),
        (["--merged_dir=x"], "say with --output"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_submitted(flags, sentence, submit, endpoint):
    code, _, noted = submit(*flags)
    assert code == 2 and sentence in noted and noted.count("\n") <= 2
    assert not endpoint.jobs


def test_bad_rows_are_found_before_submission(submit, endpoint, tmp_path):
    bad = write_rows(tmp_path / "bad.jsonl", [*corpus_rows(), {"instruction": "only a question"}])
    code, _, noted = submit(data=str(bad))
    assert code == 2 and "bad.jsonl, line 91" in noted and not endpoint.jobs


def test_several_machines_share_one_container(submit):
    _, printed, _ = submit(*FULL[:-1], "--replicas=4", "--dry-run")
    pools = yaml.safe_load(printed)["workerPoolSpecs"]
    assert [p["replicaCount"] for p in pools] == [1, 3] and pools[0]["containerSpec"] == pools[1]["containerSpec"]


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train_arciva_assistant_local.py", "train_arciva_assistant_vertex.py"])
def test_scripts_are_compositions(script):
    tree = ast.parse((ROOT / script).read_text())
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & {
        "torch",
        "peft",
        "bitsandbytes",
        "safetensors",
        "sacrebleu",
        "rouge_score",
        "numpy",
    }
    words = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name)
    }
    assert not words & {
        "backward",
        "Trainer",
        "train_adapter",
        "merge_adapter",
        "generate",
        "compute_loss",
        "score_predictions",
    }
    assert "run_pipeline" in words


def test_the_lock_holds_every_pin_with_hashes_and_names_no_host():
    lock = (ROOT / "requirements.vertex-ai.txt").read_text()
    assert "uv pip compile deploy/vertex/requirements.in" in lock.splitlines()[1]
    assert "://" not in lock
    pins = dict(re.findall(r"^([a-z0-9._-]+)==([^ ;]+)", lock, re.MULTILINE))
    wanted = [
        (ROOT / f).read_text() for f in ("requirements.txt", "requirements-gpu.txt", "deploy/vertex/requirements.in")
    ]
    wanted = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", "\n".join(wanted), re.MULTILINE)
    assert len(wanted) > 15 and all(pins[name.lower()] == version for name, version in wanted)
    blocks = re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(re.findall(r"^[a-z0-9]", lock, re.MULTILINE)) and all(
        "--hash=sha256:" in b for b in blocks
    )


def test_the_proof_of_the_lock_leaves_out_torch_and_its_cuda_alone():
    lock = (ROOT / "requirements.vertex-ai.txt").read_text()
    kept, left_out = prove_lock.without_torch(lock)
    assert {"torch", "triton", "nvidia-cudnn-cu13", "cuda-toolkit"} <= set(left_out)
    assert len(prove_lock.blocks(kept)) + len(left_out) == len(prove_lock.blocks(lock))
    assert all(name.startswith(("torch", "triton", "liger-kernel", "nvidia-", "cuda-")) for name in left_out)


def test_the_container_copies_what_rarely_changes_first_and_runs_without_root():
    lines = [
        line
        for line in (ROOT / "deploy/vertex/Dockerfile").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    order = [next(i for i, line in enumerate(lines) if part in line) for part in ("requirements.vertex-ai.txt", "--require-hashes", "data/nano_base", "train_arciva_assistant_vertex.py", "USER ")]  # fmt: skip
    assert order[0] < order[1] < order[2] < order[3]
    assert re.search(r"^USER (?!root|0)", "\n".join(lines), re.MULTILINE)
