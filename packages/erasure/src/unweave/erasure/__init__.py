"""Erase a concept from Stable Diffusion, exactly and revertibly, and measure what that did."""

from unweave.erasure.all_but_one import AllButOne, AllButOneConfig
from unweave.erasure.closed_form import ClosedFormEdit, closed_form_edit
from unweave.erasure.co_erasing import CoErasing, CoErasingConfig
from unweave.erasure.concept_ablation import ConceptAblation, ConceptAblationConfig
from unweave.erasure.convert import convert_delta
from unweave.erasure.doco import DoCo, DoCoConfig
from unweave.erasure.esd import ESD, ESD_SUBSETS, ESDConfig, esd_loss
from unweave.erasure.evaluation import evaluate_erasure
from unweave.erasure.evaluation_result import ErasureEvaluation
from unweave.erasure.few_shot import TEXT_ENCODER_SUBSETS, FewShotConfig, FewShotErasing
from unweave.erasure.image_prompts import ImagePrompts, train_image_prompts
from unweave.erasure.leaderboard import Canvas, Leaderboard, rank_erasers
from unweave.erasure.mace import MACE, MACEConfig
from unweave.erasure.many import erase_many
from unweave.erasure.methods import METHODS, make_eraser
from unweave.erasure.protocol import Eraser, Erasure, ErasureRequest
from unweave.erasure.purification import purify
from unweave.erasure.rece import RECE, RECEConfig
from unweave.erasure.recipes import RECIPES
from unweave.erasure.spm import SPM, SPMConfig, transported
from unweave.erasure.uce import UCE, UCE_TEMPLATES, UCEConfig

__version__ = "0.1.0"

__all__ = [
    "ESD",
    "ESD_SUBSETS",
    "MACE",
    "METHODS",
    "RECE",
    "RECIPES",
    "SPM",
    "TEXT_ENCODER_SUBSETS",
    "UCE",
    "UCE_TEMPLATES",
    "AllButOne",
    "AllButOneConfig",
    "Canvas",
    "ClosedFormEdit",
    "CoErasing",
    "CoErasingConfig",
    "ConceptAblation",
    "ConceptAblationConfig",
    "DoCo",
    "DoCoConfig",
    "ESDConfig",
    "Eraser",
    "Erasure",
    "ErasureEvaluation",
    "ErasureRequest",
    "FewShotConfig",
    "FewShotErasing",
    "ImagePrompts",
    "Leaderboard",
    "MACEConfig",
    "RECEConfig",
    "SPMConfig",
    "UCEConfig",
    "closed_form_edit",
    "convert_delta",
    "erase_many",
    "esd_loss",
    "evaluate_erasure",
    "make_eraser",
    "purify",
    "rank_erasers",
    "train_image_prompts",
    "transported",
]
