"""SVHN's cropped digits in their published form, MATLAB files.

Source: Netzer et al. 2011, format 2.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wlsup.errors import WlsupError

__all__ = ["read_svhn"]


def read_svhn(path: Path) -> tuple[Tensor, Tensor]:
    """Read ``train_32x32.mat`` or ``test_32x32.mat``; the label 10, which stands for the digit 0, becomes 0.

    Args:
        path: the file.

    Returns:
        Pictures (n, 3, 32, 32) uint8 and labels (n,) int64 in 0..9.

    Raises:
        WlsupError: if the file is damaged, or its pictures and labels do not fit together.
    """
    from scipy.io import loadmat  # on use: only this set needs scipy, which comes with scikit-learn

    try:
        content = loadmat(path, variable_names=["X", "y"])
        pictures, labels = content["X"], content["y"].reshape(-1)
    except Exception as error:  # scipy raises zlib's, struct's and its own by turns
        raise WlsupError(
            f"{path} is no SVHN file that can be read ({type(error).__name__}: {error}): it is cut off or damaged. "
            "Delete it and run `wlsup data fetch svhn`."
        ) from error
    if pictures.ndim != 4 or pictures.shape[:3] != (32, 32, 3) or pictures.dtype != np.uint8:
        raise WlsupError(f"{path}: X is {pictures.dtype} {pictures.shape}, not uint8 (32, 32, 3, n). Fetch it again.")
    if len(labels) != pictures.shape[3]:
        raise WlsupError(f"{path} has {pictures.shape[3]} pictures and {len(labels)} labels. Fetch it again.")
    labels = labels.astype(np.int64)
    if len(labels) and not (labels.min() >= 0 and labels.max() <= 10):
        raise WlsupError(
            f"{path} has labels from {labels.min()} to {labels.max()}; SVHN's are 1 to 10. Fetch it again."
        )
    # (height, width, channel, n) -> (n, channel, height, width)
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(3, 2, 0, 1))), torch.from_numpy(labels % 10)
