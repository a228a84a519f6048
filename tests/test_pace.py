"""How many threads compute the next token, on machines that are made up: no time is measured here."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from gguf_pager.pace import Look, Pace

LOOK_S = 0.2

# Seconds per token of the demo model (benchmarks/LOG.md), with 1 and 2 threads, beside no, one and two programs that spin.
MEASURED = {0: {1: 0.027, 2: 0.014}, 1: {1: 0.027, 2: 0.046}, 2: {1: 0.041, 2: 0.032}}


@dataclass
class Machine:
    """Processors, programs that spin beside ours, and how long a token takes then: `token_s(n_threads, n_spinners)`."""

    token_s: Callable[[int, int], float]
    n_processors: int = 2
    n_spinners: int = 0
    noise: Callable[[], float] = lambda: 1.0
    tells: Callable[[Look], Look] = lambda look: look
    """What the system says, of what there is to say."""
    waited: float = 0.02
    """Beside what the programs cause."""
    pace: Pace = field(default_factory=Pace)
    ceiling: int = 2
    seconds: float = 0.0
    numbers: list[int] = field(default_factory=list)
    _since_look_s: float = 0.0

    def look(self, n: int) -> Look:
        """Return what is true now."""
        crowd = n + self.n_spinners - self.n_processors
        others = float(self.n_spinners) if crowd <= 0 else self.n_spinners * self.n_processors / (n + self.n_spinners)
        return Look(max(0, crowd) * 0.8 + self.waited, float(max(0, -crowd)), others, self.n_processors)

    def run(self, n_tokens: int) -> Sequence[int]:
        """Decode; return the numbers of threads."""
        for _ in range(n_tokens):
            self.pace.limit(self.ceiling)
            n = self.pace.n_threads
            assert 1 <= n <= self.ceiling
            took_s = self.token_s(n, self.n_spinners) * self.noise()
            self.numbers.append(n)
            self.seconds += took_s
            if self.pace.wants_times:
                self.pace.note(took_s)
            if self.pace.n_threads != n:
                self._since_look_s = 0
                continue
            self._since_look_s += took_s
            if self._since_look_s >= LOOK_S:
                self.pace.heed(self.tells(self.look(n)))
                self._since_look_s = 0
        return self.numbers[-n_tokens:]

    def slowness(self, n_tokens: int) -> float:
        """Decode; return the time taken, in times of the best fixed number of threads."""
        begun_s = self.seconds
        self.run(n_tokens)
        best_s = min(self.token_s(n, self.n_spinners) for n in range(1, self.ceiling + 1))
        return (self.seconds - begun_s) / (best_s * n_tokens)


def measured(n: int, n_spinners: int) -> float:
    return MEASURED[n_spinners][n]


def crowded(n: int, n_spinners: int) -> float:
    """On 8 processors: a thread that shares one keeps the others waiting, and a second one costs little more."""
    return 0.2 / n * (3.0 + 0.2 * (n + n_spinners - 8) if n + n_spinners > 8 else 1.0)


def share(numbers: Sequence[int], n: int) -> float:
    return Counter(numbers)[n] / len(numbers)


def fluctuating(seed: int) -> Callable[[], float]:
    """Tokens with misses, in bursts: most take their time, some three times as long."""
    dice = random.Random(seed)
    return lambda: dice.choice((0.8, 0.9, 1.0, 1.0, 1.1, 1.3, 2.0, 3.0))


def test_quiet_machine_is_left_alone() -> None:
    machine = Machine(measured, noise=fluctuating(1))
    assert share(machine.run(5000), 2) == 1
    assert not machine.pace.wants_times


def test_spinner_comes_and_goes() -> None:
    machine = Machine(measured)
    machine.run(100)
    for _ in range(3):
        machine.n_spinners = 1
        came = machine.run(300)
        assert came[0] == 2 and share(came[15:], 1) > 0.97
        machine.n_spinners = 0
        gone = machine.run(300)
        assert gone[0] == 1 and share(gone[20:], 2) == 1


@pytest.mark.parametrize("seed", range(5))
def test_misses_do_not_hide_it(seed: int) -> None:
    machine = Machine(measured, n_spinners=1, noise=fluctuating(seed))
    machine.run(100)
    assert share(machine.run(600), 1) > 0.9


def test_two_threads_stay_where_they_are_faster() -> None:
    machine = Machine(measured, n_spinners=2, noise=fluctuating(2))
    machine.run(50)
    assert share(machine.run(2000), 2) > 0.97


def test_second_spinner_brings_the_threads_back() -> None:
    machine = Machine(measured, n_spinners=1)
    assert machine.run(200)[-1] == 1
    machine.n_spinners = 2
    assert share(machine.run(200)[30:], 2) > 0.9


def test_wrong_alarm_costs_little() -> None:
    machine = Machine(measured, waited=0.9)  # of readers, or while memory becomes present
    assert machine.slowness(300) < 1.07
    assert machine.slowness(3000) < 1.01


def test_room_that_is_none_costs_little() -> None:
    """A container's limit on processor time leaves processors idle that it does not give."""
    machine = Machine(measured, n_spinners=1, tells=lambda look: replace(look, idle=2.0))
    machine.run(200)
    assert machine.slowness(3000) < 1.03


@pytest.mark.parametrize("tells", [lambda look: look, lambda look: Look(waited=look.waited),
                                   lambda look: replace(look, waited=None)], ids=["all", "waiting", "processors"])
