"""Triton as the kernels write it: `triton` and `tl`, or stand-ins where Triton cannot be imported.

Triton is built for Linux. The stand-ins let the kernels be defined elsewhere too, so that the PyTorch twins run on any
CPU; what would launch a kernel raises NotImplementedError. `sys.modules` stays as it is: torch asks it about Triton.
"""

try:
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    WHY_MISSING = None
except ImportError as error:
    from types import SimpleNamespace

    WHY_MISSING = str(error)

    class InterpretedFunction:
        """A kernel in the interpreter: without Triton there is none."""

    class _Kernel:
        """What `triton.jit` makes of a function."""

        def __init__(self, function):
            self.__name__, self.__doc__ = function.__name__, function.__doc__

        def __getitem__(self, grid):
            check_installed()

    class _Constant:
        """A `tl.constexpr`."""

        def __init__(self, value):
            self.value = value

    triton = SimpleNamespace(
        jit=lambda function=None, **options: _Kernel if function is None else _Kernel(function),
        cdiv=lambda x, y: -(-x // y),
        next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
    )
    tl = SimpleNamespace(constexpr=_Constant)


def check_installed():
    """Raises NotImplementedError where there is no Triton to run a kernel."""
    if WHY_MISSING is not None:
        raise NotImplementedError(
            f"the kernels need Triton, which cannot be imported here ({WHY_MISSING}); install it (Linux only), or use "
            "impl='reference', the PyTorch twins."
        )
