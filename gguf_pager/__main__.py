"""`python -m gguf_pager` is the command `gguf-pager`."""

from gguf_pager.cli import main

if __name__ == "__main__":
    main(prog_name="gguf-pager")
