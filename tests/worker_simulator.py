"""Stand-ins for the cloud, on loopback: a bucket with faults, the job endpoint, and the machine that runs a submitted job.

The bucket is gcp-storage-emulator, spoken to by the real client. It accepts `ifGenerationMatch=0` on objects that exist and knows
no error of its own, so faults are put in front of it. The endpoint takes what the SDK and gcloud post. The worker starts the
entry point of a posted job as the platform does, takes the machine away at a chosen moment, and starts it again.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_arciva_assistant_vertex.py"


def serve(handler, server_class=HTTPServer):
    """A server on a free port, in a thread."""
    server = server_class(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"


class FaultyBucket:
    """An emulated bucket. `fault(method, path)` may answer a request itself with a status, or None to let it through."""

    def __init__(self, name: str):
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        self.spoil = lambda content: content  # what a download's body is turned into
        self.delay = 0.0  # seconds per request
        self.name, self.storage = name, Storage(use_memory_fs=True)
        buckets.create_bucket(name, self.storage)
        self.server, self.address = serve(partial(self.handler_class(), self.storage))

    def handler_class(outer):
        class Handler(RequestHandler):
            def answer(self, method: str) -> None:
                outer.requests.append((method, self.path))
                time.sleep(outer.delay)
                status = outer.fault(method, self.path)
                if status is None:
                    return getattr(super(), f"do_{method}")()
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.dumps({"error": {"code": status, "message": "injected"}}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = lambda self: self.answer("GET")  # noqa: E731
            do_POST = lambda self: self.answer("POST")  # noqa: E731
            do_PUT = lambda self: self.answer("PUT")  # noqa: E731
            do_DELETE = lambda self: self.answer("DELETE")  # noqa: E731

            def setup(self) -> None:
                super().setup()
                write = self.wfile.write
                self.wfile.write = lambda content: write(outer.spoil(content))

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (BrokenPipeError, ConnectionResetError):  # the client was killed
                    self.close_connection = True

        return Handler

    def names(self) -> list[str]:
        """Everything in the bucket."""
        return list(self.storage.objects.get(self.name, {}))

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class JobEndpoint:
    """The custom-job API: keeps what is posted, and lets each job advance one state per look."""

    STATES = ("JOB_STATE_QUEUED", "JOB_STATE_PENDING", "JOB_STATE_RUNNING", "JOB_STATE_SUCCEEDED")

    def __init__(self):
        self.jobs: list[dict] = []
        self.states = list(self.STATES)
        self.secrets: dict[str, str] = {}
        self.secret_faults: list[int] = []  # statuses that the next questions for a secret are answered with
        self.server, self.address = serve(self.handler_class(), ThreadingHTTPServer)

    def handler_class(outer):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.jobs.append(job)
                parent = re.match(r"/v1(?:beta1)?/(projects/[^/]+/locations/[^/]+)/customJobs", self.path)[1]
                self.reply({**job, "name": f"{parent}/customJobs/{len(outer.jobs)}", "state": "JOB_STATE_PENDING"})

            def do_GET(self) -> None:
                if secret := re.match(r"/v1/(projects/[^:]+):access", self.path):
                    if outer.secret_faults:
                        return self.reply({"error": {"message": "injected"}}, outer.secret_faults.pop(0))
                    value = outer.secrets.get(secret[1])
                    return self.reply(
                        {"payload": {"data": value}} if value else {"error": {"code": 404}}, 200 if value else 404
                    )
                number = int(re.search(r"/customJobs/(\d+)", self.path)[1])
                state = outer.states.pop(0) if len(outer.states) > 1 else outer.states[0]
                error = {"error": {"code": 9, "message": "worker exited with 1"}} if state.endswith("FAILED") else {}
                name = self.path.split("?")[0].split("/", 2)[2]
                self.reply({**outer.jobs[number - 1], "name": name, "state": state, **error})

            def reply(self, body: dict, status: int = 200) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_) -> None:
                pass

        return Handler

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@dataclass
class Start:
    """One start of the entry point: how it ended, and where it was when the signal came."""

    code: int
    signal: str
    where: str
    log: str

    def begun(self) -> int | None:
        """The step that training went on from, 0 for its start; None where it did not come to training."""
        found = re.search(r"going on from step (\d+)", self.log)
        return int(found[1]) if found else 0 if "{'loss': " in self.log else None

    def reached(self) -> int:
        """The last optimiser step of a job that logs every one."""
        return (self.begun() or 0) + self.log.count("{'loss': ")


@dataclass
class Worker:
    """The first machine of a posted job, with a disk that may survive a restart or not."""

    spec: dict  # CustomJobSpec as it was posted
    disk: Path
    bucket: FaultyBucket
    job_id: str = "4711"
    environment: dict[str, str] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)

    def variables(self) -> dict[str, str]:
        """What the platform sets, for the first replica of the first pool."""
        base = self.spec["baseOutputDirectory"]["outputUriPrefix"].rstrip("/")
        pools = {
            f"workerpool{i}": [f"127.0.0.1:{2222 + i}" for _ in range(int(pool["replicaCount"]))]
            for i, pool in enumerate(self.spec["workerPoolSpecs"])
        }
        container = self.spec["workerPoolSpecs"][0]["containerSpec"]
        return {
            **{e["name"]: e["value"] for e in container.get("env", [])},
            "AIP_MODEL_DIR": f"{base}/model/",
            "AIP_CHECKPOINT_DIR": f"{base}/checkpoints/",
            "AIP_TENSORBOARD_LOG_DIR": f"{base}/logs/",
            "CLUSTER_SPEC": json.dumps(
                {"cluster": pools, "environment": "cloud", "task": {"type": "workerpool0", "index": 0}}
            ),
            "CLOUD_ML_JOB_ID": self.job_id,
            "CLOUD_ML_PROJECT_ID": "project",
        }

    def start(
        self, signal_name: str = "", when: Callable[["Worker"], bool] = lambda worker: False, limit: float = 180.0
    ) -> Start:
        """Run the entry point to its end, within `limit` seconds; once `when` holds, the signal is sent."""
        self.disk.mkdir(parents=True, exist_ok=True)
        self.log, self.began = self.disk.with_name(f"{self.disk.name}-{len(self.starts)}.log"), time.monotonic()
        self.trained_at, self.left_over = None, self.partial_uploads() | self.partial_saves()
        arguments = self.spec["workerPoolSpecs"][0]["containerSpec"]["args"]
        env = os.environ | {
            "STORAGE_EMULATOR_HOST": self.bucket.address, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "1",
            "TMPDIR": str(self.disk), "PYTHONUNBUFFERED": "1",
        } | self.variables() | self.environment  # fmt: skip
        where = ""
        with self.log.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *arguments],
                stdout=log,
                stderr=log,
                env=env,
                cwd=ROOT,
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    if signal_name and not where and when(self):
                        process.send_signal(getattr(signal, signal_name))
                        where = self.phase()
                    assert self.alive_for() < limit, f"still runs after {limit:.0f} s:\n{self.log.read_text()[-3000:]}"
                    time.sleep(0.003)
            finally:  # what is left of a machine that was taken away, or that hangs
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        ended = Start(process.returncode, signal_name if where else "", where, self.log.read_text())
        self.starts.append(ended)
        return ended

    def training_for(self) -> float:
        """Seconds since the trainer's first sign of life in this start; below 0 before."""
        if self.trained_at is None and re.search(r"it/s|s/it|going on from", self.log.read_text()):
            self.trained_at = time.monotonic()
        return -1.0 if self.trained_at is None else time.monotonic() - self.trained_at

    def steps(self) -> int:
        """Optimiser steps of the run that are behind this start."""
        return Start(0, "", "", self.log.read_text()).reached()

    def alive_for(self) -> float:
        """Seconds since this start."""
        return time.monotonic() - self.began

    def partial_uploads(self) -> set[str]:
        """Checkpoints in the bucket whose marker is missing."""
        folders = {name.rpartition("/")[0] for name in self.bucket.names() if "/checkpoint-" in name}
        return {folder for folder in folders if f"{folder}/UPLOADED.json" not in self.bucket.names()}

    def partial_saves(self) -> set[str]:
        """Checkpoints on disk that the trainer has not finished."""
        return {
            str(c) for c in self.disk.glob("arciva-job/checkpoints/*/checkpoint-*") if not (c / "COMPLETE").exists()
        }

    def uploading(self) -> bool:
        return bool(self.partial_uploads() - self.left_over)

    def saving(self) -> bool:
        return bool(self.partial_saves() - self.left_over)

    def phase(self) -> str:
        """Where this start is, in a word."""
        log = self.log.read_text()
        if "train_runtime" in log or "model_output is there already" in log:
            return "after training"
        if self.training_for() < 0:
            return "before training"
        return "in a save" if self.saving() else "in an upload" if self.uploading() else "between saves"
