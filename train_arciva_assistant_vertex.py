"""Train the Arciva assistant inside a Vertex AI custom job, or submit that job.

    python train_arciva_assistant_vertex.py --data gs://bucket/pairs.jsonl --output gs://bucket/run    what a job runs
    python train_arciva_assistant_vertex.py submit --project P --region R --staging-bucket gs://bucket --image I --epochs 2
    python train_arciva_assistant_vertex.py submit … --dry-run > job.yaml                              the same job for gcloud

Any setting of the notebook's Config is a flag, of a job and of `submit` alike. Inside a job the platform's variables are the
defaults: AIP_MODEL_DIR (--output), AIP_CHECKPOINT_DIR, AIP_TENSORBOARD_LOG_DIR, AIP_TRAINING_DATA_URI or GCS_BUCKET_NAME with
GCS_BLOB_NAME (--data). Wherever a place is named, gs://bucket/path, /gcs/bucket/path and a local path will do.

Exit codes: 0 done; 1 something that may pass (the platform starts the job again); 2 something to put right (one sentence says
what, FATAL.json keeps it, and replays of the same job end at once); 143 stopped by SIGTERM, the same command goes on.
"""

import argparse
import base64
import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

# torch and the notebook's module are imported late: a replay of a failed job must end within a second.

CHUNK_BYTES = 16 << 20  # of a resumable upload; a failed chunk is sent again, not the file
RETRY_SECONDS, RETRY_DELAY = 300.0, 1.0  # transient bucket errors: for how long, and the first wait, which doubles
FATAL_SECONDS = 10.0  # that a failed process gives the first one to say why; torchrun kills after 30
MARKER, FATAL, RESULT = "UPLOADED.json", "FATAL.json", "COMPLETE.json"
CLOUD_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
RESULT_FOLDERS = {"output_dir": "model_output", "merged_dir": "final_merged_model", "reports_dir": "reports"}


class JobError(Exception):
    """What a user can put right, found before or without the notebook's module; ends like its ArcivaError."""


class Unavailable(Exception):
    """What may pass by itself: the job ends with 1 and the platform starts it again."""


# --- Places: a bucket or a folder, with the same six methods ----------------------------------------------------------


def checksum(file: Path) -> str:
    """CRC32C of a file in the base64 form that a bucket reports."""
    import google_crc32c

    total = google_crc32c.Checksum()
    with Path(file).open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return base64.b64encode(total.digest()).decode()


@functools.cache
def storage_client():
    """One client per process; credentials and STORAGE_EMULATOR_HOST are the library's own affair."""
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    try:
        return storage.Client(project=None)
    except DefaultCredentialsError as error:
        raise JobError(
            f"no Google credentials: {error}; run `gcloud auth application-default login`, or give the job a service account"
        ) from error


def patience():
    """The client's own retry of transient errors, with our limits; 403 and 404 are not transient."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(RETRY_SECONDS).with_delay(initial=RETRY_DELAY, maximum=30.0, multiplier=2.0)


def passing(error: Exception) -> bool:
    """Whether an error of authentication is only the metadata or token server not answering."""
    from google.auth.exceptions import TransportError

    return getattr(error, "retryable", False) or isinstance(error.__cause__ or error, TransportError)


def lost_session(error: Exception) -> bool:
    """Whether only a resumable upload's own address is gone; a missing bucket is already told by the first request."""
    request = getattr(getattr(error, "response", None), "request", None)
    return error.code in (404, 410) and getattr(request, "method", None) == "PUT"


class Bucket:
    """A place below gs://bucket/prefix."""

    def __init__(self, bucket: str, prefix: str = ""):
        self.bucket, self.prefix = bucket, prefix.strip("/")

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.prefix}".rstrip("/")

    def at(self, *parts: str) -> "Bucket":
        return Bucket(self.bucket, "/".join(filter(None, [self.prefix, *parts])))

    def blob(self, name: str, **options):
        return storage_client().bucket(self.bucket).blob("/".join(filter(None, [self.prefix, name])), **options)

    @contextlib.contextmanager
    def naming(self, action: str) -> Iterator[None]:
        """Turn permanent errors into one sentence with the bucket's name; what may pass stays what it is."""
        from google.api_core import exceptions as api
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.storage.exceptions import DataCorruption

        try:
            yield
        except (api.Forbidden, api.Unauthorized) as error:
            raise JobError(
                f"bucket {self.bucket}: not allowed to {action} ({error.code}); grant this account roles/storage.objectUser there"
            ) from error
        except api.NotFound as error:
            raise JobError(
                f"bucket {self.bucket}: cannot {action}, not found (404); check the bucket and the path"
            ) from error
        except api.PreconditionFailed:
            raise
        except (api.RetryError, api.ServerError, api.TooManyRequests, DataCorruption) as error:
            raise Unavailable(
                f"bucket {self.bucket}: cannot {action}, tried for {RETRY_SECONDS:.0f} s: {error}"
            ) from error
        except api.ClientError as error:
            raise JobError(f"bucket {self.bucket}: cannot {action}: {error.message}; check the address") from error
        except GoogleAuthError as error:
            kind = Unavailable if passing(error) else JobError
            raise kind(
                f"bucket {self.bucket}: cannot {action}: {error}; check the account that this runs as"
            ) from error
        except api.GoogleAPICallError as error:  # an answer that the client has no class for
            raise Unavailable(f"bucket {self.bucket}: cannot {action}: {error}") from error

    def files(self) -> dict[str, str]:
        """Checksum of everything below, by name; the bucket must exist."""
        start = f"{self.prefix}/" if self.prefix else ""
        with self.naming(f"list {self}"):
            listed = storage_client().list_blobs(self.bucket, prefix=start, retry=patience())
            return {b.name[len(start) :]: b.crc32c for b in listed if not b.name.endswith("/")}

    def find(self, name: str) -> str | None:
        """Checksum of one object, None where there is none; a missing bucket is an error all the same."""
        with self.naming(f"read {self.at(name)}"):
            blob = storage_client().bucket(self.bucket).get_blob(self.blob(name).name, retry=patience())
            if blob is None:
                list(storage_client().list_blobs(self.bucket, prefix=self.prefix, max_results=1, retry=patience()))
            return blob.crc32c if blob else None

    def download(self, name: str, target: Path) -> None:
        """One object to disk; appears under its name only when it is whole and its checksum is right."""
        from google.cloud.storage.exceptions import DataCorruption

        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        with self.naming(f"read {self.at(name)}"):
            for last in (False, False, True):
                try:
                    blob = self.blob(name)
                    blob.reload(retry=patience())
                    blob.download_to_filename(str(part), checksum="crc32c", retry=patience())
                    if checksum(part) == blob.crc32c:
                        break
                except DataCorruption:
                    pass
                if last:
                    part.unlink(missing_ok=True)
                    raise Unavailable(f"{self.at(name)} arrived with a wrong checksum three times")
        part.replace(target)

    def upload(self, file: Path, name: str) -> None:
        """One file into the bucket, in resumable chunks where it is large, compared by checksum afterwards."""
        from google.api_core.exceptions import GoogleAPICallError

        with self.naming(f"write {self.at(name)}"):
            blob = self.blob(name, chunk_size=CHUNK_BYTES)
            for last in (False, False, True):
                try:
                    blob.upload_from_filename(str(file), checksum="crc32c", retry=patience())
                    break
                except GoogleAPICallError as error:
                    if not lost_session(error):
                        raise
                    if last:
                        raise Unavailable(f"{self.at(name)}: the upload's session was lost three times") from error
        if blob.crc32c != checksum(file):
            raise Unavailable(f"{self.at(name)} was stored with checksum {blob.crc32c}, expected {checksum(file)}")

    def read(self, name: str) -> str | None:
        """Text of one object, None where there is none."""
        if self.find(name) is None:
            return None
        with self.naming(f"read {self.at(name)}"):
            return self.blob(name).download_as_bytes(checksum="crc32c", retry=patience()).decode()

    def write(self, name: str, text: str, *, only_new: bool = False) -> None:
        """Text into one object; `only_new` refuses one that exists and is different, also when two jobs race."""
        from google.api_core.exceptions import PreconditionFailed

        condition = {"if_generation_match": 0} if only_new else {}
        try:
            with self.naming(f"write {self.at(name)}"):
                self.blob(name).upload_from_string(text, "application/json", retry=patience(), **condition)
        except PreconditionFailed as error:
            if self.read(name) != text:  # the same text: our own first try, whose answer was lost
                raise JobError(
                    f"{self.at(name)} exists already; nothing is overwritten, choose another place"
                ) from error

    def delete(self, name: str) -> None:
        with self.naming(f"delete {self.at(name)}"):
            self.blob(name).delete(retry=patience())


