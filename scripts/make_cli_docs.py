"""Write docs/cli.md: the `--help` of every command, as it is printed.

    $ python scripts/make_cli_docs.py

tests/test_cli.py fails while the two differ. Wrapping is click's: text made with another click may differ in places.
"""

from __future__ import annotations

from pathlib import Path

import click
from click.testing import CliRunner

from gguf_pager.cli import main

WIDTH = 78  # what click leaves of 80 columns
OUT = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

HEAD = """\
# The command line

Made by `python scripts/make_cli_docs.py`. `python -m gguf_pager` is the same as `gguf-pager`.

Exit codes: 0 done; 1 an error, shown as one line `Error: ...` on stderr, or a problem that `doctor` found; 2 the
command was not understood; 130 interrupted (what was generated until then is counted and shown); 141 nobody reads the
output any more. Output that is lost, because a stream is closed or its disk full, is an error too. `bench` ends with 1
where no row has a result, or ours has other logits than stock; where some rows have none it ends with 0 and a warning on
stderr.
"""

NOTES = {
    "run": """\
The last line on stderr. Decode counts the tokens after the first generated one, whose computation is the prompt's; hits
are experts found in RAM, of those wanted; stalled is the share of decoding spent waiting for reads; peak memory is the
largest resident size of the process. MB are 10^6 bytes, MiB and GiB are binary. A model that is not paged has no hits,
reads and stalls, and a line before the text says why.

Keys of the JSON object: `gguf_pager_version`, `llama_cpp_python_version`, `model`, `text`, `finish_reason` (`length`,
`stop`, `interrupt`), `is_paged`, `not_paged_reason`, `budget`, `policy`, `io`, `n_readers`, `piece_bytes`, `profile`,
`mirror`, `copies_bytes_read` (from the model's own files and from each mirror, since it was opened), `n_threads`,
`n_threads_last` (with which the last single token was computed: fewer beside busy programs), `n_ctx`,
`n_batch`, `n_ubatch`, `seed`, `load_s`, `arena_bytes`,
`resident_expert_bytes`, `peak_memory_bytes`, and `prompt` and `decode`, each with `tokens`, `seconds`, `tokens_per_s`,
`hits`, `misses`, `hit_rate`, `bytes_read`,
`bytes_read_per_token`, `bytes_wasted` (read ahead in vain), `stall_ns`, `stall_bytes`, `stall_share`, `evictions`, `left_alone`, `foreseen` (misses that look-ahead had begun to read), `in_vain` (experts that it read for nothing). What is not known is null.
""",
    "bench": """\
A run loads the model in a process of its own, computes `-d` tokens, then the prompt, then the tokens after it, and ends;
so decoding begins with what the prompt has left in the slots, and its row says so (`tg128 @ d512`). Before each run the
file is dropped from the page cache, and mincore tells whether it is gone (not of ZFS's own cache); and as much memory as the
cap allows is used once and freed, because hosts take back what lies idle in a virtual machine and give it again slowly,
so that the first run after a rest would pay for the next. All cases of a round
compute the same tokens; rounds begin at places spread over the text or trace. At the end of each round the logits of ours
and of stock are compared, bit for bit. Of lists every combination is measured, and each budget beside stock.

With `--parallel 1,2,4,8` several sequences are computed in the same batches, as llama-batched-bench does it: each has its own
`-d` and `-p` tokens, then `-n` steps compute one token of each. All numbers of sequences take turns in the same rounds. The first
sequence has the tokens that a single one has; the others begin elsewhere in the text or trace, so that they want other experts. Ours
and stock have one context of the same size for all of them (`kv_unified`), and the cap is found with as many. Speeds, bytes
and joules are of all sequences together; logits are compared of each. Above the number in `-ub` a step is more than one batch, and
an expert may count more than once. One sequence is computed by llama-cpp-python's `eval`, several by `llama_decode` itself.

The device's read-ahead decides stock's figures, so that stock runs at the present one and at 128 KiB, Linux's default, where it
can be set (as root, and while no other `bench` has set it). It is restored, also after a kill -9. Elsewhere stock runs at the
present one alone, and the words beside a ratio say so. The cap is a memory cgroup below the one that this process is in (version
2: beside it), so that it is never more than the process has itself: `cap_bytes` is what is in force, and `cap_reason` says where
that is less than was asked for. Without a cap there is no ratio to stock.

Stock leaves its weights in the file's mapping (`use_extra_bufts=False`): its default repacking copies them into memory
that the cap does not have. Its OpenMP threads wait as they do by default (`gomp_spincount`), ours as ours do, unless you
have set that. `resident` is stock with the file read into memory and no cap; `repacked` the same with
repacked weights, llama.cpp's fastest. On processors with AMX llama-cpp-python 0.3.36 ends with a segmentation fault there
(github ggml-org/llama.cpp issue 20824); the row says so.

Columns of the table: `t/s` median and range of the runs; `vs stock` the median of the ratios to stock within rounds,
under the same cap, against stock at the best of the read-aheads that were measured; `limit` the speed that computing with all weights in RAM plus reading
the missed bytes at the device's best bandwidth would give, and `eff.` how much of it was reached (above 1 where reads and
computing overlap); where there are several sequences, `t/s each` the speed of one of them, `over 1` the median of the ratios of `t/s`
to that of one sequence in the same round, with the same budget and read-ahead, and `union` the experts that a step wants, each
once, over those that one token wants: 4 sequences with a union of 2.4 want 0.6 times as many per token; `J/token` joules, with `~` where they are modelled. A row whose `status` is not "ok" has a line below
the table: `invalid` (other logits than stock, a page cache that was not cold, more reads counted than the system has seen, or
than the experts wanted have), `timeout`, `failed`, `interrupted`, or `disturbed`: it cannot be as it was measured. That is a
resident model, or a case with more memory and otherwise the same, more than 1.25 times slower than one with less (not for our
prompts); runs of which the fastest is more than 2.5 times as fast as the slowest; ratios to stock that differ by more than 2 from
round to round; a read-ahead that somebody else has set. Its figures stay, but a ratio to it is null, and the page leaves it out of its
headline. Reads and computing overlap, so that ours may beat the limit. What a case
could not reach within `--timeout` is not tried again in later rounds; its prompt is, if it got so far.

In JSON, CSV and SQL (table `gguf_pager_bench`) a row has llama-bench's names where they mean the same: `cpu_info`,
`gpu_info`, `backends`, `model_filename`, `model_type`, `model_size`, `model_n_params`, `n_batch`, `n_ubatch`, `n_threads`,
`type_k`, `type_v`, `n_gpu_layers`, `use_mmap`, `repack`, `n_prompt`, `n_gen`, `n_depth`, `test_time`, `avg_ns`,
`stddev_ns`, `avg_ts`, `stddev_ts`, and, not in CSV and SQL, `samples_ns`, `samples_ts`. One run gives two rows, prompt and
generation, as `-p` and `-n` do in llama-bench. Then ours:

| name | unit, meaning |
|---|---|
| `mode` | `paged`, `stock`, `resident`; with `repack` the last one is `repacked` |
| `budget`, `budget_bytes` | as given; in bytes, null for a share, `min` and `auto` |
| `cap`, `cap_bytes`, `cap_reason` | `cgroup1`, `cgroup2`, `systemd`, or `none`; the limit in force; why there is none, or what is weaker than it looks |
| `read_ahead_kb` | KiB, of the device during the run; null where unknown, or changed meanwhile |
| `cache`, `cached_bytes` | `cold`, `warm`, `cold, not verified` (only a file's owner is told) or `not controlled` (macOS); bytes of the file in the page cache before a run, at most |
| `tokens`, `tokens_repeat` | `trace`, `text`, `ids`, `random`; whether there were fewer than needed |
| `policy`, `look_ahead`, `io`, `n_readers`, `piece_bytes`, `profile`, `arena_bytes` | how ours ran; always without a profile of earlier runs |
| `gomp_spincount` | GOMP_SPINCOUNT, which says how long OpenMP's threads spin before they sleep |
| `n_rounds` | rounds asked for |
| `n_cores`, `ram_bytes`, `system`, `device`, `gguf_pager_version`, `llama_cpp_python_version` | where and with what |
| `median_ts`, `min_ts`, `max_ts` | tokens per second |
| `load_s` | from the call to a usable model; `usable_s` from the start of the process, Python's included |
| `first_token_s` | from the prompt to the logits of the first token |
| `hit_rate` | experts found in slots, of those wanted, all runs together; of a prompt by bytes that need not be read |
| `read_bytes_per_token`, `io_bytes_per_token` | expert bytes counted by us; storage reads of the process counted by Linux |
| `wasted_bytes_per_token` | of the first, those that were read ahead and given up before anybody wanted them |
| `foreseen_per_miss`, `in_vain_per_miss` | of the experts that were missing, the share that look-ahead had begun to read; experts that it read for nothing, per one that was missing |
| `stall_share` | of the time, spent waiting for experts |
| `stall_bytes_per_s`, `stall_vs_device` | what arrived while computing waited, over that time; the same over `device_bytes_per_s`, more than 1 where waits are shorter than reads, which count when they end; null where it waited less than 20 ms in all |
| `left_alone` | graph nodes that llama.cpp computed from its own mapping |
| `major_faults`, `user_s`, `system_s`, `cpu_s_per_token` | per run, of the phase; medians |
| `peak_rss_bytes`, `cap_peak_bytes` | most of any run: the process, and all that was charged to the cap |
| `device_bytes_per_s`, `stream_bytes_per_s` | best direct reads at random places in this bench; one stream at its start |
| `limit_ts`, `limit_compute`, `efficiency` | the limit, whose time of computing it takes (`resident` or `own`), limit / actual |
| `vs_stock`, `vs_stock_low`, `vs_stock_high` | ratio to stock under the same cap, and its range over rounds |
| `vs_stock_read_ahead_kb`, `vs_stock_tried_kb` | the read-ahead at which stock was fastest, and all at which it ran under that cap |
| `vs_stock_reason` | why there is no ratio |
| `vs_resident`, `vs_repacked` | ratio to the model in RAM; null where that was disturbed |
| `same_logits`, `same_logits_rounds` | whether ours and stock ended with equal logits, in how many rounds that could be told; null where batches differ |
| `energy_*`, `j_per_token`, `j_per_token_net`, `j_per_prompt_token`, `tokens_per_j`, `avg_power_w` | all runs together; `energy_reason` says why something is null |
| `status`, `status_reason` | `ok`, or what is wrong with the row |
| `n_parallel` | sequences; `n_prompt`, `n_gen` and `n_depth` are of each, all other figures of all together |
| `sequence_ts` | tokens per second of one of them: `median_ts` / `n_parallel` |
| `expert_union` | experts that a step wants, each once per batch, over those that one token wants; null for stock and for prompts |
| `over_1`, `over_1_low`, `over_1_high` | ratio of tokens per second to one sequence in the same rounds, and its range; null where that was not measured, or was disturbed |
""",
    "energy": """\
`--model-paper` computes the energy per token of arXiv 2508.06978 again, for experts in HBM, DDR5 or on an SSD, from its
constants and those of its code, and shows what a cache before the SSD changes. Its constants are set with `--constant`,
too; their names are in its output.
""",
    "inspect": """\
`whole program` is an estimate without the context's cache and buffers; `read per token` takes how often an expert was in memory already from the
recorded routing of gpt-oss-20b. With `--details`: a slice is one expert's part of a tensor; layers whose slices have equal sizes form a shape
class and share slots.
""",
    "doctor": """\
`ok`, `note` (something costs speed or cannot be known here) or `problem` (paging does not work); the line below says
what to do. In JSON, `checks` maps each name to its `status`, `message`, `remedy` and `facts`.
""",
}


def help_text(command: str | None) -> str:
    """Return what `gguf-pager COMMAND --help` prints on a terminal of 80 columns."""
    arguments = [command, "--help"] if command else ["--help"]
    return CliRunner().invoke(main, arguments, prog_name="gguf-pager", terminal_width=WIDTH).output


def render() -> str:
    """Return the whole document."""
    parts = [HEAD, f"```\n{help_text(None)}```\n"]
    for command in main.list_commands(click.Context(main)):
        note = NOTES.get(command)
        parts += [f"## gguf-pager {command}\n", f"```\n{help_text(command)}```\n", *([note] if note else [])]
    return "\n".join(parts)


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(render())
    print(OUT)
