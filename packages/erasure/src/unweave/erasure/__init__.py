"""Erase a concept from Stable Diffusion, exactly and revertibly, and measure what that did."""

from unweave.erasure.closed_form import ClosedFormEdit, closed_form_edit
from unweave.erasure.esd import ESD, ESD_SUBSETS, ESDConfig, esd_loss
from unweave.erasure.evaluation import evaluate_erasure
from unweave.erasure.evaluation_result import ErasureEvaluation
from unweave.erasure.few_shot import TEXT_ENCODER_SUBSETS, FewShotConfig, FewShotErasing
from unweave.erasure.methods import METHODS, make_eraser
from unweave.erasure.protocol import Eraser, Erasure, ErasureRequest
from unweave.erasure.recipes import RECIPES
from unweave.erasure.uce import UCE, UCE_TEMPLATES, UCEConfig

__version__ = "0.1.0"

__all__ = [
    "ESD",
    "ESD_SUBSETS",
    "METHODS",
    "RECIPES",
    "TEXT_ENCODER_SUBSETS",
    "UCE",
    "UCE_TEMPLATES",
    "ClosedFormEdit",
    "ESDConfig",
    "Eraser",
    "Erasure",
    "ErasureEvaluation",
    "ErasureRequest",
    "FewShotConfig",
    "FewShotErasing",
    "UCEConfig",
    "closed_form_edit",
    "esd_loss",
    "evaluate_erasure",
    "make_eraser",
]