class Folder:
    """A place on this machine."""

    def __init__(self, root: Path):
        self.root = Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def at(self, *parts: str) -> "Folder":
        return Folder(self.root.joinpath(*parts))

    def files(self) -> dict[str, str]:
        return {str(p.relative_to(self.root)): checksum(p) for p in sorted(self.root.rglob("*")) if p.is_file()}

    def find(self, name: str) -> str | None:
        return checksum(self.root / name) if (self.root / name).is_file() else None

    def download(self, name: str, target: Path) -> None:
        if (self.root / name).absolute() == target.absolute():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        shutil.copyfile(self.root / name, part)
        part.replace(target)

    def upload(self, file: Path, name: str) -> None:
        Folder(file.parent).download(file.name, self.root / name)

    def read(self, name: str) -> str | None:
        return (self.root / name).read_text(encoding="utf-8") if (self.root / name).is_file() else None

    def write(self, name: str, text: str, *, only_new: bool = False) -> None:
        if only_new and self.read(name) not in (None, text):
            raise JobError(f"{self.at(name)} exists already; nothing is overwritten, choose another place")
        self.root.mkdir(parents=True, exist_ok=True)
        part = self.root / f".{name}.{os.getpid()}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(self.root / name)

    def delete(self, name: str) -> None:
        (self.root / name).unlink()


Place = Bucket | Folder


def place_of(address: str) -> Place:
    """gs://bucket/path and its mounted form /gcs/bucket/path are one bucket; anything else is a folder here.

    The mounted form goes through the client as well: a mount renames without atomicity and checks no sums.
    """
    match = re.match(r"(?:gs://|/gcs/)([^/]+)/?(.*)", address)
    if match:
        return Bucket(match[1], match[2])
    if address.startswith(("gs:", "/gcs")):
        raise JobError(f"{address!r} names no bucket; expected gs://bucket/path")
    return Folder(Path(address).expanduser())


# --- Folders as a whole: additive, checksummed, marker last -----------------------------------------------------------


def upload_folder(folder: Path, place: Place, **facts: str) -> None:
    """Bring `place` up to the state of `folder`: what is there already stays, the marker with all checksums comes last."""
    local = {n: c for n, c in Folder(folder).files().items() if n != MARKER and not Path(n).name.startswith(".")}
    marker = json.dumps({**facts, "files": local}, indent=1, sort_keys=True)
    stored = place.files()
    for name, sum_ in local.items():
        if stored.get(name) != sum_:
            place.upload(folder / name, name)
    if MARKER not in stored or place.read(MARKER) != marker:
        place.write(MARKER, marker)


def uploaded(place: Place, stored: Mapping[str, str] | None = None) -> dict | None:
    """The marker of a folder that is in `place` as a whole; None where an upload was cut short or is being replaced."""
    stored = place.files() if stored is None else stored
    marker = json.loads(place.read(MARKER) or "null") if MARKER in stored else None
    whole = marker and all(stored.get(name) == sum_ for name, sum_ in marker["files"].items())
    return marker if whole else None


def download_folder(place: Place, marker: dict, folder: Path, *, last: str = "") -> None:
    """Fetch what `marker` lists and `folder` lacks; the file `last` is there only when all others are."""
    local = Folder(folder).files()
    missing = [name for name, sum_ in marker["files"].items() if local.get(name) != sum_]
    if missing and last:
        (folder / last).unlink(missing_ok=True)
        missing = [*(n for n in missing if n != last), last]
    for name in missing:
        place.download(name, folder / name)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def step_of(checkpoint: str) -> int:
    return int(checkpoint.rpartition("-")[2])


def below(stored: Mapping[str, str], folder: str) -> dict[str, str]:
    """The part of a listing that lies in one folder, by names within it."""
    return {n.removeprefix(f"{folder}/"): c for n, c in stored.items() if n.startswith(f"{folder}/")}


def whole_checkpoints(place: Place) -> dict[str, dict[str, dict]]:
    """Markers of all checkpoints that were uploaded to their end: run → checkpoint → marker, the oldest first."""
    stored, found = place.files(), {}
    for name in stored:
        match = re.fullmatch(rf"([^/]+)/(checkpoint-\d+)/{MARKER}", name)
        if not match:
            continue
        if marker := uploaded(place.at(match[1], match[2]), below(stored, f"{match[1]}/{match[2]}")):
            found.setdefault(match[1], {})[match[2]] = marker
    return {run: dict(sorted(c.items(), key=lambda item: step_of(item[0]))) for run, c in found.items()}


