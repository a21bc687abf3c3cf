"""The Pareto front against its definition, point by point."""

import random

from wlsup.evaluation.report.pareto import pareto_front


def dominated(one, other):
    return other[0] >= one[0] and other[1] >= one[1] and other != one


def test_the_front_is_that_of_brute_force():
    draw = random.Random(0)
    for _ in range(500):
        points = [(draw.randint(-5, 5), draw.randint(-5, 5)) for _ in range(draw.randint(0, 12))]
        expected = {p for p, one in enumerate(points) if not any(dominated(one, other) for other in points)}
        front = pareto_front(points)
        assert set(front) == expected
        assert len(front) == len(expected)
        assert [points[p][0] for p in front] == sorted(points[p][0] for p in front)


def test_equal_points_are_both_on_it_and_a_lesser_one_is_not():
    assert sorted(pareto_front([(0.0, 1.0), (0.0, 1.0), (0.0, 0.5), (-1.0, 1.0)])) == [0, 1]
