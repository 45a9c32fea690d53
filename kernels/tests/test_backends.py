"""Which implementation runs."""

import pytest

from unweave.kernels import backends
from unweave.kernels.backends import VARIABLE, BackendError, resolve, use_backend


def test_auto_takes_the_form_of_the_device():
    assert resolve("cpu") == "cpu"
    assert resolve("meta") == "reference"
    assert resolve("cpu", fast=("cuda",)) == "reference"


def test_a_block_chooses_and_ends():
    with use_backend("reference"):
        assert resolve("cpu") == "reference"
        with use_backend("cpu"):
            assert resolve("cpu") == "cpu"
        assert resolve("cpu") == "reference"
    assert resolve("cpu") == "cpu"


def test_the_environment_chooses_where_no_block_does(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert resolve("cpu") == "reference"
    with use_backend("cpu"):
        assert resolve("cpu") == "cpu"
    monkeypatch.setenv(VARIABLE, "tpu")
    with pytest.raises(BackendError, match=r"UNWEAVE_BACKEND must be one of .* got 'tpu'"):
        resolve("cpu")


def test_a_backend_that_cannot_work_is_refused():
    with (
        use_backend("cuda"),
        pytest.raises(BackendError, match="'cuda' was chosen, but the tensors are on 'cpu'"),
    ):
        resolve("cpu")
    with pytest.raises(BackendError, match="no 'cpu' form"), use_backend("cpu"):
        resolve("cpu", fast=("cuda",))
    with pytest.raises(BackendError, match="`name` must be one of"), use_backend("fastest"):
        pass


def test_a_missing_library_is_passed_over_unless_its_form_was_chosen(monkeypatch):
    monkeypatch.setattr(backends, "_installed", lambda library: False)
    assert resolve("cpu", needs={"cpu": "numba"}) == "reference"
    assert resolve("cpu", needs={"cuda": "cupy"}) == "cpu"
    with (
        use_backend("cpu"),
        pytest.raises(BackendError, match=r'pip install "unweave-kernels\[numba\]"'),
    ):
        resolve("cpu", needs={"cpu": "numba"})
