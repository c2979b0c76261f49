"""The kernels in CUDA C++, run through CuPy: the same results as on the CPU, see ``docs/howto/gpu.md``.

The ``.cu`` files hold the kernels, one topic each; ``.cuh`` files what they share. `sources` knows which
instances of their templates there are, `module` compiles and launches them with CuPy, and `kernels` has the
functions of `driftscope.kernels` on top of that.
"""
