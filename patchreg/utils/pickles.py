"""Reading data files that others pickled, without running code from them."""

from __future__ import annotations

import io
import pickle
from typing import Any

# A pickled array or number of NumPy refers to these and to nothing else.
_ALLOWED = {
    (f"numpy.{core}.multiarray", name)
    for core in ("core", "_core")
    for name in ("_reconstruct", "scalar")
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that knows containers, strings, numbers and NumPy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no data file needs")
        return super().find_class(module, name)


def unpickle_arrays(content: bytes, encoding: str = "latin1") -> Any:
    """Read a pickle of containers, strings, numbers and arrays; everything else is refused.

    Args:
        content: The pickle.
        encoding: How strings that Python 2 wrote are read; `bytes` keeps them as bytes.

    Raises:
        pickle.UnpicklingError: It is damaged, or refers to anything else.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(content), encoding=encoding).load()
    except (EOFError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise pickle.UnpicklingError(f"it is damaged ({error})") from error
