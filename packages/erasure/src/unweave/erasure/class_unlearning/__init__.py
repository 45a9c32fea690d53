"""Make a classifier or a language model forget a class, and see by which concepts it knew it.

Class unlearning by concept inference and data poisoning, arXiv 2405.15662. The paper has no
published code: how concepts choose and shape the poison is a reconstruction.
"""

from unweave.erasure.class_unlearning.attribution import (
    attribution_scores,
    class_importance,
    concept_attributions,
    contrast,
    covering_concepts,
    integrated_gradients,
)
from unweave.erasure.class_unlearning.baselines import BASELINES, BaselineUnlearner
from unweave.erasure.class_unlearning.bottleneck import ConceptBottleneck, fit_bottleneck
from unweave.erasure.class_unlearning.class_unlearner import (
    ClassUnlearner,
    ClassUnlearningConfig,
)
from unweave.erasure.class_unlearning.classifier import ClassRequest
from unweave.erasure.class_unlearning.concept_bank import (
    ConceptBank,
    ConceptSamples,
    fit_concept_bank,
    text_concept_bank,
)
from unweave.erasure.class_unlearning.explanation import Explanation
from unweave.erasure.class_unlearning.language import (
    QuestionAnswer,
    TopicRequest,
    TopicUnlearner,
    TopicUnlearningConfig,
    exact_match,
)
from unweave.erasure.class_unlearning.measures import (
    ClassScores,
    accuracy,
    class_scores,
    kl_from_retrained,
    probe_accuracy,
    relearning_steps,
    share_called_non_member,
)
from unweave.erasure.class_unlearning.result import ClassUnlearning, ConceptEntry, ConceptReport

__all__ = [
    "BASELINES",
    "BaselineUnlearner",
    "ClassRequest",
    "ClassScores",
    "ClassUnlearner",
    "ClassUnlearning",
    "ClassUnlearningConfig",
    "ConceptBank",
    "ConceptBottleneck",
    "ConceptEntry",
    "ConceptReport",
    "ConceptSamples",
    "Explanation",
    "QuestionAnswer",
    "TopicRequest",
    "TopicUnlearner",
    "TopicUnlearningConfig",
    "accuracy",
    "attribution_scores",
    "class_importance",
    "class_scores",
    "concept_attributions",
    "contrast",
    "covering_concepts",
    "exact_match",
    "fit_bottleneck",
    "fit_concept_bank",
    "integrated_gradients",
    "kl_from_retrained",
    "probe_accuracy",
    "relearning_steps",
    "share_called_non_member",
    "text_concept_bank",
]
