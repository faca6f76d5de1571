"""Task Singular Vectors: compress, measure and merge fine-tuned models. The method part's public names are importable from here."""
__version__ = "0.1.0"

from .baselines import dare_merge, ties_merge, zero_shot
from .beyond import boosted_merge, calibrated_merge, isotropic_merge
from .checks import StateDictKeyError
from .compress import CompressedTaskVector, compress, rank_for_ratio
from .interference import interference_by_layer, pairwise_interference, singular_task_interference, stack_factors
from .low_rank import Factors, energy_rank, numerical_rank, reconstruct, truncated_svd
from .masks import TaskMasks, choose_lambdas, consensus_merge, magnitude_masks, tall_masks
from .merge import merge_plan, orthogonalize, tsv_merge, whiten_factors
from .methods import MERGE_METHODS, MergeMethod
from .spaces import core_space_merge, knots_merge
from .task_vectors import apply_task_vector, is_matrix, task_arithmetic, task_vector, weight_average

__all__ = ["CompressedTaskVector", "Factors", "MERGE_METHODS", "MergeMethod", "StateDictKeyError", "TaskMasks",
           "apply_task_vector", "boosted_merge", "calibrated_merge", "choose_lambdas", "compress", "consensus_merge",
           "core_space_merge", "dare_merge", "energy_rank", "interference_by_layer", "is_matrix", "isotropic_merge",
           "knots_merge", "magnitude_masks", "merge_plan", "numerical_rank", "orthogonalize", "pairwise_interference",
           "rank_for_ratio", "reconstruct", "singular_task_interference", "stack_factors", "tall_masks",
           "task_arithmetic", "task_vector", "ties_merge", "truncated_svd", "tsv_merge", "weight_average",
           "whiten_factors", "zero_shot"]