def restore_checkpoints(place: Place, folder: Path) -> None:
    """Bring the newest whole checkpoint of every run to disk, with the best one that it refers to.

    Training would go on without its best one, and end with the last adapter in its place; so both come, or neither.
    """
    for run, checkpoints in whole_checkpoints(place).items():
        for newest in reversed(checkpoints):
            state = json.loads(place.at(run, newest).read("trainer_state.json"))
            best = Path(state.get("best_model_checkpoint") or newest).name
            if best in checkpoints:
                for name in dict.fromkeys((best, newest)):
                    fetch_checkpoint(place.at(run, name), checkpoints[name], folder / run / name)
                break
            print(f"{place.at(run, newest)} is passed over: {best}, the best one so far, is not there")


def fetch_checkpoint(place: Place, marker: dict, folder: Path) -> None:
    """Fetch one checkpoint; the best one that it refers to is named by its path on this disk."""
    download_folder(place, marker, folder, last="COMPLETE")
    file = folder / "trainer_state.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    best = state.get("best_model_checkpoint")
    if best and best != (here := str(folder.with_name(Path(best).name))):
        file.write_text(json.dumps({**state, "best_model_checkpoint": here}, indent=2) + "\n", encoding="utf-8")


def prune_checkpoints(place: Place, best: str, keep: int) -> None:
    """Delete all but the newest `keep` whole checkpoints of one run and the best; only on the explicit flag.

    What is newer than those stays, whole or not. The marker goes first, so that what is half deleted is never taken for whole.
    """
    stored = place.files()
    names = sorted({name.split("/")[0] for name in stored if name.startswith("checkpoint-")}, key=step_of)
    whole = [name for name in names if uploaded(place.at(name), below(stored, name))]
    for checkpoint in names[: names.index(whole[-keep:][0])] if whole else []:
        if checkpoint != best:
            for name in sorted(below(stored, checkpoint), key=lambda n: n != MARKER):
                place.at(checkpoint).delete(name)


def mirror_callback(checkpoints: Place, logs: Place | None, log_folder: Path, keep: int):
    """A trainer callback that uploads every complete checkpoint as it is saved, and TensorBoard's files beside it."""
    from transformers import TrainerCallback

    class Mirror(TrainerCallback):
        def __init__(self):
            self.sent_at, self.sent = time.monotonic(), {}

        def on_train_begin(self, args, state, control, **kwargs):
            if (
                state.global_step
            ):  # an upload that was cut short would wait for the next save, and then cost two intervals
                self.on_save(args, state, control)

        def on_save(self, args, state, control, **kwargs):
            if not state.is_world_process_zero:
                return
            folder, newest = Path(args.output_dir), f"checkpoint-{state.global_step}"
            best = Path(state.best_model_checkpoint or newest).name
            for name in dict.fromkeys((best, newest)):  # the best first: the newest refers to it
                if name == newest or not uploaded(checkpoints.at(folder.name, name)):
                    upload_folder(folder / name, checkpoints.at(folder.name, name))
            print(f"checkpoint of step {state.global_step:,} is in {checkpoints.at(folder.name)}", flush=True)
            if keep:
                prune_checkpoints(checkpoints.at(folder.name), best, keep)
            self.send_logs(state)

        def on_log(self, args, state, control, **kwargs):
            if time.monotonic() - self.sent_at > 30:  # seconds; often enough to watch, rare enough to cost nothing
                self.send_logs(state)

        def on_train_end(self, args, state, control, **kwargs):
            self.send_logs(state)

        def send_logs(self, state) -> None:
            self.sent_at = time.monotonic()
            if logs and state.is_world_process_zero:
                for name, sum_ in Folder(log_folder).files().items():
                    if self.sent.get(name) != sum_:
                        logs.upload(log_folder / name, name)
                        self.sent[name] = sum_

    return Mirror()


# --- Data, base model, token ------------------------------------------------------------------------------------------


def data_sources(flag: str | None, env: Mapping[str, str]) -> list[str]:
    """Addresses of the training data, by precedence: the flag, the bucket variables, the platform's; or none."""
    bucket, blob = (None, None) if flag else (env.get("GCS_BUCKET_NAME"), env.get("GCS_BLOB_NAME"))
    if bool(bucket) != bool(blob):
        raise JobError("GCS_BUCKET_NAME and GCS_BLOB_NAME belong together; set both, or give --data")
    if bucket:
        return [f"gs://{bucket.removeprefix('gs://').strip('/')}/{blob}"]
    named = flag or env.get("AIP_TRAINING_DATA_URI") or ""
    return [part.strip() for part in named.split(",") if part.strip()]


def expand(source: str) -> list[tuple[Place, str]]:
    """The files behind an address: one file, a pattern with *, or every JSONL file of a folder."""
    whole = place_of(source)
    parent, _, name = source.rstrip("/").rpartition("/")
    if isinstance(whole, Bucket) and not whole.prefix:
        parent, name = source, ""
    place = place_of(parent or ("/" if source.startswith("/") else "."))
    if "*" in parent:
        raise JobError(f"{source!r}: * is understood in the last part of an address only")
    if "*" in name:
        found = [(place, n) for n in sorted(place.files()) if "/" not in n and fnmatch(n, name)]
    elif name and not source.endswith("/") and place.find(name):
        found = [(place, name)]
    else:
        found = [(whole, n) for n in sorted(whole.files()) if n.endswith(".jsonl")]
    if not found:
        raise JobError(f"no data at {source}: expected a JSONL file, or a folder with *.jsonl in it")
    return found


def fetch_data(sources: Sequence[str], folder: Path) -> str:
    """Local paths of all sources, as Config takes them; web addresses are left to the loader."""
    paths = []
    for source in sources:
        if re.match(r"https?://", source):
            paths.append(source)
            continue
        for place, name in expand(source):
            address = hashlib.sha256(str(place.at(name)).encode()).hexdigest()[:8]
            target = folder / address / Path(name).name.replace(",", "_")
            if isinstance(place, Folder):
                target = place.root / name
            elif not target.is_file() or checksum(target) != place.find(name):
                place.download(name, target)
                print(f"data          {place.at(name)}, {target.stat().st_size / 2**20:.1f} MiB")
            paths.append(str(target))
    return ",".join(paths)


# Settings that may name a folder in a bucket → the file that such a folder has.
FOLDER_SETTINGS = {"base_model": "config.json", "compare_to": "predictions.jsonl"}


