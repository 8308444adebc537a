"""autochunk: a torch.compile backend that trains without materialising the logits.

>>> model = torch.compile(model, backend="autochunk")  # doctest: +SKIP
"""

from autochunk.backend import FallbackWarning, autochunk
from autochunk.config import OptionError, Options, options
from autochunk.deferred import DeferredTensor, StaleError
from autochunk.explain import Explanation, explain
from autochunk.functional import chunked_linear
from autochunk.report import Report, Row
from autochunk.types import REFUSAL_CODES, Refusal, RefusedError
from autochunk.version import __version__

__all__ = [
    "REFUSAL_CODES",
    "DeferredTensor",
    "Explanation",
    "FallbackWarning",
    "OptionError",
    "Options",
    "Refusal",
    "RefusedError",
    "Report",
    "Row",
    "StaleError",
    "__version__",
    "autochunk",
    "chunked_linear",
    "explain",
    "options",
]
