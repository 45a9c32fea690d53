"""Measures of anagrams by hand."""

from __future__ import annotations

import pytest
import torch

from unweave.attention_tools.scores import alignment, concealment


def test_alignment_and_concealment():
    scores = torch.tensor([[0.30, 0.10], [0.20, 0.25]])
    assert float(alignment(scores)) == pytest.approx(0.25)
    rows, columns = (scores / 0.1).softmax(1).diagonal(), (scores / 0.1).softmax(0).diagonal()
    wanted = float((rows + columns).mean() / 2)
    assert float(concealment(scores, 0.1)) == pytest.approx(wanted)