def fetch_folder(address: str, folder: Path, needed: str) -> str:
    """A local path for a folder that lies in a bucket; names and paths stay as they are."""
    if not address.startswith(("gs://", "/gcs/")):
        return address
    place = place_of(address)
    target = folder / Path(place.prefix or place.bucket).name
    files = place.files()
    if needed not in files:
        raise JobError(f"{place} is not what was expected: a folder with {needed}; check the address")
    download_folder(place, {"files": files}, target)
    return str(target)


def read_secret(name: str) -> str:
    """The newest version of a secret, by `projects/P/secrets/S` or, within the job's project, by S alone."""
    from google.api_core.exceptions import ClientError, GoogleAPIError, TooManyRequests, from_http_response
    from google.auth import default
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import AuthorizedSession

    def ask(address: str, credentials):
        answer = AuthorizedSession(credentials).get(address, timeout=30)
        if not answer.ok:
            raise from_http_response(answer)
        return answer.json()["payload"]["data"]

    override = os.environ.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER")  # gcloud's own name for it
    try:
        credentials, project = (AnonymousCredentials(), None) if override else default(scopes=[CLOUD_SCOPE])
        project = os.environ.get("CLOUD_ML_PROJECT_ID") or project
        path = name if name.startswith("projects/") else f"projects/{project}/secrets/{name}"
        path += "" if "/versions/" in path else "/versions/latest"
        address = f"{(override or 'https://secretmanager.googleapis.com/').rstrip('/')}/v1/{path}:access"
        return base64.b64decode(patience()(ask)(address, credentials)).decode().strip()
    except GoogleAuthError as error:
        kind = Unavailable if passing(error) else JobError
        raise kind(f"secret {name}: {error}; give the job a service account that may read it") from error
    except GoogleAPIError as error:
        if isinstance(error, ClientError) and not isinstance(error, TooManyRequests):
            raise JobError(
                f"secret {path}: {error.code.value}; create it, and grant roles/secretmanager.secretAccessor"
            ) from error
        raise Unavailable(f"secret {path}: {error}") from error


# --- Inside a job -----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A wrong flag is an error like any other: one sentence, and FATAL.json inside a job."""

    def error(self, message: str):
        raise JobError(f"{message}; --help lists every flag")


