"""What was saved: FLOPs from the trace, and paired wall-clock."""
