"""What was saved: FLOPs from the trace, and paired wall-clock."""

from thresher.measure.flops import dense_flops, flops, speedup

__all__ = ["dense_flops", "flops", "speedup"]
