"""The optimizer step: AdamW, the moving averages and the low-precision weights in one pass over memory."""

from .op import adamw_ema, adamw_ema_bytes
from .optimizer import AdamWEMA
from .reference import adamw_ema_ref

__all__ = ["AdamWEMA", "adamw_ema", "adamw_ema_bytes", "adamw_ema_ref"]
