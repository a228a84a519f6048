"""The command line as a user meets it: what is printed where, exit codes, and figures that add up."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import fuzz_metadata
import gguf
import make_cli_docs
import make_zoo
import pytest
from click.testing import CliRunner
from zoo_metadata import Arch

import gguf_pager
from gguf_pager import doctor
from gguf_pager.cli import main
from gguf_pager.errors import EngineError
from gguf_pager.memory import probe
from gguf_pager.model import engine
from gguf_pager.pager import Options, Pager
from gguf_pager.report.generation import Progress, run_hint

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "First Citizen:"
N_PREDICT = 24
TINY_LAYERS, TINY_USED = 4, 4
TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<reply>{% endif %}")


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, trace_model: Path, dense_model: Path, zoo_model: Callable[..., Path]
) -> Path:
    """A folder of models: tiny recites a text, mixed has slices of two sizes, refused is no architecture at all."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny.gguf").symlink_to(trace_model)
    (folder / "dense.gguf").symlink_to(dense_model)
    (folder / "mixed.gguf").symlink_to(zoo_model("qwen3moe", "q4_k_m"))
    reader = gguf.GGUFReader(trace_model)
    for name, architecture in (("chat", "qwen3moe"), ("refused", "nonesuch")):
        writer = gguf.GGUFWriter(folder / f"{name}.gguf", architecture)
        make_zoo.copy_fields(reader, writer)
        writer.add_chat_template(TEMPLATE)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        make_zoo.finish(writer)
    return folder


def call(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a process of its own, as a shell would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, "-m", "gguf_pager", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, env=environment, timeout=120, **options)