@pytest.mark.parametrize("n_spinners", [0, 1, 3, 6, 7])
def test_eight_threads_leave_spinners_their_processors(n_spinners: int, tells: Callable[[Look], Look]) -> None:
    machine = Machine(crowded, n_processors=8, ceiling=8, tells=tells)
    machine.run(50)
    machine.n_spinners = n_spinners
    machine.run(400)
    assert machine.slowness(400) < 1.15
    machine.n_spinners = 0
    machine.run(400)
    assert share(machine.run(100), 8) > 0.9


def test_silent_system_is_left_alone() -> None:
    machine = Machine(measured, n_spinners=1, tells=lambda look: Look())
    assert share(machine.run(2000), 2) == 1


def test_user_is_obeyed_at_once() -> None:
    machine = Machine(lambda n, spinners: 0.1 * n, n_processors=4, n_spinners=4, ceiling=4)
    assert machine.run(200)[-1] < 4
    machine.ceiling = 3
    assert machine.run(1) == [3]
    machine.ceiling = 1
    assert share(machine.run(50), 1) == 1
    machine.ceiling = 4
    assert machine.run(1) == [4]


def test_more_threads_than_processors_are_thrown_out_too() -> None:
    machine = Machine(lambda n, spinners: 0.1 / min(n, 2) * (4 if n > 2 else 1), ceiling=6)
    machine.run(50)
    assert machine.slowness(500) < 1.1


def test_clock_that_jumps_changes_nothing_for_long() -> None:
    machine = Machine(measured, n_spinners=1)
    dice = random.Random(3)
    jumps = [-5.0, 0.0, 1e6]
    machine.noise = lambda: dice.choice(jumps) if dice.random() < 0.1 else 1.0
    machine.run(500)
    machine.noise = lambda: 1.0
    assert share(machine.run(600)[300:], 1) > 0.97
    machine.n_spinners = 0
    assert machine.run(300)[-1] == 2


@pytest.mark.parametrize("seed", range(40))
def test_never_much_slower_than_the_best_number(seed: int) -> None:
    """Machines for up to 16 threads whose best number is anywhere, with times that rise on both sides of it."""
    dice = random.Random(seed)
    ceiling = dice.choice((2, 3, 4, 6, 8, 16))
    best = dice.randint(1, ceiling)
    times = {best: 0.05}
    for n in range(best + 1, ceiling + 1):
        times[n] = times[n - 1] * dice.uniform(1.1, 1.6)
    for n in range(best - 1, 0, -1):
        times[n] = times[n + 1] * dice.uniform(1.1, 1.6)
    machine = Machine(lambda n, spinners: times[n], n_processors=ceiling, n_spinners=ceiling - best, ceiling=ceiling)
    machine.run(300)
    assert machine.slowness(1000) < 1.05, (ceiling, best)


# ---- one rule at a time ----

def contended(pace: Pace, n_threads: int, token_s: float = 1.0, look: Look = Look(waited=1.0)) -> Pace:  # noqa: B008  frozen
    """Return it at the beginning of a trial with fewer threads."""
    pace.limit(n_threads)
    pace.heed(look)
    for _ in range(3):
        assert pace.n_threads == n_threads and pace.wants_times
        pace.note(token_s)
    assert pace.n_threads < n_threads
    return pace


def test_time_that_cannot_be_is_no_success() -> None:
    """Two contexts of a model wait for its reads at once: less is left of a token's time than nothing."""
    pace = contended(Pace(), 2)
    for _ in range(8):
        pace.note(-1.0)
    pace.note(2.0)
    assert pace.n_threads == 2


def test_new_number_ends_a_trial() -> None:
    pace = contended(Pace(), 4)
    pace.limit(3)
    assert pace.n_threads == 3 and not pace.wants_times
    contended(pace, 2)


def test_times_of_another_day_are_not_compared_with() -> None:
    pace = contended(Pace(), 2, token_s=1.0)
    pace.note(9.0)
    for _ in range(20):
        pace.heed(Look(waited=0.0))
    contended(pace, 2, token_s=0.1)
    for _ in range(4):
        pace.note(0.11)
    assert pace.n_threads == 2


def test_trials_in_vain_are_forgotten_in_calm() -> None:
    machine = Machine(measured, waited=0.9)
    machine.run(3000)
    machine.waited = 0.02
    machine.run(1000)
    machine.n_spinners = 1
    assert share(machine.run(200)[20:], 1) > 0.97


def test_look_during_a_trial_is_about_two_numbers() -> None:
    pace = contended(Pace(), 2)
    pace.heed(Look(waited=0.0))
    pace.note(9.0)
    assert pace.n_threads == 2 and pace.wants_times, "still contended"


def test_all_idle_processors_are_taken_at_once() -> None:
    machine = Machine(crowded, n_processors=8, ceiling=8, n_spinners=3)
    assert machine.run(300)[-1] == 5
    machine.n_spinners = 0
    assert set(machine.run(100)) == {5, 8}


@pytest.mark.parametrize(("tells", "n_tokens"), [(lambda look: look, 40), (lambda look: Look(waited=look.waited), 90)])
def test_far_fewer_are_found(tells: Callable[[Look], Look], n_tokens: int) -> None:
    machine = Machine(lambda n, spinners: 0.05 * 1.2 ** abs(n - 4), n_processors=16, n_spinners=12, ceiling=16, tells=tells)
    assert machine.run(n_tokens)[-1] == 4
