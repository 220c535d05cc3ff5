"""What an evaluation measured: scores with intervals, paired comparisons, and retention over stages."""
