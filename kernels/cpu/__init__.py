"""CPU back ends: `backend.NumbaKernels` compiled with numba, and `native`, a C++ library that may stand in front of it.

Importing this package imports neither.
"""
