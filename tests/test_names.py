"""What people write for a model is found: folders, Hugging Face's names, Ollama's and LM Studio's; and what is not is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_site
import make_zoo
import pytest
from conftest import ARGUMENTS, some_tokens

import gguf_pager
from gguf_pager import LayoutError, PagerError
from gguf_pager.model import hub, names
from gguf_pager.model.variants import choose, labels, variants_of

ROOT = Path(__file__).resolve().parent.parent
Model = Callable[..., Path]


# ---- models among files -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("file", "label"), (
    ("Qwen3-30B-A3B-Q4_K_M.gguf", "Q4_K_M"), ("Qwen3.Q8_0.gguf", "Q8_0"), ("x.i1-IQ3_XXS.gguf", "IQ3_XXS"),
    ("gpt-oss-20b-mxfp4.gguf", "MXFP4"), ("x-UD-Q4_K_XL-00001-of-00003.gguf", "UD-Q4_K_XL"), ("BF16/x-00001-of-00002.gguf", "BF16"),
    ("x-f16.gguf", "F16"), ("Q8/Q4_0/model-q5_1.gguf", "Q5_1"), ("llama-Q4_0_4_4.gguf", "Q4_0_4_4"), ("ggml-model.gguf", None),
    ("FAQ4_you.gguf", None), ("x-MXFP4_MOE.gguf", "MXFP4_MOE"), ("dir/x-IQ4_KS.gguf", "IQ4_KS"),
))
def test_quantisation_is_what_the_name_says(file: str, label: str | None) -> None:
    part = file.replace("00001-of", "00002-of")
    assert [variant.quantisation for variant in variants_of([part, file])] == [label]


def test_parts_make_one_model_and_helpers_none() -> None:
    found = variants_of([
        "a-00002-of-00002.gguf", "a-00001-of-00002.gguf", "a-00001-of-00003.gguf", "mmproj-a-F16.gguf", "a.mmproj-q8_0.gguf",
        "imatrix.gguf", "a.imatrix.gguf", "imatrix_x-Q8_0.gguf", "d-imatrix-Q4_K_M.gguf",
        "ggml-vocab-qwen2.gguf", "mtp-a.gguf", "._a.gguf", "README.md", "b/C.GGUF"])
    assert [(variant.files, variant.is_complete) for variant in found] == [
        (("a-00001-of-00002.gguf", "a-00002-of-00002.gguf"), True), (("a-00001-of-00003.gguf",), False), (("b/C.GGUF",), True),
        (("d-imatrix-Q4_K_M.gguf",), True)]


@pytest.mark.parametrize(("there", "taken"), (
    ("F16 Q8_0 Q4_K_M Q4_K_S", "Q4_K_M"), ("BF16 mxfp4", "MXFP4"), ("Q8_0 Q6_K Q5_K_S Q5_K_M", "Q5_K_M"), ("F16 Q8_0", "Q8_0"),
    ("IQ2_XXS Q3_K_L Q2_K", "Q3_K_L"), ("F32 BF16 IQ1_S", "IQ1_S"), ("Q4_K_S UD-Q4_K_XL", "UD-Q4_K_XL"),
))
def test_what_is_taken_when_nobody_asks(there: str, taken: str) -> None:
    found = variants_of(f"x-{label}.gguf" for label in there.split())
    assert choose(found, None, "x").quantisation == taken == labels(found)[0]
    for label in there.split():
        assert choose(found, label.lower(), "x").quantisation == label.upper()


def test_two_that_are_quantised_alike_have_to_be_named() -> None:
    found = variants_of(["x-Q4_K_M.gguf", "x-128k-Q4_K_M.gguf", "x-Q8_0.gguf"])
    for wanted in (None, "Q4_K_M"):
        with pytest.raises(LayoutError, match=r"name the file. It has: x-128k-Q4_K_M.gguf, x-Q4_K_M.gguf\."):
            choose(found, wanted, "someone/x")
    assert choose(found, "128k", "someone/x").name == "x-128k-Q4_K_M.gguf"
    with pytest.raises(LayoutError, match=r"someone/x has no Q2_K\. It has: Q4_K_M, Q8_0\."):
        choose(found, "Q2_K", "someone/x")


# ---- folders ----------------------------------------------------------------------------------------------------------

def test_folder_with_one_model_stands_for_it(zoo_model: Model, lora: Path, tmp_path: Path) -> None:
    whole, below = tmp_path / "whole", tmp_path / "below"
    (below / "Q4_K_M").mkdir(parents=True)
    whole.mkdir()
    shutil.copy(zoo_model("qwen3moe"), whole / "model.gguf")
    for helper in ("mmproj-model-f16.gguf", "README.md"):
        shutil.copy(lora, whole / helper)
    assert names.find(whole).path == whole / "model.gguf"
    shutil.copy(lora, whole / "a-lora.gguf")  # its header tells
    assert names.find(str(whole)).path == whole / "model.gguf"
    assert gguf_pager.read_layout(whole).paths == (whole / "model.gguf",)
    first = make_zoo.make_split(zoo_model("qwen3moe"), below / "Q4_K_M", 3)
    assert names.find(below).path == first == names.find(below / "Q4_K_M").path
    (tmp_path / "link").symlink_to(below)
    (tmp_path / "link.gguf").symlink_to(whole / "model.gguf")
    assert names.find(tmp_path / "link").path == tmp_path / "link" / "Q4_K_M" / first.name
    assert names.find(tmp_path / "link.gguf").path == tmp_path / "link.gguf"


def test_folder_without_one_or_with_several_is_refused(zoo_model: Model, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="is a folder without a GGUF model: give the path of a .gguf file"):
        names.find(tmp_path)
    for letter in "abcdefghij":
        shutil.copy(zoo_model("qwen3moe"), tmp_path / f"{letter}.gguf")
    with pytest.raises(LayoutError, match="stands for 10 models: name one of them. They are: a.gguf, b.gguf, .*, h.gguf and 2 more"):
        names.find(tmp_path)
    first = make_zoo.make_split(zoo_model("qwen3moe"), tmp_path, 3)
    shutil.move(first, tmp_path / "parts" if (tmp_path / "parts").mkdir() is None else "")
    with pytest.raises(LayoutError, match=r"holds only 1 of the 3 parts of .*: download the others, too"):
        names.find(tmp_path / "parts")


@pytest.mark.parametrize(("name", "message"), (
    ("no.gguf", r"no.gguf does not exist\.$"), ("a/no.gguf", r"a/no.gguf does not exist\.$"), ("", r"^ does not exist\.$"),
    ("x" * 300, "cannot be read: File name too long"), ("a\0b", "cannot be read"), ("a b/c", r"does not exist\.$"),
    ("Qwen/Qwen3-30B-A3B-GGUF:Q4_K_M", "If that is a repository of Hugging Face: hf:Qwen/Qwen3-30B-A3B-GGUF:Q4_K_M"),
    ("qwen3", "If that is a model of Ollama's: ollama:qwen3"),
    ("qwen3:30b", "If that is a model of Ollama's: ollama:qwen3:30b"),
))
def test_path_that_does_not_exist_is_a_value_error(name: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        names.find(name)
    with pytest.raises(ValueError, match=message):
        gguf_pager.Llama(name)


def test_file_that_is_called_like_a_name_goes_before_it(zoo_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ollama:qwen3", "hf:x"):
        Path(name).symlink_to(zoo_model("qwen3moe"))
        assert names.find(name).path == Path(name)
        Path(name).unlink()
        Path(name).symlink_to("nothing")
        with pytest.raises(LayoutError, match=f"{name} does not exist"):
            names.find(name)


def test_llama_opens_a_folder_and_keeps_a_path_as_it_was_written(zoo_model: Model, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(zoo_model("qwen3moe"))
    for written, model_path in ((tmp_path, str(tmp_path / "model.gguf")), (f"{tmp_path}/./model.gguf", f"{tmp_path}/./model.gguf")):
        with gguf_pager.Llama(written, budget="min", **ARGUMENTS) as llm:
            assert llm.model_path == model_path
            llm.eval(some_tokens(4))
            assert llm.pager.stats().misses > 0


# ---- names of Hugging Face --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "meant"), (
    ("hf:a/b", hub.HubName("a/b")), ("hf:a/b:Q4_K_M", hub.HubName("a/b", quantisation="Q4_K_M")), ("hf:a/b:latest", hub.HubName("a/b")),
    ("hf:a/b/c/d.gguf", hub.HubName("a/b", path="c/d.gguf")), ("hf.co/a/b:Q8_0", hub.HubName("a/b", quantisation="Q8_0")),
    ("huggingface.co/a/b", hub.HubName("a/b")), ("hf://a/b/", hub.HubName("a/b")),
    ("https://huggingface.co/a/b", hub.HubName("a/b")), ("https:/hf.co/a/b", hub.HubName("a/b")),
    ("https://huggingface.co/a/b/resolve/main/d%20e.gguf?download=true", hub.HubName("a/b", "main", "d e.gguf")),
    ("https://huggingface.co/a/b/blob/v1/c/d.gguf", hub.HubName("a/b", "v1", "c/d.gguf")),
    ("https://huggingface.co/a/b/tree/main", hub.HubName("a/b", "main")),
    ("https://huggingface.co/a/b/tree/main/Q4_K_M", hub.HubName("a/b", "main", "Q4_K_M")),
    ("a/b", None), ("model.gguf", None), ("ollama:a", None), ("/hf.co/a/b", None),
))
def test_names_of_hugging_face_are_understood(name: str, meant: hub.HubName | None) -> None:
    assert hub.parse(name) == meant


@pytest.mark.parametrize(("name", "message"), (
    ("hf:", "names no repository"), ("hf:b", "names no repository"), ("hf:b:Q4_K_M", "names no repository"),
    ("https://huggingface.co/a", "names no repository"), ("https:/example.org/a.gguf", "^https://example.org/a.gguf is no address of Hugging"),
))
def test_names_that_mean_nothing_there_are_refused(name: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        hub.parse(name)


@pytest.fixture(scope="module")
def site(zoo_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[hub_site.Site]:
    """`someone/model` has two quantisations, a projector, and a split model in a folder; the others have a trouble each."""
    folder = tmp_path_factory.mktemp("hub")
    plain, no_gguf, parts = folder / "plain", folder / "none", folder / "plain" / "Q6_K"
    parts.mkdir(parents=True)
    no_gguf.mkdir()
    (no_gguf / "model.safetensors").write_bytes(b"weights")
    for name in ("tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf", "mmproj-F16.gguf"):
        shutil.copy(zoo_model("qwen3moe"), plain / name)
    shutil.copy(zoo_model("qwen3moe"), folder / "tiny-Q6_K.gguf")
    make_zoo.make_split(folder / "tiny-Q6_K.gguf", parts, 3)
    incomplete = folder / "incomplete"
    incomplete.mkdir()
    shutil.copy(parts / "tiny-Q6_K-00001-of-00003.gguf", incomplete)
    made = hub_site.Site({
        "someone/model": hub_site.Repo(plain), "someone/gated": hub_site.Repo(plain, is_gated=True),
        "someone/private": hub_site.Repo(plain, token="hf_secret"), "someone/none": hub_site.Repo(no_gguf),
        "someone/huge": hub_site.Repo(plain, claimed_bytes=10**18), "someone/ill": hub_site.Repo(plain, status=503),
        "someone/forbidden": hub_site.Repo(plain, status=403), "someone/incomplete": hub_site.Repo(incomplete),
        "someone/cut": hub_site.Repo(plain, is_cut=True),
    })
    server = hub_site.serve(made)
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture
def environment(site: hub_site.Site, tmp_path: Path) -> dict[str, str]:
    """The environment of a process that asks our site, and begins with an empty cache."""
    site.asked.clear()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and not name.lower().endswith("_proxy")}
    return {**kept, "HF_ENDPOINT": site.url, "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}


FIND = """
import json, sys
from gguf_pager import PagerError
from gguf_pager.model import names
for name in sys.argv[1:]:
    try:
        found = names.find(name)
        print(json.dumps([str(found.path), found.note]))
    except PagerError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def found_in(environment: dict[str, str], *given: str, program: str = FIND) -> list[list[Any]]:
    """Look names up in a process of its own, since huggingface_hub looks at the environment once."""
    done = subprocess.run([sys.executable, "-c", program, *given], env=environment, capture_output=True, text=True, check=False,
                          cwd=environment["HOME"], timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_names_of_hugging_face_are_downloaded(site: hub_site.Site, environment: dict[str, str], zoo_model: Model) -> None:
    ways = ("hf:someone/model", "hf:someone/model:Q4_K_M", "hf:someone/model/tiny-Q4_K_M.gguf", "hf.co/someone/model:q4_k_m",
            f"{site.url}/someone/model/resolve/main/tiny-Q4_K_M.gguf")
    found = found_in(environment, *ways)
    path = Path(found[0][0])
    assert path.name == "tiny-Q4_K_M.gguf" and path.is_relative_to(Path(environment["HF_HOME"]) / "hub")
    assert path.read_bytes() == zoo_model("qwen3moe").read_bytes()
    assert found == [[str(path), "someone/model: Q4_K_M is taken; there is also Q6_K, Q8_0"], *([str(path), None] for _ in ways[1:])]
    assert site.downloads() == ["tiny-Q4_K_M.gguf"], "once, and nothing else"


@pytest.mark.parametrize("name", ("hf:someone/model:Q6_K", "hf:someone/model/Q6_K/tiny-Q6_K-00002-of-00003.gguf", "hf:someone/model/Q6_K"))
def test_split_model_comes_with_all_its_parts(site: hub_site.Site, environment: dict[str, str], name: str) -> None:
    ((path, note),) = found_in(environment, name)
    parts = [f"tiny-Q6_K-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    assert site.downloads() == parts and note is None and Path(path).name == parts[0]
    assert len(gguf_pager.read_layout(path).paths) == 3


def test_what_was_downloaded_is_found_without_a_network(site: hub_site.Site, environment: dict[str, str]) -> None:
    ((split, _), (whole, _)) = found_in(environment, "hf:someone/model:Q6_K", "hf:someone/model:Q8_0")
    site.asked.clear()
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    gone = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    for place, message in ((offline, "HF_HUB_OFFLINE forbids asking"), (gone, "http://127.0.0.1:9 cannot be reached")):
        found = found_in(place, "hf:someone/model:Q6_K", "hf:someone/model/tiny-Q8_0.gguf", "hf:someone/model", "hf:someone/other",
                         "hf:someone/model:Q4_K_M")
        assert found[:2] == [[split, None], [whole, None]]
        assert found[2] == [split, "someone/model: Q6_K is taken; there is also Q8_0"]
        assert found[3][0] == "PagerError" and message in found[3][1]
        assert found[4] == ["LayoutError", "What is in Hugging Face's cache of someone/model has no Q4_K_M. It has: Q6_K, Q8_0."]
    Path(split).with_name("tiny-Q6_K-00002-of-00003.gguf").unlink()
    ((kind, message),) = found_in(offline, "hf:someone/model:Q6_K")
    assert kind == "LayoutError" and "has only 2 of the 3 parts" in message
    assert not site.asked


@pytest.mark.parametrize(("name", "message"), (
    ("hf:someone/unknown", "There is no repository someone/unknown at http://127.0.0.1:"),
    ("hf:someone/private", "or it is private: check the name, or log in with hf auth login (or HF_TOKEN)."),
    ("hf:someone/gated", "someone/gated is open to those who have agreed to its terms: agree at http://127.0.0.1:"),
    ("hf:someone/forbidden", "does not let you have someone/forbidden: log in"), ("hf:someone/ill", "does not give someone/ill: try again later"),
    ("hf:someone/none", "has no GGUF model: look for a repository whose name ends with GGUF. It has files of other kinds: model.safetensors."),
    ("hf:someone/model:Q2_K", "someone/model has no Q2_K. It has: Q4_K_M, Q6_K, Q8_0."),
    ("hf:someone/model/no.gguf", "someone/model has no no.gguf. It has: Q6_K/tiny-Q6_K-00001-of-00003.gguf, tiny-Q4_K_M.gguf, "),
    ("hf:someone/model/resolve/v9/tiny-Q4_K_M.gguf", "someone/model has no revision v9"),
    ("hf:someone/incomplete", "someone/incomplete has only 1 of the 3 parts of tiny-Q6_K.gguf"),
    ("hf:someone/cut", "cannot be reached, or has stopped in the middle ("),
    ("hf:some one/--x..y", "cannot be a repository of Hugging Face"),
    ("hf:someone/huge", "someone/huge needs 1,000,000,000.0 GB, and "),
))
def test_what_cannot_be_had_is_said(environment: dict[str, str], name: str, message: str) -> None:
    ((kind, said),) = found_in(environment, name)
    assert message in said and "\n" not in said and said.endswith(".") and kind in ("PagerError", "LayoutError")


def test_token_opens_what_is_private(environment: dict[str, str]) -> None:
    ((path, _),) = found_in({**environment, "HF_TOKEN": "hf_secret"}, "hf:someone/private")
    assert Path(path).name == "tiny-Q4_K_M.gguf"


@pytest.mark.root
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a small disk")
def test_full_disk_is_said(environment: dict[str, str], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        ((kind, said),) = found_in({**environment, "HF_HOME": str(disk)}, "hf:someone/model")
        assert kind == "PagerError" and "someone/model needs 0.0 GB, and" in said
        lying = FIND.replace("for name", "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1, 0, 1 << 60)\nfor name")
        ((kind, said),) = found_in({**environment, "HF_HOME": str(disk)}, "hf:someone/model", program=lying)
        assert kind == "PagerError" and "There is no room left in" in said, "somebody else has filled it meanwhile"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_without_huggingface_hub_it_says_what_to_install(environment: dict[str, str]) -> None:
    ((kind, said),) = found_in(environment, "hf:someone/model", program="import sys; sys.modules['huggingface_hub'] = None" + FIND)
    assert (kind, said) == ("PagerError", "Models of Hugging Face need the package huggingface_hub: pip install 'gguf-pager[hf]'.")


# ---- everywhere a path works ------------------------------------------------------------------------------------------

OPEN = f"""
import json, sys, gguf_pager
arguments = dict({ARGUMENTS!r}, budget="min")
if sys.argv[1:]:
    llm = gguf_pager.Llama(sys.argv[1], **arguments)
else:
    llm = gguf_pager.Llama.from_pretrained("someone/model", "Q6_K/*-00001-of-*", additional_files=["Q6_K/*-0000%d-of-*" % n for n in (2, 3)],
                                           **arguments)
with llm:
    llm.eval([5, 6, 7])
    print(json.dumps([type(llm).__module__, llm.pager.stats().misses > 0, len(llm.pager.layout.paths), llm.model_path]))
"""


def test_llama_opens_names_and_from_pretrained_is_ours(environment: dict[str, str]) -> None:
    ((module, has_missed, n_files, path),) = found_in(environment, "hf:someone/model:Q6_K", program=OPEN)
    assert (module, has_missed, n_files) == ("gguf_pager.llama", True, 3) and os.path.exists(path)
    assert found_in(environment, program=OPEN) == [["gguf_pager.llama", True, 3, path]]


def call(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "gguf_pager", *words], env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, check=False, cwd=environment["HOME"], timeout=200)


def test_commands_take_names(environment: dict[str, str]) -> None:
    for words in (("inspect",), ("doctor",), ("run", "-p", "the rain", "-n", "2", "--budget", "min", "--json")):
        done = call(environment, *words[:1], "hf:someone/model", *words[1:])
        assert done.returncode == 0, done.stderr
        assert "someone/model: Q4_K_M is taken; there is also Q6_K, Q8_0.\n" in done.stderr
    assert json.loads(done.stdout)["model"] == "hf:someone/model"
    bench = call(environment, "bench", "hf:someone/model:Q6_K", "-p", "0", "-n", "4", "-r", "1", "--budget", "50%", "--baseline", "none",
                 "--cap", "none", "--idle", "0", "-o", "jsonl", "-t", "1")
    assert bench.returncode == 0, bench.stderr
    assert json.loads(bench.stdout)["status"] in ("ok", "disturbed")
    done = call(environment, "run", "https://huggingface.co/someone/unknown/resolve/main/x.gguf", "-p", "x")
    assert done.returncode == 1 and done.stderr.startswith("Error: There is no repository someone/unknown")


def test_bars_are_huggingface_hubs_and_can_be_left_out(environment: dict[str, str]) -> None:
    forced = {**environment, "TQDM_POSITION": "-1"}  # huggingface_hub's way to have bars without a terminal
    run = ("run", "-p", "x", "-n", "1", "--budget", "min")
    assert "tiny-Q4_K_M.gguf: 100%" in call(forced, *run, "-m", "hf:someone/model:Q4_K_M", "--progress").stderr
    quiet = call(forced, *run, "-m", "hf:someone/model:Q8_0", "--no-progress")
    assert quiet.returncode == 0 and "%|" not in quiet.stderr


# ---- Ollama -----------------------------------------------------------------------------------------------------------

MODEL_LAYER = "application/vnd.ollama.image.model"


def add_to_ollama(store: Path, name: str, model: Path, *, kinds: tuple[str, ...] = (MODEL_LAYER,), sep: str = "-") -> Path:
    """Write a model as Ollama does: HOST/USER/NAME/TAG, and a blob."""
    digest = f"sha256:{abs(hash(name)):064x}"
    blob, manifest = store / "blobs" / digest.replace(":", sep), store / "manifests" / name
    blob.parent.mkdir(parents=True, exist_ok=True)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    blob.symlink_to(model)
    layers = [{"mediaType": kind, "digest": digest, "size": 1} for kind in kinds]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:00", "size": 1}, *layers]}))
    return blob


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    return tmp_path


def test_ollamas_models_are_read_in_place(zoo_model: Model, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other, model = home / ".ollama" / "models", home / "other", zoo_model("qwen3moe")
    latest = add_to_ollama(store, "registry.ollama.ai/library/qwen3/latest", model)
    large = add_to_ollama(store, "registry.ollama.ai/library/qwen3/30b-a3b", model)
    users = add_to_ollama(store, "registry.ollama.ai/someone/Mine/v1", model, sep=":")
    hubs = add_to_ollama(store, "hf.co/someone/Model-GGUF/Q4_K_M", model)
    for name, blob in (("qwen3", latest), ("qwen3:latest", latest), ("qwen3:30B-A3B", large), ("someone/mine:v1", users),
                       ("someone/Mine", users), ("hf.co/someone/Model-GGUF:q4_k_m", hubs)):
        assert names.find(f"ollama:{name}").path == blob, name
    with gguf_pager.Llama("ollama:qwen3:30b-a3b", budget="min", **ARGUMENTS) as llm:
        llm.eval(some_tokens(4))
        assert llm.pager.stats().misses > 0
    monkeypatch.setenv("OLLAMA_MODELS", str(other))
    assert names.find("ollama:qwen3").path == latest
    assert add_to_ollama(other, "registry.ollama.ai/library/qwen3/latest", model) == names.find("ollama:qwen3").path, "it goes before"


def test_what_ollama_lacks_is_said(zoo_model: Model, home: Path) -> None:
    with pytest.raises(LayoutError, match=r"Ollama has no qwen3. It has none in .*/.ollama/models, /usr/share/ollama/.* ollama pull qwen3"):
        names.find("ollama:qwen3")
    store, model = home / ".ollama" / "models", zoo_model("qwen3moe")
    name = "registry.ollama.ai/library/{}/latest"
    add_to_ollama(store, name.format("a"), model).unlink()
    add_to_ollama(store, name.format("b"), model, kinds=())
    add_to_ollama(store, name.format("c"), model, kinds=(MODEL_LAYER, MODEL_LAYER))
    add_to_ollama(store, name.format("d"), model)
    add_to_ollama(store, name.format("d").replace("latest", "1b"), model)
    (store / "manifests" / name.format("d")).write_text("[]")
    for wanted, message in (("qwen3:30b", r"Ollama has no qwen3:30b\. It has: a:latest, b:latest, c:latest, d:1b, d:latest\."),
                            ("", "Ollama has no model without a name"), ("a", "The file of a:latest is missing in .*blobs"),
                            ("b", "b:latest holds no models in Ollama"), ("c", "holds 2 models"), ("d", "is no manifest of Ollama's")):
        with pytest.raises(LayoutError, match=message):
            names.find(f"ollama:{wanted}")


def test_ollamas_folder_that_may_not_be_read_is_named(home: Path) -> None:
    (home / ".ollama" / "models").mkdir(parents=True)
    (home / ".ollama" / "models").chmod(0)
    if os.access(home / ".ollama" / "models", os.R_OK):
        pytest.skip("root may read everything")
    with pytest.raises(LayoutError, match=r"models \(which may not be read\)"):
        names.find("ollama:qwen3")


# ---- LM Studio --------------------------------------------------------------------------------------------------------

def test_lm_studios_models_are_read_in_place(zoo_model: Model, home: Path) -> None:
    with pytest.raises(LayoutError, match=r"LM Studio has no qwen3. It has none in .*/.lmstudio/models, .*/.cache/lm-studio/models: give"):
        names.find("lmstudio:qwen3")
    model = zoo_model("qwen3moe")
    moe, old, moved = (home / folder / "someone" / f"{name}-GGUF" for folder, name in (
        (".lmstudio/models", "Qwen3-30B"), (".cache/lm-studio/models", "Old"), ("elsewhere", "Moved")))
    for folder in (moe, old, moved):
        folder.mkdir(parents=True)
    for path in (moe / "Qwen3-30B-Q4_K_M.gguf", moe / "mmproj-Qwen3.gguf", old / "old.gguf", moved / "moved-Q8_0.gguf"):
        shutil.copy(model, path)
    (home / ".lmstudio" / "settings.json").write_text(json.dumps({"downloadsFolder": str(home / "elsewhere")}))
    (home / ".lmstudio-home-pointer").write_text(f"{home / '.lmstudio'}\n")
    for name, path in (("someone/Qwen3-30B-GGUF", moe / "Qwen3-30B-Q4_K_M.gguf"), ("qwen3", moe / "Qwen3-30B-Q4_K_M.gguf"),
                       ("someone/qwen3-30b-gguf/Qwen3-30B-Q4_K_M.gguf", moe / "Qwen3-30B-Q4_K_M.gguf"), ("old", old / "old.gguf"),
                       ("qwen/qwen3-30b", moe / "Qwen3-30B-Q4_K_M.gguf"), ("moved@q8_0", moved / "moved-Q8_0.gguf")):
        assert names.find(f"lmstudio:{name}").path == path, name
    shutil.copy(model, moe / "Qwen3-30B-Q8_0.gguf")
    assert names.find("lmstudio:qwen3@q8_0").path == moe / "Qwen3-30B-Q8_0.gguf"
    with pytest.raises(PagerError, match="lmstudio:qwen3 stands for 2 models: name one of them. They are: someone/.*Q4_K_M.gguf, someone/.*Q8_0.gguf"):
        names.find("lmstudio:qwen3")
    with pytest.raises(LayoutError, match="LM Studio has no llama. It has: someone/Moved-GGUF/moved-Q8_0.gguf, someone/Old-GGUF/old.gguf, "):
        names.find("lmstudio:llama")
