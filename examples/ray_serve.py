"""A model on several machines, or several times on one: replicas of gguf_pager's server behind Ray Serve.

    $ pip install 'gguf-pager[server,ray]'
    $ python examples/ray_serve.py MODEL --replicas 2 --budget 24GiB        # OpenAI's API at http://127.0.0.1:8000/v1

Each replica opens the model and answers as `gguf-pager serve` does. Ray spreads requests over the replicas, asks each every few seconds whether its
disk still gives what it should and replaces it where not, and lets a replica that shall go finish what it is answering: run this again
with other settings while it serves, and no request is lost. On a cluster (`ray start`) the model must lie at the same path everywhere.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from ray import serve

from gguf_pager.errors import PagerError
from gguf_pager.serve.replica import Replica


@serve.deployment(max_ongoing_requests=64, health_check_period_s=5, graceful_shutdown_wait_loop_s=0.5, graceful_shutdown_timeout_s=600)
@serve.ingress()
class Model:
    """One replica."""

    def __init__(self, path: str, n_sequences: int, **settings: Any) -> None:
        self._replica = Replica(path, n_sequences, **settings)

    def __serve_build_asgi_app__(self) -> Any:
        """Return what answers requests."""
        return self._replica.app

    def check_health(self) -> None:
        """Raise PagerError where the last batch has failed: Ray starts another replica in its place."""
        failure = self._replica.failure
        if failure is not None:
            raise PagerError(failure)

    def __del__(self) -> None:
        self._replica.close()


def main() -> None:
    """Deploy, and serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a path or a name, as for gguf-pager")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=1, help="answers that a replica computes at a time")
    parser.add_argument("--budget", default="auto")
    parser.add_argument("--ctx-size", type=int, default=4096, help="of each answer")
    parser.add_argument("--threads", type=int, help="of each replica")
    given = parser.parse_args()
    serve.run(Model.options(num_replicas=given.replicas, ray_actor_options={"num_cpus": given.threads or 1}).bind(  # type: ignore[attr-defined]
        given.model, given.parallel, budget=given.budget, n_ctx=given.ctx_size, n_threads=given.threads))
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
