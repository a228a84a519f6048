"""Cut the recordings and the text of the trace-driven test models to size.

usage: python scripts/traces/cut.py SHARED

SHARED holds `traces/` and `corpora/` as described in README.md beside this file. The
output is the same to the byte each time.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TEXT = HERE.parent.parent / "gguf_pager" / "bench" / "text.txt"  # the package has it for its benchmark, too
POSITIONS = 2048
# 2,048 pieces take 19 KB of it.
TEXT_BYTES = 24_000
RECORDINGS = {
    "qwen3-30b-a3b": ("code.npz", "general.npz"),
    "gpt-oss-20b": ("decode.npz",),
}


def cut(shared: Path) -> None:
    """Write the first `POSITIONS` positions of every recording, and the text."""
    for model, names in RECORDINGS.items():
        (HERE / model).mkdir(exist_ok=True)
        shutil.copyfile(shared / "traces" / model / "LICENSE", HERE / model / "LICENSE")
        for name in names:
            with np.load(shared / "traces" / model / name) as recording:
                experts = recording["experts"][:, :POSITIONS].astype(np.uint8)
            np.savez_compressed(HERE / model / name, experts=experts)
    text = (shared / "corpora" / "tinyshakespeare.txt").read_text("ascii")
    end = text.rindex("\n\n", 0, TEXT_BYTES) + 1
    TEXT.write_text(text[:end], "ascii")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    cut(Path(sys.argv[1]))
