"""Learn from data what a merge needs: statistics, coefficients, masks."""
