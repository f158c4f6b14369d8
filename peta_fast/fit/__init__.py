"""What must be learned or solved before a merge: coefficients, masks, statistics. One file each."""