def job_parser() -> argparse.ArgumentParser:
    """Flags of a job: its places, and every setting of Config but the folders, which the job chooses."""
    from transformers import HfArgumentParser

    import arciva_assistant_poc as arciva

    class JobParser(Parser, HfArgumentParser):
        pass

    parser = JobParser(
        arciva.Config, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser.add_argument("--stages", nargs="+", choices=arciva.STAGES, default=list(arciva.STAGES), help="what to run")
    add_place_flags(parser)
    return parser


def add_place_flags(parser: argparse.ArgumentParser) -> None:
    """Where a job reads and writes; the platform's variables are the defaults."""
    parser.add_argument("--output", help="results go here; default AIP_MODEL_DIR, else vertex_output")
    parser.add_argument("--checkpoints", help="default AIP_CHECKPOINT_DIR, else checkpoints below --output")
    parser.add_argument("--logs", help="TensorBoard files; default AIP_TENSORBOARD_LOG_DIR, else none")
    parser.add_argument("--work", help="local disk; default arciva-job in the temporary folder")
    parser.add_argument("--keep-checkpoints", type=int, default=0, help="newest checkpoints to keep; 0 deletes nothing")
    parser.add_argument("--hub-token-secret", help="name of the secret that holds the hub token")


def parse_job(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict]:
    """(places and stages, settings for Config that were given)."""
    given = vars(job_parser().parse_args(list(arguments)))
    names = ("stages", "output", "checkpoints", "logs", "work", "keep_checkpoints", "hub_token_secret")
    options = argparse.Namespace(**{name: given.pop(name) for name in names})
    folders = sorted(name for name in given if name.endswith("_dir"))
    if folders:
        raise JobError(f"{', '.join(folders)}: a job chooses its local folders; say with --output where results go")
    if options.keep_checkpoints < 0:
        raise JobError(f"--keep-checkpoints is {options.keep_checkpoints}, expected 0 (all) or a number above")
    return options, given


def output_place(arguments: Sequence[str]) -> Place:
    """Where results, and before all else FATAL.json, are: found without parsing the other flags."""
    quick = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    quick.add_argument("--output")
    with contextlib.suppress(argparse.ArgumentError, SystemExit):
        if address := quick.parse_known_args(list(arguments))[0].output:
            return place_of(address)
    return place_of(os.environ.get("AIP_MODEL_DIR") or "vertex_output")


def job_key(arguments: Sequence[str]) -> str:
    """What tells a replay from a new try: the platform's job, else command, environment and code."""
    if job := os.environ.get("CLOUD_ML_JOB_ID"):
        return job
    env = sorted((k, v) for k, v in os.environ.items() if k.startswith(("AIP_", "GCS_")))
    digest = hashlib.sha256(json.dumps([list(arguments), env]).encode())
    for file in (Path(__file__), Path(__file__).with_name("arciva_assistant_poc.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def earlier_end(output: Place, key: str) -> int | None:
    """Exit code of this very job if it has ended for good before, with the reason printed.

    Only the platform replays a failed job. Elsewhere the same command is a new try, whose data may have been mended.
    """
    fatal = json.loads(output.read(FATAL) or "{}") if "CLOUD_ML_JOB_ID" in os.environ else {}
    if fatal.get("job") == key:
        print(
            f"error: {fatal['reason']}\n(a replay: {output.at(FATAL)} says so; mend it and submit anew)",
            file=sys.stderr,
        )
        return 2
    if json.loads(output.read(RESULT) or "{}").get("job") == key:
        print(f"this job is complete: {output}; give another --output to train again")
        return 0
    return None


def is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def first_on_this_machine() -> Iterator[None]:
    """Let one process of each machine fetch files while the others wait, and find them there."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from accelerate import PartialState

    import arciva_assistant_poc as arciva

    with PartialState(cpu=arciva.detect_hardware().device == "cpu").local_main_process_first():
        yield


def leave_fatal(output: Place, key: str, reason: str) -> None:
    """Keep the reason where replays of this job find it; a bucket that refuses even that is only reported.

    torchrun stops all processes once one has ended. So nothing stops the writing, and others let the first one write before.
    """
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    until = time.monotonic() + (0.0 if is_first_process() else FATAL_SECONDS)
    try:
        while time.monotonic() < until and json.loads(output.read(FATAL) or "{}").get("job") != key:
            time.sleep(0.2)
        if is_first_process() or time.monotonic() >= until:
            output.write(FATAL, json.dumps({"job": key, "reason": reason}, indent=1))
    except (JobError, Unavailable, OSError) as error:
        print(f"{FATAL} could not be left: {error}", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, previous)


def torchrun_command(cluster: dict, gpus: int, arguments: Sequence[str]) -> list[str] | None:
    """The torchrun call for CLUSTER_SPEC and the GPUs of this machine; None where one process is all there is."""
    pools = sorted(
        (name, hosts) for name, hosts in cluster.get("cluster", {}).items() if name in ("workerpool0", "workerpool1")
    )
    hosts = [host for _, members in pools for host in members]
    nodes, task = max(1, len(hosts)), cluster.get("task", {"type": "workerpool0", "index": 0})
    if nodes * max(1, gpus) == 1 or task["type"] not in ("workerpool0", "workerpool1"):
        return None
    first = len(dict(pools).get("workerpool0", [])) if task["type"] == "workerpool1" else 0
    address, _, port = (hosts[0] if hosts else "127.0.0.1:29500").partition(":")
    rendezvous = {
        "nnodes": nodes,
        "node-rank": first + int(task["index"]),
        "master-addr": address,
        "master-port": port or 29500,
    }
    flags = [f"--{name}={value}" for name, value in {**rendezvous, "nproc-per-node": max(1, gpus)}.items()]
    return [sys.executable, "-m", "torch.distributed.run", *flags, str(Path(__file__).resolve()), *arguments]


def processes_asked(env: Mapping[str, str]) -> int | None:
    """Processes per machine that NPROC_PER_NODE asks for, None where it does not."""
    text = env.get("NPROC_PER_NODE")
    if text and not re.fullmatch(r"[1-9]\d*", text):
        raise JobError(f"NPROC_PER_NODE is {text!r}, expected a number above 0")
    return int(text) if text else None


def launch_cluster(arguments: Sequence[str]) -> None:
    """Become torchrun where there are several GPUs or machines and it has not started us already."""
    processes = processes_asked(os.environ) or len(glob.glob("/dev/nvidia[0-9]*"))
    command = torchrun_command(json.loads(os.environ.get("CLUSTER_SPEC") or "{}"), processes, arguments)
    if command and "RANK" not in os.environ:
        parse_job(arguments)  # a wrong flag is told once, before many processes start
        print(shlex.join(command), flush=True)
        os.execv(command[0], command)


def configure_job(options: argparse.Namespace, settings: dict, work: Path, key: str):
    """The notebook's Config for a job: what lies in a bucket is fetched to `work`, and results are written below it."""
    if options.hub_token_secret:
        os.environ["HF_TOKEN"] = read_secret(options.hub_token_secret)
    if options.logs:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(work / "logs")
        settings.setdefault("report_to", "tensorboard")
    with first_on_this_machine():
        if sources := data_sources(settings.pop("data", None), os.environ):
            settings["data"] = fetch_data(sources, work / "data")
        for name in FOLDER_SETTINGS.keys() & settings.keys():
            settings[name] = fetch_folder(settings[name], work / name, FOLDER_SETTINGS[name])

    import arciva_assistant_poc as arciva

    folders = {name: str(work / key / folder) for name, folder in RESULT_FOLDERS.items()}
    hardware = arciva.detect_hardware()
    config, reason = arciva.configure(hardware, **settings, **folders, checkpoint_dir=str(work / "checkpoints"))
    if arciva.is_nano(config.base_model) and hardware.device == "cuda" and settings.get("base_model", "auto") == "auto":
        raise Unavailable(reason)  # a notebook goes on with the nano base; a paid job waits for the hub
    print(f"base model    {reason}\ntraining      {arciva.settings_line(config)}", flush=True)
    return config


def train_stage(options: argparse.Namespace, config, work: Path, output: Place) -> dict[str, object]:
    """The notebook's training, with checkpoints brought from and to the bucket."""
    import arciva_assistant_poc as arciva

    address = options.checkpoints or os.environ.get("AIP_CHECKPOINT_DIR") or str(output.at("checkpoints"))
    if config.resume == "auto":
        with first_on_this_machine():
            restore_checkpoints(place_of(address), Path(config.checkpoint_dir))
    logs = options.logs and place_of(options.logs)
    mirror = mirror_callback(place_of(address), logs, work / "logs", options.keep_checkpoints)
    return arciva.run_pipeline(config, ["train"], callbacks=[mirror])


def run_job(arguments: Sequence[str], output: Place, key: str) -> dict[str, object]:
    """The pipeline between a download and an upload: the notebook's stages, with their files brought from and to `output`."""
    options, settings = parse_job(arguments)
    options.logs = options.logs or os.environ.get("AIP_TENSORBOARD_LOG_DIR")
    work = Path(options.work or Path(tempfile.gettempdir()) / "arciva-job")
    result = json.loads(output.read(RESULT) or "null")
    if result and "train" in options.stages:
        raise JobError(
            f"{output} holds the result of job {result['job']}; nothing is overwritten, choose another --output"
        )
    config = configure_job(options, settings, work, key)

    import arciva_assistant_poc as arciva

    written, trained = {}, uploaded(output.at(RESULT_FOLDERS["output_dir"]))
    if trained and (trained.get("job") == key or "train" not in options.stages):
        with first_on_this_machine():
            fetch_results(output, config)
    if "train" in options.stages and not (trained and trained.get("job") == key):
        written |= train_stage(options, config, work, output)
        publish_results(output, config, key)  # from here on a restart goes on behind the training
    if later := [stage for stage in options.stages if stage != "train"]:
        try:
            written |= arciva.run_pipeline(config, later)
        finally:  # a model that a threshold refuses still has reports to look at
            publish_results(output, config, key)
    if is_first_process():
        output.write(RESULT, json.dumps({"job": key, "stages": options.stages}), only_new="train" in options.stages)
    return {**written, "uploaded to": output}


def publish_results(output: Place, config, key: str) -> None:
    """Upload what the stages wrote so far; the adapter last, because its marker says that training is over."""
    for name, folder in reversed(RESULT_FOLDERS.items()):
        if is_first_process() and Path(getattr(config, name)).is_dir():
            upload_folder(Path(getattr(config, name)), output.at(folder), job=key)


def fetch_results(output: Place, config) -> None:
    """Bring back what an earlier start of this job, or an earlier job, has finished."""
    for name, folder in RESULT_FOLDERS.items():
        if marker := uploaded(output.at(folder)):
            download_folder(output.at(folder), marker, Path(getattr(config, name)))
            print(f"{folder} is there already: {output.at(folder)}", flush=True)


def job_main(arguments: Sequence[str]) -> int:
    """Exit code of a job; see the top of this file."""
    # Outside training nothing is lost; as process 1 it would be ignored.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    try:
        output, key = output_place(arguments), job_key(arguments)
        ended = earlier_end(output, key)
    except (JobError, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, JobError) else 1
    if ended is not None:
        return ended
    try:
        launch_cluster(arguments)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        leave_fatal(output, key, str(error))
        return 2
    return run_and_explain(arguments, output, key)


def run_and_explain(arguments: Sequence[str], output: Place, key: str) -> int:
    """Exit code of the pipeline; where a start would only fail again, the reason is left for replays."""
    import arciva_assistant_poc as arciva

    reasons = []

    def run() -> dict[str, object]:
        try:
            return run_job(arguments, output, key)
        except (JobError, arciva.ArcivaError) as error:
            if isinstance(error.__cause__, OSError) and "connect" in str(error.__cause__):
                raise Unavailable(str(error)) from error  # transformers could not reach the hub
            reasons.append(str(error))
            raise arciva.ArcivaError(str(error)) from error
        except Exception as error:
            if arciva.disk_full(error):
                reasons.append("the disk is full; take a larger --boot-disk-gb")
            raise

    try:
        code = arciva.run_main(run)
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if code == 2:
        leave_fatal(output, key, reasons[0] if reasons else "the GPU ran out of memory")
    return code


# --- Submission -------------------------------------------------------------------------------------------------------

# Machine → accelerators it can carry. G2, A2 and A3 machines have a fixed number built in; N1 takes a choice.
# https://cloud.google.com/vertex-ai/docs/training/configure-compute
N1_GPUS = {
    "NVIDIA_TESLA_T4": {4: 1, 8: 1, 16: 1, 32: 2, 64: 4, 96: 4},
    "NVIDIA_TESLA_V100": {4: 1, 8: 1, 16: 2, 32: 4, 64: 8, 96: 8},
}  # accelerator → {vCPUs: fewest GPUs}
BUILT_IN_GPUS = {
    **{f"g2-standard-{cpus}": ("NVIDIA_L4", 1) for cpus in (4, 8, 12, 16, 32)},
    **{f"g2-standard-{24 * n}": ("NVIDIA_L4", 2 * n) for n in (1, 2, 4)},
    **{f"a2-highgpu-{n}g": ("NVIDIA_TESLA_A100", n) for n in (1, 2, 4, 8)},
    "a2-megagpu-16g": ("NVIDIA_TESLA_A100", 16),
    **{f"a2-ultragpu-{n}g": ("NVIDIA_A100_80GB", n) for n in (1, 2, 4, 8)},
    **{f"a3-highgpu-{n}g": ("NVIDIA_H100_80GB", n) for n in (1, 2, 4, 8)},
}
CPU_MACHINES = {
    f"{kind}-{cpus}"
    for kind, counts in {
        "n1-standard": (1, 2, 4, 8, 16, 32, 64, 96),
        "n1-highmem": (2, 4, 8, 16, 32, 64, 96),
        "n1-highcpu": (2, 4, 8, 16, 32, 64, 96),
        "n2-standard": (2, 4, 8, 16, 32, 48, 64, 80, 96, 128),
        "n2-highmem": (2, 4, 8, 16, 32, 48, 64, 80, 96, 128),
        "n2-highcpu": (2, 4, 8, 16, 32, 48, 64, 80, 96),
        "e2-standard": (2, 4, 8, 16, 32),
        "e2-highmem": (2, 4, 8, 16),
        "e2-highcpu": (2, 4, 8, 16, 32),
        "c2-standard": (4, 8, 16, 30, 60),
    }.items()
    for cpus in counts
}  # that Compute Engine has; https://cloud.google.com/compute/docs/general-purpose-machines
SECRET_NAME = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|API_?KEY|PRIVATE_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"^(hf_|ghp_|github_pat_|sk-|AIza)|://[^/@\s]+:[^/@\s]+@|X-Goog-Signature=|BEGIN [A-Z ]*PRIVATE KEY"
)


def machine_spec(machine: str, accelerator: str | None, count: int | None) -> dict:
    """The machine with its accelerators, or one sentence why the two do not go together."""
    if machine in BUILT_IN_GPUS:
        kind, number = BUILT_IN_GPUS[machine]
        if accelerator not in (None, kind) or count not in (None, number):
            raise JobError(
                f"{machine} carries {number} x {kind}, got {count or number} x {accelerator or kind}; leave both out"
            )
        return {"machineType": machine, "acceleratorType": kind, "acceleratorCount": number}
    if machine not in CPU_MACHINES:
        raise JobError(
            f"unknown machine {machine!r}; expected one of {', '.join(BUILT_IN_GPUS)}, or an n1, n2, e2 or c2 machine"
            " with as many CPUs as it comes with, such as n1-standard-8"
        )
    if accelerator is None:
        return {"machineType": machine}
    fewest = N1_GPUS.get(accelerator, {}).get(int(machine.rpartition("-")[2])) if machine.startswith("n1-") else None
    number = count or fewest
    if (
        fewest is None
        or number < fewest
        or number not in (1, 2, 4, 8)
        or (number == 8 and accelerator == "NVIDIA_TESLA_T4")
    ):
        raise JobError(
            f"{machine} cannot carry {number or 1} x {accelerator}; T4 and V100 go with n1 machines"
            + (f", here {fewest} or more" if fewest else "; L4, A100 and H100 come with g2, a2 and a3 machines")
        )
    return {"machineType": machine, "acceleratorType": accelerator, "acceleratorCount": number}


def seconds_of(text: str) -> int:
    """Seconds of `4h`, `90m`, `5400s` or `5400`; a week is the most the platform gives."""
    match = re.fullmatch(r"(\d+)([hms]?)", text)
    seconds = int(match[1]) * {"h": 3600, "m": 60, "s": 1, "": 1}[match[2]] if match else 0
    if not 0 < seconds <= 7 * 86400:
        raise JobError(f"timeout {text!r}: expected a time such as 4h or 90m, at most 168h")
    return seconds


def named_values(pairs: Sequence[str], flag: str) -> dict[str, str]:
    """NAME=VALUE flags as a dict; secrets are refused, because a job spec can be read by everyone in the project."""
    values = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise JobError(f"{flag} {pair!r}: expected NAME=VALUE")
        if SECRET_VALUE.search(value) or (flag == "--env" and SECRET_NAME.search(name)):
            raise JobError(
                f"{flag} {name}: looks like a secret; put it into Secret Manager and give --hub-token-secret its name"
            )
        if flag == "--label" and not (
            re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", name) and re.fullmatch(r"[a-z0-9_-]{0,63}", value)
        ):
            raise JobError(f"--label {pair!r}: expected lower-case letters, digits, _ and -, at most 63 each")
        values[name] = value
    return values


def submit_parser() -> argparse.ArgumentParser:
    """Flags of the submission; everything else goes to the job."""
    parser = Parser(
        prog="train_arciva_assistant_vertex.py submit", allow_abbrev=False,
        description="Submit the training job. Flags that are not listed here are the job's own, such as --data or --epochs.",
    )  # fmt: skip
    parser.add_argument("--project", required=True)
    parser.add_argument("--region", required=True, help="such as europe-west4")
    parser.add_argument(
        "--staging-bucket", required=True, help="gs://bucket for results and uploaded data, in that region"
    )
    parser.add_argument("--image", required=True, help="training container, built from deploy/vertex/Dockerfile")
    parser.add_argument("--machine", default="g2-standard-12", help="default g2-standard-12, which carries one L4")
    parser.add_argument("--accelerator", help="for n1 machines, such as NVIDIA_TESLA_T4; others bring theirs")
    parser.add_argument("--accelerator-count", type=int)
    parser.add_argument("--replicas", type=int, default=1, help="machines; more than one start under torchrun")
    parser.add_argument("--boot-disk-gb", type=int, default=200, help="holds base model, checkpoints and merged model")
    parser.add_argument(
        "--spot", action="store_true", help="cheaper machines that may be taken away; the job goes on by itself"
    )
    parser.add_argument("--timeout", default="6h", help="the platform's own default of 7 days is never used")
    parser.add_argument("--disable-retries", action="store_true", help="one failure ends the job")
    parser.add_argument("--service-account", help="account that the job runs as")
    parser.add_argument("--tensorboard", help="Vertex TensorBoard instance to stream to; needs --service-account")
    parser.add_argument("--label", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--display-name", help="default arciva-<date and time>")
    parser.add_argument(
        "--base-output-dir", help="default <staging bucket>/<display name>; an earlier job's goes on from it"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="show the log and wait for the end; without it the command returns at once",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the job as YAML for gcloud, submit nothing")
    return parser


def build_job_spec(options: argparse.Namespace, arguments: Sequence[str]) -> dict:
    """The one place that knows what a job looks like: a CustomJobSpec in the REST form that gcloud and the SDK share."""
    machine = machine_spec(options.machine, options.accelerator, options.accelerator_count)
    if options.machine in ("a3-highgpu-1g", "a3-highgpu-2g", "a3-highgpu-4g") and not options.spot:
        raise JobError(f"{options.machine} is given as a spot machine only; add --spot, or take a3-highgpu-8g")
    if options.tensorboard and not options.service_account:
        raise JobError("--tensorboard needs --service-account: the platform streams under that account")
    if options.replicas < 1 or not options.base_output_dir.startswith("gs://"):
        raise JobError("expected --replicas of 1 or more and a --base-output-dir that starts with gs://")
    environment = [{"name": n, "value": v} for n, v in named_values(options.env, "--env").items()]
    container = {"imageUri": options.image, "args": list(arguments)} | ({"env": environment} if environment else {})
    pool = {
        "machineSpec": machine, "replicaCount": 1, "diskSpec": {"bootDiskSizeGb": options.boot_disk_gb}, "containerSpec": container,
    }  # fmt: skip
    spec = {
        "workerPoolSpecs": [pool] + ([{**pool, "replicaCount": options.replicas - 1}] if options.replicas > 1 else []),
        "scheduling": {
            "timeout": f"{seconds_of(options.timeout)}s",
            "strategy": "SPOT" if options.spot else "STANDARD",
            "disableRetries": options.disable_retries,
            "restartJobOnWorkerRestart": options.replicas > 1 and not options.disable_retries,
        },
        "baseOutputDirectory": {"outputUriPrefix": options.base_output_dir},
    }
    optional = {"serviceAccount": options.service_account, "tensorboard": options.tensorboard}
    return spec | {name: value for name, value in optional.items() if value}


def as_yaml(spec: dict, options: argparse.Namespace) -> str:
    """The spec as `gcloud ai custom-jobs create --config` takes it, with that command on top."""
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data) -> bool:
            return True

    labels = ",".join(f"{n}={v}" for n, v in named_values(options.label, "--label").items())
    command = [*gcloud("create", options), f"--display-name={options.display_name}", "--config=job.yaml"]
    command += [f"--labels={labels}"] if labels else []
    return f"# {shlex.join(command)}\n" + yaml.dump(spec, Dumper=Plain, sort_keys=False, width=120)


def gcloud(action: str, options: argparse.Namespace) -> list[str]:
    """gcloud's call for an action on custom jobs, or on one: `cancel 4711`."""
    return [*f"gcloud ai custom-jobs {action}".split(), f"--project={options.project}", f"--region={options.region}"]


def prepare_data(options: argparse.Namespace, arguments: list[str]) -> list[str]:
    """Check the job's data with the notebook's own loader; bring local files to the bucket. Returns the job's arguments."""
    import arciva_assistant_poc as arciva

    _, settings = parse_job(arguments)
    environment = named_values(options.env, "--env")
    gpus = machine_spec(options.machine, options.accelerator, options.accelerator_count).get("acceleratorCount", 1)
    arciva.check_config(arciva.Config(**settings), processes=options.replicas * (processes_asked(environment) or gpus))
    for name in FOLDER_SETTINGS.keys() & settings.keys():
        folder = Path(settings[name])
        if folder.exists() and not folder.resolve().is_relative_to(Path(__file__).resolve().parent / "data"):
            raise JobError(f"--{name} {folder} lies on this machine; copy it to the bucket and give its gs:// address")
    sources = data_sources(settings.get("data"), environment)
    with tempfile.TemporaryDirectory() as folder:
        paths = fetch_data(sources, Path(folder)) if sources else arciva.Config().data
        examples, _ = arciva.load_examples(paths)
        splits, _ = arciva.split_examples(examples, settings.get("seed", arciva.Config().seed))
    sides = ", ".join(f"{side} {len(rows):,}" for side, rows in splits.items())
    print(f"data checked: {len(examples):,} examples ({sides})", file=sys.stderr)
    local = [source for source in sources if isinstance(place_of(source), Folder) and "://" not in source]
    if not local:
        return arguments
    addresses = [s for s in sources if s not in local]
    for place, name in (found for source in local for found in expand(source)):
        target = place_of(options.base_output_dir).at(
            "data", hashlib.sha256(place.find(name).encode()).hexdigest()[:12]
        )
        if not options.dry_run:
            target.upload(place.root / name, Path(name).name)
        addresses.append(str(target.at(Path(name).name)))
    print(
        f"data comes from {', '.join(addresses)}" + (" (not uploaded: dry run)" if options.dry_run else ""),
        file=sys.stderr,
    )
    return replace_flag(arguments, "--data", ",".join(addresses))


def replace_flag(arguments: Sequence[str], flag: str, value: str) -> list[str]:
    """The arguments with one flag's value changed, in both of its spellings."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != flag and not argument.startswith(f"{flag}="):
            kept.append(argument)
        skip = argument == flag and not skip
    return [*kept, f"{flag}={value}"]


def submit_job(spec: dict, options: argparse.Namespace) -> int:
    """Hand the spec to the platform by its SDK; with --follow, stay until the job ends. Returns the exit code."""
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
    from google.cloud import aiplatform
    from google.cloud.aiplatform_v1.types import CustomJobSpec

    place = {"project": options.project, "location": options.region, "staging_bucket": options.staging_bucket}
    if endpoint := os.environ.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM"):  # gcloud's own name for it
        place |= {"api_endpoint": endpoint.rstrip("/"), "api_transport": "rest", "credentials": AnonymousCredentials()}
    typed = CustomJobSpec.from_json(json.dumps(spec))
    rules = {
        "service_account": typed.service_account or None,
        "tensorboard": typed.tensorboard or None,
        "timeout": int(typed.scheduling.timeout.total_seconds()),
        "scheduling_strategy": typed.scheduling.strategy,
        "disable_retries": typed.scheduling.disable_retries,
        "restart_job_on_worker_restart": typed.scheduling.restart_job_on_worker_restart,
    }
    try:
        aiplatform.init(**place)
        job = aiplatform.CustomJob(
            display_name=options.display_name,
            worker_pool_specs=list(typed.worker_pool_specs),
            base_output_dir=options.base_output_dir,
            labels=named_values(options.label, "--label") or None,
        )
        job.submit(**rules)
    except DefaultCredentialsError as error:
        raise JobError(f"no Google credentials: {error}; run `gcloud auth application-default login`") from error
    except (GoogleAPICallError, GoogleAuthError) as error:
        raise JobError(f"project {options.project}, region {options.region} refuse the job: {error}") from error
    number = job.resource_name.rpartition("/")[2]
    print(f"submitted     {job.resource_name}\nresults       {options.base_output_dir.rstrip('/')}/model")
    print(f"logs          {shlex.join(gcloud(f'stream-logs {number}', options))}", flush=True)
    return follow(job, options) if options.follow else 0


def follow(job, options: argparse.Namespace) -> int:
    """Stay until a job ends, with its states and its log; the user may stop looking, which leaves the job alone."""
    number = job.resource_name.rpartition("/")[2]
    try:
        with streamed(gcloud(f"stream-logs {number}", options)):
            wait_for_end(job)
    except KeyboardInterrupt:
        cancel = shlex.join(gcloud(f"cancel {number}", options))
        print(f"no longer followed; the job goes on. To end it: {cancel}", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def streamed(command: Sequence[str]) -> Iterator[None]:
    """Let gcloud print a job's log meanwhile, where it is installed; it has a moment for the last lines."""
    stream, moment = subprocess.Popen(command) if shutil.which(command[0]) else None, POLL_SECONDS
    try:
        yield
    except KeyboardInterrupt:
        moment = 0.0
        raise
    finally:
        if stream:
            with contextlib.suppress(subprocess.TimeoutExpired):
                stream.wait(moment)
            stream.terminate()
            stream.wait()


def wait_for_end(job) -> None:
    """Print each new state of a job until it ends; anything but success is an error. A poll that may pass is repeated."""
    from google.api_core.exceptions import ClientError, GoogleAPIError, TooManyRequests
    from google.auth.exceptions import GoogleAuthError

    state = None
    while True:
        try:
            found = job.state.name
        except (GoogleAPIError, GoogleAuthError) as error:
            refused = isinstance(error, ClientError) and not isinstance(error, TooManyRequests)
            if refused or (isinstance(error, GoogleAuthError) and not passing(error)):
                raise JobError(f"cannot ask for the job's state: {error}; the job goes on") from error
            print(f"{time.strftime('%H:%M:%S')}      no answer, asking again: {error}", file=sys.stderr, flush=True)
            found = state
        if found and found != state:
            state = found
            print(f"{time.strftime('%H:%M:%S')}      {state.removeprefix('JOB_STATE_').lower()}", flush=True)
        if state == "JOB_STATE_SUCCEEDED":
            return
        if state in ("JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED"):
            raise JobError(
                f"the job ended as {state.removeprefix('JOB_STATE_').lower()}: {job.error or 'see its logs'}"
            )
        time.sleep(POLL_SECONDS)


POLL_SECONDS = 20.0


def submit_main(arguments: Sequence[str]) -> int:
    """Exit code of a submission: 0, 2 after one sentence on what to put right, 130 when the user stopped following."""
    try:
        options, job_arguments = submit_parser().parse_known_args(list(arguments))
        if not options.staging_bucket.startswith("gs://"):
            raise JobError(f"--staging-bucket {options.staging_bucket!r}: expected gs://bucket")
        options.display_name = options.display_name or time.strftime("arciva-%Y%m%d-%H%M%S")
        options.base_output_dir = (
            options.base_output_dir or f"{options.staging_bucket.rstrip('/')}/{options.display_name}"
        )
        named_values(options.label, "--label")  # cheap mistakes first, before the data is read
        build_job_spec(options, job_arguments)
        spec = build_job_spec(options, check_job(options, job_arguments))
        if not options.dry_run:
            return submit_job(spec, options)
        print(as_yaml(spec, options), end="")
    except (JobError, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_job(options: argparse.Namespace, arguments: list[str]) -> list[str]:
    """`prepare_data`, with the notebook's errors told as ours."""
    import arciva_assistant_poc as arciva

    if any(SECRET_VALUE.search(part) for a in arguments for part in (a, a.partition("=")[2])):
        raise JobError(
            "among the flags is what looks like a secret, such as a hub token; put it into Secret Manager and give --hub-token-secret its name"
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the job's YAML alone
            return prepare_data(options, arguments)
    except arciva.ArcivaError as error:
        raise JobError(str(error)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    return submit_main(arguments[1:]) if arguments[:1] == ["submit"] else job_main(arguments)


if __name__ == "__main__":
    sys.exit(main())
