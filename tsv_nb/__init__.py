"""Task Singular Vectors: compress, measure and merge fine-tuned models. The method part's public names are importable from here."""
__version__ = "0.1.0"

from .checks import StateDictKeyError
from .compress import CompressedTaskVector, compress, rank_for_ratio
from .interference import interference_by_layer, pairwise_interference, singular_task_interference, stack_factors
from .low_rank import Factors, energy_rank, numerical_rank, reconstruct, truncated_svd
from .merge import merge_plan, orthogonalize, tsv_merge, whiten_factors
from .task_vectors import apply_task_vector, is_matrix, task_arithmetic, task_vector, weight_average

__all__ = ["CompressedTaskVector", "Factors", "StateDictKeyError", "apply_task_vector", "compress", "energy_rank",
           "interference_by_layer", "is_matrix", "merge_plan", "numerical_rank", "orthogonalize", "pairwise_interference",
           "rank_for_ratio", "reconstruct", "singular_task_interference", "stack_factors", "task_arithmetic", "task_vector",
           "truncated_svd", "tsv_merge", "weight_average", "whiten_factors"]
