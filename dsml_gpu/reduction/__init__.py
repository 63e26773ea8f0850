"""Element types, reduction operators, and who applies them: the host, or the kernels of a GPU. Knows no gRPC."""

from dsml_gpu.reduction.dtypes import DTYPES, dtype_of, elements_in, wire_dtype
from dsml_gpu.reduction.host import HostReducer, use_numpy_only
from dsml_gpu.reduction.operators import OPERATORS, Operator, operator_of
from dsml_gpu.reduction.reducer import Reducer
from dsml_gpu.reduction.weights import checked_weight

__all__ = [
    "DTYPES",
    "OPERATORS",
    "HostReducer",
    "Operator",
    "Reducer",
    "checked_weight",
    "dtype_of",
    "elements_in",
    "operator_of",
    "use_numpy_only",
    "wire_dtype",
]
