"""Run other people's packages, each in an environment of its own, with and without paging, and compare what they say.

    python scripts/check_integrations.py MODEL.gguf              # all: downloads about 1 GB from PyPI, takes 15 minutes on 2 cores
    python scripts/check_integrations.py MODEL.gguf outlines     # those whose names begin so

MODEL is one that talks: scripts/make_talking_model.py OUT --experts 8. The llama-cpp-python of this Python is copied, not built again.
The programs are in tests/integrations. Prints the table of docs/integrations.md; the exit code is 1 where something is not as it should be.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "integrations"
BUDGET = "25%"
TIMEOUT_S = 300
FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())"


@dataclass(frozen=True, slots=True)
class Check:
    """One package: what to install and what a user types. {model}, {programs}, {home}, {url} and {port} are filled in.

    With a `server` that is started, and the command is its client. `versions` are the packages whose versions are told.
    """

    name: str
    install: tuple[str, ...]
    versions: tuple[str, ...]
    command: tuple[str, ...]
    prepare: tuple[str, ...] = ()
    server: tuple[str, ...] = ()
    path: str = "/v1"
    files: tuple[tuple[str, str], ...] = ()
    is_sampled: bool = False
    """The package leaves the seed to chance: answers need not be the same."""


def _program(name: str, *arguments: str) -> tuple[str, ...]:
    return ("python", f"{{programs}}/{name}.py", *(arguments or ("{model}",)))


_SERVE = ("gguf-pager", "serve", "{model}", "--budget", BUDGET, "-c", "512", "--port", "{port}", "--no-progress")
_RUN = ("gguf-pager", "run", "--budget", BUDGET, "--")
_OPENAI_MODELS = "- model_id: talk\n  model_name: any\n  api_base: {url}\n"

CHECKS = (
    Check("LangChain", ("langchain-community",), ("langchain-community", "langchain-core"), _program("langchain_chat")),
    Check("LlamaIndex", ("llama-index-llms-llama-cpp",), ("llama-index-llms-llama-cpp", "llama-index-core"), _program("llama_index_chat")),
    Check("Haystack", ("llama-cpp-haystack",), ("llama-cpp-haystack", "haystack-ai"), _program("haystack_chat")),
    Check("outlines", ("outlines[llamacpp]",), ("outlines",), _program("outlines_schema")),
    Check("guidance", ("guidance",), ("guidance",), _program("guidance_choice")),
    Check("instructor, Llama in the program", ("instructor",), ("instructor",), _program("instructor_local")),
    Check("instructor, at `gguf-pager serve`", ("instructor", "{wheel}[server]"), ("instructor", "openai"),
          _program("instructor_objects", "{url}"), server=_SERVE),
    Check("openai, at `gguf-pager serve`", ("openai", "{wheel}[server]"), ("openai",), _program("openai_client", "{url}"), server=_SERVE),
    Check("llama_cpp.server", ("llama-cpp-python[server]", "openai"), ("llama-cpp-python", "openai"),
          _program("openai_client", "{url}", "--plain-fields"),
          server=(*_RUN, "python", "-m", "llama_cpp.server", "--model", "{model}", "--n_ctx", "512", "--port", "{port}")),
    Check("llm, llm-gguf", ("llm", "llm-gguf"), ("llm", "llm-gguf"), ("llm", "-m", "gguf/talk", "What is the capital of France?"),
          prepare=("llm", "gguf", "register-model", "talk", "{model}", "--n-ctx", "512"), is_sampled=True),
    Check("llm, llm-llama-cpp", ("llm", "llm-llama-cpp"), ("llm", "llm-llama-cpp"),
          ("llm", "-m", "gguf", "-o", "path", "{model}", "-o", "n_ctx", "512", "-o", "max_tokens", "12", "The capital of France is"),
          files=(("llama-cpp/models.json", "{{}}"),), is_sampled=True),
    Check("llm, at `gguf-pager serve`", ("llm", "{wheel}[server]"), ("llm",),
          ("llm", "-m", "talk", "-o", "temperature", "0", "-o", "max_tokens", "24", "What is the capital of France?"),
          server=_SERVE, files=(("extra-openai-models.yaml", _OPENAI_MODELS),)),
    Check("Jupyter", ("nbconvert", "ipykernel"), ("nbconvert", "ipykernel"),
          ("jupyter", "nbconvert", "--to", "markdown", "--execute", "--stdout", "{programs}/notebook.ipynb")),
    Check("gunicorn, 2 workers", ("gunicorn",), ("gunicorn",), ("python", "-c", FETCH, "{url}"), path="/",
          server=(*_RUN, "gunicorn", "-w", "2", "-b", "127.0.0.1:{port}", "--chdir", "{programs}", "worker_app:wsgi")),
    Check("uvicorn, 2 workers", ("uvicorn",), ("uvicorn",), ("python", "-c", FETCH, "{url}"), path="/",
          server=(*_RUN, "uvicorn", "--workers", "2", "--port", "{port}", "--app-dir", "{programs}", "worker_app:asgi")),
)


@dataclass(slots=True)
class Result:
    """What came of a check; `wrong` is empty where all is as it should be."""

    name: str
    versions: str
    wrong: list[str] = dataclasses.field(default_factory=list)
    compared: str = "not compared"
    n_opened: int = 0
    seconds: float = 0.0

    def row(self) -> str:
        """Return it as a line of a table."""
        return f"| {self.name} | {self.versions} | {'; '.join(self.wrong) or 'yes'} | {self.compared} |"


class Environment:
    """A virtual environment with this llama-cpp-python, this gguf_pager and what a check installs."""

    def __init__(self, folder: Path, wheel: Path, model: Path) -> None:
        self.bin, self._wheel, self._report = folder / "bin", wheel, folder / "report"
        self.words = {"model": str(model), "programs": str(PROGRAMS), "home": str(folder / "home"), "wheel": str(wheel)}
        if not (self.bin / "python").exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=TIMEOUT_S)
            (site,) = (folder / "lib").glob("python*/site-packages")
            for source in engine_folders():
                shutil.copytree(source, site / source.name)
        shutil.rmtree(folder / "home", ignore_errors=True)
        (folder / "home").mkdir()
        self._report.unlink(missing_ok=True)

    def install(self, requirements: tuple[str, ...]) -> None:
        """Install from PyPI; what llama-cpp-python itself requires is taken from there, too."""
        wanted = [each.format(**self.words) for each in requirements]
        needed = [each for each in importlib.metadata.requires("llama_cpp_python") or [] if "extra ==" not in each]
        self.call("pip", "install", "-q", *needed, str(self._wheel), *wanted)
        self.call("pip", "install", "-q", "--no-deps", "--force-reinstall", str(self._wheel))

    def versions(self, names: tuple[str, ...]) -> str:
        """Return packages and their versions, as installed."""
        found = json.loads(self.call("pip", "list", "--format", "json"))
        version = {re.sub("[-_.]+", "-", each["name"]).lower(): each["version"] for each in found}
        return ", ".join(f"{name} {version[name]}" for name in names)

    def variables(self, is_plain: bool) -> dict[str, str]:
        """Return the environment of a program: whether weights are left as they are, or what is paged is written down."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GGUF_PAGER_", "INTEGRATION_"))}
        kept |= {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(PROGRAMS / "watch"), "LLM_USER_PATH": self.words["home"],
                 "INTEGRATION_MODEL": self.words["model"], "PIP_DISABLE_PIP_VERSION_CHECK": "1", "GGUF_PAGER_CACHE": self.words["home"],
                 "TOKENIZERS_PARALLELISM": "false", "HAYSTACK_TELEMETRY_ENABLED": "False"}
        return kept | ({"INTEGRATION_PLAIN": "1"} if is_plain else {"INTEGRATION_REPORT": str(self._report)})

    def filled(self, words: tuple[str, ...]) -> list[str]:
        """Return a command with everything filled in."""
        return [word.format(**self.words) if word != FETCH else word for word in words]

    def call(self, *command: str, is_plain: bool | None = None) -> str:
        """Run a command and return what it says on stdout; ValueError with the end of what it complains about."""
        variables = self.variables(bool(is_plain))
        if is_plain is None:
            del variables["PYTHONPATH"]
        done = subprocess.run([str(self.bin / command[0]), *command[1:]], capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
                              env=variables)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
            raise ValueError(f"{command[0]} ended with {done.returncode}: {last}")
        return done.stdout

    @contextmanager
    def serving(self, command: tuple[str, ...], path: str) -> Iterator[None]:
        """Run a server for the time of the block."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.words["port"] = str(free.getsockname()[1])
        self.words["url"] = f"http://127.0.0.1:{self.words['port']}{path}"
        first, *rest = self.filled(command)
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen([str(self.bin / first), *rest], env=self.variables(is_plain=False), stdout=said, stderr=said)
            try:
                if not self._answers(process):
                    said.seek(0)
                    raise ValueError(f"the server did not start: {(said.read().strip().splitlines() or ['nothing said'])[-1]}")
                yield
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                finally:
                    process.kill()

    def _answers(self, process: subprocess.Popen[bytes]) -> bool:
        for _ in range(240):
            if process.poll() is not None:
                return False
            try:
                urllib.request.urlopen(self.words["url"], timeout=60).close()
                return True
            except urllib.error.HTTPError:
                return True
            except OSError:
                time.sleep(0.5)
        return False

    def n_opened(self) -> int:
        """Return how many models were opened paged."""
        lines = self._report.read_text().splitlines() if self._report.exists() else []
        return sum(json.loads(line)["what"] == "opened" for line in lines)


def engine_folders() -> list[Path]:
    """Return the folders of the llama-cpp-python of this Python: the package and what pip knows of it."""
    spec = importlib.util.find_spec("llama_cpp")
    files = importlib.metadata.distribution("llama_cpp_python").files or []
    known = next(Path(str(file.locate())).parent for file in files if file.name == "METADATA")
    assert spec is not None and spec.origin is not None
    return [Path(spec.origin).parent, known]


def build(folder: Path) -> Path:
    """Build a wheel of this checkout, of a copy of it, and return where it is."""
    for name in ("gguf_pager", "native"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in ROOT.iterdir():
        if path.suffix in (".toml", ".py", ".md", ".in") or path.name == "LICENSE":
            shutil.copy(path, folder / "source")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(folder / "source")], check=True)
    return next(folder.glob("*.whl"))


def run(check: Check, environment: Environment) -> Result:
    """Install a package and run its program; failures are in the result."""
    result, begun = Result(check.name, "?"), time.monotonic()
    try:
        environment.install(check.install)
        result.versions = environment.versions(check.versions)
        if check.prepare:
            environment.call(*environment.filled(check.prepare))
        said = _serve(check, environment) if check.server else _compare(check, environment, result)
        if "Paris" not in said:
            result.wrong.append(f"no sense in {said[:100]!r}")
        result.n_opened = environment.n_opened()
        if not result.n_opened:
            result.wrong.append("not paged")
    except (ValueError, subprocess.TimeoutExpired) as error:
        result.wrong.append(" ".join(str(error).split())[:300])
    result.seconds = time.monotonic() - begun
    return result


def _write_files(check: Check, environment: Environment) -> None:
    for name, text in check.files:
        path = Path(environment.words["home"]) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(**environment.words))


def _serve(check: Check, environment: Environment) -> str:
    with environment.serving(check.server, check.path):
        _write_files(check, environment)
        return environment.call(*environment.filled(check.command), is_plain=None)


def _compare(check: Check, environment: Environment, result: Result) -> str:
    _write_files(check, environment)
    command = environment.filled(check.command)
    said = environment.call(*_RUN, *command, is_plain=False)
    if check.is_sampled:
        result.compared = "sampled: not compared"
        return said
    try:
        plain = environment.call(*command, is_plain=True)
    except ValueError as error:
        result.compared = f"plain: {error}"
        return said
    result.compared = "the same" if plain == said else "other than plain"
    if plain != said:
        result.wrong.append("other text than plain")
    return said


def main() -> int:
    """Check what was asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(check.name for check in CHECKS))
    parser.add_argument("--environments", type=Path, metavar="FOLDER", help="keep the environments here, and take those that are here")
    given = parser.parse_intermixed_args()
    if not given.model.is_file():
        parser.error(f"{given.model} is no file: make one with scripts/make_talking_model.py {given.model} --experts 8")
    chosen = [check for check in CHECKS
              if not given.names or any(check.name.lower().startswith(name.lower()) for name in given.names)]
    results = []
    with tempfile.TemporaryDirectory(prefix="gguf_pager-integrations-") as name:
        folder = Path(name)
        wheel = build(folder)
        for check in chosen:
            place = (given.environments or folder).resolve() / re.sub(r"\W+", "-", check.name).strip("-")
            environment = Environment(place, wheel, given.model.resolve())
            results.append(run(check, environment))
            print(f"{check.name}: {'; '.join(results[-1].wrong) or 'as it should be'}, {results[-1].seconds:.0f} s", file=sys.stderr, flush=True)
            if given.environments is None:
                shutil.rmtree(place)
    print(f"| with | versions | works, paged | text beside plain |\n|---|---|---|---|\n{chr(10).join(result.row() for result in results)}")
    return int(any(result.wrong for result in results) or not results)


if __name__ == "__main__":
    sys.exit(main())
