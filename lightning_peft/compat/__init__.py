"""Private and version-dependent parts of other packages, one module per package.

What stands here may change with any release. Each has the public alternative that it waits for, if
one is planned or known; ``tests/test_private_access.py`` finds such accesses anywhere else.
"""

import logging


def _is_not_advice(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()


# About a kernel for inference on CPUs, which is not used here; said when bitsandbytes is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_advice)
