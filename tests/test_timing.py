import pytest

from jvitmoe.runtime import timing


class Machine:
    """Cases whose first step after another case is slow, on a machine that becomes slower with every step."""

    def __init__(self, cold: float, drift: float) -> None:
        self.cold, self.drift, self.steps, self.last, self.visits = cold, drift, 0, None, []

    def case(self, name, seconds):
        def run(steps):
            total = 0.0
            for _ in range(steps):
                self.steps += 1
                total += seconds * (1 + self.drift * self.steps) * (self.cold if self.last != name else 1)
                self.last = name
            self.visits.append((name, steps))
            return total / steps

        return run


def test_cold_caches_and_drift_do_not_reach_the_ratio():
    machine = Machine(cold=3.0, drift=1e-4)
    work = {name: machine.case(name, seconds) for name, seconds in (("a", 0.3), ("b", 0.6), ("a again", 0.3))}
    seconds = timing.interleave(work, rounds=11)
    assert timing.ratio(seconds["a again"], seconds["a"])[0] == pytest.approx(1, rel=0.005)
    assert timing.ratio(seconds["b"], seconds["a"])[0] == pytest.approx(2, rel=0.005)


def test_every_round_visits_every_case_once_in_an_order_of_its_own():
    machine = Machine(cold=1.0, drift=0.0)
    rounds = []
    timing.interleave(
        {name: machine.case(name, 1.0) for name in "abcd"},
        rounds=8,
        progress=lambda number, left: rounds.append(number),
    )
    visits = [name for name, _ in machine.visits[8:]][::2]  # after two probes of each; every visit has a first step
    orders = list(zip(*[iter(visits)] * 4, strict=True))
    assert rounds == list(range(1, 9))
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 1


@pytest.mark.parametrize(("rounds", "outside"), [(1, 0), (5, 0), (6, 0), (9, 1), (10, 1), (15, 3), (20, 5)])
def test_the_interval_has_the_ranks_of_the_binomial_distribution(rounds, outside):
    """Ranks of the 95 % interval of a median, as tabled by Conover (A3 at p = 0.5)."""
    seconds = [float(n) for n in range(1, rounds + 1)]
    median, low, high = timing.ratio(seconds, [1.0] * rounds)
    assert (low, high) == (1 + outside, rounds - outside)
    assert median == (rounds + 1) / 2
