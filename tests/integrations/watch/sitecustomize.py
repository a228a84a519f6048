"""For programs that are checked: what is paged is written down; without paging they leave weights as they are.

Weights that llama.cpp repacks have other last bits: paged models are not repacked, so that plain ones are compared likewise.
"""

import atexit
import json
import os
import sys

REPORT = os.environ.get("INTEGRATION_REPORT")


def _say(what, **facts):
    with open(REPORT, "a") as file:
        print(json.dumps({"what": what, "program": sys.argv[0], **facts}), file=file)


def _watch():
    from gguf_pager.pager import Pager

    open_ones, begin, close = [], Pager.__init__, Pager.close

    def opening(pager, *args, **kwargs):
        begin(pager, *args, **kwargs)
        open_ones.append(pager)
        _say("opened")

    def done(pager):
        if pager in open_ones:
            open_ones.remove(pager)
            stats = pager.stats()
            _say("closed", hits=stats.hits, misses=stats.misses, bytes_read=stats.bytes_read)

    def closing(pager):
        done(pager)
        close(pager)

    Pager.__init__, Pager.close = opening, closing
    atexit.register(lambda: [done(pager) for pager in list(open_ones)])


def _leave_weights_as_they_are():
    from llama_cpp import llama_cpp as low

    load = low.llama_model_load_from_file

    def load_unpacked(path, params):
        params.use_extra_bufts = False
        return load(path, params)

    low.llama_model_load_from_file = load_unpacked


if REPORT:
    _watch()
elif os.environ.get("INTEGRATION_PLAIN"):
    _leave_weights_as_they_are()
