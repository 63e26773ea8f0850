"""Element types and reduction operators. Knows no gRPC."""

from dsml_gpu.reduction.dtypes import DTYPES, dtype_of, elements_in, wire_dtype
from dsml_gpu.reduction.operators import OPERATORS, Operator, operator_of, reduce_into

__all__ = ["DTYPES", "OPERATORS", "Operator", "dtype_of", "elements_in", "operator_of", "reduce_into", "wire_dtype"]
