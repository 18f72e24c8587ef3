"""Triton for the kernels: `triton` and `tl`, or stand-ins if Triton cannot be imported.

Triton is built for Linux. With the stand-ins the kernels can be defined elsewhere too, so that the PyTorch twins run on
any CPU; `check_installed` raises before a launch. `sys.modules` is left alone, because torch looks for Triton there.
"""

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.runtime.interpreter import InterpretedFunction

    WHY_MISSING = None
except ImportError as error:
    from types import SimpleNamespace

    WHY_MISSING, InterpretedFunction = str(error), ()
    gdc_launch_dependents = gdc_wait = None
    triton = SimpleNamespace(jit=lambda function=None, **options: function or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=lambda value: SimpleNamespace(value=value))


def check_installed() -> None:
    """Raises NotImplementedError if there is no Triton to run a kernel."""
    if WHY_MISSING is not None:
        raise NotImplementedError(
            f"the kernels need Triton, which cannot be imported here ({WHY_MISSING}); install it (Linux only), or use "
            "impl='reference', the PyTorch twins."
        )
