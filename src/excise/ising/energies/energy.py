"""The energy of removing units: E(x) = hᵀx + xᵀJx, with x_i = 1 where unit i is removed."""

from __future__ import annotations

import json
import math
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike, NDArray

from excise.artefacts import json_text, read_arrays, write_arrays
from excise.errors import InputError, reading
from excise.plain import Facts, Values
from excise.text import human_bytes

SYMMETRY_TOLERANCE = 1e-6
# Of one array in an archive, unpacked: a matrix of 11,000 units.
MOST_BYTES = 1 << 30


@dataclass(frozen=True, eq=False, init=False)
class Energy:
    """A quadratic energy over N removable units, E(x) = hᵀx + xᵀJx for x in {0,1}^N.

    The paper's Eq. 5 is h = 0, J = H. An asymmetric J is replaced by its symmetric part, which leaves every energy
    unchanged: silently up to rounding, with a warning below a relative tolerance of 1e-6.

    Args:
        h: Linear part, [N]; nats where the energy predicts a loss.
        J: Quadratic part, symmetric, [N, N].
        labels: One name per unit; "0", "1", … when empty.
        source: Where the energy came from (kind, number of samples, …), plain JSON values.

    Raises:
        InputError: J is empty, not square, not finite or not symmetric, or the shapes differ.

    >>> energy = Energy(h=[0.0, 0.0, -1.0], J=[[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 4.0]])
    >>> energy.energy([0, 1]), energy.energy([2])
    (7.0, 3.0)

    """

    h: Float64[np.ndarray, " N"]
    J: Float64[np.ndarray, "N N"]
    labels: tuple[str, ...] = ()
    source: Values = field(default_factory=dict)

    def __init__(
        self,
        h: ArrayLike | None,
        J: ArrayLike,
        labels: Sequence[str] = (),
        source: Values | None = None,
    ) -> None:
        quadratic = _symmetric_matrix(J)
        n = len(quadratic)
        linear = np.zeros(n) if h is None else _numbers(h, "h")
        if linear.shape != (n,):
            raise InputError(f"h must have one number per unit, shape ({n},) as J is {n}×{n}; got shape {linear.shape}")
        _require_finite(linear, "h")
        names = tuple(str(label) for label in labels) or tuple(str(i) for i in range(n))
        if len(names) != n:
            raise InputError(f"expected {n} labels, one per unit; got {len(names)}")
        # `frozen` guards the names only; solvers and reports share these arrays.
        linear.setflags(write=False)
        quadratic.setflags(write=False)
        object.__setattr__(self, "h", linear)
        object.__setattr__(self, "J", quadratic)
        object.__setattr__(self, "labels", names)
        object.__setattr__(self, "source", dict(source or {}))

    def __len__(self) -> int:
        return len(self.h)

    def __repr__(self) -> str:
        return f"Energy(units={len(self)}, kind={self.source.get('kind', 'plain matrix')!r})"

    def energy(self, removed: Iterable[int]) -> float:
        """Energy of one configuration, the correctly rounded sum of its terms: the same on every machine.

        Every reported energy is computed here, whichever solver found the state.

        Args:
            removed: Indices of the removed units, in any order.

        """
        return self.energies([removed])[0]

    def energies(self, states: Iterable[Iterable[int]]) -> list[float]:
        """Energies of several configurations, each as `energy` gives it."""
        rows = [sorted(removed) for removed in states]
        values = [0.0] * len(rows)
        for size in {len(row) for row in rows}:
            places = [k for k, row in enumerate(rows) if len(row) == size]
            units = np.array([rows[k] for k in places], dtype=np.intp).reshape(len(places), size)
            i, j = np.triu_indices(size, 1)
            # Doubling is exact, so a pair is one term and not two.
            terms = np.hstack([self.h[units], self.J[units, units], 2.0 * self.J[units[:, i], units[:, j]]])
            for k, row in zip(places, terms.tolist(), strict=True):
                # Correctly rounded whatever the order: solvers that meet a state by different ways agree to the last
                # bit.
                values[k] = math.fsum(row)
        return values

    def restrict(self, indices: Iterable[int]) -> Energy:
        """Energy over a subset of the units, the others staying intact; unit k of it is `indices[k]` here."""
        units = [int(i) for i in indices]
        return Energy(
            self.h[units],
            self.J[np.ix_(units, units)],
            labels=[self.labels[i] for i in units],
            source={**self.source, "restricted_to": units},
        )

    def correlation(self) -> Float64[np.ndarray, "N N"]:
        """J_ij / √(d_i d_j) with d_i = h_i + J_ii, the energy of removing unit i alone, [N, N].

        That is the usual correlation where h is 0, and within ±1 where J is positive semi-definite besides; what is
        fitted or has a linear part may exceed it. Rows of units without a positive d_i are 0, with 1 on the diagonal.
        """
        alone = self.h + np.diag(self.J)
        scale = np.zeros(len(self))
        scale[alone > 0] = 1 / np.sqrt(alone[alone > 0])
        correlation = self.J * scale[:, None] * scale[None, :]
        np.fill_diagonal(correlation, 1.0)
        return correlation

    def save(self, path: str | Path) -> None:
        """Write as safetensors (tensors `h`, `J`; labels and source as JSON metadata), atomically."""
        facts = json.loads(json_text({"labels": self.labels, "source": self.source}))
        write_arrays(path, {"h": self.h, "J": self.J}, facts)

    @classmethod
    def load(cls, path: str | Path) -> Energy:
        """Read an energy: safetensors as written by `save`, `.npz` with J (or H) and maybe h, or a plain `.npy` matrix.

        Raises:
            InputError: no such file, another format, or not a valid energy.

        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no file {path}; expected a matrix as .npy, .npz or .safetensors")
        try:
            if path.suffix == ".safetensors":
                return cls(**_read_safetensors(path))
            return cls(**_read_numpy(path))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def _read_safetensors(path: Path) -> Facts:
    arrays, facts = read_arrays(path)
    if "J" not in arrays:
        raise InputError(f"expected a tensor J [N, N]; the file holds {sorted(arrays)}")
    return {name: arrays.get(name) for name in ("h", "J")} | {
        "labels": facts.get("labels", ()),
        "source": facts.get("source", {}),
    }


def _read_numpy(path: Path) -> Facts:
    source: Facts = {"kind": "matrix", "file": path.name}
    with reading(path.name, "a NumPy file of numbers, such as numpy.save(path, H) writes"):
        return _numpy_content(path) | {"source": source}


def _require_honest_sizes(path: Path) -> None:
    """Refuse an archive that unpacks to far more than a matrix for the largest problems, before it is unpacked."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
            claimed = math.prod(shape) * dtype.itemsize
            if claimed > min(entry.file_size, MOST_BYTES):
                raise InputError(f"{entry.filename} in it claims {human_bytes(claimed)} unpacked")