def run_json(*arguments: str | Path) -> dict[str, Any]:
    done = call("run", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def expected_text(model: Path, **arguments: Any) -> str:
    """Return what Llama itself generates."""
    llm = gguf_pager.Llama(str(model), budget="50%", n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    text = llm.create_completion(PROMPT, max_tokens=N_PREDICT, **arguments)["choices"][0]["text"]
    llm.close()
    assert isinstance(text, str)
    return text


# ---- run ------------------------------------------------------------------------------------------------------------

def test_text_is_that_of_llama_and_figures_are_on_stderr(models: Path) -> None:
    tiny = models / "tiny.gguf"
    done = call("run", tiny, "-p", PROMPT, "-n", N_PREDICT, "--temp", "0", "--budget", "50%", "-t", "1")
    assert done.returncode == 0
    assert done.stdout.decode() == expected_text(tiny, temperature=0)
    (line,) = done.stderr.decode().splitlines()
    assert re.fullmatch(
        r"answer [\d.]+ tok/s \(24 tokens\), prompt [\d.]+ tok/s \(2 tokens\), [\d.]+% of the experts were in memory, "
        r"[\d.]+ MB read per token, \d+% of the time waiting for the disk, peak memory [\d.]+ MiB", line)


def test_figures_have_their_own_line_where_all_goes_to_one_file(models: Path, tmp_path: Path) -> None:
    tiny, both = models / "tiny.gguf", tmp_path / "both"
    command = f'"{sys.executable}" -m gguf_pager run "{tiny}" -p "{PROMPT}" -n {N_PREDICT} --temp 0 --budget 50% -t 1 > "{both}" 2>&1'
    subprocess.run(command, shell=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    text, line = both.read_text().rstrip("\n").rsplit("\n", 1)
    assert text == expected_text(tiny, temperature=0) and line.startswith("answer ")


@pytest.mark.parametrize("budget", ("min", "100%"))
def test_batches_are_as_long_as_was_asked_for_at_every_budget(models: Path, budget: str) -> None:
    arguments = ("run", models / "tiny.gguf", "-p", PROMPT, "-n", "2", "-t", "1", "-ub", "8", "--budget", budget)
    assert len(call(*arguments).stderr.decode().splitlines()) == 1, "there is nothing to say"
    assert run_json(*arguments[1:])["n_ubatch"] == 8


@pytest.mark.parametrize("command", (("run", "-p", PROMPT, "-n", "2"), ("bench", "-p", "0", "-n", "2")))
def test_budget_above_the_machine_is_refused_unless_the_user_insists(models: Path, command: tuple[str, ...]) -> None:
    """Of 64 TiB no machine has the half."""
    name, *arguments = command
    done = call(name, models / "tiny.gguf", *arguments, "--budget", "64TiB")
    assert done.returncode == 1 and (b"65,536.00 GiB" if name == "run" else b"64TiB") in done.stderr
    assert b"--overcommit" in done.stderr and len(done.stderr.splitlines()) == 1
    if name == "run":
        assert call(name, models / "tiny.gguf", *arguments, "--budget", "64TiB", "--overcommit").returncode == 0


def test_bare_share_is_asked_about(models: Path) -> None:
    for text in ("0.25", "25"):
        done = call("run", models / "tiny.gguf", "-p", PROMPT, "--budget", text)
        assert done.returncode == 1 and b"did you mean 25%?" in done.stderr


def test_sampling_with_a_seed_is_that_of_llama(models: Path) -> None:
    done = call("run", models / "mixed.gguf", "-p", PROMPT, "-n", N_PREDICT, "--temp", "0.7", "--top-k", "20",
                "--top-p", "0.9", "-s", "7", "--budget", "50%", "-t", "1")
    wanted = expected_text(models / "mixed.gguf", temperature=0.7, top_k=20, top_p=0.9, seed=7)
    assert done.stdout == wanted.encode()


def test_json_counts_decode_without_the_prompt(models: Path) -> None:
    facts = run_json(models / "tiny.gguf", "-p", PROMPT, "-n", N_PREDICT, "--temp", "0", "--budget", "50%", "-s", "3")
    decode, prompt = facts["decode"], facts["prompt"]
    assert (prompt["tokens"], decode["tokens"]) == (2, N_PREDICT - 1)
    assert decode["hits"] + decode["misses"] == (N_PREDICT - 1) * TINY_LAYERS * TINY_USED
    assert prompt["misses"] > 0
    assert decode["hit_rate"] == decode["hits"] / (decode["hits"] + decode["misses"])
    assert 0 < decode["stall_share"] < 1
    assert decode["stall_share"] == pytest.approx(decode["stall_ns"] / 1e9 / decode["seconds"])
    assert decode["bytes_read_per_token"] * decode["tokens"] == pytest.approx(decode["bytes_read"])
    assert facts["peak_memory_bytes"] > facts["arena_bytes"] > 0
    assert (facts["seed"], facts["finish_reason"], facts["n_ctx"]) == (3, "length", 256)


def test_json_is_all_of_stdout_and_text_is_on_stderr(models: Path) -> None:
    done = call("run", models / "tiny.gguf", "-p", PROMPT, "-n", "5", "--temp", "0", "--budget", "50%", "--json")
    facts = json.loads(done.stdout)
    assert done.stdout.count(b"\n") == 1
    assert done.stderr.decode() == facts["text"] != ""


def test_mirror_is_read_and_told(models: Path, tmp_path: Path) -> None:
    mirror = shutil.copy(models / "tiny.gguf", tmp_path / "mirror.gguf")
    arguments = (models / "tiny.gguf", "-p", PROMPT, "-n", "5", "--temp", "0", "--budget", "50%")
    alone, both = run_json(*arguments), run_json(*arguments, "--mirror", mirror)
    assert both["text"] == alone["text"]
    assert (alone["mirror"], both["mirror"]) == ([], [str(mirror)])
    assert len(alone["copies_bytes_read"]) == 1
    assert len(both["copies_bytes_read"]) == 2 and all(both["copies_bytes_read"])
    assert "--mirror PATH" in call("run", "--help").stdout.decode()
    with open(mirror, "ab") as file:
        file.write(b"more")
    refused = call("run", *arguments, "--mirror", mirror)
    assert refused.returncode == 1
    assert re.fullmatch(r"Error: .*mirror\.gguf is no mirror of .*: it has [\d,]+ bytes instead of [\d,]+\. .*\n",
                        refused.stderr.decode())


def test_every_key_of_the_json_is_documented(models: Path) -> None:
    facts = run_json(models / "tiny.gguf", "-p", PROMPT, "-n", "2", "--budget", "50%")
    for key in [*facts, *facts["decode"]]:
        assert f"`{key}`" in make_cli_docs.NOTES["run"]


@pytest.mark.parametrize("newline", [b"", b"\n"])
def test_prompt_comes_from_a_file_or_stdin(models: Path, tmp_path: Path, newline: bytes) -> None:
    arguments = ("run", models / "tiny.gguf", "-n", "5", "--temp", "0", "--budget", "50%")
    (tmp_path / "prompt").write_bytes(PROMPT.encode() + newline)
    outputs = {
        call(*arguments, "-p", PROMPT).stdout,
        call(*arguments, "-f", tmp_path / "prompt").stdout,
        call(*arguments, "-f", "-", input=PROMPT.encode() + newline).stdout,
    }
    assert len(outputs) == 1 and outputs != {b""}


def test_chat_applies_the_template(models: Path) -> None:
    arguments = ("-n", "5", "--temp", "0", "--budget", "50%")
    chat = run_json(models / "chat.gguf", "-p", PROMPT, "--chat", *arguments)
    plain = run_json(models / "chat.gguf", "-p", f"<user>{PROMPT}<reply>", *arguments)
    assert chat["text"] == plain["text"]
    assert chat["prompt"]["tokens"] == plain["prompt"]["tokens"] > 2


def test_dense_model_says_why_it_is_not_paged(models: Path) -> None:
    done = call("run", models / "dense.gguf", "-p", "hi", "-n", "4")
    first, last = done.stderr.decode().splitlines()
    assert done.returncode == 0 and first == "Not paged: it has no experts to page."
    assert ", not paged, peak memory " in last
    assert run_json(models / "dense.gguf", "-p", "hi", "-n", "4")["decode"]["hit_rate"] is None


def test_context_is_what_is_needed_and_no_more(models: Path) -> None:
    arguments = (models / "tiny.gguf", "-p", PROMPT, "--temp", "0", "--budget", "50%")
    assert run_json(*arguments, "-n", "2")["n_ctx"] == 256
    assert run_json(*arguments, "-n", "300")["n_ctx"] == 512
    full = run_json(*arguments, "-n", "-1", "-c", "200")  # a step of 256: llama_cpp miscounts contexts in between
    assert full["n_ctx"] == 256
    assert full["prompt"]["tokens"] + full["decode"]["tokens"] + 1 == 256


def test_interrupt_ends_with_the_figures_so_far(models: Path) -> None:
    body = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
            "from gguf_pager.cli import main; main(prog_name='gguf-pager')")
    arguments = ["run", models / "tiny.gguf", "-p", PROMPT, "-n", "-1", "-c", "32768", "--temp", "0", "--budget", "50%"]
    with subprocess.Popen([sys.executable, "-c", body, *map(str, arguments)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as child:
        assert child.stdout is not None and child.stdout.read(40)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert re.fullmatch(r"answer [\d.]+ tok/s .*peak memory .*\n", errors.decode())


def test_progress_appears_after_a_second_and_only_where_wanted(capfd: pytest.CaptureFixture[str]) -> None:
    for is_wanted in (None, True):  # stderr is no terminal here
        with Progress(is_wanted).during(lambda: "opening"):
            time.sleep(1.3)
    with Progress(True).during(lambda: "never shown"):
        pass
    assert capfd.readouterr() == ("", "opening\n")


def test_bar_fills_while_a_model_opens(capfd: pytest.CaptureFixture[str]) -> None:
    for is_wanted in (None, True):
        with Progress(is_wanted).bar("opening model.gguf", lambda: 200, lambda: 150):
            time.sleep(1.6)
    with Progress(True).bar("never shown", lambda: 1, lambda: 1):
        pass
    out, err = capfd.readouterr()
    assert out == "" and "opening model.gguf" in err and "75%" in err and "never shown" not in err
    with Progress(True).bar("larger than thought", lambda: 100, lambda: 150):
        time.sleep(1.6)
    assert "100%" in capfd.readouterr().err


# ---- errors ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "message"), [
    (("run", "no.gguf", "-p", "x"), "does not exist"),
    (("run", "text", "-p", "x"), "is not a GGUF file"),
    (("run", "cut.gguf", "-p", "x"), "is truncated"),
    (("run", "refused.gguf", "-p", "x"), "unknown model architecture: 'nonesuch'"),
    (("run", "tiny.gguf", "-p", "x", "--budget", "3"), "is too small"),
    (("run", "tiny.gguf", "-p", "x", "--budget", "much"), "is not understood"),
    (("run", "tiny.gguf", "-p", "x", "--policy", "none"), "does not exist"),
    (("run", "tiny.gguf", "-p", "", "--budget", "50%"), "prompt is empty"),
    (("run", "tiny.gguf", "-p", PROMPT * 200, "-c", "256", "--budget", "50%"), "give -c"),
    (("run", "tiny.gguf", "-f", "cut.gguf"), "is not UTF-8"),
    (("run", "tiny.gguf", "-p", "x", "--chat", "--budget", "50%"), "no chat template"),
    (("inspect", "no.gguf"), "does not exist"),
])
def test_error_is_one_line_and_exit_code_1(models: Path, arguments: tuple[str, ...], message: str) -> None:
    (models / "text").write_text("plain text")
    (models / "cut.gguf").write_bytes((models / "tiny.gguf").read_bytes()[: 3 << 20])
    done = call(*arguments, cwd=models)
    (line,) = done.stderr.decode().splitlines()
    assert ".." not in line
    assert done.returncode == 1 and done.stdout == b""
    assert line.startswith("Error: ") and message in line


def test_error_is_red_on_a_terminal() -> None:
    assert CliRunner().invoke(main, ["inspect", "no.gguf"], color=True).output.startswith("\x1b[31mError: ")


@pytest.mark.parametrize("arguments", [
    ("run", "m"), ("run", "m", "-p", "x", "-f", "-"), ("run", "m", "-p", "x", "-n", "0"), ("inspect",), ("none",),
])
def test_misuse_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_refused_file_is_one_sentence_without_a_hint_that_does_not_help(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    said = CliRunner().invoke(main, ["run", str(tmp_path / "pipe.gguf"), "-p", "x"]).output
    assert said.endswith("put it into a file.\n") and "--verbose" not in said


def test_missing_compiled_part_is_an_error_line() -> None:
    body = ("import sys; sys.modules['gguf_pager._native'] = None\n"
            "from gguf_pager.cli import main; main(['inspect', 'x'])")
    done = subprocess.run([sys.executable, "-c", body], check=False, capture_output=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith(b"Error: The compiled part")


# ---- inspect --------------------------------------------------------------------------------------------------------

def inspected(model: Path) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["inspect", str(model), "--json"])
    assert done.exit_code == 0
    facts: dict[str, Any] = json.loads(done.output)
    return facts


def test_inspect_accounts_for_every_byte(models: Path) -> None:
    facts = inspected(models / "mixed.gguf")
    assert facts["expert_bytes"] + facts["dense_bytes"] + facts["idle_bytes"] == facts["tensor_bytes"]
    assert facts["expert_bytes"] == sum(shape["n_experts"] * shape["expert_bytes"] for shape in facts["shape_classes"])
    assert facts["bytes_per_token"] == sum(
        layer["n_used"] * facts["shape_classes"][layer["shape_class"]]["expert_bytes"] for layer in facts["layers"])
    assert len(facts["layers"]) == facts["n_expert_layers"] == 3
    assert [piece["types"] for piece in facts["shape_classes"][1]["slices"]] == [["q4_K"], ["q4_K"], ["q6_K"]]
    assert facts["shape_classes"][1]["slices"][2]["is_multiple_of_align"] == (53760 % facts["align_bytes"] == 0)


def test_inspected_budgets_work_as_told(models: Path) -> None:
    rows = {row["name"]: row for row in inspected(models / "tiny.gguf")["budgets"]}
    assert list(rows) == ["smallest", "useful", "quarter", "half", "this_machine", "full"]
    assert rows["smallest"]["n_experts"] == TINY_USED
    assert rows["useful"]["n_experts"] == TINY_LAYERS * TINY_USED
    assert rows["full"]["share_of_experts"] == 1
    assert rows["this_machine"]["arena_bytes"] is None and "fits" in rows["this_machine"]["reason"]
    for row in (rows["smallest"], rows["useful"], rows["half"]):
        llm = gguf_pager.Llama(str(models / "tiny.gguf"), budget=row["budget"], n_ctx=256, verbose=False)
        assert llm.pager is not None and sum(llm.pager.n_slots) == row["n_experts"]
        llm.close()


def test_budget_that_is_too_small_is_told_as_such(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make_zoo.ARCHITECTURES, "qwen3moe", Arch({"expert_used_count": 5}, file_type="q4_k_m"))
    make_zoo.make("qwen3moe", models / "greedy.gguf")
    monkeypatch.setattr(probe, "memory", lambda: probe.Memory(1 << 30, 140 << 20, None, 0))
    rows = {row["name"]: row for row in inspected(models / "greedy.gguf")["budgets"]}
    for name in ("quarter", "this_machine"):
        assert rows[name]["arena_bytes"] is None and "too small" in rows[name]["reason"]
    with pytest.raises(gguf_pager.BudgetError):
        gguf_pager.Llama(str(models / "greedy.gguf"), budget="25%", verbose=False)
    assert "too small" in CliRunner().invoke(main, ["inspect", str(models / "greedy.gguf")]).output


def test_inspect_of_a_dense_model_says_there_is_nothing_to_page(models: Path) -> None:
    assert "there is nothing to page" in CliRunner().invoke(main, ["inspect", str(models / "dense.gguf")]).output
    facts = inspected(models / "dense.gguf")
    assert facts["budgets"] == facts["layers"] == [] and facts["bytes_per_token"] is None


def test_inspect_reads_split_models_as_one(models: Path) -> None:
    first = make_zoo.make_split(models / "mixed.gguf", models, 3)
    split, whole = inspected(first), inspected(models / "mixed.gguf")
    assert len(split["files"]) == 3
    assert all(split[key] == whole[key] for key in ("expert_bytes", "dense_bytes", "layers", "bytes_per_token"))


def test_inspect_and_doctor_do_not_import_llama_cpp(models: Path) -> None:
    for command in ("inspect", "doctor"):
        body = (f"import sys; from gguf_pager.cli import main; main(['{command}', sys.argv[1]], standalone_mode=False);"
                "sys.exit('llama_cpp' in sys.modules)")
        command_line = [sys.executable, "-c", body, str(models / "tiny.gguf")]
        done = subprocess.run(command_line, check=False, cwd=ROOT, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr


# ---- what fingers know ----------------------------------------------------------------------------------------------

def test_command_alone_shows_what_to_do_first() -> None:
    done = call()
    assert done.returncode == 0
    for words in (b"gguf-pager inspect MODEL.gguf", b"gguf-pager run MODEL.gguf", b"hf:ggml-org/gpt-oss-20b-GGUF", b"--help"):
        assert words in done.stdout


@pytest.mark.parametrize("form", ("{m} {p}", "-m {m} {p}", "-m {m} -p {p}", "{p} -m {m}", "{m} -p {p}", "{m} -ngl 0 {p}"))
def test_model_and_prompt_are_taken_as_they_come(models: Path, form: str) -> None:
    words = [word.format(m=models / "tiny.gguf", p=PROMPT) for word in form.split()]
    facts = run_json(*words, "-n", "3", "--temp", "0", "--budget", "50%")
    assert facts["model"] == str(models / "tiny.gguf") and facts["prompt"]["tokens"] > 1


@pytest.mark.parametrize(("words", "message"), (
    (("run",), "Which model? Name a GGUF file: gguf-pager run MODEL"), (("inspect",), "Which model?"), (("bench",), "Which model?"),
    (("run", "a.gguf", "-m", "b.gguf", "x"), "The model is named twice"), (("inspect", "a.gguf", "-m", "b.gguf"), "named twice"),
    (("run", "tiny.gguf", "x", "-p", "y"), "The prompt is given twice"),
    (("run", "tiny.gguf", "-p", "Once", "upon"), 'put it into straight quotes, "like this"'),
    (("run", "tiny.gguf", "Once", "upon", "a"), 'put it into straight quotes, "like this"'),
    (("run", "tiny.gguf", "yes", "time", "ls"), 'put it into straight quotes, "like this"'),
    (("list",), "ollama:NAME"), (("show", "tiny.gguf"), "gguf-pager inspect MODEL"),
))
def test_words_that_do_not_fit_are_a_sentence(models: Path, words: tuple[str, ...], message: str) -> None:
    done = call(*words, cwd=models)
    assert done.returncode == 2 and message in done.stderr.decode().replace("__main__.py", "gguf-pager").replace(
        "python -m gguf_pager", "gguf-pager")


@pytest.mark.parametrize(("words", "message"), (
    (("model.gguf", "hi"), "Did you mean: gguf-pager run model.gguf"), (("server",), "gguf-pager serve MODEL"),
    (("hf:a/b", "hi"), "Did you mean: gguf-pager run hf:a/b"),
    (("pull", "x"), "gguf-pager run hf:OWNER/REPO"), (("version",), "--version"), (("runn",), "No such command"),
    (("chat", "tiny.gguf", "--state-size", "5"), "--state-size is a size such as 10GiB, not '5'"),
    (("run", "qwen3:30b", "x"), "ollama:qwen3:30b"),
    (("run", "Qwen/Qwen3-30B-A3B-GGUF", "x"), "hf:Qwen/Qwen3-30B-A3B-GGUF"),
    (("run", "https://huggingface.co/x.gguf", "x"), "names no repository"), (("run", "a/b.gguf", "x"), "a/b.gguf does not exist.\n"),
))
def test_words_of_other_programs_are_answered(words: tuple[str, ...], message: str) -> None:
    done = call(*words)
    assert done.returncode in (1, 2) and message in done.stderr.decode()


def test_layers_for_a_gpu_are_answered(models: Path) -> None:
    done = call("run", models / "tiny.gguf", "-ngl", "99", "-n", "2", "--budget", "50%", PROMPT)
    assert done.returncode == 0 and b"-ngl 99 is ignored: gguf-pager computes on the CPU only." in done.stderr
    done = call("run", models / "tiny.gguf", "-ngl", "0", "-n", "2", "--budget", "50%", PROMPT)
    assert b"CPU only" not in done.stderr


@pytest.mark.parametrize("shell", ("bash", "zsh", "fish"))
def test_shells_complete(shell: str, models: Path) -> None:
    done = call("completion", shell)
    assert done.returncode == 0 and b"_GGUF_PAGER_COMPLETE" in done.stdout
    if shell == "bash":
        asked = {"_GGUF_PAGER_COMPLETE": "bash_complete", "COMP_WORDS": "gguf-pager ins", "COMP_CWORD": "1"}
        program = "import sys; sys.argv = ['gguf-pager']; from gguf_pager.cli import main; main(prog_name='gguf-pager')"
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, env={**os.environ, **asked}, check=False)
        assert b"inspect" in found.stdout


def facts_of(waited: float, *, seconds: float = 5.0, n_last: int = 2) -> dict[str, Any]:
    return {"decode": {"stall_share": waited, "seconds": seconds}, "n_threads_last": n_last, "n_threads": 2}


def test_hint_is_given_where_it_was_measured(zoo_model: Callable[..., Path]) -> None:
    pager = Pager(gguf_pager.read_layout(zoo_model("qwen3moe")), Options())
    much, little = (probe.Memory(16 << 30, n_bytes, None, 0) for n_bytes in (12 << 30, 100 << 20))
    assert "--budget 100%" in str(run_hint(facts_of(0.6), pager, much))
    assert run_hint(facts_of(0.6), pager, little) is None
    assert run_hint(facts_of(0.1), pager, much) is None
    assert run_hint(facts_of(0.6, seconds=1.0), pager, much) is None
    assert run_hint(facts_of(0.6), None, much) is None
    assert "1 thread was faster than 2" in str(run_hint(facts_of(0.1, n_last=1), pager, much))


# ---- doctor ---------------------------------------------------------------------------------------------------------

def test_doctor_finds_no_problem_here(models: Path) -> None:
    done = call("doctor", models / "tiny.gguf", "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 0 and facts["n_problems"] == 0
    assert facts["checks"]["engine"]["status"] == facts["checks"]["model"]["status"] == "ok"
    assert set(facts["checks"]) == {
        "verdict", "versions", "engine", "lazy_load", "spinning", "cores", "model", "memory", "memory_lock", "huge_pages",
        "direct_io", "device", "read_ahead", "memory_cap", "energy"}


def test_doctor_text_has_a_line_per_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = CliRunner().invoke(main, ["doctor"]).output.splitlines()
    starts = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert len(starts) == 13 and set(starts) <= {"ok", "note", "problem"}
    assert list(tmp_path.iterdir()) == []


def test_doctor_exits_with_1_when_something_stops_paging(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CliRunner().invoke(main, ["doctor", str(models / "no.gguf")]).exit_code == 1

    def refuse() -> None:
        raise EngineError("another layout")

    monkeypatch.setattr(engine, "load", refuse)
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 1 and re.search(r"^problem +engine +another layout", done.output, re.MULTILINE)


def checks(model: Path | None = None) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine(model)}


def test_doctor_notes_what_costs_speed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_direct_io(path: str) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    def unfamiliar(library: str) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    def not_allowed(address: int, n_bytes: int) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(doctor._native, "file_alignment", no_direct_io)
    monkeypatch.setattr(doctor._native, "lazy_load_begin", unfamiliar)
    monkeypatch.setattr(doctor._native, "memory_lock", not_allowed)
    monkeypatch.setattr(probe, "read_ahead_kb", lambda path: 8192)
    monkeypatch.setattr(probe, "memory", lambda: probe.Memory(8 << 30, 4 << 30, 6 << 30, 2 << 30))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    found = checks(models / "tiny.gguf")
    for name in ("direct_io", "lazy_load", "memory_lock", "read_ahead", "memory", "spinning"):
        assert found[name].status == "note" and found[name].remedy, name
    assert "limited to 6.00 GiB" in found["memory"].message


def test_doctor_refuses_a_model_larger_than_memory(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "memory", lambda: probe.Memory(1 << 30, 1 << 20, None, 0))
    assert checks(models / "tiny.gguf")["model"].status == "problem"


def test_huge_pages_that_are_off_are_noted(tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    assert doctor._huge_pages(setting).status == "note"
    setting.write_text("always [madvise] never\n")
    assert doctor._huge_pages(setting).status == "ok"
    assert doctor._huge_pages(tmp_path / "missing").status == "note"


def test_energy_counters_are_found_and_permissions_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._energy(tmp_path).status == "note"
    for path, text in (("powercap/intel-rapl:0/energy_uj", "1"), ("hwmon/hwmon0/name", "ina3221"),
                       ("hwmon/hwmon0/power1_input", "1"), ("hwmon/hwmon1/name", "coretemp"),
                       ("hwmon/hwmon1/power1_input", "1"), ("power_supply/BAT0/power_now", "1")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = doctor._energy(tmp_path)
    assert found.status == "ok" and {kind: len(paths) for kind, paths in found.facts.items()} == {
        "powercap": 1, "hwmon_ina": 1, "battery": 1}
    monkeypatch.setattr(os, "access", lambda path, mode: "powercap" not in str(path))  # root may read everything
    locked = doctor._energy(tmp_path)
    assert locked.status == "note" and "3 counters, 1 of them not readable" in locked.message


# ---- documents ------------------------------------------------------------------------------------------------------

def test_documented_help_is_the_real_one() -> None:
    document = (ROOT / "docs" / "cli.md").read_text()
    assert document == make_cli_docs.render(), "run: python scripts/make_cli_docs.py"
    for command in ((), *((name,) for name in main.list_commands(click.Context(main)))):
        assert f"```\n{call(*command, '--help').stdout.decode()}```" in document


def test_version_names_both_packages() -> None:
    assert re.fullmatch(r"gguf-pager [\d.]+, llama-cpp-python [\d.]+\n", call("--version").stdout.decode())


# ---- what a user meets who is wrong ---------------------------------------------------------------------------------

def said(*arguments: str | Path, **options: Any) -> str:
    """Return the one line of an error."""
    done = call(*arguments, **options)
    assert done.returncode in (1, 2) and b"Traceback" not in done.stderr and not done.stdout
    return done.stderr.decode().strip().splitlines()[-1]


def test_errors_name_options(models: Path) -> None:
    tiny = models / "tiny.gguf"
    for arguments, message in (
        (("--budget", "1KiB"), "Raise it, or say --budget min."), (("--budget", "4XB"), "Error: --budget '4XB' is not"),
        (("--policy", "best"), "Error: --policy 'best' does not exist"), (("--readers", "0"), "Error: --readers must lie"),
        (("--budget", ""), "Error: --budget '' is not understood"),
    ):
        assert message in said("run", tiny, "-p", "x", *arguments)


def test_prompt_that_the_shell_has_taken_apart_gets_a_hint(models: Path) -> None:
    assert "put it into straight quotes" in " ".join(
        call("run", models / "tiny.gguf", "-p", "“Hello", "world”").stderr.decode().split())


@pytest.mark.parametrize(("prompt", "message"), (
    (("-f", "/nonexistent"), "'/nonexistent': No such file or directory"), (("-f", "/"), "'/': Is a directory"),
    (("-f", "/proc/self/mem"), "The prompt cannot be read: Input/output error."), ((), "What is the prompt?"),
))
def test_prompt_that_cannot_be_read_is_an_error_of_one_line(models: Path, prompt: tuple[str, ...], message: str) -> None:
    assert message in said("run", models / "tiny.gguf", *prompt)


@pytest.mark.parametrize(("arguments", "message"), (
    (("-c", "1000000000000"), "1000000000000 is not in the range"), (("-t", "1000000000"), "is not in the range 1<=x<=512"),
    (("-b", "1000000000000"), "is not in the range"), (("-ub", "1000000000000"), "is not in the range"),
    (("-b", "2000000000"), "no memory for a context of that size|Failed to create"),
))
def test_numbers_beyond_llama_cpps_are_refused(models: Path, arguments: tuple[str, ...], message: str) -> None:
    done = call("run", models / "tiny.gguf", "-p", "x", "--budget", "50%", *arguments)
    assert done.returncode in (1, 2) and b"Traceback" not in done.stderr
    assert re.search(message, " ".join(done.stderr.decode().split()))


def test_prompt_from_a_stdin_that_is_closed_is_an_error_of_one_line(models: Path) -> None:
    command = f'"{sys.executable}" -m gguf_pager run "{models / "tiny.gguf"}" -f - <&-'
    done = subprocess.run(command, shell=True, check=False, capture_output=True, timeout=60, cwd=ROOT)
    assert done.returncode == 1 and done.stderr == b"Error: The prompt is to come from stdin, but that is closed.\n"


def test_empty_prompt_begins_a_text_or_is_refused_in_a_sentence(models: Path) -> None:
    """A model that begins every text with a token of its own needs no other."""
    done = call("run", models / "mixed.gguf", "-p", "", "-n", "3", "--budget", "50%", "-t", "1")
    assert done.returncode == 0 and b"answer " in done.stderr and b"Error" not in done.stderr
    assert said("run", models / "tiny.gguf", "-p", "", "-n", "3", "--budget", "50%") == (
        "Error: The prompt is empty, and this model needs at least one token.")


@pytest.mark.parametrize("command", (("run", "-p", "x"), ("inspect",), ("doctor",), ("bench",)))
def test_model_that_cannot_even_be_asked_for_is_an_error_of_one_line(command: tuple[str, ...]) -> None:
    for path, message in (("a" * 300, "File name too long"), ("/nonexistent/a.gguf", "does not exist|No such file")):
        done = call(command[0], path, *command[1:])
        assert done.returncode == 1 and b"Traceback" not in done.stderr
        assert re.search(message, (done.stdout + done.stderr).decode())


@pytest.mark.parametrize("command", (("inspect",), ("doctor",), ("run", "-p", "x", "-n", "2", "--budget", "50%", "--progress")))
def test_names_in_a_file_steer_no_terminal(models: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    path = tmp_path / ("a\x1b[31m.gguf" if command[0] == "run" else "a\x1b[31m\udcff.gguf")
    fuzz_metadata.write(models / "tiny.gguf", path, [
        fuzz_metadata.Change("general.name", "evil \x1b]0;x\x07\r\n 模型", gguf.GGUFValueType.STRING)])
    done = call(command[0], path, *command[1:])
    shown = done.stdout + done.stderr
    assert done.returncode == 0 and b"\x1b" not in shown and b"\x07" not in shown and b"\r" not in shown
    path.rename(tmp_path / "\udcff.gguf")
    assert command[0] != "run" or "a name that is no UTF-8" in said("run", tmp_path / "\udcff.gguf", "-p", "x")
    assert command[0] == "run" or "evil �]0;x��� 模型" in shown.decode()
