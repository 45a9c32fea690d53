"""Fixtures: the embedded pipeline and its recogniser, loaded once."""

from __future__ import annotations

import pytest

from unweave.emoji_world import load_pipeline, load_recogniser


@pytest.fixture(scope="session")
def pipe():
    """The embedded pipeline; tests leave it as it was."""
    loaded = load_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="session")
def recogniser():
    return load_recogniser()
