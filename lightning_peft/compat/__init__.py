"""Private and version-dependent parts of other packages, a module for each package.

What stands here may change with any release. Each has the public alternative that it waits for, if
one is planned or known; ``tests/test_private_access.py`` finds such accesses anywhere else.
"""
