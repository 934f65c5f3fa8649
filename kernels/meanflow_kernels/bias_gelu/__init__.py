"""The bias_gelu operator."""

from .op import bias_gelu, bias_gelu_jvp, compile_cases

__all__ = ["bias_gelu", "bias_gelu_jvp", "compile_cases"]
