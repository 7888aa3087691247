"""The parts of SciPy that regression needs, or one clear sentence."""

try:
    from scipy import sparse
    from scipy.sparse.linalg import SuperLU, splu
except ImportError as error:
    raise ImportError(
        "lreg_peft.regression needs SciPy; install it with `pip install lreg_peft[regression]`."
    ) from error

__all__ = ["SuperLU", "sparse", "splu"]
