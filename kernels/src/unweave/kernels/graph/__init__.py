"""Products of graphs with tables of rows, and of the rows at the ends of edges."""

from unweave.kernels.graph.functions import Transposed, edge_dot, transpose_csr, weighted_spmm

__all__ = ["Transposed", "edge_dot", "transpose_csr", "weighted_spmm"]
