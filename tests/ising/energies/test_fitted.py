"""The fitted energy against plain weighted least squares in its explicit features, and on planted models."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from excise.errors import InputError
from excise.ising.energies import Energy
from excise.ising.energies.fitted import COUPLING_SD, SCALE_SD, Noise, fit, likeliest

N = 8


def planted(seed, units=N, scale=0.1):
    generator = np.random.default_rng(seed)
    J = generator.normal(0, scale, (units, units))
    J = (J + J.T) / 2
    np.fill_diagonal(J, 0)
    return Energy(generator.gamma(2, 0.2, units), J)


def states(seed, count, units=N):
    generator = np.random.default_rng(seed)
    drawn = {tuple(sorted(generator.choice(units, generator.integers(1, units), replace=False))) for _ in range(count)}
    return [tuple(map(int, removed)) for removed in sorted(drawn)]


def features(fitted, removals):
    """β, γ, u and v features, scaled by their prior standard deviations."""
    rows = []
    for removed in removals:
        x = np.zeros(N)
        x[list(removed)] = 1
        pairs = [x[i] * x[j] for i, j in itertools.combinations(range(N), 2)]
        size = len(removed)
        rows.append(
            [
                SCALE_SD * fitted.prior.energy(removed),
                COUPLING_SD * size * (size - 1) / 2,
                *(fitted.linear_sd * x),
                *(fitted.pair_sd * np.array(pairs)),
            ]
        )
    return np.array(rows)


def test_equals_bayesian_regression_in_explicit_features():
    prior, known, unknown = planted(1), states(2, 40), states(3, 20)
    damages = {removed: planted(4).energy(removed) for removed in known}
    noise = dict(zip(known, np.random.default_rng(5).uniform(0.05, 0.3, len(known)), strict=True))
    fitted = fit(prior, damages, noise, spreads=[(0.2, 0.1)])
    phi = features(fitted, known) / np.array([noise[r] for r in known])[:, None]
    target = np.array([(damages[r] - prior.energy(r)) / noise[r] for r in known])
    precision = phi.T @ phi + np.eye(phi.shape[1])
    weights = np.linalg.solve(precision, phi.T @ target)
    test = features(fitted, unknown)
    np.testing.assert_allclose(
        fitted.energy().energies(unknown), prior.energies(unknown) + test @ weights, rtol=1e-8, atol=1e-9
    )
    variance = np.einsum("ij,ij->i", test, np.linalg.solve(precision, test.T).T)
    np.testing.assert_allclose(fitted.sd(unknown), np.sqrt(variance), rtol=1e-6)
    kernel = features(fitted, known) @ features(fitted, known).T + np.diag([noise[r] ** 2 for r in known])
    residual = np.array([damages[r] - prior.energy(r) for r in known])
    expected = -0.5 * (residual @ np.linalg.solve(kernel, residual) + np.linalg.slogdet(2 * np.pi * kernel)[1])
    assert fitted.log_likelihood() == pytest.approx(expected, rel=1e-9)


def test_recovers_a_planted_model_from_noisy_values():
    truth, generator = planted(0, scale=0.05), np.random.default_rng(1)
    damages = {removed: truth.energy(removed) + 0.01 * generator.normal() for removed in states(2, 400)}
    found = fit(Energy(None, np.zeros((N, N))), damages, 0.01).energy()
    np.testing.assert_allclose(found.h + np.diag(found.J), truth.h, atol=0.03)
    off_diagonal = ~np.eye(N, dtype=bool)
    np.testing.assert_allclose(found.J[off_diagonal], truth.J[off_diagonal], atol=0.02)


def test_a_prior_of_the_wrong_scale_is_corrected_by_a_few_measurements():
    truth = planted(0, scale=0.02)
    prior = Energy(truth.h / 1.4, truth.J / 1.4)
    known, unknown = states(1, 6), states(2, 60)
    found = fit(prior, {removed: truth.energy(removed) for removed in known}, 0.01, spreads=[(0.01, 0.01)]).energy()
    error = np.abs(np.array(found.energies(unknown)) - truth.energies(unknown)).mean()
    assert error < 0.2 * np.abs(np.array(prior.energies(unknown)) - truth.energies(unknown)).mean()


def test_the_most_telling_removals_lower_the_variance_of_all_most():
    known, asked = states(1, 15), states(2, 30)
    fitted = fit(planted(3), {r: planted(4).energy(r) for r in known}, 0.1, spreads=[(0.3, 0.1)])
    told = fitted.most_telling(asked, 3)
    assert len(set(told)) == 3

    def left(measured):
        """Sum of the variances of all, had these been measured too, whatever the values."""
        masks = np.concatenate([fitted.masks, np.array([[float(i in r) for i in range(N)] for r in measured])])
        n = len(masks)
        after = replace(fitted, masks=masks, damages=np.zeros(n), noise=np.full(n, 0.1), common=np.zeros((n, 0)))
        return np.square(after.sd(asked)).sum()

    for k, chosen in enumerate(told):
        assert left([*told[:k], chosen]) == pytest.approx(min(left([*told[:k], r]) for r in asked if r not in told[:k]))
    assert sorted(fitted.most_telling(asked[:2], 5)) == sorted(asked[:2])
    assert fitted.most_telling([], 5) == []


def test_leave_one_out_equals_leaving_one_out():
    known = states(1, 12)
    damages = {r: planted(4).energy(r) for r in known}
    fitted = fit(planted(3), damages, 0.1, spreads=[(0.3, 0.1)])
    predicted, _ = fitted.leave_one_out()
    for k, removed in enumerate(known):
        keep = np.arange(len(known)) != k
        rest = replace(
            fitted,
            masks=fitted.masks[keep],
            damages=fitted.damages[keep],
            noise=fitted.noise[keep],
            common=fitted.common[keep],
        )
        assert predicted[k] == pytest.approx(rest.energy().energy(removed), rel=1e-8)


def test_what_measurements_of_a_group_share_is_told_from_their_differences():
    """Two groups, one of them a nat higher throughout: the fit is that to the damages themselves."""
    truth, removals = planted(4), list(itertools.combinations(range(N), 3))[::2]
    damages, groups = {r: truth.energy(r) for r in removals}, {r: i % 2 for i, r in enumerate(removals)}
    shifted = {r: d + groups[r] for r, d in damages.items()}
    noise = Noise(1e-3, dict.fromkeys(removals, 1.0), groups)
    clean, told, blind = (
        likeliest(planted(3), values, [each], spreads=[(0.3, 0.1)])
        for values, each in ((damages, Noise(1e-3)), (shifted, noise), (shifted, Noise(1e-3)))
    )
    asked = list(itertools.combinations(range(N), 3))[1::2]
    expected, found, wrong = (np.array(each.energy().energies(asked)) for each in (clean, told, blind))
    assert np.std(found - expected) < 0.1 * np.std(wrong - expected)
    corrected = dict(zip(removals, told.corrected(), strict=True))
    level = [np.mean([corrected[r] - damages[r] for r in removals if groups[r] == g]) for g in (0, 1)]
    assert level[0] == pytest.approx(level[1], abs=0.02)
    # The same, by the covariance of all noise written out.
    own = fit(planted(3), damages, 1e-3, spreads=[(0.3, 0.1)])
    loadings = noise.loadings(removals)
    together = replace(own, damages=np.array(list(shifted.values())), common=loadings)
    kernel = own._kernel(own.masks, own.masks) + 1e-6 * np.eye(len(removals)) + loadings @ loadings.T
    inverse = np.linalg.inv(kernel)
    residual = together.damages - own._prior_mean(own.masks)
    left = together.damages - (inverse @ residual) / np.diag(inverse)
    assert together.leave_one_out()[0] == pytest.approx(left, abs=1e-5)


def test_what_overflowed_is_left_out_and_nothing_else_is_refused():
    prior = planted(0)
    finite = fit(prior, {(0,): 1.0, (1, 2): float("inf"), (3,): float("nan")}, 0.1)
    assert finite.damages.tolist() == [1.0]
    with pytest.raises(InputError, match="none that is finite"):
        fit(prior, {(0,): float("nan")}, 0.1)
    with pytest.raises(InputError, match="above 0"):
        fit(prior, {(0,): 1.0}, 0.0)
