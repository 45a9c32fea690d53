"""What unweave-attention-tools says about maps, compositions and anagrams, measured."""

from __future__ import annotations

import anagram_claims
import guidance_claims
import maps_claims
import t2i_zero_claims

from claims_runner import Measure

CLAIMS: dict[str, Measure] = {
    **maps_claims.CLAIMS,
    **guidance_claims.CLAIMS,
    **t2i_zero_claims.CLAIMS,
    **anagram_claims.CLAIMS,
}