def _numpy_content(path: Path) -> Facts:
    _require_honest_sizes(path)
    # Pickles run code when opened. A map is refused where the file is shorter than its header claims, before anything
    # is allocated.
    content = np.load(path, allow_pickle=False, mmap_mode="r")
    if isinstance(content, np.ndarray):
        return {"h": None, "J": content}
    with content:
        name = next((name for name in ("J", "H") if name in content), None)
        if name is None:
            raise InputError(f"expected an array J (or H) in the .npz; it holds {sorted(content.files)}")
        labels = [str(label) for label in content["labels"]] if "labels" in content else []
        return {"h": content.get("h"), "J": content[name], "labels": labels}


def _numbers(values: ArrayLike, name: str) -> NDArray[np.float64]:
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be real numbers ({error})") from None


def _symmetric_matrix(values: ArrayLike) -> NDArray[np.float64]:
    J = _numbers(values, "J")
    if J.ndim != 2 or J.shape[0] != J.shape[1]:
        raise InputError(f"J must be a square matrix, one row and column per unit; got shape {J.shape}")
    if J.size == 0:
        raise InputError("J has no units (N = 0); expected at least one row and column")
    _require_finite(J, "J")
    scale = float(np.abs(J).max())
    asymmetry = float(np.abs(J - J.T).max())
    if asymmetry > SYMMETRY_TOLERANCE * scale:
        i, j = np.unravel_index(np.abs(J - J.T).argmax(), J.shape)
        raise InputError(
            f"J must be symmetric; J[{i},{j}] = {J[i, j]:.6g} but J[{j},{i}] = {J[j, i]:.6g}. "
            "If the two halves are meant to add up, pass (J + J.T) / 2"
        )
    # Below it the halves differ by the rounding of a matrix product, and a warning would only worry.
    if asymmetry > 1e-12 * scale:
        warnings.warn(
            f"J was symmetrised: its halves differ by up to {asymmetry / scale:.1e} of its largest entry", stacklevel=4
        )
    return (J + J.T) / 2 if asymmetry > 0 else J


def _require_finite(values: NDArray[np.float64], name: str) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        place = ",".join(str(i) for i in bad[0])
        raise InputError(
            f"{name} must be finite; {len(bad)} entries are not, the first at {name}[{place}] = {values[tuple(bad[0])]}"
        )
